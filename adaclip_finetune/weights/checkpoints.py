"""Checkpoints of whole retrievers, ours and others', under our names and as plain data.

Four kinds are known: our own weights and adapters (safetensors), published AdaCLIP checkpoints (Hu et al. 2023: a
pickle of {arch, epoch, state_dict, config, optimizer}) and those of CLIP4Clip (Luo et al. 2022: a pickled state dict).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from adaclip_finetune.config import Chosen, Config
from adaclip_finetune.config.base import Role
from adaclip_finetune.config.layers import read_object
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.config.schema import show
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json
from adaclip_finetune.weights.clip_weights import NO_WEIGHTS, Weights
from adaclip_finetune.weights.published import contradictions, to_our_names
from adaclip_finetune.weights.safe import named_tensors, read_untrusted

OWN_FORMAT = "adaclip-finetune/"
"""What the format of our files begins with; the number of the version follows."""
FORMAT = f"{OWN_FORMAT}1"
"""The format that this version reads and writes."""

# The settings that `describe` compares, by role: those of the model first.
_COMPARED: tuple[Role, ...] = ("model", "view", "data", "optimisation", "method")


class Kind(Enum):
    """The kinds of checkpoint, in words."""

    OURS = "a checkpoint of ours"
    ADAPTER = "an adapter of ours"
    PUBLISHED = "a published AdaCLIP checkpoint"
    CLIP4CLIP = "a CLIP4Clip checkpoint"


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

    @property
    def is_foreign(self) -> bool:
        """Whether another system wrote the checkpoint."""
        return self.kind in (Kind.PUBLISHED, Kind.CLIP4CLIP)

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
        tokenizer, additions = self.path.parent / "tokenizer", self.method is not None
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
    if not metadata.get("format", "").startswith(OWN_FORMAT):
        return _foreign(path, content)
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
            about, made_with = checkpoint.description, ""
            if source := about.get("source"):
                made_with = f" {checkpoint.path} was made with {source} (SHA-256 {about.get('digest', '')[:12]}…)."
            raise UserError(
                f"clip_weights {weights}: no such file or folder.{made_with} Say where the pretrained weights are with "
                "--clip_weights"
            )
        weights = None
    if weights != config.clip_weights:
        return config.model_copy(update={"clip_weights": weights})
    backbone = stored.get("clip_backbone")
    if backbone and not (described or given or stored.get("clip_weights")):
        return config.model_copy(update={"clip_backbone": backbone})
    return config


def check_version(checkpoint: Checkpoint) -> None:
    """Raise UserError for a file of ours that another version of adaclip wrote in another format."""
    written = checkpoint.metadata.get("format", FORMAT)
    if written != FORMAT:
        raise UserError(f"resume: {checkpoint.path} has the format {written}; this version of adaclip reads {FORMAT}")


def check_settings(checkpoint: Checkpoint, config: Config) -> None:
    """Raise UserError naming the settings that the tensors of the checkpoint contradict, and the flags to give."""
    try:
        found = dict(contradictions(checkpoint.state, config))
    except (KeyError, IndexError) as error:
        problem = (
            f"lacks the tensor {error}" if isinstance(error, KeyError) else f"has a tensor of another shape: {error}"
        )
        raise UserError(f"resume: {checkpoint.path} {problem}") from error
    if not found:
        return
    there = {name: " or ".join(map(_plain, v)) or "something that no setting leads to" for name, v in found.items()}
    lines = [f"  {name} is {_plain(getattr(config, name))}, there {choice}" for name, choice in there.items()]
    stored = {name: checkpoint.settings.get(name) for name in found}
    flags = [f"--{name} {_plain(stored[name] if stored[name] in v else v[0])}" for name, v in found.items() if v]
    raise UserError(
        f"resume: {checkpoint.path} is {checkpoint.kind.value}, and its tensors contradict these settings:\n"
        + "\n".join(lines)
        + f"\nTo load it: {' '.join(flags)}"
    )


def describe(checkpoint: Checkpoint, config: Config) -> str:
    """Return in words what the checkpoint is, and which of the settings it was made with differ from the config."""
    epoch = "" if checkpoint.epoch in (None, "None") else f" of epoch {checkpoint.epoch}"
    what = f"resume: {checkpoint.path} is {checkpoint.kind.value}{epoch}"
    rows = list(_differences(checkpoint, config))
    if not rows:
        return f"{what}; {'its settings are those given' if checkpoint.settings else 'it holds no settings'}"
    width = max(len(name) for name, _, _ in rows)
    table = [f"  {name:{width}}  {_plain(stored)} → {_plain(given)}" for name, stored, given in rows]
    return "\n".join([f"{what}; these of its settings are different here (stored → given):", *table])


def _foreign(path: Path, content: Any) -> Checkpoint:
    state = {n: t for n, t in named_tensors(content).items() if n.removeprefix("clip.") not in NO_WEIGHTS}
    if "clip.logit_scale" not in state:
        alone = "; CLIP weights alone belong into clip_weights" if "logit_scale" in state else ""
        raise _unknown(path, f"it holds no clip.logit_scale{alone}" if state else "it holds no tensors by name")
    try:
        ours = to_our_names(state)
    except UserError as error:
        raise _unknown(path, str(error)) from error
    settings, epoch = content.get("config"), content.get("epoch")
    if isinstance(settings, dict):
        return Checkpoint(path, Kind.PUBLISHED, ours, dict(settings), None if epoch is None else str(epoch))
    if any(not name.startswith(("clip.", "transformerClip.", "frame_position_embeddings.")) for name in state):
        return Checkpoint(path, Kind.PUBLISHED, ours)
    header = "seqTransf" if any(name.startswith("header.") for name in ours) else "meanP"
    implied = {"use_policy": False, "sim_header": header, "frame_agg": None, "word_agg": None}
    return Checkpoint(path, Kind.CLIP4CLIP, ours, implied)


def _unknown(path: Path, why: str) -> UserError:
    return UserError(
        f"resume: {path} was not written by adaclip, and is not of another kind that is known here: {why}. Known are "
        "best.safetensors, last.safetensors and adapter.safetensors of a run of ours; published AdaCLIP checkpoints (a "
        "torch file of arch, epoch, state_dict, config, optimizer); CLIP4Clip checkpoints (a torch file of clip.* and, "
        "for seqTransf, transformerClip.* and frame_position_embeddings)"
    )


def _object(metadata: dict[str, str], name: str, path: Path) -> dict[str, Any]:
    found = parse_json(metadata.get(name, "{}"), f"resume: {path}, {name} in its metadata")
    if not isinstance(found, dict):
        raise UserError(f"resume: {path}: {name} in its metadata is not a JSON object")
    return found


def _differences(checkpoint: Checkpoint, config: Config) -> Iterator[tuple[str, Any, Any]]:
    stored = checkpoint.settings
    # Paths are left out: where things lie says nothing about the model.
    by_role = [names_with(role, paths=False) for role in _COMPARED]
    compared = [name for names in by_role for name in Config.model_fields if name in names]
    if checkpoint.kind is Kind.ADAPTER:
        # The CLIP under an adapter is the one that the settings name.
        compared.insert(compared.index("clip_backbone") + 1, "clip_weights")
    elif "clip_backbone" not in config.model_fields_set:
        compared.remove("clip_backbone")
    for name in compared:
        there, here = stored.get(name), getattr(config, name)
        if isinstance(there, dict):  # a section: the choices are compared
            name, there, here = f"{name}.method", there.get("method"), here.method if isinstance(here, Chosen) else None
            differs = there is not None and there != here
        else:
            there = tuple(there) if isinstance(there, list) else there
            differs = name in stored and not isinstance(here, Chosen) and there != here
        if differs:
            yield name, there, here


def _plain(value: Any) -> str:
    """Return a value as a flag has it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return value if isinstance(value, str) else show(value)
