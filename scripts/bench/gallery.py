"""Memory and time of ranking a large gallery from embeddings, and of writing its similarity matrix.

    python scripts/bench/gallery.py --texts 50000 --videos 50000 --width 512 --folder /tmp

The embeddings are random; the smaller `--noise`, the closer a text is to its own video. Each step runs in its own
process, whose peak memory includes Python and torch. The matrix (10 GB at these sizes) is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = ("embeddings", "save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("texts", 50_000), ("videos", 50_000), ("width", 512), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--noise", type=float, default=6.0)
    parser.add_argument("--folder", type=Path, default=Path(), help="folder of the temporary matrix")
    parser.add_argument("--step", choices=STEPS, help="one step in this process; without it, all of them")
    a = parser.parse_args()
    matrix = a.folder / "gallery-bench.npy"
    if a.step:
        run_step(a, matrix)
        return
    found: dict[str, dict[str, Any]] = {}
    try:
        for step in STEPS:
            command = [sys.executable, __file__, *sys.argv[1:], "--step", step]
            found[step] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"{step}: {found[step]['seconds']:.1f} s, peak {found[step]['peak_mib']:.0f} MiB", flush=True)
    finally:
        for path in (matrix, matrix.with_suffix(".json")):
            path.unlink(missing_ok=True)
    print(f"R@1 {found['embeddings']['recall']:.2f}")


def run_step(a: argparse.Namespace, matrix: Path) -> None:
    """Print the time of a step without imports and random numbers, and its peak memory."""
    import numpy as np
    import torch
    from torch.nn.functional import normalize

    from adaclip_finetune.data.queries import Queries
    from adaclip_finetune.evaluation.metrics import retrieval_metrics
    from adaclip_finetune.evaluation.similarity import similarity_blocks
    from adaclip_finetune.evaluation.similarity_file import write_similarity_file
    from adaclip_finetune.model.scoring import CosineScorer

    if a.threads:
        torch.set_num_threads(a.threads)
    owners = np.arange(a.texts) % a.videos
    generator = torch.Generator().manual_seed(0)
    videos = torch.randn(a.videos, a.width, generator=generator)
    texts = torch.randn(a.texts, a.width, generator=generator).mul_(a.noise).add_(videos[owners])
    clip = torch.nn.Module()
    clip.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
    started, found = time.perf_counter(), {}
    blocks = similarity_blocks(texts, normalize(videos, dim=-1), CosineScorer(clip), block=500)
    if a.step == "save":
        queries = Queries([f"text {n}" for n in range(a.texts)], owners, [f"video {n}" for n in range(a.videos)])
        write_similarity_file(matrix, blocks, queries)
    else:
        found["recall"] = retrieval_metrics(blocks, owners).t2v.recall(1)
    found |= {"seconds": time.perf_counter() - started, "peak_mib": peak_mib()}
    print(json.dumps(found))


def peak_mib() -> float:
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


if __name__ == "__main__":
    main()
