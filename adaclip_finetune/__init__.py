"""Finetune CLIP on your own videos, and search them by text.

    from adaclip_finetune import VideoIndex, load_retriever

These names are imported when they are first used, so that `adaclip --help` stays fast.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "VideoIndex": "search.index",
    "load_retriever": "search.search_model",
    "mteb_model": "search.mteb_model",
}

__all__ = ["VideoIndex", "__version__", "load_retriever", "mteb_model"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
