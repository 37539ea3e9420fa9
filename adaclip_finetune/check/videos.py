"""Which videos a run could not read, or not as it should: what it would find itself, and with `deep` every frame."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from adaclip_finetune.check.finding import Finding, Severity
from adaclip_finetune.check.source import Split
from adaclip_finetune.config import Config
from adaclip_finetune.data.frames import FrameError, FrameStore
from adaclip_finetune.data.readable import FRAMES_AT_ONCE, find_unreadable, short_videos
from adaclip_finetune.data.sampling import frame_indices

# What a store's reason begins with or holds, the finding that it belongs to, and what helps.
_KINDS = (
    ((os.strerror(errno.ENOENT), "there is no file"), "missing_videos", "missing", "extract or fetch them, or"),
    (("is missing, though",), "gaps", "without some of their frames (gaps in the numbering)", "extract them again, or"),
    (("differ in size",), "frame_sizes", "of frames that differ in size", "extract them again, or"),
    (("cannot be decoded",), "broken_frames", "damaged", "extract or fetch them again, or"),
)
_OTHER = ((), "unreadable_videos", "not readable", "mend them, or")


@dataclass(frozen=True)
class _Look:
    """What decoding all of a video showed. `hurts`: frames of a run are among what is wrong."""

    reasons: list[str]
    hurts: bool


def check_videos(split: Split, store: FrameStore, config: Config, deep: bool) -> tuple[list[Finding], list[str]]:
    """The findings, and the videos that a run would take. `deep` decodes every frame, in num_workers threads."""
    ids = [video.video_id for video in split.videos]
    left_out = find_unreadable(store, ids, config.num_workers)
    good = [video_id for video_id in ids if video_id not in left_out]
    severity, consequence = _consequence(split, config, none_left=not good)
    findings = list(_by_kind(split, left_out, len(ids), severity, consequence))
    if short := {video_id: store.count(video_id) for video_id in short_videos(store, good, config.num_frm)}:
        message = f"{len(short)} of {len(ids)} videos have fewer than num_frm {config.num_frm} frames, and repeat some"
        items = {video_id: f"{count} frames" for video_id, count in short.items()}
        advice = "lower num_frm, or extract more frames a second"
        findings.append(Finding("warning", "short_videos", split.name, message, items, advice))
    if deep:
        looks = _look_through(store, good, split, config)
        hurt = {video_id: "; ".join(look.reasons) for video_id, look in looks.items() if look.hurts}
        severity, consequence = _consequence(split, config, none_left=len(hurt) == len(good), on_the_way=True)
        findings += _by_kind(split, hurt, len(ids), severity, consequence)
        spared = {video_id: "; ".join(look.reasons) for video_id, look in looks.items() if not look.hurts}
        consequence = f"in frames that num_frm {config.num_frm} passes over"
        findings += _by_kind(split, spared, len(ids), "warning", consequence)
        good = [video_id for video_id in good if video_id not in hurt]
    if ids and not any(finding.check != "short_videos" for finding in findings):
        said = f"all {len(ids)} videos can be read" + ("" if deep else " (their first frame was; --deep reads all)")
        findings.append(Finding("fine", "videos", split.name, said))
    return findings, good


def _consequence(split: Split, config: Config, none_left: bool, on_the_way: bool = False) -> tuple[Severity, str]:
    """What a run does about videos that it cannot read."""
    if none_left:
        return "fails", "none is left, so a run stops"
    if split.trains:
        return "warning", "left out of their batches" if on_the_way else "left out of training"
    if config.skip_missing:
        return "warning", "left out of the evaluation, and of its gallery (skip_missing)"
    return "fails", "an evaluation stops"


def _by_kind(
    split: Split, reasons: Mapping[str, str], of: int, severity: Severity, consequence: str
) -> Iterator[Finding]:
    """A finding for each kind of reason."""
    for words, check, what, help_first in (*_KINDS, _OTHER):
        found = {video_id: reason for video_id, reason in reasons.items() if _kind(reason) == words}
        if found:
            skip = "; or --skip_missing" if severity == "fails" and not split.trains else ""
            message = f"{len(found)} of {of} videos {'is' if len(found) == 1 else 'are'} {what}: {consequence}"
            yield Finding(
                severity, check, split.name, message, found, f"{help_first} take them out of {split.path}{skip}"
            )


def _kind(reason: str) -> tuple[str, ...]:
    return next((words for words, *_ in _KINDS if any(word in reason for word in words)), ())


def _look_through(store: FrameStore, ids: Sequence[str], split: Split, config: Config) -> dict[str, _Look]:
    """Video → what is wrong with it, for those where something is."""
    # A run that draws its frames comes upon any of them.
    draws = split.trains and config.sampling == "random" and not config.segment_sampling
    pool = ThreadPoolExecutor(max(1, config.num_workers))
    try:
        looks = pool.map(lambda video_id: _look(store, video_id, config, draws), ids)
        bar = tqdm(looks, f"decoding {split.name}", len(ids), unit="video", leave=False, disable=None)
        return {video_id: look for video_id, look in zip(ids, bar, strict=True) if look.reasons}
    finally:
        pool.shutdown(cancel_futures=True)


def _look(store: FrameStore, video_id: str, config: Config, draws: bool) -> _Look:
    count, reasons, sizes = store.count(video_id), [], set()
    for start in range(0, count, FRAMES_AT_ONCE):
        frames = range(start, min(start + FRAMES_AT_ONCE, count))
        found, why = _read(store, video_id, frames)
        # Images are broken one by one; a video that breaks is broken from there on, and slow to try again.
        for number in frames if why and config.frames_dir else ():
            here, why_this = _read(store, video_id, [number])
            found, why = found | here, ""
            reasons += [why_this] if why_this else []
        sizes |= found
        if why:
            reasons.append(why)
            break
    if len(sizes) > 1:
        told = " and ".join(f"{width}x{height}" for height, width in sorted(sizes))
        reasons.append(f"frames differ in size: {told}")
    return _Look(reasons, bool(reasons) and (draws or _hurts(store, video_id, count, config)))


def _read(store: FrameStore, video_id: str, frames: Sequence[int]) -> tuple[set[tuple[int, int]], str]:
    """Height and width of the frames, or why they cannot be read."""
    try:
        return {store.read(video_id, frames).shape[1:3]}, ""
    except FrameError as error:
        return set(), f"{error.path}: {error.reason}"


def _hurts(store: FrameStore, video_id: str, count: int, config: Config) -> bool:
    """Whether reading the frames that a run reads fails."""
    chosen = frame_indices(count, config.num_frm, segment=config.segment_sampling, subset=config.num_frm_subset)
    return bool(_read(store, video_id, sorted(set(chosen.tolist())))[1])
