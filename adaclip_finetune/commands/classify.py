"""`adaclip classify`: which classes videos and pictures belong to."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaclip_finetune.commands.flags import MODEL, Parser, a_path, add_checkpoint_flags, check_inputs, model_settings
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from torch import Tensor


def run(words: Sequence[str]) -> int:
    """Classify, and print the best classes of each file. Return 1 if some files cannot be read, else 0.

    Raise UserError.
    """
    arguments = _parser().read(words)
    if arguments.k < 1:
        raise UserError(f"-k {arguments.k}: a whole number from 1 up is needed")
    check_inputs({"--classes": [arguments.classes], "--config": [arguments.config]})
    settings = model_settings(arguments)

    from adaclip_finetune.search.classify import Classifier, find_files

    files = find_files(arguments.files)
    model = Classifier(arguments.model, arguments.classes, arguments.templates, settings)
    if model.num_cut:
        what = (
            f"max_txt_len {model.config.max_txt_len} cuts {model.num_cut} of {model.num_texts} class names in templates"
        )
        print(f"adaclip: {what}", file=sys.stderr)
    broken = 0
    for path, found in model(files):
        if isinstance(found, str):
            broken += 1
            print(f"adaclip: {printable(path)}: cannot be read: {found}", file=sys.stderr)
        else:
            _print(path, found, model.classes, arguments)
    return 1 if broken else 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip classify",
        "Tell which classes videos and pictures belong to: a line for each file, with the best classes and their "
        "probabilities. The exit code is 1 if some files could not be read; they are listed.",
        "adaclip classify RUN_OR_CLIP FILE_OR_FOLDER [MORE ...] --classes FILE [--templates NAME] [-k N] [--json]",
    )
    add = parser.add_argument
    model = "a run folder, a checkpoint, CLIP weights, or a CLIP as clip_backbone names it, such as ViT-B/32"
    add("model", metavar="RUN_OR_CLIP", help=model)
    files = "videos, pictures, and folders of them with their subfolders"
    add("files", metavar="FILE_OR_FOLDER", nargs="+", type=a_path, help=files)
    classes = "class names: a text file with one per line, or an annotation (.json) [default: the file of the run]"
    add("--classes", metavar="FILE", type=a_path, help=classes)
    templates = "none, imagenet, action, kinetics, or a file with one per line [default: those of the run]"
    add("--templates", metavar="NAME", help=templates)
    add("-k", metavar="N", type=int, default=3, help="how many classes to name [default: 3]")
    add("--json", action="store_true", help="print JSON Lines: one object per file")
    add_checkpoint_flags(parser, *MODEL, "num_frm", "max_txt_len", "num_workers", "val_batch_size")
    return parser


def _print(path: Path, probabilities: Tensor, classes: Sequence[str], arguments: Namespace) -> None:
    values, places = probabilities.topk(min(arguments.k, len(classes)))
    best = [(classes[place], value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]
    if arguments.json:
        found = [{"class": name, "probability": round(value, 6)} for name, value in best]
        print(json.dumps({"path": str(path), "classes": found}))
    else:
        print("  ".join([printable(path), *(f"{printable(name)} {100 * value:.1f} %" for name, value in best)]))
