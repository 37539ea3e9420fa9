"""`adaclip train`, and train.py: load settings, then train, tune or evaluate."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser, add_flags, given
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.errors import UserError, debug_requested
from adaclip_finetune.hub import local_run, on_hub


def run(words: Sequence[str]) -> int:
    """Run `adaclip train`. Returns the exit code; raises UserError."""
    parser = Parser(
        "adaclip train",
        "Finetune a CLIP video retriever on videos and captions, or evaluate one (--do_inference). "
        "`python train.py` is the same command. Flags override the config file, which overrides the defaults.",
        "adaclip train [--config FILE] [--peft FILE] [--SETTING VALUE ...] [--dry_run [--json]]",
        "Flags cannot be abbreviated. A switch can stand alone (--save_last), have a value (--save_last false) or be "
        "negated (--no_save_last). Lists are written as words (--betas 0.9 0.98) or as JSON ('[]'). The word none "
        "means null. Every setting is also a key of the JSON file; dots mean nesting.",
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help="JSON file of settings (recipes are in cfgs/)")
    add("--dry_run", action="store_true", help="check settings and data, print what would be done, and stop")
    add("--json", action="store_true", help="with --dry_run: print one JSON object")
    add_flags(parser, Config)
    arguments = parser.read(words)
    if arguments.json and not arguments.dry_run:
        raise UserError("--json requires --dry_run")
    config, folder = load_config(arguments.config, given(arguments)), None
    if config.resume is not None and on_hub(config.resume):
        config = config.model_copy(update={"resume": str(local_run(config.resume) / "best.safetensors")})
    if config.resume is not None and Path(config.resume).is_dir():
        folder, config = Path(config.resume), continued_config(config)
    check_paths(config)

    # Must be set before torch is imported. It silences a warning of DistributedDataParallel that appears in every run
    # because find_unused_parameters is on, which keeps methods with unused parameters from hanging.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from adaclip_finetune.processes import leave_group
    from adaclip_finetune.training.evaluate_only import dry_run, evaluate_only
    from adaclip_finetune.training.trainer import fit

    try:
        if config.optuna_cfg is not None:
            from adaclip_finetune.tuning.run import describe, tune

            if not arguments.dry_run:
                tune(config)
                return 0
            print(*describe(config), sep="\n", file=sys.stderr if arguments.json else sys.stdout)
        if arguments.dry_run:
            dry_run(config, as_json=arguments.json)
        elif config.do_inference:
            evaluate_only(config, folder)
        else:
            fit(config, folder=folder)
    except UserError:
        if config.debug and not debug_requested(words):  # set in the config file
            traceback.print_exc()
        raise
    leave_group()
    return 0
