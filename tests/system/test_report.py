"""The pictures and the table of a run show what they are given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from adaclip_finetune.evaluation.metrics import results_table, retrieval_metrics
from adaclip_finetune.peft.importance import TensorImportance
from adaclip_finetune.report import draw_confusion, draw_curves, draw_frame_usage, write_importance

NAMES = ["t2v.R@1", "v2t.R@1"]


def test_a_table_has_a_line_for_each_model_and_both_directions() -> None:
    perfect, constant = (retrieval_metrics([matrix], np.arange(4)) for matrix in (torch.eye(4), torch.ones(4, 4)))
    _, heads, *rows = results_table({"zero-shot": constant, "finetuned": perfect}).splitlines()
    assert heads.split() == ["R@1", "R@5", "R@10", "MedR", "MeanR"] * 2
    assert rows[0].split() == ["zero-shot", *["0.0", "100.0", "100.0", "4.0", "4.0"] * 2]
    assert rows[1].split() == ["finetuned", *["100.0", "100.0", "100.0", "1.0", "1.0"] * 2]


def is_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and len(set(image.convert("L").resize((64, 64)).tobytes())) > 1


def event(kind: str, step: int, recall: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, "metrics": {"t2v": {"R@1": recall}, "v2t": {"R@1": recall - 1}}, **more}


def update(step: int, rates: Mapping[str, float]) -> dict[str, Any]:
    return {"event": "train", "step": step, "loss": 3.0 - step, "lr": rates}


RATES = {"clip_decay": 1e-6, "clip_no_decay": 1e-6, "other_decay": 1e-3}
EVENTS = [
    event("zero_shot", 0, 81.5, split="test"),
    update(1, dict.fromkeys(RATES, 0.0)),
    update(2, RATES),
    event("validation", 2, 82.0),
    event("best", 2),
    event("validation", 3, 82.4),
    event("finetuned", 3, 83.6, split="test"),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from here on."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_curves_group_equal_lines_and_do_not_dramatise(drawn: list[Figure], tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", EVENTS, NAMES)
    _, rates, validation = drawn[0].axes
    assert rates.get_legend_handles_labels()[1] == ["clip_decay\nclip_no_decay", "other_decay"]
    labels = validation.get_legend_handles_labels()[1]
    for name in NAMES:
        assert {f"{name}, validation", f"{name}, zero-shot on test", f"{name}, best epoch on test"} < set(labels)
    low, high = validation.get_ylim()
    assert low < 80.5 and high > 83.6 and high - low > 20


@pytest.mark.parametrize("count", [0, 2, len(EVENTS)])
def test_pictures_are_drawn_even_of_a_run_that_stopped_at_once(count: int, tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", EVENTS[:count], NAMES)
    assert is_a_picture(tmp_path / "curves.png")


def test_frame_usage_shows_shares_of_the_videos(drawn: list[Figure], tmp_path: Path) -> None:
    draw_frame_usage(tmp_path / "usage.png", np.array([3, 0, 1, 4]), videos=4, top_k=2)
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == [75, 0, 25, 100]  # type: ignore[attr-defined]


@pytest.mark.parametrize("count", [2, 111])
def test_confusion_shows_shares_of_each_class_and_names_where_there_is_room(
    drawn: list[Figure], tmp_path: Path, count: int
) -> None:
    counts = np.eye(count, dtype=np.int64) * 2
    counts[0] = 0  # a class without videos
    counts[1, :2] = (3, 1)
    draw_confusion(tmp_path / "confusion.png", counts, [f"$class {number}" for number in range(count)])
    axes = drawn[0].axes[0]
    shares = np.asarray(axes.images[0].get_array())
    assert shares[:2, :2].tolist() == [[0, 0], [75, 25]]
    assert ("$class 1" in [label.get_text() for label in axes.get_yticklabels()]) == (count == 2)


def test_importance_is_a_table_and_a_picture(tmp_path: Path) -> None:
    rows = [TensorImportance("a", 0, 10, 0.5, 1.5, True), TensorImportance("b", None, 1, 0.25, None, False)]
    write_importance(tmp_path / "i.csv", tmp_path / "i.png", rows)
    assert (tmp_path / "i.csv").read_text().splitlines() == [
        "name,group,dim,importance,normalized,retained",
        "a,0,10,0.5,1.5,True",
        "b,,1,0.25,,False",
    ]
    assert is_a_picture(tmp_path / "i.png")
