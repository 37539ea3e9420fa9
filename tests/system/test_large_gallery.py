"""A large gallery is ranked and saved block by block, never as a whole matrix in memory."""

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scorers import cosine_scorer, features

from adaclip_finetune.data.queries import Queries
from adaclip_finetune.evaluation import metrics, similarity
from adaclip_finetune.evaluation.similarity import similarity_blocks
from adaclip_finetune.evaluation.similarity_file import write_similarity_file


def peak_growth(action: Callable[[], Any]) -> float:
    """Return by how many MiB `action` raises the peak of this process's resident memory."""

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(name)))

    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left to the allocator would hide what is taken from it
    Path("/proc/self/clear_refs").write_text("5")  # restart the peak
    before = field("VmRSS")
    action()
    return (field("VmHWM") - before) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_gallery_is_ranked_and_saved_within_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(metrics, "_KEPT", 2**20)
    count, path = 3500, tmp_path / "s.npy"
    whole, little = 45, 30  # MiB: the matrix; blocks, what is computed from them, and what the allocator keeps
    text, video = torch.randn(2, count, 16, generator=torch.Generator().manual_seed(0))
    owners, names = np.arange(count), [str(number) for number in range(count)]
    scorer = cosine_scorer(4.6)
    blocks = similarity_blocks(text, scorer.keep(features(video)), scorer, 500)
    ranks: list[list[int]] = []

    def rank(matrix: Any) -> None:
        found = metrics.retrieval_metrics(matrix, owners, names)
        ranks.append(found.t2v.ranks.tolist() + found.v2t.ranks.tolist())

    assert peak_growth(lambda: rank(blocks)) < little
    assert peak_growth(lambda: write_similarity_file(path, blocks, Queries(names, owners, names))) < little
    assert peak_growth(lambda: rank([torch.cat(list(blocks))])) > whole, "a whole matrix would be noticed"
    assert ranks[0] == ranks[1]
