"""What may be tuned, how values are drawn, and what docs/tuning.md says about it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BaseModel, ValidationError

from adaclip_finetune.config import TASKS, Config, load_config
from adaclip_finetune.config.optuna import OptunaSettings, SamplerSettings, TunedSetting
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.tuning.run import describe
from adaclip_finetune.tuning.space import build_space, grid, suggest, with_values
from adaclip_finetune.tuning.study import make_pruner

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
IBS = {"method": "ibs", "config": {"num_pre_epochs": 2}}
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def tuned(opt_params: dict[str, Any], optuna_cfg: dict[str, Any] | None = None, **settings: Any) -> Config:
    return load_config(None, {"optuna_cfg": {"opt_params": opt_params, **(optuna_cfg or {})}, **settings})


def refusal(*given: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        describe(tuned(*given, **settings))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "given", "distribution"),
    [
        ("learning_rate", {"range": [1e-5, 1e-2], "log": True}, FloatDistribution(1e-5, 1e-2, log=True)),
        ("weight_decay", {"range": [0, 0.5], "step": 0.25}, FloatDistribution(0, 0.5, step=0.25)),
        ("top_k", {"range": [2, 8], "step": 2}, IntDistribution(2, 8, step=2)),
        ("batch_size", {"range": [8, 64], "log": True}, IntDistribution(8, 64, log=True)),
        ("max_img_size", {"range": [32, 64]}, IntDistribution(32, 64)),
        ("frame_agg", {"choices": ["mlp", None]}, CategoricalDistribution(("mlp", None))),
        ("use_rnn", {"choices": [True, False]}, CategoricalDistribution((True, False))),
        ("peft.config.retain_ratio", {"range": [0.01, 0.5]}, FloatDistribution(0.01, 0.5)),
        ("seed", {"choices": [1, 2, 3]}, CategoricalDistribution((1, 2, 3))),
    ],
)
def test_distributions_follow_from_the_settings(name: str, given: dict[str, Any], distribution: Any) -> None:
    space = build_space(tuned({name: given}, peft=IBS))
    assert space == {name: distribution}
    suggest(trial := optuna.create_study().ask(), space)
    assert trial.distributions == space
    assert not isinstance(distribution, IntDistribution) or type(trial.params[name]) is int


@pytest.mark.parametrize(
    ("opt_params", "told"),
    [
        ({"coef_lrr": {"range": [0, 1]}}, "nearest is coef_lr"),
        ({"peft.config.retain_ratio": {"range": [0.1, 1]}}, "peft.method ibs"),
        ({"top_k": {"range": [1.5, 4]}}, "integer"),
        ({"top_k": {"range": [2, 9], "step": 1.5}}, "integer"),
        ({"weight_decay": {"range": [0.5, 0.02]}}, "low=0.5"),
        ({"weight_decay": {"range": [0, 1], "log": True}}, "log"),
        ({"top_k": {"range": [0, 4]}}, "0 is not allowed"),
        ({"warmup_proportion": {"range": [0, 1]}}, "less than 1"),
        ({"frame_agg": {"range": [0, 1]}}, "0.0 is not allowed"),
        ({"frame_agg": {"choices": ["mlp", "mean"]}}, '"mean" is not allowed'),
        ({"test_annot": {"choices": ["a", "b"]}}, "same in all trials"),
        ({"num_workers": {"range": [0, 3]}}, "same in all trials"),
        ({"peft.method": {"choices": ["ibs", "full"]}}, "not a single value"),
        ({"betas": {"range": [0, 0.9]}}, "not a single value"),
    ],
)
def test_what_cannot_be_tuned(opt_params: dict[str, Any], told: str) -> None:
    message = refusal({**opt_params, "nothing": {"range": [0, 1]}, "coef_lr": {"range": [0, 1]}})
    assert told in message and f"optuna_cfg.opt_params.{next(iter(opt_params))}" in message
    assert "opt_params.nothing:" in message and "opt_params.coef_lr:" not in message, "all problems, and no others"


def test_batch_sizes_are_either_tuned_or_fitted() -> None:
    assert "auto_batch_size" in refusal({"batch_size": {"range": [8, 64]}}, auto_batch_size=True)


def test_values_replace_settings_and_nothing_else() -> None:
    config = tuned({"top_k": {"range": [2, 8]}}, peft=IBS, do_training_af_optuna=True)
    found = with_values(config, {"top_k": 5, "peft.config.retain_ratio": 0.3})
    assert (found.top_k, found.optuna_cfg, found.do_training_af_optuna) == (5, None, False)
    inner = found.peft.config.model_dump()
    assert (inner["retain_ratio"], inner["num_pre_epochs"]) == (0.3, 2)
    plain = tuned({"top_k": {"range": [2, 8]}})
    assert with_values(plain, {"top_k": 3}).model_fields_set == {"top_k"}
    with pytest.raises(ValidationError, match=r"top_k 9 .* num_frm 4"):
        with_values(plain, {"top_k": 9, "num_frm": 4})


def test_a_grid_is_every_combination() -> None:
    by_grid = {"sampler": {"name": "GridSampler"}}
    space = {
        "top_k": {"range": [2, 4]},
        "weight_decay": {"range": [0.1, 0.3], "step": 0.1},
        "rnn": {"choices": ["lstm"]},
    }
    config = tuned(space, by_grid)
    assert grid(build_space(config)) == {"top_k": [2, 3, 4], "weight_decay": [0.1, 0.2, 0.3], "rnn": ["lstm"]}
    assert "coef_lr" in refusal({"coef_lr": {"range": [0, 1]}}, by_grid)


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ({"name": "TPESampler", "n_startup": 3}, "n_startup"),
        ({"name": "RandomSampler", "seed": -1}, "RandomSampler"),
        ({"name": "TPESampler", "seed": "x"}, "TPESampler"),
        ({"name": "GridSampler", "n_startup_trials": 3}, "n_startup_trials"),
    ],
)
def test_arguments_that_a_sampler_refuses(sampler: dict[str, Any], told: str) -> None:
    message = refusal({"coef_lr": {"range": [0, 1], "step": 0.5}}, {"sampler": sampler})
    assert message.startswith("optuna_cfg.sampler") and told in message


@pytest.mark.parametrize(("pruner", "prunes"), [("median", True), ("percentile", True), ("none", False)])
def test_pruners_wait_for_the_warmup(pruner: str, prunes: bool) -> None:
    config = tuned({"coef_lr": {"range": [0, 1]}}, {"pruner": pruner, "n_warmup_steps": 3})
    assert config.optuna_cfg is not None
    study = optuna.create_study(direction="maximize", pruner=make_pruner(config.optuna_cfg, 5))
    asked: list[bool] = []
    for value in (50.0,) * 6 + (1.0,):
        trial, asked = study.ask(), []
        for epoch in range(1, 6):
            trial.report(value, epoch)
            asked.append(trial.should_prune())
        study.tell(trial, value)
    assert asked == [False, False, False, prunes, prunes]


def test_objectives_are_what_is_measured() -> None:
    metrics = retrieval_metrics([torch.eye(2)], np.arange(2)).as_dict()
    measured = {f"{direction}.{name}" for direction, of in metrics.items() for name in of if name != "queries"}
    assert set(TASKS["retrieval"].settings.figures) == measured  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("title", "settings"),
    [
        ("### `optuna_cfg`", OptunaSettings),
        ("### `optuna_cfg.opt_params.<setting>`", TunedSetting),
    ],
)
def test_the_tables_of_the_page_are_those_of_the_schema(title: str, settings: type[BaseModel]) -> None:
    table = PAGE.split(f"{title}\n\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", table, flags=re.MULTILINE)
    defaults = {
        name: "required" if field.is_required() else field.default if isinstance(field.default, str) else
        json.dumps(field.default) for name, field in settings.model_fields.items()
    }  # fmt: skip
    if "sampler" in defaults:
        defaults["sampler"] = SamplerSettings().name
    assert rows == [(name, defaults[name], field.description) for name, field in settings.model_fields.items()]


def test_the_example_of_the_page_is_that_of_the_demo() -> None:
    words = re.search(r'^    "optuna_cfg": (\{.*?^    \})', PAGE, flags=re.MULTILINE | re.DOTALL)
    assert words is not None
    assert json.loads(words[1]) == json.loads((ROOT / "cfgs" / "demo-optuna.json").read_text())["optuna_cfg"]
