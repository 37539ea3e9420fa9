"""Time and memory of attention in `tower: proxy_tokens`, in its two parts and by a mask, as ratios within one run.

    python scripts/bench/proxy_tokens.py --videos 2 --repeat 5

ViT-B/32 with random weights (time does not depend on them), 4 proxies. "By a mask" is one attention over all S tokens
of a video, with an (S, S) mask that allows the same pairs; both give the same vectors. Time is printed for attention
alone (12 layers) and for the whole tower, in evaluation and in training; memory is the peak that a process of its own
needs for attention and its backward pass beyond what it had before.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config.choices import ProxyTokensSettings
from adaclip_finetune.model.towers import proxy_tokens
from adaclip_finetune.model.towers.proxy_tokens import ProxyTokens, proxy_attention

PROXIES, PATCHES, HEADS, HEAD_WIDTH, LAYERS = 4, 49, 12, 64, 12
Attention = Callable[[Tensor, Tensor, Tensor, int, int, Tensor], Tensor]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, frames: int, shared: int, seen: Tensor) -> Tensor:
    """Return what `proxy_attention` does, by an (S, S) mask."""
    frame = torch.arange(q.shape[2] - shared) // ((q.shape[2] - shared) // frames)
    frame = torch.cat([torch.full((shared,), -1), frame])
    allowed = (frame[:, None] == -1) | (frame == -1) | (frame[:, None] == frame)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


KINDS: dict[str, Attention] = {"mask": masked_attention, "two parts": proxy_attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("videos", 2), ("frames", 12), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--memory", nargs=2, metavar=("KIND", "FRAMES"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory:
        print(peak_memory(KINDS[a.memory[0]], int(a.memory[1])))
        return

    inputs = qkv(a.videos, a.frames)
    tower = ProxyTokens(ProxyTokensSettings(), open_clip.create_model("ViT-B-32-quickgelu").train())
    pixels = torch.randn(a.videos, a.frames, 3, 224, 224)
    mask = torch.ones(pixels.shape[:2], dtype=torch.bool)

    def attention(kind: Attention) -> Tensor:
        return torch.stack([kind(*inputs).sum() for _ in range(LAYERS)])

    def encode(kind: Attention) -> Tensor:
        with patch.object(proxy_tokens, "proxy_attention", kind):
            return tower(pixels, mask)

    with torch.no_grad():
        torch.testing.assert_close(proxy_attention(*inputs), masked_attention(*inputs), rtol=1e-4, atol=1e-5)
    for name, forward in (("attention", attention), ("whole tower", encode)):
        for mode, step in (("evaluation", torch.no_grad()(forward)), ("training", trained(forward))):
            seconds = {kind: timed(lambda run=step, kind=kind: run(KINDS[kind]), 1) for kind in KINDS}  # warm up
            repeats: list[dict[str, float]] = []
            for _ in range(a.repeat):
                repeats.append({kind: timed(lambda run=step, kind=kind: run(KINDS[kind]), 1) for kind in KINDS})
            seconds = {kind: median(one[kind] for one in repeats) for kind in KINDS}
            ratio = seconds["mask"] / seconds["two parts"]
            print(f"{name}, {mode}: {', '.join(f'{k} {s:.3f} s' for k, s in seconds.items())}, ratio {ratio:.2f}")
    for frames in (12, 24, 48):
        sizes = {kind: measured_memory(kind, frames) for kind in KINDS}
        print(f"{frames} frames, peak of attention: {', '.join(f'{k} {s:.0f} MiB' for k, s in sizes.items())}")


def qkv(videos: int, frames: int) -> tuple[Tensor, Tensor, Tensor, int, int, Tensor]:
    """Return the arguments of attention, which need gradients, laid out in memory as a block's q, k and v are."""
    length = PROXIES + frames * PATCHES
    q, k, v = (
        torch.randn(videos, length, HEADS, HEAD_WIDTH, requires_grad=True).transpose(1, 2) for _ in range(3)
    )
    return q, k, v, frames, PROXIES, torch.ones(videos, length, dtype=torch.bool)


def trained(forward: Callable[[Attention], Tensor]) -> Callable[[Attention], None]:
    return lambda kind: forward(kind).sum().backward()


def timed(run: Callable[[], object], times: int) -> float:
    """Return the seconds that `run` takes."""
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times


def measured_memory(kind: str, frames: int) -> float:
    """Return the MiB of `peak_memory` in a new process, since a process's peak never falls."""
    command = [sys.executable, __file__, "--memory", kind, str(frames)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory(kind: Attention, frames: int) -> float:
    """Return the MiB that attention and its backward pass need beyond those of q, k and v, for four videos."""
    kind(*qkv(1, 1)).sum().backward()  # what is loaded at the first use
    inputs = qkv(4, frames)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind(*inputs).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
