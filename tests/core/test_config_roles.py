"""Every list of setting names is made from roles: a new setting is in the right ones as soon as it says its role."""

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
from adaclip_finetune.config.roles import deciding_vectors, is_path, names_with, on_resume, rounding
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.retrieval import _deciding_settings
from adaclip_finetune.tuning.space import build_space, tunable

ROLES = get_args(Role)
PATHS = names_with(*ROLES, paths=True)


def add(monkeypatch: pytest.MonkeyPatch, name: str, role: Role, unit: str | None = None) -> None:
    """Give `Config` one more setting, a whole number."""
    field: FieldInfo = setting(1, "a setting of this test", role=role, unit=unit)
    field.annotation = int
    monkeypatch.setitem(Config.model_fields, name, field)


# ---- what roles are ----


def test_every_setting_has_one_role() -> None:
    by_role = {role: names_with(role) for role in ROLES}
    assert sum(map(len, by_role.values())) == len(Config.model_fields)
    assert frozenset().union(*by_role.values()) == set(Config.model_fields)
    assert all(by_role.values())
    assert names_with(*ROLES, of=OptunaSettings) == set(OptunaSettings.model_fields)


def test_every_path_has_a_unit_of_files_or_folders() -> None:
    ends = ("_dir", "_annot", "_weights")
    assert {name for name in Config.model_fields if name.endswith(ends)} | {"resume", "save_similarity"} == PATHS


# ---- what follows ----


def test_a_new_setting_of_the_model_is_in_every_list_that_the_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "width_of_it", "model")
    assert "width_of_it" in deciding_vectors()  # the fingerprint of an index
    assert "width_of_it" in _deciding_settings()  # finished parts of an evaluation
    assert "width_of_it" in on_resume("same")
    assert "width_of_it" in tunable()
    assert "width_of_it" not in overridable()


def test_a_new_path_of_the_model_may_change_and_is_in_no_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "weights_of_it", "model", unit="file")
    assert is_path("weights_of_it")
    assert "weights_of_it" not in deciding_vectors() | _deciding_settings() | tunable()
    assert "weights_of_it" in on_resume("free") & overridable()


def test_a_new_setting_of_the_machine_is_nobody_else_s_business(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "threads", "machine")
    assert "threads" not in deciding_vectors() | _deciding_settings() | tunable()
    assert "threads" in on_resume("free") & overridable()


@pytest.mark.parametrize("role", ["method", "optimisation"])
def test_a_new_setting_of_the_training_does_not_decide_a_trained_model(
    monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    add(monkeypatch, "how", role)
    assert "how" in on_resume("same") & tunable()
    assert "how" not in deciding_vectors() | _deciding_settings() | overridable()


def test_a_path_is_never_part_of_a_fingerprint() -> None:
    assert not PATHS & (deciding_vectors() | _deciding_settings() | tunable())


# ---- the lists as they are ----


def test_what_may_change_where_a_run_goes_on() -> None:
    assert on_resume("free") == {
        "train_annot", "val_annot", "test_annot", "frames_dir", "video_dir", "clip_weights", "policy_weights",
        "num_workers", "pin_mem", "n_display", "save_every_steps", "device", "xpu", "debug",
    }  # fmt: skip
    assert on_resume("ignored") == {"resume", "auto_batch_size"}
    assert sum(len(on_resume(answer)) for answer in get_args(OnResume)) == len(Config.model_fields)


def test_what_rounds() -> None:
    assert rounding() == {"precision", "tf32", "deterministic", "gradient_checkpointing", "val_batch_size"}


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
    search = {"opt_params": {name: {"choices": [1, 2]}}}
    with pytest.raises(UserError, match=r"same in all trials|not a single value"):
        build_space(load_config(None, {"optuna_cfg": search}))
