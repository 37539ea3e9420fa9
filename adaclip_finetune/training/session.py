"""The one way to a model: `open_model`, which every command uses.

plain CLIP ─► method.attach ─► retriever ─► fill ─► method.choose
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.flops import Gflops, count_gflops
from adaclip_finetune.model.frame_features import FrozenClipBackbone
from adaclip_finetune.model.norms import split_frozen_norms
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives import Objective, build_objective
from adaclip_finetune.peft import PeftMethod, TrainableReport, build_method, choose_what_learns, trainable_report
from adaclip_finetune.processes import world_size
from adaclip_finetune.training.device import describe_device, make_accelerator
from adaclip_finetune.training.memory import sizes_explained
from adaclip_finetune.training.optimizer import NOTHING_LEARNS
from adaclip_finetune.weights.checkpoints import (
    Checkpoint,
    Kind,
    check_settings,
    check_version,
    read_checkpoint,
    with_its_clip,
)
from adaclip_finetune.weights.clip_weights import build_towers, find_towers, load_clip, load_pretrained
from adaclip_finetune.weights.digest import weights_digest
from adaclip_finetune.weights.loaded import LoadedClip, ensure_logit_bias, has_new_logit_bias
from adaclip_finetune.weights.plain import plain_state, strict_load

Values = Literal["real", "random", "meta"]


@dataclass
class Session:
    """A model, and what learns in it. `config` is completed by what the checkpoint tells."""

    config: Config
    accelerator: Accelerator | None
    loaded: LoadedClip
    model: VideoRetriever
    method: PeftMethod
    objective: Objective
    checkpoint: Checkpoint | None
    pretrained_digest: str | None = None  # of CLIP before anything was added or learned, in a run that starts from it
    parameters: TrainableReport = field(init=False)

    def __post_init__(self) -> None:
        self.recount()

    def recount(self) -> None:
        """Count again what learns, after the method changed it."""
        self.parameters = trainable_report(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision, within which the model is called."""
        if self.accelerator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    @cached_property
    def gflops(self) -> Gflops:
        """What a video costs, counted on shapes alone."""
        return count_gflops(self.model, self.config.num_frm)

    def describe(self) -> str:
        """For the screen: device, CLIP, what learns, what a video costs."""
        c = self.config
        return (
            f"device {self.where()}, {c.precision}   CLIP {self.loaded.source}   seed {c.seed}\n"
            f"method {c.peft.method}\n{self.parameters}\n{self.gflops}"
        )

    def where(self) -> str:
        """The device, and how many processes there are, in words."""
        return describe_device(self.device) + (f", {world_size()} processes" if world_size() > 1 else "")

    def use(self, config: Config) -> None:
        """Continue with other settings of the method, such as batch sizes, which concern nothing that it attached; what
        learns is chosen anew."""
        self.config = config
        self.method = build_method(config)
        _choose(self)

    def pretrained(self) -> LoadedClip:
        """CLIP as it was before anything learned: the session's own at its start, a fresh one for a checkpoint.

        Raises UserError where it is not at hand.
        """
        return self.loaded if self.checkpoint is None else load_pretrained(self.config, self.loaded)

    def description(self) -> dict[str, str]:
        """What a checkpoint of this session says beside its tensors, as metadata of safetensors."""
        described: dict[str, Any] = dict(self.loaded.description)
        if self.pretrained_digest is not None:
            described |= {"source": self.loaded.source, "digest": self.pretrained_digest}
        about = {"config": self.config.model_dump_json(), "clip": json.dumps(described)}
        about["parameters"] = json.dumps(self.parameters.as_dict())
        if not self.method.mergeable:
            about["method"] = self.config.peft.method
        return about


@sizes_explained
def open_model(
    config: Config,
    checkpoint: Checkpoint | None = None,
    values: Values = "real",
    accelerator: Accelerator | None = None,
    learn: bool = True,
) -> Session:
    """The model of a config, filled from `checkpoint` (default: that of `config.resume`), with what learns chosen.

    `values` says what weights that would have to be fetched are instead: random, or shapes alone on the meta device.
    Without an `accelerator` the model stays on the CPU. Without `learn` nothing is attached to CLIP unless the
    checkpoint needs it, and `parameters` tells what learned. Raises UserError, the same for every command.
    """
    checkpoint = checkpoint or (read_checkpoint(Path(config.resume)) if config.resume else None)
    if checkpoint is not None:
        config = with_its_clip(checkpoint, config)
        if checkpoint.is_foreign:
            check_settings(checkpoint, config)
        check_version(checkpoint)
    # A checkpoint brings the weights of the selector's CNN too, so that none need be fetched.
    cnn_is_random = checkpoint is not None or (values != "real" and config.policy_weights == "imagenet")
    at_hand = config.clip_weights is not None or (checkpoint is not None and checkpoint.towers() is not None)
    towers: Values = "real" if at_hand else values
    with torch.device("meta") if towers == "meta" else nullcontext():
        loaded = _load(config, checkpoint, towers)
        # What a run writes tells the pretrained weights; rehearsals and evaluations write none and need not know.
        digest = weights_digest(loaded.module) if checkpoint is None and learn and values == "real" else None
        method = build_method(config)
        state = None
        if checkpoint is not None:
            if towers == "real":
                _check_pretrained(checkpoint, loaded)
            state = _tensors(checkpoint, loaded, config, method)
        if learn or not method.mergeable:
            method.attach(loaded.module)
        if state is not None and "clip.logit_bias" in state:
            ensure_logit_bias(loaded.module)
        model = VideoRetriever(_with(config, policy_weights="random") if cnn_is_random else config, loaded)
        objective = build_objective(config, model)
    split_frozen_norms(model.clip)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    if state is not None and checkpoint is not None:
        if has_new_logit_bias(model.clip) and "clip.logit_bias" not in state:
            state = {**state, "clip.logit_bias": model.clip.get_parameter("logit_bias").detach()}  # created just now
        if checkpoint.kind is Kind.ADAPTER:
            state = _frozen_copies(model) | state
        strict_load(model, state, f"resume: {checkpoint.path}")
        if method.mergeable:
            method.reset(model)
    if accelerator is not None:
        model.to(accelerator.device)
    session = Session(config, accelerator, loaded, model, method, objective, checkpoint, digest)
    _choose(session)
    if learn and not any(parameter.requires_grad for parameter in objective.parameters()):
        raise UserError(NOTHING_LEARNS)
    if not learn and checkpoint is not None and (noted := checkpoint.metadata.get("parameters")):
        session.parameters = TrainableReport.from_dict(json.loads(noted))
    return session


def open_for_use(config: Config, checkpoint: Checkpoint) -> Session:
    """A trained model on the device of its config, in evaluation mode, nothing of it learning."""
    session = open_model(config, checkpoint, accelerator=make_accelerator(config), learn=False)
    session.model.eval()
    return session


def find_checkpoint(
    source: str | Path, overrides: Mapping[str, Any], settings: Path | None = None
) -> tuple[Checkpoint, Config]:
    """The checkpoint of a run folder or a weights file, and its settings with `overrides` (flags) over them.

    The settings are those of the run folder, of the checkpoint itself, or of the file `settings` for a checkpoint that
    brings none. Raises UserError.
    """
    path = Path(source)
    weights = path / "best.safetensors" if path.is_dir() else path
    if not weights.is_file():
        what = "Not a run folder: best.safetensors not found" if path.is_dir() else "There is no such file or folder"
        raise UserError(f"{source}: {what} (looked for in {Path.cwd()})")
    checkpoint = read_checkpoint(weights)
    if settings is not None or checkpoint.is_foreign:
        return checkpoint, load_config(settings, dict(overrides))
    own = checkpoint.own_settings(path if path.is_dir() else None)
    return checkpoint, load_config(None, {**own, **overrides})


def _with(config: Config, **settings: Any) -> Config:
    return config.model_copy(update=settings)


def _load(config: Config, checkpoint: Checkpoint | None, values: Values) -> LoadedClip:
    towers = None if checkpoint is None else checkpoint.towers()
    if values == "real":
        return load_clip(config, from_checkpoint=towers)
    shapes = load_clip(config, with_weights=False, from_checkpoint=towers)
    return shapes if values == "meta" else replace(shapes, module=build_towers(find_towers(config), "cpu"))


def _tensors(checkpoint: Checkpoint, loaded: LoadedClip, config: Config, method: PeftMethod) -> dict[str, Tensor]:
    """The checkpoint's tensors as the model has them: plain, or with what a method added that cannot be merged. Those
    of an adapter are laid over the pretrained CLIP."""
    kept = checkpoint.method
    if kept != (None if method.mergeable else config.peft.method):
        what = f"what peft.method {kept} added to CLIP, which cannot be merged" if kept else "a plain CLIP"
        raise UserError(
            f"resume: {checkpoint.path} holds {what}; peft.method {config.peft.method} cannot begin with it"
        )
    if checkpoint.kind is not Kind.ADAPTER:
        return checkpoint.state
    own = load_config(None, {"peft": checkpoint.settings["peft"]}) if "peft" in checkpoint.settings else config
    holder = nn.Module()
    holder.clip = clip = copy.deepcopy(loaded.module)
    if "clip.logit_bias" in checkpoint.state:
        ensure_logit_bias(clip)
    theirs = build_method(own)
    theirs.attach(clip)
    inside = {name: tensor for name, tensor in checkpoint.state.items() if name.startswith("clip.")}
    strict_load(holder, dict(holder.state_dict()) | inside, f"resume: {checkpoint.path}")
    return theirs.merged_state(holder) | {n: tensor for n, tensor in checkpoint.state.items() if n not in inside}


def _check_pretrained(checkpoint: Checkpoint, loaded: LoadedClip) -> None:
    """An adapter says which weights it goes over."""
    wanted = checkpoint.description.get("digest") if checkpoint.kind is Kind.ADAPTER else None
    if wanted is not None and wanted != weights_digest(loaded.module):
        raise UserError(
            f"resume: {checkpoint.path} goes over the pretrained weights {checkpoint.description.get('source')} "
            f"(SHA-256 {wanted[:12]}…), and {loaded.source} are others; give those with --clip_weights or "
            "--clip_backbone"
        )


def _choose(session: Session) -> None:
    choose_what_learns(session.method, session.model, session.config)
    session.objective.choose()
    session.recount()


def _frozen_copies(model: nn.Module) -> dict[str, Tensor]:
    """The frozen copy of the pretrained image tower in the selector, if it has one, which an adapter leaves out."""
    return {
        f"{name}.{inner}": tensor
        for name, module in model.named_modules()
        if isinstance(module, FrozenClipBackbone)
        for inner, tensor in plain_state(module).items()
    }
