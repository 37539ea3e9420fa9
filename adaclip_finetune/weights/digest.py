"""A digest of weights, by which a checkpoint recognises the pretrained CLIP that it belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from adaclip_finetune.weights.plain import plain_state


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 digest of the plain names, shapes and effective values of all weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_state(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
