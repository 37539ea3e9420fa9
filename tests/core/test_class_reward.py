"""The adaptation `clip_reward` in classification: equal to RLCF, and to what it says of views."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from test_clip_reward import equal, everything, published_clip
from tiny import build_retriever, random_videos
from torch import Tensor

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.adaptations import ClipRewardSettings
from adaclip_finetune.data.preprocess import CropFlip, ImageSpec
from adaclip_finetune.data.sampling import generator
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation import clip_reward
from adaclip_finetune.evaluation.adaptation.base import QueryBatch
from adaclip_finetune.evaluation.adaptation.clip_reward import ClipReward
from adaclip_finetune.evaluation.adaptation.losses import (
    DISTILLATIONS,
    clip_scores,
    policy_gradient_loss,
    weighted_mean,
)
from adaclip_finetune.evaluation.views import chosen_frames, draw_parts, most_certain, viewed

GOLDEN = load_golden("reward_classes")


def started(template: str, learns: str = "full", **settings: Any) -> ClipReward:
    """Return the adaptation of a classifier whose texts have this file of templates."""
    own = {"reward": ["self"], "learns": {"method": learns}, **settings}
    sections: dict[str, Any] = {"task": {"method": "classification", "config": {"templates": template}}}
    sections["adaptation"] = {"method": "clip_reward", "config": own}
    config = load_config(None, {"do_inference": True, **sections})
    assert isinstance(config.adaptation.config, ClipRewardSettings)
    adaptation = ClipReward(config.adaptation.config)
    adaptation.start(config, Mock())
    return adaptation


# ---- the published system ----


@pytest.mark.parametrize("case", GOLDEN["confidence"], ids=lambda case: f"{len(case['logits'])} views")
def test_the_most_certain_views_are_the_published_ones(case: dict[str, Any]) -> None:
    found = most_certain(case["logits"], case["share"])
    assert found.tolist() == case["index"].tolist()
    assert case["logits"][found].equal(case["selected"])


@pytest.mark.parametrize("case", GOLDEN["distillation"], ids=range(len(GOLDEN["distillation"])))
@pytest.mark.parametrize(
    ("loss", "value", "gradients"),
    [
        ("distillation", "kd", ("kd_grad", "kd_kl_grad")),  # the divergence differs by a constant
        ("adaptive_distillation", "atkd", ("atkd_grad",)),
        ("decoupled_distillation", "dkd", ("dkd_grad",)),
    ],
)
def test_distillation_is_the_published_baseline(
    loss: str, value: str, gradients: tuple[str, ...], case: dict[str, Any]
) -> None:
    student = case["student"].clone().requires_grad_()
    found = DISTILLATIONS[loss](student, case["teacher"])
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.item(), case[value], rtol=1e-12, atol=1e-12)
    for name in gradients:
        torch.testing.assert_close(gradient, case[name], rtol=1e-12, atol=1e-12)


def test_teachers_are_averaged() -> None:
    first, second = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 8.0]])
    assert weighted_mean([first, second], [3, 1]).tolist() == [[3, 2]]
    assert weighted_mean([first, second]).tolist() == [[2, 4]]


class Recorded:
    """A classifier of golden views: its scores, the rewards, and the losses of the steps."""

    def __init__(self, adaptation: ClipReward, views: Tensor) -> None:
        self.clip, self.reward = published_clip(GOLDEN["policy"]), published_clip(GOLDEN["reward"])
        self.model = build_retriever(self.clip, ImageSpec(16, (0, 0, 0), (1, 1, 1)), use_policy=False, num_frm=1).eval()
        self.adaptation, self.views = adaptation, views
        self.chosen: dict[int, Tensor] = {}

    def classes(self) -> Tensor:
        return F.normalize(self.model.encode_text(GOLDEN["token_ids"]).sentence, dim=-1)

    def scores(self, views: Tensor, classes: Tensor | None) -> Tensor:
        classes = self.classes() if classes is None else classes
        images = F.normalize(self.clip.encode_image(views), dim=-1)
        return self.clip.logit_scale.exp() * images @ classes.T

    def query(self, sample: int, classes: Tensor | None) -> QueryBatch:
        """Return the query of a sample, whose views are chosen when its scores are asked for first."""
        views = self.views[sample]

        def logits() -> Tensor:
            if sample not in self.chosen:
                with torch.no_grad():
                    self.chosen[sample] = views[self.adaptation.certain(self.scores(views, classes))]
            return self.scores(self.chosen[sample], classes)

        @torch.no_grad()
        def cosines() -> list[Tensor]:
            images = F.normalize(self.reward.encode_image(self.chosen[sample]), dim=-1)
            return [images @ F.normalize(self.reward.encode_text(GOLDEN["token_ids"]), dim=-1).T]

        return QueryBatch("v2t", logits, cosines)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []

    def recorded(*arguments: Any) -> Tensor:
        loss = policy_gradient_loss(*arguments)
        found.append(loss.item())
        return loss

    monkeypatch.setattr(clip_reward, "policy_gradient_loss", recorded)
    return found


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    same = {"steps": int(case["steps"]), "learning_rate": case["lr"], "weight_decay": case["weight_decay"]}
    return {**same, "class_candidates": int(case["k"]), "certain_share": case["share"]}


@pytest.mark.parametrize("case", GOLDEN["image_tower"], ids=["no momentum", "momentum", "half of the average", "norms"])
def test_the_image_tower_learns_as_published(case: dict[str, Any], losses: list[float]) -> None:
    momentum = case["momentum"] if case["momentum_on"] else 0.0
    slow = {"momentum": momentum, "interval": int(case["update_freq"]), "average_share": case["update_w"]}
    adaptation = started("none", "norms" if case["only_norm"] else "full", **settings_of(case), **slow)
    world = Recorded(adaptation, GOLDEN["views"].float())
    with torch.no_grad():
        classes = world.classes()
    projection = world.clip.visual.proj
    with adaptation.prepared(world.model):
        (learner,) = adaptation._learners.values()
        for sample in range(len(world.views)):
            asked = world.query(sample, classes)
            if not momentum:
                loss = policy_gradient_loss(asked.logits(), clip_scores(asked.others()), int(case["k"]))
                (gradient,) = torch.autograd.grad(loss, world.clip.visual.ln_post.weight)
                wanted = case["ln_post_grad_of_the_first_step"][sample]
                close(gradient, wanted, 1e-4 * wanted.abs().max().item())
            losses.clear()
            with adaptation(world.model, asked), torch.no_grad():
                close(world.scores(world.views[sample, :1], classes), case["logits_after"][sample], 1e-3)
                close(projection.data, case["adapted_proj"][sample], 1e-4)
            close(torch.tensor(losses), case["losses"][sample], 1e-5)
        with learner:
            close(projection.data, case["start_proj"][-1], 1e-4)


@pytest.mark.parametrize("case", GOLDEN["context"], ids=range(2))
def test_the_context_learns_as_published(case: dict[str, Any], losses: list[float], tmp_path: Any) -> None:
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n")
    adaptation = started(str(tmp_path / "templates.txt"), "context", **settings_of(case))
    world = Recorded(adaptation, GOLDEN["views"].float())
    before = everything(world.model)
    with adaptation.prepared(world.model):
        (parameter,) = next(iter(adaptation._learners.values())).parameters
        for sample in range(len(world.views)):
            asked = world.query(sample, None)
            with torch.no_grad():
                close(world.scores(world.views[sample, :1], None), case["logits_before"][sample], 1e-4)
            loss = policy_gradient_loss(asked.logits(), clip_scores(asked.others()), int(case["k"]))
            (gradient,) = torch.autograd.grad(loss, parameter)
            wanted = case["ctx_grad_of_the_first_step"][sample]
            close(gradient, wanted, 1e-4 * wanted.abs().max().item())
            losses.clear()
            with adaptation(world.model, asked), torch.no_grad():
                close(world.scores(world.views[sample, :1], None), case["logits_after"][sample], 1e-3)
                close(case["ctx_start"] + parameter, case["ctx_end"][sample], 1e-4)
            close(torch.tensor(losses), case["losses"][sample], 1e-5)
    assert equal(everything(world.model), before)


# ---- views ----


def test_views_show_the_same_part_of_all_frames_that_the_model_chose() -> None:
    model, video = build_retriever().eval(), random_videos(1)
    alone = chosen_frames(model, video)
    whole = model.encode_video(video)
    assert whole.selection is not None and alone[1] is not None
    torch.testing.assert_close(model.encode_video(alone[0], selection=alone[1]).vector, whole.vector)
    left, mirrored = CropFlip(0, 0, 1, 0.5, False, "bilinear"), CropFlip(0, 0, 1, 1, True, "bicubic")
    batch, selection = viewed(alone, [None, left, mirrored])
    frames = video.frames[0, whole.selection.indices[0]]
    assert batch.frames[0].equal(frames) and batch.frames[2].equal(frames.flip(-1))
    expected = F.interpolate(frames[..., :16].float(), (32, 32), mode="bilinear", antialias=True).round()
    assert batch.frames[1].equal(expected.to(torch.uint8))
    vectors = model.encode_video(batch, selection=selection).vector
    assert vectors is not None and len(vectors) == 3
    torch.testing.assert_close(vectors[:1], whole.vector)


def test_drawn_parts_are_a_function_of_seed_and_video() -> None:
    parts, again, other = (draw_parts(300, generator("view", 0, 0, number)) for number in (4, 4, 5))
    assert parts == again and parts[0] is None and parts[1] != other[1]
    drawn = [part for part in parts if part is not None]
    areas, ratios = zip(*((part.height * part.width, part.width / part.height) for part in drawn), strict=True)
    assert 0.079 < min(areas) < 0.1 and 0.95 < max(areas) <= 1 and 0.74 < min(ratios) < max(ratios) < 1.34
    assert 100 < sum(part.mirrored for part in drawn) < 200 and np.mean(areas) == pytest.approx(0.54, abs=0.06)


@pytest.mark.parametrize(
    ("task", "templates", "named"),
    [("retrieval", "none", "task classification"), ("classification", "none", "task.config.templates")],
)
def test_a_context_needs_words_before_class_names(task: str, templates: str, named: str) -> None:
    section = {"method": "clip_reward", "config": {"reward": ["self"], "learns": {"method": "context"}}}
    with pytest.raises(UserError, match="learns") as caught:
        load_config(None, {"do_inference": True, "task": {"method": task}, "adaptation": section})
    assert named in str(caught.value)
