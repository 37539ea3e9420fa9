"""How cost grows: training steps with frames, batch, words and towers, evaluation and search with the gallery.

    OMP_NUM_THREADS=1 python scripts/bench/growth.py --out growth.json --plot growth.png
    python scripts/bench/growth.py --device cuda --precision bf16 --out growth.json --plot growth.png

Steps are those of a ViT-B/32 with random weights, a frozen MobileNetV3, MLP-Score and BitFit; those of the towers
encode all frames, and have neither selector nor MLP-Score. Each figure is the median
of three (steps) or five calls, processor time on a CPU; memory is what a step keeps for its backward pass. The exponent
is the slope of a line through all points in logarithms: 1 means twice the cost for twice the size. With `--only`, the
other sweeps are taken from the file `--out`, if it is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import NullLocator
from torch import nn

from adaclip_finetune.bench import step
from adaclip_finetune.bench.measure import Setup, in_turns
from adaclip_finetune.bench.searching import random_vectors, write_random_index
from adaclip_finetune.config import load_config
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.model.scoring import CosineScorer
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.session import open_model

_WIDTH = 512
_TOWERS = ("per_frame", "proxy_tokens", "clustering", "global_local")


class Sweep(NamedTuple):
    """What grows, the sizes, and the function that gives the figures of a size by name."""

    name: str
    sizes: list[int]
    figures: Callable[[int], dict[str, float]]


def main() -> None:
    """Measure all sweeps, write them and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--only", nargs="*", help="names of the sweeps to measure")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--plot", type=Path, required=True, help="PNG file for the plots")
    a = parser.parse_args()
    cpu = a.device == "cpu"
    setup = Setup(torch.device(a.device), a.precision, turns=3, processor_time=cpu)
    found: dict[str, dict[str, dict[int, float]]] = {}
    earlier = json.loads(a.out.read_text()) if a.only and a.out.exists() else {}
    for sweep in sweeps(setup):
        if a.only and sweep.name not in a.only:
            if kept := earlier.get(sweep.name):
                found[sweep.name] = {name: {int(n): y for n, y in figures.items()} for name, figures in kept.items()}
            continue
        for size in sweep.sizes:
            for name, value in sweep.figures(size).items():
                found.setdefault(sweep.name, {}).setdefault(name, {})[size] = value
            gc.collect()
        for name, figures in found[sweep.name].items():
            shown = "  ".join(f"{size:,}: {value:.4g}" for size, value in figures.items())
            print(f"{sweep.name} | {name} | {shown} | exponent {exponent(figures):.2f}", flush=True)
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    draw(found, a.plot)


def sweeps(setup: Setup) -> Iterator[Sweep]:
    """Yield the sweeps, small enough for the device."""
    cpu = setup.device.type == "cpu"
    frames, batch = ((8, 2), 2) if cpu else ((32, 16), 16)

    def steps(settings: Callable[[int], dict[str, Any]]) -> Callable[[int], dict[str, float]]:
        base = {"num_frm": frames[0], "top_k": frames[1], "batch_size": batch, "peft": {"method": "bitfit"}}
        return lambda size: training_step(setup, {**base, **settings(size)})

    many = [4, 8, 16, 32] if cpu else [16, 32, 64, 128]
    yield Sweep("candidate frames", many, steps(lambda size: {"num_frm": size}))
    yield Sweep("selected frames", [1, 2, 4, 8] if cpu else [2, 4, 8, 16, 32], steps(lambda size: {"top_k": size}))
    yield Sweep("batch", [1, 2, 4, 8] if cpu else [8, 16, 32, 64], steps(lambda size: {"batch_size": size}))
    yield from tower_sweeps(setup, [4, 8, 16] if cpu else [8, 16, 32, 64], batch)
    yield Sweep("caption tokens", [8, 16, 32, 64], lambda size: text_tower(setup, 4 * batch, size))
    yield Sweep("gallery, ranks", [1000, 3000, 10_000, 30_000], lambda size: ranks(setup, size))
    yield Sweep("gallery, search", [1000, 10_000, 100_000, 1_000_000], lambda size: search(setup, size))


def tower_sweeps(setup: Setup, sizes: list[int], batch: int) -> Iterator[Sweep]:
    """Yield what a step of each tower takes, and what it keeps, as the frames of a video grow."""

    @cache
    def measured(tower: str, size: int) -> dict[str, float]:
        settings = {"peft": {"method": "bitfit"}, "tower": {"method": tower}, "frame_agg": None}
        return training_step(setup, settings | {"use_policy": False, "num_frm": size, "batch_size": batch})

    def of_all(figure: str) -> Callable[[int], dict[str, float]]:
        return lambda size: {tower: measured(tower, size)[figure] for tower in _TOWERS}

    yield Sweep("frames by tower, s a step", sizes, of_all("s a step"))
    yield Sweep("frames by tower, MiB kept", sizes, of_all("MiB kept"))


def training_step(setup: Setup, settings: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of a training step, and the MiB that it keeps for the backward pass."""
    with step.model_settings(setup) as shared:
        config = load_config(None, shared | settings)
        torch.manual_seed(config.seed)
        session = open_model(config, values="random", accelerator=make_accelerator(config))
    session.objective.train()
    batch = step.random_batch(session, config)
    with setup.autocast():
        kept = step.kept_bytes(session, lambda: step.loss_of(session, batch))
    return {"s a step": seconds(setup, step.our_step(session, config, batch)), "MiB kept": kept / 2**20}


def text_tower(setup: Setup, count: int, tokens: int) -> dict[str, float]:
    """Return the seconds of the text tower, forward and backward, on captions of `tokens` tokens."""
    with step.model_settings(setup) as shared:
        config = load_config(None, shared | {"max_txt_len": tokens, "use_policy": False, "num_frm": 1})
        session = open_model(config, values="random", accelerator=make_accelerator(config))
    session.objective.train()
    ids = session.loaded.tokenize(["video " * tokens] * count, tokens).to(session.device)

    def both() -> None:
        with setup.autocast():
            session.model.encode_text(ids).sentence.float().square().sum().backward()

    return {"s": seconds(setup, both)}


def ranks(setup: Setup, count: int) -> dict[str, float]:
    """Return the seconds of the ranks of as many texts as videos, in both directions."""
    random = torch.Generator().manual_seed(0)
    videos = F.normalize(torch.randn(count, _WIDTH, generator=random), dim=-1).to(setup.device)
    text, owners, clip = videos + 0.2, torch.arange(count), nn.Module()
    clip.logit_scale = nn.Parameter(torch.zeros((), device=setup.device))
    scorer = CosineScorer(clip)
    blocks = similarity_blocks(text, videos, scorer, block=count)
    return {"s": seconds(setup, lambda: retrieval_metrics(blocks, owners), turns=1)}


def search(setup: Setup, count: int) -> dict[str, float]:
    """Return the seconds to open an index of `count` videos, and of a query in it, alone and among 200."""
    vectors, queries = random_vectors(count)
    with TemporaryDirectory() as folder:
        write_random_index(Path(folder), vectors)
        del vectors
        index, once = VideoIndex.load(folder), seconds(setup, lambda: VideoIndex.load(folder), turns=5)
        one = seconds(setup, lambda: index.search(queries[:1], 10), turns=5)
        many = seconds(setup, lambda: index.search(queries, 10)) / len(queries)
    return {"s to open": once, "s a query": one, "s a query of 200": many}


def seconds(setup: Setup, call: Callable[[], object], turns: int = 0) -> float:
    """Return the median time of a call, after one that does not count."""
    found = in_turns(replace(setup, turns=turns or setup.turns), {"call": call})
    return statistics.median(found["call"])


def exponent(figures: dict[int, float]) -> float:
    """Return the slope of a line through the logarithms of sizes and figures."""
    slope, _ = np.polyfit(np.log(list(figures)), np.log(list(figures.values())), 1)
    return float(slope)


def draw(found: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    """Draw a panel for each sweep, both axes logarithmic."""
    columns = 3
    figure, axes = plt.subplots(-(-len(found) // columns), columns, figsize=(13, 10), squeeze=False)
    for axis, (sweep, figures) in zip(axes.flat, found.items(), strict=False):
        for name, points in figures.items():
            axis.loglog(list(points), list(points.values()), "o-", label=f"{name}, exponent {exponent(points):.2f}")
        axis.set_title(sweep)
        axis.set_xticks(list(points), [f"{size:,}" for size in points])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(True, alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    for axis in axes.flat[len(found) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
