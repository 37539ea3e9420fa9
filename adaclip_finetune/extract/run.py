"""The whole of `adaclip extract`: which videos are not finished, extracting several at a time, and the report.

The images of a video are written to a hidden folder, which gets its name when it is complete and checked. Beside them
are a manifest, by which a later run recognises finished work, and the times of the frames, by which they are sampled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adaclip_finetune.data.frame_folder import FRAME_TIMES
from adaclip_finetune.data.readable import listing
from adaclip_finetune.data.sampling import frame_indices, is_constant_rate
from adaclip_finetune.data.video.decoding import BrokenVideo, opened, sound_frames
from adaclip_finetune.data.video.index import TIMED_CONTAINERS, FrameIndex, index_video
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.options import ExtractionOptions, cores
from adaclip_finetune.extract.plan import REPORT, ExtractionJob, plan_jobs
from adaclip_finetune.extract.program import FULL, ExtractionFailed, FFmpeg, images_of
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.printable import printable

WORK = ".extraction"  # below FRAMES: the lock, and what is not complete
MANIFEST = "manifest.json"


def extract(options: ExtractionOptions) -> int:
    """Extract the frames of videos; return the exit code, 1 if a video failed.

    Raises UserError if nothing can be started, or if the disk is full.
    """
    try:
        jobs, passed_over = plan_jobs(options)
        if passed_over:
            print(passed_over)
        to_do = jobs if options.overwrite else _unfinished(options, jobs)
        counts = f"{len(to_do)} videos to extract, {len(jobs) - len(to_do)} finished earlier"
        if options.dry_run:
            print(f"{counts}; nothing was written")
            return 0
        ffmpeg = FFmpeg(max(1, cores() // options.workers), options.time_limit)
        options.frames.mkdir(parents=True, exist_ok=True)
        with _work_folder(options.frames) as work:
            print(counts, flush=True)
            return _extract_all(options, ffmpeg, to_do, len(jobs) - len(to_do), work)
    except OSError as error:
        full = ". What is complete stays; make room and run the same command again" if error.errno in FULL else ""
        raise UserError(f"{printable(error.filename or options.frames)}: {error.strerror}{full}") from error


def _extract_all(
    options: ExtractionOptions, ffmpeg: FFmpeg, jobs: list[ExtractionJob], finished: int, work: Path
) -> int:
    frames, failed = 0, dict[str, dict[str, str]]()

    def outcome(job: ExtractionJob) -> tuple[ExtractionJob, int, str]:
        """Return the job, the number of images and, if it failed, the reason. Raises OSError if the disk is full."""
        try:
            return job, _extract_video(job, options, ffmpeg, work), ""
        except (ExtractionFailed, BrokenVideo) as failure:
            return job, 0, str(failure)
        except OSError as error:
            if error.errno in FULL:
                raise
            return job, 0, error.strerror or str(error)

    pool = ThreadPool(options.workers)
    try:
        outcomes = pool.imap_unordered(outcome, jobs)
        for job, count, reason in tqdm(outcomes, "extracting", len(jobs), unit="video", leave=False, disable=None):
            frames += count
            if reason:
                failed[job.folder] = {"source": str(job.source), "reason": reason}
    finally:
        ffmpeg.close()
        pool.terminate()
        pool.join()
    report = {
        "videos": len(jobs) + finished,
        "extracted": len(jobs) - len(failed),
        "finished_earlier": finished,
        "frames": frames,
        "ffmpeg": ffmpeg.path,
        "options": options.image_options,
        "failed": dict(sorted(failed.items())),
    }
    write_durably(options.frames / REPORT, _json(report))
    print(f"{report['extracted']} videos extracted, {frames} frames")
    if failed:
        reasons = {printable(folder): printable(facts["reason"]) for folder, facts in sorted(failed.items())}
        print(f"{len(failed)} failed (see {options.frames / REPORT}):\n{listing(reasons)}")
    return 1 if failed else 0


def _extract_video(job: ExtractionJob, options: ExtractionOptions, ffmpeg: FFmpeg, work: Path) -> int:
    """Make the folder of a job; return the number of images. On any error nothing is left behind."""
    if job.problem:
        raise ExtractionFailed(job.problem)
    source = _facts(job.source)  # as it is now: if it changes meanwhile, the next run extracts it again
    folder = work / uuid4().hex  # an ffmpeg that outlived an earlier run cannot know this name
    folder.mkdir()
    try:
        manifest = _write_images(job, options, ffmpeg, folder)
        manifest |= {"options": options.image_options, "start": job.start, "end": job.end, "source": source}
        (folder / MANIFEST).write_bytes(_json(manifest))
        _put_in_place(folder, options.frames / job.folder, work)
        return int(manifest["frames"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_images(job: ExtractionJob, options: ExtractionOptions, ffmpeg: FFmpeg, folder: Path) -> dict[str, Any]:
    """Write the images of a job, with their times where all frames are wanted; return what the manifest tells of them.

    Frames that are chosen by number are counted from the start of the file, so that they are those of reading in place.
    """
    index = index_video(job.source)
    between, times = _frames_between(job, index), index.times()
    if times is not None:
        times = times[between]
    chosen = between if options.num_frames is None else between[_evenly_spread(len(between), options.num_frames, times)]
    with opened(job.source) as (container, stream):
        number, seeks = stream.index, container.format.name.partition(",")[0] in (*TIMED_CONTAINERS, "asf")
    whole = options.num_frames is None and (seeks or (job.start is None and job.end is None))
    different = np.unique(chosen)
    among = [] if whole else different.tolist()
    ffmpeg.run(images_of(job, options.image_options, number, index.keys is not None, among), folder)
    count = sum(1 for _ in folder.iterdir())
    if count == 0 or (options.num_frames is not None and count != len(different)):
        raise ExtractionFailed(f"ffmpeg gave {count} of {len(different)} frames")
    if options.num_frames is not None:
        _repeat(folder, options.prefix, np.searchsorted(different, chosen).tolist())
    elif options.frame_rate == -1 and times is not None and count == len(times):
        (folder / FRAME_TIMES).write_bytes(_json(times.round(6).tolist()))
    return {
        "frames": count if options.num_frames is None else len(chosen),
        "fps": None if np.isnan(index.rate) else index.rate,
        "duration": None if np.isnan(index.duration) else index.duration,
        "indices": None if options.num_frames is None else chosen.tolist(),
    }


def _frames_between(job: ExtractionJob, index: FrameIndex) -> NDArray[np.int64]:
    """Return the indices of the frames that are shown between the start and the end of a job."""
    if job.start is None and job.end is None:
        return np.arange(index.num_frames)
    times = index.times()
    if times is None:  # as FFmpeg guesses, which the program does, too
        times = np.array([frame.time for frame in sound_frames(job.source)], np.float64) - index.begins
    times = times.round(6)  # ffmpeg counts in microseconds
    between = np.flatnonzero((times >= (job.start or 0.0)) & (times < (np.inf if job.end is None else job.end)))
    if not len(between):
        raise ExtractionFailed("no frame is shown between start and end")
    return between


def _evenly_spread(count: int, num_frames: int, times: NDArray[np.float64] | None) -> NDArray[np.int64]:
    """Return which of `count` frames uniform sampling reads.

    A short video gives each of its frames once. Where the rate is not constant, a frame that is shown long is
    repeated, so that the images are evenly spread in time.
    """
    chosen = frame_indices(count, num_frames, times=times)
    return np.unique(chosen) if times is None or is_constant_rate(times) else chosen


def _repeat(folder: Path, prefix: str, places: list[int]) -> None:
    """Rename and copy the images of the different frames, so that image n is that of place `places[n - 1]` (from 0)."""
    for number, place in reversed(list(enumerate(places, start=1))):  # an image's place is never after `number`
        if place + 1 != number:
            shutil.copyfile(folder / (prefix % (place + 1)), folder / (prefix % number))


def _put_in_place(folder: Path, target: Path, work: Path) -> None:
    """Rename the folder. What was at its place goes away first, if it is a folder of nothing but images."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(target):
        if not target.is_dir() or target.is_symlink() or not all(map(_may_be_replaced, target.iterdir())):
            raise ExtractionFailed(f"{target} is not a folder of images alone: move it away")
        target.rename(work / uuid4().hex)
    folder.rename(target)


def _may_be_replaced(path: Path) -> bool:
    is_image = path.suffix.lower() in (".jpg", ".jpeg", ".png") or path.name in (MANIFEST, FRAME_TIMES)
    return is_image and path.is_file() and not path.is_symlink()


def _unfinished(options: ExtractionOptions, jobs: list[ExtractionJob]) -> list[ExtractionJob]:
    """Return the jobs that are not finished.

    Raises UserError where finished work was made with other options: nobody wants a mixture of both.
    """
    to_do, others = [], dict[str, str]()
    for job in jobs:
        folder = options.frames / job.folder
        if job.problem or not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            to_do.append(job)
            continue
        try:
            then: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
            then |= then.pop("options")
            source, count = then["source"], int(then["frames"])
        except (OSError, ValueError, KeyError, TypeError):
            problem = f"{folder} is there and was not made by this command; --overwrite replaces it"
            to_do.append(replace(job, problem=problem))
            continue
        now = options.image_options | {"start": job.start, "end": job.end}
        ends = (folder / (options.prefix % number) for number in {1, count})
        if differ := [f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value]:
            others[printable(job.folder)] = ", ".join(differ)
        elif not all(image.is_file() for image in ends) or (job.source.is_file() and _facts(job.source) != source):
            to_do.append(job)  # if the source has gone, its images have not
    if others:
        raise UserError(
            f"{options.frames}: {len(others)} videos were extracted with other options:\n{listing(others, 5)}\n"
            "Give --overwrite to extract them again, the same options to go on, or another folder"
        )
    return to_do


def _facts(path: Path) -> dict[str, Any]:
    """Return what identifies a video file. Raises OSError, also for a pipe or a device, which would be waited for."""
    facts = path.stat()
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    return {"name": path.name, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


@contextmanager
def _work_folder(frames: Path) -> Iterator[Path]:
    """Give the hidden folder, locked, and emptied of what a run that was killed left in it."""
    work = frames / WORK
    work.mkdir(exist_ok=True)
    lock = FolderLock(work)
    lock.take()
    try:
        _empty(work)
        yield work
    finally:
        _empty(work)
        lock.release()
        with suppress(OSError):  # another run has come in
            work.rmdir()


def _empty(work: Path) -> None:
    for folder in work.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"
