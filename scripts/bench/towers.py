"""Time and memory of every video tower beside `per_frame`, in one run, at the full size of a ViT-B/32.

    python scripts/bench/towers.py

One video of 12 random frames, random weights. Encoding is the median of some passes without gradients, in turns;
training is one pass forward and backward with everything learning, in a process of its own, whose peak memory is what
it adds to that of the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import open_clip
import torch

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.base import implementation
from adaclip_finetune.config.choices.towers import TOWERS

FRAMES = 12
CASES: dict[str, dict[str, Any]] = {
    "per_frame": {"method": "per_frame"},
    "proxy_tokens": {"method": "proxy_tokens"},
    "clustering, B6-4,49": {"method": "clustering"},
    "global_local, linear": {"method": "global_local"},
    "global_local, transformer": {"method": "global_local", "config": {"generator": "transformer"}},
}


def build(case: str) -> Any:
    """Return a tower on a new ViT-B/32."""
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32-quickgelu")
    section = load_config(None, {"tower": CASES[case]}).tower
    tower = implementation(TOWERS, section)(section.config, clip)
    tower.text_tower()
    return tower


def inputs(videos: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(videos, FRAMES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return pixels, torch.ones(videos, FRAMES, dtype=torch.bool)


def encoding(repeat: int) -> dict[str, float]:
    """Return the seconds that each tower takes to encode a video, measured in turns."""
    towers = {case: build(case).eval() for case in CASES}
    given, times = inputs(1), {case: list[float]() for case in CASES}
    with torch.no_grad():
        for _ in range(repeat + 1):  # the first turn warms up
            for case, tower in towers.items():
                begun = time.perf_counter()
                tower(*given)
                times[case].append(time.perf_counter() - begun)
    return {case: statistics.median(seconds[1:]) for case, seconds in times.items()}


def train(case: str, videos: int, result: Any) -> None:
    """Put the seconds and the MiB of one pass with gradients into `result`."""
    tower, given = build(case), inputs(videos)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which building the model made
    before, begun = peak_mib(), time.perf_counter()
    tower(*given).square().sum().backward()
    seconds = time.perf_counter() - begun
    result.put((seconds, peak_mib() - before))


def peak_mib() -> float:
    """Return the peak memory of this process in MiB, from Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=10, help="passes of each tower")
    parser.add_argument("--videos", type=int, default=4, help="videos of the training pass")
    arguments = parser.parse_args()
    encoded, context = encoding(arguments.repeat), multiprocessing.get_context("spawn")
    trained = {}
    for case in CASES:
        result = context.Queue()
        process = context.Process(target=train, args=(case, arguments.videos, result))
        process.start()
        trained[case] = result.get()
        process.join()
    print(f"{torch.get_num_threads()} threads; {FRAMES} frames; training with {arguments.videos} videos\n")
    print("| tower | encoding, s | ÷ per_frame | training, s | ÷ per_frame | training, MiB | ÷ per_frame |")
    print("|---|---|---|---|---|---|---|")
    (base_seconds, base_mib) = trained["per_frame"]
    for case, seconds in encoded.items():
        passed, mib = trained[case]
        ratios = seconds / encoded["per_frame"], passed / base_seconds, mib / base_mib
        print(
            f"| {case} | {seconds:.3f} | {ratios[0]:.2f} | {passed:.2f} | {ratios[1]:.2f} "
            f"| {mib:.0f} | {ratios[2]:.2f} |"
        )


if __name__ == "__main__":
    main()
