"""Check settings and data, build the model and say what a run would be, without running it (`--dry_run`)."""

from __future__ import annotations

import json
import sys
from typing import Any

from adaclip_finetune.config import Config
from adaclip_finetune.data.loader import updates_per_epoch
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.training.data import readable_train_split
from adaclip_finetune.training.memory import sizes_explained
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model


@sizes_explained
def dry_run(config: Config, as_json: bool) -> dict[str, Any]:
    """Print what a run would learn, cost and write, as text or as a JSON object on stdout, and return that object.

    Weights that are not on disk are not downloaded; the model is then built without values. Raise UserError.
    """
    run = RunFolder(config.model_copy(update={"no_output": True}), stream=sys.stderr if as_json else sys.stdout)
    session = open_model(config, values="meta", learn=not config.do_inference)
    config, parameters, gflops = session.config, session.parameters, session.gflops
    steps = 0
    if not config.do_inference:
        entries = len(readable_train_split(config, session.loaded, run).entries)
        accumulation = config.gradient_accumulation_steps
        steps = sum(
            phase.num_epochs * updates_per_epoch(entries, phase.batch_size, accumulation)
            for phase in session.method.phases(config.num_epochs, config.batch_size)
        )
    evaluated = {config.test_annot, None if config.do_inference else config.val_annot}
    for annotation in sorted(filter(None, evaluated)):
        checked = evaluation_split(config, annotation)
        run.say(f"{annotation}: {len(checked.queries.texts)} captions, {len(checked.queries.video_ids)} videos")
    found = {"parameters": parameters.as_dict(), "gflops": gflops.as_dict(), "steps": steps}
    if as_json:
        print(json.dumps(found))
        return found
    run.say(f"{config.peft.method}\n{parameters}\n{gflops}")
    run.say(f"{steps} updates in {config.num_epochs} epochs" if steps else "no training")
    if config.no_output:
        run.say("nothing would be written (no_output)")
        return found
    weights = "" if config.do_inference else f"best.safetensors (about {4 * parameters.all.total / 2**20:.0f} MiB), "
    run.say(
        f"would write {config.output_dir}/{config.dataset}/<time>-{config.peft.method}/ with {weights}metrics.json, …"
    )
    return found
