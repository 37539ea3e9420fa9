"""Pictures of all kinds, as they are meant to be seen."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.picture import open_picture, seen_pixels

RAMP = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
EIGHT = (RAMP / 257).round()


def stored(picture: Image.Image, path: Path, **how: object) -> np.ndarray:
    """What is seen of it, once it was written and read."""
    picture.save(path, **how)
    seen = seen_pixels(open_picture(path))
    assert (seen.dtype, seen.shape[2]) == (np.uint8, 3)
    return seen.astype(int)


def test_sixteen_bits(tmp_path: Path) -> None:
    assert (stored(Image.fromarray(RAMP), tmp_path / "a.png") == EIGHT[..., None]).all()
    (tmp_path / "a.pgm").write_bytes(b"P5 4 4 65535\n" + RAMP.astype(">u2").tobytes())
    assert (seen_pixels(open_picture(tmp_path / "a.pgm")) == EIGHT[..., None]).all()
    for mode in ("I", "I;16B", "I;16L"):
        picture = Image.new(mode, (1, 1), 32896)
        assert seen_pixels(picture).tolist() == [[[128, 128, 128]]], mode


def test_numbers_with_a_point(tmp_path: Path) -> None:
    (tmp_path / "a.pfm").write_bytes(b"Pf 2 2 -1.0\n" + struct.pack("<4f", 0.0, 0.5, 1.0, float("nan")))
    with Image.open(tmp_path / "a.pfm") as picture:
        assert sorted(seen_pixels(picture)[..., 0].ravel().tolist()) == [0, 0, 128, 255]


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    """Whatever colour is hidden there; what is half transparent is half white."""
    pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 128]]], np.uint8)
    seen = stored(Image.fromarray(pixels), tmp_path / "a.png")
    assert seen[0, :2].tolist() == [[255, 255, 255], [200, 0, 0]]
    assert np.abs(seen[0, 2] - [227, 127, 127]).max() <= 1
    grey = Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA")
    assert stored(grey, tmp_path / "b.png")[0, :, 0].tolist() == [255, 9]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert stored(palette, tmp_path / "c.png", transparency=0).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert stored(palette, tmp_path / "d.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    named = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert stored(named, tmp_path / "e.png", transparency=(1, 2, 3)).tolist() == [[[255] * 3, [4, 5, 6]]]


def test_four_inks(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    seen = stored(cyan, tmp_path / "a.jpg", quality=95)
    assert np.abs(seen - [0, 255, 255]).max() <= 4


def test_black_and_white(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[True, False]]))
    assert stored(picture, tmp_path / "a.png")[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    kept = {  # how the pixels lie in the file, by the table of the EXIF standard (tag 0x0112)
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    picture = Image.fromarray(np.ascontiguousarray(kept))
    exif = picture.getexif()
    exif[0x0112] = orientation
    assert (stored(picture, tmp_path / "a.png", exif=exif) == upright).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_what_a_camera_wrote_may_be_nonsense() -> None:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(content, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01")
    with Image.open(content) as picture:
        assert seen_pixels(picture).shape == (4, 4, 3)


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("none")
    with pytest.raises(UserError, match=r"a\.png: cannot be decoded as one of JPEG"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="Is a directory"):
        open_picture(tmp_path)
