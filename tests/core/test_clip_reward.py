"""The adaptation `clip_reward`: equal to RLCF, and the model is as before after each query."""

import copy
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import Mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from golden import load_golden
from tiny import build_retriever, random_tokens, random_videos
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.adaptations import ClipRewardSettings
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation import clip_reward
from adaclip_finetune.evaluation.adaptation.base import QueryBatch
from adaclip_finetune.evaluation.adaptation.clip_reward import ClipReward
from adaclip_finetune.evaluation.adaptation.losses import centred, clip_scores, mean_entropy, policy_gradient_loss
from adaclip_finetune.model.features import TextFeatures
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.plain import plain_state

MATH, RETRIEVAL = load_golden("reward_math"), load_golden("reward_retrieval")
EXACT: Any = {"rtol": 1e-12, "atol": 1e-12}


# ---- the published system ----


@pytest.mark.parametrize("case", MATH["rewards"], ids=lambda case: f"{case['models']} models {case['views']} views")
def test_rewards_are_the_published_ones(case: dict[str, Any]) -> None:
    of_candidate = case["candidate"].reshape(case["views"], case["k"])
    pairs = zip(case["image_features"].values(), case["class_features"].values(), strict=True)
    cosines = [F.normalize(images, dim=-1) @ F.normalize(classes, dim=-1).T for images, classes in pairs]
    scores = clip_scores(cosines, case["weights"].tolist()).gather(1, of_candidate)
    torch.testing.assert_close(scores.flatten(), case["clip_score"], **EXACT)
    if not case["weighted"]:
        torch.testing.assert_close(clip_scores(cosines).gather(1, of_candidate), scores, **EXACT)
    rewards = centred(scores, baseline_of(case), case["divide_by_std"])
    torch.testing.assert_close(rewards.flatten(), case["reward"], **EXACT)


def baseline_of(case: dict[str, Any]) -> Any:
    if not case["subtract_mean"]:
        return "none"
    return "all" if case["over_whole_batch"] else "query"


@pytest.mark.parametrize(
    "case",
    MATH["policy_gradient"],
    ids=lambda case: f"{case['steps']} steps {case['k']} candidates baseline {baseline_of(case)}",
)
def test_steps_are_the_published_ones(case: dict[str, Any]) -> None:
    policy, views = case["w_start"].clone().requires_grad_(), F.normalize(case["views"], dim=-1)

    def logits() -> Tensor:
        return 5 * views @ F.normalize(policy, dim=-1).T

    # Of 64 views the most certain ones learn.
    certain = torch.special.entr(logits().detach().softmax(dim=1)).sum(dim=1).argsort()
    views = views[certain[: int(len(views) * case["share"])]]
    maps = zip(case["reward_image_maps"].values(), case["class_features"].values(), strict=True)
    cosines = [F.normalize(views @ one, dim=-1) @ F.normalize(classes, dim=-1).T for one, classes in maps]
    scores = clip_scores(cosines, case["model_weights"].reshape(-1).tolist())
    kind: Any = torch.optim.SGD
    if case["adamw"]:
        kind = torch.optim.AdamW
    optimizer = kind([policy], lr=case["lr"], **({"weight_decay": 5e-4} if case["adamw"] else {}))
    for step in range(case["steps"]):
        loss = policy_gradient_loss(logits(), scores, case["k"], baseline_of(case), case["divide_by_std"])
        loss = loss + case["entropy_weight"] * mean_entropy(logits())
        optimizer.zero_grad()
        loss.backward()
        torch.testing.assert_close(loss.detach(), case["losses"].reshape(-1)[step], **EXACT)
        torch.testing.assert_close(policy.grad, case["grads"][step], **EXACT)
        optimizer.step()
    torch.testing.assert_close(policy.detach(), case["w_end"], **EXACT)


def published_clip(state: dict[str, Any]) -> open_clip.CLIP:
    """Return the CLIP of golden tensors, whose images have 8 pixels a patch and whose texts have 12 tokens."""
    state = {name: torch.as_tensor(value) for name, value in state.items()}
    embedding, places = state["text_projection"].shape[1], len(state["visual.positional_embedding"]) - 1
    vision = {"image_size": 8 * math.isqrt(places), "patch_size": 8, "width": 64, "layers": 1, "head_width": 64}
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(embedding, vision, text, quick_gelu=True)
    clip.load_state_dict(state)
    return clip.eval()


@pytest.mark.parametrize("run", RETRIEVAL["runs"], ids=range(6))
def test_retrieval_is_the_published_one(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    direction = "v2t" if run["image_to_text"] else "t2v"
    clip, reward = published_clip(RETRIEVAL["tta_state"]), published_clip(RETRIEVAL["reward_states"][0])
    model = build_retriever(clip, ImageSpec(16, (0, 0, 0), (1, 1, 1)), use_policy=False, num_frm=1).eval()
    images, ids = RETRIEVAL["images"], RETRIEVAL["token_ids"]
    larger = F.interpolate(images, 24, mode="bicubic", align_corners=True)
    with torch.no_grad():
        gallery, texts = F.normalize(clip.encode_image(images), dim=-1), F.normalize(clip.encode_text(ids), dim=-1)
        cosines = F.normalize(reward.encode_text(ids), dim=-1) @ F.normalize(reward.encode_image(larger), dim=-1).T
    losses: list[float] = []

    def recorded(*arguments: Any) -> Tensor:
        loss = policy_gradient_loss(*arguments)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(clip_reward, "policy_gradient_loss", recorded)
    adaptation = started(
        directions=direction,
        candidates=int(run["sample_k"]),
        caption_candidates=int(run["sample_k"]),
        steps=int(run["tta_steps"]),
        learning_rate=run["lr"],
        divide_by_std=bool(run["reward_amplify"]),
        momentum=run["tta_momentum"] if run["momentum_update"] else 0.0,
        interval=int(run["update_freq"]),
        average_share=run["update_w"],
    )
    projection = clip.visual.proj if direction == "v2t" else clip.text_projection
    with adaptation.prepared(model):
        (learner,) = adaptation._learners.values()
        assert len(learner.parameters) == run["n_learning_tensors"]
        for query, expected in enumerate(run["scores"]):

            def logits(query: int = query) -> Tensor:
                if direction == "t2v":
                    return model.scorer(model.encode_text(ids[query : query + 1]), gallery)
                image = F.normalize(clip.encode_image(images[query : query + 1]), dim=-1)
                return model.scorer(TextFeatures(texts), image).T

            scores = cosines[query : query + 1] if direction == "t2v" else cosines[:, query : query + 1].T
            if not run["momentum_update"]:
                loss = policy_gradient_loss(
                    logits(), clip_scores([scores]), int(run["sample_k"]), bool(run["reward_amplify"])
                )
                (found,) = torch.autograd.grad(loss, projection)
                wanted = run["projection_grad_of_the_first_step"][query]
                torch.testing.assert_close(found, wanted, rtol=0, atol=5e-4 * wanted.abs().max().item() + 1e-9)
            with adaptation(model, QueryBatch(direction, logits, partial(list, [scores]))), torch.no_grad():
                torch.testing.assert_close(logits()[0], expected, rtol=0, atol=2e-2)
        with learner, torch.no_grad():
            start = run["projection_that_the_next_query_starts_from"]
            torch.testing.assert_close(projection.data, start, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(losses).reshape(run["losses"].shape), run["losses"], rtol=0, atol=2e-3)


# ---- ours ----

LEARNS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "bitfit": {"method": "bitfit"},
    "lora": {"method": "lora", "config": {"rank": 2}},
    "dora": {"method": "lora", "config": {"rank": 2, "dora": True}},
    "ssf": {"method": "ssf"},
}


def started(**settings: Any) -> ClipReward:
    section = {"method": "clip_reward", "config": {"reward": ["self"], "learning_rate": 1e-3, **settings}}
    config = load_config(None, {"do_inference": True, "adaptation": section})
    assert isinstance(config.adaptation.config, ClipRewardSettings)
    adaptation = ClipReward(config.adaptation.config)
    adaptation.start(config, Mock())
    return adaptation


def asked_text(model: VideoRetriever) -> QueryBatch:
    """Return the query of a text among six videos, and random rewards."""
    tokens, random = random_tokens(1), torch.Generator().manual_seed(0)
    gallery, rewards = torch.randn(6, 64, generator=random), torch.rand(1, 6, generator=random)
    return QueryBatch(
        "t2v", lambda: model.scorer(model.encode_text(tokens), F.normalize(gallery, dim=-1)), lambda: [rewards]
    )


def asked_video(model: VideoRetriever) -> QueryBatch:
    """Return the query of a video among six texts, and random rewards."""
    videos, random = random_videos(1), torch.Generator().manual_seed(0)
    texts, rewards = TextFeatures(torch.randn(6, 64, generator=random)), torch.rand(1, 6, generator=random)
    with torch.no_grad():
        selection = model.encode_video(videos).selection

    def logits() -> Tensor:
        return model.scorer(texts, model.scorer.keep(model.encode_video(videos, selection=selection))).T

    return QueryBatch("v2t", logits, lambda: [rewards])


def everything(model: VideoRetriever) -> dict[str, Any]:
    """Return all values of the model, what learns, and whether gradients were left behind."""
    flags = {f"{name} learns": one.requires_grad for name, one in model.named_parameters()}
    left = {f"{name} has a gradient": one.grad is not None for name, one in model.named_parameters()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | flags | left


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(*map(torch.as_tensor, (one[k], other[k]))) for k in one)


def changed_towers(clip: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return which towers have other weights than `before`."""
    changed = {name for name, tensor in plain_state(clip).items() if not tensor.equal(before[name])}
    return {"image" if name.startswith("visual.") else "text" for name in changed}


@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("ask", [asked_text, asked_video])
def test_a_query_changes_its_tower_and_nothing_afterwards(
    learns: str, ask: Callable[[VideoRetriever], QueryBatch]
) -> None:
    model = build_retriever().eval()
    for number, parameter in enumerate(model.clip.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before, weights, asked = everything(model), plain_state(copy.deepcopy(model.clip)), ask(model)
    adaptation = started(directions="both", learns=LEARNS[learns], candidates=3, caption_candidates=3)
    found = []
    with torch.no_grad():
        plain = asked.logits()
    for _ in range(2):
        with adaptation.prepared(model):
            attached = everything(model)
            assert not changed_towers(model.clip, weights)
            for _ in range(2):
                with adaptation(model, asked), torch.no_grad():
                    found.append(asked.logits())
                    assert changed_towers(model.clip, weights) == {"text" if ask is asked_text else "image"}
                assert equal(everything(model), attached)
            with pytest.raises(ZeroDivisionError), adaptation(model, asked):
                raise ZeroDivisionError
            assert equal(everything(model), attached)
        assert equal(everything(model), before)
    assert all(one.equal(found[0]) for one in found) and not found[0].allclose(plain, atol=1e-3)


def test_without_steps_nothing_changes() -> None:
    model = build_retriever().eval()
    asked, adaptation = asked_text(model), started(steps=0)
    with torch.no_grad():
        plain = asked.logits()
        with adaptation.prepared(model), adaptation(model, asked):
            assert asked.logits().equal(plain)


def test_what_is_rewarded_rises() -> None:
    model = build_retriever().eval()
    asked, adaptation = asked_text(model), started(candidates=6, steps=3)
    with torch.no_grad():
        before, rewards = asked.logits(), asked.others()[0]
        with adaptation.prepared(model), adaptation(model, asked):
            change = asked.logits() - before
    assert ((rewards - rewards.mean()) * change).sum() > 0


def test_distillation_follows_the_other_model() -> None:
    model = build_retriever().eval()
    asked, adaptation = asked_text(model), started(loss="distillation", steps=3)
    with torch.no_grad():
        wanted = (model.scorer.scale() * asked.others()[0]).softmax(dim=1)
        before = asked.logits().log_softmax(dim=1)
        with adaptation.prepared(model), adaptation(model, asked):
            after = asked.logits().log_softmax(dim=1)
    assert (wanted * (after - before)).sum() > 0


def test_bf16_computes_with_the_weights_of_each_step() -> None:
    model = build_retriever().eval()
    asked, found = asked_text(model), []
    for around in (torch.autocast("cpu", torch.bfloat16), nullcontext()):
        adaptation = started(learning_rate=1e-2)
        with around, adaptation.prepared(model):
            if found == []:
                asked.logits()  # fills the cache of casts
            with adaptation(model, asked), torch.no_grad():
                found.append(asked.logits())
    with torch.no_grad():
        plain = asked.logits()
    moved, in_bf16 = found[1] - plain, found[0] - plain
    assert F.cosine_similarity(moved, in_bf16) > 0.9 and (in_bf16.norm() / moved.norm()) > 0.5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"reward": []}, "--adaptation"),
        ({"weights": [1, 2]}, "2 numbers for 1"),
        ({"learns": {"method": "adapter"}}, "adaptation.config.learns.method"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)):
        started(**settings)


@pytest.mark.parametrize("other", [{"do_inference": False}, {"precision": "fp16", "do_inference": True}])
def test_training_and_fp16_are_refused(other: dict[str, Any]) -> None:
    section = {"method": "clip_reward", "config": {"reward": ["self"]}}
    with pytest.raises(UserError, match="adaptation clip_reward"):
        load_config(None, {"adaptation": section, **other})


def test_a_tower_in_which_nothing_learns_is_refused() -> None:
    adaptation = started(learns={"method": "lora", "config": {"towers": "image"}})
    model = build_retriever().eval()
    before = everything(model)
    with pytest.raises(UserError, match="text tower"), adaptation.prepared(model):
        raise AssertionError("nothing learns")
    assert equal(everything(model), before)
