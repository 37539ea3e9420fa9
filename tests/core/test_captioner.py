"""The captioner: published mappers, noise and losses; prefixes of videos and frames; its language model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from speaking import write_language_model
from tiny import build_retriever, random_videos
from torch import Tensor, nn

from adaclip_finetune.config.choices.captioners import MlpCaptionerSettings, TransformerCaptionerSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.captioner import Captioner, MlpMapper, TransformerMapper
from adaclip_finetune.model.features import VideoFeatures
from adaclip_finetune.model.hard_topk import Selection
from adaclip_finetune.model.language_model import LanguageModel, Tokens, token_losses
from adaclip_finetune.objectives.captioning import gaussian, with_noise

TEXTS = ["a red ring", "two blue discs swaps", "é", ""]
PUBLISHED = {
    "prefix_const": "prefix", "transformer.layers": "layers", ".attn.to_queries": ".queries",
    ".attn.to_keys_values": ".keys_values", ".attn.project": ".project", ".mlp.fc1": ".fc", ".mlp.fc2": ".proj",
    "model.0": "hidden", "model.2": "out",
}  # fmt: skip


def captioner(folder: Path, /, method: str = "mlp", **settings: Any) -> Captioner:
    """Return a captioner of a retriever of six frames, of which two are chosen."""
    given = {"language_model": str(folder), "prefix_length": 3, "max_tokens": 20, **settings}
    found = build_retriever(captioner={"method": method, "config": given}).captioner
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "mapper"),
    [
        ("mlp_mapper", MlpMapper(MlpCaptionerSettings(prefix_length=4), 8, 16)),
        (
            "transformer_mapper",
            TransformerMapper(TransformerCaptionerSettings(prefix_length=4, vector_tokens=3, layers=2), 8, 16),
        ),
    ],
)
def test_mappers_are_the_published_ones(name: str, mapper: nn.Module) -> None:
    golden, state = load_golden("captioning")[name], {}
    for key, tensor in golden["state"].items():
        for theirs, ours in PUBLISHED.items():
            key = key.replace(theirs, ours)
        state[key] = tensor
    mapper.double().load_state_dict(state)
    torch.testing.assert_close(mapper(golden["x"]), golden["prefix"], atol=1e-12, rtol=0)


def test_the_published_transformer_has_the_published_size() -> None:
    with torch.device("meta"):
        mapper = TransformerMapper(TransformerCaptionerSettings(), 512, 768)
    assert sum(parameter.numel() for parameter in mapper.parameters()) == 53_587_968


def test_noise_and_losses_are_the_published_ones() -> None:
    golden = load_golden("captioning")
    for case in golden["noise"]:
        torch.testing.assert_close(with_noise(case["x"], case["gaussian_draw"], case["variance"]), case["y"])
    for case in golden["token_losses"]:
        ids, before = case["tokens"], case["prefix_length"] - 1
        found = token_losses(case["logits"][:, before:-1], Tokens(ids, ids != 0))  # the original counts pads, too
        torch.testing.assert_close(found, case["token_losses"], atol=1e-12, rtol=0)


def test_noise_depends_on_its_own_row_alone() -> None:
    rows = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    drawn = gaussian(rows, 4000)
    assert torch.equal(gaussian(rows[1:], 4000), drawn[1:])
    assert drawn.mean().abs() < 0.03 and abs(drawn.var() - 1) < 0.05
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.06


def test_the_loss_of_a_caption_depends_neither_on_pads_nor_on_the_batch(language_model: Path) -> None:
    model = LanguageModel(str(language_model))
    model.module.double()
    prefix = torch.randn(4, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = model.tokenize(TEXTS, 20)
    assert tokens.mask.sum(dim=1).tolist() == [11, 20, 3, 1]  # bytes and an end; the second was cut and has none
    assert model.end not in tokens.ids[1] and tokens.ids[3, 0] == model.end
    losses = model.losses(prefix, tokens)
    for row, (ids, mask) in enumerate(zip(*tokens, strict=True)):
        count = int(mask.sum())
        words = model.module.get_input_embeddings()(ids[None, :count])
        logits = model.module(inputs_embeds=torch.cat([prefix[row : row + 1], words], dim=1)).logits
        expected = F.cross_entropy(logits[0, 2 : 2 + count], ids[:count], reduction="none")
        torch.testing.assert_close(losses[row, :count], expected)
        assert not losses[row, count:].any()


def test_one_beam_takes_the_likeliest_byte_and_more_beams_find_likelier_captions(language_model: Path) -> None:
    model = LanguageModel(str(language_model))
    prefix = 3 * torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(1))
    greedy, searched = model.generate(prefix, 8, beams=1), model.generate(prefix, 8, beams=8)
    logits = model.module(inputs_embeds=prefix).logits[:, -1]
    assert greedy[:, 0].equal(logits.argmax(dim=1)) and greedy.shape == searched.shape == (6, 8)

    def likelihood(ids: Tensor) -> Tensor:
        lengths = ((ids == model.end).cumsum(dim=1) == 0).sum(dim=1) + 1
        tokens = Tokens(ids, torch.arange(8) < lengths[:, None])
        return -model.losses(prefix, tokens).sum(dim=1) / tokens.mask.sum(dim=1)

    gained = likelihood(searched) - likelihood(greedy)
    assert (gained > -1e-5).all() and gained.max() > 0.01


def test_texts_end_where_their_end_token_is(language_model: Path) -> None:
    model = LanguageModel(str(language_model))
    ids = model.tokenize(["a  ring\nof 3", "é", ""], 20).ids
    assert model.texts(F.pad(ids, (0, 2), value=5)) == ["a ring of 3", "é", ""]


def test_frames_are_read_in_the_order_of_time(language_model: Path) -> None:
    tokens = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([[4, 1], [0, 5]])
    features = VideoFeatures(
        tokens, tokens.mean(dim=1), torch.ones(2, 6), Selection(torch.empty(0), indices, torch.empty(0))
    )
    unit = F.normalize(tokens, dim=-1)
    of_frames = captioner(language_model, prefix="frames")
    inputs = of_frames.inputs(features)
    torch.testing.assert_close(inputs, torch.stack([unit[0].flip(0), unit[1]]))
    prefix = of_frames(inputs)
    assert prefix.shape == (2, 2 * 3, 32)
    torch.testing.assert_close(prefix[0, 3:], of_frames.mapper(unit[0, :1])[0])
    (vectors,) = captioner(language_model).inputs(features).unbind(dim=1)
    torch.testing.assert_close(vectors, F.normalize(tokens.mean(dim=1), dim=-1))


def test_the_language_model_is_recognised_and_not_part_of_the_state(language_model: Path, tmp_path: Path) -> None:
    first = captioner(language_model)
    assert not first.digest.any()
    first.language_model()
    assert first.digest.any() and {name.split(".")[0] for name in first.state_dict()} == {"mapper", "digest"}
    assert not copy.deepcopy(first)._opened and copy.deepcopy(first).digest.equal(first.digest)

    other = captioner(write_language_model(tmp_path / "other", seed=1))
    other.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="learned with"):
        other.language_model()
    again = captioner(language_model)
    again.load_state_dict(first.state_dict())
    assert again.language_model().module.dtype == torch.float32
    assert again.double().language_model().module.dtype == torch.float64


def test_the_captioner_changes_nothing_else_of_the_retriever(language_model: Path) -> None:
    given = {"method": "mlp", "config": {"language_model": str(language_model)}}
    plain, speaking = build_retriever().eval(), build_retriever(captioner=given).eval()
    with torch.no_grad():
        assert torch.equal(*(model.encode_video(random_videos()).tokens for model in (plain, speaking)))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"language_model": "no/such/model"}, "no/such/model"),
        ({"method": "transformer", "heads": 5}, "heads 5"),
        ({"prefix_length": 100, "max_tokens": 29}, "reads 128 tokens"),
        ({"prefix": "frames", "prefix_length": 50, "max_tokens": 29}, "reads 128 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(language_model: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        captioner(language_model, **settings).language_model()
