"""Build the CLIP towers and put their weights in: from open_clip's hub, a local folder, or a local file.

Loading is strict and in float32: every tensor that is missing, unexpected or of another shape is listed and refused,
and nothing is rounded on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import load_state_dict
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.clip import LoadedClip, pools_at_end_token

# The names OpenAI gave its models. Their activations are quick-GELU, which open_clip keeps in a config of its own.
_OPENAI_NAMES = {name: f"{name.replace('/', '-')}-quickgelu" for name in ("ViT-B/32", "ViT-B/16", "ViT-L/14")}


def load_clip(config: Config, with_weights: bool = True) -> LoadedClip:
    """Build the towers that `clip_backbone` and `clip_weights` name.

    `with_weights=False` builds the same modules on the meta device: shapes and names, no memory and no download.
    Raises UserError when the architecture is unknown, the weights cannot be had, or they do not fit.
    """
    _quiet_open_clip()
    name, tag = resolve_backbone(config.clip_backbone)
    weights = Path(config.clip_weights) if config.clip_weights else None
    if weights is not None and weights.is_dir():
        name = f"local-dir:{weights}"
        _check_folder(weights, config)
    elif name not in open_clip.list_models():
        raise UserError(f"clip_backbone: open_clip has no model {name!r}; `python -c \"import open_clip; "
                        f"print(open_clip.list_models())\"` lists them (OpenAI's: {', '.join(_OPENAI_NAMES)})")  # fmt: skip
    if not with_weights:
        module, source = _build_on_meta(name), "meta device, no weights"
    elif weights is None:
        module, source = _download(name, tag, config.clip_backbone), f"{name}:{tag or _only_tag(name)}"
    else:
        module, source = _load_local(name, weights), str(weights)
    spec = _image_spec(module, config.max_img_size)
    return _with_tokenizer(module, spec, name, config.max_txt_len, source)


def resolve_backbone(clip_backbone: str) -> tuple[str, str | None]:
    """`ViT-B/32` → ("ViT-B-32-quickgelu", "openai"); `name:tag` → (name, tag); `name` → (name, None)."""
    if clip_backbone in _OPENAI_NAMES:
        return _OPENAI_NAMES[clip_backbone], "openai"
    name, _, tag = clip_backbone.partition(":")
    return name.replace("/", "-"), tag or None


def strict_load(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, or raise UserError listing every tensor that is missing, unexpected or misshapen."""
    own = module.state_dict()
    problems = [f"missing: {name} {tuple(own[name].shape)}" for name in own if name not in state]
    problems += [f"unexpected: {name} {tuple(state[name].shape)}" for name in state if name not in own]
    problems += [
        f"shape: {name} is {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise UserError(f"{source} does not fit the model ({len(problems)} tensors):\n  " + "\n  ".join(problems))
    module.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a pickled state dict (read as data: no code of the file runs)."""
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a state dict (.safetensors, or a torch file of tensors): {error}") from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def _build_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return _create(name, load_weights=False, pretrained_text=False, device="meta")


def _load_local(name: str, weights: Path) -> nn.Module:
    module = _create(name, load_weights=False, pretrained_text=False)
    files = [weights] if weights.is_file() else sorted(weights.glob("open_clip_model.*")) or sorted(weights.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"clip_weights: {weights} must hold exactly one open_clip_model.safetensors (found: {found})")
    strict_load(module, read_state_dict(files[0]), str(files[0]))
    return module


def _download(name: str, tag: str | None, given: str) -> nn.Module:
    tag = tag or _only_tag(name)
    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        raise UserError(f"clip_backbone: {given!r} needs weights: write {name}:TAG with TAG one of {', '.join(known)}, or set clip_weights")
    try:
        return _create(name, pretrained=tag, require_pretrained=True)
    except Exception as error:
        raise UserError(
            f"clip_backbone: the weights {name}:{tag} could not be had ({error}).\n"
            "Ways to get them: run once where the Hugging Face hub can be reached (they stay in its cache, HF_HOME); "
            "set HF_ENDPOINT to a mirror; or copy a file or an open_clip folder here and set clip_weights to it."
        ) from error


def _create(name: str, **arguments: Any) -> nn.Module:
    try:
        module = open_clip.create_model(name, precision="fp32", **arguments)
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        if arguments.get("require_pretrained"):
            raise
        raise UserError(f"clip_backbone: open_clip cannot build {name}: {error}") from error
    assert isinstance(module, nn.Module)
    return module


def _only_tag(name: str) -> str | None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    return tags[0] if len(tags) == 1 else None


def _check_folder(folder: Path, config: Config) -> None:
    """A folder brings its own architecture; a `clip_backbone` given beside it must be the same one."""
    if not (folder / "open_clip_config.json").is_file():
        raise UserError(f"clip_weights: {folder} holds no open_clip_config.json; give an open_clip folder or a weights file")
    if "clip_backbone" not in config.model_fields_set:
        return
    own = open_clip.get_model_config(f"local-dir:{folder}")
    if open_clip.get_model_config(resolve_backbone(config.clip_backbone)[0]) != own:
        raise UserError(f"clip_backbone {config.clip_backbone!r} is not the architecture in {folder}/open_clip_config.json; leave it out")


def _image_spec(module: nn.Module, max_img_size: int | None) -> ImageSpec:
    settings = open_clip.get_model_preprocess_cfg(module)
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width or max_img_size not in (None, height):
        raise UserError(f"max_img_size: {max_img_size} is not what the tower takes ({height}x{width}); leave it out")
    return ImageSpec(
        size=height,
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        resize_mode=settings["resize_mode"],
    )


def _with_tokenizer(module: nn.Module, spec: ImageSpec, name: str, max_txt_len: int, source: str) -> LoadedClip:
    context_length = int(getattr(module, "context_length", 0) or module.text.context_length)
    if max_txt_len > context_length:
        raise UserError(f"max_txt_len: {max_txt_len} is beyond the text tower's context of {context_length} tokens")
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        raise UserError(f"clip_backbone: the tokenizer of {name} could not be had: {error}") from error
    whole_context = not pools_at_end_token(module)

    def tokenize(texts: Sequence[str], max_len: int) -> Tensor:
        token_ids: Tensor = tokenizer(list(texts), max_len)
        if not whole_context:
            return token_ids
        padded = tokenizer([""], context_length)[:, -1:].repeat(len(token_ids), context_length)
        padded[:, :max_len] = token_ids
        return padded

    def count_cut(texts: Sequence[str], max_len: int) -> int:
        # A text that fills max_len + 1 places has more tokens than max_len.
        longer: Tensor = tokenizer(list(texts), max_len + 1)
        padding = tokenizer([""], context_length)[0, -1]
        return int((longer[:, -1] != padding).sum())

    return LoadedClip(module, spec, tokenize, count_cut, context_length, source)


def _quiet_open_clip() -> None:
    # open_clip narrates through the root logger; what matters is said by us.
    logging.getLogger().setLevel(max(logging.getLogger().level, logging.WARNING))
