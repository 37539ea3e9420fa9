"""Check that the files and folders of a config exist, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from adaclip_finetune.config.layers import together
from adaclip_finetune.config.settings import Config
from adaclip_finetune.errors import UserError

_LONGEST_HEADER = 100 * 2**20  # bytes, the limit of safetensors itself


def check_paths(config: Config) -> None:
    """Raise UserError that lists every required setting that is missing, and every path that does not exist."""
    if problems := [*_not_given(config), *_not_there(config)]:
        raise UserError(together(problems))


def _not_given(config: Config) -> Iterator[str]:
    if config.do_inference:
        if config.test_annot is None:
            yield "test_annot is required by do_inference: give the captions to evaluate (--test_annot FILE)"
    else:
        if config.train_annot is None:
            yield "train_annot is required for training: give the captions to train on (--train_annot FILE)"
        if config.val_annot is None:
            yield "val_annot is required for training: it selects the best epoch (--val_annot FILE)"
        if config.save_similarity is not None and config.test_annot is None:
            yield "test_annot is required by save_similarity: give the captions of the matrix (--test_annot FILE)"
    if config.frames_dir is None and config.video_dir is None:
        yield "frames_dir or video_dir is required: extracted frames (--frames_dir DIR) or videos (--video_dir DIR)"


def _not_there(config: Config) -> Iterator[str]:
    files = {"test_annot": config.test_annot}
    if not config.do_inference:
        files = {"train_annot": config.train_annot, "val_annot": config.val_annot} | files
    if config.use_policy and config.policy_weights not in ("imagenet", "random"):
        files["policy_weights"] = config.policy_weights
    for name, value in files.items():
        if value is not None and not Path(value).is_file():
            yield _wrong(name, value, "file")
    if config.video_dir is not None and not Path(config.video_dir).is_dir():
        yield _wrong("video_dir", config.video_dir, "folder")
    either = {"frames_dir": config.frames_dir, "clip_weights": config.clip_weights, "resume": config.resume}
    if config.resume is not None and describes_its_clip(Path(config.resume)):
        del either["clip_weights"]  # the checkpoint contains CLIP itself
    for name, value in either.items():
        if value is not None and not Path(value).exists():
            yield _wrong(name, value, "file or folder")
    if config.save_similarity is not None and not Path(config.save_similarity).parent.is_dir():
        yield _wrong("save_similarity", str(Path(config.save_similarity).parent), "folder")
    elif config.save_similarity is not None:
        ids = Path(config.save_similarity).with_suffix(".json")
        for name, value in files.items():
            if value is not None and ids.is_file() and Path(value).is_file() and ids.samefile(value):
                yield f"save_similarity {config.save_similarity} would overwrite {name} with its ids; give another name"
    if not config.no_output:
        for name, value in {"output_dir": config.output_dir, "tensorboard_dir": config.tensorboard_dir}.items():
            if value is not None and Path(value).exists() and not Path(value).is_dir():
                yield f"{name} {value}: not a folder"


def describes_its_clip(path: Path) -> bool:
    """Return whether a file is a checkpoint of ours that contains all of CLIP and its description."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LONGEST_HEADER))
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError):
        return False
    return "clip" in metadata and metadata.get("content") == "model"


def _wrong(name: str, value: str, kind: str) -> str:
    if Path(value).exists():
        return f"{name} {value}: not a {kind}"
    return f"{name} {value}: {kind} not found" + ("" if Path(value).is_absolute() else f" in {Path.cwd()}")
