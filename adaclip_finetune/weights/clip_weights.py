"""Find the CLIP that the settings name, build its towers and fill in the weights.

The weights come from open_clip's hub, from a folder (open_clip's or transformers'), from a file, or from a checkpoint
that holds a whole CLIP. Loading is strict and in float32: tensors that are missing, unexpected or of another shape are
listed and refused, and nothing is rounded.

A file of weights shows its architecture by the shapes of its tensors if they are laid out as OpenAI's are (Radford et
al. 2021). Shapes show neither the number of attention heads nor the activation, which are taken to be OpenAI's: 64
channels per head and quick-GELU. The setting `clip_backbone` overrides this.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip import list_pretrained_tags_by_model as _tags_of
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import merge_preprocess_dict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaclip_finetune.config import Config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.errors import UserError
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.weights import huggingface
from adaclip_finetune.weights.loaded import LoadedClip, Tokenizer, ensure_logit_bias, pools_at_end_token
from adaclip_finetune.weights.plain import strict_load, weights_digest
from adaclip_finetune.weights.safe import named_tensors, read_untrusted

# The names that OpenAI gave its models.
_OPENAI_NAMES = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
# The largest image tower that OpenAI published. Larger ones of others have more channels per head.
_OPENAI_WIDTH = 1024
# The file with which open_clip takes a folder, `local-dir:FOLDER`, in place of a model name.
_DESCRIPTION = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Entries of OpenAI's files that are not weights: numbers, and a mask that is part of the architecture."""


class Weights(NamedTuple):
    """A CLIP's tensors by OpenAI's or open_clip's names, and where they come from (a setting and its value).

    `state` is None if open_clip must fetch it. `description` has `model_cfg` and `preprocess` in open_clip's terms, and
    what else a checkpoint says about its CLIP; it is empty for a bare file. `tokenizer` is the name, or `local-dir:`
    and the folder, by which open_clip knows a tokenizer that is not CLIP's own. With `with_additions` the tensors
    include what a PEFT method added to CLIP, which is filled in later.
    """

    state: Mapping[str, Tensor] | None
    source: str
    description: Mapping[str, Any] = MappingProxyType({})
    tokenizer: str | None = None
    with_additions: bool = False


def load_clip(
    config: Config,
    with_weights: bool = True,
    from_checkpoint: Weights | None = None,
    device: str = "meta",
    draw: bool = True,
) -> LoadedClip:
    """Build the CLIP that the settings and the checkpoint mean and fill in its weights.

    `with_weights=False` builds the same modules without download, by default on the meta device: names and shapes
    without memory; on another `device` their weights are random. With `draw=False` no random values are drawn for
    weights that are then filled in, which would take longer than reading these. Raise UserError if the architecture is
    unknown, the weights cannot be obtained, or they or the settings do not fit.
    """
    weights = _find(config, from_checkpoint)
    try:
        filled = with_weights and weights.state is not None
        with nullcontext() if draw or not filled else _NoDraws():
            module = _build(weights, "cpu" if with_weights else device)
        preprocess = open_clip.get_model_preprocess_cfg(module)
        if config.resize is not None:
            preprocess |= {"resize_mode": "squash" if config.resize == "stretch" else "shortest"}
        image, (encode, context_length) = _image_spec(preprocess), _encoder(weights)
    except Exception as error:  # whatever a config, or a library behind a tower or a tokenizer, can lead to
        raise UserError(f"{weights.source}: open_clip cannot build it: {type(error).__name__}: {error}") from error
    if config.max_img_size not in (None, image.size):
        raise UserError(f"max_img_size: {config.max_img_size}, but the tower takes {image.size}; leave it out")
    if config.max_txt_len > context_length:
        raise UserError(f"max_txt_len: {config.max_txt_len}, but the tower takes {context_length} tokens")
    tokens = Tokenizer(encode, context_length, whole_context=not pools_at_end_token(module))
    if with_weights:
        _fill(module, weights)
    source = weights.source.partition(": ")[2] if with_weights else f"{device} device, no weights"
    stored = {name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")}
    description = {"pretrained": None, **weights.description, "preprocess": stored}
    return LoadedClip(module, image, tokens, tokens.count_cut, tokens.context_length, source, description)


def load_pretrained(config: Config, like: LoadedClip) -> LoadedClip:
    """Load the CLIP that a checkpoint began with, `like` being the CLIP in the checkpoint.

    It is the one that the settings name, otherwise the one that the checkpoint names, otherwise the default of
    `clip_backbone`. Raise UserError if it cannot be obtained, has another architecture, or is not the one whose digest
    the checkpoint holds.
    """
    name, expected = like.description.get("pretrained"), like.description.get("digest")
    if config.clip_weights is None and "clip_backbone" not in config.model_fields_set:
        default = open_clip.get_model_config(resolve_backbone(config.clip_backbone)[0])
        if name is None and not same_architecture(default, like.description["model_cfg"]):
            raise UserError(
                "resume: the checkpoint does not say which weights its CLIP began with; give clip_weights, or "
                "clip_backbone (an open_clip name:tag)"
            )
        config = config.model_copy(update={"clip_backbone": name or config.clip_backbone})
    found = load_clip(config)
    if expected is not None and expected != weights_digest(found.module):
        raise UserError(
            f"resume: this checkpoint began with {like.description.get('source')} (SHA-256 {expected[:12]}…), and "
            f"{found.source} holds other weights; give those with clip_weights"
        )
    return found


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return tensors by name from a file of weights, which is read as data. Raise UserError if there are none."""
    tensors = named_tensors(read_untrusted(path)[0])
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    if "clip.logit_scale" in tensors:
        raise UserError(f"{path} is the checkpoint of a whole retriever, with CLIP inside: give it as --resume {path}")
    return {name: tensor for name, tensor in tensors.items() if name not in NO_WEIGHTS}


def write_description(folder: Path, model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any]) -> None:
    """Write the file with which open_clip takes a folder for a model."""
    described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / _DESCRIPTION).write_text(json.dumps(described, indent=2), encoding="utf-8")


def save_tokenizer(loaded: LoadedClip, folder: Path) -> None:
    """Write the files of a tokenizer that is not CLIP's own, so that open_clip finds it in `folder`; else nothing."""
    encode = getattr(loaded.tokenize, "encode", None)
    if isinstance(encode, HFTokenizer):
        folder.mkdir(exist_ok=True)
        encode.save_pretrained(str(folder))
        write_description(folder, loaded.description["model_cfg"], loaded.description["preprocess"])


def resolve_backbone(clip_backbone: str) -> tuple[str, str | None]:
    """Return the open_clip name and tag: `ViT-B/32` → ("ViT-B-32-quickgelu", "openai"); `name` → (name, None).

    Weights that were trained with quick-GELU get the architecture that has it, for which open_clip has a name of its
    own. Raise UserError for a name or tag that open_clip does not know.
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
        raise UserError(
            f"clip_backbone: open_clip has no weights {tag!r} of {name}; it has {', '.join(_tags_of(name))}"
        )
    with_quick_gelu = f"{name}-quickgelu"
    return with_quick_gelu if weights.get("quick_gelu") and with_quick_gelu in open_clip.list_models() else name, tag


def architecture_of(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Return open_clip's description of the OpenAI-style CLIP (ViT or ResNet) with these tensors.

    Raise UserError for tensors that are not laid out as OpenAI's are.
    """

    def count(pattern: str) -> int:
        return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))

    try:
        width, embed_dim = state["text_projection"].shape
        text = {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
            "width": width,
            "heads": width // 64,
            "layers": count(r"transformer\.resblocks\.(\d+)\."),
        }
        if "visual.class_embedding" in state:
            width, _, patch_size, _ = state["visual.conv1.weight"].shape
            layers: Any = count(r"visual\.transformer\.resblocks\.(\d+)\.")
            step, positions = patch_size, state["visual.positional_embedding"]
        else:
            width, patch_size = len(state["visual.layer1.0.conv1.weight"]), None
            layers = [count(rf"visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)]
            step, positions = 32, state["visual.attnpool.positional_embedding"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{source}: cannot tell the architecture from the tensors, which are not laid out as OpenAI's CLIP (no "
            f"{error}). Name it with clip_backbone (an open_clip name), or give a folder that holds its config"
        ) from error
    image_size = step * math.isqrt(len(positions) - 1)  # one position belongs to the class token
    vision = {"image_size": image_size, "patch_size": patch_size, "width": width, "layers": layers}
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}


def same_architecture(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two of open_clip's descriptions of a model mean the same, defaults being filled in."""

    def with_defaults(model_cfg: Mapping[str, Any]) -> object:
        rest = {key: value for key, value in model_cfg.items() if value}
        return open_clip.CLIPVisionCfg(**rest.pop("vision_cfg")), open_clip.CLIPTextCfg(**rest.pop("text_cfg")), rest

    try:
        return with_defaults(one) == with_defaults(other)
    except (KeyError, TypeError):  # a description that open_clip does not understand
        return False


def _find(config: Config, from_checkpoint: Weights | None) -> Weights:
    """Find the CLIP that is meant, and its description: the first of these that there is.

    1. the CLIP that a checkpoint of ours describes;
    2. the folder or file `clip_weights`;
    3. the CLIP in any other checkpoint;
    4. the weights that open_clip fetches for `clip_backbone`.

    A `clip_backbone` that was given is the architecture of a bare file, and must be that of a description; its default
    says nothing about them. Raise UserError if it is another one, or if there is no such CLIP.
    """
    given = config.clip_backbone if "clip_backbone" in config.model_fields_set else None
    if from_checkpoint is not None and (from_checkpoint.description or config.clip_weights is None):
        weights = from_checkpoint
    elif config.clip_weights is not None:
        weights = _read_weights(Path(config.clip_weights))
    else:
        name, tag = resolve_backbone(config.clip_backbone)
        tags = _tags_of(name)
        if tag is None and len(tags) == 1:
            name, tag = resolve_backbone(f"{name}:{tags[0]}")
        if tag is None:
            choice = f"write {name}:TAG with one of its tags ({', '.join(tags) or 'none'}), or set clip_weights"
            raise UserError(f"clip_backbone: {name} does not say which weights: {choice}")
        about = {"model_cfg": open_clip.get_model_config(name), "preprocess": _preprocess_of(name, tag)}
        return Weights(None, f"clip_backbone: {name}:{tag}", {**about, "pretrained": f"{name}:{tag}"}, name)
    if weights.description:
        model_cfg = weights.description["model_cfg"]
        if given and not same_architecture(open_clip.get_model_config(resolve_backbone(given)[0]), model_cfg):
            raise UserError(
                f"clip_backbone {given} is not the architecture of {weights.source}; "
                "remove it from the flags, or from the config file"
            )
        if not model_cfg.get("text_cfg", {}).get("hf_tokenizer_name"):
            return weights._replace(tokenizer=None)
        folder = str(weights.tokenizer).removeprefix("local-dir:")
        if not Path(folder).is_dir():
            raise UserError(f"{weights.source}: its tokenizer is not in {folder}; copy the whole run folder")
        return weights
    if given is not None:
        name, tag = resolve_backbone(given)
        about = {"model_cfg": open_clip.get_model_config(name), "preprocess": _preprocess_of(name, tag)}
        return Weights(weights.state, f"{weights.source} with clip_backbone {given}", about, name)
    model_cfg = architecture_of(weights.state or {}, weights.source)
    if model_cfg["vision_cfg"]["width"] > _OPENAI_WIDTH:
        raise UserError(f"{weights.source} is larger than any CLIP of OpenAI; name its architecture with clip_backbone")
    told = f"{weights.source} (by its shapes, with quick-GELU and 64 channels per head; otherwise set clip_backbone)"
    return Weights(weights.state, told, {"model_cfg": model_cfg, "preprocess": {}})


def _read_weights(path: Path) -> Weights:
    """Read the weights in a file, or in a folder of open_clip's or of transformers', which describes them."""
    if not path.is_dir():
        return Weights(read_state_dict(path), f"clip_weights: {path}")
    if of_open_clip := (path / _DESCRIPTION).is_file():
        content = read_json(path / _DESCRIPTION)
        if not isinstance(content, dict) or not isinstance(content.get("model_cfg"), dict):
            raise UserError(f"{path / _DESCRIPTION}: has no model_cfg that describes a CLIP")
        description = {"model_cfg": content["model_cfg"], "preprocess": content.get("preprocess_cfg", {})}
    else:
        description = huggingface.read_folder(path)
    names = _OPEN_CLIP_WEIGHTS if of_open_clip else huggingface.WEIGHTS
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"clip_weights: {path} holds no weights: none of {', '.join(names)}")
    state = read_state_dict(file) if of_open_clip else huggingface.to_openai_names(read_state_dict(file))
    return Weights(state, f"clip_weights: {file}", description, f"local-dir:{path}")


def _preprocess_of(name: str, tag: str | None) -> dict[str, Any]:
    """Return how images are preprocessed for a tag of a model; without a tag, for all its tags if they agree, else {}.

    A file of weights does not say how its images were preprocessed, so that of the tags is assumed for it.
    """
    tags = [tag] if tag else _tags_of(name)
    found: list[dict[str, Any]] = [merge_preprocess_dict({}, open_clip.get_pretrained_cfg(name, tag)) for tag in tags]
    return found[0] if found and all(preprocess == found[0] for preprocess in found) else {}


def _build(weights: Weights, device: str) -> nn.Module:
    """Build the modules with random weights, or shapes alone on the device `meta`.

    Images are preprocessed as OpenAI's unless the description says otherwise.
    """
    # From a folder with a description, open_clip builds every kind of model.
    with tempfile.TemporaryDirectory() as folder, _open_clip_silent(), torch.device(device):
        write_description(Path(folder), weights.description["model_cfg"], weights.description["preprocess"])
        return open_clip.create_model(  # type: ignore[no-any-return]
            f"local-dir:{folder}", load_weights=False, pretrained_text=False, device=device
        )


def _fill(module: nn.Module, weights: Weights) -> None:
    """Put the weights into the module. Raise UserError if they cannot be fetched, or do not fit."""
    if weights.state is None:
        _fetch(module, weights)
        return
    if "logit_bias" in weights.state:
        ensure_logit_bias(module)
    own = module.state_dict() if weights.with_additions else weights.state
    state = {name: tensor for name, tensor in weights.state.items() if name in own}
    strict_load(module, state, weights.source)


def _fetch(module: nn.Module, weights: Weights) -> None:
    name, tag = weights.description["pretrained"].split(":")
    try:
        with _open_clip_silent():
            path = open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag))
            open_clip.load_checkpoint(module, path, strict=True, weights_only=True)
    except Exception as error:
        raise UserError(
            f"{weights.source}: the weights could not be downloaded and loaded: {error}\n"
            "If the Hugging Face hub cannot be reached from here, set HF_ENDPOINT to a mirror, copy its cache "
            "(HF_HOME) from a machine that has the weights, or copy the weights and give their file or folder: in "
            "place of the name to a command, and as clip_weights to a run."
        ) from error


def _image_spec(preprocess: Mapping[str, Any]) -> ImageSpec:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"images of {height}x{width}, not square")
    mean, std = tuple(preprocess["mean"]), tuple(preprocess["std"])
    return ImageSpec(height, mean, std, preprocess["interpolation"], preprocess["resize_mode"])


def _encoder(weights: Weights) -> tuple[Any, int]:
    """Return open_clip's tokenizer for the towers, and their context length."""
    with _open_clip_silent():
        if weights.tokenizer is not None:
            encode = open_clip.get_tokenizer(weights.tokenizer)
            return encode, encode.context_length
        text, own = open_clip.CLIPTextCfg(**weights.description["model_cfg"]["text_cfg"]), open_clip.CLIPTextCfg()
        if text.vocab_size < own.vocab_size:
            raise ValueError(f"a vocabulary of {text.vocab_size}, CLIP's has {own.vocab_size}")
        return open_clip.tokenize, text.context_length


class _NoDraws(TorchFunctionMode):
    """Leaves tensors as they are instead of filling them with random values."""

    _FUNCTIONS = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in self._FUNCTIONS:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@contextmanager
def _open_clip_silent() -> Iterator[None]:
    """Hide what open_clip logs, such as that a module that was built to be filled has no weights.

    open_clip logs through the root logger, which would get a handler for good if it had none.
    """
    handler, before = logging.NullHandler(), logging.root.manager.disable
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(handler)
