"""Similarity headers, which transform the selected frames before they are pooled (CLIP4Clip, Luo et al. 2022).

`meanP` changes nothing; `transformer` is one CLIP block over the frames, `seqTransf` four blocks with a residual.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaclip_finetune.errors import UserError
from adaclip_finetune.model.blocks import clip_blocks, start_from, start_small
from adaclip_finetune.model.clip import text_blocks, text_positions

_SEQ_POSITIONS = 77
_SEQ_LAYERS = 4
_SEQ_EPS = 1e-12


class TransformerHeader(nn.Module):
    """Adds learned positions and applies a CLIP block: (B, K, D) → (B, K, D).

    The block is initialised from the text tower's block 4.
    """

    def __init__(self, width: int, max_frames: int, clip: nn.Module) -> None:
        super().__init__()
        self.positions = nn.Embedding(max_frames, width)
        self.transformer = clip_blocks(width, 1)
        start_small(self)
        start_from(self.transformer, text_blocks(clip)[4:5])

    def forward(self, frames: Tensor) -> Tensor:
        positions = self.positions.weight[: frames.shape[1]]
        out: Tensor = self.transformer(frames + positions)
        return out


class SeqTransformerHeader(nn.Module):
    """Adds positions, applies four CLIP blocks and adds the input: (B, K, D) → (B, K, D).

    Positions and blocks are initialised from the text tower's, with its blocks 0 to 3.
    """

    def __init__(self, width: int, max_frames: int, clip: nn.Module) -> None:
        super().__init__()
        if max_frames > _SEQ_POSITIONS:
            raise UserError(f"sim_header seqTransf takes at most {_SEQ_POSITIONS} frames, not {max_frames}")
        self.positions = nn.Embedding(_SEQ_POSITIONS, width)
        self.transformer = clip_blocks(width, _SEQ_LAYERS, _SEQ_EPS)
        start_small(self)
        start_from(self.transformer, text_blocks(clip)[:_SEQ_LAYERS])
        positions = text_positions(clip)
        if positions is not None and positions.shape[1] == width:
            rows = min(len(positions), _SEQ_POSITIONS)
            with torch.no_grad():
                self.positions.weight[:rows].copy_(positions[:rows])

    def forward(self, frames: Tensor) -> Tensor:
        positions = self.positions.weight[: frames.shape[1]]
        out: Tensor = self.transformer(frames + positions) + frames
        return out
