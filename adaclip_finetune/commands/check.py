"""`adaclip check`: what would go wrong in a run, said before it."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser, add_flags, given
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.errors import UserError


def run(words: Sequence[str]) -> int:
    """Check, and print what was found. Returns 0, or 1 if a run would fail; raises UserError for a wrong request."""
    arguments = _parser().read(words)
    config, folder = _config(arguments)

    from adaclip_finetune.check.all import Request, check
    from adaclip_finetune.check.finding import worst
    from adaclip_finetune.check.report import as_json, as_text
    from adaclip_finetune.check.sheet import refuse_other_files
    from adaclip_finetune.check.source import splits_of_config, splits_of_files

    if arguments.sheet is not None:
        refuse_other_files(arguments.sheet)
    splits = splits_of_files(arguments.annot, config) if arguments.annot else splits_of_config(config)
    findings = check(Request(config, splits, not arguments.annot, folder, arguments.deep, arguments.sheet))
    if arguments.json:
        print(json.dumps(as_json(splits, findings)))
    else:
        print(as_text(splits, findings, sys.stdout.encoding or "ascii"))
    return 1 if worst(findings) == "fails" else 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip check",
        "Say before a run what would go wrong in it: videos, captions, splits; disk, memory and time that it takes. "
        "Exit code 1 if it would fail.",
        "adaclip check --config FILE | --annot FILE [--annot FILE ...] --frames_dir DIR | --video_dir DIR "
        "[--SETTING VALUE ...] [--deep] [--json] [--sheet FILE.png]",
        "Settings are those of `adaclip train`, and count here as there.",
    )
    parser.add_argument("--config", metavar="FILE", help="the settings of the run")
    parser.add_argument(
        "--annot",
        metavar="FILE",
        action="append",
        help="check this annotation, without a run; one with the word 'train' in its name counts as what is learned "
        "from, others as what is evaluated. May be given several times",
    )
    parser.add_argument("--deep", action="store_true", help="decode every frame, in num_workers threads")
    parser.add_argument("--json", action="store_true", help="all findings as one JSON object, with all that they list")
    parser.add_argument(
        "--sheet", metavar="FILE", type=Path, help="draw a PNG of a few videos: frames that are sampled, and captions"
    )
    add_flags(parser, Config)
    return parser


def _config(arguments: Namespace) -> tuple[Config, Path | None]:
    """The settings, and the folder of the run that goes on."""
    # Without a run nothing chooses among the frames, and a low num_frm must not be held against the default of top_k.
    without_run = {"use_policy": False} if arguments.annot else {}
    config = load_config(arguments.config, without_run | given(arguments))
    if arguments.annot:
        taken = [name for name in ("train_annot", "val_annot", "test_annot") if getattr(config, name) is not None]
        if arguments.config or taken:
            raise UserError("--annot is for files without a run: leave it out beside --config and --train_annot")
        return config, None
    folder = None
    if config.resume is not None and Path(config.resume).is_dir():
        folder, config = Path(config.resume), continued_config(config)
    check_paths(config)
    return config, folder
