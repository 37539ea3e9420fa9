"""The one way to a model: `open_model`, used by every command.

plain CLIP ─► method.attach ─► retriever ─► fill ─► method.choose
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.config.roles import names_with
from adaclip_finetune.data.frame_vectors import FrameVectors
from adaclip_finetune.errors import NotACheckpoint, UserError
from adaclip_finetune.hub import local_run
from adaclip_finetune.model.attention import speed_up_frozen_attention
from adaclip_finetune.model.flops import Gflops, count_gflops
from adaclip_finetune.model.frame_features import FrozenClipBackbone
from adaclip_finetune.model.norms import split_frozen_norms
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.vit import compile_blocks
from adaclip_finetune.model.zero_shot import zero_shot_config
from adaclip_finetune.objectives import Objective, build_objective
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.peft import PeftMethod, TrainableReport, build_method, choose_what_learns, trainable_report
from adaclip_finetune.processes import world_size
from adaclip_finetune.training.device import describe_device, make_accelerator
from adaclip_finetune.training.memory import memory_explained
from adaclip_finetune.weights.checkpoints import (
    Checkpoint,
    Kind,
    describe,
    read_checkpoint,
    with_its_clip,
)
from adaclip_finetune.weights.clip_weights import load_clip, load_pretrained, resolve_backbone
from adaclip_finetune.weights.loaded import LoadedClip, ensure_logit_bias, has_new_logit_bias
from adaclip_finetune.weights.plain import plain_copy, plain_state, strict_load, weights_digest

Values = Literal["real", "random", "meta"]
_WORDS_OF_A_QUERY = 32  # tokens, which every text tower takes


@dataclass
class Session:
    """A model and what learns in it. `config` is complete: it holds what the checkpoint tells.

    `pretrained_digest` is a digest of CLIP's weights before anything was added or learned, known in runs that start
    from them. A run with an `embedding_cache` reads `vectors` in place of frames.
    """

    config: Config
    accelerator: Accelerator | None
    loaded: LoadedClip
    model: VideoRetriever
    method: PeftMethod
    objective: Objective
    checkpoint: Checkpoint | None
    pretrained_digest: str | None = None
    parameters: TrainableReport = field(init=False)
    vectors: FrameVectors | None = None

    def __post_init__(self) -> None:
        self.choose()

    def choose(self) -> None:
        """Choose what learns, as the method and the objective want it, and count it."""
        choose_what_learns(self.method, self.model, self.config)
        self.objective.choose()
        self.recount()

    def recount(self) -> None:
        """Count again what learns, after the method changed it."""
        self.parameters = trainable_report(self.model)

    def use(self, config: Config) -> None:
        """Continue with other settings that concern nothing attached to CLIP, and choose again what learns."""
        self.config, self.method = config, build_method(config)
        self.choose()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which to call the model: the precision of the run."""
        return nullcontext() if self.accelerator is None else cast(Any, self.accelerator.autocast())

    @cached_property
    def gflops(self) -> Gflops:
        """What a video costs, counted without computing anything."""
        return count_gflops(self.model, self.config.num_frm)

    def where(self) -> str:
        """Return a description of the device and of the number of processes."""
        return describe_device(self.device) + (f", {world_size()} processes" if world_size() > 1 else "")

    def describe(self) -> str:
        """Return a text for the screen: checkpoint, device, CLIP, what learns and what a video costs."""
        c = self.config
        origin = "" if self.checkpoint is None else f"{describe(self.checkpoint, c)}\n"
        return (
            f"{origin}device {self.where()}, {c.precision}   CLIP {self.loaded.source}   seed {c.seed}\n"
            f"method {c.peft.method}\n{self.parameters}\n{self.gflops}"
        )

    def pretrained(self) -> LoadedClip:
        """Return CLIP before anything learned: the session's own at its start, a new one for a checkpoint.

        Raise UserError if it is not available.
        """
        if self.checkpoint is not None:
            return load_pretrained(self.config, self.loaded)
        if self.method.keeps_outputs:
            return self.loaded
        return replace(self.loaded, module=plain_copy(self.loaded.module))

    def description(self) -> dict[str, str]:
        """Return the metadata that a checkpoint of this session holds beside its tensors."""
        clip: dict[str, Any] = dict(self.loaded.description)
        if self.pretrained_digest is not None:
            clip |= {"source": self.loaded.source, "digest": self.pretrained_digest}
        about = {"config": self.config.model_dump_json(), "clip": json.dumps(clip)}
        about["parameters"] = json.dumps(self.parameters.as_dict())
        return about if self.method.mergeable else {**about, "method": self.config.peft.method}


def open_model(
    config: Config,
    checkpoint: Checkpoint | None = None,
    values: Values = "real",
    accelerator: Accelerator | None = None,
    learn: bool = True,
) -> Session:
    """Return the session of a config, filled from `checkpoint` (default: that of `config.resume`).

    `values` says what stands in for weights that would have to be downloaded: random ones, or none at all ("meta").
    Without an `accelerator` the model stays on the CPU. Without `learn` nothing is attached to CLIP unless the
    checkpoint needs it, and `parameters` tells what once learned. Raise UserError, the same for every command.
    """
    checkpoint = checkpoint or (read_checkpoint(Path(config.resume)) if config.resume else None)
    kept = None if checkpoint is None else checkpoint.towers()
    if checkpoint is not None:
        config = with_its_clip(checkpoint, config)
    towers = "real" if config.clip_weights is not None or kept is not None else values
    with memory_explained(config), torch.device("meta") if towers == "meta" else nullcontext():
        loaded = load_clip(config, towers == "real", kept, "meta" if towers == "meta" else "cpu", draw=learn)
        # Only a run that writes checkpoints needs the digest of the pretrained weights.
        digest = weights_digest(loaded.module) if checkpoint is None and learn and values == "real" else None
        method = build_method(config)
        state = None
        if checkpoint is not None:
            if checkpoint.kind is Kind.ADAPTER and towers == "real":
                _check_pretrained(checkpoint, loaded)
            state = _tensors(checkpoint, loaded, config, method)
        if learn or not method.mergeable:
            method.attach(loaded.module)
        if state is not None and "clip.logit_bias" in state:
            ensure_logit_bias(loaded.module)
        # A checkpoint holds the weights of the selector's CNN too, so they need not be downloaded.
        cnn_is_random = checkpoint is not None or (values != "real" and config.policy_weights == "imagenet")
        policy = {"policy_weights": "random"} if cnn_is_random else {}
        model = VideoRetriever(config.model_copy(update=policy), loaded)
        objective = build_objective(config, model)
    split_frozen_norms(model.clip)
    speed_up_frozen_attention(model.clip)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    if config.compile and learn:
        compile_blocks(model.clip)
    if state is not None and checkpoint is not None:
        _fill(model, state, checkpoint, config, learn)
        method.reset(model)
    if learn:
        objective.start(config, loaded, partial(open_other, like=config, values=values))
    if accelerator is not None:
        objective.to(accelerator.device)
    session = Session(config, accelerator, loaded, model, method, objective, checkpoint, digest)
    if learn and not any(parameter.requires_grad for parameter in objective.parameters()):
        raise UserError("nothing is left to train: drop freeze_clip, or use a frame selector (use_policy) or frame_agg")
    if not learn and checkpoint is not None and (noted := checkpoint.metadata.get("parameters")):
        session.parameters = TrainableReport.from_dict(json.loads(noted))
    return session


def open_any(
    source: str | Path,
    overrides: Mapping[str, Any],
    of_clip: Mapping[str, Any] | None = None,
    values: Values = "real",
    on_device: bool = True,
) -> Session:
    """Return the session of a run folder, a checkpoint or a pretrained CLIP, in evaluation mode, with nothing learning.

    `overrides` replace settings of the run. A CLIP is a file or folder of weights or, if nothing is there, a name as
    `clip_backbone` has it. Its session has no `checkpoint`; it takes uniform frames and their mean, with the settings
    `of_clip` (default: `overrides`) over the defaults. Raise UserError.
    """

    def opened(config: Config, checkpoint: Checkpoint | None) -> Session:
        accelerator = make_accelerator(config) if on_device else None
        session = open_model(config, checkpoint, values, accelerator, learn=False)
        session.model.requires_grad_(False).eval()
        return session

    try:
        checkpoint, config = find_checkpoint(source, overrides)
    except NotACheckpoint as error:
        plain: dict[str, Any] = {"use_policy": False, "frame_agg": None, "max_txt_len": _WORDS_OF_A_QUERY}
        plain |= overrides if of_clip is None else of_clip
        try:
            if Path(source).exists():
                return opened(load_config(None, plain | {"clip_weights": str(source)}), None)
            resolve_backbone(str(source))
        except UserError as other:
            raise UserError(f"{error}\nNor is it a CLIP: {other}") from other
        return opened(load_config(None, plain | {"clip_backbone": str(source)}), None)
    return opened(config, checkpoint)


def open_other(source: str, like: Config, values: Values = "real") -> Opened:
    """Return the model in a run folder or checkpoint, or a CLIP that takes as many frames as `like`, on the CPU."""
    of_clip = zero_shot_config(like).model_dump(mode="json", include=set(names_with("view")) - {"max_img_size"})
    session = open_any(source, {}, of_clip, values, on_device=False)
    return Opened(session.config, session.loaded, session.model, session.checkpoint is None)


def find_checkpoint(
    source: str | Path, overrides: Mapping[str, Any], settings: Path | None = None
) -> tuple[Checkpoint, Config]:
    """Return the checkpoint in a run folder, a weights file or a run on the hub, and its settings with `overrides`.

    The settings are those of the run folder or of the checkpoint itself; for a checkpoint without any they come from
    the file `settings`, and if another system wrote it, from what its tensors say. Raise UserError.
    """
    path = local_run(source)
    weights = path / "best.safetensors" if path.is_dir() else path
    if not weights.is_file():
        what = "not a run folder: best.safetensors not found" if path.is_dir() else "there is no such file or folder"
        raise NotACheckpoint(f"{source}: {what} (looked for in {Path.cwd()})")
    checkpoint = read_checkpoint(weights)
    if settings is not None or checkpoint.system == "AdaCLIP":  # whose settings have other names and meanings
        return checkpoint, load_config(settings, dict(overrides))
    own = checkpoint.own_settings(path if path.is_dir() else None)
    return checkpoint, load_config(None, {**own, **overrides})


def _tensors(checkpoint: Checkpoint, loaded: LoadedClip, config: Config, method: PeftMethod) -> dict[str, Tensor]:
    """Return the checkpoint's tensors by the names of the model, those of an adapter merged into the pretrained CLIP.

    They are plain weights, or include what a method attached that cannot be merged.
    """
    kept = checkpoint.method
    if kept != (None if method.mergeable else config.peft.method):
        what = f"what peft.method {kept} added to CLIP, which cannot be merged" if kept else "a plain CLIP"
        raise UserError(
            f"resume: {checkpoint.path} holds {what}; peft.method {config.peft.method} cannot start from it"
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


def _fill(model: VideoRetriever, state: dict[str, Tensor], checkpoint: Checkpoint, config: Config, learn: bool) -> None:
    """Load the checkpoint's tensors into the model, strictly except for what the checkpoint leaves out on purpose, and
    for a captioner or a tower that is yet to learn: it then begins untrained."""
    if has_new_logit_bias(model.clip) and "clip.logit_bias" not in state:
        state = {**state, "clip.logit_bias": model.clip.get_parameter("logit_bias").detach()}  # created just now
    for part in ("captioner", "tower") if learn else ():
        module = getattr(model, part)
        if module is not None and not any(name.startswith(f"{part}.") for name in state):
            state = {**state, **module.state_dict(prefix=f"{part}.")}
    if checkpoint.kind is Kind.ADAPTER:
        # An adapter leaves out the frozen copy of the pretrained image tower that a selector may have.
        state = {
            f"{name}.{inner}": tensor
            for name, module in model.named_modules()
            if isinstance(module, FrozenClipBackbone)
            for inner, tensor in plain_state(module).items()
        } | state
    strict_load(model, state, f"resume: {checkpoint.path}", describe(checkpoint, config))


def _check_pretrained(checkpoint: Checkpoint, loaded: LoadedClip) -> None:
    """Raise UserError if an adapter belongs to other pretrained weights than these."""
    wanted = checkpoint.description.get("digest")
    if wanted is not None and wanted != weights_digest(loaded.module):
        raise UserError(
            f"resume: {checkpoint.path} is an adapter for the pretrained weights "
            f"{checkpoint.description.get('source')} (SHA-256 {wanted[:12]}…), but {loaded.source} holds other "
            "weights; give the right ones with --clip_weights or --clip_backbone"
        )
