"""Time and memory of attention in `tower: proxy_tokens`, in its two parts and by a mask, as ratios within one run.

    python scripts/bench/proxy_tokens.py --videos 2 --repeat 5
    python scripts/bench/proxy_tokens.py --videos 16 --repeat 20 --device cuda --bf16

ViT-B/32 with random weights (time does not depend on them), 4 proxies. "By a mask" is one attention over all S tokens
of a video, with an (S, S) mask that allows the same pairs; both give the same vectors. Time is printed for attention
alone (12 layers) and for the whole tower, in evaluation and in training. Memory is the peak of a training step for one
video beyond the model and its gradients.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config.choices.towers import ProxyTokensSettings
from adaclip_finetune.model.towers import proxy_tokens
from adaclip_finetune.model.towers.proxy_tokens import ProxyTokens, proxy_attention

PROXIES, PATCHES, HEADS, HEAD_WIDTH = 4, 49, 12, 64
Attention = Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, shared: int, real: Tensor) -> Tensor:
    """Return what `proxy_attention` does, by an (S, S) mask."""
    frames = real.shape[1]
    frame = torch.arange(q.shape[2] - shared) // ((q.shape[2] - shared) // frames)
    frame = torch.cat([torch.full((shared,), -1), frame])
    allowed = (frame[:, None] == -1) | (frame == -1) | (frame[:, None] == frame)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


KINDS: dict[str, Attention] = {"mask": masked_attention, "two parts": proxy_attention}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("videos", 2), ("frames", 12), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument("--memory", choices=KINDS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_default_device(a.device)
    with torch.autocast(a.device, torch.bfloat16, enabled=a.bf16):
        compare(a)


def compare(a: argparse.Namespace) -> None:
    """Print the figures of both kinds."""
    tower, pixels = build(), torch.randn(a.videos, a.frames, 3, 224, 224)
    if a.memory:
        print(peak_memory(tower, KINDS[a.memory], pixels))
        return

    inputs = qkv(a.videos, a.frames)
    with torch.no_grad(), torch.autocast(a.device, enabled=False):
        torch.testing.assert_close(proxy_attention(*inputs), masked_attention(*inputs), rtol=1e-4, atol=1e-5)

    def attention(kind: Attention) -> Tensor:
        return torch.stack([kind(*inputs).sum() for _ in tower.view.blocks])

    for name, forward in (("attention", attention), ("whole tower", lambda kind: encode(tower, kind, pixels))):
        for mode, step in (("evaluation", torch.no_grad()(forward)), ("training", trained(forward))):
            repeats = [{kind: timed(step, run) for kind, run in KINDS.items()} for _ in range(a.repeat + 1)]
            seconds = {kind: median(one[kind] for one in repeats[1:]) for kind in KINDS}  # the first warms up
            ratio = seconds["mask"] / seconds["two parts"]
            print(f"{name}, {mode}: {', '.join(f'{k} {s:.3f} s' for k, s in seconds.items())}, ratio {ratio:.2f}")
    for frames in (12, 24, 48):
        sizes = {kind: measured_memory(a, kind, frames) for kind in KINDS}
        print(f"{frames} frames, memory of training: {', '.join(f'{k} {s:.0f} MiB' for k, s in sizes.items())}")


def build() -> ProxyTokens:
    clip = open_clip.create_model("ViT-B-32-quickgelu").to(torch.get_default_device())
    return ProxyTokens(ProxyTokensSettings(), clip.train())


def encode(tower: ProxyTokens, kind: Attention, pixels: Tensor) -> Tensor:
    """Return the tokens of videos with this kind of attention."""
    with patch.object(proxy_tokens, "proxy_attention", kind):
        tokens: Tensor = tower(pixels, torch.ones(pixels.shape[:2], dtype=torch.bool))
    return tokens


def qkv(videos: int, frames: int) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Return the arguments of attention, which need gradients, laid out in memory as a block's q, k and v are."""
    length = PROXIES + frames * PATCHES
    q, k, v = (torch.randn(videos, length, HEADS, HEAD_WIDTH, requires_grad=True).transpose(1, 2) for _ in range(3))
    return q, k, v, PROXIES, torch.ones(videos, frames, dtype=torch.bool)


def trained(forward: Callable[[Attention], Tensor]) -> Callable[[Attention], None]:
    return lambda kind: forward(kind).sum().backward()


def timed(step: Callable[[Attention], object], kind: Attention) -> float:
    """Return the seconds that a step takes with this kind of attention: on the CPU, those of this process alone."""
    on_cpu = torch.get_default_device().type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    started = clock()
    step(kind)
    if not on_cpu:
        torch.accelerator.synchronize()
    return clock() - started


def measured_memory(a: argparse.Namespace, kind: str, frames: int) -> float:
    """Return `peak_memory` for one video in a new process, since the peak of a process never falls."""
    command = [sys.executable, __file__, "--memory", kind, "--videos", "1", "--frames", str(frames)]
    command += ["--device", a.device, *["--bf16"] * a.bf16]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak_memory(tower: ProxyTokens, kind: Attention, pixels: Tensor) -> float:
    """Return the MiB that a training step needs beyond the model, its gradients and the frames."""
    encode(tower, kind, pixels[:, :1]).sum().backward()  # which makes the gradients
    before = high_water()
    encode(tower, kind, pixels).sum().backward()
    return high_water() - before


def high_water() -> float:
    """Return the largest memory that this process has had, in MiB (Linux; getrusage also counts its parent's)."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
