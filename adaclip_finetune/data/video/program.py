"""Where the ffmpeg program is."""

from __future__ import annotations

import shutil
from pathlib import Path

import imageio_ffmpeg

from adaclip_finetune.errors import UserError


def find_program() -> str:
    """Return the path of ffmpeg: the one on PATH, else the one of imageio-ffmpeg. Raises UserError if there is none."""
    try:
        return str(Path(shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()).absolute())
    except RuntimeError as error:
        raise UserError(f"there is no ffmpeg program: install one, or reinstall imageio-ffmpeg ({error})") from None
