"""Run `adaclip convert` in tests, and read what it wrote and printed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune.cli import main
from adaclip_finetune.data.annotations import load_annotations

Convert = Callable[..., str]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Run `adaclip convert WORDS -o tmp_path/out` and return what it printed, on either stream.

    `files` are written first, and a word that is the name of one becomes its path. The exit code is checked.
    """

    def run(words: str, files: Mapping[str, Any] | None = None, code: int = 0) -> str:
        for name, content in (files or {}).items():
            save(tmp_path / name, content)
        paths = [str(tmp_path / word) if word in (files or {}) else word for word in words.split()]
        assert main(["convert", *paths, "-o", str(tmp_path / "out")]) == code
        out, err = capsys.readouterr()
        assert bool(err) == (code != 0) and "Traceback" not in err
        return out + err

    return run


def written(tmp_path: Path, split: str) -> Any:
    """Return the content of a split's file, which the loader takes, too."""
    path = tmp_path / "out" / f"{split}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [video.video_id for video in load_annotations(path)] == list(content)
    return content


def save(path: Path, content: Any) -> Path:
    """Write bytes, text, or anything else as JSON."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def counts(printed: str, split: str) -> list[int]:
    """Return the numbers printed for a split: videos, captions, duplicates, without captions, absent."""
    [line] = [line for line in printed.splitlines() if line.startswith(f"{split} ")]
    return [int(number.replace(",", "")) for number in line.split()[1:]]
