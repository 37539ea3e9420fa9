"""Lists of setting names, derived from the role, unit and `on_resume` of each setting."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adaclip_finetune.config.base import OnResume, Role, Settings
from adaclip_finetune.config.settings import Config


def names_with(*roles: Role, paths: bool | None = None, of: type[Settings] = Config) -> frozenset[str]:
    """Return the names of the settings with one of the roles; `paths` keeps only those that are (not) paths."""
    facts = {name: _facts(name, of) for name in of.model_fields}
    return frozenset(
        name
        for name, fact in facts.items()
        if fact.get("role") in roles and paths in (None, fact.get("unit", "").startswith(("file", "folder")))
    )


def on_resume(what: OnResume) -> frozenset[str]:
    """Return the names of the settings that are free, must be the same, or are ignored when a run is resumed.

    A setting without `on_resume` is free if it is the path of an input or a setting of the machine, because the
    results of the run do not depend on it.
    """
    free = names_with("data", "model", paths=True) | names_with("machine")
    answers = {name: _facts(name, Config).get("on_resume") for name in Config.model_fields}
    return frozenset(n for n, answer in answers.items() if (answer or ("free" if n in free else "same")) == what)


def deciding_vectors() -> frozenset[str]:
    """Return the names of the settings that, with the weights, determine the vector of a video or a text.

    Paths are not included, because files are identified by their content.
    """
    return names_with("view", "model", paths=False)


def deciding_values(config: Config, annotations: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings on which the figures of a run depend, for JSON.

    A digest of the content of each annotation that is named (`train_annot`, …) is added.
    """
    free = names_with("run") - {"resume"} | names_with("machine") - on_resume("same")
    found: dict[str, Any] = config.model_dump(mode="json", exclude=set(free))
    for name in annotations:
        parts = found[name] if isinstance(found[name], list) else [{"annotation": found[name]}]
        digests = [_digest(Path(part["annotation"])) for part in parts]
        found[f"the content of {name}"] = digests[0] if isinstance(found[name], str) else digests
    return found


def _digest(path: Path) -> str:
    """Return a digest of the content of a file, or of the names and sizes of the tar shards or videos in a folder."""
    digest = hashlib.sha256()
    if path.is_dir():
        files = sorted(path.glob("*.tar")) or sorted(file for file in path.rglob("*") if file.is_file())
        digest.update(repr([(str(file.relative_to(path)), file.stat().st_size) for file in files]).encode())
    else:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _facts(name: str, of: type[Settings]) -> dict[str, Any]:
    extra = of.model_fields[name].json_schema_extra
    return extra if isinstance(extra, dict) else {}
