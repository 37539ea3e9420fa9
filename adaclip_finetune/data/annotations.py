"""The annotation file: which videos there are and what is said about each.

    {"video_name": {"sentences": ["…", …], "extension"?, "timestamps"?, "duration"?, "start"?, "end"?, "group"?}, …}

Video names become paths below `frames_dir` or `video_dir`, so a name that could lead out of them is refused here,
once, and nothing downstream has to ask again.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaclip_finetune.errors import UserError

KEYS = ("sentences", "extension", "timestamps", "duration", "start", "end", "group")


@dataclass(frozen=True)
class VideoAnnotation:
    """One video. Times are in seconds; `start` and `end` cut a clip out of its file, `group` names the source video."""

    video_id: str
    sentences: tuple[str, ...]
    extension: str | None = None
    timestamps: tuple[tuple[float, float], ...] | None = None
    duration: float | None = None
    start: float | None = None
    end: float | None = None
    group: str | None = None


def load_annotations(path: str | Path, data_subset: int = 0) -> list[VideoAnnotation]:
    """The videos of an annotation file, in its order; only the first `data_subset` if that is above 0.

    Raises UserError, naming file, video and value, for anything that is not as the format says.
    """
    content = _content(path)
    if repeated := content.repeated():
        raise UserError(_stands_twice(path, repeated))
    videos = [_parse_video(f"{path}: video {name!r}", name, entry) for name, entry in content]
    return videos[:data_subset] if data_subset > 0 else videos


def sound_entries(path: str | Path) -> tuple[list[VideoAnnotation], list[str]]:
    """Every entry by itself: the videos of those that `load_annotations` takes, and why it refuses the others.

    Raises UserError for a file that has no entries.
    """
    videos: list[VideoAnnotation] = []
    problems: list[str] = []
    seen: set[str] = set()
    for name, entry in _content(path):
        try:
            if name in seen:
                raise UserError(_stands_twice(path, name))
            seen.add(name)
            videos.append(_parse_video(f"{path}: video {name!r}", name, entry))
        except UserError as error:
            problems.append(str(error))
    return videos, problems


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs: unlike a dict it still shows which keys stand twice."""

    def repeated(self) -> str | None:
        seen: set[str] = set()
        for key, _ in self:
            if key in seen:
                return key
            seen.add(key)
        return None


def _content(path: str | Path) -> _Object:
    """Video names and entries, of which there is at least one."""
    content = _read_json(Path(path))
    if not isinstance(content, _Object):
        raise UserError(f'{path}: expected an object {{video name: {{"sentences": [...]}}}}, got {_shown(content)}')
    if not content:
        raise UserError(f"{path}: holds no video")
    return content


def _stands_twice(path: str | Path, name: str) -> str:
    return f"{path}: the video {name!r} stands twice; put all its sentences into one entry"


def _read_json(path: Path) -> Any:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    try:
        return json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read: {error}") from None


def _parse_video(where: str, name: str, entry: Any) -> VideoAnnotation:
    check_name(where, name)
    if not isinstance(entry, _Object):
        raise UserError(f'{where}: expected an object {{"sentences": [...]}}, got {_shown(entry)}')
    if repeated := entry.repeated():
        raise UserError(f"{where}: the key {repeated!r} stands twice")
    fields = dict(entry)
    for key in fields:
        if key not in KEYS:
            nearest = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(KEYS)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
    if "sentences" not in fields:
        raise UserError(f'{where}: has no "sentences"')
    return VideoAnnotation(
        video_id=name,
        sentences=_sentences(where, fields["sentences"]),
        extension=_extension(where, fields.get("extension")),
        timestamps=_timestamps(where, fields.get("timestamps")),
        duration=_seconds(where, "duration", fields.get("duration")),
        start=_seconds(where, "start", fields.get("start")),
        end=_seconds(where, "end", fields.get("end")),
        group=_optional_text(where, "group", fields.get("group")),
    )


def folded(caption: str) -> str:
    """By which captions are known to be the same: letters' case and spaces do not count."""
    return " ".join(caption.casefold().split())


def check_name(where: str, name: str) -> None:
    """Refuse what is not a plain relative path on every system: names are joined to a folder and opened."""
    if not name.strip():
        reason = "is empty"
    elif "\0" in name or "\\" in name or not is_unicode(name):
        reason = "holds a character that no video name may hold (NUL, backslash or half a surrogate pair)"
    elif name.startswith("/") or name[1:2] == ":":  # a drive of Windows
        reason = "is an absolute path"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        reason = "leads out of the folder, or is not written plainly ('.', '..' or an empty part)"
    else:
        return
    raise UserError(f"{where}: this name {reason}; use the name of the file or folder below frames_dir or video_dir")


def _sentences(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or isinstance(value, _Object):
        raise UserError(f'{where}: "sentences" must be a list of strings, got {_shown(value)}')
    if not value:
        raise UserError(f'{where}: "sentences" is empty; give at least one, or take the video out')
    for row, sentence in enumerate(value, start=1):
        if not isinstance(sentence, str) or not sentence.strip() or not is_unicode(sentence):
            raise UserError(f"{where}: sentence {row} of {len(value)} must be a text, got {_shown(sentence)}")
    return tuple(sentence.strip() for sentence in value)


def _extension(where: str, value: Any) -> str | None:
    """`mp4` and `.MP4` are the same: kept in lower case without the dot."""
    text = _optional_text(where, "extension", value)
    if text is None:
        return None
    extension = text.removeprefix(".").lower()
    if not extension.isalnum():
        raise UserError(f'{where}: "extension" must be like "mp4", got {_shown(value)}')
    return extension


def _timestamps(where: str, value: Any) -> tuple[tuple[float, float], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(_is_pair_of_numbers(pair) for pair in value):
        raise UserError(f'{where}: "timestamps" must be a list of [start, end] in seconds, got {_shown(value)}')
    return tuple((float(start), float(end)) for start, end in value)


def _seconds(where: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value < 0:
        raise UserError(f'{where}: "{key}" must be a number of seconds from 0 up, got {_shown(value)}')
    return float(value)


def _optional_text(where: str, key: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or not is_unicode(value):
        raise UserError(f'{where}: "{key}" must be a string, got {_shown(value)}')
    return value


def _is_pair_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(number) for number in value)


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 53
    return isinstance(value, float) and math.isfinite(value)


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no file system or tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any) -> str:
    kind = "an object" if isinstance(value, _Object) else repr(value)
    return kind if len(kind) <= 60 else kind[:57] + "..."


def same_captions(one: Path, other: Path) -> bool:
    """Whether two annotations are one: the same file, or the same content under two names."""
    return one.resolve() == other.resolve() or load_annotations(one) == load_annotations(other)
