"""Build the CLIP towers and put their weights in: from open_clip's hub, a local folder, or a local file.

Loading is strict and in float32: every tensor that is missing, unexpected or of another shape is listed and refused,
and nothing is rounded on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.factory import load_state_dict
from open_clip.transform import merge_preprocess_dict
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.clip import LoadedClip, pools_at_end_token
from adaclip_finetune.model.tokens import Tokenizer

# The names OpenAI gave its models.
_OPENAI_NAMES = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
_LOCAL_DIR = "local-dir:"
_WEIGHTS_IN_FOLDER = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def load_clip(config: Config, with_weights: bool = True) -> LoadedClip:
    """Build the towers that `clip_backbone` and `clip_weights` name.

    `with_weights=False` builds the same modules on the meta device: shapes and names, no memory and no download.
    Raises UserError when the architecture is unknown, the weights cannot be had, or they or the settings do not fit.
    """
    towers = _find(config)
    module = _build(towers, "cpu" if with_weights else "meta")
    image = _image_spec(towers, module, config.max_img_size)
    tokens = _tokenizer(towers, module, config.max_txt_len)
    source = _fill(module, towers) if with_weights else "meta device, no weights"
    return LoadedClip(module, image, tokens, tokens.count_cut, tokens.context_length, source)


def resolve_backbone(clip_backbone: str) -> tuple[str, str | None]:
    """`ViT-B/32` → ("ViT-B-32-quickgelu", "openai"); `name:tag` → (name, tag); `name` → (name, None).

    Weights trained with quick-GELU get the architecture that has it, which open_clip keeps under a name of its own.
    Raises UserError for a name or a tag that open_clip does not know.
    """
    name, _, tag = clip_backbone.partition(":")
    tag = "openai" if clip_backbone in _OPENAI_NAMES else tag
    name = name.replace("/", "-")
    if name not in open_clip.list_models():
        raise UserError(
            f"clip_backbone: open_clip has no model {name!r}; OpenAI's are {', '.join(_OPENAI_NAMES)}, and "
            '`python -c "import open_clip; print(open_clip.list_models())"` lists all'
        )
    if not tag:
        return name, None
    weights = open_clip.get_pretrained_cfg(name, tag)
    if not weights:
        raise UserError(f"clip_backbone: open_clip has no weights {tag!r} of {name}; it has {_tags(name)}")
    with_quick_gelu = f"{name}-quickgelu"
    if weights.get("quick_gelu") and with_quick_gelu in open_clip.list_models():
        name = with_quick_gelu
    return name, tag


def strict_load(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `module`, or raise UserError listing every tensor that is missing, unexpected or misshapen."""
    own = module.state_dict()
    # Batch counters are no weights, and old torchvision files lack them.
    state = {name: own[name] for name in own if name.endswith(".num_batches_tracked")} | dict(state)
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
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except Exception as error:
        # What torch says here advises to run the code in the file.
        raise UserError(
            f"{path}: is no state dict: neither .safetensors nor a torch file of tensors by name. Files that hold more "
            "than data, as pickled models and TorchScript (OpenAI's own .pt) do, are not opened"
        ) from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name")
    return tensors


class _Towers(NamedTuple):
    """What the settings ask for: open_clip's name of the architecture; the tag of its weights, or a file or folder."""

    name: str
    tag: str | None
    local: Path | None


def _find(config: Config) -> _Towers:
    local = Path(config.clip_weights) if config.clip_weights else None
    if local is not None and local.is_dir():
        _check_folder(local, config)
        return _Towers(f"{_LOCAL_DIR}{local}", None, local)
    name, tag = resolve_backbone(config.clip_backbone)
    if local is None and tag is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if len(tags) != 1:
            choice = f"write {name}:TAG with one of its tags, {_tags(name)}, or set" if tags else "there are none: set"
            raise UserError(f"clip_backbone: {name} does not say which weights; {choice} clip_weights")
        name, tag = resolve_backbone(f"{name}:{tags[0]}")
    return _Towers(name, tag, local)


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"


def _check_folder(folder: Path, config: Config) -> None:
    """A folder brings its own architecture; a `clip_backbone` given beside it must be the same one."""
    path = folder / "open_clip_config.json"
    if not path.is_file():
        raise UserError(f"clip_weights: {folder} holds no {path.name}; give an open_clip folder or a weights file")
    if "clip_backbone" not in config.model_fields_set:
        return
    given = _architecture(resolve_backbone(config.clip_backbone)[0])
    if given != _architecture(f"{_LOCAL_DIR}{folder}"):
        raise UserError(f"clip_backbone {config.clip_backbone} is not the architecture in {path}; leave it out")


def _architecture(name: str) -> object:
    """What decides the architecture, with all defaults filled in. Raises UserError."""
    try:
        rest = {key: value for key, value in open_clip.get_model_config(name).items() if value}
        vision, text = rest.pop("vision_cfg"), rest.pop("text_cfg")
        return open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), rest
    except Exception as error:
        raise _cannot_build(name, error) from error


def _build(towers: _Towers, device: str) -> nn.Module:
    # A file of weights does not say how its images were prepared; its tag does, or all tags of the architecture alike.
    tags = [towers.tag] if towers.tag else open_clip.list_pretrained_tags_by_model(towers.name)
    preparations = [merge_preprocess_dict({}, open_clip.get_pretrained_cfg(towers.name, tag)) for tag in tags]
    alike = all(preparation == preparations[0] for preparation in preparations)
    try:
        with _open_clip_silent(), torch.device(device):
            module: nn.Module = open_clip.create_model(
                towers.name,
                load_weights=False,
                pretrained_text=False,
                precision="fp32",
                device=device,
                force_preprocess_cfg=preparations[0] if preparations and alike else None,
            )
    except Exception as error:  # all that a folder's config, or a library behind a tower, can lead to
        raise _cannot_build(towers.name, error) from error
    return module


def _cannot_build(name: str, error: Exception) -> UserError:
    setting, name = (
        ("clip_weights", name[len(_LOCAL_DIR) :]) if name.startswith(_LOCAL_DIR) else ("clip_backbone", name)
    )
    return UserError(f"{setting}: open_clip cannot build {name}: {type(error).__name__}: {error}")


def _fill(module: nn.Module, towers: _Towers) -> str:
    """Put the weights into the module; says where they came from."""
    if towers.local is not None:
        path = _weights_in(towers.local) if towers.local.is_dir() else towers.local
        strict_load(module, read_state_dict(path), f"clip_weights: {path}")
        return str(path)
    source = f"{towers.name}:{towers.tag}"
    try:
        with _open_clip_silent():
            path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(towers.name, towers.tag))
    except Exception as error:
        raise UserError(
            f"clip_backbone: the weights {source} could not be had ({error}).\n"
            "Ways to get them: run once where the Hugging Face hub can be reached (they stay in its cache, HF_HOME); "
            "set HF_ENDPOINT to a mirror; or copy a file or an open_clip folder here and set clip_weights to it."
        ) from error
    try:
        with _open_clip_silent():
            # open_clip knows the older names in its own files.
            open_clip.load_checkpoint(module, path, strict=True, weights_only=True)
    except Exception as error:
        raise UserError(f"clip_backbone: the weights {source} in {path} do not fit the model: {error}") from error
    return source


def _weights_in(folder: Path) -> Path:
    for name in _WEIGHTS_IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"clip_weights: {folder} holds no weights, such as {_WEIGHTS_IN_FOLDER[0]}")


def _image_spec(towers: _Towers, module: nn.Module, max_img_size: int | None) -> ImageSpec:
    settings = open_clip.get_model_preprocess_cfg(module)
    size = settings["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if max_img_size not in (None, height):
        raise UserError(f"max_img_size: {max_img_size} is not what the tower takes ({height}x{width}); leave it out")
    try:
        if height != width:
            raise ValueError(f"images of {height}x{width}, not square")
        mean, std = tuple(settings["mean"]), tuple(settings["std"])
        return ImageSpec(height, mean, std, settings["interpolation"], settings["resize_mode"])
    except (ValueError, TypeError) as error:
        raise _cannot_build(towers.name, error) from error


def _tokenizer(towers: _Towers, module: nn.Module, max_txt_len: int) -> Tokenizer:
    try:
        with _open_clip_silent():
            encode: Any = open_clip.get_tokenizer(towers.name)
    except Exception as error:
        raise UserError(f"clip_backbone: the tokenizer of {towers.name} could not be had: {error}") from error
    if max_txt_len > encode.context_length:
        context = f"the text tower's context of {encode.context_length} tokens"
        raise UserError(f"max_txt_len: {max_txt_len} is beyond {context}; lower it")
    return Tokenizer(encode, encode.context_length, whole_context=not pools_at_end_token(module))


@contextmanager
def _open_clip_silent() -> Iterator[None]:
    """Keep from the user what open_clip says through the root logger: that a module it made for us has no weights.

    The logger is left as it was: without any handler, the first message would have given it one for good.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(_is_not_open_clip)
    try:
        yield
    finally:
        root.removeFilter(_is_not_open_clip)
        root.removeHandler(handler)


def _is_not_open_clip(record: logging.LogRecord) -> bool:
    return "open_clip" not in Path(record.pathname).parts
