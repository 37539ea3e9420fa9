"""Shared fixtures: the folder ../shared, a CLIP of two blocks a tower, a small project to train on, and its runs.

What takes seconds to import is imported where it is needed.
"""

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

# The tensors are tiny: more threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A shell without job control makes background jobs ignore Ctrl-C, and tests interrupt programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# matplotlib's list of fonts takes seconds to make, so it stays in the user's cache folder when the cache moves (below).
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in tests/core, so that `pytest -m core` runs it."""
    for item in items:
        if item.path.parent.name == "core":
            item.add_marker(pytest.mark.core)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that replaces the user's cache folder, in tests and in the programs that they start."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real videos and annotation files beside the checkout. Skip the test if it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is missing: real videos and annotation files are not part of the project")
    return SHARED


TINY_CLIP = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


def build_tiny_clip(seed: int = 0, vocabulary: int = 49408) -> open_clip.CLIP:
    """Return a random CLIP of two blocks a tower. With fewer words than CLIP's it takes a tenth of the time."""
    settings = TINY_CLIP | {"text_cfg": {**TINY_CLIP["text_cfg"], "vocab_size": vocabulary}}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(**settings)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Return settings for a dozen videos (folders of coloured images) and a CLIP folder."""
    folder = tmp_path_factory.mktemp("project")
    write_clip_folder(folder / "clip")
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (120, 120, 120)}
    generator = np.random.default_rng(0)
    annotation = {}
    for number in range(12):
        name, colour = f"video{number}", list(colours)[number % 4]
        frames = folder / "frames" / name
        frames.mkdir(parents=True)
        for index in range(1, 9):
            pixels = np.full((36, 40, 3), colours[colour]) + generator.integers(-20, 20, (36, 40, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(frames / f"image_{index:05d}.jpg")
        annotation[name] = {"sentences": [f"a {colour} thing number {number}", f"it is {colour}"]}
    for split, names in {"train": range(12), "val": range(6), "test": range(4, 12)}.items():
        content = {f"video{number}": annotation[f"video{number}"] for number in names}
        (folder / f"{split}.json").write_text(json.dumps(content))
    return {
        "dataset": "tiny",
        "train_annot": str(folder / "train.json"),
        "val_annot": str(folder / "val.json"),
        "test_annot": str(folder / "test.json"),
        "frames_dir": str(folder / "frames"),
        "clip_weights": str(folder / "clip"),
        "policy_backbone": "raw",
        "rescale_size": 8,
        "hidden_dim": 64,
        "mlp_hidden_dim": 32,
        "num_frm": 6,
        "top_k": 2,
        "batch_size": 4,
        "num_epochs": 2,
        "num_workers": 0,
        "frame_agg": "mlp",
        "learning_rate": 1e-3,
        "coef_lr": 0.1,
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a language model of bytes, of width 32, with random weights."""
    from speaking import write_language_model

    return write_language_model(tmp_path_factory.mktemp("speaking") / "language_model")


@pytest.fixture(scope="session")
def run(project: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with random weights, which tests only read."""
    from indexing import write_run

    return write_run(tmp_path_factory.mktemp("run") / "run", project)


@pytest.fixture(scope="session")
def cached_loading() -> Callable[..., Any]:
    from adaclip_finetune.search.search_model import load_retriever

    return functools.cache(load_retriever)


@pytest.fixture
def load_once(cached_loading: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make commands load a model once, since loading is what takes the time, and return `load_retriever` as they have
    it."""
    monkeypatch.setattr("adaclip_finetune.search.search_model.load_retriever", cached_loading)
    return cached_loading


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write stand-ins for the pictures of a run, since drawing takes a third of its time."""
    for name in ("draw_curves", "draw_frame_usage"):
        monkeypatch.setattr(f"adaclip_finetune.report.{name}", lambda path, *_: path.write_bytes(b"a picture"))


@pytest.fixture
def library(clips: Path, tmp_path: Path) -> Path:
    """Return a copy of the videos of a module's fixture `clips`, which a test may change."""
    return Path(shutil.copytree(clips, tmp_path / "library"))


@pytest.fixture(scope="module")
def server(index: Any) -> Iterator[Any]:
    """Serve a module's fixture `index`."""
    from serving import running

    with running(index) as server:
        yield server


def write_clip_folder(folder: Path, seed: int = 0) -> None:
    """Write `build_tiny_clip` as an open_clip folder: a config and float32 safetensors."""
    folder.mkdir()
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": preprocess}))
    save_file(build_tiny_clip(seed).state_dict(), folder / "open_clip_model.safetensors")
