"""Lists of setting names, derived from the role, unit and `on_resume` of each setting."""

from __future__ import annotations

from typing import Any

from adaclip_finetune.config.base import OnResume, Role, Settings
from adaclip_finetune.config.settings import Config


def names_with(*roles: Role, paths: bool | None = None, of: type[Settings] = Config) -> frozenset[str]:
    """Return the names of the settings with one of the roles; `paths` keeps only those that are (not) paths."""
    return frozenset(
        name for name in of.model_fields if _facts(name, of).get("role") in roles and paths in (None, is_path(name, of))
    )


def is_path(name: str, of: type[Settings] = Config) -> bool:
    """Return whether the value of a setting is the path of a file or folder."""
    return str(_facts(name, of).get("unit", "")).startswith(("file", "folder"))


def on_resume(what: OnResume) -> frozenset[str]:
    """Return the names of the settings that are free, must be the same, or are ignored when a run is resumed.

    A setting without `on_resume` is free if it is the path of an input or a setting of the machine, because the
    results of the run do not depend on it.
    """
    free = names_with("data", "model", paths=True) | names_with("machine")
    answers = {
        name: _facts(name, Config).get("on_resume", "free" if name in free else "same") for name in Config.model_fields
    }
    return frozenset(name for name, answer in answers.items() if answer == what)


def deciding_vectors() -> frozenset[str]:
    """Return the names of the settings that, with the weights, determine the vector of a video or a text.

    Paths are not included, because files are identified by their content.
    """
    return names_with("view", "model", paths=False)


def rounding() -> frozenset[str]:
    """Return the names of the settings of the machine that change rounding."""
    return names_with("machine") & on_resume("same")


def _facts(name: str, of: type[Settings]) -> dict[str, Any]:
    extra = of.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}
