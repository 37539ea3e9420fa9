"""The whole of `adaclip extract`: what is to be done, several videos at a time, and the report of it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.manifest import State, encoded, state_of
from adaclip_finetune.extract.options import Request, cores
from adaclip_finetune.extract.plan import REPORT, SHOWN, Job, plan
from adaclip_finetune.extract.program import FULL, Failed, Part, Program, Stopped, find_program, from_file
from adaclip_finetune.extract.progress import Progress
from adaclip_finetune.extract.video import extract_video
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.printable import printable

WORK = ".extraction"  # below FRAMES: the lock, and what is not complete
LISTED = 20

Done = tuple[Job, int, str | None]  # with the number of its images, or the reason of its failure


def extract(request: Request) -> int:
    """Do it; returns the exit code, 1 if a video failed. UserError: nothing could be begun, or the disk is full."""
    jobs = plan(request)
    program = Program(find_program(), max(1, cores() // request.num_workers), request.time_limit)
    if request.dry_run:
        return _tell(request, program, _to_do(request, jobs), len(jobs))
    try:
        request.frames.mkdir(parents=True, exist_ok=True)
        with _work_folder(request.frames) as work:
            return _extract(request, program, jobs, work)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"{request.frames}: {error.strerror}. What is complete stays; make room and run the same command again"
            ) from None
        raise UserError(f"{printable(error.filename or request.frames)}: {error.strerror}") from error


def _extract(request: Request, program: Program, jobs: list[Job], work: Path) -> int:
    to_do = _to_do(request, jobs)
    start = time.monotonic()
    print(f"{len(to_do)} videos to extract, {len(jobs) - len(to_do)} finished earlier", flush=True)
    frames, failed = 0, {}
    with Progress(len(to_do)) as progress, closing(_all_done(request, program, to_do, work)) as outcomes:
        for job, count, reason in outcomes:
            frames += count
            if reason is not None:
                failed[job.folder] = {"source": str(job.source), "reason": reason}
            progress.add(count, reason is not None)
    report = {
        "videos": len(jobs),
        "extracted": len(to_do) - len(failed),
        "finished_earlier": len(jobs) - len(to_do),
        "frames": frames,
        "seconds": round(time.monotonic() - start, 1),
        "ffmpeg": program.path,
        "options": asdict(request.look),
        "failed": dict(sorted(failed.items())),
    }
    (work / REPORT).write_bytes(encoded(report))
    (work / REPORT).replace(request.frames / REPORT)
    print(f"{report['extracted']} videos extracted, {frames} frames, {report['seconds']} s")
    if failed:
        print(f"{len(failed)} failed:")
        for folder, facts in islice(sorted(failed.items()), LISTED):
            print(f"  {printable(folder)}: {printable(facts['reason'])}")
        more = f"and {len(failed) - LISTED} more; " if len(failed) > LISTED else ""
        print(f"  {more}all of them in {request.frames / REPORT}")
    return 1 if failed else 0


def _to_do(request: Request, jobs: list[Job]) -> list[Job]:
    """What is not finished. UserError where finished work was made with other options: nobody wants a mixture."""
    if request.overwrite:
        return jobs
    to_do, other = [], []
    for job in jobs:
        if job.problem:
            to_do.append(job)
            continue
        state, differ = state_of(request.frames / job.folder, job.source, request.look, job.start, job.end)
        if state is State.OPTIONS_CHANGED:
            other.append(f"  {printable(job.folder)}: {differ}")
        elif state is State.NOT_OURS:
            problem = f"{request.frames / job.folder} is there and was not made by this tool; --overwrite replaces it"
            to_do.append(Job(job.folder, job.source, job.start, job.end, problem))
        elif state is not State.FINISHED:
            to_do.append(job)
    if other:
        more = [f"  and {len(other) - SHOWN} more"] if len(other) > SHOWN else []
        listing = "\n".join(other[:SHOWN] + more)
        raise UserError(
            f"{request.frames}: {len(other)} videos were extracted with other options:\n{listing}\n"
            "Give --overwrite to extract them again, the same options to go on, or another folder"
        )
    return to_do


def _tell(request: Request, program: Program, to_do: list[Job], videos: int) -> int:
    """What a dry run says: the folders, and the command of the first."""
    for job in to_do:
        problem = f" (cannot be: {printable(job.problem)})" if job.problem else ""
        print(f"{printable(job.source)} -> {printable(request.frames / job.folder)}{problem}")
    print(f"{len(to_do)} videos to extract, {videos - len(to_do)} finished earlier; nothing was written")
    first = next((job for job in to_do if not job.problem), None)
    if first is not None and request.look.num_frames is None:
        print(f"the first: {program.words(from_file(request.look, Part(first.source, None, first.start, first.end)))}")
    return 0


@contextmanager
def _work_folder(frames: Path) -> Iterator[Path]:
    """The hidden folder, ours alone, emptied of what a killed run left in it."""
    work = frames / WORK
    work.mkdir(exist_ok=True)
    lock = FolderLock(work)
    lock.take()
    try:
        for entry in list(work.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry != lock.path:
                entry.unlink(missing_ok=True)
        yield work
    finally:
        lock.release()
        with suppress(OSError):  # another run has come in
            work.rmdir()


def _all_done(request: Request, program: Program, jobs: list[Job], work: Path) -> Generator[Done, None, None]:
    """Each job as it is done."""

    def one(job: Job) -> Done:
        try:
            return job, extract_video(job, request.look, program, request.frames, work), None
        except Failed as failure:
            return job, 0, str(failure)
        except OSError as error:  # of this video alone, unless the disk is full
            if error.errno in FULL:
                raise
            return job, 0, f"{error.strerror or error}"
        except Stopped:
            raise
        except Exception as error:  # decoders raise whatever they stumble over
            return job, 0, f"{type(error).__name__}: {error}"

    pool = ThreadPoolExecutor(request.num_workers)
    waiting = iter(jobs)
    pending: set[Future[Done]] = set()
    try:
        while True:
            # A few ahead, not all: there may be millions.
            pending |= {pool.submit(one, job) for job in islice(waiting, 2 * request.num_workers - len(pending))}
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        program.stop()
        pool.shutdown(cancel_futures=True)
