"""The run with the best values (`do_training_af_optuna`): trained once, on all it may train on, and tested once."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.training.trainer import fit
from adaclip_finetune.tuning.folder import StudyFolder

_RUN = "trained_with_the_best"


def train_best(best_config: Config, study: optuna.Study, best: FrozenTrial, folder: StudyFolder) -> None:
    """`fit`, unless that has been done with this very trial's; the study and the run point to each other."""
    if folder.path is None:
        _train(best_config, study, best, folder)
        return
    lock = FolderLock(folder.path)
    try:
        lock.take()
    except UserError as taken:  # several workers come to the end of a study at once
        folder.say(f"not trained with the best values by this process: {taken}")
        return
    try:
        _train(best_config, study, best, folder)
    finally:
        lock.release()


def _train(best_config: Config, study: optuna.Study, best: FrozenTrial, folder: StudyFolder) -> None:
    known = study.user_attrs.get(_RUN, {})
    begun = Path(known["folder"]) if known.get("trial") == best.number and known.get("folder") else None
    if begun is not None and (begun / "metrics.json").is_file():
        folder.say(f"trained with the values of trial {best.number} already: {begun}")
        return

    def opened(run: Path) -> None:
        study.set_user_attr(_RUN, {"trial": best.number, "folder": str(run)})
        about = {"study": study.study_name, "folder": str(folder.path), "trial": best.number}
        write_durably(run / "study.json", (json.dumps(about, indent=2) + "\n").encode())

    if begun is not None and (begun / "config.json").is_file():
        folder.say(f"going on with the training with the values of trial {best.number}")
        result = fit(continued_config(load_config(None, {"resume": str(begun)})), folder=begun)
    else:
        folder.say(f"training once with the values of trial {best.number}")
        result = fit(best_config, opened=opened)
    where = str(result.folder) if result.folder else None
    study.set_user_attr(_RUN, {"trial": best.number, "folder": where, result.evaluated_on: result.final.as_dict()})
