"""Time saved by encoding only the frames that are needed, in training and in evaluation, as a ratio within one run.

    python scripts/bench/encode.py --videos 2 --num_frm 32 --top_k 16 --repeat 5

ViT-B/32 with random weights (time does not depend on them), BitFit, selector features from raw
pixels. "Everything" encodes all frames, with gradients in training, as the published system does; both give the same
loss and gradients (tests/core/test_retriever.py).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import open_clip
import torch
from torch import Tensor

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.clip import encode_images
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.peft import build_method, choose_what_learns
from adaclip_finetune.weights.loaded import LoadedClip

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
BITFIT = {"method": "bitfit", "config": {"keep_module_keywords": ["ln_post", "visual.proj"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("videos", 2), ("num_frm", 32), ("top_k", 16), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    settings = {"num_frm": a.num_frm, "top_k": a.top_k, "policy_backbone": "raw", "frame_agg": "mlp", "peft": BITFIT}
    config = load_config(None, settings)
    clip = open_clip.create_model("ViT-B-32-quickgelu")
    loaded = LoadedClip(clip, ImageSpec(224, MEAN, STD), None, None, 77, "random")  # type: ignore[arg-type]
    model = VideoRetriever(config, loaded)
    choose_what_learns(build_method(config), model, config)
    batch = random_batch(a.videos, a.num_frm)

    def everything() -> Tensor:
        assert model.selector is not None and model.aggregator is not None and batch.policy_frames is not None
        pixels = batch.frames.flatten(0, 1).float() / 255
        frames = encode_images(model.clip, pixels).unflatten(0, (a.videos, a.num_frm))
        selection = model.selector(batch.policy_frames.flatten(2).float() / 255)
        vectors: Tensor = model.aggregator(selection.weights @ frames)[0]
        return vectors

    def needed() -> Tensor:
        vectors = model.encode_video(batch).vector
        assert vectors is not None
        return vectors

    def training(forward: Callable[[], Tensor]) -> None:
        model.train().zero_grad()
        forward().sum().backward()

    @torch.no_grad()
    def evaluation(forward: Callable[[], Tensor]) -> None:
        model.eval()
        forward()

    for name, step in (("training step", training), ("evaluation", evaluation)):
        seconds: dict[str, list[float]] = {"everything": [], "needed": []}
        for _ in range(a.repeat):
            for kind, forward in (("everything", everything), ("needed", needed)):
                started = time.perf_counter()
                step(forward)
                seconds[kind].append(time.perf_counter() - started)
        whole, part = median(seconds["everything"]), median(seconds["needed"])
        print(f"{name}: everything {whole:.2f} s, only what is needed {part:.2f} s, ratio {whole / part:.2f}")


def random_batch(videos: int, num_frm: int) -> VideoBatch:
    """Return random batches of the right shapes."""
    frames = torch.randint(0, 256, (videos, num_frm, 3, 224, 224), dtype=torch.uint8)
    grey = torch.randint(0, 256, (videos, num_frm, 1, 56, 56), dtype=torch.uint8)
    indices = torch.arange(num_frm).expand(videos, num_frm)
    names = [str(i) for i in range(videos)]
    return VideoBatch(frames, torch.ones(videos, num_frm, dtype=torch.bool), grey, indices, names)


if __name__ == "__main__":
    main()
