"""What is known of a video beside its frames: `season`, `title` and so on, by which a search is narrowed.

It comes from the annotation, and from a JSON file beside the video: NAME.json, or NAME.info.json, which yt-dlp writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaclip_finetune.data.annotations import METADATA_NAME
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

ENDINGS = (".info.json", ".json")  # of the file beside NAME.mp4, in place of .mp4; what the last one says counts
_LONGEST = 200  # characters of a text that is kept


def metadata_beside(video: Path) -> dict[str, Any]:
    """Return what the JSON files beside a video say of it. Raise UserError for one that holds something else."""
    found: dict[str, Any] = {}
    for path in map(video.with_suffix, ENDINGS):
        if path.is_file():
            content = read_json(path)
            if not isinstance(content, dict):
                raise UserError(f'{path}: expected an object such as {{"season": 3}}')
            found |= _kept(content)
    return found


def _kept(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keep numbers, short texts and lists of them; what a player or a downloader needs, such as formats, is nested."""
    plain = {name: value for name, value in content.items() if re.fullmatch(METADATA_NAME, name)}
    return {name: value for name, value in plain.items() if all(map(_is_short, _entries(value)))}


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_short(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and 0 < len(value) <= _LONGEST)
