"""The data that a run reads, with messages about what is left out, repeated or cut."""

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
    """Return the loader of training batches."""
    split = readable_train_split(config, loaded, run)
    dataset = TrainDataset(split.entries, VideoReader(split.store, config, views))
    return TrainLoader(dataset, config, loaded.tokenize)


def readable_train_split(config: Config, loaded: LoadedClip, run: RunFolder) -> TrainSplit:
    """Return the training split without unreadable videos, which are printed and noted in missing_videos.txt."""
    assert config.train_annot is not None, "check_paths refuses this"
    split = train_split(config, config.train_annot)
    _say_problems(split, f"train: {len(split.left_out)} videos cannot be read and are left out", "train", config, run)
    say_cut(loaded, [text for entry in split.entries for text in entry.sentences], config.max_txt_len, "train", run)
    return split


def read_split(config: Config, annotation: str | None, run: RunFolder, name: str) -> EvaluationSplit:
    """Return the split to evaluate, called `name` in messages. Raise UserError."""
    assert annotation is not None, "check_paths refuses this"
    split = evaluation_split(config, annotation)
    what = f"{name}: evaluated WITHOUT {len(split.left_out)} of {split.num_listed} videos that cannot be read"
    _say_problems(split, what, name, config, run)
    return split


def note_failed(loader: TrainLoader, run: RunFolder) -> None:
    """Report videos that could be opened at first but not read later. All processes must call it together."""
    if failed := loader.take_failed():
        run.say(f"left out of their batches, because they could not be read:\n{listing(failed)}")
        run.note_missing(failed)


def say_cut(loaded: LoadedClip, texts: Sequence[str], max_txt_len: int, name: str, run: RunFolder) -> None:
    """Print how many captions max_txt_len cuts, if any."""
    if texts and (cut := loaded.count_cut(texts, max_txt_len)):
        run.say(f"{name}: max_txt_len {max_txt_len} cuts {cut} of {len(texts)} captions")


def _say_problems(split: TrainSplit | EvaluationSplit, what: str, name: str, config: Config, run: RunFolder) -> None:
    if split.left_out:
        run.say(f"{what}:\n{listing(split.left_out)}")
        run.note_missing(split.left_out)
    if split.short:
        run.say(f"{name}: {len(split.short)} videos have fewer than num_frm {config.num_frm} frames and repeat some")
