"""A picture a video: its best frame, small, as a JPEG."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.durable import write_durably
from adaclip_finetune.search.videos import Clip

SIDE = 320  # pixels, the longer one
_QUALITY = 80


def write_thumbnail(folder: Path, store: FrameStore, clip: Clip, frame: int) -> str:
    """The name of the picture in `folder`; empty if the frame cannot be read any more. Raises OSError."""
    name = f"{hashlib.sha256(repr((clip.id, clip.stamp, frame)).encode()).hexdigest()[:20]}.jpg"
    try:
        picture = Image.fromarray(store.read(clip.id, [frame])[0])
    except FrameError:
        return ""
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=_QUALITY)
    write_durably(folder / name, content.getvalue())
    return name


def remove_others(folder: Path, names: Iterable[str]) -> None:
    """Pictures of videos that are gone."""
    kept = set(names)
    for path in folder.glob("*.jpg"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
