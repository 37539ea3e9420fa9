"""The command line: which command, with which settings. Everything is imported by the command that needs it.

A command is a function from its words to an exit code, and a line in `COMMANDS`. Exit codes: 0 done, 1 done, but some
of it failed, 2 something the user can mend (one message, no traceback unless --debug), 75 stopped by SIGTERM (go on
with --resume), 130 by Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from adaclip_finetune import __version__
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

# What is wrong with a name that somebody gave, wherever it is first asked for.
_OF_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refused(str(error), words)
    except KeyboardInterrupt as stop:
        print("adaclip: interrupted", file=sys.stderr)
        return int(getattr(stop, "exit_code", 130))
    except BrokenPipeError:  # `adaclip schema | head`: the reader has gone, and nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _OF_NAMES or error.filename is None:
            raise
        return _refused(f"{printable(os.fsdecode(error.filename))}: {error.strerror}", words)


def train(words: Sequence[str]) -> int:
    """Finetune CLIP as a settings file says, or evaluate with --do_inference."""
    from adaclip_finetune.config import Config, load_config
    from adaclip_finetune.config.flags import Parser, add_flags, given
    from adaclip_finetune.config.paths import check_paths
    from adaclip_finetune.config.resume import continued_config

    parser = Parser(
        "adaclip train",
        "Finetune a CLIP video retriever on videos and captions, or evaluate one (--do_inference). "
        "`python train.py` is the same command. A flag beats the file, the file beats the default.",
        "adaclip train [--config FILE] [--peft FILE] [--SETTING VALUE ...] [--dry_run [--json]]",
        "Flags are written in full. A switch may stand alone (--save_last), have a value (--save_last false) or be "
        "turned off (--no_save_last). Lists are given word by word (--betas 0.9 0.98) or as JSON ('[]'). The word none "
        "stands for null. Every setting is also a key of the JSON file, dots standing for nesting.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="settings to begin with (JSON; those in cfgs/ are explained there)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check settings and data, say what would be done, and stop"
    )
    parser.add_argument("--json", action="store_true", help="with --dry_run: say it as one JSON object")
    add_flags(parser, Config)
    arguments = parser.read(words)
    if arguments.json and not arguments.dry_run:
        raise UserError("--json belongs to --dry_run")
    config = load_config(arguments.config, given(arguments))
    folder = None
    if config.resume is not None and Path(config.resume).is_dir():
        folder, config = Path(config.resume), continued_config(config)
    check_paths(config)

    # Before torch is imported: DistributedDataParallel warns in every run that it looks for unused parameters in vain,
    # which is the price of not hanging where there are some.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from adaclip_finetune.processes import part
    from adaclip_finetune.training.dry_run import dry_run
    from adaclip_finetune.training.evaluate_only import evaluate_only
    from adaclip_finetune.training.trainer import fit

    try:
        if config.optuna_cfg is not None:
            from adaclip_finetune.tuning.search import describe, search

            if not arguments.dry_run:
                search(config)
                return 0
            print(*describe(config), sep="\n", file=sys.stderr if arguments.json else sys.stdout)
        if arguments.dry_run:
            dry_run(config, as_json=arguments.json)
        elif config.do_inference:
            evaluate_only(config, folder)
        else:
            fit(config, folder=folder)
    except UserError:
        if config.debug and not _debug(words):  # asked for in the file
            traceback.print_exc()
        raise
    part()
    return 0


def schema(words: Sequence[str]) -> int:
    """Print the JSON Schema of the settings, as in cfgs/schema.json."""
    from adaclip_finetune.config import Config
    from adaclip_finetune.config.flags import Parser

    Parser("adaclip schema", f"{schema.__doc__}").read(words)
    document = Config.model_json_schema()
    document["properties"] = {"$schema": {"type": "string", "description": "for editors"}} | document["properties"]
    document["title"] = "Settings of adaclip-finetune"
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | document, indent=2))
    return 0


def export(words: Sequence[str]) -> int:
    """Write the weights of a run in the form that another system reads."""
    from adaclip_finetune.config.flags import Parser

    parser = Parser("adaclip export", f"{export.__doc__}")
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


def convert(words: Sequence[str]) -> int:
    """Write the annotation files of a published data set as train/val/test JSON."""
    from adaclip_finetune.data.formats.command import run

    return run(words)


def extract(words: Sequence[str]) -> int:
    """Extract the frames of a folder of videos as images, into a folder a video."""
    from adaclip_finetune.config.flags import Parser
    from adaclip_finetune.extract import options as extract_options

    parser = Parser(
        "adaclip extract",
        f"{extract.__doc__} `python utils/frame_extraction.py` is the same command. What is finished is skipped, what "
        "was interrupted is done again. Exit code 1 if a video failed (FRAMES/extraction_report.json says why).",
    )
    extract_options.declare(parser)
    request = extract_options.request_from(parser.read(words))

    from adaclip_finetune.extract.run import extract as run_extraction

    return run_extraction(request)


def pack(words: Sequence[str]) -> int:
    """Put the images of all videos into one file, which frames_dir takes in place of their folder."""
    from adaclip_finetune.config import Config, load_config
    from adaclip_finetune.config.flags import Parser

    parser = Parser(
        "adaclip pack",
        f"{pack.__doc__} For disks that are slow with many small files. The images stay as they are, each with a "
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


def check(words: Sequence[str]) -> int:
    """Say before a run what would go wrong in it."""
    from adaclip_finetune.check.command import run

    return run(words)


def index(words: Sequence[str]) -> int:
    """Embed videos, to be searched."""
    from adaclip_finetune.search.index_command import run

    return run(words)


def search(words: Sequence[str]) -> int:
    """Find videos in an index by a text or a picture."""
    from adaclip_finetune.search.search_command import run

    return run(words)


def evaluate(words: Sequence[str]) -> int:
    """Figures of checkpoints on data sets, in one table."""
    from adaclip_finetune.compare.evaluate_command import run

    return run(words)


def serve(words: Sequence[str]) -> int:
    """A page to search an index."""
    from adaclip_finetune.search.serve.command import run

    return run(words)


def predict(words: Sequence[str]) -> int:
    """For each query the best videos, as a file."""
    from adaclip_finetune.compare.predict_command import run

    return run(words)


class Command(NamedTuple):
    """What runs, and the line that tells of it."""

    run: Callable[[Sequence[str]], int]
    help: str


COMMANDS = {
    "train": Command(train, "finetune a retriever, or evaluate one; the same as `python train.py`"),
    "evaluate": Command(evaluate, "compare checkpoints with zero-shot and with each other, on one data set or several"),
    "predict": Command(predict, "for each query the best videos with their scores, as a file"),
    "export": Command(export, "write a run's weights for the published AdaCLIP, open_clip or transformers"),
    "convert": Command(convert, "annotation files of published data sets, or tables, to train/val/test JSON"),
    "index": Command(index, "embed videos with a trained model, to be searched"),
    "search": Command(search, "find videos in an index by a text or a picture"),
    "serve": Command(serve, "a page on this machine to search an index by text or picture"),
    "check": Command(check, "what would go wrong in a run, and what it would take"),
    "extract": Command(extract, "frames of videos as images; the same as `python utils/frame_extraction.py`"),
    "pack": Command(pack, "the images of all videos in one file, for slow disks"),
    "schema": Command(schema, "print the JSON Schema of the settings"),
}


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"adaclip {__version__}")
        return 0
    if words[0] not in COMMANDS:
        from adaclip_finetune.config.layers import nearest

        raise UserError(
            f"there is no command {words[0]}; the nearest is {nearest(words[0], COMMANDS)} (adaclip --help)"
        )
    try:
        return COMMANDS[words[0]].run(words[1:])
    except SystemExit as done:  # argparse has printed its help
        return int(done.code or 0)


def _refused(message: str, words: Sequence[str]) -> int:
    if _debug(words):
        traceback.print_exc()
    print(f"adaclip{_process()}: error: {message}", file=sys.stderr)
    return 2


def _process() -> str:
    """Which of several processes speaks: torchrun and accelerate number them in the environment."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return "" if rank == "0" else f" (process {rank} of 0 to {int(count) - 1})"


def _overview() -> str:
    lines = [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: adaclip COMMAND ...",
            "",
            "Parameter-efficient finetuning of CLIP for text-video retrieval.",
            "",
            *lines,
            "",
            "`adaclip COMMAND --help` tells about one command, `adaclip --version` the version.",
        ]
    )


def _debug(words: Sequence[str]) -> bool:
    """Whether tracebacks are asked for, told before anything is parsed."""
    following = dict(zip(words, [*words[1:], ""], strict=True))
    return "--debug=true" in words or following.get("--debug", "false").lower() != "false"
