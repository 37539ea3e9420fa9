"""Pictures to search by, and small pictures of frames."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.pictures import open_picture, seen_pixels, thumbnail


def test_a_picture_is_seen_as_frames_are_and_not_too_long(tmp_path: Path) -> None:
    """tests/core holds every mode and orientation."""
    Image.new("RGBA", (1, 1), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (seen_pixels(open_picture(tmp_path / "clear.png")) == 255).all()
    ramp = np.linspace(0, 255, 600).astype(np.uint8)
    wide = Image.fromarray(np.repeat(np.tile(ramp, (60, 1))[..., None], 3, axis=2))
    assert (seen_pixels(wide) == seen_pixels(wide.crop((180, 0, 420, 60)))).all()
    assert seen_pixels(Image.new("RGB", (1, 50_000))).shape == (4, 1, 3)


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("none")
    Image.new("RGB", (20, 10)).save(tmp_path / "b.png")
    cases: list[tuple[str, Any, str]] = [
        ("a.png", {}, "JPEG"),
        (".", {}, "Is a directory"),
        ("b.png", {"formats": ("JPEG",)}, "JPEG"),
        ("b.png", {"max_pixels": 199}, "20 × 10"),
    ]
    for name, options, fact in cases:
        with pytest.raises(UserError, match=fact):
            open_picture(tmp_path / name, **options)


def test_a_thumbnail_keeps_the_shape_and_does_not_grow() -> None:
    for given, expected in {(66, 130): (130, 66), (500, 1000): (320, 160)}.items():
        with Image.open(io.BytesIO(thumbnail(np.zeros((*given, 3), np.uint8)))) as picture:
            assert (picture.format, picture.size) == ("JPEG", expected)
