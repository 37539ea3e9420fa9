"""Load outputs of the published system for small random models, from `golden/`; its README describes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "golden"
VOCABULARY = 49408


def load_golden(name: str) -> Any:
    """Return the content of `name`.json, with the arrays of `name`.npz (or `name`.1.npz and `name`.2.npz) as tensors.

    The name of an array is its path in the content: "3/actions" is `actions` of the fourth case.
    """
    path = FOLDER / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in sorted(FOLDER.glob(f"{name}.*npz")):
        with np.load(part, allow_pickle=False) as arrays:
            for place, array in arrays.items():
                *above, last = place.split("/")
                holder = content
                for step in above:
                    holder = holder[int(step) if isinstance(holder, list) else step]
                holder[last] = torch.from_numpy(array)
    if not content:
        raise FileNotFoundError(f"{FOLDER} holds no {name}.json and no {name}.npz")
    return content


def load_golden_clip() -> dict[str, Tensor]:
    """Return CLIP's part of a published state dict. Embeddings of tokens that no golden text has are zero."""
    state = load_golden("clip")
    ids, rows = state.pop("token_ids"), state.pop("token_rows")
    table = torch.zeros(VOCABULARY, rows.shape[1])
    table[ids] = rows
    return {**state, "clip.token_embedding.weight": table}
