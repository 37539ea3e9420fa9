"""A worker on a study, as a search is one, whose trials only sleep: to be started several times, and killed.

    python study_worker.py URL POINTS SECONDS EVERY_S SILENCE_S

tries each whole number below POINTS once, SECONDS each, and prints a line as it begins one. The last two are how often
it gives a sign of life, and how long a silence it takes for death.
"""

import sys
import time

import optuna

from adaclip_finetune.errors import UserError
from adaclip_finetune.tuning import signs
from adaclip_finetune.tuning.ledger import counted, is_surplus, may_begin
from adaclip_finetune.tuning.retries import requeue_lost
from adaclip_finetune.tuning.sampler import GridByPlace
from adaclip_finetune.tuning.storage import open_storage

STUDY = "numbers"


class Surplus(Exception):
    pass


def work(url: str, points: int, seconds: float) -> None:
    with open_storage(url) as storage:
        study = optuna.create_study(
            storage=storage.storage,
            study_name=STUDY,
            load_if_exists=True,
            sampler=GridByPlace({"x": list(range(points))}, seed=0),
        )

        def objective(trial: optuna.Trial) -> float:
            with storage.alive(trial):
                if is_surplus(study.get_trials(deepcopy=False), trial.number, points):
                    trial.set_user_attr("surplus", True)
                    raise Surplus
                x = trial.suggest_int("x", 0, points - 1)
                print(trial.number, flush=True)
                time.sleep(seconds)
                return x

        with storage.explained(study):
            while True:
                storage.fail_dead(study)
                requeue_lost(study)
                trials = study.get_trials(deepcopy=False)
                if len(counted(trials)) >= points:
                    return
                if may_begin(trials, points):
                    study.optimize(objective, n_trials=1, catch=(Surplus,))
                else:
                    time.sleep(0.2)


if __name__ == "__main__":
    signs.EVERY_S, signs.SILENCE_S = int(sys.argv[4]), int(sys.argv[5])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        work(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    except UserError as error:
        sys.exit(str(error))
