"""Which of the converted videos have a file in a folder, found as training finds them."""

from __future__ import annotations

from pathlib import Path

from adaclip_finetune.data.formats.clip import Clip
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.video.folder import VideoFolder


class Present:
    """Looks for files, and remembers how many are missing and the first few of them."""

    def __init__(self, folder: Path) -> None:
        self.store = VideoFolder(folder)
        self.missing = 0
        self.examples: list[str] = []

    def look(self, clip: Clip) -> bool:
        """Whether the clip, or the file that it is to be cut out of, is there."""
        names = [clip.video] if clip.start is None or clip.group is None else [clip.video, clip.group]
        if any(self._has(name, clip.extension) for name in names):
            return True
        self.missing += 1
        if len(self.examples) < 3:
            self.examples.append(f"{names[-1]}.{clip.extension}" if clip.extension else names[-1])
        return False

    def _has(self, name: str, extension: str | None) -> bool:
        self.store.extensions = {name: extension} if extension else {}
        try:
            self.store.find(name)
        except FrameError:
            return False
        return True
