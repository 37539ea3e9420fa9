"""The ffmpeg program: where it is, what it is told, and how it is run.

It is always told as a list of words, never through a shell; it may open plain containers from disk only, so that a
playlist or script which calls itself .mp4 cannot make it open anything else.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ffmpeg
import imageio_ffmpeg

from adaclip_finetune.data.video.container import CONTAINERS
from adaclip_finetune.errors import UserError
from adaclip_finetune.extract.options import Look

KEPT_LINES = 50
# What ffmpeg says of files that were cut off and then exits with 0.
CUT_OFF = ("File ended prematurely", "partial file")
# That something ended is no reason for it.
NO_REASON = ("Task finished with", "Terminating thread", "Last message repeated", "Conversion failed")
FULL = (errno.ENOSPC, errno.EDQUOT)


class Failed(Exception):
    """A video that could not be extracted, and why."""


class Stopped(Exception):
    """The whole run is being stopped; what was in flight does not count."""


def find_program() -> str:
    """ffmpeg on PATH, else the one that imageio-ffmpeg brings. UserError if there is neither."""
    if found := shutil.which("ffmpeg"):
        return str(Path(found).absolute())
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise UserError(f"there is no ffmpeg program: install one, or reinstall imageio-ffmpeg ({error})") from error


@dataclass(frozen=True)
class Part:
    """What of a file is read: the video stream of this number (None: ffmpeg chooses), where start ≤ t < end seconds.

    Without `seeks`, the container finds places by guessing: its frames are decoded from the first one on.
    """

    source: Path
    stream: int | None = None
    start: float | None = None
    end: float | None = None
    seeks: bool = True


def from_file(look: Look, part: Part) -> Any:
    """The images of a file, as ffmpeg-python's output node for `Program.run`."""
    stream = _opened(part)
    if not part.seeks and (part.start is not None or part.end is not None):
        # In units of a frame, such as an AVI has, start and end would be rounded to frames: microseconds first.
        stream = stream.filter("settb", "AVTB")
        stream = stream.filter("trim", start=part.start or 0.0, **({} if part.end is None else {"end": part.end}))
    return _images(stream, look)


def walk(part: Part) -> Any:
    """Reading what `from_file` reads, decoding and writing nothing: `Program.run` then fails if the file is cut off."""
    return ffmpeg.output(_opened(part), "-", format="null", c="copy")


def from_pixels(look: Look, width: int, height: int) -> Any:
    """RGB frames of this size that are fed to ffmpeg's standard input, as the output node for `Program.run`."""
    size = f"{width}x{height}"
    return _images(ffmpeg.input("pipe:0", format="rawvideo", pix_fmt="rgb24", s=size, protocol_whitelist="pipe"), look)


def _opened(part: Part) -> Any:
    cut = {"ss": part.start} if part.seeks and part.start is not None else {}
    if part.seeks and part.end is not None:
        cut["t"] = part.end - (part.start or 0.0)
    safe = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    opened = ffmpeg.input(f"file:{part.source.absolute()}", **safe, **cut)
    return opened["v" if part.stream is None else str(part.stream)]


def _images(stream: Any, look: Look) -> Any:
    """Every frame becomes an image, numbered from 1."""
    if look.frame_rate != -1:
        stream = stream.filter("fps", fps=look.frame_rate)
    size = {}
    if (side := look.frame_size) != -1:
        size = {"w": f"if(gt(iw,ih),-1,min({side},iw))", "h": f"if(gt(iw,ih),min({side},ih),-1)"}
    if look.is_jpeg:  # a JPEG's colours are BT.601 in full range, whatever the video's were
        stream = stream.filter("scale", **size, out_color_matrix="bt601", out_range="pc").filter("format", "yuvj420p")
    else:
        stream = stream.filter("scale", **size).filter("format", "rgb24")
    # Frames that are shown a moment apart would be given the same time by the encoder, which refuses that: a tick each.
    stream = stream.filter("settb", "1/25").filter("setpts", "N")
    quality = {"q:v": look.quality} if look.is_jpeg else {}
    return ffmpeg.output(stream, look.prefix, format="image2", enc_time_base="1:25", **quality)


class Program:
    """Runs ffmpeg, in several threads at once, each run within `time_limit` seconds and so many `threads`."""

    def __init__(self, path: str, threads: int, time_limit: float) -> None:
        self.path, self.threads, self.time_limit = path, threads, time_limit
        self._all_frames = _all_frames(path)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._guard = threading.Lock()

    def words(self, output: Any) -> list[str]:
        """The command line."""
        threads = ["-threads", str(self.threads)]
        said = ["-nostdin", "-hide_banner", "-v", "error", "-nostats", "-xerror"]
        filters = ["-filter_complex_threads", str(self.threads)]
        *words, target = output.compile(cmd=[self.path, *said, *filters, *threads])
        return [*words, *self._all_frames, *threads, target]

    def run(self, output: Any, folder: Path, pixels: Iterable[bytes | memoryview] | None = None) -> None:
        """Write the images into the folder. Raises Failed with ffmpeg's reason, OSError where the disk is full."""
        process = self._start(self.words(output), folder, pixels is not None)
        lines: deque[str] = deque(maxlen=KEPT_LINES)
        reader = threading.Thread(target=_collect, args=(process.stderr, lines), daemon=True)
        timer = threading.Timer(self.time_limit, process.kill)
        reader.start()
        timer.start()
        try:
            if pixels is not None:
                _feed(process.stdin, pixels)
            process.wait()
        finally:
            in_time = timer.is_alive()
            timer.cancel()
            process.kill()
            process.wait()
            reader.join()
            with self._guard:
                self._running.discard(process)
        if self._stopped:
            raise Stopped
        _judge(process.returncode, list(lines), None if in_time else self.time_limit)

    def stop(self) -> None:
        """End what runs and let nothing new begin."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.kill()

    def _start(self, words: Sequence[str], folder: Path, fed: bool) -> subprocess.Popen[bytes]:
        with self._guard:
            if self._stopped:
                raise Stopped
            process = subprocess.Popen(
                words,
                cwd=folder,  # so that no name above it can be taken for a pattern
                stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )
            self._running.add(process)
            return process


def _all_frames(path: str) -> list[str]:
    """The option against repeating and dropping frames until their rate is constant: its name depends on the age."""
    try:
        told = subprocess.run([path, "-hide_banner", "-h", "long"], capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{path} does not run as ffmpeg should: {error}") from error
    return ["-fps_mode", "passthrough"] if b"-fps_mode" in told else ["-vsync", "passthrough"]


def _feed(pipe: IO[bytes] | None, pixels: Iterable[bytes | memoryview]) -> None:
    assert pipe is not None
    try:
        for frame in pixels:
            pipe.write(frame)
    except BrokenPipeError:  # it has ended, and tells why
        pass
    finally:
        with suppress(BrokenPipeError):
            pipe.close()


def _collect(pipe: IO[bytes], lines: deque[str]) -> None:
    with pipe:
        while line := pipe.readline(2000):
            lines.append(line.decode("utf-8", "replace").strip())


def _judge(code: int, lines: list[str], exceeded: float | None) -> None:
    if exceeded is not None and code != 0:
        raise Failed(f"ffmpeg was not done after {exceeded:g} s (--time_limit)")
    full = next((number for number in FULL if any(line.endswith(os.strerror(number)) for line in lines)), None)
    if full:
        raise OSError(full, os.strerror(full))
    if code != 0 or any(words in line for line in lines for words in CUT_OFF):
        raise Failed(_reason(lines) or f"ffmpeg ended with {code} and said nothing")


def _reason(lines: list[str]) -> str:
    """The first few things it said, without addresses in memory."""
    told = [re.sub(r"^(\[[^]]*\] )+", "", line) for line in lines]
    worth = [line for line in dict.fromkeys(told) if line and not any(words in line for words in NO_REASON)]
    return "; ".join(worth[:3])
