"""The data of a run as it reads them, with an account of what is left out, repeated or cut."""

from __future__ import annotations

from collections.abc import Sequence

from adaclip_finetune.config import Config
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.readable import listing
from adaclip_finetune.data.splits import EvaluationSplit, TrainSplit, evaluation_split, train_split
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.weights.loaded import LoadedClip


def train_loader(config: Config, loaded: LoadedClip, views: Views, run: RunFolder) -> TrainLoader:
    """Batches of the training split."""
    split = readable_train_split(config, run)
    texts = [sentence for entry in split.entries for sentence in entry.sentences]
    say_cut(loaded, texts, config.max_txt_len, "train", run)
    dataset = TrainDataset(split.entries, VideoReader(split.store, config, views))
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


def read_split(config: Config, annotation: str | None, run: RunFolder, name: str) -> EvaluationSplit:
    """The split to evaluate. Raises UserError."""
    assert annotation is not None, "check_paths refuses this"
    split = evaluation_split(config, annotation)
    if split.left_out:
        run.say(f"{name}: evaluated WITHOUT {len(split.left_out)} of {split.num_listed} videos that cannot be read:")
        run.say(listing(split.left_out))
        run.note_missing(split.left_out)
    if split.short:
        run.say(f"{name}: {len(split.short)} videos have fewer than num_frm {config.num_frm} frames and repeat some")
    return split


def note_failed(loader: TrainLoader, run: RunFolder) -> None:
    """Account for videos that opened at first and could not be read later; to be called by all processes."""
    if failed := loader.take_failed():
        run.say(f"left out of their batches, because they could not be read:\n{listing(failed)}")
        run.note_missing(failed)


def say_cut(loaded: LoadedClip, texts: Sequence[str], max_txt_len: int, name: str, run: RunFolder) -> None:
    """Say once how many captions max_txt_len cuts."""
    if texts and (cut := loaded.count_cut(texts, max_txt_len)):
        run.say(f"{name}: max_txt_len {max_txt_len} cuts {cut} of {len(texts)} captions")
