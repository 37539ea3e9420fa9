"""Find the videos that cannot be read before a run depends on them, and list them in messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

LISTED = 20


class UnreadableVideos(UserError):
    """Videos are needed that cannot be read; `reasons` holds the reason for each."""

    def __init__(self, message: str, reasons: Mapping[str, str]) -> None:
        super().__init__(message)
        self.reasons = dict(reasons)


def find_unreadable(store: FrameStore, video_ids: Sequence[str], num_workers: int) -> dict[str, str]:
    """Return the file and reason for each video that `find_errors` finds."""
    errors = find_errors(store, video_ids, num_workers)
    return {video_id: f"{error.path}: {error.reason}" for video_id, error in errors.items()}


def find_errors(store: FrameStore, video_ids: Sequence[str], num_workers: int) -> dict[str, FrameError]:
    """Return the error of each video that is missing, empty or does not open, in the order given.

    The frames of each video are counted, which the store and later runs remember, and the first one is decoded.
    """

    def tried(video_id: str) -> FrameError | None:
        try:
            store.count(video_id)
            store.times(video_id)
            store.read(video_id, [0])
        except FrameError as error:
            return error
        return None

    # Threads, because decoders release the GIL, and what the store learns stays in this process for later workers.
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        errors = list(tqdm(pool.map(tried, video_ids), "checking videos", len(video_ids), leave=False, disable=None))
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(store, VideoFolder):
            store.remember()
    return {video_id: error for video_id, error in zip(video_ids, errors, strict=True) if error}


def short_videos(store: FrameStore, video_ids: Iterable[str], num_frm: int) -> list[str]:
    """Return the videos that have fewer than num_frm frames, so that frames are repeated."""
    return [video_id for video_id in video_ids if store.count(video_id) < num_frm]


def listing(reasons: Mapping[str, str], at_most: int | None = LISTED) -> str:
    """Return a line for each of the first `at_most` videos (None: all), and one with the number of the others."""
    lines = [f"  {video_id}: {reason}" for video_id, reason in list(reasons.items())[:at_most]]
    if len(reasons) > len(lines):
        lines.append(f"  and {len(reasons) - len(lines)} more")
    return "\n".join(lines)
