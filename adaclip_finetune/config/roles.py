"""Lists of setting names, made from what each setting says of itself: its role, its unit, `on_resume`."""

from __future__ import annotations

from typing import Any

from adaclip_finetune.config.base import OnResume, Role, Settings
from adaclip_finetune.config.settings import Config


def names_with(*roles: Role, paths: bool | None = None, of: type[Settings] = Config) -> frozenset[str]:
    """Return the names of the settings that have one of the roles; with `paths`, only those that are paths, or are
    none."""
    return frozenset(
        name for name in of.model_fields if _facts(name, of).get("role") in roles and paths in (None, is_path(name, of))
    )


def is_path(name: str, of: type[Settings] = Config) -> bool:
    """Return whether the value of a setting is the path of a file or folder."""
    return str(_facts(name, of).get("unit", "")).startswith(("file", "folder"))


def on_resume(what: OnResume) -> frozenset[str]:
    """Return the names of the settings that are free, must be the same or are ignored where a run goes on.

    Where a setting does not say so itself, it is free if it tells where an input lies or is of the machine, since
    nothing that the run computes depends on it.
    """
    free = names_with("data", "model", paths=True) | names_with("machine")
    told = {
        name: _facts(name, Config).get("on_resume", "free" if name in free else "same") for name in Config.model_fields
    }
    return frozenset(name for name, answer in told.items() if answer == what)


def deciding_vectors() -> frozenset[str]:
    """Return the names of the settings that decide the vector of a video or a text, beside the weights.

    Paths are not among them: files are known by what is in them.
    """
    return names_with("view", "model", paths=False)


def rounding() -> frozenset[str]:
    """Return the names of the settings of the machine that change the last bits of what is computed."""
    return names_with("machine") & on_resume("same")


def _facts(name: str, of: type[Settings]) -> dict[str, Any]:
    extra = of.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}
