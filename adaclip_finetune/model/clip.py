"""What of CLIP's towers is the same for all of them: the width of their space, an image's embedding."""

from __future__ import annotations

from torch import Tensor, nn

from adaclip_finetune.weights.loaded import text_tower


def embedding_width(clip: nn.Module) -> int:
    """D, the width of the shared embedding space."""
    for owner in (clip.visual, text_tower(clip)):
        if isinstance(width := getattr(owner, "output_dim", None), int):
            return width
    projection = text_tower(clip).text_projection
    assert isinstance(projection, Tensor)
    return projection.shape[1]


def encode_images(clip: nn.Module, pixels: Tensor) -> Tensor:
    """Normalised images (n, 3, S, S) → embeddings (n, D), not normalised. `clip` holds the image tower as `visual`."""
    out = clip.get_submodule("visual")(pixels)
    # CoCa's tower gives the embeddings of its patches too.
    embeddings = out[0] if isinstance(out, tuple) else out
    assert isinstance(embeddings, Tensor)
    return embeddings


def text_blocks(clip: nn.Module) -> list[nn.Module]:
    """The residual attention blocks of the text tower, or none if it is not one of open_clip's own transformers."""
    transformer = getattr(text_tower(clip), "transformer", None)
    return list(getattr(transformer, "resblocks", []))


def text_positions(clip: nn.Module) -> Tensor | None:
    """The text tower's positional embedding (context_length, width)."""
    positions = getattr(text_tower(clip), "positional_embedding", None)
    return positions if isinstance(positions, Tensor) else None
