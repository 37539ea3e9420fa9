"""`adaclip pack`: put the images of many videos into one file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.config import Config, load_config


def run(words: Sequence[str]) -> int:
    """Put the images of all videos into one LMDB file, which frames_dir takes in place of their folder."""
    parser = Parser(
        "adaclip pack",
        f"{run.__doc__} This helps on disks that are slow with many small files. The images are kept byte for byte. "
        "Videos that the file holds already are skipped, so run the same command again after an interruption, or to "
        "add new videos. The exit code is 1 if some videos could not be packed; their reasons are printed.",
    )
    img_tmpl = Config.model_fields["img_tmpl"].default
    add = parser.add_argument
    add("frames_dir", metavar="FRAMES_DIR", type=Path, help="extracted frames, one folder per video")
    add("-o", "--output", required=True, metavar="FILE.lmdb", type=Path, help="the pack to write")
    annot = "pack only the videos of this annotation; may be given several times [default: all folders]"
    add("--annot", action="append", default=[], metavar="FILE", help=annot)
    add("--img_tmpl", metavar="NAME", default=img_tmpl, help=f"names of the images [default: {img_tmpl}]")
    add("--overwrite", action="store_true", help="replace the pack with a new one, such as after frames have changed")
    arguments = parser.read(words)
    img_tmpl = load_config(None, {"img_tmpl": arguments.img_tmpl}).img_tmpl

    from adaclip_finetune.data.packing import pack

    return pack(arguments.frames_dir, arguments.output, arguments.annot, img_tmpl, arguments.overwrite)
