"""The formats in which data sets are published: for each, the files and flags that it needs, and how it is read.

Most formats are a function that makes clips of the rows of one file, and `_reader` does the rest: there is a file for
each split, or one file of all clips, of which a split takes those that a list names or that say so themselves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from adaclip_finetune.data.annotations import check_name, explain, shown
from adaclip_finetune.data.class_names import distinct
from adaclip_finetune.data.formats.reading import (
    Row,
    checked,
    csv_cells,
    csv_rows,
    json_lines,
    json_list,
    read_ids,
    read_plain_pickle,
    table_rows,
    text_lines,
)
from adaclip_finetune.data.names import canonical, split_extension
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json

SPLITS = ("train", "val", "test")


def _lasts(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] >= span[1]:
        raise ValueError("expected an end after the start, both in seconds")
    return span


def _from_zero(pair: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= pair[0] <= pair[1]:
        raise ValueError("expected [first, last] segment, counted from 0")
    return pair


Name = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Seconds = Annotated[float, Field(ge=0, lt=1e9)]
Span = tuple[Seconds, Seconds]
Cut = Annotated[Span, AfterValidator(_lasts)]


@pydantic.dataclasses.dataclass
class SourceClip:
    """A clip with its captions as the source has them, which pydantic checks. All times are in seconds.

    `start` and `end` cut the clip out of the file that `group` names. Where published files are clips already, their
    times in the source video become `duration`. `timestamps` are times within the clip, one for each sentence. The
    sentences of a `paragraph` tell one thing after another, so the same words may occur twice. `split` is the split
    that the source names, `key` identifies an entry that it may repeat, and `where` is its place, for messages.
    """

    where: str
    video: Name
    sentences: Texts
    timestamps: list[Span] | None = None
    start: Seconds | None = None
    end: Seconds | None = None
    duration: Seconds | None = None
    extension: str | None = None
    group: str | None = None
    paragraph: bool = False
    split: str | None = None
    key: str | int | None = None


@dataclass
class SourceSplit:
    """The clips of a split, each video once, and what only the reader can count."""

    clips: Iterable[SourceClip]
    absent: list[str] = field(default_factory=list)  # videos that a list names, and that have no captions
    duplicates: int = 0  # entries that were repeated and left out


Options = Mapping[str, Any]  # the values of a format's flags by name (`train_ids`), None or False where not given
Splits = dict[str, SourceSplit]
Flags = dict[str, dict[str, Any]]  # the flags of `adaclip convert FORMAT`, with what argparse is told of each


class Format(NamedTuple):
    """A format: what `--help` says of it, its flags, and the function that reads it, which raises UserError."""

    help: str
    flags: Flags
    read: Callable[[Options], Splits]


def merged(rows: Iterable[SourceClip]) -> SourceSplit:
    """Return the rows of each video as one clip, in the order of first appearance. Raises UserError."""
    clips: dict[str, SourceClip] = {}
    keys: set[object] = set()
    duplicates = 0
    for row in rows:
        if row.key is not None and row.key in keys:
            duplicates += 1
            continue
        keys.add(row.key)
        clip = clips.setdefault(canonical(row.video), row)
        if clip is row:
            continue
        if (clip.start, clip.end) != (row.start, row.end):
            raise UserError(f"{row.where}: the video {row.video!r} was named before, with other times")
        if None not in (clip.extension, row.extension) and clip.extension != row.extension:
            files = f"{row.video}.{clip.extension} and {row.video}.{row.extension}"
            raise UserError(f"{row.where}: {files} would be one video; give the two files different names")
        clip.sentences += row.sentences
        both = clip.timestamps is not None and row.timestamps is not None
        clip.timestamps = [*(clip.timestamps or ()), *(row.timestamps or ())] if both else None
    return SourceSplit(list(clips.values()), duplicates=duplicates)


# ---- what formats share ----

_SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
_CUT_FROM = re.compile(r"(.+)_(\d+)_(\d+)", re.ASCII | re.DOTALL)


def _reader(
    clips: Callable[[Path, Options], Iterable[SourceClip]],
    data_flag: str = "data",
    prefix: str = "",
    merge: Callable[[Iterable[SourceClip]], SourceSplit] = merged,
) -> Callable[[Options], Splits]:
    """Return the function that reads a format, of which `clips` reads one file.

    If `data_flag` names a file of all clips, --train and so on are lists of them. If each split has a file of its own,
    --train-ids and so on are lists. Names in a list may have `prefix` in front or not.
    """

    def read(options: Options) -> Splits:
        files, lists, data = _given(options), _given(options, "_ids"), options.get(data_flag)
        if data is None and not files:
            flags = [data_flag] * (data_flag in options) + list(SPLITS)
            raise UserError(f"nothing to convert: give at least one of {', '.join(f'--{flag} FILE' for flag in flags)}")
        if lost := [split for split in lists if split not in files]:
            raise UserError(f"--{lost[0]}-ids needs the captions, too: --{lost[0]} FILE")
        if data is None:
            splits = {split: merge(clips(path, options)) for split, path in files.items()}
            return splits | {split: _chosen(splits[split], ids, prefix) for split, ids in lists.items()}
        if files:
            whole = merge(clips(data, options))
            return {split: _chosen(whole, ids, prefix) for split, ids in files.items()}
        rows: dict[str, list[SourceClip]] = {}
        split_of: dict[str, str] = {}
        for clip in clips(data, options):
            split = split_of[clip.video] = _split_named(clip, split_of.get(clip.video))
            rows.setdefault(split, []).append(clip)
        return {split: merge(of_split) for split, of_split in rows.items()}

    return read


def _given(options: Options, suffix: str = "") -> dict[str, Path]:
    return {split: path for split in SPLITS if (path := options.get(split + suffix)) is not None}


def _split_named(clip: SourceClip, before: str | None) -> str:
    """Return the split that a row names, or that a row of the same video named before."""
    if clip.split is None:
        if before is None:
            raise UserError(f"{clip.where}: names no split; give lists of videos: --train FILE --test FILE")
        return before
    if (split := _SPLIT_NAMES.get(clip.split.strip().lower())) is None:
        raise UserError(f"{clip.where}: expected the split train, val or test, got {shown(clip.split)}")
    return split


def _chosen(source: SourceSplit, ids: Path, prefix: str = "") -> SourceSplit:
    """Return the clips that a list names, in the order of the list.

    A name in the list may have extensions, of which the outer one counts for the clip, and `prefix` in front or not.
    """
    known = {canonical(clip.video): clip for clip in source.clips}
    chosen: dict[str, SourceClip] = {}
    absent = []
    for name in map(canonical, read_ids(ids)):
        stem, extension = split_extension(name)
        spellings = (name, f"{prefix}{name}", name.removeprefix(prefix), stem, split_extension(stem)[0])
        video = next((spelling for spelling in spellings if spelling in known), None)
        if video is None:
            absent.append(name)
        else:
            chosen.setdefault(video, replace(known[video], extension=extension or known[video].extension))
    return SourceSplit(list(chosen.values()), absent, source.duplicates)


def _clip(where: str, video: Any, sentences: Any, **facts: Any) -> SourceClip:
    """Return a clip. The extension of a video file at the end of its name becomes the extension of the clip."""
    try:
        clip = SourceClip(where=where, video=video, sentences=sentences, **facts)
    except ValidationError as error:
        raise UserError(explain(where, error)) from None
    clip.video, clip.extension = split_extension(clip.video.strip())
    return clip


def _cut_clip(where: str, video: Any, sentences: Any) -> SourceClip:
    """Return the clip of a file `<YouTube id>_<start>_<end>`; the id may hold underscores, too."""
    clip = _clip(where, video, sentences)
    if found := _CUT_FROM.fullmatch(clip.video):
        clip.duration, clip.group = _length(int(found[2]), int(found[3])), found[1]
    return clip


def _length(start: float, end: float) -> float | None:
    return round(float(end - start), 3) if 0 < end - start < 1e9 else None


# ---- MSR-VTT (Xu et al., CVPR 2016), with its own splits or those of lists (1k-A: Yu et al., ECCV 2018) ----

_YOUTUBE = re.compile(r"(?:[?&]v=|youtu\.be/)([\w-]{11})")


def _read_msrvtt(options: Options) -> Splits:
    splits = _reader(_msrvtt_clips)(options)
    for split, path in _given(options).items():
        if options["data"] is not None and _has_captions(path):
            known = {clip.video: clip for clip in splits[split].clips}
            splits[split] = merged(_msrvtt_captions(path))
            for clip in splits[split].clips:
                clip.duration, clip.group = known.get(clip.video, clip).duration, known.get(clip.video, clip).group
    return splits


def _has_captions(path: Path) -> bool:
    return "sentence" in next(csv_cells(path), (0, []))[1]


def _msrvtt_captions(path: Path) -> Iterator[SourceClip]:
    """Yield the rows of a list of ids with a column `sentence`, which is used in place of the captions."""
    for row in csv_rows(path, ["video_id", "sentence"]):
        yield _clip(row.where, row["video_id"], row["sentence"])


def _msrvtt_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield the clips of MSRVTT_data.json or MSR_VTT.json. Times are those in the source video, not in the clip."""
    if path != options["data"]:
        if not _has_captions(path):
            raise UserError(f"{path}: has no column sentence: the captions come from --data MSRVTT_data.json")
        yield from _msrvtt_captions(path)
        return
    content = Row(str(path), read_json(path))
    key, video_key = ("sentences", "video_id") if "sentences" in content else ("annotations", "image_id")
    for row in json_list(f"{path}: videos", content["videos"] if key == "sentences" else []):
        clip = _clip(row.where, row["video_id"], [], split=row.get("split"), group=row.get("url"))
        if clip.group is not None:
            clip.group = found[1] if (found := _YOUTUBE.search(clip.group)) else clip.group.strip() or None
        if "start time" in row and "end time" in row:
            clip.duration = _length(*checked(row.where, (row["start time"], row["end time"]), Span))
        yield clip
    for row in json_list(f"{path}: {key}", content[key]):
        yield _clip(row.where, row[video_key], row["caption"])


# ---- MSVD (Chen and Dolan, ACL 2011): lists of ids, and a pickle {id: [[token, …], …]} ----


def _msvd_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    for name, captions in checked(str(path), read_plain_pickle(path), dict[str, list[list[str]]]).items():
        yield _cut_clip(f"{path}: video {name!r}", name, [" ".join(tokens) for tokens in captions])


# ---- ActivityNet Captions (Krishna et al., ICCV 2017): {"v_<id>": {duration, timestamps, sentences}} ----


def _activitynet_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    for video, entry in Row(str(path), read_json(path)).items():
        row = Row(f"{path}: video {video!r}", entry)
        facts = {key: row[key] for key in ("timestamps", "duration") if key in row}
        clip = _clip(row.where, video, row["sentences"], **facts, paragraph=True)
        if clip.timestamps is not None and (got := len(clip.timestamps)) != (needed := len(clip.sentences)):
            raise UserError(f"{row.where}: expected a timestamp for each sentence, got {got} for {needed}")
        yield clip


# ---- DiDeMo (Hendricks et al., ICCV 2017): [{annotation_id, video, description, times}] ----

SEGMENT_SECONDS = 5.0
Segment = Annotated[tuple[int, int], AfterValidator(_from_zero)]


def _didemo_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield descriptions, each ending in a full stop. Those of a video, in their order, are a paragraph.

    Their time is the one that most annotators chose, the earlier answer at a tie.
    """
    for row in json_list(path, read_json(path)):
        clip = _clip(row.where, row["video"], [row["description"]], paragraph=True, key=row["annotation_id"])
        text = clip.sentences[0].strip()
        clip.sentences = [text if not text or text.endswith(".") else f"{text}."]
        times = checked(f"{row.where}: 'times'", row["times"], Annotated[list[Segment], Field(min_length=1)])
        [((first, last), _)] = Counter(times).most_common(1)
        clip.timestamps = [(first * SEGMENT_SECONDS, (last + 1) * SEGMENT_SECONDS)]
        yield clip


# ---- YouCook2 (Zhou et al., AAAI 2018): {"database": {id: {subset, recipe_type, annotations: [{id, segment}]}}} ----


def _youcook2_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield a clip `training/101/<id>_<n>` of each annotated segment, cut out of the file `training/101/<id>`."""
    content = Row(str(path), read_json(path))
    for video, entry in Row(str(path), content["database"]).items():
        row = Row(f"{path}: video {video!r}", entry)
        file = f"{row['subset']}/{row['recipe_type']}/{video}"
        for part in json_list(f"{row.where}: annotations", row.get("annotations", [])):
            start, end = checked(f"{part.where}: 'segment'", part["segment"], Cut)
            facts = {"start": start, "end": end, "group": file, "split": row["subset"]}
            yield _clip(part.where, f"{file}_{part['id']}", part["sentence"], **facts)


# ---- LSMDC (Rohrbach et al., IJCV 2017): tab-separated, without a header ----

_LSMDC_COLUMNS = ("clip_id", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence")
_LSMDC_TIME = re.compile(r"(\d+)[.:](\d+)[.:](\d+)[.,:](\d{1,3})", re.ASCII)
_LSMDC_TIMES_IN_ID = re.compile(r"_\d+\.\d+\.\d+\.\d+-\d+\.\d+\.\d+\.\d+$", re.ASCII)


def _lsmdc_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield clips. Their times are those in the movie, since the published files are the clips."""
    for row in csv_rows(path, _LSMDC_COLUMNS, "\t", has_header=False):
        name, _, _, start, end, sentence = map(str.strip, row.values())
        movie = _LSMDC_TIMES_IN_ID.sub("", name)
        duration = _length(_lsmdc_seconds(row.where, start), _lsmdc_seconds(row.where, end))
        name = f"{movie}/{name}" if options["nested"] else name
        yield SourceClip(row.where, name, [sentence], duration=duration, group=movie)


def _lsmdc_seconds(where: str, text: str) -> float:
    if (found := _LSMDC_TIME.fullmatch(text)) is None:
        raise UserError(f"{where}: expected a time such as 00.01.59.370, got {shown(text)}")
    return int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3]) + float(f"0.{found[4]}")


# ---- VATEX (Wang et al., ICCV 2019): [{videoID, enCap, chCap}] for each split, or {id: [caption, …]} and lists ----


def _vatex_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    key = {"en": "enCap", "zh": "chCap"}[options["language"] or "en"]
    if path != options["data"]:
        for row in json_list(path, read_json(path)):
            yield _cut_clip(row.where, row["videoID"], row.get(key, []))
    elif options["language"] is not None:
        raise UserError(f"--language chooses between enCap and chCap; {path} has captions of one language")
    else:
        for name, captions in Row(str(path), read_json(path)).items():
            yield _cut_clip(f"{path}: video {name!r}", name, captions)


# ---- WebVid (Bain et al., ICCV 2021): CSV with up to ten million rows ----

_ISO_DURATION = re.compile(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+(?:\.\d+)?)S)?)?", re.ASCII)


def _webvid_once(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield each video once; those with several rows come last.

    The file is read twice, so that memory holds no rows, but 8 bytes for each.
    """
    import numpy as np

    hashes = np.fromiter((hash(clip.video) for clip in _webvid_clips(path, options)), np.int64)
    hashes.sort()
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    later = []
    for clip in _webvid_clips(path, options):
        if hash(clip.video) in repeated:
            later.append(clip)
        else:
            yield clip
    yield from merged(later).clips


def _webvid_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    for row in csv_rows(path, ["videoid", "name", *(["page_dir"] if options["nested"] else [])]):
        duration = _webvid_seconds(row.where, row.get("duration", ""))
        clip = _clip(row.where, row["videoid"], row["name"], duration=duration)
        if options["nested"]:
            clip.video = f"{row['page_dir']}/{clip.video}"
        yield clip


def _webvid_seconds(where: str, text: str) -> float | None:
    """Return 15.0 for PT00H00M15S."""
    if not text:
        return None
    found = _ISO_DURATION.fullmatch(text)
    if found is None or not any(found.groups()):
        raise UserError(f"{where}: expected a duration such as PT00H00M15S, got {shown(text)}")
    days, hours, minutes, rest = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


# ---- CLIP-ViP (Xue et al., ICLR 2023): JSON Lines of {clip_id, text} ----


def _clipvip_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    return (_clip(row.where, row["clip_id"], row["text"]) for row in json_lines(path))


# ---- classes of videos (action recognition): the only sentence of a video is the name of its class ----


def _one_class(rows: Iterable[SourceClip]) -> SourceSplit:
    """Return the rows as `merged` does. Raises UserError for a video of several classes."""
    split = merged(rows)
    for clip in split.clips:
        if len(classes := distinct(clip.sentences)) > 1:
            several = " and ".join(map(shown, classes[:2]))
            needed = "task classification measures videos with one class each"
            raise UserError(f"{clip.where}: the video {clip.video!r} has several classes, {several}; {needed}")
    return split


# ---- UCF101 (Soomro et al. 2012): <Class>/v_<Class>_g<group>_c<clip>.avi [number], a video a line ----

_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_UCF101_NAME = re.compile(r"([^/\s]+)/v_(\w+_g\d+)_c\d+\.avi(?:\s+\d+)?", re.ASCII)


def _ucf101_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield videos, named with their folder. Those of a group were cut from one source."""
    for where, text in _filled_lines(path):
        if (found := _UCF101_NAME.fullmatch(text)) is None:
            raise UserError(f"{where}: expected Class/v_Class_g01_c01.avi, got {shown(text)}")
        yield _clip(where, text.split()[0], _CAMEL.sub(" ", found[1]), group=found[2])


# ---- HMDB51 (Kuehne et al., ICCV 2011): a folder of <class>_test_split<n>.txt with lines `name.avi 0|1|2` ----


def _read_hmdb51(options: Options) -> Splits:
    folder, ending = options["data"], f"_test_split{options['fold']}.txt"
    rows: dict[str, list[SourceClip]] = {"train": [], "test": []}
    files = sorted(folder.glob(f"*{ending}"))
    if not files:
        raise UserError(f"--data {folder}: holds no file <class>{ending}")
    for path in files:
        name_of_class = path.name.removesuffix(ending)
        for where, text in _filled_lines(path):
            name, _, use = text.rpartition(" ")
            if not name or use not in ("0", "1", "2"):
                raise UserError(
                    f"{where}: expected a name and 0, 1 or 2 (in neither split, train, test), got {shown(text)}"
                )
            if use != "0":
                clip = _clip(where, f"{name_of_class}/{name.strip()}", name_of_class.replace("_", " "))
                rows["train" if use == "1" else "test"].append(clip)
    return {split: _one_class(of_split) for split, of_split in rows.items()}


# ---- Kinetics (Kay et al. 2017): CSV of label, youtube_id, time_start, time_end, split ----


def _kinetics_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield clips named as downloads name their files: <youtube_id>_<start>_<end>, six digits each."""
    for row in csv_rows(path, ["label", "youtube_id", "time_start", "time_end"]):
        start, end = checked(f"{row.where}: 'time_start', 'time_end'", (row["time_start"], row["time_end"]), Cut)
        name, label = f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}", row["label"].strip()
        name = f"{label}/{name}" if options["nested"] and label else name
        about = {"duration": _length(start, end), "group": row["youtube_id"], "split": row.get("split")}
        yield _clip(row.where, name, label, **about)


# ---- Something-Something V2 (Goyal et al., ICCV 2017): [{id, label, template, placeholders}] ----

_BRACKETS = re.compile(r"\[(.*?)\]")


def _something_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    """Yield videos whose class is the template without its brackets, as in the published list of labels."""
    for row in json_list(path, read_json(path)):
        template = checked(f"{row.where}: 'template'", row["template"], str)
        yield _clip(row.where, row["id"], _BRACKETS.sub(r"\1", template))


# ---- Moments in Time (Monfort et al., TPAMI 2019): CSV without a header, <class>/<file>, class, and votes ----


def _moments_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    for line, cells in csv_cells(path):
        where, (name, *classes) = f"{path}: line {line}", map(str.strip, cells)
        named = [cell for cell in classes if not cell.isdecimal()]  # the others are votes, or numbers of classes
        if len(named) != 1 or named[0] != classes[0]:
            got = f"expected a file, its class and numbers of votes, got {shown(cells)}"
            raise UserError(f"{where}: {got}. Multi-Moments in Time, with several classes a video, is not read")
        yield _clip(where, name, named[0].replace("+", " "))


def _filled_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and the content of each line that is not blank."""
    for line, text in enumerate(text_lines(path), start=1):
        if text.strip():
            yield f"{path}: line {line}", text.strip()


# ---- any table ----


def _read_table(options: Options) -> Splits:
    if None in (options["video_column"], options["caption_column"]):
        raise UserError("say which columns to read: --video-column NAME --caption-column NAME")
    if (options["start"] is None) != (options["end"] is None):
        raise UserError("--start and --end belong together: give both columns or none")
    if (options["data"] is None) == (not _given(options)):
        raise UserError("give either --data FILE --split COLUMN, or at least one of --train, --val and --test FILE")
    if (options["data"] is None) != (options["split"] is None):
        raise UserError("--data and --split belong together: a table of one split is given as --train, --val or --test")
    return _reader(_table_clips)(options)


def _table_clips(path: Path, options: Options) -> Iterator[SourceClip]:
    video, captions, start, end, split = (
        options[column] for column in ("video_column", "caption_column", "start", "end", "split")
    )
    for row in table_rows(path, [name for name in (video, captions, start, end, split) if name is not None]):
        named = None if split is None else str(row.get(split))
        clip = _clip(row.where, row[video], row[captions], split=named)
        check_name(row.where, clip.video)
        if start is not None:
            place = f"{row.where}: {start!r}, {end!r}"
            clip.start, clip.end = checked(place, (row.get(start), row.get(end)), Cut)
            clip.video, clip.group = f"{clip.video}_{clip.start:.10g}_{clip.end:.10g}", clip.video
        yield clip


# ---- the table of formats ----


def _files(what: str, *names: str, **how: Any) -> Flags:
    return {f"--{name}": {"metavar": "FILE", "type": Path, "help": what, **how} for name in names or SPLITS}


def _columns(**help_of: str) -> Flags:
    return {f"--{name.replace('_', '-')}": {"metavar": "NAME", "help": help} for name, help in help_of.items()}


def _nested(what: str) -> Flags:
    return {"--nested": {"action": "store_true", "help": what}}


_IDS = _files(
    "only the videos of this list; extensions in it replace those of the annotation",
    *(f"{split}-ids" for split in SPLITS),
)

FORMATS = {
    "msrvtt": Format(
        "MSR-VTT: MSRVTT_data.json or MSR_VTT.json, and lists such as MSRVTT_train.9k.csv and MSRVTT_JSFUSION_test.csv",
        _files("MSRVTT_data.json or MSR_VTT.json: the captions", "data")
        | _files("video ids of the split: CSV with a column video_id (a column sentence is used), or one per line"),
        _read_msrvtt,
    ),
    "msvd": Format(
        "MSVD: raw-captions.pkl, and train_list.txt, val_list.txt, test_list.txt",
        _files("raw-captions.pkl; nothing in it is run", "captions", required=True)
        | _files("video ids of the split, one per line"),
        _reader(_msvd_clips, data_flag="captions"),
    ),
    "activitynet": Format(
        "ActivityNet Captions: train.json, val_1.json, val_2.json, and lists of ids with or without v_",
        _files("train.json, val_1.json or val_2.json") | _IDS,
        _reader(_activitynet_clips, prefix="v_"),  # an id may begin with v_ itself
    ),
    "didemo": Format(
        "DiDeMo: train_data.json, val_data.json, test_data.json, and lists of videos",
        _files("train_data.json, val_data.json or test_data.json") | _IDS,
        _reader(_didemo_clips),
    ),
    "youcook2": Format(
        "YouCook2: youcookii_annotations_trainval.json",
        _files("youcookii_annotations_trainval.json: all splits", "data", required=True),
        _reader(_youcook2_clips),
    ),
    "lsmdc": Format(
        "LSMDC: LSMDC16_annos_training.csv, LSMDC16_annos_val.csv, LSMDC16_challenge_1000_publictest.csv",
        _files("six columns with tabs between them, of which the last is the sentence")
        | _nested("name clips as the archive has its files: <movie>/<clip_id>, not <clip_id>"),
        _reader(_lsmdc_clips),
    ),
    "vatex": Format(
        "VATEX: vatex_training_v1.0.json, vatex_validation_v1.0.json, …; or ref_captions.json and lists",
        _files("list of {videoID, enCap, chCap}; with --data a list of ids, one per line")
        | _files("ref_captions.json: {id: [caption, …]}", "data")
        | {"--language": {"choices": ("en", "zh"), "help": "en: enCap (default), zh: chCap"}},
        _reader(_vatex_clips),
    ),
    "webvid": Format(
        "WebVid: results_2M_train.csv or results_10M_train.csv, results_2M_val.csv",
        _files("CSV with the columns videoid and name; duration and page_dir are used if they are there")
        | _nested("name clips as downloads lay them out: <page_dir>/<videoid>, not <videoid>"),
        _reader(_webvid_once, merge=SourceSplit),
    ),
    "clipvip": Format(
        "CLIP-ViP's files: JSON Lines of {clip_id, text}",
        _files("JSON Lines of {clip_id, text}"),
        _reader(_clipvip_clips),
    ),
    "ucf101": Format(
        "UCF101, classes: trainlist01.txt and testlist01.txt, or the lists 02 or 03",
        _files("list of the split, a video <Class>/v_<Class>_g01_c01.avi in each line"),
        _reader(_ucf101_clips, merge=_one_class),
    ),
    "hmdb51": Format(
        "HMDB51, classes: the folder testTrainMulti_7030_splits",
        _files("the folder, with a file <class>_test_split1.txt for each class", "data", required=True, metavar="DIR")
        | {"--fold": {"type": int, "choices": (1, 2, 3), "default": 1, "help": "which of the three splits; default 1"}},
        _read_hmdb51,
    ),
    "kinetics": Format(
        "Kinetics-400, -600 and -700, classes: train.csv, validate.csv (or val.csv), test.csv",
        _files("CSV with the columns label, youtube_id, time_start, time_end")
        | _files("the same of all splits, with a column split", "data")
        | _nested("name clips as downloads lay them out: <label>/<youtube_id>_<start>_<end>"),
        _reader(_kinetics_clips, merge=_one_class),
    ),
    "something": Format(
        "Something-Something V2, classes: something-something-v2-train.json and -validation.json",
        _files("JSON list of {id, label, template, placeholders}"),
        _reader(_something_clips, merge=_one_class),
    ),
    "moments": Format(
        "Moments in Time, classes: trainingSet.csv and validationSet.csv",
        _files("CSV without a header: <class>/<file>, class, votes"),
        _reader(_moments_clips, merge=_one_class),
    ),
    "table": Format(
        "any table (CSV, TSV, JSON list or JSON Lines) with a video and a caption in each row",
        _files("one table of all splits, told apart by --split", "data")
        | _files("the table of a split (.csv; .tsv or .txt with tabs; .json with a list; .jsonl)")
        | _columns(
            video_column="column of the videos' names, or of paths below their folder",
            caption_column="column of the captions; in JSON also lists of them",
            start="column of the second at which the clip begins in the video",
            end="column of the second at which it ends",
            split="column of train, val or test (validation, dev and so on, too)",
        ),
        _read_table,
    ),
}
