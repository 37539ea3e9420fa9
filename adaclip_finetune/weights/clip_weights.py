"""Find the CLIP that the settings mean, build its towers and put the weights in.

They come from open_clip's hub, from a folder (open_clip's or transformers'), from a file, or from a checkpoint that
holds a whole CLIP. Loading is strict and in float32: every tensor that is missing, unexpected or of another shape is
listed and refused, and nothing is rounded on the way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import open_clip
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.errors import UserError
from adaclip_finetune.weights import backbones, huggingface
from adaclip_finetune.weights.architecture import (
    Shapes,
    architecture_of,
    differences,
    shapes_of,
    shapes_of_config,
)
from adaclip_finetune.weights.digest import weights_digest
from adaclip_finetune.weights.loaded import LoadedClip, Tokenizer, ensure_logit_bias, pools_at_end_token
from adaclip_finetune.weights.plain import strict_load
from adaclip_finetune.weights.torchscript import is_torchscript
from adaclip_finetune.weights.untrusted import read_untrusted, without_module_prefix

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_WEIGHTS_IN_FOLDER = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# OpenAI's files keep these numbers among the tensors; a mask is part of the architecture.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


class Weights(NamedTuple):
    """A CLIP's tensors by OpenAI's or open_clip's names, and where they come from: a setting and its value.

    `description` is that of a checkpoint of ours, {} where there is none; `tokenizer` the folder beside the checkpoint
    that holds the tokenizer's files, if it is not CLIP's own. `with_additions`: the tensors include what a method added
    to CLIP, which is filled in later.
    """

    state: Mapping[str, Tensor]
    source: str
    description: Mapping[str, Any] = MappingProxyType({})
    tokenizer: Path | None = None
    with_additions: bool = False


class Towers(NamedTuple):
    """A CLIP that was found: `model_cfg` in open_clip's words. With a `name` (and maybe a `tag`), open_clip has it, or
    a folder does; without, `model_cfg` and `preprocess` say it all. `weights` are those that were read already.
    `tokenizer` is a folder with the tokenizer's files, for one that is not found by the name.
    """

    model_cfg: dict[str, Any]
    name: str | None = None
    tag: str | None = None
    folder: Path | None = None
    preprocess: Mapping[str, Any] = MappingProxyType({})
    weights: Weights | None = None
    told_by_shapes: bool = False
    tokenizer: Path | None = None


def load_clip(config: Config, with_weights: bool = True, from_checkpoint: Weights | None = None) -> LoadedClip:
    """Build the towers that `clip_backbone` and `clip_weights` name and fill them.

    `from_checkpoint` fills them where no `clip_weights` are given: nothing is fetched then, and its shapes tell the
    architecture. `with_weights=False` builds the same modules on the meta device: shapes and names, no memory and no
    download. Raises UserError when the architecture is unknown, the weights cannot be had, or they or the settings do
    not fit.
    """
    towers = find_towers(config, from_checkpoint)
    module = build_towers(towers, "cpu" if with_weights else "meta")
    image = _image_spec(towers, module, config.max_img_size)
    tokens = _tokenizer(towers, module, config.max_txt_len)
    source = _fill(module, towers) if with_weights else "meta device, no weights"
    description = _description(towers, module)
    return LoadedClip(module, image, tokens, tokens.count_cut, tokens.context_length, source, description)


def load_pretrained(config: Config, like: LoadedClip) -> LoadedClip:
    """CLIP as it was published, for towers `like` that came from a checkpoint.

    Where no setting says which CLIP that is, the shapes do. Raises UserError where they are of no model of OpenAI's,
    or the weights cannot be had.
    """
    if config.clip_weights is None and not _is_given(config) and (name := like.description.get("pretrained")):
        return load_clip(config.model_copy(update={"clip_backbone": name}))
    if config.clip_weights is None and not _is_given(config):
        name = architecture_of(shapes_of(like.module.state_dict(), "resume")).name
        if name not in open_clip.list_openai_models():
            raise UserError(
                "resume: the CLIP in this checkpoint is of no architecture that OpenAI published, so what it was "
                "before it learned is not known; give clip_weights, or clip_backbone (an open_clip name:tag)"
            )
        guessed = load_clip(config.model_copy(update={"clip_backbone": f"{name}:openai"}))
        began_with = like.description.get("digest")
        if began_with is not None and began_with != weights_digest(guessed.module):
            raise UserError(
                f"resume: this checkpoint began with {like.description.get('source')} (SHA-256 {began_with[:12]}…), "
                f"which {guessed.source} is not; give clip_weights"
            )
        return guessed
    return load_clip(config)


def find_towers(config: Config, from_checkpoint: Weights | None = None) -> Towers:
    """Which CLIP the settings mean. A `clip_backbone` that was not given, but is the default, decides nothing where
    weights are at hand; one that was given must have their shapes. Raises UserError.
    """
    local = Path(config.clip_weights) if config.clip_weights else None
    if local is not None and local.is_dir():
        towers = _in_folder(local)
        if _is_given(config):
            _check_same(config, towers, local)
        return towers
    if local is not None:
        return _of_weights(config, Weights(read_state_dict(local), f"clip_weights: {local}"))
    if from_checkpoint is not None:
        if from_checkpoint.description and not _is_given(config):
            return _described(from_checkpoint)
        return _of_weights(config, from_checkpoint)
    name, tag = backbones.resolve_backbone(config.clip_backbone)
    if tag is None:
        name, tag = backbones.resolve_backbone(f"{name}:{backbones.only_tag(name)}")
    return Towers(backbones.describe(name), name, tag)


def build_towers(towers: Towers, device: str) -> nn.Module:
    """The modules, random or (device meta) shapes alone. Raises UserError."""
    if towers.name is not None:
        return backbones.build_named(towers.name, towers.tag, device)
    return backbones.build_described(towers.model_cfg, dict(towers.preprocess), _subject(towers), device)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, a pickled state dict or a TorchScript archive, read as data: no code runs.

    Raises UserError.
    """
    content = read_untrusted(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    named = content.items() if isinstance(content, dict) else ()
    tensors = without_module_prefix({name: value for name, value in named if isinstance(value, Tensor)})
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name")
    if "clip.logit_scale" in tensors:
        raise UserError(f"{path}: is the checkpoint of a whole retriever, with CLIP inside: give it as --resume {path}")
    return {name: tensor for name, tensor in tensors.items() if name not in NO_WEIGHTS}


def _is_given(config: Config) -> bool:
    return "clip_backbone" in config.model_fields_set


def _in_folder(folder: Path) -> Towers:
    """A folder brings its own architecture and preprocessing."""
    if (folder / _OPEN_CLIP_CONFIG).is_file():
        name = f"{backbones.LOCAL_DIR}{folder}"
        return Towers(backbones.describe(name), name, folder=folder)
    if huggingface.is_huggingface_folder(folder):
        model_cfg = huggingface.read_model_cfg(folder)
        preprocess = huggingface.read_preprocess(folder, model_cfg["vision_cfg"]["image_size"])
        return Towers(model_cfg, folder=folder, preprocess=preprocess)
    raise UserError(
        f"clip_weights: {folder} holds no {_OPEN_CLIP_CONFIG} and no config.json of a CLIPModel; give a folder of "
        "open_clip's or transformers', or a weights file"
    )


def _check_same(config: Config, towers: Towers, folder: Path) -> None:
    given = backbones.describe(backbones.resolve_backbone(config.clip_backbone)[0])
    if backbones.defaults_filled(given) != backbones.defaults_filled(towers.model_cfg):
        path = folder / (_OPEN_CLIP_CONFIG if towers.name else "config.json")
        raise UserError(f"clip_backbone {config.clip_backbone} is not the architecture in {path}; leave it out")


def _of_weights(config: Config, weights: Weights) -> Towers:
    """The architecture that was given, held against the shapes of the weights; else the one that the shapes tell."""
    if not _is_given(config):
        model_cfg, name = architecture_of(shapes_of(weights.state, weights.source))
        return Towers(model_cfg, name, weights=weights, told_by_shapes=True)
    name, tag = backbones.resolve_backbone(config.clip_backbone)
    model_cfg = backbones.describe(name)
    given, found = shapes_of_config(model_cfg), _shapes_or_none(weights)
    if given and found and (unlike := list(differences(given, found))):
        raise UserError(
            f"clip_backbone {config.clip_backbone} contradicts {weights.source}, whose tensors are of another "
            f"architecture ({'; '.join(unlike)}); leave clip_backbone out, and the shapes decide"
        )
    return Towers(model_cfg, name, tag, weights=weights)


def _described(weights: Weights) -> Towers:
    """The CLIP in a checkpoint that says itself what its tensors do not: activation, heads, preprocessing, tokens."""
    stored = weights.description
    return Towers(stored["model_cfg"], preprocess=stored["preprocess"], weights=weights, tokenizer=weights.tokenizer)


def _description(towers: Towers, module: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps of its CLIP: open_clip's words for it, and the name of its pretrained weights if
    open_clip can fetch them."""
    if towers.weights is not None and towers.weights.description:
        return dict(towers.weights.description)
    preprocess = open_clip.get_model_preprocess_cfg(module)
    return {
        "model_cfg": towers.model_cfg,
        "preprocess": {name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")},
        "pretrained": f"{towers.name}:{towers.tag}" if towers.name and towers.tag and not towers.weights else None,
    }


def _shapes_or_none(weights: Weights) -> Shapes | None:
    """None where tensors are missing, or of another kind than OpenAI's: loading them will tell which."""
    try:
        return shapes_of(weights.state, weights.source)
    except UserError:
        return None


def _subject(towers: Towers) -> str:
    if towers.weights is not None:
        return towers.weights.source
    return f"clip_weights: {towers.folder}" if towers.folder else backbones.subject_of(towers.name or "")


def _fill(module: nn.Module, towers: Towers) -> str:
    """Put the weights into the module; says where they came from."""
    if towers.weights is not None:
        state = dict(towers.weights.state)
        if "logit_bias" in state:
            ensure_logit_bias(module)
        if towers.weights.with_additions:
            own = module.state_dict()
            state = {name: tensor for name, tensor in state.items() if name in own}
        strict_load(module, state, towers.weights.source)
        told = f" (by its shapes {_told(towers.name)})" if towers.told_by_shapes else ""
        return towers.weights.source.partition(": ")[2] + told
    if towers.folder is not None and towers.name is not None:
        path = _weights_in(towers.folder)
        strict_load(module, read_state_dict(path), f"clip_weights: {path}")
        return str(path)
    if towers.folder is not None:
        state, path = huggingface.read_weights(towers.folder)
        strict_load(module, state, f"clip_weights: {path}")
        return str(path)
    return _fetch(module, f"{towers.name}:{towers.tag}", open_clip.get_pretrained_cfg(towers.name, towers.tag))


def _told(name: str | None) -> str:
    if name is None:
        return "no published model, taken for quick-GELU and a head for every 64 channels"
    twin = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    also = f", which {twin} has as well: if it is that, say so with clip_backbone"
    return name + (also if twin in open_clip.list_models() else "")


def _fetch(module: nn.Module, source: str, cfg: Mapping[str, Any]) -> str:
    try:
        with backbones.open_clip_silent():
            path = open_clip.download_pretrained(cfg)
    except Exception as error:
        raise UserError(
            f"clip_backbone: the weights {source} could not be had ({error}).\n"
            "Ways to get them: run once where the Hugging Face hub can be reached (they stay in its cache, HF_HOME); "
            "set HF_ENDPOINT to a mirror; or copy a file or a folder of them here and set clip_weights to it."
        ) from error
    if is_torchscript(Path(path)):
        strict_load(module, read_state_dict(Path(path)), f"clip_backbone: {source} in {path}")
        return source
    try:
        with backbones.open_clip_silent():
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


def _image_spec(towers: Towers, module: nn.Module, max_img_size: int | None) -> ImageSpec:
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
        raise backbones.cannot_build(_subject(towers), error) from error


def _tokenizer(towers: Towers, module: nn.Module, max_txt_len: int) -> Tokenizer:
    try:
        with backbones.open_clip_silent():
            encode = _encoder(towers)
    except Exception as error:
        raise UserError(f"{_subject(towers)}: the tokenizer could not be had: {error}") from error
    if max_txt_len > encode.context_length:
        context = f"the text tower's context of {encode.context_length} tokens"
        raise UserError(f"max_txt_len: {max_txt_len} is beyond {context}; lower it")
    return Tokenizer(encode, encode.context_length, whole_context=not pools_at_end_token(module))


def _encoder(towers: Towers) -> Any:
    """open_clip's tokenizer."""
    text = towers.model_cfg["text_cfg"]
    if towers.name is not None:
        return open_clip.get_tokenizer(towers.name)
    if text.get("hf_tokenizer_name"):
        if towers.tokenizer is None or not towers.tokenizer.is_dir():
            raise ValueError(f"its files belong into {towers.tokenizer}, which is not there; copy the whole run folder")
        return open_clip.get_tokenizer(f"{backbones.LOCAL_DIR}{towers.tokenizer}")
    tokenizer = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77))
    if text.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        raise ValueError(f"a vocabulary of {text['vocab_size']}, CLIP's has {tokenizer.vocab_size}")
    return tokenizer


def save_tokenizer(loaded: LoadedClip, folder: Path) -> None:
    """Write the files of a tokenizer that is not CLIP's own, so that `folder` is one of open_clip's; else nothing."""
    encode = getattr(loaded.tokenize, "encode", None)
    if not isinstance(encode, HFTokenizer):
        return
    folder.mkdir(exist_ok=True)
    encode.save_pretrained(str(folder))
    described = {"model_cfg": loaded.description["model_cfg"], "preprocess_cfg": loaded.description["preprocess"]}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
