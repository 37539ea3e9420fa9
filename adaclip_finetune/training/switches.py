"""torch's process-wide switches for float32 arithmetic and for determinism, set as a run asks."""

from __future__ import annotations

import os

import torch

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_NO_DETERMINISTIC_FORM = "does not have a deterministic implementation"
_CUBLAS_REFUSES = "not deterministic because it uses CuBLAS"


def apply_switches(config: Config) -> None:
    """Set `tf32` and `deterministic`, whatever an earlier run in this process had set. Before CUDA does anything:
    cuBLAS reads its environment variable once.

    Without tf32 convolutions are float32 too, which torch by itself rounds to TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        # Stays set afterwards: it is a size of cuBLAS's memory, and switches nothing off.
        os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = False


def explain_nondeterminism(error: BaseException) -> UserError | None:
    """What to tell a user when `deterministic` met an operation without a deterministic form; None for other errors."""
    message = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if _NO_DETERMINISTIC_FORM in message:
        operation = message.split(_NO_DETERMINISTIC_FORM)[0].strip()
        return UserError(
            f"deterministic: torch has no deterministic form of {operation} on this device. Train without "
            "deterministic (the same seed then gives nearly the same figures), or on --device cpu"
        )
    if _CUBLAS_REFUSES in message:
        return UserError(
            f"deterministic: the environment variable {_CUBLAS} is {os.environ.get(_CUBLAS, 'not set')}, with which "
            "cuBLAS is not deterministic; unset it, or set it to :4096:8, and start again"
        )
    return None
