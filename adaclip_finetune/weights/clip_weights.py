"""Find the CLIP that the settings name, build its towers and fill in the weights.

The weights come from open_clip's hub, from a folder (open_clip's or transformers'), from a file, or from a checkpoint
that holds a whole CLIP. Loading is strict and in float32: tensors that are missing, unexpected or of another shape are
listed and refused, and nothing is rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import open_clip
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.weights import backbones, huggingface
from adaclip_finetune.weights.architecture import architecture_of, sizes_of
from adaclip_finetune.weights.digest import weights_digest
from adaclip_finetune.weights.loaded import LoadedClip, Tokenizer, ensure_logit_bias, pools_at_end_token
from adaclip_finetune.weights.plain import strict_load
from adaclip_finetune.weights.safe import is_torchscript, named_tensors, read_untrusted

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_WEIGHTS_IN_FOLDER = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Entries of OpenAI's files that are not weights: numbers, and a mask that is part of the architecture."""


class Weights(NamedTuple):
    """A CLIP's tensors by OpenAI's or open_clip's names, and where they come from (a setting and its value).

    `description` is that of a checkpoint of ours, otherwise empty; `tokenizer` is the folder beside the checkpoint with
    the files of a tokenizer that is not CLIP's. With `with_additions` the tensors include what a PEFT method added to
    CLIP, which is filled in later.
    """

    state: Mapping[str, Tensor]
    source: str
    description: Mapping[str, Any] = MappingProxyType({})
    tokenizer: Path | None = None
    with_additions: bool = False


class Towers(NamedTuple):
    """A CLIP that was found but not built: `model_cfg` and `preprocess` describe it in open_clip's terms.

    `weights` are None if open_clip must fetch them, by `name` and `tag`. open_clip knows the tokenizer by `name`, which
    is None for CLIP's own. `note` says in words what the shapes of the tensors were taken for.
    """

    model_cfg: dict[str, Any]
    preprocess: Mapping[str, Any]
    weights: Weights | None
    name: str | None = None
    tag: str | None = None
    note: str = ""

    @property
    def subject(self) -> str:
        """The setting that names the CLIP, and its value, for messages."""
        return f"clip_backbone: {self.name}" if self.weights is None else self.weights.source


def load_clip(config: Config, with_weights: bool = True, from_checkpoint: Weights | None = None) -> LoadedClip:
    """Build the CLIP that `find_towers` finds and fill in its weights.

    `with_weights=False` builds the same modules on the meta device: names and shapes without memory or download. Raise
    UserError if the architecture is unknown, the weights cannot be obtained, or they or the settings do not fit.
    """
    towers = find_towers(config, from_checkpoint)
    module = build_towers(towers, "cpu" if with_weights else "meta")
    preprocess = open_clip.get_model_preprocess_cfg(module)
    image = _image_spec(towers, preprocess, config.max_img_size)
    tokens = _tokenizer(towers, module, config.max_txt_len)
    source = _fill(module, towers) if with_weights else "meta device, no weights"
    description = dict(towers.weights.description if towers.weights else {}) or {
        "model_cfg": towers.model_cfg,
        "preprocess": {name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")},
        "pretrained": None if towers.weights else f"{towers.name}:{towers.tag}",
    }
    return LoadedClip(module, image, tokens, tokens.count_cut, tokens.context_length, source, description)


def load_pretrained(config: Config, like: LoadedClip) -> LoadedClip:
    """Load the CLIP that a checkpoint began with, `like` being the CLIP in the checkpoint.

    It is the one that the settings name, otherwise the one that the checkpoint names, otherwise OpenAI's model of the
    same shapes. Raise UserError if it cannot be obtained, or is not the one whose digest the checkpoint holds.
    """
    if config.clip_weights is None and "clip_backbone" not in config.model_fields_set:
        name = like.description.get("pretrained")
        if name is None:
            likely = architecture_of(like.module.state_dict(), "resume").name
            if likely not in open_clip.list_openai_models():
                raise UserError(
                    "resume: the CLIP in this checkpoint has no architecture that OpenAI published, so the weights "
                    "that it began with are not known; give clip_weights, or clip_backbone (an open_clip name:tag)"
                )
            name = f"{likely}:openai"
        config = config.model_copy(update={"clip_backbone": name})
    found = load_clip(config)
    expected = like.description.get("digest")
    if expected is not None and expected != weights_digest(found.module):
        raise UserError(
            f"resume: this checkpoint began with {like.description.get('source')} (SHA-256 {expected[:12]}…), and "
            f"{found.source} holds other weights; give those with clip_weights"
        )
    return found


def find_towers(config: Config, from_checkpoint: Weights | None = None) -> Towers:
    """Find the CLIP that is meant: the first of these that there is.

    1. the CLIP that a checkpoint of ours describes;
    2. the folder or file `clip_weights`;
    3. the CLIP in any other checkpoint, recognised by the shapes of its tensors;
    4. the weights that open_clip fetches for `clip_backbone`.

    A `clip_backbone` that was given must be the architecture of 1 to 3; its default says nothing about them. Raise
    UserError if it is not, or if there is no such CLIP.
    """
    given = config.clip_backbone if "clip_backbone" in config.model_fields_set else None
    path = None if config.clip_weights is None else Path(config.clip_weights)
    if from_checkpoint is not None and from_checkpoint.description:
        return _described(from_checkpoint, given)
    if path is not None and path.is_dir():
        return _in_folder(path, given)
    if path is not None:
        return _of_weights(Weights(read_state_dict(path), f"clip_weights: {path}"), given)
    if from_checkpoint is not None:
        return _of_weights(from_checkpoint, given)
    name, tag = backbones.with_tag(config.clip_backbone)
    return Towers(open_clip.get_model_config(name), backbones.preprocess_of(name, tag), None, name, tag)


def build_towers(towers: Towers, device: str) -> nn.Module:
    """Build the modules with random weights, or shapes alone on the device `meta`. Raise UserError if that fails."""
    return backbones.build(towers.model_cfg, towers.preprocess, towers.subject, device)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return tensors by name from a file of weights, which is read as data. Raise UserError if there are none."""
    tensors = named_tensors(read_untrusted(path)[0])
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    if "clip.logit_scale" in tensors:
        raise UserError(f"{path} is the checkpoint of a whole retriever, with CLIP inside: give it as --resume {path}")
    return {name: tensor for name, tensor in tensors.items() if name not in NO_WEIGHTS}


def save_tokenizer(loaded: LoadedClip, folder: Path) -> None:
    """Write the files of a tokenizer that is not CLIP's own, so that open_clip finds it in `folder`; else nothing."""
    encode = getattr(loaded.tokenize, "encode", None)
    if not isinstance(encode, HFTokenizer):
        return
    folder.mkdir(exist_ok=True)
    encode.save_pretrained(str(folder))
    described = {"model_cfg": loaded.description["model_cfg"], "preprocess_cfg": loaded.description["preprocess"]}
    (folder / _OPEN_CLIP_CONFIG).write_text(json.dumps(described), encoding="utf-8")


def _described(weights: Weights, given: str | None) -> Towers:
    model_cfg, tokenizer = weights.description["model_cfg"], None
    _check_architecture(given, model_cfg, weights.source)
    if model_cfg["text_cfg"].get("hf_tokenizer_name"):
        tokenizer = f"{backbones.LOCAL_DIR}{weights.tokenizer}"
        if weights.tokenizer is None or not weights.tokenizer.is_dir():
            raise UserError(f"{weights.source}: its tokenizer is not in {weights.tokenizer}; copy the whole run folder")
    return Towers(model_cfg, weights.description["preprocess"], weights, tokenizer)


def _in_folder(folder: Path, given: str | None) -> Towers:
    path, tokenizer = folder / _OPEN_CLIP_CONFIG, None
    if path.is_file():
        tokenizer, content = f"{backbones.LOCAL_DIR}{folder}", read_json(path)
        model_cfg = content.get("model_cfg") if isinstance(content, dict) else None
        if not isinstance(model_cfg, dict):
            raise UserError(f"{path}: has no model_cfg that describes a CLIP")
        preprocess = content.get("preprocess_cfg", {})
        file = next((folder / name for name in _WEIGHTS_IN_FOLDER if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"clip_weights: {folder} holds no weights, such as {_WEIGHTS_IN_FOLDER[0]}")
        state = read_state_dict(file)
    elif huggingface.is_huggingface_folder(folder):
        path = folder / "config.json"
        model_cfg = huggingface.read_model_cfg(folder)
        preprocess = huggingface.read_preprocess(folder, model_cfg["vision_cfg"]["image_size"])
        state, file = huggingface.read_weights(folder)
    else:
        raise UserError(
            f"clip_weights: {folder} holds no {_OPEN_CLIP_CONFIG} and no config.json of a CLIPModel; give a folder of "
            "open_clip's or transformers', or a weights file"
        )
    _check_architecture(given, model_cfg, str(path))
    return Towers(model_cfg, preprocess, Weights(state, f"clip_weights: {file}"), tokenizer)


def _of_weights(weights: Weights, given: str | None) -> Towers:
    """Find the architecture that was given, which must fit the shapes of the weights, or the one of these shapes."""
    if given is None:
        model_cfg, name = architecture_of(weights.state, weights.source)
        preprocess = {} if name is None else backbones.preprocess_of(name, None)
        return Towers(model_cfg, preprocess, weights, name, note=_note(name))
    name, tag = backbones.resolve_backbone(given)
    model_cfg = open_clip.get_model_config(name)
    wanted = found = sizes_of(model_cfg)
    with suppress(UserError):  # where tensors are laid out otherwise, loading them says what does not fit
        found = sizes_of(architecture_of(weights.state, weights.source).model_cfg)
    if wanted and found and wanted != found:
        unlike = "; ".join(f"{size} {one}, not {found[size]}" for size, one in wanted.items() if one != found[size])
        raise UserError(
            f"clip_backbone {given} contradicts {weights.source}, whose tensors are of another architecture "
            f"({unlike}); leave clip_backbone out, and the shapes decide"
        )
    return Towers(model_cfg, backbones.preprocess_of(name, tag), weights, name)


def _check_architecture(given: str | None, model_cfg: Mapping[str, Any], where: str) -> None:
    if given is None:
        return
    wanted = open_clip.get_model_config(backbones.resolve_backbone(given)[0])
    if backbones.with_defaults(wanted) != backbones.with_defaults(model_cfg):
        raise UserError(f"clip_backbone {given} is not the architecture in {where}; leave it out")


def _note(name: str | None) -> str:
    if name is None:
        return " (by its shapes not a published model; taken for quick-GELU and 64 channels per head)"
    twin = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    if twin not in open_clip.list_models():
        return f" (by its shapes {name})"
    return f" (by its shapes {name}; {twin} has the same: if it is that, set clip_backbone to it)"


def _fill(module: nn.Module, towers: Towers) -> str:
    """Put the weights into the module; return where they came from."""
    weights = towers.weights
    if weights is None:
        return _fetch(module, towers)
    if "logit_bias" in weights.state:
        ensure_logit_bias(module)
    own = module.state_dict() if weights.with_additions else weights.state
    strict_load(module, {name: tensor for name, tensor in weights.state.items() if name in own}, weights.source)
    return weights.source.partition(": ")[2] + towers.note


def _fetch(module: nn.Module, towers: Towers) -> str:
    source = f"{towers.name}:{towers.tag}"
    with backbones.open_clip_silent():
        try:
            path = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(towers.name, towers.tag)))
        except Exception as error:
            raise UserError(
                f"clip_backbone: the weights {source} could not be downloaded ({error}).\n"
                "Ways to get them: run once where the Hugging Face hub can be reached (they stay in its cache, "
                "HF_HOME); set HF_ENDPOINT to a mirror; or copy a file or folder with them here and set clip_weights "
                "to it."
            ) from error
        try:
            if is_torchscript(path):
                strict_load(module, read_state_dict(path), source)
            else:  # open_clip knows the older names in its own files
                open_clip.load_checkpoint(module, path, strict=True, weights_only=True)
        except Exception as error:
            raise UserError(f"clip_backbone: the weights {source} in {path} do not fit the model: {error}") from error
    return source


def _image_spec(towers: Towers, preprocess: Mapping[str, Any], max_img_size: int | None) -> ImageSpec:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if max_img_size not in (None, height):
        raise UserError(f"max_img_size: {max_img_size} is not what the tower takes ({height}x{width}); leave it out")
    try:
        if height != width:
            raise ValueError(f"images of {height}x{width}, not square")
        mean, std = tuple(preprocess["mean"]), tuple(preprocess["std"])
        return ImageSpec(height, mean, std, preprocess["interpolation"], preprocess["resize_mode"])
    except (ValueError, TypeError) as error:
        raise backbones.cannot_build(towers.subject, error) from error


def _tokenizer(towers: Towers, module: nn.Module, max_txt_len: int) -> Tokenizer:
    text = towers.model_cfg["text_cfg"]
    try:
        with backbones.open_clip_silent():
            if towers.name is not None:
                encode = open_clip.get_tokenizer(towers.name)
            else:
                encode = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))
                if text.get("vocab_size", encode.vocab_size) < encode.vocab_size:
                    raise ValueError(f"a vocabulary of {text['vocab_size']}, CLIP's has {encode.vocab_size}")
    except Exception as error:
        raise UserError(f"{towers.subject}: the tokenizer could not be loaded: {error}") from error
    if max_txt_len > encode.context_length:
        context = f"the text tower's context of {encode.context_length} tokens"
        raise UserError(f"max_txt_len: {max_txt_len} is beyond {context}; lower it")
    return Tokenizer(encode, encode.context_length, whole_context=not pools_at_end_token(module))
