"""`adaclip convert` as tests run it, and what it wrote and printed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaclip_finetune.cli import main
from adaclip_finetune.data.annotations import load_annotations

Convert = Callable[..., str]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs `adaclip convert … -o tmp_path/out` and gives what it printed, on either stream; checks the exit code."""

    def run(*words: Any, code: int = 0) -> str:
        assert main(["convert", *map(str, words), "-o", str(tmp_path / "out")]) == code
        out, err = capsys.readouterr()
        assert bool(err) == (code != 0) and "Traceback" not in err
        return out + err

    return run


def written(tmp_path: Path, split: str) -> Any:
    """The file of a split, which the loader takes, too."""
    path = tmp_path / "out" / f"{split}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [video.video_id for video in load_annotations(path)] == list(content)
    return content


def save(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def counts(printed: str, split: str) -> list[int]:
    [line] = [line for line in printed.splitlines() if line.startswith(f"{split} ")]
    return [int(number.replace(",", "")) for number in line.split()[1:]]
