"""Which video is extracted into which folder.

The folder of a video has its name without the last extension. With --clips, it has the name of the annotation's entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaclip_finetune.data.annotations import check_name, load_annotations
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.video.discovery import describe_unknown_files, find_videos
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.options import ExtractionOptions
from adaclip_finetune.printable import printable

REPORT = "extraction_report.json"


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
    passed_over = ""
    store = VideoFolder(options.videos)
    if options.clips:
        jobs = list(_clips(store, options.clips))
    elif options.file_list:
        names = options.file_list.read_text("utf-8-sig", errors="surrogateescape").splitlines()
        jobs = [_job(store, [name]) for name in dict.fromkeys(map(str.strip, names)) if name]
    else:
        jobs, passed_over = _all_jobs(options)
    if not jobs:
        kinds = "" if options.accepted_formats is None else f" ({' '.join(options.accepted_formats)})"
        deeper = "" if options.recursive else "; --recursive searches its folders, too"
        raise UserError(f"{options.videos}: holds no video{kinds}{deeper}")
    chosen = jobs[options.begin : None if options.end is None else options.end + 1]
    if not chosen:
        raise UserError(f"--begin {options.begin}: there are {len(jobs)} videos, counted from 0")
    _check_folders(chosen)
    return chosen, passed_over


def _all_jobs(options: ExtractionOptions) -> tuple[list[ExtractionJob], str]:
    """Return the jobs of all videos in VIDEOS in sorted order, and a line on the other files."""
    videos, others = find_videos(options.videos, options.recursive)
    if options.accepted_formats is not None:  # `.MP4`, `mp4` and `.mp4,.mkv` are all understood
        words = " ".join(options.accepted_formats).lower().replace(",", " ").split()
        formats = [f".{word.removeprefix('.')}" for word in words]
        videos, others = [path for path in [*videos, *others] if path.suffix.lower() in formats], []
    frames = options.frames.resolve()
    if options.videos.resolve() in frames.parents:  # frames of an earlier run are no videos
        videos, others = (
            [path for path in paths if frames not in path.resolve().parents] for paths in (videos, others)
        )
    names = sorted(path.relative_to(options.videos).as_posix() for path in videos)
    return [ExtractionJob(_stem(name), options.videos / name) for name in names], describe_unknown_files(others)


def _clips(store: VideoFolder, path: Path) -> Iterator[ExtractionJob]:
    """Plan the entries of an annotation. The source is the file named by `group` or, if there is none, by the entry."""
    for one in load_annotations(path):
        if one.end is not None and one.end <= (one.start or 0.0):
            raise UserError(f"{path}: video {one.video_id!r}: ends at {one.end:g} s, before it starts ({one.start} s)")
        job = _job(store, [one.group, one.video_id] if one.group else [one.video_id], one.extension)
        yield ExtractionJob(one.video_id, job.source, one.start, one.end, job.problem)


def _job(store: VideoFolder, names: Sequence[str], extension: str | None = None) -> ExtractionJob:
    """Return the job of the first of the names that is a video's, with its extension or without."""
    store.extensions = dict.fromkeys(names, extension) if extension else {}
    problems = []
    for name in names:
        try:
            check_name(printable(name), name)
            source = store.find(name)
            return ExtractionJob(_stem(source.relative_to(store.folder).as_posix()), source)
        except FrameError as error:
            problems.append(error.reason)
        except UserError as error:
            problems.append(str(error))
    return ExtractionJob(names[0], store.folder / names[0], problem=problems[0])


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _check_folders(jobs: list[ExtractionJob]) -> None:
    """Raise UserError if two jobs have the same folder, or one has a name that is taken."""
    source_of: dict[str, Path] = {}
    for job in jobs:
        if (other := source_of.setdefault(job.folder, job.source)) != job.source:
            raise UserError(
                f"{printable(other)} and {printable(job.source)} would be extracted into one folder: rename one, "
                "or choose with --file_list or --accepted_formats"
            )
        first = job.folder.partition("/")[0]
        if not job.problem and (first.startswith(".") or first == REPORT):
            raise UserError(f"{printable(job.source)}: its folder may not be called {printable(first)}: rename it")
