"""JSON Lines: the rows of the JSON annotation, read one by one, and what is told of a line that is wrong."""

import json
import pickle
from pathlib import Path

import pytest

from adaclip_finetune.data import json_lines
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.json_lines import JsonLines
from adaclip_finetune.data.mixture import LazyEntries
from adaclip_finetune.data.queries import train_entries
from adaclip_finetune.errors import UserError

VIDEOS = {
    "a": {"sentences": ["one", "two"], "duration": 2.5, "group": "film"},
    "folder/é": {"sentences": ["ein Käse 🧀\u2028 with a line separator"]},
    "c": {"sentences": ["three"], "start": 1.0, "end": 2.0},
}


def write_lines(path: Path, *, begin: bytes = b"", line_break: bytes = b"\n", end: bytes = b"\n") -> JsonLines:
    lines = [json.dumps({"video": name, **entry}, ensure_ascii=False).encode() for name, entry in VIDEOS.items()]
    path.write_bytes(begin + line_break.join(lines) + end)
    return JsonLines(path)


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_lines_are_the_rows_of_the_json_annotation(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK", block)
    (tmp_path / "all.json").write_text(json.dumps(VIDEOS))
    expected = load_annotations(tmp_path / "all.json")
    plain = write_lines(tmp_path / "a.jsonl")
    for lines in (
        plain,
        write_lines(tmp_path / "b.jsonl", end=b""),
        write_lines(tmp_path / "c.jsonl", begin=b"\xef\xbb\xbf", line_break=b"\r\n", end=b"\r\n"),
        pickle.loads(pickle.dumps(plain)),
    ):
        assert list(lines) == expected and lines[-1] == expected[-1] and lines[1:] == expected[1:]
    for mode in ("concat", "indep-one"):
        assert list(LazyEntries(plain, mode)) == train_entries(expected, mode)
    first = JsonLines(tmp_path / "a.jsonl", at_most=2)
    assert list(first) == expected[:2] and first.digest != plain.digest
    assert JsonLines(tmp_path / "a.jsonl", at_most=9).digest == plain.digest


@pytest.mark.parametrize(("line", "reason"), [
    (b"", "a blank line"),
    (b"{", "not JSON: Expecting property name enclosed in double quotes in column 2"),
    (b'["x"]', "expected an object"),
    (b'{"sentences": ["x"]}', '"video" must be the name of a video, got None'),
    (b'{"video": "b"}', 'has no "sentences"'),
    (b'{"video": "../b", "sentences": ["x"]}', "leads out of the folder"),
    (b'{"video": "b", "sentences": [""]}', '"sentences", entry 1'),
    (b'{"video": "b", "sentences": ["x"], "caption": "y"}', "unknown key 'caption'"),
    (b'{"video": "b", "video": "c", "sentences": ["x"]}', '"video" appears twice'),
    (b'{"video": "\xff", "sentences": ["x"]}', "not UTF-8 at byte 11"),
])  # fmt: skip
def test_a_wrong_line_is_refused_with_its_number_when_it_is_read(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"video": "a", "sentences": ["x"]}\n' + line + b'\n{"video": "c", "sentences": ["z"]}\n')
    lines = JsonLines(path)
    assert len(lines) == 3 and lines[2].video_id == "c"
    with pytest.raises(UserError) as refused:
        lines[1]
    assert str(refused.value).startswith(f"{path}: line 2: ") and reason in str(refused.value)
    with pytest.raises(FrameError, match="line 2: ") as unread:
        LazyEntries(lines, "concat")[1]
    assert unread.value.video_id == "row 2 of some.jsonl" and unread.value.path == path
    path.write_bytes(line)  # the first line is read at once
    with pytest.raises(UserError, match=r"some\.jsonl: (line 1: |holds no video|this is JSON Lines)"):
        JsonLines(path)


def test_json_lines_of_another_form_are_met_with_the_command_that_converts_them(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"clip_id": "a", "text": "x"}\n')
    with pytest.raises(UserError, match=r"adaclip convert clipvip --train .*pairs\.jsonl"):
        JsonLines(path)
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read"):
        JsonLines(tmp_path / "gone.jsonl")


def test_an_extension_becomes_part_of_the_name(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"video": "a", "extension": "webm", "sentences": ["x"]}\n')
    assert LazyEntries(JsonLines(path), "concat")[0].video_id == "a.webm"
