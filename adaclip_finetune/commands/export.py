"""`adaclip export`: write a run's weights in another system's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser


def run(words: Sequence[str]) -> int:
    """Write the weights of a run in the format of another system."""
    parser = Parser("adaclip export", f"{run.__doc__}")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or a weights file in it")
    parser.add_argument(
        "--format",
        required=True,
        choices=("published", "open_clip", "huggingface"),
        help="published: a checkpoint of AdaCLIP (a file); open_clip, huggingface: a folder for open_clip, or for "
        "transformers' CLIPModel",
    )
    parser.add_argument("-o", "--output", required=True, metavar="PATH", type=Path, help="the new file or folder")
    parser.add_argument(
        "--clip_weights",
        metavar="PATH",
        help="the pretrained CLIP of an adapter, if it is not where it was in training",
    )
    arguments = parser.read(words)

    from adaclip_finetune.export import export

    for line in export(arguments.run, arguments.format, arguments.output, arguments.clip_weights):
        print(line)
    return 0
