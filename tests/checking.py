"""Helpers for tests of `adaclip check`: made-up data, and the findings of a check by name."""

import json
from pathlib import Path
from typing import Any

from media import write_frames

from adaclip_finetune.check.report import Finding
from adaclip_finetune.commands.check import run


def write_annotation(path: Path, videos: dict[str, Any]) -> str:
    """Write an annotation file. A value is an entry, or the list of its sentences."""
    content = {name: entry if isinstance(entry, dict) else {"sentences": entry} for name, entry in videos.items()}
    path.write_text(json.dumps(content))
    return str(path)


def write_damaged_frames(folder: Path) -> Path:
    """Write videos of 8 images: good, other, gap (3 is missing), late (6 is damaged), odd (5 has another size), first
    (1 is damaged), and short, which has 2 images. Return the folder of frames."""
    frames = folder / "frames"
    for name in ("good", "other", "gap", "late", "odd", "first"):
        write_frames(frames / name, 8)
    write_frames(frames / "short", 2)
    (frames / "gap" / "image_00003.jpg").unlink()
    (frames / "late" / "image_00006.jpg").write_bytes(b"no image")
    (frames / "first" / "image_00001.jpg").write_bytes(b"")
    write_frames(frames / "large", 8, height=80)
    (frames / "large" / "image_00005.jpg").rename(frames / "odd" / "image_00005.jpg")
    return frames


def checked(capsys: Any, *words: str) -> tuple[int, dict[str, Any]]:
    """Run the command with --json. Return the exit code and the JSON object."""
    code = run([*words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def finding(found: dict[str, Any], check: str, split: str) -> Finding:
    """Return the one finding of this check and split."""
    (one,) = [entry for entry in found["findings"] if (entry["check"], entry["split"]) == (check, split)]
    return Finding(**one)


def kinds(found: dict[str, Any], severity: str) -> set[tuple[str, str]]:
    """Return (check, split) of all findings of a severity."""
    return {(entry["check"], entry["split"]) for entry in found["findings"] if entry["severity"] == severity}
