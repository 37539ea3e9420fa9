"""The settings `freeze_layer_num` and `freeze_clip`: which parameters of CLIP may learn, before the method chooses.

The names are OpenAI's. Those of open_clip's other towers (`text.…`, timm's `visual.trunk.…`, residual networks) are
understood likewise, as numbered blocks and a head that makes the embedding.
"""

from __future__ import annotations

import re

from torch import nn

from adaclip_finetune.errors import UserError

_BLOCK = re.compile(
    r"(?P<tower>visual\.|text\.)?(?:transformer|trunk)\.(?:encoder\.)?(?:resblocks|blocks|block|layers|layer|stages)\.(?P<index>\d+)\."
)
_RESNET_STAGE = re.compile(r"visual\.layer(?P<number>\d+)\.")
_HEAD = re.compile(
    r"(?:logit_scale|logit_bias"
    r"|(?:text\.)?(?:ln_final|text_projection|proj)"
    r"|visual\.(?:ln_post|proj|head|attn_pool|attnpool)"
    r"|visual\.trunk\.(?:norm|fc_norm|attn_pool|final_conv|head))(?:\.|$)"
)


def apply_freezing(clip: nn.Module, freeze_layer_num: int, freeze_clip: bool) -> None:
    """Set `requires_grad` of every parameter of CLIP.

    With freeze_layer_num -1 all learn. With n ≥ 0, the transformer blocks from n on (the first is 0) of both towers
    learn, and what follows them: ln_final, text_projection, logit_scale, visual.ln_post, visual.proj; so 0 freezes the
    embeddings. With freeze_clip none learn. Raise UserError for an n beyond the last block of the deeper tower, or a
    tower without blocks.
    """
    if freeze_layer_num >= 0 and not freeze_clip:
        _check_depth(clip, freeze_layer_num)
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(not freeze_clip and _learns(name, freeze_layer_num))


def _learns(name: str, freeze_layer_num: int) -> bool:
    if freeze_layer_num < 0 or _HEAD.match(name):
        return True
    block = _block_of(name)
    return block is not None and block[1] >= freeze_layer_num


def _block_of(name: str) -> tuple[str, int] | None:
    """Return the tower ("visual" or "text") and the block, from 0, that a parameter belongs to, or None."""
    if match := _BLOCK.match(name):
        return "visual" if match["tower"] == "visual." else "text", int(match["index"])
    if match := _RESNET_STAGE.match(name):
        return "visual", int(match["number"]) - 1
    return None


def _check_depth(clip: nn.Module, freeze_layer_num: int) -> None:
    blocks = [block for name, _ in clip.named_parameters() if (block := _block_of(name))]
    depths = {tower: max((i + 1 for t, i in blocks if t == tower), default=0) for tower in ("visual", "text")}
    for tower, depth in depths.items():
        if not depth:
            raise UserError(
                f"freeze_layer_num {freeze_layer_num}: the {tower} tower of this CLIP has no numbered blocks to count; "
                "choose -1 (trains all of CLIP) or freeze_clip (trains nothing of it)"
            )
    if freeze_layer_num > max(depths.values()):
        raise UserError(
            f"freeze_layer_num {freeze_layer_num}: the image tower has {depths['visual']} blocks and the text tower "
            f"{depths['text']}; choose a number up to {max(depths.values())}, or -1 for all of CLIP"
        )
