"""`adaclip caption`: write captions of videos as an annotation, on which models can be trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from adaclip_finetune.commands.flags import (
    MODEL,
    PLACES,
    Parser,
    a_path,
    add_checkpoint_flags,
    check_outputs,
    model_settings,
    places_of,
    write_output,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable


def run(words: Sequence[str]) -> int:
    """Caption videos and write the annotation. Return 1 if some videos have no caption, else 0. Raise UserError."""
    a = _parser().read(words)
    if a.beams is not None and not 1 <= a.beams <= 100:
        raise UserError(f"--beams {a.beams}: a whole number from 1 to 100 is needed")
    if not a.videos.exists():
        raise UserError(f"{a.videos}: there is no such folder or annotation")
    check_outputs({"-o": a.output}, {"-o": ".json"}, [a.model, a.config])
    settings = model_settings(a)
    settings |= places_of(settings, a.videos, not a.videos.is_dir())

    from adaclip_finetune.search.caption import VideoCaptioner, as_annotation
    from adaclip_finetune.search.collection import collect_annotation, collect_folder

    captioner = VideoCaptioner(str(a.model), a.beams, settings)
    collection = collect_folder(a.videos) if a.videos.is_dir() else collect_annotation(a.videos, captioner.config)
    captions, without = {}, dict(collection.broken)
    for name, caption, reason in captioner(collection):
        if caption:
            captions[name] = caption
        else:
            without[name] = reason
    for name, reason in without.items():
        print(f"adaclip: {printable(name)}: no caption: {reason}", file=sys.stderr)
    if not captions:
        raise UserError(f"{a.videos}: no video could be captioned, so nothing is written")
    content = as_annotation(captions, None if a.videos.is_dir() else a.videos)
    write_output("-o", a.output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    kind = "captions" if a.videos.is_dir() else "auxiliary captions"
    print(f"{printable(a.output)}: {kind} of {len(captions):,} videos, {captioner.beams} beams")
    for name, caption in list(captions.items())[:3]:
        print(f"  {printable(name)}: {printable(caption)}")
    return 1 if without else 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip caption",
        "Caption videos with the captioner of a run, and write an annotation. For a folder, the captions are its "
        "sentences; for an annotation, they are added to its `auxiliary` captions. The exit code is 1 if some videos "
        "could not be captioned; they are listed.",
        "adaclip caption RUN VIDEOS -o FILE.json [--beams N] [--SETTING VALUE ...]",
    )
    add = parser.add_argument
    add("model", metavar="RUN", type=a_path, help="a run folder or checkpoint of a model with a captioner")
    videos = "a folder of videos, with its subfolders, or an annotation (JSON)"
    add("videos", metavar="VIDEOS", type=a_path, help=videos)
    add("-o", "--output", required=True, metavar="FILE.json", type=a_path, help="the annotation to write")
    add("--beams", metavar="N", type=int, help="beams of the search [default: those of the run]")
    add_checkpoint_flags(parser, *MODEL, *PLACES, "captioner", "num_workers", "val_batch_size")
    return parser
