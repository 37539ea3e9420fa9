"""Cost of the tower `clustering` as a ratio to encoding each frame by itself, with its clustering included.

    python scripts/bench/clustering.py --threads 2

The image tower of ViT-B/32 at full size with random weights, 12 frames a video, and the published setting B6-4,49. Time
is the shortest of encoding without gradients, since other load only adds to it, and the time of all processor cores
together, which other load changes less. Memory is what a training step (forward and backward) takes beyond the weights,
each in a process of its own. The ratios are below 1 where clustering saves something.
"""

from __future__ import annotations

import argparse
import resource
import time
from multiprocessing import get_context
from typing import Any

import open_clip
import psutil
import torch
from torch import nn

from adaclip_finetune.config.choices.towers import TOWERS
from adaclip_finetune.model.towers.base import FrameTower
from adaclip_finetune.model.towers.clustering import Clustering
from adaclip_finetune.model.towers.per_frame import PerFrame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("videos", 4), ("frames", 12), ("segments", 4), ("tokens", 49), ("block", 6), ("repeat", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--algorithm", default="kmedoids")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    towers = build(a)
    pixels, mask = videos(a)
    clocks = {"encoding": time.perf_counter, "processor time of encoding": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in towers} for what in clocks}
    for _ in range(a.repeat + 1):  # in turn, so that other load meets both; the first round warms up
        for name, tower in towers.items():
            started = {what: clock() for what, clock in clocks.items()}
            with torch.no_grad(), torch.autocast(a.device, torch.bfloat16, enabled=a.bf16):
                tower(pixels, mask).sum().item()
            for what, clock in clocks.items():
                seconds[what][name].append(clock() - started[what])
    for what, by_tower in seconds.items():
        report(what, "ms a video", {name: 1000 * min(times[1:]) / a.videos for name, times in by_tower.items()})
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        report("training memory", "MiB a video", {name: pool.apply(training_memory, (a, name)) for name in towers})


def report(what: str, unit: str, figures: dict[str, float]) -> None:
    plain, clustered = figures.values()
    print(f"{what}: per_frame {plain:.0f}, clustering {clustered:.0f} {unit}: {clustered / plain:.2f}x")


def build(a: Any) -> dict[str, FrameTower]:
    torch.manual_seed(0)
    clip: nn.Module = open_clip.create_model("ViT-B-32-quickgelu").to(a.device).eval()
    settings = TOWERS["clustering"].settings(
        stages=[{"block": a.block, "segments": a.segments, "tokens": a.tokens}], algorithm=a.algorithm
    )
    return {
        "per_frame": PerFrame(TOWERS["per_frame"].settings(), clip),
        "clustering": Clustering(settings, clip),  # type: ignore[arg-type]
    }


def videos(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random frames that change slowly, as a video's do, and their mask."""
    start, change = torch.randn(2, a.videos, 1, 3, 224, 224)
    times = torch.linspace(0, 1, a.frames)[:, None, None, None]
    pixels = (start + times * change + 0.1 * torch.randn(a.videos, a.frames, 3, 224, 224)).to(a.device)
    return pixels, torch.ones(a.videos, a.frames, dtype=torch.bool, device=a.device)


def training_memory(a: Any, name: str) -> float:
    """Return the memory that a forward and a backward pass take beyond weights and pixels, in MiB a video."""
    torch.set_num_threads(a.threads)
    tower, (pixels, mask) = build(a)[name], videos(a)
    cuda = a.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
    with torch.autocast(a.device, torch.bfloat16, enabled=a.bf16):
        tokens = tower(pixels, mask)
    tokens.square().mean().backward()
    after = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 2**20 / a.videos


if __name__ == "__main__":
    main()
