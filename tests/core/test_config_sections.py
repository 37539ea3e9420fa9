"""The nested parts of a config: `peft`, whose method chooses its settings, and `optuna_cfg`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune.config import BitFitSettings, Choice, IbsSettings, SigmoidSettings, implementation, load_config
from adaclip_finetune.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a settings file: JSON from an object, or the text as it is."""

    def write_file(content: Any, name: str = "my.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_file


def refusal(path: Path | None, **overrides: Any) -> str:
    """The message with which loading is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# ---- peft ----


def test_a_file_laid_over_replaces_the_whole_part(write: Write) -> None:
    below = write({"top_k": 3, "peft": {"method": "ibs", "config": {"retain_ratio": 0.3}}})
    part = {"method": "bitfit", "config": {"include_qkv_bias": True}}
    for content in ({"$schema": "x", "peft": part}, part):
        over = write(content, "over.json")
        config = load_config(below, {"peft": str(over)})
        assert (config.peft.config, config.top_k) == (BitFitSettings(include_qkv_bias=True), 3)


def test_a_file_laid_over_holds_this_part_alone_and_is_named_where_it_is_wrong(write: Write) -> None:
    both = write({"peft": {"method": "full"}, "top_k": 3})
    assert refusal(None, peft=str(both)) == (
        f"{both}: is laid over the config as its peft part and may hold nothing else, but holds top_k"
    )
    wrong = write({"peft": {"method": "ibs", "config": {"retain_ratio": 2}}})
    assert refusal(None, peft=str(wrong)) == (
        f"{wrong}: peft.config.retain_ratio is 2, but must be a number > 0 and <= 1"
    )
    assert "there is no such file" in refusal(None, peft="none.json")


def test_another_method_starts_from_its_defaults_and_says_what_is_set_aside(
    write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write({"peft": {"method": "bitfit", "config": {"keep_module_keywords": ["ln_post"]}}})
    assert load_config(path, {"peft.method": "ibs"}).peft.config == IbsSettings()
    assert f"replaces bitfit of {path}, whose settings are set aside (keep_module_keywords)" in caplog.text
    caplog.clear()
    without = write({"peft": {"config": {"retain_ratio": 0.3}}}, "without.json")
    assert load_config(without, {"peft.method": "ibs"}).peft.config == IbsSettings(retain_ratio=0.3)
    kept = load_config(path, {"peft.method": "bitfit", "peft.config.include_qkv_bias": True}).peft.config
    assert kept == BitFitSettings(keep_module_keywords=("ln_post",), include_qkv_bias=True)
    assert not caplog.text


def test_nested_overrides_in_any_order() -> None:
    names = {"peft.config.retain_ratio": 0.2, "peft.method": "ibs", "peft.config.keep_module_keywords": ["a", "b"]}
    expected = IbsSettings(retain_ratio=0.2, keep_module_keywords=("a", "b"))
    assert load_config(None, names).peft.config == expected
    assert load_config(None, dict(reversed(names.items()))).peft.config == expected


def test_an_override_object_is_not_changed() -> None:
    given = {"peft": {"method": "ibs", "config": {}}, "peft.config.retain_ratio": 0.5}
    load_config(None, given)
    assert given["peft"] == {"method": "ibs", "config": {}}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"peft.method": "ssf"}, 'command line: peft.method is "ssf", but must be one of full, bitfit, ibs, lora'),
        ({"peft.config.retain_ratio": 0.2}, "peft.method is missing; it must be one of full, bitfit, ibs, lora"),
        ({"peft.method": "ibs", "peft.config.rank": 4}, "there is no setting peft.config.rank"),
        ({"top_k.x": 4}, "there is no setting top_k.x"),
        ({"peft": [], "peft.method": "ibs"}, "peft is [], but must be an object with method, config"),
        ({"peft": {"method": "full", "x": 1}, "peft.method": "ibs"}, "there is no setting peft.x"),
        ({"peft": {"method": "full", "config": 3}, "peft.method": "ibs"}, "peft.config is 3, but must be an object"),
    ],
)
def test_wrong_nested_overrides(overrides: dict[str, Any], told: str) -> None:
    assert told in refusal(None, **overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            {"peft.config.targets": ["q", "z"]},
            'peft.config.targets[1] is "z", but must be one of q, k, v, out, fc, proj',
        ),
        ({"peft.config.targets": []}, "peft.config.targets is []"),
        ({"peft.config.layers": [-1]}, "peft.config.layers[0] is -1"),
        ({"peft.config.alpha": 0}, "peft.config.alpha is 0"),
        ({"freeze_clip": True}, "freeze_clip leaves peft.method lora nothing"),
    ],
)
def test_wrong_settings_of_lora(overrides: dict[str, Any], told: str) -> None:
    assert told in refusal(None, **{"peft.method": "lora"} | overrides)


# ---- the other choices ----


def test_choices_have_defaults_and_an_objective_may_be_null(write: Write) -> None:
    config = load_config(write({"objective": None}))
    assert config.objective is None
    chosen = (config.tower.method, config.task.method, config.adaptation.method, config.primary)
    assert chosen == ("per_frame", "retrieval", "none", None)


def test_an_objective_is_given_as_object_file_or_flag(write: Write) -> None:
    sigmoid = {"method": "sigmoid"}
    for overrides in (
        {"objective": sigmoid},
        {"objective": str(write({"objective": sigmoid}))},
        {"objective.method": "sigmoid"},
    ):
        objective = load_config(None, overrides).objective
        assert objective is not None and objective.config == SigmoidSettings()
    assert load_config(write({"objective": sigmoid}), {"objective": None}).objective is None


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"objective.method": "x"}, 'objective.method is "x", but must be one of contrastive, sigmoid'),
        ({"objective": {"config": {}}}, "objective.method is missing; it must be one of contrastive, sigmoid"),
        ({"objective": 3}, "objective is 3, but must be an object with method, config, or null"),
        ({"objective.method": "sigmoid", "objective.config.x": 1}, "there is no setting objective.config.x"),
        ({"tower.method": "x"}, 'tower.method is "x", but must be per_frame'),
        ({"tower": None}, "tower is null"),
    ],
)
def test_wrong_choices(overrides: dict[str, Any], told: str) -> None:
    assert told in refusal(None, **overrides)


def test_the_implementation_is_what_the_table_names() -> None:
    table = {"bitfit": Choice(BitFitSettings, "config.choices:BitFitSettings")}
    assert implementation(table, load_config(None, {"peft.method": "bitfit"}).peft) is BitFitSettings


# ---- optuna_cfg: the shape ----


def test_optuna_cfg_is_accepted_and_checked() -> None:
    search = {
        "n_trials": 30, "n_warmup_steps": 10, "sampler": {"name": "TPESampler", "seed": 3},
        "opt_params": {"coef_lr": {"range": [0.02, 0.5], "log": False}, "top_k": {"range": [2, 8]}},
    }  # fmt: skip
    config = load_config(None, {"optuna_cfg": search, "optuna_cfg.n_trials": 5}).optuna_cfg
    assert config is not None
    assert (config.n_trials, config.n_warmup_steps, config.sampler.name) == (5, 10, "TPESampler")
    assert config.opt_params["coef_lr"].range == (0.02, 0.5)
    assert load_config(None, {"optuna_cfg": None}).optuna_cfg is None


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"range": [0.5, 0.02]}, "the first value must be lower than the second"),
        ({"range": [0, 1], "log": True}, "log needs a range above 0"),
        ({"range": [1]}, "opt_params.x.range[1] is missing; it must be a number"),
        ({}, "give either range or choices"),
        ({"range": [1, 2], "choices": [1]}, "give either range or choices"),
        ({"range": [1, 2], "step": 0}, "opt_params.x.step is 0, but must be a number > 0"),
        ({"range": [1, 2], "step": 1, "log": True}, "log and step exclude each other"),
        ({"choices": [1], "log": True}, "log and step need a range"),
        ({"choices": []}, "must be a list of values, each a number, a text, true, false or null"),
        ({"choices": [[1]]}, "must be a list of values, each a number, a text, true, false or null"),
        ({"rnge": [1, 2]}, "there is no setting optuna_cfg.opt_params.x.rnge; the nearest is range"),
    ],
)
def test_optuna_cfg_refusals(space: Any, told: str) -> None:
    assert told in refusal(None, optuna_cfg={"opt_params": {"x": space}})


def test_optuna_cfg_without_parameters_or_with_an_unknown_sampler() -> None:
    assert "optuna_cfg.opt_params is missing" in refusal(None, **{"optuna_cfg.n_trials": 5})
    message = refusal(None, optuna_cfg={"opt_params": {}, "sampler": {"name": "TPE"}})
    assert "optuna_cfg.opt_params is {}" in message
    assert 'optuna_cfg.sampler.name is "TPE", but must be one of TPESampler' in message
