"""`adaclip extract`, and utils/frame_extraction.py: extract frames of videos as images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.extract.options import ExtractionOptions, ImageOptions, cores


def run(words: Sequence[str]) -> int:
    """Extract the frames of a folder of videos as images, into a folder a video."""
    parser = Parser(
        "adaclip extract",
        f"{run.__doc__} `python utils/frame_extraction.py` is the same command. What is finished is skipped, what "
        "was interrupted is done again. Exit code 1 if a video failed (FRAMES/extraction_report.json says why).",
    )
    add = parser.add_argument
    add("videos", metavar="VIDEOS", type=Path, help="the folder of the video files")
    add("frames", metavar="FRAMES", type=Path, help="the folder to write to, as FRAMES/<video>/image_00001.jpg ...")
    add("--prefix", default="image_%05d.jpg", help="names of the images, from number 1 [default: image_%%05d.jpg]")
    add("--accepted_formats", nargs="+", metavar="EXT", help="only files with these extensions [default: every video]")
    add("--begin", type=int, default=0, metavar="N", help="the first video in sorted order, from 0 [default: 0]")
    add("--end", type=int, metavar="N", help="the last video, included [default: the last]")
    add("--file_list", type=Path, metavar="FILE", help="only these videos, a name a line, with extension or without")
    add("--frame_rate", type=float, default=-1, metavar="X", help="frames a second [default: -1, all frames]")
    add("--frame_size", type=int, default=-1, metavar="N", help="shorter side, never enlarged [default: -1, unchanged]")
    add("--parallel", action="store_true", help="extract several videos at once")
    add("--num_workers", type=int, metavar="N", help="with --parallel: how many [default: as many as cores]")
    add("--dry_run", action="store_true", help="print what would be done, and stop")
    add("--num_frames", type=int, metavar="N", help="only the N frames of each video that uniform sampling would read")
    add("--quality", type=int, default=2, metavar="N", help="quality of JPEG, 2 (best) to 31 [default: 2]")
    add("--recursive", action="store_true", help="search the folders in VIDEOS, too; FRAMES nests in the same way")
    add("--clips", type=Path, metavar="FILE", help="an annotation: a folder an entry, cut from its start to its end")
    add("--overwrite", action="store_true", help="extract again what is finished, and replace images that were there")
    add("--time_limit", type=float, default=3600.0, metavar="S", help="seconds for one video [default: 3600]")
    given = vars(parser.read(words))

    from adaclip_finetune.extract.run import extract

    parallel, num_workers, formats = (given.pop(name) for name in ("parallel", "num_workers", "accepted_formats"))
    images = ImageOptions(**{one.name: given.pop(one.name) for one in fields(ImageOptions)})
    given["num_workers"] = 1 if not parallel else cores() if num_workers is None else num_workers
    if formats is not None:  # `.MP4`, `mp4` and `.mp4,.mkv` are all understood
        names = [name.strip().removeprefix(".").lower() for word in formats for name in word.split(",")]
        given["formats"] = tuple(filter(None, names))
    return extract(ExtractionOptions(images=images, **given))
