"""Every setting of the project: name, type, default, range, unit and one line of help. Torch-free.

`load_config(file, overrides)` lays flags over the file over the defaults, checks all of it and returns a frozen
`Config`; `check_paths(config)` then asks whether the files it names are there. What is chosen by
name (`peft`, `tower` …) is declared in `choices.py`.
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
        raise ValueError("neither above 0 nor -1")
    return value


GradNorm = Annotated[float, AfterValidator(_grad_norm)]

# ---- the settings, a class a group; their order is that of `--help` ----


class DataSettings(Settings):
    """Data"""

    dataset: str = setting(
        "videos",
        "name of the data set, as it stands in the path of the run folder",
        role="run",
        pattern=r"^\w[\w.-]{0,99}$",
        allowed="a name of letters, digits, dots, dashes and underscores",
    )
    train_annot: PathText | None = setting(
        None, "annotation (JSON) to train on; needed to train", role="data", unit="file"
    )
    val_annot: PathText | None = setting(
        None, "annotation that chooses the best epoch; needed to train", role="data", unit="file"
    )
    test_annot: PathText | None = setting(
        None, "annotation evaluated at the end, or by do_inference", role="data", unit="file"
    )
    frames_dir: PathText | None = setting(
        None,
        "extracted frames, a folder a video, or a pack of them; or give video_dir",
        role="data",
        unit="folder or file",
    )
    video_dir: PathText | None = setting(None, "videos, read in place; or give frames_dir", role="data", unit="folder")
    concat_captions: Literal["concat", "indep-one", "indep-all"] = setting(
        "concat", "captions of a video: joined into one; one at random each time; each by itself", role="data"
    )
    max_txt_len: int = setting(
        20, "length at which captions are cut, start and end included", role="view", unit="tokens", ge=3
    )
    data_subset: int = setting(0, "train on this many videos only; 0: all", role="optimisation", unit="videos", ge=0)
    skip_missing: bool = setting(
        False, "evaluate without unreadable videos, with their number beside each figure", role="data"
    )
    num_workers: int = setting(
        2, "processes that read frames; 0: the main one reads", role="machine", unit="processes", ge=0
    )
    pin_mem: bool = setting(False, "page-locked memory for batches: faster copies to a GPU", role="machine")


class FrameSettings(Settings):
    """Frames"""

    num_frm: int = setting(16, "frames read of each video", role="view", unit="frames", ge=1)
    num_frm_subset: int = setting(
        0, "of these, how many are kept, the rest being blank; 0: all", role="view", unit="frames", ge=0
    )
    sampling: Literal["uniform", "random"] = setting(
        "uniform", "frames of a training video: evenly spaced, or random", role="optimisation"
    )
    segment_sampling: bool = setting(False, "take the middle frame of each of num_frm equal segments", role="view")
    img_tmpl: str = setting(
        "image_{:05d}.jpg",
        "name of a frame's file in frames_dir/<video>/, counted from 1",
        role="data",
        pattern=r"^[^{}/\\]*\{(:0?[0-9]{0,2}d)?\}[^{}/\\]*$",
        allowed="a file name with one place for the number, as in image_{:05d}.jpg",
    )
    max_img_size: int | None = setting(
        None, "resolution of CLIP's frames; null: the tower's own", role="view", unit="pixels", ge=1
    )


class ModelSettings(Settings):
    """Model"""

    clip_backbone: str = setting(
        "ViT-B/32",
        "CLIP: ViT-B/32, ViT-B/16, ViT-L/14 with OpenAI's weights, or an open_clip name[:tag]",
        role="model",
        pattern=r"^\S+$",
        allowed="a name, or name:tag, without spaces",
    )
    clip_weights: PathText | None = setting(
        None, "weights on disk; null: clip_backbone's, fetched", role="model", unit="file or folder"
    )
    tower: TowerSection = setting(
        {"method": "per_frame"}, "how the frames of a video go through CLIP, and its settings", role="model"
    )
    sim_header: Literal["meanP", "seqTransf", "transformer"] = setting(
        "meanP", "what selected frames pass through: nothing, four CLIP blocks, or one", role="model"
    )
    freeze_layer_num: int = setting(
        0,
        "CLIP's transformer blocks from this one on learn, and what follows them; -1: all of CLIP learns",
        role="method",
        unit="block",
        ge=-1,
    )
    freeze_clip: bool = setting(False, "nothing in CLIP learns", role="method")


class SelectionSettings(Settings):
    """Frame selection"""

    use_policy: bool = setting(True, "choose top_k frames of num_frm; without it all are used", role="model")
    top_k: int = setting(8, "frames that are chosen", role="model", unit="frames", ge=1)
    policy_backbone: Literal["mobilenet_v3_large", "mobilenet_v2", "resnet50", "raw", "clip", "frozen_clip"] = setting(
        "mobilenet_v3_large",
        "what a frame is judged by: features of a light CNN, small grey pixels (raw), or CLIP",
        role="model",
    )
    policy_weights: PathText = setting(
        "imagenet",
        "weights of the CNN",
        role="model",
        unit="file",
        allowed="imagenet (torchvision's), random, or the path of a file",
    )
    freeze_cnn: bool = setting(False, "the CNN does not learn", role="method")
    rescale_size: int = setting(56, "side of the grey images of policy_backbone raw", role="model", unit="pixels", ge=1)
    use_rnn: bool = setting(True, "relate frames in time (a temporal encoder) before they are scored", role="model")
    rnn: Literal["transformer", "lstm", "bilstm"] = setting("transformer", "the temporal encoder", role="model")
    hidden_dim: int = setting(512, "width of the temporal encoder", role="model", unit="channels", ge=1)
    mlp_type: Literal["mlp", "fc"] = setting("mlp", "what scores a frame: two layers, or one", role="model")
    mlp_hidden_dim: int = setting(
        1024, "width of the scorer's first layer, with mlp_type mlp", role="model", unit="channels", ge=1
    )
    init_tau: float = setting(5.0, "temperature of Hard-Top-k in the first epoch", role="optimisation", gt=0)
    min_tau: float = setting(0.5, "lowest temperature of Hard-Top-k", role="optimisation", gt=0)
    exp_decay_factor: float = setting(
        0.045,
        "how fast the temperature falls: init_tau x exp(-exp_decay_factor x epoch)",
        role="optimisation",
        unit="1/epoch",
        ge=0,
    )
    warmup_epochs: int = setting(
        0, "epochs in which K falls from num_frm - 1 to top_k; 0: none", role="optimisation", unit="epochs", ge=0
    )
    reuse_scores: bool = setting(False, "weight the chosen frames by their scores", role="model")


class AggregationSettings(Settings):
    """Aggregation"""

    frame_agg: Literal["mlp", "transformer", "qscore"] | None = setting(
        None,
        "how frames become one video: null takes the mean; qscore depends on the query, so it cannot be indexed",
        role="model",
    )
    frame_agg_temp: float = setting(1.0, "temperature of the softmax over frames", role="model", gt=0)
    word_agg: Literal["mlp", "transformer"] | None = setting(
        None, "how words become one text: null takes CLIP's own sentence embedding", role="model"
    )
    word_agg_temp: float = setting(1.0, "temperature of the softmax over words", role="model", gt=0)


class PeftGroup(Settings):
    """PEFT"""

    peft: PeftSection = setting({"method": "full"}, "how CLIP learns, and the settings of that method", role="method")


class OptimisationSettings(Settings):
    """Optimisation"""

    objective: ObjectiveSection | None = setting(
        None,
        "the loss; null: what the CLIP was trained with: sigmoid for SigLIP towers, contrastive for others",
        role="optimisation",
    )
    num_epochs: int = setting(30, "passes over the training data", role="optimisation", unit="epochs", ge=1)
    batch_size: int = setting(
        32, "videos in a batch, of all processes together", role="optimisation", unit="videos", ge=1
    )
    auto_batch_size: bool = setting(
        False,
        "halve batch_size until a batch fits into the accelerator's memory",
        role="optimisation",
        on_resume="ignored",
    )
    gradient_accumulation_steps: int = setting(
        1, "batches to an update of the weights", role="optimisation", unit="batches", ge=1
    )
    optim: Literal["bertadam", "adamw"] = setting("bertadam", "the optimizer", role="optimisation")
    learning_rate: float = setting(
        1e-4, "highest learning rate; that of CLIP is multiplied by coef_lr", role="optimisation", gt=0
    )
    coef_lr: float = setting(1e-3, "CLIP's learning rate is learning_rate x coef_lr", role="optimisation", ge=0)
    no_warmup: bool = setting(False, "a constant learning rate: no rise, no fall", role="optimisation")
    warmup_proportion: float = setting(
        0.1, "share of the steps in which the learning rate rises", role="optimisation", ge=0, lt=1
    )
    betas: Betas = setting((0.9, 0.98), "decay of the two moments of Adam", role="optimisation")
    weight_decay: float = setting(0.2, "decay of the weights, biases left out", role="optimisation", ge=0)
    grad_norm: GradNorm = setting(
        1.0,
        "norm to which the whole gradient is clipped; -1: not clipped",
        role="optimisation",
        allowed="a number > 0, or -1 for no clipping",
    )


class EvaluationSettings(Settings):
    """Evaluation"""

    task: TaskSection = setting({"method": "retrieval"}, "what is measured, and its settings", role="data")
    adaptation: AdaptationSection = setting(
        {"method": "none"}, "how the model adapts to what it is evaluated on, and the settings of that", role="model"
    )
    primary: str | None = setting(
        None,
        "figure that chooses the best epoch, such as t2v.R@1; null: the task's own",
        role="optimisation",
        min_length=1,
    )
    val_batch_size: int = setting(
        500, "texts or videos in a batch of evaluation", role="machine", on_resume="same", unit="items", ge=1
    )


class RunSettings(Settings):
    """Run"""

    output_dir: PathText = setting(
        "output", "where the run folder <dataset>/<time>-<method> is made", role="run", unit="folder"
    )
    tensorboard_dir: PathText | None = setting(
        None, "TensorBoard's files; null: the run folder", role="run", unit="folder"
    )
    no_output: bool = setting(False, "write no files at all", role="run")
    save_last: bool = setting(False, "keep the weights of the last epoch beside the best", role="run")
    n_display: int = setting(20, "steps between two lines of the log", role="run", on_resume="free", unit="steps", ge=1)
    save_every_steps: int = setting(
        0,
        "updates between two checkpoints to continue from; 0: one at the end of each epoch",
        role="run",
        on_resume="free",
        unit="updates",
        ge=0,
    )
    resume: PathText | None = setting(
        None,
        "a run folder: go on with that run; a weights file: begin a new run with it",
        role="run",
        on_resume="ignored",
        unit="file or folder",
    )
    do_inference: bool = setting(False, "evaluate test_annot without training", role="run")
    save_similarity: NpyPath | None = setting(
        None,
        "keep the similarity matrix of the test",
        role="run",
        unit="file",
        allowed="the path of a file named *.npy",
    )
    seed: int = setting(0, "all randomness follows from it", role="optimisation", ge=0, le=2**32 - 1)
    debug: bool = setting(False, "show the traceback of an error", role="machine")


class DeviceSettings(Settings):
    """Device"""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = setting(
        "auto", "where to compute; auto: the best there is", role="machine"
    )
    xpu: bool = setting(False, "the same as device xpu (Intel GPU)", role="machine")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32",
        "arithmetic of the towers; selection, similarity and loss stay float32",
        role="machine",
        on_resume="same",
    )
    tf32: bool = setting(
        False,
        "on CUDA, multiply float32 matrices in TF32: faster, and rounded to 10 bits",
        role="machine",
        on_resume="same",
    )
    deterministic: bool = setting(
        False, "only operations that give the same bits each time; slower on a GPU", role="machine", on_resume="same"
    )
    gradient_checkpointing: bool = setting(
        False,
        "less memory for about a third more time: activations are computed again",
        role="machine",
        on_resume="same",
    )


class SearchGroup(Settings):
    """Hyper-parameter search"""

    optuna_cfg: OptunaSettings | None = setting(
        None, "search for the best values of some settings; null: train once", role="run"
    )
    do_training_af_optuna: bool = setting(False, "train once with the best values found", role="run")


class Config(  # pydantic collects fields from the last base to the first: backwards here, in the order above there
    SearchGroup,
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
    """All settings of a run, flat but for what is chosen by name (`peft`, `tower` …) and `optuna_cfg`.

    `model_fields_set` tells which were given.
    """

    @property
    def figures(self) -> Mapping[str, bool]:
        """What the task measures, and whether more is better."""
        assert isinstance(self.task.config, TaskSettings)
        return self.task.config.figures

    @property
    def primary_figure(self) -> str:
        """The figure that chooses the best epoch."""
        return self.primary or next(iter(self.figures))

    @property
    def searched_figure(self) -> str:
        """The figure that a hyper-parameter search looks for the best of."""
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
    """The settings of the file with the overrides (the flags; dotted names for nested settings) laid over it.

    UserError lists everything that is wrong. Whether files are there is asked by `check_paths`, not here.
    """
    return load(Config, path, overrides)


def contradictions(c: Config) -> Iterator[Problem]:
    """Every combination of settings that cannot be: what is wrong and the way out, and the names of the settings."""
    if c.frames_dir and c.video_dir:
        yield "frames_dir and video_dir are both given: frames come from one of them", ("frames_dir", "video_dir")
    if c.num_frm_subset > c.num_frm:
        yield f"num_frm_subset {c.num_frm_subset} is more than num_frm {c.num_frm}", ("num_frm_subset", "num_frm")
    if c.use_policy and c.top_k > c.num_frm:
        way_out = "lower top_k, raise num_frm, or use all frames (--no_policy)"
        yield f"top_k {c.top_k} is more than num_frm {c.num_frm}: {way_out}", ("top_k", "num_frm")
    if c.use_policy and c.warmup_epochs and c.top_k == c.num_frm:
        what = f"top_k {c.top_k} is num_frm, and warmup_epochs {c.warmup_epochs} would lower K from num_frm - 1 to it"
        yield what, ("top_k", "num_frm", "warmup_epochs")
    if c.warmup_epochs > c.num_epochs:
        what = f"warmup_epochs {c.warmup_epochs} is more than num_epochs {c.num_epochs}: K would never reach top_k"
        yield what, ("warmup_epochs", "num_epochs")
    if c.use_policy and c.use_rnn and c.rnn == "transformer" and c.hidden_dim % 64:
        what = f"hidden_dim {c.hidden_dim} is no multiple of 64, the width of a head of rnn transformer"
        yield what, ("hidden_dim", "rnn")
    if c.reuse_scores and not c.use_policy:
        yield "reuse_scores needs use_policy: without it no frame has a score", ("reuse_scores", "use_policy")
    if c.min_tau > c.init_tau:
        yield f"min_tau {c.min_tau:g} is more than init_tau {c.init_tau:g}", ("min_tau", "init_tau")
    if c.frame_agg and c.word_agg:
        what = f"frame_agg {c.frame_agg} and word_agg {c.word_agg} exclude each other: set one to null"
        yield what, ("frame_agg", "word_agg")
    if c.xpu and c.device != "xpu":
        yield f"xpu and device {c.device} are both given: give one", ("xpu", "device")
    if c.precision == "fp16" and c.device == "cpu":
        yield "precision fp16 does not work on the CPU: take bf16 or fp32", ("precision", "device")
    if c.do_training_af_optuna and c.optuna_cfg is None:
        yield "do_training_af_optuna needs optuna_cfg: without it nothing is searched", ("do_training_af_optuna",)
    if c.optuna_cfg is not None and c.do_inference:
        yield "optuna_cfg and do_inference are both given: a search trains", ("optuna_cfg", "do_inference")
    selector_learns = c.use_policy or c.sim_header != "meanP" or c.frame_agg in ("mlp", "transformer") or c.word_agg
    if c.freeze_clip and not selector_learns and not c.do_inference:
        what = "nothing would learn: freeze_clip, and no selector, header or aggregator that learns"
        yield what, ("freeze_clip", "use_policy", "sim_header", "frame_agg")
    if c.save_similarity and isinstance(c.task.config, TaskSettings) and not c.task.config.has_similarity:
        yield f"save_similarity: task {c.task.method} has no similarity matrix to keep", ("save_similarity", "task")
    searched = c.optuna_cfg and c.optuna_cfg.objective
    for name, figure in {"primary": c.primary, "optuna_cfg.objective": searched}.items():
        if figure is not None and figure not in c.figures:
            known = ", ".join(c.figures)
            yield f"{name} {figure} is no figure of task {c.task.method}; it measures {known}", (name, "task")
    for chosen in (c.peft, c.tower, c.objective, c.task, c.adaptation):
        if chosen is not None:
            yield from chosen.config.contradictions(c)
