"""The contact sheet: a few videos of each split, with the frames that a run would sample and their captions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from adaclip_finetune.check.data import CheckedSplit
from adaclip_finetune.check.report import Finding, plural
from adaclip_finetune.config import Config
from adaclip_finetune.data.annotations import VideoAnnotation
from adaclip_finetune.data.dataset import frames_to_read
from adaclip_finetune.data.frame_store import FrameError

HEIGHT = 90  # pixels of a thumbnail, whose width follows from the video's shape
_ACROSS = 8  # thumbnails
_MARGIN, _LINE, _GAP = 12, 17, 4  # pixels
_LETTERS = 120  # in a line of text
_CAPTIONS = 6  # of a video, at most
_VIDEOS = 4  # of a split
_BLACK, _GREY, _ORANGE = (0, 0, 0), (110, 110, 110), (230, 120, 0)
_Text = tuple[str, tuple[int, int, int]]


def check_sheet(path: Path, splits: Sequence[CheckedSplit], config: Config) -> Finding:
    """Draw the sheet and say what is on it.

    Videos are chosen evenly; frames are those of an evaluation, and of training unless sampling is random.
    """
    rows = [_row(split, video, config) for split in splits for video in _chosen(split)]
    if not rows:
        return Finding("warning", "sheet", "run", f"{path} is not drawn: there is nothing to show")
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        return Finding("warning", "sheet", "run", f"{path} cannot be written ({error.strerror or error})")
    return Finding("fine", "sheet", "run", f"{path} shows {plural(len(rows), 'video')}")


def _chosen(split: CheckedSplit) -> list[VideoAnnotation]:
    """Return videos from the whole of the list, and the shortest one."""
    wanted = set(split.good[:: max(1, -(-len(split.good) // _VIDEOS))])
    if split.good:
        wanted.add(min(split.good, key=split.store.count))
    return [video for video in split.videos if video.video_id in wanted]


def _row(split: CheckedSplit, video: VideoAnnotation, config: Config) -> Image.Image:
    count = split.store.count(video.video_id)
    texts: list[_Text] = [(f"{split.name}   {' '.join(video.video_id.split())}   {count} frames", _GREY)]
    for sentence in video.sentences[:_CAPTIONS]:
        lines = textwrap.wrap(" ".join(sentence.split()), _LETTERS, initial_indent="• ", subsequent_indent="   ")
        texts += [(line, _BLACK) for line in lines[:4]]
    if len(video.sentences) > _CAPTIONS:
        texts.append((f"and {len(video.sentences) - _CAPTIONS} more", _BLACK))
    try:
        indices = frames_to_read(split.store, config, video.video_id).tolist()
        frames = [Image.fromarray(frame) for frame in split.store.read(video.video_id, indices)]
    except FrameError as error:
        return _drawn([*texts, (" ".join(f"cannot be read: {error.reason}".split()), _ORANGE)], [], [])
    labels = []
    for index, before in zip(indices, [-1, *indices], strict=False):
        when = f"  {index / count * video.duration:.1f} s" if video.duration else ""
        labels.append((f"{index}{when}  again", _ORANGE) if index == before else (f"{index}{when}", _GREY))
    sizes = [(max(1, round(frame.width * HEIGHT / frame.height)), HEIGHT) for frame in frames]
    return _drawn(texts, [frame.resize(size) for frame, size in zip(frames, sizes, strict=True)], labels)


def _drawn(texts: Sequence[_Text], thumbnails: Sequence[Image.Image], labels: Sequence[_Text]) -> Image.Image:
    """Draw lines of text above labelled thumbnails; one with an orange label gets a border."""
    # The font that matplotlib brings has Latin, Greek, Cyrillic, Arabic and more, but no Chinese or Japanese.
    font_file = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    font, small = ImageFont.truetype(font_file, 13), ImageFont.truetype(font_file, 11)
    column = _GAP + max(
        [0, *(image.width for image in thumbnails), *(round(small.getlength(text)) for text, _ in labels)]
    )
    width = max(min(_ACROSS, len(thumbnails)) * column, *(round(font.getlength(text)) for text, _ in texts))
    head, rows = _MARGIN + _LINE * len(texts), -(-len(thumbnails) // _ACROSS)
    row = Image.new("RGB", (2 * _MARGIN + width, head + rows * (HEIGHT + _LINE) + _MARGIN), "white")
    draw = ImageDraw.Draw(row)
    for number, (text, colour) in enumerate(texts):
        draw.text((_MARGIN, _MARGIN + number * _LINE), text, colour, font)
    for place, (thumbnail, (text, colour)) in enumerate(zip(thumbnails, labels, strict=True)):
        left, top = _MARGIN + place % _ACROSS * column, head + place // _ACROSS * (HEIGHT + _LINE)
        row.paste(thumbnail, (left, top))
        if colour == _ORANGE:
            draw.rectangle((left, top, left + thumbnail.width - 1, top + HEIGHT - 1), outline=_ORANGE, width=3)
        draw.text((left, top + HEIGHT + 1), text, colour, small)
    return row
