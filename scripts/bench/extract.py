"""Frame extraction compared with a plain ffmpeg command: wall time, CPU time and disk space.

python scripts/bench/extract.py --work /tmp/extract_bench --rounds 3

20 clips of 640 x 360, 25 frames a second, 10 s, made by ffmpeg (moving pattern and noise), two processes. Each round
runs every row once, so that rows are compared under the same load; the minimum over rounds is shown.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adaclip_finetune.data.video.program import find_program

TOOL = [sys.executable, str(Path(__file__).parents[2] / "utils/frame_extraction.py")]
WORKERS = 2


def make_clips(folder: Path, program: str) -> list[Path]:
    """Make the clips, or reuse those of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"clip{n:02}.mp4" for n in range(20)]
    for n, path in enumerate(paths):
        if not path.exists():
            picture = f"testsrc2=size=640x360:rate=25:duration=10,noise=alls=12:allf=t:all_seed={n}"
            words = ["-f", "lavfi", "-i", picture, "-c:v", "libx264", "-crf", "23", "-preset", "fast"]
            subprocess.run([program, "-v", "error", "-y", *words, str(path)], check=True)
    return paths


def plain(program: str, clips: list[Path], frames: Path) -> None:
    """Run the plain ffmpeg command on two clips at a time."""

    def one(clip: Path) -> None:
        folder = frames / clip.stem
        folder.mkdir(parents=True)
        words = [program, "-v", "error", "-nostdin", "-i", str(clip), "-q:v", "2", str(folder / "image_%05d.jpg")]
        subprocess.run(words, check=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, clips))


def timed(name: str, program: str, clips: list[Path], frames: Path, words: list[str] | None) -> tuple[float, float]:
    """Return wall and CPU seconds of a row. `words` are the flags of our tool; None runs plain ffmpeg."""
    shutil.rmtree(frames, ignore_errors=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    if words is None:
        plain(program, clips, frames)
    else:
        flags = ["--parallel", "--num_workers", str(WORKERS), *words]
        subprocess.run([*TOOL, str(clips[0].parent), str(frames), *flags], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name:40} {wall:7.2f} s  {cpu:7.2f} s CPU", flush=True)
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    program = find_program()
    clips = make_clips(arguments.work / "videos", program)
    rows = {
        "plain ffmpeg, all frames": None,
        "all frames": [],
        "--frame_size 224": ["--frame_size", "224"],
        "--num_frames 32": ["--num_frames", "32"],
        "--num_frames 32 --frame_size 224": ["--num_frames", "32", "--frame_size", "224"],
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    disk: dict[str, tuple[int, float]] = {}
    for _ in range(arguments.rounds):
        for name, words in rows.items():
            frames = arguments.work / "frames"
            times[name].append(timed(name, program, clips, frames, words))
            images = list(frames.glob("*/*.jpg"))
            disk[name] = (len(images), sum(path.stat().st_size for path in images) / 1e6)
    shutil.rmtree(arguments.work / "frames")
    base_wall, base_cpu = (min(column) for column in zip(*times["plain ffmpeg, all frames"], strict=True))
    print("\n| row | s | CPU s | plain ÷ row, wall | CPU | images | MB |\n|---|---|---|---|---|---|---|")
    for name in rows:
        wall, cpu = (min(column) for column in zip(*times[name], strict=True))
        count, size = disk[name]
        ratios = f"{base_wall / wall:.2f} | {base_cpu / cpu:.2f}"
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {ratios} | {count} | {size:.1f} |")


if __name__ == "__main__":
    main()
