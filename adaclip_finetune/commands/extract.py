"""`adaclip extract`, and utils/frame_extraction.py: extract frames of videos as images."""

from __future__ import annotations

from collections.abc import Sequence

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.extract import options as extract_options


def run(words: Sequence[str]) -> int:
    """Extract the frames of a folder of videos as images, into a folder a video."""

    parser = Parser(
        "adaclip extract",
        f"{run.__doc__} `python utils/frame_extraction.py` is the same command. What is finished is skipped, what "
        "was interrupted is done again. Exit code 1 if a video failed (FRAMES/extraction_report.json says why).",
    )
    extract_options.declare(parser)
    request = extract_options.request_from(parser.read(words))

    from adaclip_finetune.extract.run import extract as run_extraction

    return run_extraction(request)
