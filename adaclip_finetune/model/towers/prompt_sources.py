"""The two sources from which `tower: global_local` makes prompts for both towers (DGL, Yang et al. 2024).

Each keeps a table of rows for every block, as wide as the image tower. All prompts are the same for every text and
every video, so that a batch needs them once.
"""

from __future__ import annotations

import torch
from open_clip.transformer import QuickGELU, Transformer
from torch import Tensor, nn

from adaclip_finetune.config.choices.towers import GlobalLocalSettings


class LinearPrompts(nn.Module):
    """The rows of the table are the local prompts, the same in all frames. A linear map makes text prompts of them.

    The table starts with uniform values from −bound to bound.
    """

    def __init__(self, settings: GlobalLocalSettings, depth: int, width: int, text_width: int, bound: float) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(depth, settings.local_prompts, width).uniform_(-bound, bound))
        self.prefix = nn.Linear(width, text_width)
        self.postfix = nn.Linear(width, text_width) if settings.postfix_prompts else None

    def text(self) -> Tensor:
        """Return the text prompts of every block, (blocks, text_prompts, text width)."""
        prompts: Tensor = self.prefix(self.table)
        # No word sees the prompts behind the words. The factor 0 keeps their map in the graph, as DDP requires.
        return prompts if self.postfix is None else prompts + 0 * self.postfix(self.table)

    def local(self, frames: int) -> Tensor:
        """Return the prompts of every frame in every block, (blocks, 1, local_prompts, width)."""
        return self.table[:, None]


class TransformerPrompts(nn.Module):
    """A transformer block, the same for all blocks of the towers, mixes the table's rows of one block.

    Of what comes out, a small network makes text prompts from the first rows; the others are local prompts, frame by
    frame.
    The table starts with normal values of variance 1.
    """

    def __init__(self, settings: GlobalLocalSettings, depth: int, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.text_prompts, self.local_prompts = settings.text_prompts, settings.local_prompts
        self.text_rows = settings.text_prompts * (2 if settings.postfix_prompts else 1)
        self.table = nn.Parameter(torch.randn(depth, self.text_rows + settings.frames * settings.local_prompts, width))
        self.mixer = Transformer(width=width, layers=1, heads=heads, act_layer=QuickGELU)
        self.to_text = nn.Sequential(nn.Linear(width, 2 * width), QuickGELU(), nn.Linear(2 * width, text_width))

    def text(self) -> Tensor:
        """Return the text prompts of every block, (blocks, text_prompts, text width)."""
        prompts: Tensor = self.to_text(self.mixer(self.table)[:, : self.text_prompts])
        return prompts

    def local(self, frames: int) -> Tensor:
        """Return the prompts of the frames in every block, (blocks, frames, local_prompts, width).

        They are interpolated linearly if there are more or fewer frames than the setting `frames` says.
        """
        rows: Tensor = self.mixer(self.table)[:, self.text_rows :]
        made = rows.reshape(len(rows), -1, self.local_prompts, rows.shape[-1])
        known = made.shape[1]
        if frames == known:
            return made
        places = torch.arange(frames, device=made.device, dtype=self.table.dtype)
        places = ((places + 0.5) * known / frames - 0.5).clamp(0, known - 1)
        shares = 1 - (places[:, None] - torch.arange(known, device=made.device)).abs()  # of known frames in each frame
        return torch.einsum("tk,lkpw->ltpw", shares.clamp(min=0).to(made.dtype), made)
