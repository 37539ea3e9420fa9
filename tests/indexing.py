"""A run folder with random weights, and indexes that are written without a model, for the tests of search."""

from pathlib import Path
from typing import Any

import numpy as np

from adaclip_finetune.cli import main
from adaclip_finetune.search.stored import IndexInfo, write_index


def write_run(folder: Path, settings: dict[str, Any], seed: int = 0, learned: float = 0.0) -> Path:
    """Write a run folder as `adaclip train` leaves it, with random selector and pooling.

    `learned` is the standard deviation of what is added to every parameter that learns.
    """
    import torch  # here, so that a process that only writes indexes starts at once

    from adaclip_finetune.config import load_config
    from adaclip_finetune.training.checkpoint import save_tensors
    from adaclip_finetune.training.session import open_model
    from adaclip_finetune.weights.clip_weights import save_tokenizer

    folder.mkdir()
    config = load_config(None, settings)
    torch.manual_seed(seed)
    session = open_model(config)
    for parameter in session.model.parameters():
        if parameter.requires_grad:
            parameter.data += learned * torch.randn_like(parameter)
    (folder / "config.json").write_text(config.model_dump_json(exclude={"clip_backbone"}))
    save_tokenizer(session.loaded, folder / "tokenizer")
    model, method, about = session.model, session.method, {"epoch": "7", **session.description()}
    save_tensors(folder / "best.safetensors", method.merged_state(model), {"content": "model", **about})
    save_tensors(folder / "adapter.safetensors", method.own_state(model), {"content": "adapter", **about})
    return folder


def index(*words: object, output: Path) -> int:
    """Run `adaclip index` and return the exit code."""
    return main(["index", *map(str, words), "-o", str(output)])


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in a folder and its subfolders, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unit_rows(count: int, width: int = 32, seed: int = 0) -> np.ndarray:
    """Return random rows (count, width), float32, of length 1."""
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def index_info(**others: Any) -> IndexInfo:
    """Return the info of an index whose model does not exist."""
    facts: dict[str, Any] = {"fingerprint": "f" * 64, "run": "/run", "settings": {}, "source": "/videos"}
    return IndexInfo(**facts | others)


def index_row(number: int) -> dict[str, Any]:
    """Return a row of an index."""
    frames = [{"index": 3, "time": 0.5, "weight": 0.25}, {"index": 400, "time": 65.0, "weight": 0.75}]
    facts = {"id": f"video{number}", "path": f"/videos/video{number}.mp4", "size": 1, "mtime_ns": 2, "duration": 70.0}
    return facts | {"captions": ["a ä"], "frames": frames, "best": 1, "thumb": "a.jpg"}


def write_random_index(folder: Path, count: int = 50, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Write an index of random vectors, and return the vectors."""
    folder.mkdir(exist_ok=True)
    vectors = unit_rows(count, seed=seed)
    write_index(folder, index_info(), vectors.astype(dtype), [index_row(number) for number in range(count)])
    return vectors
