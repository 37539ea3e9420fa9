"""Recognise an annotation in a form that others use, and tell the command that converts it."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

TABLE = "table --video-column NAME --caption-column NAME --train"


def describe_other_form(path: Path, content: Any = None) -> str | None:
    """Return what form a file has and how to convert it; None for a form that is not known.

    `content` is what the file holds, None for a file that is not JSON.
    """
    first = content[0] if isinstance(content, list) and content else None
    form = ""
    if isinstance(first, dict) and "videoID" in first:
        form, words = "the JSON of VATEX", "vatex --train"
    elif isinstance(first, dict) and {"annotation_id", "description"} <= first.keys():
        form, words = "the JSON of DiDeMo", "didemo --train"
    elif isinstance(first, dict) and {"template", "placeholders"} <= first.keys():
        form, words = "the JSON of Something-Something", "something --train"
    elif isinstance(first, dict):
        form, words = "a list of objects", TABLE
    elif isinstance(content, dict) and isinstance(content.get("sentences"), list):
        form, words = "the JSON of MSR-VTT (videos, sentences)", "msrvtt --data"
    elif isinstance(content, dict) and isinstance(content.get("annotations"), list):
        form, words = "the JSON of MSR-VTT (annotations)", "msrvtt --train LIST --test LIST --data"
    elif isinstance(content, dict) and isinstance(content.get("database"), dict):
        form, words = "the JSON of YouCook2", "youcook2 --data"
    elif content is None and path.suffix.lower() in (".csv", ".tsv", ".txt"):
        form, words = "a table", TABLE
    elif content is None:
        with suppress(OSError, ValueError, RecursionError), path.open(encoding="utf-8-sig") as lines:
            line = json.loads(next(lines, ""))
            if isinstance(line, dict) and {"video", "sentences"} <= line.keys():
                words = "table --video-column video --caption-column sentences --train"
                form = "JSON Lines, which are read for training only"
            elif isinstance(line, dict) and not all(isinstance(value, dict) for value in line.values()):
                form, words = "JSON Lines", "clipvip --train" if {"clip_id", "text"} <= line.keys() else TABLE
    if not form:
        return None
    command = f"adaclip convert {words} {shlex.quote(str(path))} -o DIR"
    return f"this is {form}, not an annotation file of this program. To convert it: {command}"
