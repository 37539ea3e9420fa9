"""The data audit: entries that are refused, videos that cannot be read, captions that are cut, splits that overlap."""

from __future__ import annotations

import itertools
import re
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from adaclip_finetune.check.report import Finding, Severity, plural
from adaclip_finetune.config import Config
from adaclip_finetune.config.parts import DataPart, is_folder_of_videos, is_lazy, parts_of
from adaclip_finetune.data.annotations import VideoAnnotation, folded, sound_entries
from adaclip_finetune.data.class_names import distinct
from adaclip_finetune.data.dataset import frames_to_read
from adaclip_finetune.data.frame_store import FrameError, FrameStore, Kind
from adaclip_finetune.data.queries import train_entries
from adaclip_finetune.data.readable import find_errors, short_videos
from adaclip_finetune.data.splits import open_stores, read_listed
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable
from adaclip_finetune.weights.loaded import LoadedClip

_SAMPLE = 1000  # entries that are read of JSON Lines and of tar shards
# Kind of error → name of the finding, what is wrong with the videos, what to do.
_KINDS: dict[Kind, tuple[str, str, str]] = {
    "missing": ("missing_videos", "missing", "extract or fetch them"),
    "gap": ("gaps", "incomplete, with images missing between others", "extract them again"),
    "sizes": ("frame_sizes", "made of frames of several sizes", "extract them again"),
    "damaged": ("broken_frames", "damaged", "extract or fetch them again"),
    "unreadable": ("unreadable_videos", "unreadable", "repair or replace them"),
}


@dataclass
class CheckedSplit:
    """An annotation, and what the check finds out about its videos.

    `trains` tells whether the run learns from it. `refused` says why entries are refused; `videos` are the others. Of
    JSON Lines and tar shards these are a sample of the `listed` videos. `good` are the videos that can be opened and in
    which --deep found nothing wrong.
    """

    name: str
    path: str
    trains: bool
    videos: list[VideoAnnotation]
    refused: list[str]
    store: FrameStore
    listed: int = 0
    good: list[str] = field(default_factory=list)


# ---- the splits ----


def splits_of_config(config: Config) -> list[CheckedSplit]:
    """Return the splits that a run reads."""
    evaluated = {"val": config.val_annot, "test": config.test_annot}
    parts = parts_of(config.train_annot or [])
    if config.do_inference:
        parts, evaluated = [], {"test": config.test_annot}
    names = ["train" if isinstance(config.train_annot, str) else f"train {n + 1}" for n in range(len(parts))]
    splits = [_read(name, part, True, config) for name, part in zip(names, parts, strict=True)]
    return splits + [_read(n, DataPart(annotation=path), False, config) for n, path in evaluated.items() if path]


def splits_of_files(paths: Sequence[str], config: Config) -> list[CheckedSplit]:
    """Return annotation files as splits named like the files, with their folders if needed to tell them apart.

    A file with the word "train" in this name counts as training data.
    """
    places = [Path(path).resolve() for path in paths]
    stems = [place.stem for place in places]
    in_folders = [f"{place.parent.name}/{place.stem}" for place in places]
    names = next(names for names in (stems, in_folders, paths) if len(set(names)) == len(paths))
    # Whole words: `restrained` is not training data.
    trains = [bool({"train", "training", "trainval"} & set(re.findall("[a-z]+", name.lower()))) for name in names]
    parts = [DataPart(annotation=path) for path in paths]
    return [_read(*facts, config) for facts in zip(names, parts, trains, strict=True)]


def _read(name: str, part: DataPart, trains: bool, config: Config) -> CheckedSplit:
    videos: list[VideoAnnotation] = []
    refused: list[str] = []
    listed, subset = 0, (part.subset or config.data_subset) if trains else 0
    try:
        if trains and is_lazy(part.annotation):
            lazy = read_listed(part, subset)
            listed = len(lazy)
            for place in np.unique(np.linspace(0, listed - 1, _SAMPLE).astype(np.int64)).tolist():
                try:
                    videos.append(lazy[place])
                except UserError as error:
                    refused.append(str(error))
        elif trains and is_folder_of_videos(part.annotation):
            videos = list(read_listed(part, config.data_subset))
            listed = len(videos)
        else:
            videos, refused = sound_entries(part.annotation)
            videos = videos[: subset or None]
            listed = len(videos)
    except UserError as error:
        refused = [str(error)]
    store = open_stores(config, [part], [videos])[part.place]
    return CheckedSplit(name, part.annotation, trains, videos, refused, store, listed)


def check_entries(split: CheckedSplit) -> Iterator[Finding]:
    """Yield a finding that lists every entry that a run would refuse, and one if only a sample was read."""
    if split.trains and is_lazy(split.path) and split.listed > (read := len(split.videos) + len(split.refused)):
        message = f"{read:,} of {split.listed:,} entries were read, evenly spaced; a run reads the others as it trains"
        yield Finding("fine", "sample", split.name, message, {"read": read, "listed": split.listed})
    if split.refused:
        items = {reason.removeprefix(f"{split.path}: "): "" for reason in split.refused}
        message = f"{len(items)} {'entry is' if len(items) == 1 else 'entries are'} not in the annotation format"
        yield Finding("fails", "annotation", split.name, message, items, f"correct {split.path}")


# ---- videos ----


def check_videos(split: CheckedSplit, config: Config, deep: bool) -> Iterator[Finding]:
    """Yield findings about the videos that a run could not read, or not as it should; fill `split.good`.

    `deep` decodes every frame, in num_workers threads. Videos that the objective does not see are not looked for.
    """
    ids = [video.video_id for video in split.videos]
    if split.trains and not config.trains_on_videos:
        split.good = ids
        return
    errors = find_errors(split.store, ids, config.num_workers)
    split.good = [video_id for video_id in ids if video_id not in errors]
    short = short_videos(split.store, split.good, config.num_frm)
    found = list(_unreadable(split, errors, *_effect(split, config)))
    if deep:
        damage = _look_through(split, config)
        hurt = {video_id: error for video_id, (error, hurts) in damage.items() if hurts}
        spared = {video_id: error for video_id, (error, hurts) in damage.items() if not hurts}
        split.good = [video_id for video_id in split.good if video_id not in hurt]
        found += _unreadable(split, hurt, *_effect(split, config, later=True))
        found += _unreadable(split, spared, "warning", f"in frames that num_frm {config.num_frm} passes over")
    if ids and not found:
        how = "" if deep else " (the first frame was read; --deep reads all)"
        found = [Finding("fine", "videos", split.name, f"{plural(len(ids), 'video')} can be read{how}")]
    yield from found
    of_all = f"of {plural(len(ids), 'video')}"
    if short:
        items = {video_id: f"{split.store.count(video_id)} frames" for video_id in short}
        message = f"{len(short)} {of_all} shorter than num_frm {config.num_frm} frames, so frames are repeated"
        advice = "lower num_frm, or extract more frames a second"
        yield Finding("warning", "short_videos", split.name, message, items, advice)
    clips = {
        video.video_id: f"{video.start or 0:g} s to {'the end' if video.end is None else f'{video.end:g} s'}"
        for video in split.videos
        if video.start is not None or video.end is not None
    }
    if clips and not config.frames_dir:
        message = f"{len(clips)} {of_all} with start or end, which video_dir ignores: whole files are read"
        advice = f"extract the clips (adaclip extract --clips {split.path}), unless each file is a clip already"
        yield Finding("warning", "clips", split.name, message, clips, advice)


def _effect(split: CheckedSplit, config: Config, later: bool = False) -> tuple[Severity, str]:
    """Return what a run makes of videos that it cannot read. `later` means that it meets them during training."""
    if not split.good:
        return "fails", "none is left, so a run stops"
    if split.trains:
        return "warning", "left out of their batches" if later else "left out of training"
    if config.skip_missing:
        return "warning", "left out of the evaluation and its gallery (skip_missing)"
    return "fails", "an evaluation stops, unless --skip_missing is given"


def _unreadable(
    split: CheckedSplit, errors: Mapping[str, FrameError], severity: Severity, effect: str
) -> Iterator[Finding]:
    """Yield a finding for each kind of error."""
    for kind, (check, wrong, advice) in _KINDS.items():
        items = {name: f"{error.path}: {error.reason}" for name, error in errors.items() if error.kind == kind}
        if items:
            message = f"{len(items)} of {plural(len(split.videos), 'video')} {wrong}: {effect}"
            yield Finding(severity, check, split.name, message, items, f"{advice}, or remove them from {split.path}")


def _look_through(split: CheckedSplit, config: Config) -> dict[str, tuple[FrameError, bool]]:
    """Decode all frames of all videos. Return the first error of each damaged video, and whether it hurts a run."""
    # A run that draws its frames at random meets any of them.
    drawn = ("segments", "ends") if config.segment_sampling else ("random", "segments", "ends")
    draws = split.trains and config.sampling in drawn
    store, stop = split.store, threading.Event()

    def look(video_id: str) -> tuple[FrameError, bool] | None:
        sizes: dict[tuple[int, ...], int] = {}
        try:
            for index, frame in store.scan(video_id, stop.is_set):
                sizes.setdefault(frame.shape, index)
            if len(sizes) > 1:
                store.read(video_id, sorted(sizes.values()))  # raises if the store does not allow several sizes
        except FrameError as error:
            damage = error
        else:
            return None
        try:
            store.read(video_id, frames_to_read(store, config, video_id).tolist())
        except FrameError:
            return damage, True
        return damage, draws

    pool = ThreadPoolExecutor(max(1, config.num_workers))
    try:
        title, looks = f"decoding {printable(split.name)}", pool.map(look, split.good)
        shown = tqdm(looks, title, len(split.good), unit="video", leave=False, disable=None)
        return {video_id: seen for video_id, seen in zip(split.good, shown, strict=True) if seen}
    finally:  # Ctrl-C does not wait until hours of video are decoded
        stop.set()
        pool.shutdown(cancel_futures=True)


# ---- captions ----


def check_captions(split: CheckedSplit, config: Config, clip: LoadedClip | None) -> Iterator[Finding]:
    """Yield findings about the captions. Without `clip`, whose tokens count, lengths are not checked."""
    if not split.videos:
        return
    counts = [len(video.sentences) for video in split.videos]
    items = {"videos": len(counts), "captions": sum(counts), "min": min(counts), "max": max(counts)}
    message = f"{plural(len(counts), 'video')}, {plural(sum(counts), 'caption')} ({min(counts)} to {max(counts)} each)"
    yield Finding("fine", "captions", split.name, message, items)
    # The texts that the text tower sees.
    entries = train_entries(split.videos, config.concat_captions)
    texts = [(entry.video_id, text) for entry in entries for text in entry.sentences]
    spelled: dict[str, str] = {}
    videos: dict[str, dict[str, None]] = defaultdict(dict)
    for video_id, text in texts:
        videos[spelled.setdefault(folded(text), text)][video_id] = None
    shared = {text: list(of_text) for text, of_text in videos.items() if len(of_text) > 1}
    if config.task_settings.of_classes:
        yield from [] if split.trains else [_classes(split)]
    elif shared:
        effect = "their videos count as each other's negatives" if split.trains else "no model can tell which is meant"
        message = f"{plural(len(shared), 'caption')} shared by several videos: {effect}"
        advice = "give captions that tell them apart"
        yield Finding("warning", "shared_captions", split.name, message, shared, advice)
    if clip is not None:
        yield _long_captions(split, texts, config, clip)
    if split.trains and config.uses_auxiliary:
        yield _auxiliary_captions(split)


def _classes(split: CheckedSplit) -> Finding:
    of_video = {video.video_id: distinct(video.sentences) for video in split.videos}
    several = {video_id: " | ".join(classes) for video_id, classes in of_video.items() if len(classes) > 1}
    if several:
        message = f"{len(several)} of {plural(len(of_video), 'video')} have several classes: an evaluation stops"
        return Finding("fails", "classes", split.name, message, several, f"give each video one class in {split.path}")
    classes = distinct(name for (name,) in of_video.values())
    return Finding("fine", "classes", split.name, f"{len(classes)} classes", {"classes": len(classes)})


def _long_captions(split: CheckedSplit, texts: Sequence[tuple[str, str]], config: Config, clip: LoadedClip) -> Finding:
    limit, title = config.max_txt_len, f"captions of {printable(split.name)}"
    items: dict[str, list[str]] = defaultdict(list)
    for video_id, text in tqdm(texts, title, leave=False, disable=None):
        if clip.count_cut([text], limit):
            items[video_id].append(text)
    cut = list(itertools.chain(*items.values()))
    if not cut:
        return Finding("fine", "long_captions", split.name, f"max_txt_len {limit} cuts no caption")
    joined = ", all sentences of a video joined (concat_captions)" if config.concat_captions == "concat" else ""
    message = f"max_txt_len {limit} cuts {len(cut)} of {len(texts)} captions ({len(cut) / len(texts):.1%}){joined}"
    enough = range(limit, clip.context_length + 1)
    place = bisect_left(enough, True, hi=len(enough) - 1, key=lambda length: not clip.count_cut(cut, length))
    left = clip.count_cut(cut, enough[place])
    advice = f"max_txt_len {enough[place]} cuts {left or 'none'} of them"
    if left == len(cut):
        advice = f"the text tower takes no more than {clip.context_length} tokens: shorten the captions"
    return Finding("warning", "long_captions", split.name, message, items, advice)


def _auxiliary_captions(split: CheckedSplit) -> Finding:
    having = sum(bool(video.auxiliary) for video in split.videos)
    message = f"{having} of {plural(len(split.videos), 'video')} have an auxiliary caption"
    items = {"having": having, "videos": len(split.videos)}
    if having:
        return Finding("fine", "auxiliary_captions", split.name, message, items)
    advice = f'give captions in {split.path} under the key "auxiliary", or take objective.config.loss v_s'
    return Finding("fails", "auxiliary_captions", split.name, message, items, advice)


# ---- overlap ----


def check_overlap(splits: Sequence[CheckedSplit], of_classes: bool) -> Iterator[Finding]:
    """Yield what splits share that they should not, which makes figures look better than they are.

    With `of_classes`, sentences name classes, which splits should share.
    """
    found: list[Finding] = []
    for one, other in itertools.combinations([split for split in splits if split.videos], 2):
        if one.trains and other.trains:
            continue  # what is learned twice makes no figure better
        shared = _shared(one, other, f"{one.name}, {other.name}")
        found += [finding for finding in shared if not (of_classes and finding.check == "captions_of_both")]
    if not found and len(splits) > 1:
        message = "no video, source video (group) or caption is shared"
        found = [Finding("fine", "overlap", ", ".join(split.name for split in splits), message)]
    yield from found


def _shared(one: CheckedSplit, other: CheckedSplit, where: str) -> Iterator[Finding]:
    if one.videos == other.videos and not (one.trains or other.trains):
        message = "the same data: the epoch is chosen on what it is then judged by, and every figure says so"
        advice = "give another val_annot, of videos not in test_annot"
        yield Finding("warning", "same_data", where, message, advice=advice)
        return
    advice = f"remove them from {one.path if one.trains else other.path}"
    both = {video.video_id for video in one.videos} & {video.video_id for video in other.videos}
    ours = [video for video in one.videos if video.video_id not in both]
    theirs = [video for video in other.videos if video.video_id not in both]
    if both:
        items = dict.fromkeys(sorted(both), "")
        yield Finding("warning", "shared_videos", where, f"{plural(len(both), 'video')} in both", items, advice)
    sources = {video.group for video in one.videos}
    groups: dict[str, list[str]] = defaultdict(list)
    for video in theirs:
        if video.group is not None and video.group in sources:
            groups[video.group].append(video.video_id)
    if groups:
        message = f"{plural(len(groups), 'source video')} (group) in both, from which different clips are cut"
        yield Finding("warning", "shared_groups", where, message, groups, advice)
    known = {folded(sentence): video.video_id for video in ours for sentence in video.sentences}
    written = [(sentence, video.video_id) for video in theirs for sentence in video.sentences]
    captions = {text: [known[folded(text)], video_id] for text, video_id in written if folded(text) in known}
    if captions:
        message = f"{plural(len(captions), 'caption')} in both, of different videos"
        advice = "harmless if the words are common; make sure that they are not the same clip under two names"
        yield Finding("warning", "captions_of_both", where, message, captions, advice)
