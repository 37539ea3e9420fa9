"""All settings of a run: name, type, default, range, unit and one line of help.

`load_config(file, overrides)` merges defaults, a file and flags, validates the result and returns a frozen `Config`.
`check_paths(config)` then checks that the files exist. The sections that choose something by name (`peft`, `tower`,
…) are declared in `choices.py`. This file does not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from adaclip_finetune.config.base import Contradictions, Problem, Settings, setting
from adaclip_finetune.config.choices import (
    AdaptationSection,
    ObjectiveSection,
    PeftSection,
    TaskSection,
    TaskSettings,
    TowerSection,
)
from adaclip_finetune.config.layers import load
from adaclip_finetune.config.optuna import OptunaSettings

Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]

PathText = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
NpyPath = Annotated[PathText, Field(pattern=r"\.npy$")]


def _grad_norm(value: float) -> float:
    if value <= 0 and value != -1:
        raise ValueError("must be above 0, or -1")
    return value


GradNorm = Annotated[float, AfterValidator(_grad_norm)]

# ---- one class per group, in the order of `--help` ----


class DataSettings(Settings):
    """Data"""

    dataset: str = setting(
        "videos",
        "name of the data set; the run folder is made in output_dir/<dataset>",
        role="run",
        pattern=r"^\w[\w.-]{0,99}$",
        allowed="a name of letters, digits, dots, dashes and underscores",
    )
    train_annot: PathText | None = setting(
        None, "annotation (JSON) of the training split; required for training", role="data", unit="file"
    )
    val_annot: PathText | None = setting(
        None,
        "annotation of the validation split, which selects the best epoch; required for training",
        role="data",
        unit="file",
    )
    test_annot: PathText | None = setting(
        None, "annotation of the test split, evaluated once at the end or by do_inference", role="data", unit="file"
    )
    frames_dir: PathText | None = setting(
        None,
        "extracted frames: a folder with one folder per video, or an LMDB pack of one; excludes video_dir",
        role="data",
        unit="folder or file",
    )
    video_dir: PathText | None = setting(
        None, "folder of video files, which are decoded in place; excludes frames_dir", role="data", unit="folder"
    )
    concat_captions: Literal["concat", "indep-one", "indep-all"] = setting(
        "concat",
        "captions of a video: joined into one text; one drawn per epoch; each one a sample of its own",
        role="data",
    )
    max_txt_len: int = setting(
        20,
        "maximum length of a tokenized caption, start and end tokens included; longer captions are truncated",
        role="view",
        unit="tokens",
        ge=3,
    )
    data_subset: int = setting(
        0, "train on this many videos only; 0: on all of them", role="optimisation", unit="videos", ge=0
    )
    skip_missing: bool = setting(
        False, "evaluate without unreadable videos and report their number beside each figure", role="data"
    )
    num_workers: int = setting(
        2, "data loader processes; 0: the main process reads", role="machine", unit="processes", ge=0
    )
    pin_mem: bool = setting(False, "use pinned memory for batches (faster copies to a GPU)", role="machine")


class FrameSettings(Settings):
    """Frames"""

    num_frm: int = setting(16, "frames sampled from each video", role="view", unit="frames", ge=1)
    num_frm_subset: int = setting(
        0,
        "of the sampled frames, keep this many and replace the rest by blank ones; 0: keep all",
        role="view",
        unit="frames",
        ge=0,
    )
    sampling: Literal["uniform", "random"] = setting(
        "uniform", "how frames of training videos are sampled: evenly spaced, or at random", role="optimisation"
    )
    segment_sampling: bool = setting(
        False, "split a video into num_frm equal segments and sample the middle frame of each", role="view"
    )
    img_tmpl: str = setting(
        "image_{:05d}.jpg",
        "file name of frame n in frames_dir/<video>/, counted from 1",
        role="data",
        pattern=r"^[^{}/\\]*\{(:0?[0-9]{0,2}d)?\}[^{}/\\]*$",
        allowed="a file name with one place for the number, as in image_{:05d}.jpg",
    )
    max_img_size: int | None = setting(
        None,
        "input resolution of CLIP's image tower; null: the resolution it was trained with",
        role="view",
        unit="pixels",
        ge=1,
    )


class ModelSettings(Settings):
    """Model"""

    clip_backbone: str = setting(
        "ViT-B/32",
        "CLIP model: ViT-B/32, ViT-B/16 or ViT-L/14 with OpenAI's weights, or an open_clip name[:tag]",
        role="model",
        pattern=r"^\S+$",
        allowed="a name, or name:tag, without spaces",
    )
    clip_weights: PathText | None = setting(
        None, "CLIP weights on disk; null: download those of clip_backbone", role="model", unit="file or folder"
    )
    tower: TowerSection = setting(
        {"method": "per_frame"}, "how CLIP's image tower encodes the frames of a video", role="model"
    )
    sim_header: Literal["meanP", "seqTransf", "transformer"] = setting(
        "meanP",
        "temporal header on the selected frames: none, 4 transformer blocks initialised from CLIP, or 1 block",
        role="model",
    )
    freeze_layer_num: int = setting(
        0,
        "freeze CLIP's transformer blocks below this one, and its embeddings; -1: freeze nothing",
        role="method",
        unit="block",
        ge=-1,
    )
    freeze_clip: bool = setting(False, "freeze all of CLIP", role="method")


class SelectionSettings(Settings):
    """Frame selection"""

    use_policy: bool = setting(True, "select top_k of num_frm frames; otherwise all of them are used", role="model")
    top_k: int = setting(8, "frames selected from each video", role="model", unit="frames", ge=1)
    policy_backbone: Literal["mobilenet_v3_large", "mobilenet_v2", "resnet50", "raw", "clip", "frozen_clip"] = setting(
        "mobilenet_v3_large",
        "features that the selector scores: a light CNN's, grey thumbnails (raw), or CLIP's embeddings",
        role="model",
    )
    policy_weights: PathText = setting(
        "imagenet",
        "weights of the selector's CNN",
        role="model",
        unit="file",
        allowed="imagenet (torchvision's), random, or the path of a file",
    )
    freeze_cnn: bool = setting(False, "freeze the selector's CNN", role="method")
    rescale_size: int = setting(
        56, "side of the grey thumbnails of policy_backbone raw", role="model", unit="pixels", ge=1
    )
    use_rnn: bool = setting(True, "use a temporal encoder before frames are scored", role="model")
    rnn: Literal["transformer", "lstm", "bilstm"] = setting(
        "transformer", "architecture of the temporal encoder", role="model"
    )
    hidden_dim: int = setting(512, "width of the temporal encoder", role="model", unit="channels", ge=1)
    mlp_type: Literal["mlp", "fc"] = setting(
        "mlp", "head that scores a frame: an MLP with one hidden layer, or one linear layer", role="model"
    )
    mlp_hidden_dim: int = setting(
        1024, "width of the hidden layer of mlp_type mlp", role="model", unit="channels", ge=1
    )
    init_tau: float = setting(5.0, "temperature of Hard-Top-k in the first epoch", role="optimisation", gt=0)
    min_tau: float = setting(0.5, "lower bound of the temperature of Hard-Top-k", role="optimisation", gt=0)
    exp_decay_factor: float = setting(
        0.045,
        "decay of the temperature: init_tau * exp(-exp_decay_factor * epoch)",
        role="optimisation",
        unit="1/epoch",
        ge=0,
    )
    warmup_epochs: int = setting(
        0,
        "epochs over which K falls from num_frm - 1 to top_k; 0: K is top_k from the start",
        role="optimisation",
        unit="epochs",
        ge=0,
    )
    reuse_scores: bool = setting(False, "weight the selected frames by their selection scores", role="model")


class AggregationSettings(Settings):
    """Aggregation"""

    frame_agg: Literal["mlp", "transformer", "qscore"] | None = setting(
        None,
        "how frame embeddings are pooled into one video vector; null: mean. qscore depends on the query: no index",
        role="model",
    )
    frame_agg_temp: float = setting(1.0, "temperature of the softmax over frames", role="model", gt=0)
    word_agg: Literal["mlp", "transformer"] | None = setting(
        None, "how word embeddings are pooled into one text vector; null: CLIP's sentence embedding", role="model"
    )
    word_agg_temp: float = setting(1.0, "temperature of the softmax over words", role="model", gt=0)


class PeftGroup(Settings):
    """Parameter-efficient finetuning"""

    peft: PeftSection = setting({"method": "full"}, "finetuning method of CLIP", role="method")


class OptimisationSettings(Settings):
    """Optimisation"""

    objective: ObjectiveSection | None = setting(
        None,
        "training loss; null: the loss CLIP was pretrained with (sigmoid for SigLIP, otherwise contrastive)",
        role="optimisation",
    )
    num_epochs: int = setting(30, "passes over the training data", role="optimisation", unit="epochs", ge=1)
    batch_size: int = setting(32, "videos in a batch, all processes together", role="optimisation", unit="videos", ge=1)
    auto_batch_size: bool = setting(
        False,
        "halve batch_size until a training step fits into the accelerator's memory",
        role="optimisation",
        on_resume="ignored",
    )
    gradient_accumulation_steps: int = setting(
        1, "batches per optimizer step", role="optimisation", unit="batches", ge=1
    )
    optim: Literal["bertadam", "adamw"] = setting("bertadam", "optimizer", role="optimisation")
    learning_rate: float = setting(1e-4, "peak learning rate of everything outside of CLIP", role="optimisation", gt=0)
    coef_lr: float = setting(1e-3, "CLIP's peak learning rate is learning_rate * coef_lr", role="optimisation", ge=0)
    no_warmup: bool = setting(False, "keep the learning rate constant: no warm-up, no decay", role="optimisation")
    warmup_proportion: float = setting(
        0.1, "fraction of the optimizer steps in which the learning rate warms up", role="optimisation", ge=0, lt=1
    )
    betas: Betas = setting((0.9, 0.98), "Adam's decay rates of the two moments", role="optimisation")
    weight_decay: float = setting(0.2, "weight decay; biases and norms have none", role="optimisation", ge=0)
    grad_norm: GradNorm = setting(
        1.0,
        "maximum norm of the gradient (gradient clipping); -1: no clipping",
        role="optimisation",
        allowed="a number > 0, or -1 for no clipping",
    )


class EvaluationSettings(Settings):
    """Evaluation"""

    task: TaskSection = setting({"method": "retrieval"}, "task that is evaluated", role="data")
    adaptation: AdaptationSection = setting(
        {"method": "none"}, "test-time adaptation of the model to each query", role="model"
    )
    primary: str | None = setting(
        None,
        "figure that selects the best epoch, such as t2v.R@1; null: the task's default",
        role="optimisation",
        min_length=1,
    )
    val_batch_size: int = setting(
        500, "texts or videos in an evaluation batch", role="machine", on_resume="same", unit="items", ge=1
    )


class RunSettings(Settings):
    """Run"""

    output_dir: PathText = setting(
        "output", "folder in which the run folder <dataset>/<time>-<method> is made", role="run", unit="folder"
    )
    tensorboard_dir: PathText | None = setting(
        None, "folder of the TensorBoard files; null: the run folder", role="run", unit="folder"
    )
    no_output: bool = setting(False, "write no files", role="run")
    save_last: bool = setting(False, "save the weights of the last epoch beside the best", role="run")
    n_display: int = setting(
        20, "optimizer steps between two lines of the log", role="run", on_resume="free", unit="steps", ge=1
    )
    save_every_steps: int = setting(
        0,
        "optimizer steps between two snapshots to resume from; 0: one per epoch",
        role="run",
        on_resume="free",
        unit="steps",
        ge=0,
    )
    resume: PathText | None = setting(
        None,
        "a run folder: resume that run; a weights file: start a new run from these weights",
        role="run",
        on_resume="ignored",
        unit="file or folder",
    )
    do_inference: bool = setting(False, "evaluate test_annot without training", role="run")
    save_similarity: NpyPath | None = setting(
        None,
        "file for the similarity matrix of the test split",
        role="run",
        unit="file",
        allowed="the path of a file named *.npy",
    )
    seed: int = setting(0, "seed of all random numbers", role="optimisation", ge=0, le=2**32 - 1)
    debug: bool = setting(False, "show the traceback of an error", role="machine")


class DeviceSettings(Settings):
    """Device"""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = setting(
        "auto", "device to compute on; auto: an accelerator if there is one", role="machine"
    )
    xpu: bool = setting(False, "the same as device xpu (Intel GPU)", role="machine")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32",
        "mixed precision of the towers; selection, similarity and loss are always float32",
        role="machine",
        on_resume="same",
    )
    tf32: bool = setting(
        False, "on CUDA, multiply float32 matrices in TF32 (faster, 10-bit mantissa)", role="machine", on_resume="same"
    )
    deterministic: bool = setting(
        False, "use deterministic algorithms only (slower on a GPU)", role="machine", on_resume="same"
    )
    gradient_checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass: less memory, about a third more time",
        role="machine",
        on_resume="same",
    )


class TuningGroup(Settings):
    """Hyperparameter tuning"""

    optuna_cfg: OptunaSettings | None = setting(None, "tune hyperparameters with Optuna; null: train once", role="run")
    do_training_af_optuna: bool = setting(False, "after tuning, train once with the best values found", role="run")


class Config(  # pydantic collects fields from the last base to the first, so the groups are listed in reverse
    TuningGroup,
    DeviceSettings,
    RunSettings,
    EvaluationSettings,
    OptimisationSettings,
    PeftGroup,
    AggregationSettings,
    SelectionSettings,
    ModelSettings,
    FrameSettings,
    DataSettings,
):
    """All settings of a run. The namespace is flat except for the sections (`peft`, `tower`, …) and `optuna_cfg`.

    `model_fields_set` holds the names of the settings that were given.
    """

    @property
    def figures(self) -> Mapping[str, bool]:
        """Name of each figure of the task, and whether higher is better."""
        assert isinstance(self.task.config, TaskSettings)
        return self.task.config.figures

    @property
    def primary_figure(self) -> str:
        """The figure that selects the best epoch."""
        return self.primary or next(iter(self.figures))

    @property
    def tuned_figure(self) -> str:
        """The figure that hyperparameter tuning optimises."""
        return (self.optuna_cfg and self.optuna_cfg.objective) or self.primary_figure

    @model_validator(mode="before")
    @classmethod
    def _xpu_is_a_device(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("xpu") is True and data.get("device", "auto") == "auto":
            return {**data, "device": "xpu"}
        return data

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        if problems := list(contradictions(self)):
            raise Contradictions(problems)
        return self


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] = MappingProxyType({})) -> Config:
    """Return the settings of a JSON file with overrides (dotted name → value, from flags) merged over it.

    Raises UserError that lists every problem. Whether files exist is checked by `check_paths`.
    """
    return load(Config, path, overrides)


def contradictions(c: Config) -> Iterator[Problem]:
    """Yield each impossible combination of settings: what is wrong and the way out, and the names of the settings."""
    if c.frames_dir and c.video_dir:
        yield "frames_dir and video_dir are both given: frames come from one of them", ("frames_dir", "video_dir")
    if c.num_frm_subset > c.num_frm:
        yield f"num_frm_subset {c.num_frm_subset} is larger than num_frm {c.num_frm}", ("num_frm_subset", "num_frm")
    if c.use_policy and c.top_k > c.num_frm:
        way_out = "lower top_k, raise num_frm, or use all frames (--no_policy)"
        yield f"top_k {c.top_k} is larger than num_frm {c.num_frm}: {way_out}", ("top_k", "num_frm")
    if c.use_policy and c.warmup_epochs and c.top_k == c.num_frm:
        what = f"warmup_epochs {c.warmup_epochs} lowers K from num_frm - 1 to top_k, but top_k is num_frm ({c.top_k})"
        yield what, ("top_k", "num_frm", "warmup_epochs")
    if c.warmup_epochs > c.num_epochs:
        what = f"warmup_epochs {c.warmup_epochs} is larger than num_epochs {c.num_epochs}: K would never reach top_k"
        yield what, ("warmup_epochs", "num_epochs")
    if c.use_policy and c.use_rnn and c.rnn == "transformer" and c.hidden_dim % 64:
        what = f"hidden_dim {c.hidden_dim} is not a multiple of 64, the head width of rnn transformer"
        yield what, ("hidden_dim", "rnn")
    if c.reuse_scores and not c.use_policy:
        yield "reuse_scores requires use_policy: without it frames have no scores", ("reuse_scores", "use_policy")
    if c.min_tau > c.init_tau:
        yield f"min_tau {c.min_tau:g} is larger than init_tau {c.init_tau:g}", ("min_tau", "init_tau")
    if c.frame_agg and c.word_agg:
        what = f"frame_agg {c.frame_agg} and word_agg {c.word_agg} cannot be combined: set one of them to null"
        yield what, ("frame_agg", "word_agg")
    if c.xpu and c.device != "xpu":
        yield f"xpu and device {c.device} are both given: give one", ("xpu", "device")
    if c.precision == "fp16" and c.device == "cpu":
        yield "precision fp16 does not work on the CPU: use bf16 or fp32", ("precision", "device")
    if c.do_training_af_optuna and c.optuna_cfg is None:
        yield "do_training_af_optuna requires optuna_cfg: without it nothing is tuned", ("do_training_af_optuna",)
    if c.optuna_cfg is not None and c.do_inference:
        yield "optuna_cfg and do_inference are both given, but tuning trains: give one", ("optuna_cfg", "do_inference")
    selector_learns = c.use_policy or c.sim_header != "meanP" or c.frame_agg in ("mlp", "transformer") or c.word_agg
    if c.freeze_clip and not selector_learns and not c.do_inference:
        what = "nothing to train: freeze_clip is set, and there is no trainable selector, header or aggregator"
        yield what, ("freeze_clip", "use_policy", "sim_header", "frame_agg")
    if c.save_similarity and isinstance(c.task.config, TaskSettings) and not c.task.config.has_similarity:
        yield f"save_similarity: task {c.task.method} has no similarity matrix", ("save_similarity", "task")
    tuned = c.optuna_cfg and c.optuna_cfg.objective
    for name, figure in {"primary": c.primary, "optuna_cfg.objective": tuned}.items():
        if figure is not None and figure not in c.figures:
            known = ", ".join(c.figures)
            yield f"{name} {figure} is not a figure of task {c.task.method}; its figures are {known}", (name, "task")
    for chosen in (c.peft, c.tower, c.objective, c.task, c.adaptation):
        if chosen is not None:
            yield from chosen.config.contradictions(c)
