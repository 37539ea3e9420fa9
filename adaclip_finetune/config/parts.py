"""The parts of a mixture of training data, and how many rows of each part are in a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from adaclip_finetune.config.base import PathText, Problem, Settings, setting


class DataPart(Settings):
    """One part of a mixture of training data."""

    annotation: PathText = setting(
        ..., "annotation of the part; of an unlabelled part also a folder of videos", unit="file or folder"
    )
    frames_dir: PathText | None = setting(
        None, "extracted frames of the part; null: where the run's videos are", unit="folder or file"
    )
    video_dir: PathText | None = setting(
        None, "video files of the part; null: where the run's videos are", unit="folder"
    )
    per_batch: int | None = setting(None, "rows of the part in each batch; all together are batch_size", ge=1)
    weight: float | None = setting(None, "rows of the part in each batch, relative to those of the others", gt=0)
    subset: int = setting(0, "take only the first videos of the part; 0: data_subset", unit="videos", ge=0)
    labelled: bool = setting(True, "whether the captions belong to the videos; otherwise only some objectives use them")

    @property
    def share(self) -> float:
        """The rows of the part in a batch, relative to those of the others."""
        return self.per_batch or self.weight or 1.0

    @property
    def place(self) -> str:
        """The folder of the part's videos; "" for that of the run. A folder as annotation holds them too."""
        return self.frames_dir or self.video_dir or (self.annotation if _is_folder(self.annotation) else "")


def _kind(value: Any) -> str:
    return "parts" if isinstance(value, list | tuple) else "file"


DataParts = Annotated[tuple[DataPart, ...], Field(strict=False)]
TrainAnnotation = Annotated[
    Annotated[PathText, Tag("file")] | Annotated[DataParts, Tag("parts")], Discriminator(_kind)
]  # fmt: skip


def parts_of(annotation: str | Sequence[DataPart]) -> Sequence[DataPart]:
    """Return the parts that train_annot names; a single annotation is one part."""
    return [DataPart(annotation=annotation)] if isinstance(annotation, str) else annotation


def is_lazy(annotation: str) -> bool:
    """Return whether an annotation is JSON Lines or tar shards, whose rows are read one by one when they are needed."""
    return annotation.endswith(".jsonl") or (_is_folder(annotation) and any(Path(annotation).glob("*.tar")))


def is_folder_of_videos(annotation: str) -> bool:
    """Return whether an annotation is a folder of video files, which have no captions."""
    return _is_folder(annotation) and not is_lazy(annotation)


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # such as a name that is too long
        return False


def rows_in_batch(shares: Sequence[float], batch_size: int) -> list[int]:
    """Return how many rows of a batch each part has, in proportion to `shares`, by the largest remainder."""
    exact = [share / sum(shares) * batch_size for share in shares]
    rows = [int(number + 1e-9) for number in exact]
    by_remainder = sorted(range(len(rows)), key=lambda part: rows[part] - exact[part])
    for part in by_remainder[: batch_size - sum(rows)]:
        rows[part] += 1
    return rows


def contradictions_of_parts(config: Any, parts: Sequence[DataPart], uses_unlabelled: bool) -> Iterator[Problem]:
    """Yield parts that do not fit together, or do not fit the other settings of `config`."""
    name = "train_annot"
    if not parts:
        yield "train_annot is an empty list: give at least one part", (name,)
        return
    files = Counter((Path(part.annotation), part.subset) for part in parts)
    for (path, subset), count in files.items():
        if count > 1:
            same = f" with subset {subset}" if subset else ""
            yield f"train_annot names {path}{same} {count} times: name each annotation once", (name,)
    for number, part in enumerate(parts):
        if part.frames_dir and part.video_dir:
            yield f"train_annot[{number}] has both frames_dir and video_dir: its frames come from one of them", (name,)
        for key in ("frames_dir", "video_dir"):
            if getattr(part, key) and getattr(part, key) == getattr(config, key):  # its videos would have other names
                yield f"train_annot[{number}].{key} is {key} itself: leave it out", (name, key)
        if not part.labelled and not uses_unlabelled:
            what = f"train_annot[{number}] is not labelled, but the objective trains on captions only"
            yield f"{what}: take an objective that uses unlabelled videos", (name, "objective")
        if part.labelled and is_folder_of_videos(part.annotation):
            yield no_captions(f"train_annot[{number}]", part.annotation), (name,)
    counts, weights = [part.per_batch for part in parts], [part.weight for part in parts]
    if any(counts) and (any(weights) or not all(counts)):
        yield "train_annot: give per_batch to every part, or weight to every part", (name,)
    elif any(weights) and not all(weights):
        yield "train_annot: give weight to every part, or to none (equal parts)", (name,)
    elif any(counts) and config.auto_batch_size:
        message = "auto_batch_size changes batch_size: give the parts of train_annot weight instead of per_batch"
        yield message, ("auto_batch_size", name)
    elif any(counts) and (total := sum(filter(None, counts))) != config.batch_size:
        message = f"per_batch of the parts of train_annot sums to {total}, but batch_size is {config.batch_size}"
        yield f"{message}: make them equal, or give weight instead", (name, "batch_size")
    else:
        yield from _parts_without_rows(parts, config.batch_size, "batch_size")
        # The first phase of IBS has a batch size of its own.
        pre_batch_size = getattr(config.peft.config, "pre_batch_size", None)
        if pre_batch_size is not None:
            yield from _parts_without_rows(parts, pre_batch_size, "peft.config.pre_batch_size")


def no_captions(where: str, folder: str) -> str:
    """Return why a folder of videos cannot be labelled training data."""
    return (
        f"{where} {folder} is a folder without tar shards, so its videos have no captions: give an annotation, or make "
        "it an unlabelled part (labelled false) for an objective that uses one"
    )


def _parts_without_rows(parts: Sequence[DataPart], batch_size: int, setting_name: str) -> Iterator[Problem]:
    for number, rows in enumerate(rows_in_batch([part.share for part in parts], batch_size)):
        if not rows:
            message = f"train_annot[{number}] gets no row of a batch of {batch_size}: raise its weight"
            yield f"{message}, or {setting_name}", ("train_annot", setting_name)
