"""`adaclip check`: report before a run what would go wrong in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser, add_flags, check_inputs, given
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.paths import check_paths
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.errors import UserError


def run(words: Sequence[str]) -> int:
    """Check, and print the findings. Return 0, or 1 if a run would fail."""
    parser = Parser(
        "adaclip check",
        "Report before a run what would go wrong in it (videos, captions, splits) and what it would take (memory, "
        "time). The exit code is 1 if the run would fail.",
        "adaclip check --config FILE | --annot FILE [--annot FILE ...] --frames_dir DIR | --video_dir DIR "
        "[--SETTING VALUE ...] [--deep] [--json]",
        "Settings are those of `adaclip train`, with the same meaning.",
    )
    parser.add_argument("--config", metavar="FILE", help="the settings of the run")
    parser.add_argument(
        "--annot",
        metavar="FILE",
        action="append",
        default=[],
        help="check this annotation file without a run; a file with the word 'train' in its name counts as training "
        "data, others as evaluation data. May be given several times",
    )
    parser.add_argument("--deep", action="store_true", help="decode every frame, in num_workers threads")
    parser.add_argument("--json", action="store_true", help="print all findings, with all their items, as JSON")
    add_flags(parser, Config)
    arguments = parser.read(words)
    # Without a run nothing selects frames, so a low num_frm must not contradict the default of top_k.
    no_run = {"use_policy": False} if arguments.annot else {}
    config = load_config(arguments.config, no_run | given(arguments))
    if arguments.annot and (arguments.config or config.train_annot or config.val_annot or config.test_annot):
        raise UserError(
            "--annot checks files without a run: leave out --config, --train_annot, --val_annot, --test_annot"
        )
    if not arguments.annot:
        if config.resume is not None and Path(config.resume).is_dir():
            config = continued_config(config)
        check_paths(config)
    check_inputs({"--annot": arguments.annot})

    from adaclip_finetune.check.data import splits_of_config, splits_of_files
    from adaclip_finetune.check.report import as_json, as_text, worst
    from adaclip_finetune.check.run import check_data, check_run

    splits = splits_of_files(arguments.annot, config) if arguments.annot else splits_of_config(config)
    findings = (check_data if arguments.annot else check_run)(config, splits, arguments.deep)
    paths, trains = {split.name: split.path for split in splits}, [split.name for split in splits if split.trains]
    print(json.dumps(as_json(paths, trains, findings)) if arguments.json else as_text(paths, trains, findings))
    return 1 if worst(findings) == "fails" else 0
