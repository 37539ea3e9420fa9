"""Checkpoints of whole retrievers, ours and others', under our names and as plain data.

Known are our own weights and adapters (safetensors), published AdaCLIP checkpoints (Hu et al. 2023: a pickle of
{arch, epoch, state_dict, config, optimizer}) and those of CLIP4Clip (Luo et al. 2022: a pickled state dict).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from adaclip_finetune.config import Chosen, Config
from adaclip_finetune.config.base import Role
from adaclip_finetune.config.layers import read_object
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.config.schema import show
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import parse_json
from adaclip_finetune.weights.clip_weights import NO_WEIGHTS, Weights
from adaclip_finetune.weights.published import to_our_names
from adaclip_finetune.weights.seen_settings import contradictions
from adaclip_finetune.weights.untrusted import read_untrusted, without_module_prefix

OWN_FORMAT = "adaclip-finetune/"
"""What the format of our files begins with; the number of the version follows."""
FORMAT = f"{OWN_FORMAT}1"
"""The format that this version reads and writes."""

# What decides the model, then what it sees, then how it learned.
_TOLD: tuple[Role, ...] = ("model", "view", "data", "optimisation", "method")


class Kind(Enum):
    """What a checkpoint is, in words."""

    OURS = "a checkpoint of ours"
    ADAPTER = "an adapter of ours"
    PUBLISHED = "a published AdaCLIP checkpoint"
    CLIP4CLIP = "a CLIP4Clip checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """`state` under our names; `settings` as stored (plain values; of other systems perhaps unknown ones); `metadata`
    of our own files."""

    path: Path
    kind: Kind
    state: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_foreign(self) -> bool:
        return self.kind in (Kind.PUBLISHED, Kind.CLIP4CLIP)

    @property
    def description(self) -> dict[str, Any]:
        """What a file of ours says of its CLIP: architecture, preprocessing, the pretrained weights it began with."""
        described = parse_json(self.metadata.get("clip", "{}"), f"resume: {self.path}, clip in its metadata")
        return described if isinstance(described, dict) else {}

    @property
    def method(self) -> str | None:
        """The PEFT method whose additions are among the tensors, not merged; None for plain tensors."""
        return self.metadata.get("method")

    def towers(self) -> Weights | None:
        """The CLIP inside; an adapter has only some of it: None."""
        if self.kind is Kind.ADAPTER:
            return None
        inside = {n.removeprefix("clip."): tensor for n, tensor in self.state.items() if n.startswith("clip.")}
        tokenizer, additions = self.path.parent / "tokenizer", self.method is not None
        return Weights(inside, f"resume: {self.path}", self.description, tokenizer, additions)

    def own_settings(self, folder: Path | None) -> dict[str, Any]:
        """The settings of the run in `folder`, else those in the file; without what was only a default and says
        nothing of the CLIP inside. Raises UserError."""
        path = None if folder is None else folder / "config.json"
        own = dict(self.settings) if path is None or not path.is_file() else read_object(path)
        told_otherwise = self.kind is not Kind.ADAPTER or own.get("clip_weights") or own.get("resume")
        if told_otherwise and own.get("clip_backbone") == Config.model_fields["clip_backbone"].default:
            # A default does not decide which CLIP it is: the tensors do, or the weights on disk.
            del own["clip_backbone"]
        return own


def read_checkpoint(path: Path) -> Checkpoint:
    """Read any of the known kinds; nothing in the file is run. Raises UserError, which tells the known kinds."""
    if path.is_dir():
        raise UserError(f"resume: {path} is a folder; give a weights file in it, such as {path / 'best.safetensors'}")
    if path.suffix == ".safetensors" and (metadata := _metadata(path)).get("format", "").startswith(OWN_FORMAT):
        if metadata.get("content") == "snapshot":
            raise UserError(f"resume: {path} belongs to a run that can go on: --resume {path.parent.parent}")
        kind = Kind.ADAPTER if metadata.get("content") == "adapter" else Kind.OURS
        settings = parse_json(metadata.get("config", "{}"), f"resume: {path}, config in its metadata")
        if not isinstance(settings, dict):
            raise UserError(f"resume: {path} has no settings in the config of its metadata")
        return Checkpoint(path, kind, read_untrusted(path), settings, metadata.get("epoch"), metadata)
    try:
        content = read_untrusted(path)
    except UserError as error:
        raise UserError(f"resume: {error}") from error
    return _foreign(path, content)


def with_its_clip(checkpoint: Checkpoint, config: Config) -> Config:
    """`config` with the CLIP that a checkpoint of ours was made with, where none is given.

    Shapes tell an architecture, but not its activation nor how its images are prepared: the stored settings do.
    Raises UserError where CLIP weights that are needed are not there.
    """
    if config.clip_weights is not None and not Path(config.clip_weights).exists():
        if checkpoint.kind is not Kind.OURS or not checkpoint.description:
            raise _lost(checkpoint, config.clip_weights)
        config = config.model_copy(update={"clip_weights": None})
    elif checkpoint.is_foreign or config.model_fields_set & {"clip_backbone", "clip_weights"}:
        return config
    stored = checkpoint.settings
    weights, backbone = stored.get("clip_weights"), stored.get("clip_backbone")
    if weights and Path(weights).exists():
        return config.model_copy(update={"clip_weights": weights})
    if checkpoint.kind is Kind.ADAPTER and weights:
        raise _lost(checkpoint, weights)
    if checkpoint.description and checkpoint.kind is not Kind.ADAPTER:
        return config  # it says itself what its CLIP is
    # Where weights came from a file or another checkpoint, the backbone may be a default that nobody meant.
    if backbone and not weights and not stored.get("resume"):
        return config.model_copy(update={"clip_backbone": backbone})
    return config


def check_version(checkpoint: Checkpoint) -> None:
    """Raise UserError for a file of ours from a version that wrote another format."""
    written = checkpoint.metadata.get("format", FORMAT)
    if written != FORMAT:
        raise UserError(f"resume: {checkpoint.path} has the format {written}; this version of adaclip reads {FORMAT}")


def check_settings(checkpoint: Checkpoint, config: Config) -> None:
    """Raise UserError naming the given settings that a foreign checkpoint's tensors contradict."""
    try:
        found = dict(contradictions(checkpoint.state, config))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"resume: {checkpoint.path} lacks tensors, or has them in strange shapes ({error})") from error
    if not found:
        return
    lines = [f"  {name} is {_plain(getattr(config, name))}, there {_choice(v)}" for name, v in found.items()]
    stored = {name: checkpoint.settings.get(name) for name in found}
    flags = [f"--{name} {_plain(stored[name] if stored[name] in v else v[0])}" for name, v in found.items() if v]
    raise UserError(
        f"resume: {checkpoint.path} is {checkpoint.kind.value}, and its tensors contradict these settings:\n"
        + "\n".join(lines)
        + f"\nTo load it: {' '.join(flags)}"
    )


def describe(checkpoint: Checkpoint, config: Config) -> str:
    """For the screen: what a checkpoint is, and which settings it was made with are others here."""
    epoch = "" if checkpoint.epoch in (None, "None") else f" of epoch {checkpoint.epoch}"
    what = f"resume: {checkpoint.path} is {checkpoint.kind.value}{epoch}"
    if not checkpoint.settings:
        return f"{what}; it holds no settings"
    rows = list(_differences(checkpoint, config))
    if not rows:
        return f"{what}; its settings are those given"
    width = max(len(name) for name, _, _ in rows)
    table = [f"  {name:{width}}  {_plain(stored)} → {_plain(given)}" for name, stored, given in rows]
    return "\n".join([f"{what}; of its settings these are others here (stored → given):", *table])


def _lost(checkpoint: Checkpoint, clip_weights: str) -> UserError:
    described, made_with = checkpoint.description, ""
    if source := described.get("source"):
        made_with = f" {checkpoint.path} was made with {source} (SHA-256 {described.get('digest', '')[:12]}…)."
    return UserError(
        f"clip_weights {clip_weights}: there is no such file or folder.{made_with} Say where the pretrained "
        "weights are with --clip_weights"
    )


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"resume: {path} cannot be read as safetensors: {error}") from error


def _foreign(path: Path, content: Any) -> Checkpoint:
    wrapped = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
    named = content["state_dict"] if wrapped else content
    if not isinstance(named, dict) or not named or not all(isinstance(tensor, Tensor) for tensor in named.values()):
        raise _unknown(path, "it holds no tensors by name")
    state = without_module_prefix(named)
    if "clip.logit_scale" not in state:
        alone = "; CLIP weights alone belong into clip_weights" if "logit_scale" in state else ""
        raise _unknown(path, f"it holds no clip.logit_scale{alone}")
    state = {name: tensor for name, tensor in state.items() if name.removeprefix("clip.") not in NO_WEIGHTS}
    try:
        ours = to_our_names(state)
    except UserError as error:
        raise _unknown(path, str(error)) from error
    settings = content.get("config") if wrapped else None
    epoch = content.get("epoch") if wrapped else None
    if isinstance(settings, dict):
        return Checkpoint(path, Kind.PUBLISHED, ours, dict(settings), None if epoch is None else str(epoch))
    if any(not name.startswith(("clip.", "transformerClip.", "frame_position_embeddings.")) for name in state):
        return Checkpoint(path, Kind.PUBLISHED, ours)
    header = "seqTransf" if any(name.startswith("header.") for name in ours) else "meanP"
    implied = {"use_policy": False, "sim_header": header, "frame_agg": None, "word_agg": None}
    return Checkpoint(path, Kind.CLIP4CLIP, ours, implied)


def _unknown(path: Path, why: str) -> UserError:
    return UserError(
        f"resume: {path} was not written by adaclip, and is of no other kind that is known here: {why}. Known are "
        "best.safetensors, last.safetensors and adapter.safetensors of a run of ours; published AdaCLIP checkpoints (a "
        "torch file of arch, epoch, state_dict, config, optimizer); CLIP4Clip checkpoints (a torch file of clip.* and, "
        "for seqTransf, transformerClip.* and frame_position_embeddings)"
    )


def _differences(checkpoint: Checkpoint, config: Config) -> Iterator[tuple[str, Any, Any]]:
    stored = checkpoint.settings
    # Where things lie and how fast they go is nobody else's business.
    known = {role: names_with(role, paths=False) for role in _TOLD}
    told = [name for names in known.values() for name in Config.model_fields if name in names]
    if checkpoint.kind is Kind.ADAPTER:
        # It brings no CLIP: which one lies under it is for the settings to say.
        told.insert(told.index("clip_backbone") + 1, "clip_weights")
    elif "clip_backbone" not in config.model_fields_set:
        # A default does not decide which CLIP it is: the tensors do.
        told.remove("clip_backbone")
    for name in told:
        there, here = stored.get(name), getattr(config, name)
        if isinstance(there, dict):  # a section: what it chooses is compared
            method, own = there.get("method"), here.method if isinstance(here, Chosen) else None
            if method is not None and method != own:
                yield f"{name}.method", method, own
        elif name in stored and not isinstance(here, Chosen) and _comparable(there) != _comparable(here):
            yield name, there, here


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _choice(possible: tuple[Any, ...]) -> str:
    return " or ".join(map(_plain, possible)) or "something that no setting leads to"


def _plain(value: Any) -> str:
    """As a flag would say it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return value if isinstance(value, str) else show(value)
