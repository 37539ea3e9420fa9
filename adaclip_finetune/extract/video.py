"""One video: its images are made in a hidden folder, which gets its name when it is complete and verified."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.data.video.container import BrokenVideo
from adaclip_finetune.data.video.decoding import Frame
from adaclip_finetune.data.video.file import read_frames
from adaclip_finetune.data.video.index import VideoIndex, index_video
from adaclip_finetune.extract.manifest import Manifest, Source, holds_only_images
from adaclip_finetune.extract.options import Look
from adaclip_finetune.extract.plan import Job
from adaclip_finetune.extract.probe import Facts, frames_between, probe
from adaclip_finetune.extract.program import Failed, Part, Program, from_file, from_pixels, walk

BYTES_AT_ONCE = 1 << 27  # of decoded frames
ENDS = {True: b"\xff\xd9", False: b"IEND\xaeB`\x82"}  # the last bytes of every JPEG, of every PNG


def extract_video(job: Job, look: Look, program: Program, frames: Path, work: Path) -> int:
    """Make the job's folder below `frames`, in `work` until it is complete; returns the number of images.

    Raises Failed with the reason, Stopped, or OSError where the disk is full; then nothing is left behind.
    """
    if job.problem:
        raise Failed(job.problem)
    try:
        source = Source.of(job.source)
    except OSError as error:
        raise Failed(error.strerror or str(error)) from None
    folder = work / uuid4().hex  # an ffmpeg that outlived an earlier run cannot know this name
    folder.mkdir()
    try:
        facts = probe(job.source)
        picked = _write_images(job, look, program, facts, folder)
        count = _verify(folder, look)
        manifest = Manifest(count, facts.fps, facts.duration, source, look, job.start, job.end, picked)
        manifest.write(folder)
        if Source.of(job.source) != source:
            raise Failed("the file changed while it was being extracted")
        _put_in_place(folder, frames / job.folder, work)
        return count
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_images(job: Job, look: Look, program: Program, facts: Facts, folder: Path) -> list[int] | None:
    """Returns the indices of the frames that num_frames picked, None where it was all of them."""
    part = Part(job.source, facts.stream, job.start, job.end, facts.seeks)
    if look.num_frames is not None and facts.indexable:
        try:
            index = index_video(job.source)
            candidates = frames_between(index, facts, job.start, job.end)
            if candidates is not None:
                program.run(walk(part), folder)
                return _write_picked(job.source, look, program, index, candidates, folder)
        except BrokenVideo as error:
            raise Failed(str(error)) from None
    program.run(from_file(look, part), folder)
    return None if look.num_frames is None else _thin_out(folder, look)


def _picked(count: int, look: Look) -> NDArray[np.int64]:
    """What uniform sampling takes of so many frames, each once: a short video gives all it has."""
    assert look.num_frames is not None
    return np.unique(frame_indices(count, look.num_frames))


def _write_picked(
    source: Path, look: Look, program: Program, index: VideoIndex, candidates: NDArray[np.int64], folder: Path
) -> list[int]:
    """Decode what is picked alone, as training would, and let ffmpeg resize and compress it."""
    if not len(candidates):
        raise Failed("no frame is shown between start and end")
    indices: list[int] = candidates[_picked(len(candidates), look)].tolist()
    first = read_frames(source, index, indices[:1])[0]
    at_once = max(1, BYTES_AT_ONCE // first.nbytes)
    height, width, _ = first.shape

    def pixels() -> Iterator[memoryview]:
        for start in range(0, len(indices), at_once):
            batch: Frame = read_frames(source, index, indices[start : start + at_once])
            if batch.shape[1:] != first.shape:
                raise BrokenVideo("its frames differ in size")
            yield batch.data.cast("B")

    program.run(from_pixels(look, width, height), folder, pixels())
    return indices


def _thin_out(folder: Path, look: Look) -> list[int]:
    """Of all frames keep those that sampling picks: the way where a file does not tell where its frames are."""
    count = _verify(folder, look)
    picked: list[int] = _picked(count, look).tolist()
    for number, i in enumerate(picked, start=1):
        (folder / look.image_name(i + 1)).replace(folder / look.image_name(number))  # i + 1 ≥ number: none is lost
    for number in range(len(picked) + 1, count + 1):
        (folder / look.image_name(number)).unlink(missing_ok=True)
    return picked


def _verify(folder: Path, look: Look) -> int:
    """The number of images; Failed if one is missing or not whole. Not every ffmpeg reports a write that failed."""
    count = sum(1 for _ in folder.iterdir())
    if not count:
        raise Failed("it gave no frame")
    end = ENDS[look.is_jpeg]
    for number in range(1, count + 1):
        path = folder / look.image_name(number)
        try:
            with path.open("rb") as file:
                file.seek(-len(end), os.SEEK_END)
                whole = file.read() == end
        except OSError:
            whole = False
        if not whole:
            raise Failed(f"{path.name} is not whole, of {count} images")
    return count


def _put_in_place(folder: Path, target: Path, work: Path) -> None:
    """Rename; what stood there goes away first, if it is images alone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        if reason := holds_only_images(target):
            raise Failed(reason)
        old = work / uuid4().hex
        target.rename(old)
        folder.rename(target)
        if old.is_symlink():
            old.unlink()
        else:
            shutil.rmtree(old)
    else:
        folder.rename(target)
