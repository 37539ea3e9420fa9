"""`adaclip export`: the weights of a run in the form that another system reads.

published    {arch, epoch, state_dict, config, optimizer} under the names of AdaCLIP (Hu et al. 2023), a torch file
open_clip    a folder for open_clip: CLIP's towers alone
huggingface  a folder for transformers' CLIPModel: CLIP's towers alone, with preprocessing and tokenizer
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from adaclip_finetune.errors import UserError
from adaclip_finetune.training.session import Session, find_checkpoint, open_model
from adaclip_finetune.weights import huggingface_write
from adaclip_finetune.weights.architecture import architecture_of, shapes_of, shapes_of_config
from adaclip_finetune.weights.backbones import defaults_filled
from adaclip_finetune.weights.checkpoints import Checkpoint
from adaclip_finetune.weights.clip_weights import save_tokenizer
from adaclip_finetune.weights.huggingface_names import to_huggingface_names
from adaclip_finetune.weights.loaded import LOGIT_BIAS
from adaclip_finetune.weights.published import to_published_names


def export(run: Path, form: str, target: Path) -> list[str]:
    """Write the weights of `run` (its folder, or best.safetensors) to `target`; returns lines for the screen.

    The target appears whole or not at all, and one that exists is left alone. Raises UserError.
    """
    if target.exists():
        raise UserError(f"-o {target}: is there already; give another name, or remove it")
    if not target.absolute().parent.is_dir():
        raise UserError(f"-o {target}: there is no folder {target.absolute().parent}")
    source = _read(run)
    with _beside(target) as temporary:
        notes = list(FORMATS[form](source, temporary))
    tower = source.session.config.tower.method
    if tower != "per_frame":
        notes.append(f"WARNING: the format has no place for tower {tower}. Read back, each frame is encoded alone")
    return [f"{source.checkpoint.path} → {target} ({form})", *notes]


class _Source(NamedTuple):
    """`state` is the whole model, `towers` are CLIP's tensors by open_clip's names, `model_cfg` and `preprocess` its
    words for them."""

    checkpoint: Checkpoint
    session: Session
    state: Mapping[str, Tensor]
    towers: Mapping[str, Tensor]
    model_cfg: dict[str, Any]
    preprocess: dict[str, Any]


def _read(run: Path) -> _Source:
    checkpoint, config = find_checkpoint(run, {})
    if checkpoint.is_foreign:
        raise UserError(f"{checkpoint.path}: is {checkpoint.kind.value}; exported are the weights of a run of ours")
    session = open_model(config, checkpoint, learn=False)
    if not session.method.mergeable:
        raise UserError(
            f"{checkpoint.path}: what peft.method {config.peft.method} added to CLIP cannot be merged into it, and no "
            "other system knows it"
        )
    state = session.method.merged_state(session.model)
    towers = {name.removeprefix("clip."): tensor for name, tensor in state.items() if name.startswith("clip.")}
    model_cfg = dict(session.loaded.description["model_cfg"])
    if "logit_bias" in towers:
        model_cfg.setdefault("init_logit_bias", LOGIT_BIAS)
    preprocess = open_clip.get_model_preprocess_cfg(session.loaded.module)
    return _Source(checkpoint, session, state, towers, model_cfg, preprocess)


def _published(source: _Source, path: Path) -> Iterator[str]:
    told = architecture_of(shapes_of(source.towers, str(source.checkpoint.path)))
    epoch = source.checkpoint.epoch or ""
    content = {
        "arch": "AdaCLIP",
        "epoch": int(epoch) if epoch.isdecimal() else 0,
        "state_dict": to_published_names(source.state),
        "config": source.session.config.model_dump(mode="json"),
        "optimizer": {},
    }
    with path.open("wb") as file:
        torch.save(content, file)
    yield "left out: the state of the optimizer; what reads this can evaluate, and begin a new run"
    if defaults_filled(told.model_cfg) != defaults_filled(source.model_cfg):
        kind = "quick-GELU" if told.model_cfg.get("quick_gelu") else "GELU"
        yield (
            "WARNING: the format does not say which activation and how many heads CLIP has. Read back, these towers "
            f"are taken for {told.name or 'an unknown model'} with {kind}, which they are not: give clip_backbone"
        )


def _open_clip(source: _Source, folder: Path) -> Iterator[str]:
    folder.mkdir()
    kept = {name: source.preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")}
    _write_tensors(folder / "open_clip_model.safetensors", source.towers)
    save_tokenizer(source.session.loaded, folder)
    _write_json(folder / "open_clip_config.json", {"model_cfg": source.model_cfg, "preprocess_cfg": kept})
    yield from _left_out(source.state)


def _huggingface(source: _Source, folder: Path) -> Iterator[str]:
    shapes = shapes_of_config(_with_standard_norms(source.model_cfg))
    if shapes is None or shapes.patch_size is None or shapes.vocab_size != 49408:
        raise UserError(
            f"{source.checkpoint.path}: a CLIPModel is a plain vision transformer beside a text transformer with "
            "CLIP's tokens, and this CLIP is another; --format open_clip can hold it"
        )
    folder.mkdir()
    size = source.preprocess["size"]
    files: dict[str, Any] = {
        "config.json": huggingface_write.config_json(source.model_cfg),
        "preprocessor_config.json": huggingface_write.preprocessor_json(
            source.preprocess, size if isinstance(size, int) else size[0]
        ),
        **huggingface_write.tokenizer_files(shapes.context_length),
    }
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content, encoding="utf-8")
        else:
            _write_json(folder / name, content)
    _write_tensors(folder / "model.safetensors", to_huggingface_names(source.towers))
    yield from _left_out(source.state)


FORMATS: dict[str, Callable[[_Source, Path], Iterator[str]]] = {
    "published": _published,
    "open_clip": _open_clip,
    "huggingface": _huggingface,
}


def _left_out(state: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands around CLIP, which these formats have no place for."""
    sizes: dict[str, int] = {}
    for name, tensor in state.items():
        part = name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + tensor.numel()
    del sizes["clip"]
    if sizes:
        parts = ", ".join(f"{part} ({count:,} numbers)" for part, count in sizes.items())
        yield f"left out, since the format has no place for it: {parts}. All frames then count alike"


def _with_standard_norms(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    towers = ("vision_cfg", "text_cfg")
    return {**model_cfg, **{tower: {**model_cfg[tower], "norm_kwargs": None} for tower in towers}}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.touch()
    readable_by = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    # safetensors makes its files for their owner alone; an export is for others.
    path.chmod(readable_by)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A place beside the target, which takes the target's name when all is written and on the disk."""
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
        try:
            yield work / target.name
            for path in work.rglob("*"):
                if path.is_file():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
            (work / target.name).rename(target)
        finally:
            shutil.rmtree(work)
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk is to Python, torch and safetensors
        raise UserError(f"-o {target}: could not be written ({error})") from error
