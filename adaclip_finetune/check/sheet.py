"""The contact sheet: a few videos of each split, with the frames that a run would sample and the captions."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from adaclip_finetune.check.finding import Finding, plural
from adaclip_finetune.check.source import Split
from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.sampling import frame_indices
from adaclip_finetune.errors import UserError

_PNG = b"\x89PNG\r\n\x1a\n"  # what such a file begins with
HEIGHT = 90  # pixels of a thumbnail; its width follows from the video's shape
_A_LINE = 8  # thumbnails
_MARGIN = 12
_LINE = 17
_LETTERS = 120  # in a line of text
_CAPTIONS = 6  # of a video, at most
_VIDEOS = 4  # of a split
_REPEATED = (230, 120, 0)
_BLACK = (0, 0, 0)
_GREY = (110, 110, 110)


class _Text(NamedTuple):
    line: str
    colour: tuple[int, int, int] = _BLACK


def refuse_other_files(path: Path) -> None:
    """Raises UserError where the sheet would take the place of what is no picture, or cannot be at all."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--sheet {path}: it is a PNG; give it a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--sheet {path}: there is no folder {path.absolute().parent}")
    try:
        with path.open("rb") as file:
            begins = file.read(len(_PNG))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--sheet {path}: cannot be written ({error.strerror})") from None
    if begins and begins != _PNG:
        raise UserError(f"--sheet {path}: this file is there, and is no PNG; give another name")


def check_sheet(path: Path, splits: Sequence[tuple[Split, FrameStore, Sequence[str]]], config: Config) -> Finding:
    """Draw the sheet, and say what is on it. Each split comes with its store and its readable videos.

    The choice and the frames are the same each time: frames as evaluations take them, and training does with sampling
    uniform.
    """
    try:
        count = _draw(path, splits, config)
    except OSError as error:
        return Finding("warning", "sheet", "run", f"{path} cannot be written ({error.strerror or error})")
    if count:
        return Finding("fine", "sheet", "run", f"{path} shows {plural(count, 'video')}")
    return Finding("warning", "sheet", "run", f"{path} is not drawn: there is nothing to show")


def _draw(path: Path, splits: Sequence[tuple[Split, FrameStore, Sequence[str]]], config: Config) -> int:
    """Returns how many videos are on it; for none nothing is written. Raises OSError."""
    rows = [
        _row(split, video, store, config)
        for split, store, readable in splits
        for video in _chosen(split, readable, store)
    ]
    if not rows:
        return 0
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path, format="PNG")
    return len(rows)


def _chosen(split: Split, readable: Sequence[str], store: FrameStore) -> list[VideoAnnotation]:
    """From the whole of the list; one more where a video is short, since those are worth a look."""
    places = range(0, len(readable), max(1, -(-len(readable) // _VIDEOS)))
    wanted = dict.fromkeys(readable[place] for place in places)
    if readable:
        wanted[min(readable, key=store.count)] = None
    return [video for video in split.videos if video.video_id in wanted]


def _row(split: Split, video: VideoAnnotation, store: FrameStore, config: Config) -> Image.Image:
    count = store.count(video.video_id)
    indices = frame_indices(count, config.num_frm, segment=config.segment_sampling, subset=config.num_frm_subset)
    texts = [_Text(f"{split.name}   {_on_one_line(video.video_id)}   {count} frames", _GREY), *_captions(video)]
    try:
        pixels = store.read(video.video_id, indices.tolist())
    except FrameError as error:
        return _drawn([*texts, _Text(_on_one_line(f"cannot be read: {error.reason}"), _REPEATED)], [], [])
    height, width = pixels.shape[1:3]
    size = (max(1, round(width * HEIGHT / height)), HEIGHT)
    thumbnails = [Image.fromarray(np.ascontiguousarray(frame)).resize(size) for frame in pixels]
    labels = []
    for place, index in enumerate(indices.tolist()):
        when = f"  {index / count * video.duration:.1f} s" if video.duration else ""
        again = place > 0 and indices[place - 1] == index
        labels.append(_Text(f"{index}{when}" + ("  again" if again else ""), _REPEATED if again else _GREY))
    return _drawn(texts, thumbnails, labels)


def _captions(video: VideoAnnotation) -> list[_Text]:
    lines = []
    for sentence in video.sentences[:_CAPTIONS]:
        lines += textwrap.wrap(_on_one_line(sentence), _LETTERS, initial_indent="• ", subsequent_indent="   ")[:4]
    if len(video.sentences) > _CAPTIONS:
        lines.append(f"and {len(video.sentences) - _CAPTIONS} more")
    font = FT2Font(str(_font_file()))
    if absent := sorted({letter for line in lines for letter in line if not font.get_char_index(ord(letter))}):
        codes = " ".join(f"U+{ord(letter):04X}" for letter in absent[:3])
        lines.append(f"(boxes are letters that DejaVu Sans lacks: {codes}{' …' if len(absent) > 3 else ''})")
    return [_Text(line) for line in lines]


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _drawn(texts: Sequence[_Text], thumbnails: Sequence[Image.Image], labels: Sequence[_Text]) -> Image.Image:
    font = ImageFont.truetype(str(_font_file()), 13)
    small = ImageFont.truetype(str(_font_file()), 11)
    wide = max([thumbnails[0].width if thumbnails else 0, *(round(small.getlength(label.line)) for label in labels)])
    length: Callable[[str], float] = font.getlength
    across = min(_A_LINE, len(thumbnails)) * (wide + 4)
    lines = -(-len(thumbnails) // _A_LINE)
    width = 2 * _MARGIN + max([across, *(round(length(text.line)) for text in texts)])
    row = Image.new("RGB", (width, 2 * _MARGIN + _LINE * len(texts) + lines * (HEIGHT + _LINE)), "white")
    draw = ImageDraw.Draw(row)
    for number, text in enumerate(texts):
        draw.text((_MARGIN, _MARGIN + number * _LINE), text.line, text.colour, font)
    for place, (thumbnail, label) in enumerate(zip(thumbnails, labels, strict=True)):
        left = _MARGIN + place % _A_LINE * (wide + 4)
        top = _MARGIN + _LINE * len(texts) + place // _A_LINE * (HEIGHT + _LINE)
        row.paste(thumbnail, (left, top))
        if label.colour == _REPEATED:
            draw.rectangle((left, top, left + thumbnail.width - 1, top + HEIGHT - 1), outline=_REPEATED, width=3)
        draw.text((left, top + HEIGHT + 1), label.line, label.colour, small)
    return row


def _font_file() -> Path:
    """The font that matplotlib brings: Latin, Greek, Cyrillic, Arabic and many more, but no Chinese or Japanese."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
