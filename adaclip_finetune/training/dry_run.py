"""Check settings and data, build the model and say what a run would be, without running it (`--dry_run`)."""

from __future__ import annotations

import json
import sys
from typing import Any

from adaclip_finetune.config import Config
from adaclip_finetune.data.loader import updates_per_epoch
from adaclip_finetune.training.data import read_split, readable_train_split
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model


def dry_run(config: Config, as_json: bool) -> dict[str, Any]:
    """Print what a run would learn, cost and take, as text or as a JSON object on stdout, and return that object.

    Weights that are not on disk are not downloaded; the model is then built without values. Raise UserError.
    """
    run = RunFolder(config.model_copy(update={"no_output": True}), stream=sys.stderr if as_json else sys.stdout)
    session = open_model(config, values="meta", learn=not config.do_inference)
    config, steps = session.config, 0
    if not config.do_inference:
        entries = len(readable_train_split(config, session.loaded, run).entries)
        accumulation = config.gradient_accumulation_steps
        steps = sum(
            phase.num_epochs * updates_per_epoch(entries, phase.batch_size, accumulation)
            for phase in session.method.phases(config.num_epochs, config.batch_size)
        )
    for annotation in sorted(filter(None, {config.test_annot, None if config.do_inference else config.val_annot})):
        queries = read_split(config, annotation, run, annotation).queries
        run.say(f"{annotation}: {len(queries.texts)} captions, {len(queries.video_ids)} videos")
    found = {"parameters": session.parameters.as_dict(), "gflops": session.gflops.as_dict(), "steps": steps}
    if as_json:
        print(json.dumps(found))
    else:
        run.say(f"{config.peft.method}\n{session.parameters}\n{session.gflops}\n{steps} updates")
    return found
