"""Access to what all CLIP models have in common: the embedding width, image embeddings, text blocks."""

from __future__ import annotations

from torch import Tensor, nn

from adaclip_finetune.weights.loaded import text_tower


def embedding_width(clip: nn.Module) -> int:
    """Return D, the width of the shared embedding space."""
    for owner in (clip.visual, text_tower(clip)):
        if isinstance(width := getattr(owner, "output_dim", None), int):
            return width
    projection = text_tower(clip).text_projection
    assert isinstance(projection, Tensor)
    return projection.shape[1]


def encode_images(clip: nn.Module, pixels: Tensor) -> Tensor:
    """Return the embeddings (n, D), not normalised, of images (n, 3, S, S). `clip.visual` is the image tower."""
    out = clip.get_submodule("visual")(pixels)
    # CoCa's tower also returns the embeddings of its patches.
    embeddings = out[0] if isinstance(out, tuple) else out
    assert isinstance(embeddings, Tensor)
    return embeddings


def text_blocks(clip: nn.Module) -> list[nn.Module]:
    """Return the attention blocks of the text tower; none if it is not one of open_clip's own transformers."""
    transformer = getattr(text_tower(clip), "transformer", None)
    return list(getattr(transformer, "resblocks", []))


def text_positions(clip: nn.Module) -> Tensor | None:
    """Return the text tower's positional embedding (context_length, width), or None if it has none."""
    positions = getattr(text_tower(clip), "positional_embedding", None)
    return positions if isinstance(positions, Tensor) else None
