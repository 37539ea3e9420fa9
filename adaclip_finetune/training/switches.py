"""The switches of torch for float32 arithmetic (`tf32`) and determinism (`deterministic`)."""

from __future__ import annotations

import os

import torch

from adaclip_finetune.config import Config
from adaclip_finetune.errors import UserError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_NO_DETERMINISTIC_FORM = "does not have a deterministic implementation"
_CUBLAS_REFUSES = "not deterministic because it uses CuBLAS"


def apply_switches(config: Config) -> None:
    """Set `tf32` and `deterministic` for the whole process, whatever an earlier run in it had set.

    Call it before CUDA is used, since cuBLAS reads its environment variable only once. Without `tf32`, convolutions
    compute in float32 too; torch alone would round them to TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = False


def explain_nondeterminism(error: BaseException) -> UserError | None:
    """Return a message if `deterministic` met an operation without a deterministic form, and None for other errors."""
    message = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if _NO_DETERMINISTIC_FORM in message:
        operation = message.split(_NO_DETERMINISTIC_FORM)[0].strip()
        return UserError(
            f"deterministic: torch has no deterministic form of {operation} on this device. Train without "
            "deterministic (the same seed then gives nearly the same figures), or with --device cpu"
        )
    if _CUBLAS_REFUSES in message:
        return UserError(
            f"deterministic: cuBLAS is not deterministic if the environment variable {_CUBLAS} is "
            f"{os.environ.get(_CUBLAS, 'not set')}; unset it, or set it to :4096:8, and start again"
        )
    return None
