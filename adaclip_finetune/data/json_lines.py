"""Annotations as JSON Lines, for training data that does not fit into memory: an object in each line.

    {"video": "video_name", "sentences": ["…", …], …}

The other keys are those of the JSON annotation. Several lines may name the same video. Only the places of the lines are
held in memory, 8 bytes a line; a line is parsed each time it is needed.
"""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path

import numpy as np

from adaclip_finetune.data.annotations import VideoAnnotation, parse_video, shown
from adaclip_finetune.data.lazy_sequence import LazySequence
from adaclip_finetune.data.other_forms import describe_other_form
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import decoded, parse_json

_BLOCK = 2**22  # bytes


class JsonLines(LazySequence[VideoAnnotation]):
    """The videos of a JSON Lines file, one a line, each parsed when it is asked for; UserError if it is wrong.

    Only the first `at_most` lines count if that is above 0. `digest` is the SHA-256 of these lines.
    """

    def __init__(self, path: Path, at_most: int = 0) -> None:
        """Find the lines. Raise UserError if the file cannot be read, is empty, or its first line is wrong."""
        self.path = path
        try:
            self._starts, self.digest = _scan(path, at_most)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        if not len(self):
            raise UserError(f"{path}: holds no video")
        self[0]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _row(self, index: int) -> VideoAnnotation:
        where = f"{self.path}: line {index + 1}"
        try:
            with self.path.open("rb") as file:
                file.seek(self._starts[index])
                line = file.read(self._starts[index + 1] - self._starts[index])
        except OSError as error:
            raise UserError(f"{where}: cannot be read: {error.strerror or error}") from error
        text = decoded(line, where).rstrip("\r\n")
        try:
            entry = parse_json(text, where) if text.strip() else None
        except UserError as error:
            raise UserError(str(error).replace(" in line 1, column ", " in column ")) from error
        if not isinstance(entry, dict):
            found = shown(entry) if text.strip() else "a blank line"
            raise UserError(f'{where}: expected an object {{"video": name, "sentences": [...]}}, got {found}')
        if index == 0 and "sentences" not in entry and (form := describe_other_form(self.path)):
            raise UserError(f"{self.path}: {form}")
        if not isinstance(name := entry.pop("video", None), str):
            raise UserError(f'{where}: "video" must be the name of a video, got {shown(name)}')
        return parse_video(where, name, entry)


def _scan(path: Path, at_most: int) -> tuple[array[int], str]:
    """Return where each line begins, and the end of the last one; and the SHA-256 of these lines. Raise OSError."""
    starts, digest, place = array("q", [0]), hashlib.sha256(), 0
    with path.open("rb") as file:
        while (not at_most or len(starts) <= at_most) and (block := file.read(_BLOCK)):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
            if at_most and len(starts) - 1 + len(ends) >= at_most:
                ends = ends[: at_most - len(starts) + 1]
                block = block[: ends[-1]]
            digest.update(block)
            starts.frombytes((ends + place).astype(np.int64).tobytes())
            place += len(block)
    if place > starts[-1]:  # the last line does not end in a line break
        starts.append(place)
    return starts, digest.hexdigest()
