"""All settings of a run: name, type, default, range, unit and one line of help.

`load_config(file, overrides)` merges defaults, a file and flags, validates the result and returns a frozen `Config`.
`check_paths(config)` then checks that the files exist. The sections that choose something by name (`peft`, `tower`,
…) are declared in `choices/`. This file does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from adaclip_finetune.config.base import Contradictions, PathText, Problem, Role, Settings, setting
from adaclip_finetune.config.choices.adaptations import AdaptationSection
from adaclip_finetune.config.choices.captioners import CaptionerSection
from adaclip_finetune.config.choices.objectives import ObjectiveSection, ObjectiveSettings
from adaclip_finetune.config.choices.peft import PeftSection
from adaclip_finetune.config.choices.tasks import TaskSection, TaskSettings
from adaclip_finetune.config.choices.towers import TowerSection, TowerSettings
from adaclip_finetune.config.layers import load
from adaclip_finetune.config.optuna import OptunaSettings
from adaclip_finetune.config.parts import (
    TrainAnnotation,
    contradictions_of_parts,
    is_folder_of_videos,
    is_lazy,
    no_captions,
    parts_of,
)

Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]

Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Field(strict=False)]

NpyPath = Annotated[PathText, Field(pattern=r"\.npy$")]

# One function per role: `view(default, help, …)` declares a setting that has the role "view".
data, view, model, method, optimisation, run, machine = (partial(setting, role=role) for role in get_args(Role))

GROUPS = {
    "dataset": "Data",
    "num_frm": "Frames",
    "clip_backbone": "Model",
    "use_policy": "Frame selection",
    "frame_agg": "Aggregation",
    "captioner": "Captioning",
    "peft": "Parameter-efficient finetuning",
    "objective": "Optimisation",
    "task": "Evaluation",
    "output_dir": "Run",
    "device": "Device",
    "optuna_cfg": "Hyperparameter tuning",
}
"""The first setting of each group of `--help` → the title of the group."""


class Config(Settings):
    """All settings of a run. The namespace is flat except for the sections (`peft`, `tower`, …) and `optuna_cfg`.

    `model_fields_set` holds the names of the settings that were given.
    """

    # Data
    dataset: str = run(
        "videos",
        "name of the data set; the run folder is made in output_dir/<dataset>",
        pattern=r"^\w[\w.-]{0,99}$",
        allowed="a name of letters, digits, dots, dashes and underscores",
    )
    train_annot: TrainAnnotation | None = data(
        None,
        "training data, required to train: an annotation (JSON, JSON Lines), tar shards, or a list of parts (mixture)",
        unit="file or folder",
        allowed="the path of a file or folder, or a JSON list of parts, each an object with annotation, video_dir or "
        "frames_dir, per_batch or weight, and labelled",
    )
    val_annot: PathText | None = data(
        None, "annotation of the validation split, which selects the best epoch; required for training", unit="file"
    )
    test_annot: PathText | None = data(None, "annotation of the test split, evaluated once at the end", unit="file")
    frames_dir: PathText | None = data(
        None, "extracted frames: a folder per video, or an LMDB pack; excludes video_dir", unit="folder or file"
    )
    video_dir: PathText | None = data(None, "video files, decoded in place; excludes frames_dir", unit="folder")
    concat_captions: Literal["concat", "indep-one", "indep-all"] = data(
        "concat", "captions of a video: joined into one text; one drawn per epoch; each one a sample of its own"
    )
    max_txt_len: int = view(
        20, "maximum tokens of a caption, start and end included; longer ones are truncated", unit="tokens", ge=3
    )
    data_subset: int = optimisation(0, "train on this many videos only; 0: on all of them", unit="videos", ge=0)
    skip_missing: bool = data(False, "evaluate without unreadable videos and report their number beside each figure")
    num_workers: int = machine(2, "data loader processes; 0: the main process reads", unit="processes", ge=0)
    pin_mem: bool = machine(False, "use pinned memory for batches (faster copies to a GPU)")

    # Frames
    num_frm: int = view(16, "frames sampled from each video", unit="frames", ge=1)
    num_frm_subset: int = view(0, "keep this many sampled frames and blank the rest; 0: all", unit="frames", ge=0)
    sampling: Literal["uniform", "random", "segments", "ends"] = optimisation(
        "uniform", "training frames: evenly, drawn, one drawn in each of num_frm segments, or evenly between drawn ends"
    )
    augmentation: Literal["crop_flip"] | None = optimisation(
        None, "training frames as they are, or one random part of all frames of a video, half of the time mirrored"
    )
    segment_sampling: bool = view(False, "split a video into num_frm equal segments and sample the middle of each")
    to_last_frame: bool = view(False, "sample evenly from the first to the last frame, as CLIP-ViP")
    img_tmpl: str = data(
        "image_{:05d}.jpg",
        "file name of frame n in frames_dir/<video>/, counted from 1",
        pattern=r"^[^{}/\\]*\{(:0?[0-9]{0,2}d)?\}[^{}/\\]*$",
        allowed="a file name with one place for the number, as in image_{:05d}.jpg",
    )
    resize: Literal["shortest", "stretch"] | None = view(
        None, "resize the shorter side of a frame and crop the centre, or stretch both sides; null: as CLIP was trained"
    )
    max_img_size: int | None = view(None, "input resolution of CLIP; null: that of its training", unit="pixels", ge=1)

    # Model
    clip_backbone: str = model(
        "ViT-B/32",
        "CLIP model: ViT-B/32, ViT-B/16 or ViT-L/14 with OpenAI's weights, or an open_clip name[:tag]",
        pattern=r"^\S+$",
        allowed="a name, or name:tag, without spaces",
    )
    clip_weights: PathText | None = model(None, "CLIP weights on disk; null: download them", unit="file or folder")
    tower: TowerSection = model({"method": "per_frame"}, "how CLIP's image tower encodes the frames of a video")
    sim_header: Literal["meanP", "seqTransf", "transformer"] = model(
        "meanP", "temporal header on the selected frames: none, 4 transformer blocks initialised from CLIP, or 1 block"
    )
    freeze_layer_num: int = method(
        0, "freeze CLIP's embeddings and blocks below this one; -1: none", unit="block", ge=-1
    )
    freeze_clip: bool = method(False, "freeze all of CLIP")

    # Frame selection
    use_policy: bool = model(True, "select top_k of num_frm frames; otherwise all of them are used")
    top_k: int = model(8, "frames selected from each video", unit="frames", ge=1)
    policy_backbone: Literal["mobilenet_v3_large", "mobilenet_v2", "resnet50", "raw", "clip", "frozen_clip"] = model(
        "mobilenet_v3_large",
        "features that the selector scores: a light CNN's, grey thumbnails (raw), or CLIP's embeddings",
    )
    policy_weights: PathText = model(
        "imagenet",
        "weights of the selector's CNN",
        unit="file",
        allowed="imagenet (torchvision's), random, or the path of a file",
    )
    policy_size: int = model(
        224, "side of the frames of the selector's CNN; 112 takes a third of the time", unit="pixels", ge=32
    )
    freeze_cnn: bool = method(False, "freeze the selector's CNN")
    rescale_size: int = model(56, "side of the grey thumbnails of policy_backbone raw", unit="pixels", ge=1)
    use_rnn: bool = model(True, "use a temporal encoder before frames are scored")
    rnn: Literal["transformer", "lstm", "bilstm"] = model("transformer", "architecture of the temporal encoder")
    hidden_dim: int = model(512, "width of the temporal encoder", unit="channels", ge=1)
    mlp_type: Literal["mlp", "fc"] = model("mlp", "head that scores a frame: an MLP with a hidden layer, or linear")
    mlp_hidden_dim: int = model(1024, "width of the hidden layer of mlp_type mlp", unit="channels", ge=1)
    init_tau: float = optimisation(5.0, "temperature of Hard-Top-k in the first epoch", gt=0)
    min_tau: float = optimisation(0.5, "lower bound of the temperature of Hard-Top-k", gt=0)
    exp_decay_factor: float = optimisation(
        0.045, "decay of the temperature: init_tau * exp(-exp_decay_factor * epoch)", unit="1/epoch", ge=0
    )
    policy_gradient: Literal["exact", "selected"] = optimisation(
        "exact",
        "gradient of the selector: of all frames, or as if all others were the mean of the selected ones (faster)",
    )
    warmup_epochs: int = optimisation(0, "epochs in which K falls from num_frm - 1 to top_k", unit="epochs", ge=0)
    reuse_scores: bool = model(False, "weight the selected frames by their selection scores")

    # Aggregation
    frame_agg: Literal["mlp", "transformer", "qscore"] | None = model(
        None, "how frame embeddings are pooled into one video vector; null: mean. qscore depends on the query: no index"
    )
    frame_agg_temp: float = model(1.0, "temperature of the softmax over frames", gt=0)
    word_agg: Literal["mlp", "transformer"] | None = model(
        None, "how word embeddings are pooled into one text vector; null: CLIP's sentence embedding"
    )
    word_agg_temp: float = model(1.0, "temperature of the softmax over words", gt=0)

    # Captioning
    captioner: CaptionerSection | None = model(
        None, "what turns vectors of videos into captions, with a frozen language model; null: nothing"
    )

    # Parameter-efficient finetuning
    peft: PeftSection = method({"method": "full"}, "finetuning method of CLIP")

    # Optimisation
    objective: ObjectiveSection | None = optimisation(
        None, "training loss; null: the loss CLIP was pretrained with (sigmoid for SigLIP, otherwise contrastive)"
    )
    num_epochs: int = optimisation(30, "passes over the training data", unit="epochs", ge=1)
    batch_size: int = optimisation(32, "videos in a batch, all processes together", unit="videos", ge=1)
    similar_captions: int = optimisation(
        1, "make batches of groups of this many videos with similar captions; 1: at random", unit="videos", ge=1
    )
    similar_share: float = optimisation(
        0.5, "share of an epoch's videos in groups of similar_captions; the others are at random", gt=0, le=1
    )
    auto_batch_size: bool = optimisation(False, "halve batch_size until a step fits into memory", on_resume="ignored")
    gradient_accumulation_steps: int = optimisation(1, "batches per optimizer step", unit="batches", ge=1)
    optim: Literal["bertadam", "adamw", "clip_vip_adamw"] = optimisation(
        "bertadam", "optimizer: that of AdaCLIP, torch's AdamW, or CLIP-ViP's AdamW"
    )
    adam_epsilon: float = optimisation(1e-8, "number that keeps AdamW from dividing by 0; bertadam has 1e-6", gt=0)
    learning_rate: float = optimisation(1e-4, "peak learning rate of everything outside of CLIP", gt=0)
    coef_lr: float = optimisation(1e-3, "CLIP's peak learning rate is learning_rate * coef_lr", ge=0)
    no_warmup: bool = optimisation(False, "keep the learning rate constant: no warm-up, no decay")
    lr_schedule: Literal["bert", "clip4clip", "clip_vip"] = optimisation(
        "bert", "warm-up and cosine decay, as AdaCLIP, CLIP4Clip (also CenterCLIP and DGL) or CLIP-ViP compute them"
    )
    warmup_proportion: float = optimisation(0.1, "fraction of steps in which the learning rate warms up", ge=0, lt=1)
    betas: Betas = optimisation((0.9, 0.98), "Adam's decay rates of the two moments")
    weight_decay: float = optimisation(
        0.2, "weight decay; biases have none, nor has the logit scale with clip_vip_adamw", ge=0
    )
    grad_norm: float = optimisation(
        1.0, "maximum norm of the gradient (clipping); -1: none", allowed="a number > 0, or -1"
    )
    ema_decay: float = optimisation(
        0.0,
        "decay of the average that is validated and saved in place of the weights, such as 0.999; 0: no average",
        ge=0,
        lt=1,
    )

    # Evaluation
    task: TaskSection = data({"method": "retrieval"}, "task that is evaluated")
    adaptation: AdaptationSection = model({"method": "none"}, "test-time adaptation of the model to each query")
    primary: str | None = optimisation(
        None, "figure that selects the best epoch, such as t2v.R@1; null: the task's default", min_length=1
    )
    val_batch_size: int = machine(500, "texts or videos in an evaluation batch", on_resume="same", unit="items", ge=1)

    # Run
    output_dir: PathText = run("output", "folder where the run folder <dataset>/<time>-<method> is made", unit="folder")
    tracker: Trackers = run(
        ["tensorboard"], "where to log the numbers of the run, beside metrics.jsonl; []: nowhere", on_resume="free"
    )
    tensorboard_dir: PathText | None = run(None, "folder of the TensorBoard files; null: the run folder", unit="folder")
    no_output: bool = run(False, "write no files")
    save_last: bool = run(False, "save the weights of the last epoch beside the best")
    n_display: int = run(20, "optimizer steps between two lines of the log", on_resume="free", unit="steps", ge=1)
    save_every_steps: int = run(
        0, "optimizer steps between snapshots to resume from; 0: one per epoch", on_resume="free", unit="steps", ge=0
    )
    resume: PathText | None = run(
        None, "a run folder to resume, or weights to start a new run from", on_resume="ignored", unit="file or folder"
    )
    do_inference: bool = run(False, "evaluate test_annot without training")
    save_similarity: NpyPath | None = run(
        None, "file for the similarity matrix of the test split", unit="file", allowed="the path of a file named *.npy"
    )
    seed: int = optimisation(0, "seed of all random numbers", ge=0, le=2**32 - 1)
    debug: bool = machine(False, "show the traceback of an error")

    # Device
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = machine(
        "auto", "device to compute on; auto: an accelerator if there is one"
    )
    xpu: bool = machine(False, "the same as device xpu (Intel GPU)")
    precision: Literal["fp32", "bf16", "fp16"] = machine(
        "fp32", "mixed precision of the towers; selection, similarity and loss are always float32", on_resume="same"
    )
    tf32: bool = machine(False, "on CUDA, multiply float32 matrices in TF32 (fast, 10-bit mantissa)", on_resume="same")
    deterministic: bool = machine(False, "use deterministic algorithms only (slower on a GPU)", on_resume="same")
    grad_cache_chunk: int = machine(
        0,
        "pairs that a process computes at a time, with the gradients of the whole batch; 0: all",
        on_resume="same",
        unit="pairs",
        ge=0,
    )
    embedding_cache: PathText | None = machine(
        None,
        "folder that keeps embeddings of frames, if CLIP's image tower is frozen: epochs then read no video",
        unit="folder",
    )
    gradient_checkpointing: bool = machine(
        False, "recompute activations in the backward pass: less memory, about a third more time", on_resume="same"
    )
    compile: bool = machine(
        False, "compile CLIP's blocks with torch.compile: faster steps on a GPU, a slower start", on_resume="same"
    )

    # Hyperparameter tuning
    optuna_cfg: OptunaSettings | None = run(None, "tune hyperparameters with Optuna; null: train once")
    do_training_af_optuna: bool = run(False, "after tuning, train once with the best values found")

    @property
    def task_settings(self) -> TaskSettings:
        """The settings of the task."""
        assert isinstance(self.task.config, TaskSettings)
        return self.task.config

    @property
    def figures(self) -> Mapping[str, bool]:
        """Name of each figure of the task, and whether higher is better."""
        return self.task_settings.figures

    @property
    def primary_figure(self) -> str:
        """The figure that selects the best epoch."""
        return self.primary or next(iter(self.figures))

    @property
    def tuned_figure(self) -> str:
        """The figure that hyperparameter tuning optimises."""
        return (self.optuna_cfg and self.optuna_cfg.objective) or self.primary_figure

    @property
    def uses_auxiliary(self) -> bool:
        """Whether the objective learns from auxiliary captions."""
        chosen = None if self.objective is None else self.objective.config
        return isinstance(chosen, ObjectiveSettings) and chosen.uses_auxiliary

    @property
    def trains_on_videos(self) -> bool:
        """Whether the objective sees the training videos."""
        chosen = None if self.objective is None else self.objective.config
        return not isinstance(chosen, ObjectiveSettings) or chosen.uses_videos

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
    """Yield each impossible combination of settings, with the names of the settings."""
    for message in _contradictions(c):
        words = (word.rstrip(".:") for word in re.findall(r"[\w.:]+", message))
        yield message, tuple(dict.fromkeys(word for word in words if word.split(".")[0] in Config.model_fields))
    for chosen in (c.peft, c.tower, c.captioner, c.objective, c.task, c.adaptation):
        if chosen is not None:
            yield from chosen.config.contradictions(c)
    if c.train_annot is not None and not isinstance(c.train_annot, str):
        objective = c.objective and c.objective.config
        uses_unlabelled = isinstance(objective, ObjectiveSettings) and objective.uses_unlabelled
        yield from contradictions_of_parts(c, c.train_annot, uses_unlabelled)
    elif c.train_annot is not None and is_folder_of_videos(c.train_annot):
        yield no_captions("train_annot", c.train_annot), ("train_annot",)


def _contradictions(c: Config) -> Iterator[str]:
    """Yield what is wrong and the way out. A message names all settings that it is about."""
    if c.frames_dir and c.video_dir:
        yield "frames_dir and video_dir are both given: frames come from one of them"
    lazy = [part.annotation for part in parts_of(c.train_annot or []) if is_lazy(part.annotation)]
    if lazy and c.concat_captions == "indep-all":
        what = f"concat_captions indep-all would have to read all of train_annot {lazy[0]} to count its captions"
        yield f"{what}: give each caption a line of its own, or take indep-one"
    if c.similar_captions > 1 and (lazy or not isinstance(c.train_annot, str | None)):
        what = f"similar_captions {c.similar_captions} compares all captions of one JSON annotation"
        yield f"{what}: name a single one as train_annot, or leave similar_captions at 1"
    if c.similar_captions > c.batch_size:
        yield f"similar_captions {c.similar_captions} is larger than batch_size {c.batch_size}: lower it to that"
    if c.num_frm_subset > c.num_frm:
        yield f"num_frm_subset {c.num_frm_subset} is larger than num_frm {c.num_frm}"
    if c.segment_sampling and c.to_last_frame:
        yield "segment_sampling and to_last_frame are both given: frames are chosen in one of these ways"
    if c.use_policy and c.top_k > c.num_frm:
        larger = f"top_k {c.top_k} is larger than num_frm {c.num_frm}"
        yield f"{larger}: lower top_k, raise num_frm, or use all frames with --no_policy"
    if c.use_policy and c.warmup_epochs and c.top_k == c.num_frm:
        yield f"warmup_epochs {c.warmup_epochs} lowers K from num_frm - 1 to top_k, but top_k is num_frm ({c.top_k})"
    if c.warmup_epochs > c.num_epochs:
        yield f"warmup_epochs {c.warmup_epochs} is larger than num_epochs {c.num_epochs}: K would never reach top_k"
    if c.use_policy and c.use_rnn and c.rnn == "transformer" and c.hidden_dim % 64:
        yield f"hidden_dim {c.hidden_dim} is not a multiple of 64, the head width of rnn transformer"
    if c.use_policy and c.policy_gradient == "selected":
        saves = "policy_gradient selected saves the encoding of frames that were not selected"
        if c.policy_backbone == "clip":
            yield f"{saves}, but policy_backbone clip encodes all of them: take exact, or another policy_backbone"
        if c.tower.method != "per_frame":
            yield f"{saves}, which works for tower.method per_frame only, not {c.tower.method}: take exact"
        if c.embedding_cache:
            yield f"{saves}, of which embedding_cache keeps the embeddings: take exact"
    if c.reuse_scores and not c.use_policy:
        yield "reuse_scores requires use_policy: without it frames have no scores"
    if c.min_tau > c.init_tau:
        yield f"min_tau {c.min_tau:g} is larger than init_tau {c.init_tau:g}"
    if c.grad_norm <= 0 and c.grad_norm != -1:
        yield f"grad_norm {c.grad_norm:g} must be above 0, or -1 for no clipping"
    if c.frame_agg and c.word_agg:
        yield f"frame_agg {c.frame_agg} and word_agg {c.word_agg} cannot be combined: set one of them to null"
    if c.xpu and c.device != "xpu":
        yield f"xpu and device {c.device} are both given: give one"
    if c.precision == "fp16" and c.device == "cpu":
        yield "precision fp16 does not work on device cpu: use bf16 or fp32"
    others = ", ".join(name for name in c.tracker if name != "tensorboard")
    if c.no_output and others:
        yield f"no_output writes nothing, and so nothing to tracker {others}: give one of them"
    if c.tensorboard_dir and "tensorboard" not in c.tracker:
        yield f"tensorboard_dir is given, but tracker is {others or 'empty'}: add tensorboard to tracker"
    if c.do_training_af_optuna and c.optuna_cfg is None:
        yield "do_training_af_optuna requires optuna_cfg: without it nothing is tuned"
    if c.optuna_cfg is not None and c.do_inference:
        yield "optuna_cfg and do_inference are both given, but tuning trains: give one"
    tower_learns = isinstance(c.tower.config, TowerSettings) and c.tower.config.learns
    pooling_learns = c.sim_header != "meanP" or c.frame_agg in ("mlp", "transformer") or c.word_agg
    added = c.use_policy or pooling_learns or tower_learns
    if c.freeze_clip and not added and not c.do_inference:
        yield "nothing to train: freeze_clip is set; use_policy, sim_header, frame_agg, word_agg and tower add nothing"
    if c.embedding_cache and not c.do_inference:
        yield from _learning_before_vectors(c)
    if c.save_similarity and not c.task_settings.has_similarity:
        yield f"save_similarity: task {c.task.method} has no similarity matrix"
    task = c.task_settings
    if c.adaptation.method != "none" and not (task.has_similarity or task.of_classes or task.of_captions):
        what = f"adaptation {c.adaptation.method} adapts to captions, which task.method {c.task.method} does not ask"
        yield f"{what}: set adaptation.method to none, or take task.method retrieval"
    tuned = c.optuna_cfg and c.optuna_cfg.objective
    for name, figure in {"primary": c.primary, "optuna_cfg.objective": tuned}.items():
        if figure is not None and figure not in c.figures:
            yield f"{name} {figure} is not a figure of task {c.task.method}; its figures are {', '.join(c.figures)}"


def _learning_before_vectors(c: Config) -> Iterator[str]:
    """Yield what changes the embeddings of frames from step to step."""
    what = "embedding_cache keeps what frozen networks make of the same frames in each epoch"
    methods = getattr(c.peft.config, "methods", (c.peft,))
    if not c.freeze_clip and any(getattr(part.config, "towers", "both") != "text" for part in methods):
        yield f"{what}: set freeze_clip or peft.config.towers text, or leave embedding_cache out"
    if isinstance(c.tower.config, TowerSettings) and not c.tower.config.framewise:
        yield f"{what}, but tower.method {c.tower.method} mixes the frames that are chosen: take per_frame or change"
    if c.use_policy and c.policy_backbone in ("mobilenet_v3_large", "mobilenet_v2", "resnet50") and not c.freeze_cnn:
        yield f"{what}: set freeze_cnn, or choose a policy_backbone that does not learn (raw, clip, frozen_clip)"
    if c.sampling != "uniform":
        yield f"{what}, but sampling {c.sampling} draws others: take uniform"
    if c.augmentation is not None:
        yield f"{what}, but augmentation {c.augmentation} changes them: leave it out"
    if lazy := [part.annotation for part in parts_of(c.train_annot or []) if is_lazy(part.annotation)]:
        yield f"{what}, of all of train_annot before the first one, which {lazy[0]} is too large for: leave it out"
