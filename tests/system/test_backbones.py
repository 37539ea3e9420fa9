"""Each backbone of docs/backbones.md, with one block a tower, does what the page says (slow: minutes)."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import backbones  # noqa: E402

PAGE = (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+)` \| (.*) \|$", PAGE, re.MULTILINE)[1:]


def test_the_page_has_a_row_for_each_backbone_that_is_tried() -> None:
    assert [name for name, _ in ROWS] == backbones.BACKBONES


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cells"), ROWS, ids=[name for name, _ in ROWS])
def test_a_backbone_does_what_the_page_says(name: str, cells: str, tmp_path: Path) -> None:
    row = backbones.try_out(name, tmp_path)
    assert " | ".join(row[column] for column in backbones.COLUMNS) == cells
