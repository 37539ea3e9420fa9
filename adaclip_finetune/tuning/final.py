"""The run with the best values (`do_training_af_optuna`): trained once, on all it may train on, and tested once."""

from __future__ import annotations

import json

import optuna
from optuna.trial import FrozenTrial

from adaclip_finetune.config import Config
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
    done = study.user_attrs.get(_RUN)
    if done and done["trial"] == best.number:
        folder.say(f"trained with the values of trial {best.number} already: {done['folder']}")
        return
    folder.say(f"training once with the values of trial {best.number}")
    result = fit(best_config)
    where = str(result.folder) if result.folder else None
    study.set_user_attr(_RUN, {"trial": best.number, "folder": where, result.evaluated_on: result.final.as_dict()})
    if result.folder is not None:
        about = {"study": study.study_name, "folder": str(folder.path), "trial": best.number}
        write_durably(result.folder / "study.json", (json.dumps(about, indent=2) + "\n").encode())
