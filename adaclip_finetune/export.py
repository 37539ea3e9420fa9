"""Write the weights of a run in the format of another system.

published    {arch, epoch, state_dict, config, optimizer} under the names of AdaCLIP (Hu et al. 2023), a torch file
open_clip    a folder for open_clip with CLIP's towers alone
huggingface  a folder for transformers' CLIPModel with CLIP's towers alone, preprocessing and tokenizer
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from adaclip_finetune.errors import UserError
from adaclip_finetune.training.session import Session, find_checkpoint, open_model
from adaclip_finetune.weights.clip_weights import (
    architecture_of,
    same_architecture,
    save_tokenizer,
    write_description,
)
from adaclip_finetune.weights.huggingface import folder_files, to_huggingface_names, to_model_cfg
from adaclip_finetune.weights.loaded import LOGIT_BIAS
from adaclip_finetune.weights.published import to_published_names


class _Exported(NamedTuple):
    """The whole model by our names, CLIP's tensors by open_clip's names, and open_clip's terms for CLIP."""

    path: Path
    epoch: str | None
    session: Session
    state: Mapping[str, Tensor]
    towers: Mapping[str, Tensor]
    model_cfg: dict[str, Any]
    preprocess: Mapping[str, Any]


def export(run: Path, form: str, target: Path, clip_weights: str | None = None) -> list[str]:
    """Write the weights of `run` (a run folder or a weights file of ours) to `target`; return lines for the screen.

    `form` is one of the three above. `clip_weights` is where the pretrained weights of an adapter are, if they have
    moved. The target appears whole or not at all. Raise UserError if it exists, or if the format cannot hold the model.
    """
    if target.exists() or not target.absolute().parent.is_dir():
        problem = "already exists" if target.exists() else f"there is no folder {target.absolute().parent}"
        raise UserError(f"-o {target}: {problem}; give another name")
    source = _read(run, {} if clip_weights is None else {"clip_weights": clip_weights})
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as folder:
            temporary = Path(folder) / target.name
            if form == "published":
                notes = list(_write_published(source, temporary))
            else:
                temporary.mkdir()
                (_write_open_clip if form == "open_clip" else _write_huggingface)(source, temporary)
                sizes = Counter[str]()
                for name, tensor in source.state.items():
                    sizes[name.partition(".")[0]] += tensor.numel()
                parts = ", ".join(f"{part} ({count:,} numbers)" for part, count in sizes.items() if part != "clip")
                left_out = f"left out, since the format has no place for it: {parts}. All frames then count alike"
                notes = [left_out] if parts else []
            temporary.rename(target)
    except (OSError, RuntimeError) as error:  # a full disk, as Python and torch report it
        raise UserError(f"-o {target}: could not be written ({error})") from error
    tower = source.session.config.tower.method
    if tower != "per_frame":
        notes.append(f"WARNING: the format has no place for tower {tower}. Read back, each frame is encoded alone")
    return [f"{source.path} → {target} ({form})", *notes]


def _read(run: Path, overrides: Mapping[str, Any]) -> _Exported:
    checkpoint, config = find_checkpoint(run, overrides)
    if checkpoint.is_foreign:
        raise UserError(
            f"{checkpoint.path} is {checkpoint.kind_in_words}; only the weights of a run of ours are exported"
        )
    session = open_model(config, checkpoint, learn=False)
    if not session.method.mergeable:
        raise UserError(
            f"{checkpoint.path}: what peft.method {config.peft.method} added to CLIP cannot be merged into it, and no "
            "other system knows it"
        )
    state, described = session.method.merged_state(session.model), session.loaded.description
    towers = {name.removeprefix("clip."): tensor for name, tensor in state.items() if name.startswith("clip.")}
    model_cfg = dict(described["model_cfg"])
    if "logit_bias" in towers:
        model_cfg.setdefault("init_logit_bias", LOGIT_BIAS)
    return _Exported(checkpoint.path, checkpoint.epoch, session, state, towers, model_cfg, described["preprocess"])


def _write_published(source: _Exported, path: Path) -> Iterator[str]:
    likely = architecture_of(source.towers, str(source.path))
    content = {
        "arch": "AdaCLIP",
        "epoch": int(source.epoch) if source.epoch and source.epoch.isdecimal() else 0,
        "state_dict": to_published_names(source.state),
        "config": source.session.config.model_dump(mode="json"),
        "optimizer": {},
    }
    with path.open("wb") as file:
        torch.save(content, file)
    yield "left out: the state of the optimizer. The file can be evaluated, and a new run can start from it"
    if not same_architecture(likely, source.model_cfg):
        yield (
            "WARNING: the format does not say which activation and how many heads CLIP has. Read back, the towers are "
            "taken for quick-GELU and 64 channels per head, which these do not have: give clip_backbone"
        )


def _write_open_clip(source: _Exported, folder: Path) -> None:
    save_tokenizer(source.session.loaded, folder)
    write_description(folder, source.model_cfg, source.preprocess)
    _write_tensors(folder / "open_clip_model.safetensors", source.towers)


def _write_huggingface(source: _Exported, folder: Path) -> None:
    tensors = to_huggingface_names(source.towers)
    files = folder_files(source.model_cfg, source.preprocess)
    if tensors is None or not same_architecture(to_model_cfg(files["config.json"]), source.model_cfg):
        raise UserError(
            f"{source.path}: its CLIP is not a plain vision transformer beside a text transformer with CLIP's tokens, "
            "and so cannot be a CLIPModel; --format open_clip can hold it"
        )
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    _write_tensors(folder / "model.safetensors", tensors)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # save_file makes files that only their owner can read.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))
