"""What may be searched, how it is drawn, and by which sampler."""

from collections.abc import Iterator
from typing import Any

import optuna
import pytest
from adaclip_finetune.tuning.sampler import make_pruner, make_sampler
from adaclip_finetune.tuning.search import describe
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from adaclip_finetune.config import TASKS, Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.tuning.space import Impossible, search_space, suggest, with_values

IBS = {"method": "ibs", "config": {"num_pre_epochs": 2}}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


def searched(opt_params: dict[str, Any], **settings: Any) -> Config:
    optuna_cfg = {"opt_params": opt_params, **settings.pop("optuna_cfg", {})}
    return load_config(None, {"optuna_cfg": optuna_cfg, **settings})


def refusal(opt_params: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        describe(searched(opt_params, **settings))
    return str(error.value)


def test_kinds_follow_from_the_settings() -> None:
    space = search_space(
        searched(
            {
                "coef_lr": {"range": [0.02, 0.5]},
                "learning_rate": {"range": [1e-5, 1e-2], "log": True},
                "weight_decay": {"range": [0, 0.5], "step": 0.25},
                "top_k": {"range": [2, 8], "step": 2},
                "batch_size": {"range": [8, 64], "log": True},
                "max_img_size": {"range": [32, 64]},
                "frame_agg": {"choices": ["mlp", None]},
                "use_rnn": {"choices": [True, False]},
                "peft.config.retain_ratio": {"range": [0.01, 0.5]},
                "seed": {"choices": [1, 2, 3]},
            },
            peft=IBS,
        )
    )
    assert space.distributions == {
        "coef_lr": FloatDistribution(0.02, 0.5),
        "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
        "weight_decay": FloatDistribution(0, 0.5, step=0.25),
        "top_k": IntDistribution(2, 8, step=2),
        "batch_size": IntDistribution(8, 64, log=True),
        "max_img_size": IntDistribution(32, 64),
        "frame_agg": CategoricalDistribution(("mlp", None)),
        "use_rnn": CategoricalDistribution((True, False)),
        "peft.config.retain_ratio": FloatDistribution(0.01, 0.5),
        "seed": CategoricalDistribution((1, 2, 3)),
    }


@pytest.mark.parametrize(
    ("opt_params", "told"),
    [
        ({"coef_lrr": {"range": [0, 1]}}, "opt_params.coef_lrr: there is no such setting; the nearest is coef_lr"),
        ({"peft.config.retain_ratio": {"range": [0.1, 1]}}, "no such setting with peft.method full"),
        ({"top_k": {"range": [1.5, 4]}}, "is a whole number, and 1.5 is none"),
        ({"top_k": {"range": [2, 9], "step": 2}}, "steps of 2 do not lead from 2 to 9"),
        ({"top_k": {"range": [0, 4]}}, "takes a whole number >= 1, and not 0"),
        ({"warmup_proportion": {"range": [0, 1]}}, "takes a number >= 0 and < 1, and not 1"),
        ({"frame_agg": {"range": [0, 1]}}, "is no number, and cannot be searched in a range; give choices"),
        ({"frame_agg": {"choices": ["mlp", "mean"]}}, 'takes one of mlp, transformer, qscore, or null, and not "mean"'),
        ({"frame_agg": {"choices": ["mlp", "mlp"]}}, "\"mlp\" stands twice among the choices"),
        ({"test_annot": {"choices": ["a", "b"]}}, "is the same in all trials"),
        ({"output_dir": {"choices": ["a", "b"]}}, "is the same in all trials"),
        ({"peft": {"choices": ["ibs"]}}, "is no single value"),
        ({"peft.method": {"choices": ["ibs", "full"]}}, "is no single value"),
        ({"betas": {"range": [0, 0.9]}}, "is no single value"),
        ({"optuna_cfg.n_trials": {"range": [1, 3]}}, "is the same in all trials"),
        ({"num_workers": {"range": [0, 3]}}, "is the same in all trials"),
        ({"top_k": {"range": [17, 30]}}, "no trial could be trained: top_k 17 is more than num_frm 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched(opt_params: dict[str, Any], told: str) -> None:
    assert told in refusal(opt_params)


def test_all_problems_are_told_together() -> None:
    message = refusal({"coef_lrr": {"range": [0, 1]}, "top_k": {"range": [0, 4]}, "coef_lr": {"range": [0, 1]}})
    assert message.startswith("2 things are wrong")
    assert "coef_lrr" in message and "top_k" in message


def test_values_replace_settings_and_nothing_else() -> None:
    config = searched({"top_k": {"range": [2, 8]}}, peft=IBS, do_training_af_optuna=True)
    found = with_values(config, {"top_k": 5, "peft.config.retain_ratio": 0.3})
    assert (found.top_k, found.optuna_cfg, found.do_training_af_optuna) == (5, None, False)
    assert found.peft.model_dump()["config"] | IBS["config"] == found.peft.model_dump()["config"]  # type: ignore[operator]
    assert found.peft.config.model_dump()["retain_ratio"] == 0.3
    # A section that nobody gave still has its defaults, and what was not given is still told from what was.
    assert with_values(searched({"top_k": {"range": [2, 8]}}), {"top_k": 3}).model_fields_set == {"top_k"}


def test_a_combination_that_the_schema_refuses() -> None:
    with pytest.raises(Impossible, match="top_k 9 is more than num_frm 4: lower top_k"):
        with_values(searched({"top_k": {"range": [2, 8]}}), {"top_k": 9, "num_frm": 4})


def test_what_another_searched_setting_may_mend_is_not_refused() -> None:
    assert search_space(searched({"top_k": {"range": [17, 30]}, "num_frm": {"range": [16, 64]}}))
    assert "auto_batch_size" in refusal({"batch_size": {"range": [8, 64]}}, auto_batch_size=True)


def test_steps_of_a_grid_stay_in_the_range() -> None:
    space = search_space(searched({"weight_decay": {"range": [0.1, 0.3], "step": 0.1}}))
    values = space.grid()["weight_decay"]
    assert values == [0.1, 0.2, 0.3]
    for value in values:
        optuna.create_trial(value=0.0, params={"weight_decay": value}, distributions=dict(space.distributions))


@pytest.mark.parametrize("name", ["RandomSampler", "GridSampler"])
def test_hyperband_does_not_make_points_come_twice(name: str) -> None:
    space = {"coef_lr": {"choices": [0.1, 0.2, 0.3]}, "top_k": {"range": [1, 3]}}
    if name == "RandomSampler":
        space = {"coef_lr": {"range": [0, 1]}}
    config = searched(space, optuna_cfg={"sampler": {"name": name}, "pruner": "hyperband"}, num_epochs=9)
    assert config.optuna_cfg is not None
    study = optuna.create_study(
        sampler=make_sampler(config, search_space(config)), pruner=make_pruner(config.optuna_cfg, 9)
    )

    def objective(trial: optuna.Trial) -> float:
        value = float(suggest(trial, search_space(config))["coef_lr"])
        for epoch in range(1, 10):
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study.optimize(objective, n_trials=9)
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 9


def test_suggestions_have_the_types_of_the_settings() -> None:
    config = searched({"top_k": {"range": [2, 8]}, "coef_lr": {"range": [0, 1]}, "rnn": {"choices": ["lstm"]}})
    values = suggest(optuna.create_study().ask(), search_space(config))
    assert {name: type(value) for name, value in values.items()} == {"top_k": int, "coef_lr": float, "rnn": str}


def test_a_grid_is_every_combination() -> None:
    grid = {"sampler": {"name": "GridSampler"}}
    space = {
        "top_k": {"range": [2, 4]},
        "weight_decay": {"range": [0, 0.5], "step": 0.25},
        "rnn": {"choices": ["lstm"]},
    }
    config = searched(space, optuna_cfg=grid)
    assert search_space(config).grid() == {"top_k": [2, 3, 4], "weight_decay": [0, 0.25, 0.5], "rnn": ["lstm"]}
    assert "GridSampler, 9 points" in describe(config)[0]
    assert "opt_params.coef_lr: GridSampler needs a step" in refusal({"coef_lr": {"range": [0, 1]}}, optuna_cfg=grid)


@pytest.mark.parametrize("name", ["TPESampler", "CmaEsSampler", "GPSampler", "RandomSampler"])
def test_a_study_in_one_go_and_in_parts_tries_the_same_points(name: str) -> None:
    space = {"coef_lr": {"range": [0.01, 1], "log": True}, "top_k": {"range": [1, 8]}}

    def points(parts: list[int], seed: int) -> list[dict[str, Any]]:
        config = searched(space, seed=seed, optuna_cfg={"sampler": {"name": name, "n_startup_trials": 2}}
                          if name != "RandomSampler" else {"sampler": {"name": name}})  # fmt: skip
        storage = optuna.storages.InMemoryStorage()
        for count in parts:  # a process each: nothing is kept but the storage
            study = optuna.create_study(
                storage=storage, study_name="s", load_if_exists=True, sampler=make_sampler(config, search_space(config))
            )
            study.optimize(lambda trial: sum(suggest(trial, search_space(config)).values()), n_trials=count)
        return [trial.params for trial in study.trials]

    whole = points([6], seed=1)
    assert points([2, 1, 3], seed=1) == whole
    if name != "GPSampler":  # which, once sure, tries the best point again
        assert len({tuple(point.values()) for point in whole}) == 6
    assert points([6], seed=2) != whole


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ({"name": "TPESampler", "n_startup": 3}, "TPESampler takes no n_startup here; the nearest is n_startup_trials"),
        ({"name": "TPESampler", "gamma": 3}, "TPESampler takes no gamma here"),
        ({"name": "RandomSampler", "seed": -1}, "optuna_cfg.sampler.seed is -1, but must be a whole number"),
        ({"name": "TPESampler", "n_startup_trials": "ten"}, 'n_startup_trials is "ten", but must be a whole number'),
        ({"name": "TPESampler", "multivariate": "yes"}, 'multivariate is "yes", but must be true or false or null'),
        ({"name": "CmaEsSampler", "popsize": 1}, "CmaEsSampler refuses"),
        ({"name": "CmaEsSampler", "x0": {"lr": 5}}, "CmaEsSampler refuses"),
        ({"name": "CmaEsSampler", "use_separable_cma": True, "with_margin": True}, "CmaEsSampler refuses"),
    ],
)
def test_sampler_arguments_that_do_not_exist(sampler: dict[str, Any], told: str) -> None:
    assert told in refusal({"coef_lr": {"range": [0, 1]}}, optuna_cfg={"sampler": sampler})


@pytest.mark.parametrize(("pruner", "prunes"), [("median", True), ("percentile", True), ("none", False)])
def test_pruners_wait_for_the_warmup(pruner: str, prunes: bool) -> None:
    config = searched({"coef_lr": {"range": [0, 1]}}, optuna_cfg={"pruner": pruner, "n_warmup_steps": 3})
    assert config.optuna_cfg is not None
    study = optuna.create_study(direction="maximize", pruner=make_pruner(config.optuna_cfg, 5))
    for _ in range(6):
        trial = study.ask()
        for epoch in range(1, 6):
            trial.report(50.0, epoch)
        study.tell(trial, 50.0)
    trial, asked = study.ask(), []
    for epoch in range(1, 6):
        trial.report(1.0, epoch)
        asked.append(trial.should_prune())
    assert asked == [False, False, False, prunes, prunes]


def test_objectives_are_what_is_measured() -> None:
    import numpy as np
    import torch

    metrics = retrieval_metrics([torch.eye(2)], np.arange(2)).as_dict()
    measured = {f"{direction}.{name}" for direction, of in metrics.items() for name in of if name != "queries"}
    assert set(TASKS["retrieval"].settings.figures) == measured  # type: ignore[attr-defined]
