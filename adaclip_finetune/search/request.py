"""What is asked of an index, and what its index.json will say if the folder may become that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from adaclip_finetune.config.roles import names_with
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.about import About
from adaclip_finetune.search.retriever import Retriever
from adaclip_finetune.search.videos import Source


@dataclass(frozen=True)
class Request:
    """Kind and dtype None: as it is, or else flat and float32. `settings`: what the model's run does not tell, or tells
    otherwise."""

    kind: str | None = None
    dtype: str | None = None
    sync: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def about_for(model: Retriever, source: Source, request: Request, old: About | None, folder: Path) -> About:
    """`old` is what the folder's index says. Raises UserError if that is the index of something else."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if old is not None:
        _check_same(model, source, request, old, folder)
    # Where an index is made says nothing of where it will be searched.
    machine = names_with("machine")
    settings = {name: value for name, value in request.settings.items() if name not in machine}
    if model.config.clip_weights is not None:
        settings["clip_weights"] = str(Path(model.config.clip_weights).absolute())
    if source.img_tmpl is not None:
        settings["img_tmpl"] = source.img_tmpl
    return About(
        fingerprint=model.fingerprint,
        run=str(model.source.absolute()),
        settings=settings,
        source=str(source.name),
        root=str(source.root),
        kind=request.kind or (old.kind if old else "flat"),
        dtype=request.dtype or (old.dtype if old else "float32"),
        made=old.made if old else now,
        changed=now,
    )


def _check_same(model: Retriever, source: Source, request: Request, about: About, folder: Path) -> None:
    if about.fingerprint != model.fingerprint:
        raise UserError(
            f"-o {folder}: is an index made with another model ({about.run}); give another name, or remove it"
        )
    if about.source != str(source.name) and Path(about.source).exists() and not request.sync:
        raise UserError(
            f"-o {folder}: is the index of {about.source}; give another name for that of {source.name}, or --sync to "
            "drop what is not there"
        )
    if about.dtype == "float16" and request.dtype == "float32":
        raise UserError(
            f"-o {folder}: holds float16, and what was rounded away cannot be had back; give another name, or remove it"
        )
