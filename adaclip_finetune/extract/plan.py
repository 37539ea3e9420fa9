"""Which video is extracted into which folder.

The folder of a video has its name without the last extension. With --clips, it has the name of the annotation's entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.names import canonical
from adaclip_finetune.data.video.discovery import describe_unknown_files, find_videos
from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.options import ExtractionOptions
from adaclip_finetune.printable import printable

REPORT = "extraction_report.json"
Find = Callable[..., tuple[str | None, str | None]]


@dataclass(frozen=True)
class ExtractionJob:
    """A folder to be made, and the part of a video that goes into it. `problem` says why that is not possible."""

    folder: str  # below FRAMES, parts separated by /
    source: Path
    start: float | None = None  # seconds
    end: float | None = None
    problem: str | None = None


def plan_jobs(options: ExtractionOptions) -> tuple[list[ExtractionJob], str]:
    """Return the jobs in a fixed order, and a line on files that are no videos ("" if there are none).

    Raises UserError if there is nothing to do or if two jobs would share a folder, and OSError for what cannot be read.
    """
    names, passed_over = _find(options)
    if options.clips:
        jobs = list(_clips(options, options.clips, _finder(names)))
    elif options.file_list:
        jobs = list(_listed(options, options.file_list, _finder(names)))
    else:
        jobs = [ExtractionJob(_stem(name), options.videos / name) for name in names]
    if not jobs:
        kinds = f" ({' '.join(f'.{name}' for name in options.formats)})" if options.formats else ""
        deeper = "" if options.recursive else "; --recursive searches its folders, too"
        raise UserError(f"{options.videos}: holds no video{kinds}{deeper}")
    chosen = jobs[options.begin : None if options.end is None else options.end + 1]
    if not chosen:
        raise UserError(f"--begin {options.begin}: there are {len(jobs)} videos, counted from 0")
    chosen = list(dict.fromkeys(chosen))  # a file list may name a video twice
    _check_folders(chosen)
    return chosen, passed_over


def _find(options: ExtractionOptions) -> tuple[list[str], str]:
    """Return the names of the videos relative to VIDEOS, sorted, and a line on the other files."""
    videos, others = find_videos(options.videos, options.recursive)
    if options.formats is not None:
        videos = [path for path in [*videos, *others] if path.suffix.lower().removeprefix(".") in options.formats]
        others = []
    frames = options.frames.resolve()
    if options.videos.resolve() in frames.parents:  # frames of an earlier run are no videos
        videos, others = (
            [path for path in paths if frames not in path.resolve().parents] for paths in (videos, others)
        )
    return sorted(path.relative_to(options.videos).as_posix() for path in videos), describe_unknown_files(others)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _listed(options: ExtractionOptions, path: Path, find: Find) -> Iterator[ExtractionJob]:
    """Plan the videos of a list with a name a line."""
    for name in path.read_text("utf-8-sig", errors="surrogateescape").splitlines():
        if name := name.strip():
            found, problem = find(name)
            folder = name.lstrip("/") if found is None else _stem(found)
            yield ExtractionJob(folder, options.videos / (found or name), problem=problem)


def _clips(options: ExtractionOptions, path: Path, find: Find) -> Iterator[ExtractionJob]:
    """Plan the entries of an annotation. The source is the file named by `group` or, if there is none, by the entry."""
    for one in load_annotations(path):
        if one.end is not None and one.end <= (one.start or 0.0):
            raise UserError(f"{path}: video {one.video_id!r}: ends at {one.end:g} s, before it starts ({one.start} s)")
        wanted = [one.group, one.video_id] if one.group else [one.video_id]
        found, problem = find(*(f"{name}.{one.extension}" if one.extension else name for name in wanted))
        yield ExtractionJob(one.video_id, options.videos / (found or wanted[0]), one.start, one.end, problem)


def _finder(names: Sequence[str]) -> Find:
    """Return a function that finds a video by its name with or without extension, and with or without its folder.

    It is given one or more names, and returns the name below VIDEOS of the first that is there, or the reason why none
    is.
    """
    by_name: dict[str, set[str]] = {}
    for name in names:
        for key in {name, _stem(name), PurePosixPath(name).name, _stem(PurePosixPath(name).name)}:
            by_name.setdefault(canonical(key), set()).add(name)

    def find(*wanted: str) -> tuple[str | None, str | None]:
        problems = []
        for name in wanted:
            found = by_name.get(canonical(name), set())
            if name in found or len(found) == 1:
                return (name if name in found else next(iter(found))), None
            several = f"{' and '.join(map(printable, sorted(found)[:5]))} could be meant"
            problems.append(several if found else "there is no such video")
        return None, problems[0]

    return find


def _check_folders(jobs: list[ExtractionJob]) -> None:
    """Raise UserError if two jobs have the same folder, or one lies in another's, or has a name that is taken."""
    by_folder: dict[str, list[Path]] = {}
    for job in jobs:
        by_folder.setdefault(job.folder, []).append(job.source)
    for job in jobs:
        above = [str(folder) for folder in PurePosixPath(job.folder).parents]
        sources = [source for folder in [*above, job.folder] for source in by_folder.get(folder, [])]
        if len(sources) > 1:
            raise UserError(
                f"{printable(sources[0])} and {printable(sources[1])} would be extracted into one folder: rename one, "
                "or choose with --file_list or --accepted_formats"
            )
        first = job.folder.partition("/")[0]
        if (first.startswith(".") or first == REPORT) and not job.problem:
            raise UserError(f"{printable(job.source)}: its folder may not be called {printable(first)}: rename it")
