"""Loads what the published system gave for small random models: `golden/`, whose README says what is there."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "golden"
VOCABULARY = 49408


def load_golden(name: str) -> Any:
    """Give what `name`.json holds, with the arrays of `name`.npz (or `name`.1.npz and `name`.2.npz) as tensors in it.

    The name of an array is the path to its place: "3/actions" is `actions` of the fourth case.
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
    """Give CLIP's part of a published state dict; the tokens that no golden text has are zero in its embedding."""
    state = load_golden("clip")
    ids, rows = state.pop("token_ids"), state.pop("token_rows")
    table = torch.zeros(VOCABULARY, rows.shape[1])
    table[ids] = rows
    return {**state, "clip.token_embedding.weight": table}
