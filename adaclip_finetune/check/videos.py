"""Which videos a run could not read, or not as it should: what it would find itself, and with `deep` every frame."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from tqdm import tqdm

from adaclip_finetune.check.finding import Finding, Severity
from adaclip_finetune.check.source import Split
from adaclip_finetune.config import Config
from adaclip_finetune.data.frame_store import FrameError, FrameStore, Kind
from adaclip_finetune.data.readable import find_errors, short_videos
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.printable import printable

# What is wrong → the finding, of one video, of several, and what helps.
_KINDS: dict[Kind, tuple[str, str, str, str]] = {
    "missing": ("missing_videos", "is missing", "are missing", "extract or fetch them, or"),
    "gap": ("gaps", "lacks frames", "lack frames", "extract them again, or"),
    "sizes": ("frame_sizes", "has frames of several sizes", "have frames of several sizes", "extract them again, or"),
    "damaged": ("broken_frames", "is damaged", "are damaged", "extract or fetch them again, or"),
    "unreadable": ("unreadable_videos", "is not readable", "are not readable", "mend them, or"),
}


@dataclass(frozen=True)
class Looked:
    """What looking at the videos of a split came to. `opened`: those that a run begins with; `good`: those of them in
    which --deep found nothing wrong either."""

    findings: list[Finding]
    opened: list[str]
    good: list[str]


class _Wrong(NamedTuple):
    kind: Kind
    told: str


@dataclass
class _Look:
    """What decoding all of a video showed. `hurts`: frames of a run are among what is wrong."""

    wrong: list[_Wrong] = field(default_factory=list)
    hurts: bool = False


class _Consequence(NamedTuple):
    """What a run makes of videos that it cannot read. `way_out`: what else to do than mend them."""

    severity: Severity
    words: str
    way_out: str = ""


def check_videos(split: Split, store: FrameStore, config: Config, deep: bool) -> Looked:
    """`deep` decodes every frame, in num_workers threads."""
    ids = [video.video_id for video in split.videos]
    errors = find_errors(store, ids, config.num_workers)
    opened = good = [video_id for video_id in ids if video_id not in errors]
    shut = {video_id: [_wrong(error)] for video_id, error in errors.items()}
    findings = list(_by_kind(split, shut, _consequence(split, config, none_left=not opened)))
    if deep:
        looks = _look_through(store, opened, split, config)
        hurt = {video_id: look.wrong for video_id, look in looks.items() if look.hurts}
        spared = {video_id: look.wrong for video_id, look in looks.items() if not look.hurts}
        none_left = len(hurt) == len(opened)
        findings += _by_kind(split, hurt, _consequence(split, config, none_left, on_the_way=True))
        passed_over = _Consequence("warning", f"in frames that num_frm {config.num_frm} passes over")
        findings += _by_kind(split, spared, passed_over)
        good = [video_id for video_id in opened if video_id not in hurt]
    if ids and not findings:
        said = "the only video" if len(ids) == 1 else f"all {len(ids)} videos"
        said += " can be read" + ("" if deep else " (the first frame was; --deep reads all)")
        findings.append(Finding("fine", "videos", split.name, said))
    return Looked([*findings, *_short(split, store, opened, config), *_clips(split, config)], opened, good)


def _short(split: Split, store: FrameStore, opened: Sequence[str], config: Config) -> Iterator[Finding]:
    if short := {video_id: store.count(video_id) for video_id in short_videos(store, opened, config.num_frm)}:
        have = "has" if len(short) == 1 else "have"
        message = f"{_of(len(short), split)} {have} fewer than num_frm {config.num_frm} frames, some of them repeated"
        items = {video_id: f"{count} frames" for video_id, count in short.items()}
        advice = "lower num_frm, or extract more frames a second"
        yield Finding("warning", "short_videos", split.name, message, items, advice)


def _clips(split: Split, config: Config) -> Iterator[Finding]:
    """Of a video that is read in place every frame counts, whatever `start` and `end` say."""
    cut = {
        video.video_id: f"{video.start or 0:g} s to {'the end' if video.end is None else f'{video.end:g} s'}"
        for video in split.videos
        if video.start is not None or video.end is not None
    }
    if cut and not config.frames_dir:
        have = "has" if len(cut) == 1 else "have"
        message = f"{_of(len(cut), split)} {have} start or end, but in video_dir frames of the whole file are taken"
        advice = f"extract the clips (adaclip extract --clips {split.path}), unless each file is a clip already"
        yield Finding("warning", "clips", split.name, message, cut, advice)


def _consequence(split: Split, config: Config, none_left: bool, on_the_way: bool = False) -> _Consequence:
    if none_left:
        return _Consequence("fails", "none is left, so a run stops")
    if split.trains:
        return _Consequence("warning", "left out of their batches" if on_the_way else "left out of training")
    if config.skip_missing:
        return _Consequence("warning", "left out of the evaluation, and of its gallery (skip_missing)")
    return _Consequence("fails", "an evaluation stops", "; or --skip_missing")


def _wrong(error: FrameError) -> _Wrong:
    return _Wrong(error.kind, f"{error.path}: {error.reason}")


def _by_kind(split: Split, videos: Mapping[str, Sequence[_Wrong]], consequence: _Consequence) -> Iterator[Finding]:
    """A finding for each kind of what is wrong first with a video."""
    for kind, (check, one, several, help_first) in _KINDS.items():
        found = {
            video_id: "; ".join(part.told for part in wrong)
            for video_id, wrong in videos.items()
            if wrong[0].kind == kind
        }
        if found:
            message = f"{_of(len(found), split)} {one if len(found) == 1 else several}: {consequence.words}"
            advice = f"{help_first} take them out of {split.path}{consequence.way_out}"
            yield Finding(consequence.severity, check, split.name, message, found, advice)


def _of(count: int, split: Split) -> str:
    whole = len(split.videos)
    return "the only video" if whole == 1 else f"{count} of {whole} videos"


def _look_through(store: FrameStore, ids: Sequence[str], split: Split, config: Config) -> dict[str, _Look]:
    """Video → what is wrong with it, for those where something is."""
    # A run that draws its frames comes upon any of them.
    draws = split.trains and config.sampling == "random" and not config.segment_sampling
    stop = threading.Event()
    pool = ThreadPoolExecutor(max(1, config.num_workers))
    try:
        looks = pool.map(lambda video_id: _look(store, video_id, config, draws, stop.is_set), ids)
        bar = tqdm(looks, f"decoding {printable(split.name)}", len(ids), unit="video", leave=False, disable=None)
        return {video_id: look for video_id, look in zip(ids, bar, strict=True) if look.wrong}
    finally:  # Ctrl-C does not wait for the hours that a video may have
        stop.set()
        pool.shutdown(cancel_futures=True)


def _look(store: FrameStore, video_id: str, config: Config, draws: bool, stopped: Callable[[], bool]) -> _Look:
    look, sizes = _Look(), dict[int, tuple[int, ...]]()
    try:
        if config.frames_dir:  # images are broken one by one; a video is broken from there on
            for index in range(store.count(video_id)):
                if stopped():
                    return look
                try:
                    sizes[index] = store.read(video_id, [index]).shape[1:3]
                except FrameError as error:
                    look.wrong.append(_wrong(error))
        else:
            for index, frame in store.scan(video_id, stopped):
                sizes[index] = frame.shape[:2]
    except FrameError as error:
        look.wrong.append(_wrong(error))
    if len(set(sizes.values())) > 1:
        told = " and ".join(f"{width}x{height}" for height, width in sorted(set(sizes.values())))
        look.wrong.append(_Wrong("sizes", f"frames differ in size: {told}"))
    look.hurts = bool(look.wrong) and not stopped() and (draws or _hurts(store, video_id, sizes, config))
    return look


def _hurts(store: FrameStore, video_id: str, sizes: Mapping[int, tuple[int, ...]], config: Config) -> bool:
    """Whether reading the frames that a run reads fails. `sizes`: of the frames that decoding everything gave."""
    count = store.count(video_id)
    chosen = frame_indices(count, config.num_frm, segment=config.segment_sampling, subset=config.num_frm_subset)
    wanted = set(chosen.tolist())
    if wanted <= sizes.keys() and len({sizes[index] for index in wanted}) == 1:
        return False
    try:  # a run may get at frames behind the damage
        store.read(video_id, sorted(wanted))
    except FrameError:
        return True
    return False
