"""The whole of `adaclip extract`: which videos are not finished, extracting several at a time, and the report.

The images of a video are written to a hidden folder, which gets its name when it is complete and checked. Beside them
are a manifest, by which a later run recognises finished work, and the times of the frames, by which they are sampled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
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
from adaclip_finetune.data.video.container import BrokenVideo, opened
from adaclip_finetune.data.video.decoding import sound_frames
from adaclip_finetune.data.video.index import TIMED_CONTAINERS, FrameIndex, index_video
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.options import ExtractionOptions, ImageOptions, cores
from adaclip_finetune.extract.plan import REPORT, ExtractionJob, plan_jobs
from adaclip_finetune.extract.program import CHOSEN_TIMES, FULL, ExtractionFailed, FFmpeg, images_of
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
        if options.dry_run:
            return _show(options, jobs)
        ffmpeg = FFmpeg(max(1, cores() // options.num_workers), options.time_limit)
        options.frames.mkdir(parents=True, exist_ok=True)
        with _work_folder(options.frames) as work:
            return _extract_all(options, ffmpeg, jobs, work)
    except OSError as error:
        full = ". What is complete stays; make room and run the same command again" if error.errno in FULL else ""
        raise UserError(f"{printable(error.filename or options.frames)}: {error.strerror}{full}") from error


def _show(options: ExtractionOptions, jobs: list[ExtractionJob]) -> int:
    """Print what would be done; return the exit code."""
    to_do = _unfinished(options, jobs)
    for job in to_do:
        problem = f" (not possible: {printable(job.problem)})" if job.problem else ""
        print(f"{printable(job.source)} -> {printable(options.frames / job.folder)}{problem}")
    print(f"{len(to_do)} videos to extract, {len(jobs) - len(to_do)} finished earlier; nothing was written")
    return 0


def _extract_all(options: ExtractionOptions, ffmpeg: FFmpeg, jobs: list[ExtractionJob], work: Path) -> int:
    to_do = _unfinished(options, jobs)
    finished, start = len(jobs) - len(to_do), time.monotonic()
    print(f"{len(to_do)} videos to extract, {finished} finished earlier", flush=True)
    frames, failed = 0, dict[str, dict[str, str]]()

    def outcome(job: ExtractionJob) -> tuple[ExtractionJob, int, str | None]:
        """Return the job, the number of images and, if it failed, the reason. Raises OSError if the disk is full."""
        try:
            return job, _extract_video(job, options.images, ffmpeg, options.frames, work), None
        except (ExtractionFailed, BrokenVideo) as failure:
            return job, 0, str(failure)
        except OSError as error:
            if error.errno in FULL:
                raise
            return job, 0, error.strerror or str(error)

    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    pool = ThreadPool(options.num_workers)
    try:
        outcomes = pool.imap_unordered(outcome, to_do)
        bar = tqdm(outcomes, "extracting", len(to_do), unit="video", leave=False, mininterval=interval)
        for job, count, reason in bar:
            frames += count
            if reason is not None:
                failed[job.folder] = {"source": str(job.source), "reason": reason}
            bar.set_postfix_str(f"{frames} frames, {len(failed)} failed", refresh=False)
    finally:
        ffmpeg.close()
        pool.terminate()
        pool.join()
    report = {
        "videos": len(jobs),
        "extracted": len(to_do) - len(failed),
        "finished_earlier": finished,
        "frames": frames,
        "seconds": round(time.monotonic() - start, 1),
        "ffmpeg": ffmpeg.path,
        "options": asdict(options.images),
        "failed": dict(sorted(failed.items())),
    }
    write_durably(options.frames / REPORT, _json(report))
    print(f"{report['extracted']} videos extracted, {frames} frames, {report['seconds']} s")
    if failed:
        reasons = {printable(folder): printable(facts["reason"]) for folder, facts in sorted(failed.items())}
        print(f"{len(failed)} failed (see {options.frames / REPORT}):\n{listing(reasons)}")
    return 1 if failed else 0


def _extract_video(job: ExtractionJob, images: ImageOptions, ffmpeg: FFmpeg, frames: Path, work: Path) -> int:
    """Make the job's folder below `frames`; return the number of images. On any error nothing is left behind."""
    if job.problem:
        raise ExtractionFailed(job.problem)
    source = _facts(job.source)  # as it is now: if it changes meanwhile, the next run extracts it again
    folder = work / uuid4().hex  # an ffmpeg that outlived an earlier run cannot know this name
    folder.mkdir()
    try:
        manifest = _write_images(job, images, ffmpeg, folder) | {"source": source}
        (folder / MANIFEST).write_bytes(_json(manifest))
        _put_in_place(folder, frames / job.folder, work)
        return int(manifest["frames"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_images(job: ExtractionJob, images: ImageOptions, ffmpeg: FFmpeg, folder: Path) -> dict[str, Any]:
    """Write the images of a job into the folder, with their times where all frames are wanted; return the manifest."""
    index = index_video(job.source)
    times, between = index.times(), _frames_between(job, index)
    if times is not None:
        times = times[between]
    chosen = None if images.num_frames is None else _evenly_spread(len(between), images.num_frames, times)
    with opened(job.source) as (container, stream):
        number, seeks = stream.index, container.format.name.partition(",")[0] in (*TIMED_CONTAINERS, "asf")
    different, strict = None if chosen is None else sorted(set(chosen)), index.position is not None
    ffmpeg.run(images_of(job, images, different, stream=number, seeks=seeks, strict=strict), folder)
    if different is not None and times is not None:
        begins = (job.start or 0.0) if seeks else 0.0  # where ffmpeg's clock is 0
        _check_times(folder / CHOSEN_TIMES, times[different] - begins)
    (folder / CHOSEN_TIMES).unlink(missing_ok=True)
    count = sum(1 for _ in folder.iterdir())
    if count == 0 or (different is not None and count != len(different)):
        raise ExtractionFailed(f"ffmpeg gave {count} of {len(different or between)} frames")
    if chosen is not None:
        _repeat(folder, images.prefix, chosen)
    elif images.frame_rate == -1 and times is not None and count == len(times):
        (folder / FRAME_TIMES).write_bytes(_json(times.round(6).tolist()))
    return {
        "frames": count if chosen is None else len(chosen),
        "fps": None if np.isnan(index.rate) else index.rate,
        "duration": None if np.isnan(index.duration) else index.duration,
        "options": asdict(images),
        "start": job.start,
        "end": job.end,
        "indices": None if chosen is None else between[chosen].tolist(),
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


def _evenly_spread(count: int, num_frames: int, times: NDArray[np.float64] | None) -> list[int]:
    """Return which of `count` frames uniform sampling reads.

    A short video gives each of its frames once. Where the rate is not constant, a frame that is shown long is
    repeated, so that the images are evenly spread in time.
    """
    chosen: list[int] = frame_indices(count, num_frames, times=times).tolist()
    return sorted(set(chosen)) if times is None or is_constant_rate(times) else chosen


def _check_times(printed: Path, times: NDArray[np.float64]) -> None:
    """Raise ExtractionFailed if ffmpeg, which counts frames itself, wrote frames of other times (2 ms for rounding)."""
    shown = np.array(re.findall(r" pts:(-?\d+)", printed.read_text()), np.float64) / 1e6
    if len(shown) != len(times) or (np.abs(shown - times) > 0.002).any():
        raise ExtractionFailed("ffmpeg does not show the same frames as reading in place")


def _repeat(folder: Path, prefix: str, chosen: list[int]) -> None:
    """Rename and copy the images of the different frames, 1, 2, …, so that there is one for each of `chosen`."""
    place = {frame: number for number, frame in enumerate(sorted(set(chosen)), start=1)}
    for number, frame in reversed(list(enumerate(chosen, start=1))):  # an image's place is never after `number`
        if place[frame] != number:
            shutil.copyfile(folder / (prefix % place[frame]), folder / (prefix % number))


def _put_in_place(folder: Path, target: Path, work: Path) -> None:
    """Rename the folder. What was at its place goes away first, if it is a folder of nothing but images."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(target):
        folder.rename(target)
        return
    ours = target.is_dir() and not target.is_symlink()
    if not ours or not all(_is_image(path) or path.name in (MANIFEST, FRAME_TIMES) for path in target.iterdir()):
        raise ExtractionFailed(f"{target} is not a folder of images alone: move it away")
    old = work / uuid4().hex
    target.rename(old)
    folder.rename(target)
    shutil.rmtree(old)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.is_file() and not path.is_symlink()


def _unfinished(options: ExtractionOptions, jobs: list[ExtractionJob]) -> list[ExtractionJob]:
    """Return the jobs that are not finished.

    Raises UserError where finished work was made with other options: nobody wants a mixture of both.
    """
    if options.overwrite:
        return jobs
    to_do, other = [], dict[str, str]()
    for job in jobs:
        folder = options.frames / job.folder
        if job.problem or not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            to_do.append(job)
            continue
        try:
            content: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
            then = dict(content["options"]) | {"start": content["start"], "end": content["end"]}
            source, count = content["source"], int(content["frames"])
        except (OSError, ValueError, KeyError, TypeError):
            problem = f"{folder} is there and was not made by this command; --overwrite replaces it"
            to_do.append(replace(job, problem=problem))
            continue
        now = asdict(options.images) | {"start": job.start, "end": job.end}
        ends = (folder / (options.images.prefix % number) for number in {1, count})
        if then != now:
            differ = (f"{key} was {then.get(key)}, is {value}" for key, value in now.items() if then.get(key) != value)
            other[printable(job.folder)] = ", ".join(differ)
        elif not all(image.is_file() for image in ends) or (job.source.is_file() and _facts(job.source) != source):
            to_do.append(job)  # if the source has gone, its images have not
    if other:
        raise UserError(
            f"{options.frames}: {len(other)} videos were extracted with other options:\n{listing(other, 5)}\n"
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
        for entry in set(work.iterdir()) - {lock.path}:
            shutil.rmtree(entry, ignore_errors=True)
        yield work
    finally:
        lock.release()
        with suppress(OSError):  # another run has come in
            work.rmdir()


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"
