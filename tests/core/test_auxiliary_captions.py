"""The objective `auxiliary_captions`: golden values of CLIP-ViP, plain loops, and pairs that are left out."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from golden import load_golden
from loading import COUNTS, make_config, write_store
from tiny import build_retriever, random_frames, random_tokens, random_videos
from torch import Tensor

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.objectives import AuxiliaryCaptionsSettings
from adaclip_finetune.data.dataset import TrainBatch, VideoReader
from adaclip_finetune.objectives import Objective, build_objective
from adaclip_finetune.objectives.base import Group, Rows
from adaclip_finetune.objectives.contrastive import contrastive_loss

GOLDEN = load_golden("op_clip_vip_losses")["3"]
PUBLISHED = {
    "v_s": "NCELearnableTempLoss",
    "v_s+v_c": "NCELearnableTempLoss_vs_vc",
    "v_s+v_c+f_c": "NCELearnableTempLoss_vs_vc_fc",
    "v_sc": "NCELearnableTempLoss_vsc",
    "v_sc+f_c": "NCELearnableTempLoss_vsc_fc",
}


def objective_of(loss: str, logit_scale: float, **settings: Any) -> Objective:
    config = load_config(None, {"objective": {"method": "auxiliary_captions", "config": {"loss": loss}}})
    retriever = build_retriever(use_policy=False, **settings).double()
    with torch.no_grad():
        retriever.clip.logit_scale.fill_(logit_scale)
    return build_objective(config, retriever)


def published_rows() -> Rows:
    """Return the unit vectors of four videos and their texts, of which no two are alike."""
    rows = {name: torch.tensor(GOLDEN[name], dtype=torch.float64) for name in ("text", "video", "frame", "auxiliary")}
    ids = {"text_ids": torch.arange(4)[:, None], "auxiliary_ids": torch.arange(4, 8)[:, None]}
    return rows | ids | {"has_auxiliary": torch.ones(4, dtype=torch.bool)}


def different() -> Group:
    return Group([[(f"v{number}", f"caption {number}") for number in range(4)]])


@pytest.mark.parametrize("loss", PUBLISHED)
def test_losses_are_those_of_the_published_system(loss: str) -> None:
    objective = objective_of(loss, GOLDEN["logit_scale"])
    terms = objective.loss(published_rows(), different())
    assert set(terms) == {*loss.split("+")}
    total = sum(terms.values(), torch.zeros((), dtype=torch.float64))
    assert total.item() == pytest.approx(GOLDEN["loss"][PUBLISHED[loss]], rel=1e-9)
    if PUBLISHED[loss] == GOLDEN["grad_of"]:
        (gradient,) = torch.autograd.grad(total, objective.retriever.clip.get_parameter("logit_scale"))
        assert gradient.item() == pytest.approx(GOLDEN["grad_logit_scale"], rel=1e-9)


def test_every_loss_is_held_to_a_published_one() -> None:
    assert set(PUBLISHED) == {*get_args(AuxiliaryCaptionsSettings.model_fields["loss"].annotation)}


# Pairs of videos, sentences and auxiliary captions ("": none). Some videos and texts occur twice.
PAIRS = [("a", "s0", "c0"), ("b", "s1", "c1"), ("a", "s2", "c0"), ("c", "s1", ""), ("d", "s4", "s0"), ("e", "s5", "c5")]


def slow_terms(scale: float, rows: dict[str, Any]) -> dict[str, float]:
    """Return all terms by loops over texts and videos; `rows` holds lists of vectors."""
    count = range(len(PAIRS))
    having = [i for i in count if PAIRS[i][2]]
    texts = [("s", i) for i in count] + [("c", i) for i in having]

    def spoken(kind: str, i: int) -> str:
        return PAIRS[i][1 if kind == "s" else 2]

    def describes(kind: str, i: int, j: int) -> bool:
        """Whether text i describes video j."""
        pairs = PAIRS[i][0] == PAIRS[j][0] or PAIRS[i][1] == PAIRS[j][1]
        return pairs or spoken(kind, i) in (PAIRS[j][1], PAIRS[j][2])

    def logit(kind: str, i: int, j: int, of: str) -> float:
        vector = rows["text" if kind == "s" else "auxiliary"][i]
        return scale * sum(a * b for a, b in zip(vector, rows[of][j], strict=True))

    def to_video(kind: str, i: int, videos: Any, of: str = "video") -> float:
        total = sum(math.exp(logit(kind, i, j, of)) for j in videos if j == i or not describes(kind, i, j))
        return math.log(total) - logit(kind, i, i, of)

    def to_text(kind: str, j: int, among: Any, of: str = "video") -> float:
        allowed = [(k, i) for k, i in among if (k, i) == (kind, j) or not describes(k, i, j)]
        return math.log(sum(math.exp(logit(k, i, j, of)) for k, i in allowed)) - logit(kind, j, j, of)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    sentences, captions = [("s", i) for i in count], [("c", i) for i in having]
    return {
        "v_s": mean([to_video("s", i, count) for i in count]) + mean([to_text("s", i, sentences) for i in count]),
        "v_c": mean([to_video("c", i, having) for i in having]) + mean([to_text("c", i, captions) for i in having]),
        "f_c": mean([to_video("c", i, having, "frame") for i in having])
        + mean([to_text("c", i, captions, "frame") for i in having]),
        "v_sc": mean([to_video("s", i, count) for i in count])
        + mean([to_video("c", i, count) for i in having])
        + mean([to_text("s", i, texts) for i in count])
        + mean([to_text("c", i, texts) for i in having]),
    }


def random_rows() -> Rows:
    vectors = torch.randn(4, len(PAIRS), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = dict(
        zip(("text", "video", "frame", "auxiliary"), torch.nn.functional.normalize(vectors, dim=-1), strict=True)
    )
    words = sorted({text for _, *texts in PAIRS for text in texts})
    ids = [torch.tensor([[words.index(pair[kind]), 7] for pair in PAIRS]) for kind in (1, 2)]
    has = torch.tensor([bool(pair[2]) for pair in PAIRS])
    return {**names, "text_ids": ids[0], "auxiliary_ids": ids[1], "has_auxiliary": has}


@pytest.mark.parametrize("loss", [loss for loss in PUBLISHED if loss != "v_s"])
def test_texts_that_describe_a_video_are_no_negatives_of_it(loss: str) -> None:
    """Also of pairs without an auxiliary caption, which have no part in v_c and f_c."""
    rows = random_rows()
    terms = objective_of(loss, 1.5).loss(rows, Group([[(video, text) for video, text, _ in PAIRS]]))
    expected = slow_terms(math.exp(1.5), {name: tensor.tolist() for name, tensor in rows.items()})
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {name: expected[name] for name in loss.split("+")}, rel=1e-9
    )


def test_without_auxiliary_captions_it_is_the_contrastive_loss_added_over_directions() -> None:
    rows, objective = random_rows(), objective_of("v_s", 1.5)
    group = Group([[(video, text) for video, text, _ in PAIRS]])
    logits = math.exp(1.5) * rows["text"] @ rows["video"].T
    expected = 2 * contrastive_loss(logits, group.same(logits.device))
    torch.testing.assert_close(objective.loss({name: rows[name] for name in ("text", "video")}, group)["v_s"], expected)


def test_a_batch_without_auxiliary_captions_has_the_loss_of_its_sentences() -> None:
    rows = published_rows()
    alone = objective_of("v_s", 2.0).loss(rows, different())["v_s"]
    rows["has_auxiliary"][:] = False
    for name in ("frame", "auxiliary"):
        rows[name].requires_grad_()
    for loss in ("v_s+v_c+f_c", "v_sc+f_c"):
        objective = objective_of(loss, 2.0)
        total = sum(objective.loss(rows, different()).values(), torch.zeros(()))
        torch.testing.assert_close(total, alone)
        gradients = torch.autograd.grad(total, [rows["frame"], rows["auxiliary"]], materialize_grads=True)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("model", [{}, {"frame_agg": "qscore"}, {"tower": {"method": "global_local"}}])
def test_rows_are_the_vectors_of_texts_and_of_a_video_of_one_frame(model: dict[str, Any]) -> None:
    objective = objective_of("v_sc+f_c", 2.0, **model)
    frames = random_frames(4, 1, 3, 32, 32)
    second = random_videos(frames=1, view=None)
    second.frames[:] = frames
    tokens = random_tokens()
    batch = TrainBatch(random_videos(view=None), list("abcd"), tokens, torch.zeros(4, 6), second)
    batch = replace(batch, auxiliary_ids=tokens.flip(0), has_auxiliary=torch.ones(4) > 0)
    rows, retriever = objective.embed(batch), objective.retriever
    assert set(rows) == {"text", "video", "auxiliary", "frame"}
    torch.testing.assert_close(rows["auxiliary"], rows["text"].flip(0))
    video = retriever.scorer.keep(retriever.encode_video(second))
    expected, found = (unit(kept.flatten(1)) for kept in (video, rows["frame"]))
    torch.testing.assert_close(found, expected)


def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_the_middle_frame_is_read_whatever_the_frames_of_the_run(tmp_path: Path) -> None:
    store = write_store(tmp_path)
    for settings in ({"sampling": "ends"}, {"to_last_frame": True}, {"num_frm_subset": 2}):
        again = objective_of("v_sc+f_c", 2.0).second_view(make_config(**settings))
        assert again is not None
        reader = VideoReader(store, *again)
        for name, count in COUNTS.items():
            item = reader.read(name)
            assert item.indices.tolist() == [count // 2] and item.frames.shape[0] == 1 and item.policy_frames is None
    assert objective_of("v_sc", 2.0).second_view(make_config()) is None
