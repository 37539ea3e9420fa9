"""Check that the files, folders and packages that a config names exist, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from adaclip_finetune.config.layers import together
from adaclip_finetune.config.parts import parts_of
from adaclip_finetune.config.settings import Config
from adaclip_finetune.errors import UserError


def check_paths(config: Config) -> None:
    """Raise UserError that lists required settings that are missing, and paths and packages that do not exist."""
    if problems := [*_not_given(config), *_not_there(config), *_not_installed(config)]:
        raise UserError(together(problems))


def _not_given(c: Config) -> Iterator[str]:
    if c.do_inference and c.test_annot is None:
        yield "test_annot is required by do_inference: give the captions to evaluate (--test_annot FILE)"
    if not c.do_inference and c.train_annot is None:
        yield "train_annot is required for training: give the captions to train on (--train_annot FILE)"
    if not c.do_inference and c.val_annot is None:
        yield "val_annot is required for training: it selects the best epoch (--val_annot FILE)"
    if not c.do_inference and c.save_similarity is not None and c.test_annot is None:
        yield "test_annot is required by save_similarity: give the captions of the matrix (--test_annot FILE)"
    if c.frames_dir is None and c.video_dir is None:
        yield "frames_dir or video_dir is required: extracted frames (--frames_dir DIR) or videos (--video_dir DIR)"


def _not_there(c: Config) -> Iterator[str]:
    files = {"test_annot": c.test_annot}
    if not c.do_inference:
        files = {"val_annot": c.val_annot} | files
    if c.use_policy and c.policy_weights not in ("imagenet", "random"):
        files["policy_weights"] = c.policy_weights
    files |= {f"task.config.{name}": path for name, path in c.task_settings.files().items()}
    folders = {"video_dir": c.video_dir}
    either = {"frames_dir": c.frames_dir, "resume": c.resume}
    if not c.do_inference and isinstance(c.train_annot, str):
        either["train_annot"] = c.train_annot
    elif not c.do_inference:
        for number, part in enumerate(parts_of(c.train_annot or [])):
            either[f"train_annot[{number}].annotation"] = part.annotation
            either[f"train_annot[{number}].frames_dir"] = part.frames_dir
            folders[f"train_annot[{number}].video_dir"] = part.video_dir
    if c.resume is None:  # a checkpoint may contain CLIP itself; one that does not is refused when it is read
        either["clip_weights"] = c.clip_weights
    if c.save_similarity is not None:
        folders["save_similarity"] = str(Path(c.save_similarity).parent)
        ids = Path(c.save_similarity).with_suffix(".json")
        for name, value in [*files.items(), *either.items()]:
            if value is not None and ids.resolve() == Path(value).resolve():
                yield f"save_similarity {c.save_similarity} would overwrite {name} with its ids; give another name"
    for kind, paths in {"file": files, "folder": folders, "file or folder": either}.items():
        for name, path in ((name, Path(value)) for name, value in paths.items() if value is not None):
            if not path.exists():
                yield f"{name} {path}: {kind} not found" + ("" if path.is_absolute() else f" in {Path.cwd()}")
            elif not (path.is_file() and "file" in kind) and not (path.is_dir() and "folder" in kind):
                yield f"{name} {path}: not a {kind}"
    if not c.no_output:
        for name, value in {"output_dir": c.output_dir, "tensorboard_dir": c.tensorboard_dir}.items():
            if value is not None and Path(value).is_file():
                yield f"{name} {value}: not a folder"


def _not_installed(c: Config) -> Iterator[str]:
    for name in c.tracker:
        if find_spec(name) is None:
            yield f"tracker {name}: its package is not installed: pip install 'adaclip-finetune[{name}]'"
