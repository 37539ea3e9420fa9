"""The gradients of a batch that is computed part by part equal those of the whole batch."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from conftest import build_tiny_clip
from tiny import SMALL, VOCABULARY, build_retriever, loaded, random_tokens, random_videos
from torch import Tensor, nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.objectives import OBJECTIVES
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.errors import NotFinite
from adaclip_finetune.objectives import Objective, build_objective
from adaclip_finetune.objectives.base import Group
from adaclip_finetune.peft import build_method, choose_what_learns
from adaclip_finetune.training.backward import Backward

PAIRS = 5
METHODS: dict[str, Any] = {"full": {"method": "full"}, "lora": {"method": "lora", "config": {"rank": 2}}}
MODELS: dict[str, dict[str, Any]] = {
    "Hard-Top-k": {"frame_agg": "mlp"},
    "Hard-Top-k on CLIP": {"policy_backbone": "clip"},
    "all frames": {"use_policy": False, "sim_header": "seqTransf"},
    "QScore": {"use_policy": False, "frame_agg": "qscore"},
    "words": {"use_policy": False, "word_agg": "mlp"},
    "proxy tokens": {"tower": {"method": "proxy_tokens", "config": {"temporal_size": 2}}},
    "clustering": {"tower": {"method": "clustering", "config": {"stages": [{"block": 1, "segments": 2, "tokens": 2}]}}},
    "global-local prompts": {"tower": {"method": "global_local"}},
}
TOGETHER = [pair for pair in itertools.product(OBJECTIVES, MODELS) if pair != ("captioning", "QScore")]


def build(**settings: Any) -> tuple[Objective, TrainBatch, Group]:
    """Return an objective in float64 and a batch of five pairs, two of one video, one without auxiliary caption."""
    config, clip = load_config(None, SMALL | settings), build_tiny_clip(vocabulary=VOCABULARY)
    method = build_method(config)
    method.attach(clip)
    model = build_retriever(clip, **settings)
    objective = build_objective(config, model)
    objective.start(config, loaded(clip), Mock())
    objective.double().train()
    choose_what_learns(method, model, config)
    objective.choose()
    noise = torch.rand(PAIRS, 6, generator=torch.Generator().manual_seed(5))
    videos = random_videos(PAIRS, view=(1, 8, 8) if model.views().selector else None)
    videos.video_ids[3] = videos.video_ids[0]
    again = objective.second_view(config)
    second = again and random_videos(PAIRS, again[0].num_frm, view=None)
    labelled = torch.tensor([True, False, False, True, False]) if objective.settings.uses_unlabelled else None
    captions = [f"caption {n}" for n in range(PAIRS)]
    batch = TrainBatch(videos, captions, random_tokens(PAIRS), noise, second, labelled)
    if config.uses_auxiliary:
        batch = replace(batch, auxiliary_ids=batch.token_ids.flip(0), has_auxiliary=torch.arange(PAIRS) != 1)
    return objective, batch, Group([batch.pairs()])


def with_captioner(settings: dict[str, Any], language_model: Path) -> dict[str, Any]:
    """Return the settings, with a captioner if their objective trains one."""
    if settings["objective"]["method"] != "captioning":
        return settings
    captioner = {"method": "mlp", "config": {"language_model": str(language_model), "prefix_length": 2}}
    return {**settings, "captioner": captioner, "concat_captions": "indep-one"}


def backward(objective: Objective, chunk: int, device: str = "cpu") -> Backward:
    return Backward(Mock(wraps=Accelerator(cpu=True), device=torch.device(device)), objective, objective, chunk)


def taken(objective: Objective) -> dict[str, Tensor]:
    """Return all gradients, and forget them."""
    gradients = {name: own.grad for name, own in objective.named_parameters() if own.grad is not None}
    objective.zero_grad()
    return gradients


@pytest.mark.parametrize(
    ("objective", "model", "method"),
    [*((*pair, "full") for pair in TOGETHER), ("contrastive", "words", "lora")],
)
def test_parts_give_the_gradients_of_the_whole_batch(
    objective: str, model: str, method: str, language_model: Path
) -> None:
    settings = {"objective": {"method": objective}, "peft": METHODS[method], **MODELS[model]}
    built, batch, group = build(**with_captioner(settings, language_model))
    loss = backward(built, 0)(batch, group, int, share=0.5)
    whole = taken(built)
    assert whole
    for chunk in (1, 2, 3, PAIRS):
        assert backward(built, chunk)(batch, group, int, share=0.5) == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(taken(built), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("objective", "model"), TOGETHER)
def test_cuda_gives_the_gradients_of_the_cpu(objective: str, model: str, language_model: Path) -> None:
    settings = {"objective": {"method": objective}, **MODELS[model]}
    built, batch, group = build(**with_captioner(settings, language_model))
    loss = backward(built, 0)(batch, group, int)
    wanted = taken(built)
    built.to("cuda")
    for chunk in (0, 2):
        assert backward(built, chunk, "cuda")(batch, group, int) == pytest.approx(loss, rel=1e-5)
        found = {name: gradient.cpu() for name, gradient in taken(built).items()}
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_dropout_is_the_same_in_both_passes() -> None:
    built, batch, group = build(peft={"method": "lora", "config": {"rank": 2, "dropout": 0.5}}, use_policy=False)
    with torch.no_grad():  # the second matrix of LoRA begins with zeros, which hide dropout
        for name, own in built.named_parameters():
            if name.endswith("up.0"):
                own.fill_(0.1)
    seeds: Callable[[int], int] = [7, 8, 9].__getitem__
    backward(built, 2)(batch, group, seeds)
    found = taken(built)
    rows = []
    for number, part in enumerate(batch.rows(start, start + 2) for start in (0, 2, 4)):
        torch.manual_seed(seeds(number))
        rows.append(built.embed(part))
    sum(built.loss({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, group).values()).backward()
    torch.testing.assert_close(found, taken(built), rtol=1e-9, atol=1e-9)
    backward(built, 2)(batch, group, lambda number: 0)
    assert any(not torch.equal(gradient, found[name]) for name, gradient in taken(built).items())


def test_batch_statistics_are_updated_once_a_part() -> None:
    built, batch, group = build(use_policy=False)
    counter = built.retriever.clip.visual.ln_pre = nn.Sequential(built.retriever.clip.visual.ln_pre, Counting())
    backward(built, 2)(batch, group, int)
    assert counter[1].calls.item() == 3


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def test_a_loss_that_is_not_finite_is_refused() -> None:
    built, batch, group = build(use_policy=False)
    with torch.no_grad():
        built.retriever.clip.visual.proj.fill_(float("nan"))
    for chunk in (0, 2):
        with pytest.raises(NotFinite):
            backward(built, chunk)(batch, group, int)
