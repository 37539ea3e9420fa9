"""Captions to token ids: what is cut, that the end token stays, how many were cut, and padding to a whole context."""

import open_clip
import pytest
import torch
from torch import Tensor

from adaclip_finetune.weights.loaded import Tokenizer

START, END = 49406, 49407
clip_tokenizer = Tokenizer(open_clip.get_tokenizer("ViT-B-32"), 77, whole_context=False)


def sentencepiece_like(texts: list[str], length: int) -> Tensor:
    """As SigLIP's tokenizer: a number a word, an end token 1, padding 9; cut before the end token."""
    rows = [[*[*(20 + len(word) for word in text.split())][: length - 1], 1] for text in texts]
    return torch.tensor([row + [9] * (length - len(row)) for row in rows])


def test_the_end_token_is_kept() -> None:
    for words in (1, 3, 6, 100):
        ids = clip_tokenizer(["word " * words], 5)[0]
        kept = min(words, 3)
        assert ids.dtype == torch.int64 and ids.shape == (5,)
        assert ids[0] == START and ids[kept + 1] == END and (ids[kept + 2 :] == 0).all()


@pytest.mark.parametrize("max_len", [3, 4, 20, 76, 77])
def test_count_cut_at_the_boundary(max_len: int) -> None:
    fits, one_more = "word " * (max_len - 2), "word " * (max_len - 1)
    assert clip_tokenizer.count_cut([fits], max_len) == 0
    assert clip_tokenizer.count_cut([one_more], max_len) == 1
    assert clip_tokenizer.count_cut([fits, one_more, "", one_more + "and more", "word"], max_len) == 2


def test_count_cut_where_the_lost_token_has_the_number_of_padding() -> None:
    # "!" inside a word has number 0 in CLIP's vocabulary, which is also its padding.
    texts = ["!?\N{SNOWMAN}" * repeats for repeats in range(1, 9)]
    tokens = [len(open_clip.tokenizer._tokenizer.encode(text)) + 2 for text in texts]
    for max_len in range(3, 30):
        assert clip_tokenizer.count_cut(texts, max_len) == sum(length > max_len for length in tokens)


def test_count_cut_of_another_tokenizer() -> None:
    tokenizer = Tokenizer(sentencepiece_like, 12, whole_context=True)
    texts = ["a bb ccc dddd eeeee"[:end] for end in (1, 4, 8, 13, 19)]
    for max_len in range(3, 13):
        assert tokenizer.count_cut(texts, max_len) == sum(len(text.split()) + 1 > max_len for text in texts)


def test_whole_context_is_padded_as_the_tokenizer_pads() -> None:
    tokenizer = Tokenizer(sentencepiece_like, 12, whole_context=True)
    texts = ["a bb", "a bb ccc dddd eeeee ffffff"]
    ids = tokenizer(texts, 5)
    assert ids.tolist() == [[21, 22, 1] + [9] * 9, [21, 22, 23, 24, 1] + [9] * 7]
    # What is not cut is what the tower was trained with.
    assert torch.equal(ids[:1], sentencepiece_like(texts[:1], 12))
    assert torch.equal(tokenizer(texts, 12), sentencepiece_like(texts, 12))
