"""What open_clip knows: names of architectures, tags of weights, folders. It builds the towers, without weights."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import merge_preprocess_dict
from torch import nn

from adaclip_finetune.errors import UserError

# The names OpenAI gave its models.
_OPENAI_NAMES = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
LOCAL_DIR = "local-dir:"
"""How open_clip marks a folder where a name may stand."""


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


def only_tag(name: str) -> str:
    """The tag of a model that has weights of one kind. Raises UserError where one must be chosen, or none exists."""
    tags: list[str] = open_clip.list_pretrained_tags_by_model(name)
    if len(tags) == 1:
        return tags[0]
    choice = f"write {name}:TAG with one of its tags, {_tags(name)}, or set" if tags else "there are none: set"
    raise UserError(f"clip_backbone: {name} does not say which weights; {choice} clip_weights")


def describe(name: str) -> dict[str, Any]:
    """open_clip's description of a named architecture, or of a folder. Raises UserError."""
    try:
        model_cfg: dict[str, Any] = open_clip.get_model_config(name)
        # Filled with open_clip's defaults, to see that it is a description.
        defaults_filled(model_cfg)
    except Exception as error:  # all that a folder's config can hold
        raise cannot_build(subject_of(name), error) from error
    return model_cfg


def defaults_filled(model_cfg: dict[str, Any]) -> object:
    """What decides an architecture, with all defaults in: equal for descriptions that mean the same."""
    rest = {key: value for key, value in model_cfg.items() if value}
    vision, text = rest.pop("vision_cfg"), rest.pop("text_cfg")
    return open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), rest


def build_named(name: str, tag: str | None, device: str) -> nn.Module:
    """The towers of a named architecture or a folder, random or (device meta) shapes alone. Raises UserError."""
    # A file of weights does not say how its images were prepared; its tag does, or all tags of the architecture alike.
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(name)
    preparations = [merge_preprocess_dict({}, open_clip.get_pretrained_cfg(name, tag)) for tag in tags]
    alike = all(preparation == preparations[0] for preparation in preparations)
    try:
        return _created(name, device, preparations[0] if preparations and alike else None)
    except Exception as error:  # all that a folder's config, or a library behind a tower, can lead to
        raise cannot_build(subject_of(name), error) from error


def build_described(model_cfg: dict[str, Any], preprocess: dict[str, Any], subject: str, device: str) -> nn.Module:
    """The towers that open_clip's words describe; images are prepared as OpenAI's unless `preprocess` says otherwise.

    Raises UserError, which begins with `subject`: the setting and its value.
    """
    # open_clip builds every kind of model from a folder that holds its description.
    with tempfile.TemporaryDirectory() as folder:
        described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
        (Path(folder) / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
        try:
            return _created(f"{LOCAL_DIR}{folder}", device, None)
        except Exception as error:
            raise cannot_build(subject, error) from error


def _created(name: str, device: str, preprocess: dict[str, Any] | None) -> nn.Module:
    with open_clip_silent(), torch.device(device):
        module: nn.Module = open_clip.create_model(
            name,
            load_weights=False,
            pretrained_text=False,
            pretrained_image=False,
            precision="fp32",
            device=device,
            force_preprocess_cfg=preprocess,
        )
    return module


def subject_of(name: str) -> str:
    """The setting and what it says, for a message: `clip_backbone: ViT-B-32`, `clip_weights: folder`."""
    if name.startswith(LOCAL_DIR):
        return f"clip_weights: {name.removeprefix(LOCAL_DIR)}"
    return f"clip_backbone: {name}"


def cannot_build(subject: str, error: Exception) -> UserError:
    """open_clip, or a library behind it, cannot make the towers."""
    return UserError(f"{subject}: open_clip cannot build it: {type(error).__name__}: {error}")


@contextmanager
def open_clip_silent() -> Iterator[None]:
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


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"


def _is_not_open_clip(record: logging.LogRecord) -> bool:
    return "open_clip" not in Path(record.pathname).parts
