"""A small retriever in place of a real one, and random frames and token ids for it."""

from typing import Any
from unittest.mock import patch

import open_clip
import timm
import torch
from conftest import build_tiny_clip
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from transformers import BertConfig

from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoBatch
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.loaded import LoadedClip

VOCABULARY = 100
SPEC = ImageSpec(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
SMALL = {"num_frm": 6, "top_k": 2, "hidden_dim": 64, "mlp_hidden_dim": 32, "rescale_size": 8, "policy_backbone": "raw"}


def build_pe_clip(**trunk: Any) -> nn.Module:
    """Return a CLIP with rotary positions, a class token and attention pooling, two blocks in each tower; `trunk` are
    options of timm for the image tower."""
    settings: Any = open_clip.get_model_config("PE-Core-B-16")
    settings["vision_cfg"]["image_size"] = 32
    settings["text_cfg"] |= {"vocab_size": VOCABULARY, "layers": 1, "width": 32, "heads": 2}
    settings.pop("custom_text")
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, **trunk}
    create = timm.create_model
    with (
        torch.random.fork_rng(),
        patch("timm.create_model", lambda name, **options: create(name, **{**options, **small})),
    ):
        torch.manual_seed(0)
        return open_clip.CustomTextCLIP(**settings).eval()


def build_retriever(clip: nn.Module | None = None, spec: ImageSpec = SPEC, **settings: Any) -> VideoRetriever:
    """Return a random retriever with the settings `SMALL`, changed as given. By default its CLIP has 100 words."""
    config = load_config(None, {**SMALL, "policy_weights": "random", **settings})
    clip = clip or build_tiny_clip(vocabulary=VOCABULARY)
    torch.manual_seed(1)
    return VideoRetriever(config, loaded(clip, spec))


def loaded(clip: nn.Module, spec: ImageSpec = SPEC) -> LoadedClip:
    """Return a CLIP as if it had been loaded, without a tokenizer."""
    return LoadedClip(clip, spec, None, None, 77, "test")  # type: ignore[arg-type]


def random_frames(*shape: int) -> Tensor:
    """Return random pixels, uint8, the same ones at each call."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def random_videos(count: int = 4, frames: int = 6, view: tuple[int, ...] | None = (1, 8, 8)) -> VideoBatch:
    """Return a batch of random videos; `view` is the shape of the selector's frames, None if it takes CLIP's."""
    return VideoBatch(
        frames=random_frames(count, frames, 3, 32, 32),
        frame_mask=torch.ones(count, frames, dtype=torch.bool),
        policy_frames=None if view is None else random_frames(count, frames, *view),
        frame_indices=torch.arange(frames).expand(count, frames),
        video_ids=[f"v{number}" for number in range(count)],
    )


def random_tokens(count: int = 4) -> Tensor:
    """Return token ids (count, 77) of texts of different lengths: an end token, which has the highest id, then 0."""
    ids = torch.randint(1, VOCABULARY - 1, (count, 77), generator=torch.Generator().manual_seed(4))
    ends = torch.arange(count)[:, None] * 2 + 3
    places = torch.arange(77)
    return ids.masked_fill(places == ends, VOCABULARY - 1).masked_fill(places > ends, 0)


def on_meta(name: str) -> nn.Module:
    """Return open_clip's model of that name, at its full size, on the meta device, which takes no memory."""
    settings = open_clip.get_model_config(name)
    kind = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        return kind(**settings)


def build_timm_clip(hugging_face: bool = True) -> nn.Module:
    """Return a CustomTextCLIP of a trunk of timm and a text tower of Hugging Face or open_clip, with random weights.

    They have two blocks each, open_clip's text tower one.
    """
    create = timm.create_model
    small = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32}
    bert = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=VOCABULARY
    )
    vision = {
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 32,
    }
    with (
        torch.random.fork_rng(),
        patch("timm.create_model", lambda name, **options: create(name, **{**options, **small})),
    ):
        torch.manual_seed(0)
        text = {"vocab_size": VOCABULARY, "layers": 1, "width": 32, "heads": 2}
        clip = open_clip.CustomTextCLIP(64, vision, text)
        if hugging_face:
            clip.text = HFTextEncoder("", 64, bert, "cls_pooler", "linear", pretrained=False)
    return clip.eval()
