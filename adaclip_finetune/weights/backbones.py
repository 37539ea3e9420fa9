"""Names of open_clip's architectures and of their weights (tags), and towers built by open_clip without weights."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import merge_preprocess_dict
from torch import nn

from adaclip_finetune.errors import UserError

# The names that OpenAI gave its models.
_OPENAI_NAMES = ("ViT-B/32", "ViT-B/16", "ViT-L/14")
LOCAL_DIR = "local-dir:"
"""The prefix with which open_clip takes a folder in place of a model name."""


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
        raise UserError(f"clip_backbone: open_clip has no weights {tag!r} of {name}; it has {_tags(name)}")
    with_quick_gelu = f"{name}-quickgelu"
    if weights.get("quick_gelu") and with_quick_gelu in open_clip.list_models():
        name = with_quick_gelu
    return name, tag


def with_tag(clip_backbone: str) -> tuple[str, str]:
    """Return the open_clip name and tag, the tag being the only one of the model if none is given.

    Raise UserError if the model has several tags to choose from, or none.
    """
    name, tag = resolve_backbone(clip_backbone)
    tags: list[str] = [tag] if tag else open_clip.list_pretrained_tags_by_model(name)
    if len(tags) != 1:
        choice = f"write {name}:TAG with one of its tags ({_tags(name)}), or set" if tags else "open_clip has none; set"
        raise UserError(f"clip_backbone: {name} does not say which weights: {choice} clip_weights")
    name, tag = resolve_backbone(f"{name}:{tags[0]}")
    return name, tag or tags[0]


def with_defaults(model_cfg: Mapping[str, Any]) -> object:
    """Return open_clip's description of a model with its defaults filled in, so that equal architectures compare equal.

    The result is None for a description that open_clip does not understand.
    """
    rest = {key: value for key, value in model_cfg.items() if value}
    try:
        return open_clip.CLIPVisionCfg(**rest.pop("vision_cfg")), open_clip.CLIPTextCfg(**rest.pop("text_cfg")), rest
    except (KeyError, TypeError):
        return None


def preprocess_of(name: str, tag: str | None) -> dict[str, Any]:
    """Return how images are preprocessed for a tag of a model; without a tag, for all its tags if they agree, else {}.

    A file of weights does not say how its images were preprocessed, so that of the tags is assumed for it.
    """
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(name)
    found: list[dict[str, Any]] = [merge_preprocess_dict({}, open_clip.get_pretrained_cfg(name, tag)) for tag in tags]
    return found[0] if found and all(preprocess == found[0] for preprocess in found) else {}


def build(model_cfg: Mapping[str, Any], preprocess: Mapping[str, Any], subject: str, device: str) -> nn.Module:
    """Build the towers that open_clip's terms describe, with random weights, or shapes alone on the device `meta`.

    Images are preprocessed as OpenAI's unless `preprocess` says otherwise. Raise UserError, beginning with `subject`
    (a setting and its value), if open_clip cannot build them.
    """
    # From a folder with a description, open_clip builds every kind of model.
    with tempfile.TemporaryDirectory() as folder:
        described = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
        try:
            (Path(folder) / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
            with open_clip_silent(), torch.device(device):
                return open_clip.create_model(  # type: ignore[no-any-return]
                    f"{LOCAL_DIR}{folder}", load_weights=False, pretrained_text=False, device=device
                )
        except Exception as error:  # whatever a config, or a library behind a tower, can lead to
            raise cannot_build(subject, error) from error


def cannot_build(subject: str, error: Exception) -> UserError:
    """Return the error for towers that open_clip, or a library behind it, cannot build."""
    return UserError(f"{subject}: open_clip cannot build it: {type(error).__name__}: {error}")


@contextmanager
def open_clip_silent() -> Iterator[None]:
    """Hide what open_clip logs, such as that a module that was built to be filled has no weights.

    open_clip logs through the root logger, which would get a handler for good if it had none.
    """

    def is_not_open_clip(record: logging.LogRecord) -> bool:
        return "open_clip" not in Path(record.pathname).parts

    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(is_not_open_clip)
    try:
        yield
    finally:
        root.removeFilter(is_not_open_clip)
        root.removeHandler(handler)


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
