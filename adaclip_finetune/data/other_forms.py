"""Recognise an annotation in a form that others use, and tell the command that converts it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

VIDEO_KEYS = ("video", "video_id", "videoid", "videoID", "clip_id", "vid", "image_id", "file", "file_name", "filename")
CAPTION_KEYS = ("caption", "captions", "sentence", "sentences", "text", "texts", "description", "title")


def describe_other_form(path: Path, content: Any = None) -> str | None:
    """Return what form a file has and how to convert it; None for a form that is not known.

    `content` is what the file holds, None for a file that is not JSON.
    """
    form: str = ""
    words: list[str] = []
    if isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        form, words = _form_of_list(content)
    elif isinstance(content, dict) and isinstance(content.get("sentences"), list):
        form, words = "the JSON of MSR-VTT (videos, sentences)", ["msrvtt", "--data"]
    elif isinstance(content, dict) and isinstance(content.get("annotations"), list):
        form, words = "the JSON of MSR-VTT (annotations)", ["msrvtt", "--train", "LIST", "--test", "LIST", "--data"]
    elif isinstance(content, dict) and isinstance(content.get("database"), dict):
        form, words = "the JSON of YouCook2 (database)", ["youcook2", "--data"]
    elif content is None and path.suffix.lower() in (".csv", ".tsv", ".txt"):
        form, words = "a table", _table(re.split("[,\t]", _first_line(path).replace('"', "")))
    elif content is None and (keys := _keys_of_line(_first_line(path))):
        form, words = "JSON Lines", ["clipvip", "--train"] if {"clip_id", "text"} <= keys else _table(keys)
    if not form:
        return None
    command = " ".join(["adaclip convert", *words, shlex.quote(str(path)), "-o DIR"])
    return f"this is {form}, not an annotation file of this program. To convert it: {command}"


def _form_of_list(content: list[dict[str, Any]]) -> tuple[str, list[str]]:
    keys = content[0].keys()
    if "videoID" in keys and ("enCap" in keys or "chCap" in keys):
        return "the JSON of VATEX (a list)", ["vatex", "--train"]
    if {"annotation_id", "video", "description"} <= keys:
        return "the JSON of DiDeMo (a list)", ["didemo", "--train"]
    return "a list of objects", _table(keys)


def _table(keys: Iterable[str]) -> list[str]:
    """Return the words that convert a table with these columns, with NAME for a column that cannot be guessed."""
    known = list(keys)
    video = next((key for key in VIDEO_KEYS if key in known), "NAME")
    caption = next((key for key in CAPTION_KEYS if key in known), "NAME")
    return ["table", "--video-column", video, "--caption-column", caption, "--train"]


def _first_line(path: Path) -> str:
    with suppress(OSError, ValueError), path.open(encoding="utf-8-sig") as lines:
        return next(lines, "").strip()
    return ""


def _keys_of_line(line: str) -> set[str]:
    """Return the keys of the JSON object that a line holds; none if it holds something else, or an annotation."""
    with suppress(ValueError, RecursionError):
        entry = json.loads(line)
        if isinstance(entry, dict) and not all(isinstance(value, dict) for value in entry.values()):
            return set(entry)
    return set()
