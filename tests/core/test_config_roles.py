"""Lists of setting names are derived from roles, so that a new setting is in the right ones."""

import json
from pathlib import Path
from typing import get_args

import pytest
from pydantic.fields import FieldInfo

from adaclip_finetune.compare.options import AS_IT_IS, overridable
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.base import OnResume, Role, setting
from adaclip_finetune.config.optuna import OptunaSettings
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.config.roles import deciding_vectors, names_with, on_resume
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.retrieval import deciding_settings
from adaclip_finetune.tuning.space import build_space, tunable

ROLES = get_args(Role)
PATHS = names_with(*ROLES, paths=True)


def test_every_setting_has_one_role() -> None:
    by_role = {role: names_with(role) for role in ROLES}
    assert sum(map(len, by_role.values())) == len(Config.model_fields)
    assert frozenset().union(*by_role.values()) == set(Config.model_fields)
    assert all(by_role.values())
    assert names_with(*ROLES, of=OptunaSettings) == set(OptunaSettings.model_fields)


def test_every_path_has_a_unit_of_files_or_folders_and_is_in_no_fingerprint() -> None:
    ends = ("_dir", "_annot", "_weights")
    assert {name for name in Config.model_fields if name.endswith(ends)} | {
        "resume",
        "save_similarity",
        "embedding_cache",
    } == PATHS
    assert not PATHS & (deciding_vectors() | deciding_settings() | tunable())


@pytest.mark.parametrize(
    ("role", "unit", "lists"),
    [
        ("model", None, {"index", "evaluation", "same on resume", "tunable"}),
        ("model", "file", {"free on resume", "overridable"}),
        ("machine", None, {"free on resume", "overridable"}),
        ("method", None, {"same on resume", "tunable"}),
        ("optimisation", None, {"same on resume", "tunable"}),
    ],
)
def test_a_new_setting_is_in_the_lists_of_its_role(
    monkeypatch: pytest.MonkeyPatch, role: Role, unit: str | None, lists: set[str]
) -> None:
    field: FieldInfo = setting(1, "a setting of this test", role=role, unit=unit)
    field.annotation = int
    monkeypatch.setitem(Config.model_fields, "new", field)
    found = {
        "index": deciding_vectors(),
        "evaluation": deciding_settings(),
        "same on resume": on_resume("same"),
        "free on resume": on_resume("free"),
        "tunable": tunable(),
        "overridable": overridable(),
    }
    assert {name for name, names in found.items() if "new" in names} == lists


def test_what_may_change_where_a_run_goes_on() -> None:
    assert on_resume("free") == {
        "train_annot", "val_annot", "test_annot", "frames_dir", "video_dir", "clip_weights", "policy_weights",
        "num_workers", "pin_mem", "n_display", "save_every_steps", "device", "xpu", "debug", "tracker",
        "embedding_cache",
    }  # fmt: skip
    assert on_resume("ignored") == {"resume", "auto_batch_size"}
    rounding = {"precision", "tf32", "deterministic", "gradient_checkpointing", "grad_cache_chunk", "val_batch_size"}
    rounding |= {"compile"}
    assert names_with("machine") & on_resume("same") == rounding
    assert sum(len(on_resume(answer)) for answer in get_args(OnResume)) == len(Config.model_fields)


def test_a_run_goes_on_with_its_own_model_and_other_workers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"top_k": 3}))
    given = {"resume": str(tmp_path), "num_workers": 0, "auto_batch_size": True}
    config = continued_config(load_config(None, given))
    assert (config.top_k, config.num_workers, config.auto_batch_size) == (3, 0, False)
    with pytest.raises(UserError, match="top_k is 4, but 3 in the run"):
        continued_config(load_config(None, {"resume": str(tmp_path), "top_k": 4}))


def test_what_an_evaluation_fixes_cannot_be_given_to_it() -> None:
    assert not overridable() & (AS_IT_IS.keys() | {"resume", "train_annot", "val_annot", "test_annot"})
    assert overridable() >= {"frames_dir", "video_dir", "clip_weights", "img_tmpl", "skip_missing", "device", "debug"}


@pytest.mark.parametrize("name", sorted(set(Config.model_fields) - tunable()))
def test_what_is_no_hyper_parameter_is_not_tuned(name: str) -> None:
    tuning = {"opt_params": {name: {"choices": [1, 2]}}}
    with pytest.raises(UserError, match=r"same in all trials|not a single value"):
        build_space(load_config(None, {"optuna_cfg": tuning}))
