"""Which video goes into which folder: the listing, a file list or clips of an annotation; and what cannot be.

The folder of a video is its name without the last extension, since names of LSMDC and Panda-70M hold dots.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.options import Request
from adaclip_finetune.printable import printable

REPORT = "extraction_report.json"
SHOWN = 5


@dataclass(frozen=True)
class Job:
    """One folder to be made, and of what. `start` and `end` are seconds; `problem` says why there is no source."""

    folder: str  # below FRAMES, parts separated by /
    source: Path
    start: float | None = None
    end: float | None = None
    problem: str | None = None


def plan(request: Request) -> list[Job]:
    """What is to be done, in a fixed order. UserError: nothing to do, or two that would share a folder."""
    if not request.videos.is_dir():
        raise UserError(f"VIDEOS: {request.videos} is not a folder")
    names = sorted(_listing(request))
    if request.clips:
        find = _Finder(names)
        jobs = [_clip(request, annotation, find) for annotation in _cuttable(request.clips)]
    elif request.file_list:
        jobs = list(_listed(request, _Finder(names)))
    else:
        jobs = [_whole(request, name) for name in names]
    if not jobs:
        kinds = " ".join(f".{name}" for name in request.formats)
        deeper = "" if request.recursive else "; --recursive looks into its folders too"
        raise UserError(f"{request.videos}: holds no video ({kinds}){deeper}")
    chosen = jobs[request.begin : None if request.end is None else request.end + 1]
    if not chosen:
        raise UserError(f"--begin {request.begin}: there are {len(jobs)} videos, counted from 0")
    chosen = list(dict.fromkeys(chosen))  # a file list may name one twice
    _check_folders(chosen)
    return chosen


def _listing(request: Request) -> Iterator[str]:
    """Names of the videos, relative to VIDEOS. Hidden files are none: macOS leaves `._a.mp4` beside `a.mp4`."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{printable(error.filename)}: cannot be listed: {error.strerror}")

    for folder, below, files in os.walk(request.videos, onerror=unreadable):
        here = Path(folder)
        below[:] = sorted(
            name
            for name in below
            if request.recursive and not name.startswith(".") and not _same(here / name, request.frames)
        )
        for name in files:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in request.formats and "." in name:
                yield (here / name).relative_to(request.videos).as_posix()


def _whole(request: Request, name: str) -> Job:
    source = request.videos / name
    try:
        str(source.absolute()).encode()
    except UnicodeEncodeError:  # such a name can stand in no annotation
        return Job(_stem(name), source, problem="its name is not UTF-8: rename it")
    return Job(_stem(name), source)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _listed(request: Request, find: _Finder) -> Iterator[Job]:
    """One name a line, with extension or without."""
    assert request.file_list is not None
    try:
        text = request.file_list.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--file_list {request.file_list}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file_list {request.file_list}: not UTF-8 (byte {error.start})") from None
    for line in text.splitlines():
        if name := line.strip():
            found, problem = find(name)
            if found is None:
                yield Job(name.lstrip("/"), request.videos / name, problem=problem)
            else:
                yield _whole(request, found)


def _cuttable(path: Path) -> list[VideoAnnotation]:
    annotations = load_annotations(path)
    for one in annotations:
        if one.end is not None and one.end <= (one.start or 0.0):
            raise UserError(f"{path}: video {one.video_id!r}: ends at {one.end:g} s, before it starts ({one.start} s)")
    return annotations


def _clip(request: Request, annotation: VideoAnnotation, find: _Finder) -> Job:
    """The source is the file called as `group` says, or, where there is none, as the entry itself."""
    wanted = [annotation.group, annotation.video_id] if annotation.group else [annotation.video_id]
    problem = None
    for name in wanted:
        found, reason = find(f"{name}.{annotation.extension}" if annotation.extension else name)
        problem = problem or reason
        if found is not None:
            return Job(annotation.video_id, request.videos / found, annotation.start, annotation.end)
    return Job(annotation.video_id, request.videos / wanted[0], annotation.start, annotation.end, problem)


class _Finder:
    """A video by what a list calls it: its name, its name without extension, or that without folders."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by: dict[str, set[str]] = {}
        for name in names:
            for key in {name, _stem(name), PurePosixPath(name).name, _stem(PurePosixPath(name).name)}:
                self._by.setdefault(key, set()).add(name)

    def __call__(self, wanted: str) -> tuple[str | None, str | None]:
        """The name below VIDEOS, or why there is none."""
        found = self._by.get(wanted, set())
        if wanted in found:
            return wanted, None
        if len(found) == 1:
            return next(iter(found)), None
        if found:
            return None, f"{' and '.join(map(printable, sorted(found)[:SHOWN]))} could be meant"
        return None, "there is no such video"


def _check_folders(jobs: list[Job]) -> None:
    """Refuse what would be written twice, into each other, or over files of ours."""
    sources: dict[str, Job] = {}
    for job in jobs:
        if job.folder in sources:
            one, other = printable(sources[job.folder].source), printable(job.source)
            raise UserError(
                f"{one} and {other} would both be extracted into {printable(job.folder)}: rename one, or choose with "
                "--file_list or --accepted_formats"
            )
        sources[job.folder] = job
    for job in jobs:
        parts = job.folder.split("/")
        for above in ("/".join(parts[:i]) for i in range(1, len(parts))):
            if above in sources:
                raise UserError(
                    f"{printable(job.source)} would be extracted into {printable(above)}, which is the folder of "
                    f"{printable(sources[above].source)}: rename one"
                )
        if (parts[0].startswith(".") or parts[0] == REPORT) and not job.problem:
            raise UserError(f"{printable(job.source)}: its folder may not be called {printable(parts[0])}: rename it")
