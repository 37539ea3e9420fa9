"""Small videos and frame folders whose frames tell their index: a row of black and white blocks spells it in binary."""

import struct
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
from PIL import Image

BITS = 8
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def coded_frame(index: int, height: int = 66, width: int = 130) -> np.ndarray:
    """RGB (height, width, 3): grey noise below, the bits of the index as blocks above."""
    frame = np.random.default_rng(index).integers(96, 160, (height, width, 3), dtype=np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        frame[: height // 2, left:right] = 235 if index >> bit & 1 else 16
    return frame


def index_of(frame: np.ndarray) -> int:
    """Read the index from the blocks of a frame (H, W, 3), after any encoding and resizing."""
    height, width, _ = frame.shape
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(1 << bit for bit, x in enumerate(middles) if frame[height // 5, x].mean() > 128)


def write_video(
    path: Path,
    num_frames: int,
    codec: str = "libx264",
    height: int = 66,
    width: int = 130,
    shown: Sequence[int] | None = None,
    **options: str,
) -> Path:
    """Write a video of coded frames; by default H.264 with B-frames and a key frame every 12, at 25 frames a second.

    shown: when each frame is shown instead, in milliseconds. The bytes of H.264 are the same in every run: x264's code
    for particular processors, which is not deterministic with AVX-512, is switched off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"g": "12", "bf": "3", "crf": "20"}
    if codec == "libx264":
        defaults["x264-params"] = "threads=1:asm=0"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=defaults | options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if shown is not None and codec != "mpeg2video":  # which knows only some rates
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(coded_frame(index, height, width), format="rgb24")
            if shown is not None:
                frame.pts, frame.time_base = shown[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, num_frames: int, height: int = 66, width: int = 130, suffix: str = "jpg") -> Path:
    """Write image_00001.jpg … of coded frames."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(num_frames):
        Image.fromarray(coded_frame(index, height, width)).save(folder / f"image_{index + 1:05d}.{suffix}")
    return folder


def ffmpeg(*words: object) -> bytes:
    """Run the ffmpeg program and return what it writes to its standard output."""
    return subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, words)], check=True, capture_output=True).stdout


def write_joined(path: Path) -> Path:
    """Write a ts or webm file of 8 coded frames of 130 x 66 pixels and then 8 of 98 x 98."""
    codec = "libvpx" if path.suffix == ".webm" else "libx264"
    parts = [
        write_video(path.with_name("parts") / f"{width}{path.suffix}", 8, codec, height, width)
        for height, width in ((66, 130), (98, 98))
    ]
    if path.suffix == ".ts":
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    else:
        listing = parts[0].with_name("list.txt")
        listing.write_text("".join(f"file {part}\n" for part in parts))
        ffmpeg("-f", "concat", "-safe", "0", "-i", listing, "-c", "copy", path)
    return path


def write_mirrored(path: Path, plain: Path, matrix: str) -> Path:
    """Copy an MP4 with another display matrix, whose a, b, c and d are given, as in `1 0 0 -1`."""
    ffmpeg("-i", plain, "-c", "copy", path)
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd") + 4
    at = header + (40 if content[header] == 0 else 52)  # ISO/IEC 14496-12, 8.3.2
    a, b, c, d = (int(number) for number in matrix.split())
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    content[at : at + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    path.write_bytes(content)
    return path


def with_edits(mp4: bytes, edits: Sequence[tuple[int, float | None]]) -> bytes:
    """Replace the edit list (ISO/IEC 14496-12, 8.6.6) of a file whose table of contents stands at its end."""
    content = bytearray(mp4)
    *outer, old = boxes(content, b"moov", b"trak", b"edts", b"elst")
    zero = struct.unpack_from(">i", content, old + 20)[0]  # where the encoder began, in ticks of the track
    header = boxes(content, b"moov", b"trak", b"mdia", b"mdhd")[-1]
    ticks = struct.unpack_from(">I", content, header + 20)[0]
    entries = [
        struct.pack(">IiI", duration, -1 if start is None else zero + round(start * ticks), 1 << 16)
        for duration, start in edits
    ]
    box = struct.pack(">I4sII", 16 + 12 * len(edits), b"elst", 0, len(edits)) + b"".join(entries)
    size = struct.unpack_from(">I", content, old)[0]
    content[old : old + size] = box
    for at in outer:
        struct.pack_into(">I", content, at, struct.unpack_from(">I", content, at)[0] + len(box) - size)
    return bytes(content)


def boxes(content: bytes | bytearray, *path: bytes) -> list[int]:
    """Return where each box of a path begins, each within the one before."""
    found: list[int] = []
    at = 0
    for name in path:
        while content[at + 4 : at + 8] != name:
            at += struct.unpack_from(">I", content, at)[0]
        found.append(at)
        at += 8
    return found
