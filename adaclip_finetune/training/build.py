"""Everything that a run needs before its first update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.readable import listing
from adaclip_finetune.data.splits import TrainSplit, train_split
from adaclip_finetune.model.clip import LoadedClip
from adaclip_finetune.model.flops import Gflops, count_gflops
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.checkpoints import check_settings, describe, read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import load_clip, load_pretrained
from adaclip_finetune.peft import PeftMethod, TrainableReport, prepare_peft, trainable_report
from adaclip_finetune.processes import world_size
from adaclip_finetune.training.checkpoint import fill
from adaclip_finetune.training.device import describe_device
from adaclip_finetune.training.memory import fitting_batch_size
from adaclip_finetune.training.run_folder import RunFolder, environment


@dataclass
class Session:
    """A model on its device, and what learns in it."""

    config: Config
    run: RunFolder
    accelerator: Accelerator
    loaded: LoadedClip
    model: VideoRetriever
    method: PeftMethod
    gflops: Gflops
    parameters: TrainableReport = field(init=False)

    def __post_init__(self) -> None:
        self.recount()

    def recount(self) -> None:
        """After the method changed what learns."""
        self.parameters = trainable_report(self.model)

    def open_folder(self) -> None:
        """Nothing is left to refuse: make the run folder."""
        self.run.open(self.config)
        self.run.write_json("environment.json", environment(self.device))
        self.record()

    def record(self) -> None:
        """What learns, and what it costs, as the first line of metrics.jsonl."""
        self.run.record("parameters", 0, **self.parameters.as_dict(), gflops=self.gflops.as_dict())

    @property
    def device(self) -> str:
        """In words."""
        several = f", {world_size()} processes" if world_size() > 1 else ""
        return describe_device(self.accelerator.device) + several

    def fit_batches(self) -> None:
        """Settle `auto_batch_size`: the batch sizes that fit into memory stand in the config from here on."""

        def fit(batch_size: int) -> int:
            return fitting_batch_size(
                self.config, self.model, self.loaded.tokenize, self.accelerator, self.run.say, batch_size
            )

        peft = self.config.peft
        peft = peft.model_copy(update={"config": peft.config.with_fitting_batches(fit)})
        found = {"peft": peft, "batch_size": fit(self.config.batch_size), "auto_batch_size": False}
        self.config = self.config.model_copy(update=found)
        self.method = prepare_peft(self.model, self.config)

    def pretrained(self) -> LoadedClip:
        """CLIP as it was before anything learned: the session's own at its start, a fresh one after `resume`."""
        return load_pretrained(self.config, self.loaded) if self.config.resume else self.loaded


def build_session(config: Config, run: RunFolder, accelerator: Accelerator) -> Session:
    """Seed, model, `resume`'s weights, and what learns, in this order; says what it built. Raises UserError."""
    set_seed(config.seed)
    checkpoint = read_checkpoint(Path(config.resume)) if config.resume else None
    if checkpoint is not None:
        config = with_its_clip(checkpoint, config)
        if checkpoint.is_foreign:
            check_settings(checkpoint, config)
    loaded = load_clip(config, from_checkpoint=checkpoint.towers() if checkpoint else None)
    # A checkpoint brings the CNN's weights too, so that none need be fetched.
    built = config.model_copy(update={"policy_weights": "random"}) if checkpoint else config
    model = VideoRetriever(built, loaded)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    if checkpoint is not None:
        fill(model, checkpoint)
        run.say(describe(checkpoint, config))
    method = prepare_peft(model, config)
    model.to(accelerator.device)
    session = Session(config, run, accelerator, loaded, model, method, count_gflops(model, config.num_frm))
    run.say(f"device {session.device}, {config.precision}   CLIP {loaded.source}   seed {config.seed}")
    run.say(f"method {config.peft.method}\n{session.parameters}")
    run.say(describe_gflops(session.gflops))
    return session


def train_loader(config: Config, loaded: LoadedClip, run: RunFolder) -> TrainLoader:
    """The training data, with an account of what of it is left out, repeated or cut."""
    split = readable_train_split(config, run)
    texts = [sentence for entry in split.entries for sentence in entry.sentences]
    say_cut(loaded, texts, config.max_txt_len, "train", run)
    dataset = TrainDataset(split.entries, VideoReader(split.store, config, loaded.image))
    return TrainLoader(dataset, config, loaded.tokenize)


def readable_train_split(config: Config, run: RunFolder) -> TrainSplit:
    """The training split; unreadable videos are listed on the screen and, all of them, in missing_videos.txt."""
    assert config.train_annot is not None, "check_paths refuses this"
    split = train_split(config, config.train_annot)
    if split.left_out:
        run.say(f"train: {len(split.left_out)} videos cannot be read and are left out:\n{listing(split.left_out)}")
        run.note_missing(split.left_out)
    if split.short:
        run.say(f"train: {len(split.short)} videos have fewer than num_frm {config.num_frm} frames and repeat some")
    return split


def note_failed(loader: TrainLoader, run: RunFolder) -> None:
    """Account for videos that opened at first and could not be read then; to be called by all processes."""
    if failed := loader.take_failed():
        run.say(f"left out of their batches, because they could not be read:\n{listing(failed)}")
        run.note_missing(failed)


def say_cut(loaded: LoadedClip, texts: Sequence[str], max_txt_len: int, name: str, run: RunFolder) -> None:
    """Say once how many captions max_txt_len cuts."""
    if texts and (cut := loaded.count_cut(texts, max_txt_len)):
        run.say(f"{name}: max_txt_len {max_txt_len} cuts {cut} of {len(texts)} captions")


def describe_gflops(gflops: Gflops) -> str:
    """One line for the screen."""
    return (
        f"GFLOPs (multiply-adds): {gflops.video:.3g} a video; a frame: CLIP {gflops.clip_frame:.3g}, "
        f"policy {gflops.policy_frame:.3g}; all frames: temporal encoder {gflops.temporal_encoder:.3g}, "
        f"scorer {gflops.scorer:.3g}, aggregation {gflops.header_and_aggregator:.3g}; "
        f"products inside attention add {gflops.video_attention:.3g}"
    )
