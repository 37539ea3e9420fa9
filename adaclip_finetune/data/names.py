"""Names of videos: how two names are compared, and how a file or folder is found by a name.

The same name can be written in several Unicode forms: `é` is one character on most systems and two (`e` and an accent)
in file names that come from a Mac. Names are therefore compared in one form (NFC) wherever a video is looked up.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

# How the names of video files end. Files with other names are videos, too, if the reader can open them.
VIDEO_EXTENSIONS = (
    "mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "3gp", "ts", "flv", "wmv",
    "3g2", "asf", "divx", "dv", "f4v", "gif", "m1v", "m2t", "m2ts", "m2v", "mjpeg", "mjpg", "mpe", "mts", "mxf",
    "ogm", "ogv", "rm", "rmvb", "vob", "y4m",
)  # fmt: skip


def canonical(name: str) -> str:
    """Return the name in Unicode's composed form (NFC). Two names are the same if these forms are equal."""
    return unicodedata.normalize("NFC", name)


def split_extension(name: str) -> tuple[str, str | None]:
    """Split `a.b.MP4` into `a.b` and `mp4`; return (name, None) for a name that does not end as a video file's does.

    Identifiers may hold dots themselves, so only known extensions are taken off.
    """
    stem, _, extension = name.rpartition(".")
    return (stem, extension.lower()) if stem and extension.lower() in VIDEO_EXTENSIONS else (name, None)


def differing_forms(names: Iterable[str]) -> str | None:
    """Return a message that names two of the names which differ in nothing but their Unicode form; None if none do."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(canonical(name), name)
        if other != name:
            return f"{other!a} and {name!a} are the same name in two Unicode forms; rename or remove one"
    return None


class FolderNames:
    """Finds entries below a folder by name, in whatever Unicode form the file system has it.

    Each folder is listed once, and only if a name that is not ASCII is looked up in it.
    """

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, root: Path, video_id: str) -> Path:
        """Return the path of a video's file or folder below `root`; `root / video_id` where there is no such entry.

        Raises FrameError if two entries differ in nothing but the Unicode form of their names.
        """
        path = root
        for part in video_id.split("/"):
            names = [part] if part.isascii() else self._listing(path).get(canonical(part), [part])
            if message := differing_forms(names):
                from adaclip_finetune.data.frame_store import FrameError  # `adaclip convert --help` needs no NumPy

                raise FrameError(video_id, path, message)
            path /= names[0]
        return path

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """Return the names that are not ASCII by their canonical form; none for a folder that cannot be listed."""
        if folder not in self._listings:
            listing: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    for name in (entry.name for entry in entries if not entry.name.isascii()):
                        listing.setdefault(canonical(name), []).append(name)
            except OSError:
                pass  # opening what is in the folder will tell the reason
            self._listings[folder] = listing
        return self._listings[folder]
