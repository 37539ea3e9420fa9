"""Row `start`: whole processes of commands that compute next to nothing, beside `import torch`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from adaclip_finetune.bench.measure import Aim, Measured, Setup, in_turns
from adaclip_finetune.bench.step import small_clip
from adaclip_finetune.data.video.program import find_program
from adaclip_finetune.errors import UserError

_PROGRAM = "import sys; from adaclip_finetune.cli import main; sys.exit(main(sys.argv[1:]))"


def start(setup: Setup) -> Iterator[Measured]:
    """Measure `adaclip --help`, `adaclip search INDEX TEXT` and `adaclip train --dry_run`, with a tiny CLIP."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        clip, videos, index = small_clip(folder), folder / "videos", folder / "my.index"
        videos.mkdir()
        picture = ["-f", "lavfi", "-i", "testsrc2=size=64x36:rate=25:duration=1"]
        _run([find_program(), "-v", "error", "-nostdin", *picture, "-pix_fmt", "yuv420p", str(videos / "v.mp4")])
        annotation = folder / "train.json"
        annotation.write_text(json.dumps({"v": {"sentences": ["a test picture"]}}))
        cpu = ["--device", "cpu", "--num_workers", "0"]
        _adaclip("index", str(clip), str(videos), "-o", str(index), *cpu)
        data = ["--train_annot", str(annotation), "--val_annot", str(annotation), "--video_dir", str(videos)]
        model = ["--clip_weights", str(clip), "--policy_backbone", "raw", "--num_frm", "4", "--top_k", "2"]
        seconds = in_turns(
            setup,
            {
                "import torch": partial(_run, [sys.executable, "-c", "import torch"]),
                "--help": partial(_adaclip, "--help"),
                "search": partial(_adaclip, "search", str(index), "a test picture", "--device", "cpu"),
                "--dry_run": partial(_adaclip, "train", "--dry_run", *data, *model, *cpu),
            },
        )
    reach = 0.67  # 1 / 1.5
    aims = [Aim("--help", "import torch"), *(Aim(name, "import torch", reach) for name in ("search", "--dry_run"))]
    yield Measured("processes", seconds, aims)


def _adaclip(*words: str) -> None:
    _run([sys.executable, "-c", _PROGRAM, *words])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise UserError(f"bench: {' '.join(command[:6])} … ended with {done.returncode}: {done.stderr[-500:]}")
