"""Every tower with every selector, pooling and finetuning method: it learns, and gradients reach what should learn."""

import copy
import itertools
from typing import Any

import pytest
import torch
from conftest import build_tiny_clip
from tiny import SMALL, VOCABULARY, build_pe_clip, build_retriever, build_timm_clip, random_tokens, random_videos
from torch import nn

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.towers import TOWERS
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.objectives.contrastive import contrastive_loss
from adaclip_finetune.peft import build_method, choose_what_learns

Section = dict[str, Any]

CASES: dict[str, Section] = {
    "per_frame": {"method": "per_frame"},
    "proxy_tokens": {"method": "proxy_tokens", "config": {"num_proxies": 3, "temporal_size": 4}},
    "change": {"method": "change", "config": {"frequencies": 2}},
    "clustering": {"method": "clustering", "config": {"stages": [{"block": 1, "segments": 2, "tokens": 3}]}},
    "spectral clustering": {
        "method": "clustering",
        "config": {"algorithm": "spectral", "stages": [{"block": 1, "segments": 2, "tokens": 3}]},
    },
    "global_local": {"method": "global_local"},
    "global_local by a transformer": {"method": "global_local", "config": {"generator": "transformer", "frames": 4}},
}
CLUSTERINGS = [*(("algorithm", name) for name in ("pooling", "sparse_sampling", "token_shift", "temporal_shift"))]
CLUSTERINGS += [("aggregation", "mean"), ("cluster_embedding", "normal")]
OUTPUTS = ("global_prompt0", "global_mean", "class_mean", "all_mean")
MORE: dict[str, Section] = {
    f"clustering, {value}": {"method": "clustering", "config": {**CASES["clustering"]["config"], name: value}}
    for name, value in CLUSTERINGS
}
MORE |= {
    f"{case}, {output}": {"method": "global_local", "config": {**CASES[case].get("config", {}), "output": output}}
    for case in ("global_local", "global_local by a transformer")
    for output in OUTPUTS
}
SELECTORS: dict[str, Section] = {"all frames": {"use_policy": False}, "Hard-Top-k": {"use_policy": True}}
POOLINGS: dict[str, Section] = {
    "mean": {"frame_agg": None},
    "MLP-Score": {"frame_agg": "mlp"},
    "seqTransf": {"frame_agg": None, "sim_header": "seqTransf"},
}
METHODS: dict[str, Section] = {
    "bitfit": {"method": "bitfit", "config": {"include_qkv_bias": True}},
    "lora": {"method": "lora", "config": {"rank": 2}},
    "full": {"method": "full"},
}
CLIPS = {
    "open_clip": lambda: build_tiny_clip(vocabulary=VOCABULARY),
    "timm": lambda: build_timm_clip(hugging_face=False),
    "rotary": build_pe_clip,
}
CASES_AND_CLIPS = [
    (tower, kind)
    for tower, kind in itertools.product(CASES | MORE, CLIPS)
    if (tower, kind) != ("clustering, token_shift", "timm")  # which has no class token
]
every_tower = pytest.mark.parametrize(("tower", "kind"), CASES_AND_CLIPS)


def test_every_tower_is_in_the_table() -> None:
    assert {case["method"] for case in CASES.values()} == set(TOWERS)


@pytest.mark.parametrize(
    ("tower", "selector", "pooling", "method"), list(itertools.product(CASES, SELECTORS, POOLINGS, METHODS))
)
def test_all_parts_learn_together(tower: str, selector: str, pooling: str, method: str) -> None:
    settings = {"tower": CASES[tower], "peft": METHODS[method], **SELECTORS[selector], **POOLINGS[pooling]}
    settings |= {"freeze_layer_num": -1}
    config, clip = load_config(None, SMALL | settings), CLIPS["open_clip"]()
    peft = build_method(config)
    peft.attach(clip)
    model = build_retriever(clip, **settings).train()
    choose_what_learns(peft, model, config)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=3e-4)
    losses = []
    for _ in range(3):
        noise = torch.zeros(4, 6)
        text, video = model(TrainBatch(random_videos(), [], random_tokens(), noise))
        assert video.frame_weights.shape == (4, 6)
        torch.testing.assert_close(video.frame_weights.sum(dim=1), torch.ones(4))
        loss = contrastive_loss(model.similarity(text, video))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if selector == "all frames":  # other frames may be worse for a step
        assert losses[-1] < losses[0]
    idle = [n for n, own in model.named_parameters() if own.requires_grad and own.grad is None]
    assert not idle, "several processes require a gradient of everything that learns"
    parts: list[nn.Module | None] = [model.selector, model.tower]
    if video.tokens.shape[1] > 1:  # of one token, nothing is to be weighed
        parts += [model.header, model.aggregator]
    for part in parts:
        moved = [bool(own.grad.any()) for own in part.parameters() if own.grad is not None] if part else []
        assert any(moved) or not moved


@every_tower
def test_a_video_depends_neither_on_the_others_of_its_batch_nor_on_masked_frames(tower: str, kind: str) -> None:
    model = build_retriever(CLIPS[kind](), tower=(CASES | MORE)[tower], use_policy=False).double().eval()
    batch = random_videos()
    batch.frame_mask[0, 4:] = batch.frame_mask[1, ::2] = False
    other = copy.deepcopy(batch)
    other.frames[~batch.frame_mask] = 255 - other.frames[~batch.frame_mask]
    with torch.no_grad():
        found, again = model.encode_video(batch).vector, model.encode_video(other).vector
        torch.testing.assert_close(found, again, rtol=1e-9, atol=1e-9)
        for number in range(4):
            alone = model.encode_video(batch.rows(number, number + 1)).vector
            torch.testing.assert_close(alone, found[number : number + 1], rtol=1e-7, atol=1e-9)


@every_tower
def test_checkpointed_gradients_and_still_images(tower: str, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build_retriever(CLIPS[kind](), tower=(CASES | MORE)[tower], use_policy=False).double().train()
        if checkpointing:
            model.checkpoint_gradients()
        torch.manual_seed(5)  # of what a tower draws
        model.encode_video(random_videos()).vector.square().sum().backward()
        gradients.append({n: own.grad for n, own in model.named_parameters() if own.grad is not None})
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        assert bool(model.eval().encode_image(random_videos(1, 1).frames[:, 0]).isfinite().all())
