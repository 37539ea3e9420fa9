"""`adaclip extract`, and utils/frame_extraction.py: extract frames of videos as images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.extract.options import ExtractionOptions


def run(words: Sequence[str]) -> int:
    """Extract the frames of a folder of videos as images, into a folder a video."""
    parser = Parser(
        "adaclip extract",
        f"{run.__doc__} `python utils/frame_extraction.py` is the same command. What is finished is skipped, what "
        "was interrupted is done again. The exit code is 1 if a video failed; FRAMES/extraction_report.json says why.",
    )
    for option in fields(ExtractionOptions):
        flag = option.name if "default" not in option.metadata else f"--{option.name}"
        parser.add_argument(flag, **option.metadata)
    options = ExtractionOptions(**vars(parser.read(words)))

    from adaclip_finetune.extract.run import extract

    return extract(options)
