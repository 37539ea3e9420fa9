"""The objective `distillation`: equal to FitCLIP, and what its teacher sees, is and leaves alone."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from conftest import build_tiny_clip
from golden import load_golden
from tiny import SMALL, VOCABULARY, build_retriever, loaded, random_tokens, random_videos
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.objectives import DistillationSettings
from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.features import TextFeatures, VideoFeatures
from adaclip_finetune.model.scoring import CosineScorer
from adaclip_finetune.objectives import build_objective
from adaclip_finetune.objectives.base import Group, Opened
from adaclip_finetune.objectives.contrastive import contrastive_loss
from adaclip_finetune.objectives.distillation import Distillation, distillation_loss
from adaclip_finetune.training.backward import Backward

GOLDEN = load_golden("distillation")
CLOSE: Any = {"rtol": 1e-6, "atol": 1e-9}


# ---- the published system ----


class Towers(nn.Module):
    """The towers of the golden values: a linear map of 12 pixels, and sums of token rows.

    The published vector of a video, the mean of the frames' unit vectors, is not normalised again.
    """

    class Scorer(CosineScorer):
        def keep(self, videos: VideoFeatures) -> Tensor:
            assert videos.vector is not None
            return videos.vector

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.text, self.image = nn.Parameter(state["text"].clone()), nn.Linear(12, 16).double()
        self.image.load_state_dict({name: state[f"image.{name}"] for name in ("weight", "bias")})
        clip = nn.Module()
        clip.logit_scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
        self.scorer = self.Scorer(clip)

    def forward(self, batch: TrainBatch) -> tuple[TextFeatures, VideoFeatures]:
        return self.encode_text(batch.token_ids), self.encode_video(batch.videos)

    def encode_text(self, token_ids: Tensor) -> TextFeatures:
        return TextFeatures(self.text[token_ids].sum(dim=1))

    def encode_video(self, videos: VideoBatch) -> VideoFeatures:
        frames = F.normalize(self.image(videos.frames.flatten(2)), dim=-1)
        return VideoFeatures(frames, frames.mean(dim=1), frames, None)


def published(student: Any, teacher: Any, **settings: Any) -> Distillation:
    objective = Distillation(DistillationSettings(**settings), student).double()
    objective._teacher = (Opened(load_config(), None, teacher, plain=True),)  # type: ignore[arg-type]
    return objective


def videos_of(frames: Tensor) -> VideoBatch:
    shape = frames.shape[:2]
    ids = [f"v{number}" for number in range(len(frames))]
    return VideoBatch(frames, torch.ones(shape, dtype=torch.bool), None, torch.zeros(shape, dtype=torch.int64), ids)


def part_name(case: dict[str, Any]) -> str:
    kinds = ("labelled" if case["labelled"] else "unlabelled", "fitted" if case["fit_temperature"] else "fixed")
    return f"{case['init_temperature']} {' '.join(kinds)}"


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: "x".join(map(str, case["scores"].shape)))
def test_the_losses_are_the_published_ones(case: dict[str, Any]) -> None:
    student, teacher = (case[name].requires_grad_() for name in ("scores", "teacher_scores"))
    if "nce_mean" in case:
        loss = 2 * contrastive_loss(student)
        torch.testing.assert_close(loss.item(), case["nce_mean"], **CLOSE)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], case["nce_mean_grad"], **CLOSE)
    loss = distillation_loss(student, teacher)
    torch.testing.assert_close(loss.item(), case["ts_batchmean"], **CLOSE)
    for name, found in zip(("student", "teacher"), torch.autograd.grad(loss, (student, teacher)), strict=True):
        torch.testing.assert_close(found, case[f"ts_batchmean_grad_{name}"], **CLOSE)


@pytest.mark.parametrize("case", GOLDEN["step_of_one_data_set"], ids=part_name)
def test_a_part_of_a_batch_has_the_published_loss_and_gradients(case: dict[str, Any]) -> None:
    temperature, names = case["init_temperature"], ("student_log_scale", "teacher_log_scale")
    towers = Towers(GOLDEN["mixed_batches"][0]["teacher"])
    settings = {"temperature": temperature, "teacher_temperature": temperature, "fit_temperature": True}
    objective = published(towers, towers, labelled_weight=1.0, kd_weight=temperature**-2, **settings)
    for name in names:
        objective.get_parameter(name).data.fill_(case[name].item())
    rows = {name: case[f"student_{name}"].requires_grad_() for name in ("text", "video")}
    rows |= {f"teacher_{name}": case[f"teacher_{name}"] for name in ("text", "video")}
    rows["labelled"] = torch.full((5,), bool(case["labelled"]))
    group = Group([[(f"v{n}", f"caption {n}") for n in range(5)]])
    loss = sum(objective.loss(rows, group).values())
    assert isinstance(loss, Tensor)
    torch.testing.assert_close(loss.item(), case["loss"], **CLOSE)
    loss.backward()
    torch.testing.assert_close(rows["video"].grad, case["grad_video"], **CLOSE)
    # The scorer normalises texts, which removes the part of the gradient along these unit vectors.
    text, gradient = rows["text"].detach(), case["grad_text"]
    expected = gradient - (gradient * text).sum(dim=1, keepdim=True) * text
    torch.testing.assert_close(rows["text"].grad, expected, rtol=1e-6, atol=1e-6)
    for name in names if case["fit_temperature"] else ():
        gradient = objective.get_parameter(name).grad
        found = torch.zeros(()) if gradient is None else gradient
        torch.testing.assert_close(found.item(), case[f"grad_{name}"].item(), **CLOSE)


@pytest.mark.parametrize("case", GOLDEN["mixed_batches"], ids=["plain", "fitted", "prompts", "labelled last"])
def test_four_updates_on_mixed_batches_are_the_published_ones(case: dict[str, Any]) -> None:
    share, temperature = case["labelled_share"], case["init_temperature"]
    share = 0.5 if share == -1 else share
    student = Towers(case["student_start"])
    objective = published(
        student,
        Towers(case["teacher"]).requires_grad_(False),
        labelled_weight=share,
        kd_weight=(1 - share) / temperature**2,
        temperature=temperature,
        teacher_temperature=temperature,
        fit_temperature=case["fit_temperature"],
    )
    if len(case["prompt_ids"]):
        objective._prompts = case["prompt_ids"], case["prompt_ids"]
    labelled = torch.arange(7) < case["n_labelled"] if case["labelled_first"] else torch.arange(7) >= 3
    captions = [f"caption {number}" for number in range(7)]
    videos, second = videos_of(case["video_student"]), videos_of(case["video_teacher"])
    batch = TrainBatch(videos, captions, case["token_ids"], torch.zeros(7, 3), second, labelled)
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=case["lr"], weight_decay=0.01)
    for update in range(4):
        loss = sum(objective(batch, Group([batch.pairs()])).values())
        assert isinstance(loss, Tensor)
        torch.testing.assert_close(loss.item(), case["losses"][update].item(), **CLOSE)
        optimizer.zero_grad()
        loss.backward()
        if not update:
            for name, expected in case["first_grads"].items():
                torch.testing.assert_close(student.get_parameter(name).grad, expected, **CLOSE)
        optimizer.step()
    for name, expected in case["student_end"].items():
        torch.testing.assert_close(student.get_parameter(name).data, expected, **CLOSE)
    scales = torch.stack([objective.student_log_scale.detach(), objective.teacher_log_scale.detach()])
    torch.testing.assert_close(scales, case["log_scales_end"], **CLOSE)


# ---- with the retriever ----

LABELLED = [True, False, False, True, False]


def build(labelled: list[bool] = LABELLED, **settings: Any) -> tuple[Distillation, TrainBatch, Group]:
    """Return a small student beside its teacher, in float64, and five pairs, the first and the last of one video."""
    objective_settings = {"method": "distillation", "config": settings.pop("distillation", {})}
    config = load_config(None, {**SMALL, "objective": objective_settings, "frame_agg": "mlp", **settings})
    clip = build_tiny_clip(vocabulary=VOCABULARY)
    objective = build_objective(config, build_retriever(clip, frame_agg="mlp", **settings))
    assert isinstance(objective, Distillation)
    tokenize = Mock(side_effect=lambda texts, length: random_tokens(len(texts)))
    objective.start(config, replace(loaded(clip), tokenize=tokenize), Mock())
    objective.double().train().choose()
    videos, second = random_videos(len(labelled)), random_videos(len(labelled), frames=config.top_k, view=None)
    videos.video_ids[-1] = videos.video_ids[0]
    captions = [f"caption {number}" for number in range(len(labelled))]
    tokens, noise = random_tokens(len(labelled)), torch.zeros(len(labelled), 6)
    batch = TrainBatch(videos, captions, tokens, noise, second, torch.tensor(labelled))
    return objective, batch, Group([batch.pairs()])


def test_the_teacher_is_the_clip_of_the_start_and_no_part_of_the_state() -> None:
    objective, batch, group = build()
    own = dict(objective.retriever.clip.named_parameters())
    teacher = dict(objective.teacher.retriever.clip.named_parameters())
    assert all(torch.equal(tensor, teacher[name]) and tensor is not teacher[name] for name, tensor in own.items())
    assert not objective.teacher.retriever.training and not any(one.requires_grad for one in teacher.values())
    assert objective.own_state().keys() == {"student_log_scale", "teacher_log_scale"}
    hidden = {id(tensor) for tensor in teacher.values()}
    assert not hidden & {id(tensor) for tensor in objective.parameters()}
    assert len(objective.state_dict()) == len(objective.retriever.state_dict()) + 2
    before = copy.deepcopy(objective.embed_fixed(batch))
    sum(objective(batch, group).values()).backward()  # type: ignore[union-attr]
    with torch.no_grad():
        for tensor in objective.parameters():
            tensor += tensor.grad if tensor.grad is not None else 0
    torch.testing.assert_close(objective.embed_fixed(batch), before, rtol=0, atol=0)
    learns = {name for name, tensor in objective.named_parameters() if tensor.requires_grad}
    assert "retriever.clip.logit_scale" not in learns and "student_log_scale" not in learns


def test_the_teacher_encodes_its_own_frames_of_unlabelled_videos_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch, _ = build()
    teacher, encoded = objective.teacher.retriever, []
    encode = teacher.encode_video
    monkeypatch.setattr(teacher, "encode_video", lambda videos: encoded.append(videos.video_ids) or encode(videos))
    with torch.autocast("cpu", torch.bfloat16):
        rows = objective.embed_fixed(batch)
    assert encoded == [["v1", "v2", "v4"]]
    assert rows["labelled"].tolist() == LABELLED
    assert batch.second is not None
    pixels = (batch.second.frames / 255 - torch.tensor([0.4, 0.5, 0.6])[:, None, None]).double()
    pixels /= torch.tensor([0.2, 0.3, 0.4])[:, None, None].double()
    for row in (1, 2, 4):
        frames = F.normalize(teacher.clip.encode_image(pixels[row]), dim=-1)  # type: ignore[operator]
        torch.testing.assert_close(rows["teacher_video"][row], frames.mean(dim=0), rtol=1e-5, atol=1e-6)
        text = teacher.clip.encode_text(batch.token_ids[row : row + 1])[0]  # type: ignore[operator]
        torch.testing.assert_close(rows["teacher_text"][row], text, rtol=1e-9, atol=1e-9)
    assert not rows["teacher_video"][[0, 3]].any() and rows["teacher_video"].dtype == torch.float64


def test_the_teacher_draws_and_crops_as_the_student_but_selects_nothing() -> None:
    objective, _, _ = build(sampling="segments", augmentation="crop_flip")
    config, views = objective.second_view(load_config(None, {"sampling": "ends", "augmentation": None}))
    assert (config.num_frm, config.sampling, config.augmentation) == (SMALL["top_k"], "ends", None)
    assert not config.use_policy and views.selector is None


def test_labelled_and_unlabelled_rows_are_never_contrasted() -> None:
    objective, batch, group = build()
    rows = objective.embed(batch) | objective.embed_fixed(batch)
    terms = objective.loss(rows, group)
    for name, touched in (("labelled", [1, 2, 4]), ("distillation", [0, 3])):
        changed = {key: tensor.detach().clone() for key, tensor in rows.items()}
        for key in ("text", "video"):
            changed[key][touched] *= torch.rand(64, dtype=torch.float64)
        again = objective.loss(changed, group)
        torch.testing.assert_close(again[name], terms[name])
        (other,) = terms.keys() - {name}
        assert not torch.isclose(again[other], terms[other])


def test_pairs_of_one_video_are_no_negatives_of_each_other() -> None:
    objective, batch, group = build([True] * 5)
    rows = objective.embed(batch) | objective.embed_fixed(batch)
    ((name, loss),) = objective.loss(rows, group).items()
    logits = F.normalize(rows["text"], dim=-1) @ rows["video"].T / 0.015
    torch.testing.assert_close(loss, 0.9999 * 2 * contrastive_loss(logits, group.same(logits.device)))
    assert name == "labelled" and loss < 0.9999 * 2 * contrastive_loss(logits)
    objective, batch, group = build([False] * 5)
    assert list(objective(batch, group)) == ["distillation"]


def test_a_fitted_temperature_is_held_and_weighs_the_distillation_as_published() -> None:
    fitted = {"fit_temperature": True, "temperature": 0.02, "teacher_temperature": 0.05, "labelled_weight": 0.0}
    objective, batch, group = build(distillation=fitted)
    fixed, _, _ = build(distillation={**fitted, "fit_temperature": False})
    assert objective(batch, group)["distillation"].item() == pytest.approx(fixed(batch, group)["distillation"].item())
    with torch.no_grad():
        objective.student_log_scale.fill_(10.0)
        objective.teacher_log_scale.fill_(-math.log(0.025))
    rows = objective.embed(batch) | objective.embed_fixed(batch)
    loss = objective.loss(rows, group)["distillation"]
    assert objective.student_log_scale.item() == pytest.approx(-math.log(0.001))
    chosen = ~rows["labelled"]
    text, video, of_teacher = (rows[name][chosen] for name in ("text", "video", "teacher_text"))
    student = F.normalize(text, dim=-1) @ video.T / 0.001
    teacher = F.normalize(of_teacher, dim=-1) @ rows["teacher_video"][chosen].T / 0.025
    torch.testing.assert_close(loss, 0.4444 * 4 * distillation_loss(student, teacher))


def test_prompts_replace_the_texts_of_unlabelled_videos(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree four\n")
    objective, batch, group = build(distillation={"prompts": str(tmp_path / "prompts.txt")})
    rows = objective.embed(batch) | objective.embed_fixed(batch)
    assert "teacher_text" not in rows
    loss = objective.loss(rows, group)["distillation"]
    clip = objective.retriever.clip
    texts = F.normalize(clip.encode_text(random_tokens(3)), dim=-1)  # type: ignore[operator]
    student = texts @ rows["video"][~rows["labelled"]].T
    teacher = texts @ rows["teacher_video"][~rows["labelled"]].T
    assert student.shape == (3, 3)
    torch.testing.assert_close(loss, 0.4444 * distillation_loss(student / 0.015, teacher / 0.015))
    whole: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    for chunk, gradients in ((0, whole), (2, parts)):
        objective.zero_grad()
        Backward(Accelerator(cpu=True), objective, objective, chunk)(batch, group, int)
        gradients |= {name: own.grad for name, own in objective.named_parameters() if own.grad is not None}
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    assert whole["retriever.clip.token_embedding.weight"].any()


@pytest.mark.parametrize(("content", "told"), [(None, "cannot be read"), (b"\xff", "UTF-8"), (b"one\n", "at least 2")])
def test_unusable_prompts_are_refused(content: bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"objective\.config\.prompts .*prompts\.txt.*{told}"):
        build(distillation={"prompts": str(path)})


def test_training_data_without_an_unlabelled_part_is_refused() -> None:
    distillation = {"method": "distillation"}
    parts = [{"annotation": "a.json"}, {"annotation": "b.json", "labelled": False}]
    load_config(None, {"objective": distillation, "train_annot": parts})
    for given in ("a.json", parts[:1]):
        with pytest.raises(UserError, match=r"train_annot is labelled.*labelled false"):
            load_config(None, {"objective": distillation, "train_annot": given})
