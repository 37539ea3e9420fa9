"""The ffmpeg program: its command line for one video, and running it.

It gets a list of words, never a line for a shell. It may open plain containers from disk only, so that a playlist or
script which is called .mp4 cannot make it open anything else.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np

from adaclip_finetune.data.video.decoding import CONTAINERS
from adaclip_finetune.data.video.program import find_program
from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.plan import ExtractionJob

# Messages about files that were cut off, after which ffmpeg exits with 0.
CUT_OFF = ("File ended prematurely", "partial file")
FULL = (errno.ENOSPC, errno.EDQUOT)


class ExtractionFailed(Exception):
    """A video could not be extracted; the message is the reason."""


def images_of(job: ExtractionJob, images: Mapping[str, Any], stream: int, strict: bool, among: Sequence[int]) -> Any:
    """Return the ffmpeg-python node that writes the images of a job.

    stream: number of the video stream. strict: end at the first damaged frame, which ffmpeg would otherwise conceal;
    recordings that begin between key frames cannot be read so. among: numbers of the frames that are wanted, counted
    from the start of the file; if it is empty, ffmpeg seeks to the start of the job.
    """
    start, end = job.start or 0.0, job.end
    options: dict[str, Any] = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    options["reinit_filter"] = 0  # frames that change in size are resized to that of the first
    if strict:
        options["err_detect"] = "explode"
    if not len(among):
        options |= ({"ss": start} if start else {}) | ({} if end is None else {"t": end - start})
    node = ffmpeg.input(f"file:{job.source.absolute()}", **options)[str(stream)]
    if len(among):
        runs = np.split(among, np.flatnonzero(np.diff(among) > 1) + 1)
        node = node.filter("select", _any([f"between(n,{run[0]},{run[-1]})" for run in runs]))
    if images["frame_rate"] != -1:
        node = node.filter("fps", fps=images["frame_rate"])
    size = {}
    if (side := images["frame_size"]) != -1:
        size = {"w": f"if(gt(iw,ih),-1,min({side},iw))", "h": f"if(gt(iw,ih),min({side},ih),-1)"}
    if jpeg := not images["prefix"].endswith(".png"):  # JPEG's colours are BT.601 in full range, whatever the video's
        node = node.filter("scale", **size, out_color_matrix="bt601", out_range="pc").filter("format", "yuvj420p")
    else:
        node = node.filter("scale", **size).filter("format", "rgb24")
    # The encoder refuses two frames in the same unit of time: give each frame a unit of its own.
    node = node.filter("settb", "1/25").filter("setpts", "N")
    quality = {"q:v": images["quality"]} if jpeg else {}
    return ffmpeg.output(node, images["prefix"], format="image2", enc_time_base="1:25", **quality)


def _any(terms: Sequence[str]) -> str:
    """Return the sum of the terms, nested, since ffmpeg refuses long sums."""
    middle = len(terms) // 2
    return terms[0] if len(terms) == 1 else f"({_any(terms[:middle])}+{_any(terms[middle:])})"


class FFmpeg:
    """Runs the ffmpeg program, in several threads at once."""

    def __init__(self, threads: int, time_limit: float) -> None:
        """threads: for one run. time_limit: seconds. Raises UserError if there is no ffmpeg that works."""
        self.path, self.time_limit, self._running, self._stopped = find_program(), time_limit, set[Any](), False
        try:
            told = subprocess.run([self.path, "-h", "long"], capture_output=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"{self.path} does not work: {error}") from None
        quiet = ["-nostdin", "-hide_banner", "-v", "error", "-nostats", "-xerror"]
        self._threads = ["-threads", str(threads)]
        self._command = [self.path, *quiet, "-filter_complex_threads", str(threads), *self._threads]
        # Frames are neither repeated nor dropped for a constant rate. ffmpeg 5 renamed the option.
        self._every_frame = ["-fps_mode" if b"-fps_mode" in told else "-vsync", "passthrough"]

    def run(self, output: Any, folder: Path) -> None:
        """Write the images of an output node into the folder.

        Raises ExtractionFailed with ffmpeg's reason, or OSError if the disk is full.
        """
        *words, target = output.compile(cmd=self._command)
        process = subprocess.Popen(
            [*words, *self._every_frame, *self._threads, target],
            cwd=folder,  # so that nothing in the names of folders can be taken for a pattern
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches only us, and `close` ends the program
        )
        self._running.add(process)
        if self._stopped:
            process.kill()
        try:
            _, messages = process.communicate(timeout=self.time_limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise ExtractionFailed(f"ffmpeg was not done after {self.time_limit:g} s (--time_limit)") from None
        finally:
            self._running.discard(process)
        lines = messages.decode("utf-8", "replace").splitlines()
        for number in FULL:
            if any(line.endswith(os.strerror(number)) for line in lines):
                raise OSError(number, os.strerror(number))
        if process.returncode != 0 or any(words in line for line in lines for words in CUT_OFF):
            told = [re.sub(r"^(\[[^]]*\] )+", "", line).strip() for line in lines]  # without addresses in memory
            reason = "; ".join(list(dict.fromkeys(filter(None, told)))[:3])[:500]
            raise ExtractionFailed(reason or f"ffmpeg ended with {process.returncode} and no message")

    def close(self) -> None:
        """End what is running, and what may still be started."""
        self._stopped = True
        for process in list(self._running):
            process.kill()
