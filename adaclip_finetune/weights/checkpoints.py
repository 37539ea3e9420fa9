"""Checkpoints of whole retrievers, ours and others', under our names and as plain data.

Known are our own weights and adapters (safetensors), and those of the systems in `published.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from adaclip_finetune.config import Config
from adaclip_finetune.config.layers import read_object
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.errors import NotACheckpoint, UserError
from adaclip_finetune.strict_json import parse_json
from adaclip_finetune.weights.clip_weights import Weights
from adaclip_finetune.weights.published import read_published
from adaclip_finetune.weights.safe import read_untrusted

OWN_FORMAT = "adaclip-finetune/"
"""What the format of our files begins with; the number of the version follows."""
FORMAT = f"{OWN_FORMAT}1"
"""The format that this version reads and writes."""


class Kind(Enum):
    """The kinds of checkpoint, in words."""

    OURS = "a checkpoint of ours"
    ADAPTER = "an adapter of ours"
    PUBLISHED = "a published checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: tensors under our names, settings as they are stored, and metadata of our files.

    The settings of another system may include names that are unknown here.
    """

    path: Path
    kind: Kind
    state: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    system: str | None = None  # that wrote a published checkpoint

    @property
    def is_foreign(self) -> bool:
        """Whether another system wrote the checkpoint."""
        return self.kind is Kind.PUBLISHED

    @property
    def kind_in_words(self) -> str:
        """What the checkpoint is, for messages."""
        return f"a published {self.system or 'AdaCLIP'} checkpoint" if self.is_foreign else self.kind.value

    @property
    def description(self) -> dict[str, Any]:
        """What a file of ours says about its CLIP: architecture, preprocessing and the pretrained weights."""
        return _object(self.metadata, "clip", self.path)

    @property
    def method(self) -> str | None:
        """The PEFT method whose additions are among the tensors, not merged; None for plain tensors."""
        return self.metadata.get("method")

    def towers(self) -> Weights | None:
        """Return the CLIP in the checkpoint; None for an adapter, which has only a part of it."""
        if self.kind is Kind.ADAPTER:
            return None
        inside = {n.removeprefix("clip."): tensor for n, tensor in self.state.items() if n.startswith("clip.")}
        tokenizer, additions = f"local-dir:{self.path.parent / 'tokenizer'}", self.method is not None
        return Weights(inside, f"resume: {self.path}", self.description, tokenizer, additions)

    def own_settings(self, folder: Path | None) -> dict[str, Any]:
        """Return the settings of the run in `folder`, or those in the file if there is no folder with settings."""
        path = None if folder is None else folder / "config.json"
        return dict(self.settings) if path is None or not path.is_file() else read_object(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of any known kind, as data. Raise UserError, which lists the known kinds, for another file."""
    if path.is_dir():
        raise UserError(f"resume: {path} is a folder; give a weights file in it, such as {path / 'best.safetensors'}")
    try:
        content, metadata = read_untrusted(path)
    except UserError as error:
        raise UserError(f"resume: {error}") from error
    written = metadata.get("format", "")
    if not written.startswith(OWN_FORMAT):
        return _foreign(path, content)
    if written != FORMAT:
        raise UserError(f"resume: {path} has the format {written}; this version of adaclip reads {FORMAT}")
    if metadata.get("content") == "snapshot":
        raise UserError(f"resume: {path} belongs to a run that can continue: --resume {path.parent.parent}")
    kind = Kind.ADAPTER if metadata.get("content") == "adapter" else Kind.OURS
    settings = _object(metadata, "config", path)
    is_default = settings.get("clip_backbone") == Config.model_fields["clip_backbone"].default
    if is_default and (settings.get("clip_weights") or settings.get("resume")):
        del settings["clip_backbone"]  # nobody chose the default, and it is not the CLIP of this checkpoint
    return Checkpoint(path, kind, content, settings, metadata.get("epoch"), metadata)


def with_its_clip(checkpoint: Checkpoint, config: Config) -> Config:
    """Return the config with the settings that say which CLIP belongs to the checkpoint. Given settings come first.

    A whole checkpoint of ours describes its CLIP itself: `clip_weights` are only where zero-shot comes from, and may be
    gone. An adapter needs `clip_weights` or `clip_backbone`: the given ones, or those that it was trained with. Raise
    UserError if CLIP weights that are needed are not there.
    """
    described = checkpoint.kind is Kind.OURS and bool(checkpoint.description)
    stored = {} if checkpoint.is_foreign else checkpoint.settings
    given = config.model_fields_set & {"clip_backbone", "clip_weights"}
    weights = config.clip_weights if given else stored.get("clip_weights")
    if weights and not Path(weights).exists():
        if not described:
            raise UserError(
                f"clip_weights {weights}: no such file or folder. Say where the pretrained weights are that "
                f"{checkpoint.path} was made with ({checkpoint.description.get('source', weights)}) with --clip_weights"
            )
        weights = None
    if weights != config.clip_weights:
        return config.model_copy(update={"clip_weights": weights})
    backbone = stored.get("clip_backbone")
    if backbone and not (described or given or stored.get("clip_weights")):
        return config.model_copy(update={"clip_backbone": backbone})
    return config


def describe(checkpoint: Checkpoint, config: Config) -> str:
    """Return what the checkpoint is, which settings of its model differ from the config, and flags that keep them."""
    epoch = "" if checkpoint.epoch in (None, "None") else f" of epoch {checkpoint.epoch}"
    what = f"resume: {checkpoint.path} is {checkpoint.kind_in_words}{epoch}"
    if not (found := _differences(checkpoint, config)):
        return f"{what}; {'its settings are those given' if checkpoint.settings else 'it holds no settings'}"
    lines = [f"  {name} is {here}, there {there}" for name, (there, here) in found.items()]
    flags = " ".join(f"--{name} {there}" for name, (there, _) in found.items())
    keep = f"To keep those of the checkpoint, as flags or in --config FILE: {flags}"
    return "\n".join([f"{what}; these settings of its model are different here:", *lines, keep])


def _foreign(path: Path, content: Any) -> Checkpoint:
    try:
        found = read_published(path, content)
    except UserError as error:
        raise NotACheckpoint(
            f"resume: {path} was not written by adaclip, nor is it a published checkpoint: {error}. Known are "
            "best.safetensors, last.safetensors and adapter.safetensors of a run of ours, and torch files of AdaCLIP, "
            "CLIP4Clip, CLIP-ViP, CenterCLIP and DGL"
        ) from error
    return Checkpoint(path, Kind.PUBLISHED, found.state, found.settings, found.epoch, system=found.system)


def _object(metadata: dict[str, str], name: str, path: Path) -> dict[str, Any]:
    found = parse_json(metadata.get(name, "{}"), f"resume: {path}, {name} in its metadata")
    if not isinstance(found, dict):
        raise UserError(f"resume: {path}: {name} in its metadata is not a JSON object")
    return found


def _differences(checkpoint: Checkpoint, config: Config) -> dict[str, tuple[str, str]]:
    """Return the settings of the model that differ: name → the stored value and that of the config, as flags have them.

    Paths are left out, because where things lie says nothing about the model. Of a section, the choices are compared.
    """
    compared = set(names_with("model", "view", "method", paths=False))
    if checkpoint.kind is Kind.ADAPTER:
        compared.add("clip_weights")  # the CLIP under an adapter is the one that the settings name
    elif "clip_backbone" not in config.model_fields_set:
        compared.discard("clip_backbone")
    given, found = config.model_dump(mode="json"), {}
    for name in (name for name in given if name in compared and name in checkpoint.settings):
        there, here = checkpoint.settings[name], given[name]
        if isinstance(here, dict):
            there = there if isinstance(there, dict) else {}
            method, config_there = there.get("method", here["method"]), there.get("config")
            if method == here["method"] and isinstance(config_there, dict):
                for key, value in here["config"].items():
                    if key in config_there and config_there[key] != value:
                        found[f"{name}.config.{key}"] = _as_flag(config_there[key]), _as_flag(value)
            name, there, here = f"{name}.method", method, here["method"]
        if there != here and _as_flag(there) != _as_flag(here):
            found[name] = _as_flag(there), _as_flag(here)
    return found


def _as_flag(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(map(_as_flag, value))
    return value if isinstance(value, str) else json.dumps(value, default=repr)
