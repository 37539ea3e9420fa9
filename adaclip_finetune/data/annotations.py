"""The annotation file, which lists videos and what is said about each.

    {"video_name": {"sentences": ["…", …], "tags"?, "auxiliary"?, "extension"?, "timestamps"?, "duration"?, "start"?,
     "end"?, "group"?, "metadata"?}, …}

Video names become paths below `frames_dir` or `video_dir`, so a name that could lead out of them is refused here.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError
from pydantic.dataclasses import dataclass

from adaclip_finetune.data.names import canonical, split_extension
from adaclip_finetune.data.other_forms import describe_other_form
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

# Unicode categories of characters that show nothing by themselves: control, format, unassigned, marks, separators.
_INVISIBLE = ("Cc", "Cf", "Cn", "Mn", "Me", "Zs", "Zl", "Zp")
METADATA_NAME = r"\w[\w.-]*"  # what an entry of `metadata` may be called, so that a condition can name it
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that are blank nevertheless


def is_blank(text: str) -> bool:
    """Return whether a text shows nothing: it is empty, or holds spaces, control and zero-width characters only."""
    return all(unicodedata.category(character) in _INVISIBLE or character in _FILLERS for character in text)


def is_unicode(text: str) -> bool:
    """Return False for half a surrogate pair, which JSON can spell and no file system or tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: str) -> str:
    if is_blank(value) or not is_unicode(value):
        raise ValueError("must be a text that is not blank")
    return value.strip()


def _extension(value: str) -> str:
    """Return `mp4` for `mp4` and `.MP4`."""
    extension = value.removeprefix(".").lower()
    if not extension.isalnum():
        raise ValueError('must be like "mp4"')
    return extension


def _tag(value: str) -> str:
    if not re.fullmatch(r"\w[\w -]{0,39}", value):
        raise ValueError("must be a name of at most 40 letters, digits, spaces, - and _")
    return value


def _metadata_name(value: str) -> str:
    if not re.fullmatch(METADATA_NAME, value):
        raise ValueError("must be a name of letters, digits, _, - and dots")
    return value


Text = Annotated[StrictStr, AfterValidator(_text)]
Tag = Annotated[StrictStr, AfterValidator(_tag)]
Number = StrictFloat  # whole numbers, too, but not true and false
Seconds = Annotated[Number, Field(ge=0)]
MetadataName = Annotated[StrictStr, AfterValidator(_metadata_name)]
Fact = Text | StrictInt | Number | StrictBool


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class VideoAnnotation:
    """One video. Times are in seconds; `start` and `end` cut a clip out of the file that `group` names.

    `group` is the source video: two clips of one group in different splits are leakage. `tags` has a list of names for
    each sentence: what kind of sentence it is. `auxiliary` are captions that are used beside the sentences in training,
    such as those that a model made of the middle frame. `metadata` is what else is known, by which searches are
    narrowed.
    """

    video_id: str
    sentences: Annotated[tuple[Text, ...], Field(min_length=1)]
    extension: Annotated[StrictStr, AfterValidator(_extension)] | None = None
    timestamps: tuple[tuple[Number, Number], ...] | None = None
    duration: Seconds | None = None
    start: Seconds | None = None
    end: Seconds | None = None
    group: Text | None = None
    tags: tuple[tuple[Tag, ...], ...] | None = None
    auxiliary: tuple[Text, ...] = ()
    metadata: dict[MetadataName, Fact | list[Fact]] = field(default_factory=dict)


KEYS = tuple(key.name for key in fields(VideoAnnotation) if key.name != "video_id")


def load_annotations(path: str | Path, data_subset: int = 0) -> list[VideoAnnotation]:
    """Return the videos of an annotation file, in its order; only the first `data_subset` if that is above 0.

    Raises UserError, naming file, video and value, for anything that is not as the format says.
    """
    videos, problems = sound_entries(path)
    if problems:
        raise UserError(problems[0])
    return videos[:data_subset] if data_subset > 0 else videos


def sound_entries(path: str | Path) -> tuple[list[VideoAnnotation], list[str]]:
    """Return the videos of all entries that are right, and why each of the others is wrong.

    Raises UserError for a file that is not JSON or holds no entries.
    """
    videos: list[VideoAnnotation] = []
    problems: list[str] = []
    named: dict[str, str] = {}  # a video's name in one form, with and without extension → as it is written
    for name, entry in _read_entries(Path(path)).items():
        try:
            video = parse_video(f"{path}: video {name!r}", name, entry)
            _note_name(path, name, named)
            videos.append(video)
        except UserError as error:
            problems.append(str(error))
    return videos, problems


def _read_entries(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except UserError:
        if path.is_file() and (form := describe_other_form(path)):
            raise UserError(f"{path}: {form}") from None
        raise
    if form := describe_other_form(path, content):
        raise UserError(f"{path}: {form}")
    if not isinstance(content, dict):
        raise UserError(f'{path}: expected an object {{video name: {{"sentences": [...]}}}}, got {shown(content)}')
    if not content:
        raise UserError(f"{path}: holds no video")
    return content


def parse_video(where: str, name: str, entry: Any) -> VideoAnnotation:
    """Return the entry of a video as an annotation. Raise UserError, beginning with `where`, if it is wrong."""
    check_name(where, name)
    if not isinstance(entry, dict):
        raise UserError(f'{where}: expected an object {{"sentences": [...]}}, got {shown(entry)}')
    if unknown := [key for key in entry if key not in KEYS]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    if "sentences" not in entry:
        raise UserError(f'{where}: has no "sentences"')
    try:
        video = VideoAnnotation(video_id=name, **entry)
    except ValidationError as error:
        raise UserError(explain(where, error)) from None
    if video.tags is not None and (got := len(video.tags)) != (needed := len(video.sentences)):
        raise UserError(f'{where}: "tags" needs a list for each of the {needed} sentences, [] for none, but has {got}')
    return video


def explain(where: str, error: ValidationError) -> str:
    """Return a message on the first problem that pydantic found, with its place, reason and value."""
    problem = error.errors()[0]
    steps = [step for step in problem["loc"] if step not in ("int", "str")]  # which alternative was tried
    place = ", ".join(f"entry {step + 1}" if isinstance(step, int) else f'"{step}"' for step in steps)
    reason = problem["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    return ": ".join(filter(None, [where, place, f"{reason}, got {shown(problem['input'])}"]))


def _note_name(path: str | Path, name: str, named: dict[str, str]) -> None:
    """Add a name to those before. Raises UserError if it names a video that one of them names: "clip" and "clip.mp4",
    or the same name in two Unicode forms."""
    key = canonical(name)
    stem, extension = split_extension(key)
    other = named.get(key) or (named.get(f"{stem}/") if extension is None else named.get(stem))
    if other is not None:
        raise UserError(f"{path}: {other!a} and {name!a} name the same video; put all sentences into one entry")
    named[key] = name
    if extension is not None:
        named.setdefault(f"{stem}/", name)  # no name ends in "/"


def folded(caption: str) -> str:
    """Return the caption without differences of case and spaces. Two captions are the same if these texts are equal."""
    return " ".join(caption.casefold().split())


def check_name(where: str, name: str) -> None:
    """Raise UserError for a name that is not a plain relative path on every system: names are joined to a folder."""
    if is_blank(name):
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


def same_captions(one: Path, other: Path) -> bool:
    """Return whether two annotations are the same file, or have the same videos and captions under two names."""
    if one.resolve() == other.resolve():
        return True
    ours, theirs = ([(video.video_id, video.sentences) for video in load_annotations(path)] for path in (one, other))
    return ours == theirs


def shown(value: Any) -> str:
    """Return the beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
