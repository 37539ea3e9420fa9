"""`tower: global_local`: prompts in both towers, some of which see all frames (DGL, Yang et al. 2024, "DGL: Dynamic
Global-Local Prompt Tuning for Text-Video Retrieval").

Local prompts stand in each frame, and text prompts behind the start token of each text. Both come from one source, and
each block has its own. Global prompts enter before the first block and go through all blocks: they see the tokens of
all frames, and each frame sees its own tokens and the global prompts. At the end, one of them is the video's vector.

A block's outputs for local prompts and text prompts are not used, since the next block has prompts of its own. So these
prompts are never queries here: a block only computes their keys and values, once for the whole batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaclip_finetune.config.choices.towers import GlobalLocalSettings
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.features import TextFeatures
from adaclip_finetune.model.text import TextTower, embed_tokens, end_positions, finish_text, rows_at, trim_padding
from adaclip_finetune.model.towers.base import BlockwiseTower
from adaclip_finetune.model.towers.prompt_sources import LinearPrompts, TransformerPrompts
from adaclip_finetune.model.vit import OpenBlock, tower_blocks
from adaclip_finetune.weights.loaded import text_setting, text_tower


class GlobalLocal(BlockwiseTower):
    """Encodes frames (B, T, 3, S, S) to one token a video: (B, 1, D)."""

    settings: GlobalLocalSettings

    def __init__(self, settings: GlobalLocalSettings, clip: nn.Module) -> None:
        super().__init__(settings, clip)
        self.text_blocks = tuple(_open_text_blocks(clip))  # views of modules, which are not registered here
        image_blocks, width = self.view.blocks, self.view.width
        text_width = len(self.text_blocks[0].linears()["out"][0].rows())
        image: Any = clip.visual
        bound = math.sqrt(6 / (3 * math.prod(image.image_size) / math.prod(self.view.grid) + width))  # 3: the colours
        depth = max(len(image_blocks), len(self.text_blocks))
        self.prompts: LinearPrompts | TransformerPrompts
        if settings.generator == "linear":
            self.prompts = LinearPrompts(settings, depth, width, text_width, bound)
        else:
            self.prompts = TransformerPrompts(settings, depth, width, text_width, image_blocks[0].heads)
        self.global_prompts = nn.Parameter(torch.empty(settings.global_prompts, width).uniform_(-bound, bound))

    def text_tower(self) -> TextTower:
        return PromptedTextTower(self)

    def frame_shares(self, frames: int) -> Tensor:
        return torch.full((1, frames), 1 / frames)

    def enter(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        count, frames, length = tokens.shape[:3]
        state["local"] = self.prompts.local(frames)  # (blocks, T or 1, P, W)
        state["global"] = {0: self.global_prompts.expand(count, -1, -1)}  # input of block 0; each block adds the next
        # What the global prompts see, (B, 1, 1, T · (G + P + L)): the P + L tokens of each real frame. The keys of each
        # frame include those of the G global prompts, which count in the first frame only.
        seen = state["mask"][:, :, None].repeat(1, 1, len(self.global_prompts) + self.settings.local_prompts + length)
        seen[:, :, : len(self.global_prompts)] = torch.arange(frames, device=seen.device)[:, None] == 0
        state["seen"] = seen.flatten(1)[:, None, None]
        return super().enter(tokens, state)

    def block(self, number: int, block: OpenBlock, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Run one block on the frames' tokens (B · T, L, W) and on the global prompts (B, G, W) in `state`."""
        shape, prompts, local = state["shape"], state["global"][number], state["local"][number]
        global_q, *of_global = block.qkv(prompts, _no_places(prompts))
        of_local = block.qkv(local, _no_places(local))[1:]
        q, *of_tokens = block.qkv(tokens)
        # Keys and values of each frame, (B · T, heads, G + P + L, d).
        k, v = (
            torch.cat([_for_frames(a[:, None], shape), _for_frames(b[None], shape), c], dim=2)
            for a, b, c in zip(of_global, of_local, of_tokens, strict=True)
        )
        all_k, all_v = (part.reshape(*shape, *part.shape[1:]).transpose(1, 2).flatten(2, 3) for part in (k, v))
        values = F.scaled_dot_product_attention(global_q, all_k, all_v, attn_mask=state["seen"])
        prompts = prompts + block.attention_out(values)
        # If the block runs again in the backward pass, the first result stays: the new one would hold its activations.
        state["global"].setdefault(number + 1, prompts + block.mlp(prompts))
        if number + 1 == len(self.view.blocks) and self.settings.output.startswith("global"):
            return tokens  # nothing reads what the last block makes of the frames
        tokens = tokens + block.attention_out(F.scaled_dot_product_attention(q, k, v))
        return tokens + block.mlp(tokens)

    def leave(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the mean of the vectors that `output` names, (B, 1, D)."""
        prompts, output = state["global"][len(self.view.blocks)], self.settings.output
        if output == "global_prompt0":
            return self._embed(prompts[:, :1])
        vectors, counts = [], []
        if output != "class_mean":
            vectors.append(self._embed(prompts))
            counts.append(state["mask"].new_ones(prompts.shape[:2]))
        if output != "global_mean":
            vectors.append(self.view.pool(tokens).reshape(*state["shape"], -1))
            counts.append(state["mask"])
        weights = torch.cat(counts, dim=1)[..., None].to(vectors[0].dtype)
        total = (torch.cat(vectors, dim=1) * weights).sum(dim=1, keepdim=True)
        return total / weights.sum(dim=1, keepdim=True).clamp(min=1)

    def _embed(self, prompts: Tensor) -> Tensor:
        """Return prompts (B, k, W) in the embedding space, (B, k, D).

        Each is pooled like an image all of whose tokens are that prompt, which any pooling reduces to one of them.
        """
        images = prompts.flatten(0, 1)[:, None].expand(-1, self.view.prefix + 1, -1)
        vectors: Tensor = self.view.pool(images).reshape(*prompts.shape[:2], -1)
        return vectors


class PromptedTextTower(TextTower):
    """CLIP's text tower with the text prompts of `tower`, which holds their parameters."""

    def __init__(self, tower: GlobalLocal) -> None:
        super().__init__(tower.clip)
        self._tower = (tower,)  # in a tuple, like CLIP: the retriever registers both elsewhere

    def forward(self, token_ids: Tensor, words: bool = False) -> TextFeatures:
        (tower,) = self._tower
        token_ids = trim_padding(self.clip, token_ids).to(tower.global_prompts.device)
        tokens = embed_tokens(self.clip, token_ids)
        prompts = tower.prompts.text()
        causal = text_tower(self.clip).attn_mask
        mask = None
        if isinstance(causal, Tensor):  # the start token stands before the prompts and does not see them
            length = token_ids.shape[1]
            places = torch.arange(length, device=token_ids.device)
            seen = (places > 0)[:, None].expand(-1, prompts.shape[1])
            mask = torch.cat([seen, causal[:length, :length] == 0], dim=1)
        for number, block in enumerate(tower.text_blocks):
            if tower.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.block, block, tokens, prompts[number], mask, use_reentrant=False)
            else:
                tokens = self.block(block, tokens, prompts[number], mask)
        ends = end_positions(self.clip, token_ids)
        if not words:
            return TextFeatures(finish_text(self.clip, rows_at(tokens, ends)))
        embedded = finish_text(self.clip, tokens)
        is_word = torch.arange(token_ids.shape[1], device=ends.device) <= ends[:, None]
        return TextFeatures(rows_at(embedded, ends), embedded, is_word)

    def block(self, block: OpenBlock, tokens: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
        """Run one block on tokens (n, L, W), which also see the prompts (p, W) as the mask (L, p + L) says."""
        own = block.qkv(prompts[None])[1:]
        q, *rest = block.qkv(tokens)
        k, v = (torch.cat([a.expand(len(b), -1, -1, -1), b], dim=2) for a, b in zip(own, rest, strict=True))
        tokens = tokens + block.attention_out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        return tokens + block.mlp(tokens)


def _open_text_blocks(clip: nn.Module) -> list[OpenBlock]:
    """Return the blocks of the text tower. Raise UserError if it cannot have prompts."""
    way_out = "take tower per_frame, or a CLIP whose text tower is open_clip's own"
    try:
        blocks = [block for block in tower_blocks(clip, "text") if isinstance(block, OpenBlock)]
    except UserError as error:
        raise UserError(f"tower global_local: {error}") from error
    if not blocks:
        raise UserError(f"tower global_local: text prompts need open_clip's own text tower; {way_out}")
    tower, pooling = text_tower(clip), text_setting(clip, "pool_type")
    padded = getattr(tower, "use_pad_mask", False)
    if getattr(tower, "cls_emb", None) is not None or padded or pooling not in ("argmax", "eos", "first", "last"):
        raise UserError(
            f"tower global_local: this text tower has a class token, masks its padding or pools by {pooling}, "
            f"beside which text prompts are not supported; {way_out}"
        )
    return blocks


def _no_places(prompts: Tensor) -> Tensor:
    """Return positions (L) which say that prompts (n, L, W) are not in the grid of patches."""
    return torch.full(prompts.shape[1:2], -1, device=prompts.device)


def _for_frames(part: Tensor, shape: torch.Size) -> Tensor:
    """Repeat keys or values, (B or 1, T or 1, heads, L, d), for every frame: (B · T, heads, L, d)."""
    return part.expand(*shape, -1, -1, -1).flatten(0, 1)
