"""`--dry_run`: check settings and data, build the model, say what would learn, cost and be written, and stop."""

from __future__ import annotations

import json
import sys
from typing import Any

from adaclip_finetune.config import Config
from adaclip_finetune.data.loader import updates_per_epoch
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.peft import TrainableReport
from adaclip_finetune.training.data import readable_train_split, say_cut
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model


def dry_run(config: Config, as_json: bool) -> dict[str, Any]:
    """Print what a run would be, as text or as one JSON object on stdout, and return that object. Raises UserError.

    Weights that would have to be fetched are not: the model is then built on the meta device, of shapes alone.
    """
    run = RunFolder(config.model_copy(update={"no_output": True}), stream=sys.stderr if as_json else sys.stdout)
    session = open_model(config, values="meta", learn=not config.do_inference)
    config, loaded, method = session.config, session.loaded, session.method
    parameters, gflops = session.parameters, session.gflops
    steps = 0
    if not config.do_inference:
        split = readable_train_split(config, run)
        say_cut(loaded, [text for entry in split.entries for text in entry.sentences], config.max_txt_len, "train", run)
        steps = sum(
            phase.num_epochs
            * updates_per_epoch(len(split.entries), phase.batch_size, config.gradient_accumulation_steps)
            for phase in method.phases(config.num_epochs, config.batch_size)
        )
    evaluated = {config.test_annot, None if config.do_inference else config.val_annot}
    for annotation in sorted(name for name in evaluated if name):
        checked = evaluation_split(config, annotation)
        run.say(f"{annotation}: {len(checked.queries.texts)} captions, {len(checked.queries.video_ids)} videos")
    found = {"parameters": parameters.as_dict(), "gflops": gflops.as_dict(), "steps": steps}
    if as_json:
        print(json.dumps(found))
        return found
    run.say(f"{config.peft.method}\n{parameters}\n{gflops}")
    run.say(f"{steps} updates in {config.num_epochs} epochs" if steps else "no training")
    run.say(_would_write(config, parameters))
    return found


def _would_write(config: Config, parameters: TrainableReport) -> str:
    if config.no_output:
        return "nothing would be written (no_output)"
    folder = f"{config.output_dir}/{config.dataset}/<time>-{config.peft.method}/"
    if config.do_inference:
        return f"would write {folder} with metrics.json, train.log and the like"
    mebibytes = 4 * parameters.all.total / 2**20
    return (
        f"would write {folder} with best.safetensors (about {mebibytes:.0f} MiB), adapter.safetensors, metrics.json, "
        "curves.png and the like"
    )
