"""`adaclip export`: write a run's weights in another system's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser


def run(words: Sequence[str]) -> int:
    """Write the weights of a run in the format of another system."""
    parser = Parser("adaclip export", f"{run.__doc__}")
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, or a weights file in it")
    formats = "published: a file for AdaCLIP; open_clip, huggingface: a folder for open_clip or transformers' CLIPModel"
    add("--format", required=True, choices=("published", "open_clip", "huggingface"), help=formats)
    add("-o", "--output", required=True, metavar="PATH", type=Path, help="the new file or folder")
    clip_weights = "the pretrained CLIP of an adapter, if it is not where it was in training"
    add("--clip_weights", metavar="PATH", help=clip_weights)
    arguments = parser.read(words)

    from adaclip_finetune.export import export

    for line in export(arguments.run, arguments.format, arguments.output, arguments.clip_weights):
        print(line)
    return 0
