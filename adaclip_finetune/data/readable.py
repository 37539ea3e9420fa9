"""Which videos cannot be read, found before a run depends on them, and how that is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

LISTED = 20


class UnreadableVideos(UserError):
    """Videos that are needed and cannot be read; `reasons` tells of each."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


def find_unreadable(store: FrameStore, video_ids: Sequence[str], num_workers: int) -> dict[str, str]:
    """Video → place and reason, for each that `find_errors` finds."""
    errors = find_errors(store, video_ids, num_workers)
    return {video_id: f"{error.path}: {error.reason}" for video_id, error in errors.items()}


def find_errors(store: FrameStore, video_ids: Sequence[str], num_workers: int) -> dict[str, FrameError]:
    """Video → what is wrong, for each that is missing, empty or does not open; in the order given.

    Each video's frames are counted (which the store then knows, and so do later runs) and its first frame decoded.
    """

    def tried(video_id: str) -> FrameError | None:
        try:
            store.count(video_id)
            store.read(video_id, [0])
        except FrameError as error:
            return error
        return None

    # Threads, because decoders release the interpreter and what the store learns stays here, to be handed to workers.
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        errors = list(tqdm(pool.map(tried, video_ids), "checking videos", len(video_ids), leave=False, disable=None))
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(store, VideoFolder):
            store.remember()
    return {video_id: error for video_id, error in zip(video_ids, errors, strict=True) if error}


def short_videos(store: FrameStore, video_ids: Iterable[str], num_frm: int) -> list[str]:
    """The videos that have fewer than num_frm frames and so repeat some."""
    return [video_id for video_id in video_ids if store.count(video_id) < num_frm]


def listing(reasons: Mapping[str, str], at_most: int | None = LISTED) -> str:
    """One line a video, the first `at_most` (None: all); then how many more."""
    lines = [f"  {video_id}: {reason}" for video_id, reason in list(reasons.items())[:at_most]]
    if len(reasons) > len(lines):
        lines.append(f"  and {len(reasons) - len(lines)} more")
    return "\n".join(lines)
