"""`adaclip export`: write a run's weights in another system's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser


def run(words: Sequence[str]) -> int:
    """Write the weights of a run in the form that another system reads."""

    parser = Parser("adaclip export", f"{run.__doc__}")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, or the best.safetensors in it")
    parser.add_argument(
        "--format",
        required=True,
        choices=("published", "open_clip", "huggingface"),
        help="a published AdaCLIP checkpoint (one file); a folder for open_clip, or for transformers' CLIPModel",
    )
    parser.add_argument("-o", "--output", required=True, metavar="PATH", type=Path, help="what is made; must be new")
    arguments = parser.read(words)

    from adaclip_finetune.export import export as export_run

    for line in export_run(arguments.run, arguments.format, arguments.output):
        print(line)
    return 0
