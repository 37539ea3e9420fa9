"""What splits share that they should not: videos, source videos, captions. Figures look better by it than they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from adaclip_finetune.check.finding import Finding, plural
from adaclip_finetune.check.source import Split
from adaclip_finetune.data.annotations import folded


def check_overlap(splits: Sequence[Split]) -> Iterator[Finding]:
    """A finding for each two splits and each kind of thing that they share; one that is fine where none do."""
    sound = True
    for split in splits:
        if split.chosen_and_judged:
            sound = False
            yield _same_data(split.name)
    for one, other in itertools.combinations([split for split in splits if split.videos], 2):
        where = f"{one.name}, {other.name}"
        same = one.videos == other.videos and not (one.trains or other.trains)
        found = [_same_data(where)] if same else list(_shared(one, other, where))
        sound = sound and not found
        yield from found
    if sound and len(splits) > 1:
        message = "share no video, no source video (group) and no caption"
        yield Finding("fine", "overlap", ", ".join(split.name for split in splits), message)


def _same_data(where: str) -> Finding:
    message = "are the same data: the epoch is chosen on what it is judged by, and every figure says so"
    return Finding("warning", "same_data", where, message, advice="give another val_annot, of videos not in test_annot")


def _shared(one: Split, other: Split, where: str) -> Iterator[Finding]:
    there = {video.video_id: video for video in other.videos}
    videos = {video.video_id: "" for video in one.videos if video.video_id in there}
    advice = f"take them out of {one.path if one.trains else other.path}"
    if videos:
        yield Finding("warning", "shared_videos", where, f"share {plural(len(videos), 'video')}", videos, advice)
    groups: dict[str, list[str]] = {video.group: [] for video in one.videos if video.group is not None}
    for video in other.videos:
        if video.group in groups and video.group is not None and video.video_id not in videos:
            groups[video.group].append(video.video_id)
    if common := {group: ids for group, ids in groups.items() if ids}:
        message = f"share {plural(len(common), 'source video')} (group), from which different clips are cut"
        yield Finding("warning", "shared_groups", where, message, common, advice)
    # Those of shared videos are told of already.
    known = {
        folded(sentence): video.video_id
        for video in one.videos
        if video.video_id not in there
        for sentence in video.sentences
    }
    captions = {
        sentence: [known[key], video.video_id]
        for video in other.videos
        if video.video_id not in videos
        for sentence in video.sentences
        if (key := folded(sentence)) in known
    }
    if captions:
        message = f"share {plural(len(captions), 'caption')}, of different videos"
        advice = "harmless where the words are common; see that they are no clips that stand there under two names"
        yield Finding("warning", "captions_of_both", where, message, captions, advice)
