"""Figures of captions equal those of the published programs, and do what their definitions say."""

import sys

import pytest
import torch
from golden import load_golden

from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.caption_metrics import caption_figures, cider, clip_scores, rouge_l, words_of


@pytest.mark.parametrize("case", range(3))
def test_figures_are_those_of_the_coco_evaluation(case: int) -> None:
    golden = load_golden("caption_figures")[case]
    found = caption_figures(golden["captions"], golden["references"])
    for name, expected in golden["figures"].items():
        assert found[name] == pytest.approx(expected, abs=1e-7), name


def test_words_are_separated_as_in_the_penn_treebank_without_case_and_punctuation() -> None:
    texts = ["A man's dog doesn't run. It sits; (yes) \"no\"!", "...", ""]
    assert words_of(texts) == [["a", "man", "'s", "dog", "does", "n't", "run", "it", "sits", "yes", "no"], [], []]


def test_a_caption_that_is_its_reference_has_the_highest_figures_and_a_blank_one_the_lowest() -> None:
    references = [["a red ring jumps over a cross"], ["two blue discs swap their places"]]
    best = caption_figures([of_one[0] for of_one in references], references)
    assert [best["CIDEr"], best["BLEU-4"], best["ROUGE-L"]] == pytest.approx([1000, 100, 100])
    assert 99 < best["METEOR"] < 100  # its penalty for fragments is not 0
    assert caption_figures(["", ""], references) == dict.fromkeys(best, 0)


def test_meteor_knows_stems_and_the_best_reference_counts() -> None:
    stem, other = (caption_figures([text], [["it jumped", "no"]])["METEOR"] for text in ("it jumping", "it sleeping"))
    assert stem > other > 0
    more = caption_figures(["it jumping"], [["no", "it jumped", "something else"]])["METEOR"]
    assert more == stem


def test_words_that_all_videos_share_do_not_count_in_cider() -> None:
    references = [[["a", "ring"]], [["a", "disc"]]]
    assert cider([["a"], ["a"]], references) == 0
    assert cider([["a", "ring"], ["a"]], references) > cider([["ring"], ["a"]], references) > 0
    assert cider([["a", "ring"] + ["so"] * 9, ["a"]], references) < cider([["a", "ring"], ["a"]], references)


def test_rouge_is_the_longest_common_subsequence() -> None:
    said, right = ["a", "b", "x", "c", "d"], ["a", "y", "b", "c", "e", "f"]
    precision, recall = 3 / 5, 3 / 6
    assert rouge_l([said], [[right]]) == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_clip_scores_are_the_published_ones() -> None:
    golden = load_golden("captioning")["clipscore"]
    scores, with_references = clip_scores(
        golden["caption_features"],
        golden["image_features"],
        golden["reference_features"],
        golden["caption_of_reference"],
    )
    torch.testing.assert_close(scores, golden["clipscore"], atol=1e-6, rtol=0)
    torch.testing.assert_close(with_references, golden["refclipscore"], atol=1e-6, rtol=0)


def test_a_missing_library_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(UserError, match=r"nltk\.tokenize.*\[caption\]"):
        words_of(["a ring"])
