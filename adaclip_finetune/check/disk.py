"""What a run writes, held against the room where it writes; and whether it may."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from adaclip_finetune.check.finding import Finding, in_bytes
from adaclip_finetune.check.source import Split
from adaclip_finetune.data.queries import evaluation_queries
from adaclip_finetune.model.clip import embedding_width
from adaclip_finetune.training.session import Session


def check_disk(trial: Session, splits: Sequence[Split], folder: Path | None) -> Iterator[Finding]:
    """The run folder at its largest, and the matrix of save_similarity. `folder`: that of a run that goes on."""
    config = trial.config
    here = _existing(folder or Path(config.output_dir, config.dataset))
    there = Path(config.save_similarity).absolute().parent if config.save_similarity else None
    together = there is not None and not config.no_output and here.stat().st_dev == there.stat().st_dev
    matrix = _matrix(trial, splits[-1]) if there is not None else 0
    if not config.no_output:
        yield from _closed("output_dir", here, "set output_dir to another folder, or no_output")
        needs = _run_folder(trial, splits)
        if together:
            needs |= {"similarity": matrix, "left at the end": needs["left at the end"] + matrix}
        yield _held_against("output_dir", needs, here, _taken(folder) if folder else 0)
    if there is not None:
        yield from _closed("save_similarity", there, "give save_similarity another place")
        if not together:
            needs = {"similarity": matrix, "left at the end": matrix}
            yield _held_against("save_similarity", needs, there, 0)


def embedding_bytes(trial: Session, split: Split, rows: int) -> int:
    """Of all texts of a split and `rows` vectors of each of its videos."""
    texts = len(evaluation_queries(split.videos, trial.config.concat_captions).texts)
    return 4 * embedding_width(trial.loaded.module) * (texts + rows * len(split.videos))


def kept_rows(trial: Session) -> int:
    """How many vectors of a video the model's evaluation keeps."""
    config = trial.config
    if trial.model.scorer.indexable:
        return 1
    return config.top_k if config.use_policy else config.num_frm


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """What they take."""
    return sum(tensor.nbytes for tensor in tensors)


def _run_folder(trial: Session, splits: Sequence[Split]) -> dict[str, int]:
    """Bytes. While a new snapshot is written the one before it is still there, and each keeps the best weights of its
    time. The embeddings are those of the test's two evaluations, zero-shot and final, kept until the run is finished.
    """
    config, model = trial.config, trial.model
    embeddings = embedding_bytes(trial, splits[-1], 1) + embedding_bytes(trial, splits[-1], kept_rows(trial))
    if config.do_inference:
        return {"embeddings": embeddings, "left at the end": 0}
    weights = tensor_bytes(model.state_dict().values())
    adapter = 0 if config.resume else tensor_bytes(trial.method.own_state(model).values())
    moments = 2 * tensor_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    last = weights if config.save_last else 0
    return {
        "snapshots": 2 * (weights + moments),
        "best.safetensors": 2 * weights,
        "adapter.safetensors": 2 * adapter,
        "last.safetensors": last,
        "embeddings": embeddings,
        "left at the end": weights + adapter + last,
    }


def _matrix(trial: Session, tested: Split) -> int:
    texts = len(evaluation_queries(tested.videos, trial.config.concat_captions).texts)
    return 4 * texts * len(tested.videos)


def _held_against(setting: str, needs: dict[str, int], folder: Path, taken: int) -> Finding:
    """`taken`: what the run has written there already."""
    left = needs["left at the end"]
    peak, free = sum(needs.values()) - left, shutil.disk_usage(folder).free
    message = (
        f"disk: the run writes up to {in_bytes(peak)}, of which {in_bytes(left)} stay; "
        f"{in_bytes(free)} are free in {folder}"
    )
    advice = f"make room, or set {setting} to another disk" if peak > free + taken else ""
    items = {**needs, "peak": peak, "free": free}
    return Finding("fails" if advice else "fine", "disk", "run", message, items, advice)


def _closed(setting: str, folder: Path, advice: str) -> Iterator[Finding]:
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("fails", "closed_folder", "run", f"{setting}: nothing can be written in {folder}", advice=advice)


def _taken(folder: Path) -> int:
    """Bytes of a folder's files; one with two names counts once."""
    facts = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({fact.st_ino: fact.st_size for fact in facts}.values())


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
