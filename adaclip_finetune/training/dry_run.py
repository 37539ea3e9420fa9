"""`--dry_run`: check settings and data, build the model, say what would learn, cost and be written, and stop."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from adaclip_finetune.config import Config
from adaclip_finetune.data.loader import updates_per_epoch
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.model.flops import count_gflops
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.checkpoints import read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.peft import TrainableReport, prepare_peft, trainable_report
from adaclip_finetune.training.build import describe_gflops, readable_train_split, say_cut
from adaclip_finetune.training.run_folder import RunFolder


def dry_run(config: Config, as_json: bool) -> dict[str, Any]:
    """Print what a run would be, as text or as one JSON object on stdout, and return that object. Raises UserError.

    Weights that would have to be fetched are not: the model is then built on the meta device, of shapes alone.
    """
    run = RunFolder(config.model_copy(update={"no_output": True}), stream=sys.stderr if as_json else sys.stdout)
    checkpoint = read_checkpoint(Path(config.resume)) if config.resume else None
    config = with_its_clip(checkpoint, config) if checkpoint else config
    towers = checkpoint.towers() if checkpoint else None
    at_hand = config.clip_weights is not None or towers is not None
    # The CNN's weights do not change what is counted, and may need a download.
    built = config.model_copy(update={"policy_weights": "random"})
    with nullcontext() if at_hand else torch.device("meta"):
        loaded = load_clip(built, with_weights=at_hand, from_checkpoint=towers)
        model = VideoRetriever(built, loaded)
    method = prepare_peft(model, config)
    parameters, gflops = trainable_report(model), count_gflops(model, config.num_frm)
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
    run.say(f"{config.peft.method}\n{parameters}\n{describe_gflops(gflops)}")
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
