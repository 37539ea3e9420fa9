"""`adaclip pack`: put the images of all videos into one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.config import Config, load_config


def run(words: Sequence[str]) -> int:
    """Put the images of all videos into one file, which frames_dir takes in place of their folder."""

    parser = Parser(
        "adaclip pack",
        f"{run.__doc__} For disks that are slow with many small files. The images stay as they are, each with a "
        "checksum. What was interrupted goes on with the same command. Exit code 1 if videos could not be packed; "
        "the others are, and the reasons are told.",
    )
    parser.add_argument("frames_dir", metavar="FRAMES_DIR", type=Path, help="extracted frames, a folder a video")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.lmdb", type=Path, help="the pack that is made")
    parser.add_argument(
        "--annot",
        action="append",
        default=[],
        metavar="FILE",
        help="only the videos of this annotation; may be given several times. Else every folder that is not hidden",
    )
    img_tmpl = Config.model_fields["img_tmpl"].default
    parser.add_argument("--img_tmpl", metavar="NAME", default=img_tmpl, help=f"as in the settings; default {img_tmpl}")
    parser.add_argument("--overwrite", action="store_true", help="make it anew where it is there already")
    arguments = parser.read(words)
    img_tmpl = load_config(None, {"img_tmpl": arguments.img_tmpl}).img_tmpl

    from adaclip_finetune.data.packing import pack as pack_frames

    return pack_frames(arguments.frames_dir, arguments.output, arguments.annot, img_tmpl, arguments.overwrite)
