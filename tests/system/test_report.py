"""The table and the pictures: what they are given is what they show."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from adaclip_finetune.evaluation.metrics import one_line, results_table, retrieval_metrics
from adaclip_finetune.peft.importance import TensorImportance
from adaclip_finetune.report import draw_curves, draw_frame_usage, write_importance


def test_table_has_a_line_a_model_and_both_directions() -> None:
    perfect = retrieval_metrics([torch.eye(4)], np.arange(4))
    constant = retrieval_metrics([torch.ones(4, 4)], np.arange(4))
    lines = results_table({"zero-shot": constant, "finetuned": perfect}).splitlines()
    assert len({len(line.rstrip()) for line in lines[1:]}) == 1, "columns line up"
    assert lines[1].split() == ["R@1", "R@5", "R@10", "MedR", "MeanR"] * 2
    assert lines[2].split() == ["zero-shot", *["0.0", "100.0", "100.0", "4.0", "4.0"] * 2]
    assert lines[3].split() == ["finetuned", *["100.0", "100.0", "100.0", "1.0", "1.0"] * 2]
    assert one_line(perfect).startswith("T2V R@1 100.0  R@5 100.0")


def is_a_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG" and len(set(image.convert("L").resize((64, 64)).tobytes())) > 1


def test_pictures_are_drawn_even_of_a_run_that_stopped_at_once(tmp_path: Path) -> None:
    metrics = {"t2v": {"R@1": 10.0}, "v2t": {"R@1": 12.0}}
    events = [
        {"event": "zero_shot", "step": 0},
        {"event": "train", "step": 1, "loss": 3.0, "lr": {"clip": 0.0, "other": 0.0}},
        {"event": "train", "step": 2, "loss": 2.0, "lr": {"other": 1e-3}},
        {"event": "validation", "step": 2, "metrics": metrics},
        {"event": "best", "step": 2},
    ]
    for name, part in (("none.png", []), ("zero.png", events[:2]), ("all.png", events)):
        draw_curves(tmp_path / name, part, ["t2v.R@1", "v2t.R@1"])
        assert is_a_picture(tmp_path / name)
    draw_frame_usage(tmp_path / "usage.png", np.array([3, 0, 1, 4]), videos=4, top_k=2)
    assert is_a_picture(tmp_path / "usage.png")


def test_importance_table_and_picture(tmp_path: Path) -> None:
    rows = [TensorImportance("a", 0, 10, 0.5, 1.5, True), TensorImportance("b", None, 1, 0.25, None, False)]
    write_importance(tmp_path / "i.csv", tmp_path / "i.png", rows)
    assert (tmp_path / "i.csv").read_text().splitlines() == [
        "name,group,dim,importance,normalized,retained",
        "a,0,10,0.5,1.5,True",
        "b,,1,0.25,,False",
    ]
    assert is_a_picture(tmp_path / "i.png")
