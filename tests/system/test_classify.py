"""`adaclip classify`: probabilities are those of the definition, for videos and pictures, runs and plain CLIPs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from indexing import write_run
from media import coded_frame, write_video
from PIL import Image

from adaclip_finetune.cli import main
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.search.search_model import load_retriever
from adaclip_finetune.training.session import open_any

Settings = dict[str, Any]
Capsys = pytest.CaptureFixture[str]
CLASSES = ["blue sky", "a red car", "grey"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, a picture, and what is neither."""
    folder = tmp_path_factory.mktemp("files")
    write_video(folder / "videos/a.mp4", 40)
    write_video(folder / "videos/below/c.mp4", 3)
    Image.fromarray(coded_frame(5)).save(folder / "videos/b.png")
    (folder / "videos/notes.txt").write_text("notes")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    (folder / "templates.txt").write_text("a photo of {}.\n{}!\n")
    return folder


def classified(*words: object, capsys: Capsys, code: int = 0) -> dict[str, dict[str, float]]:
    """Return class → probability by the name of each file, in the order printed."""
    capsys.readouterr()
    assert main(["classify", *map(str, words), "--json", "--num_workers", "0"]) == code
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {Path(row["path"]).name: {one["class"]: one["probability"] for one in row["classes"]} for row in rows}


def test_a_plain_clip_averages_the_vectors_of_frames_and_of_templates(
    project: Settings, files: Path, capsys: Capsys
) -> None:
    words = [project["clip_weights"], files / "videos", "--classes", files / "classes.txt", "--device", "cpu"]
    found = classified(*words, "--templates", files / "templates.txt", capsys=capsys)
    assert list(found) == ["a.mp4", "b.png", "c.mp4"]

    session = open_any(str(project["clip_weights"]), {"device": "cpu"})
    model, clip = session.model, session.loaded
    reader = VideoReader(VideoFolder(files / "videos"), session.config, model.views())
    with torch.no_grad():
        texts = [template.replace("{}", name) for name in CLASSES for template in ("a photo of {}.", "{}!")]
        vectors = F.normalize(clip.module.encode_text(clip.tokenize(texts, 77)), dim=1).reshape(3, 2, -1).mean(dim=1)
        for name in ("a.mp4", "c.mp4"):
            batch = collate([reader.read("below/c" if name == "c.mp4" else "a")]).videos
            assert batch is not None and batch.frames.shape[1] == 16
            pixels = (batch.frames[0] / 255 - 0.5) / 0.25
            video = F.normalize(F.normalize(clip.module.encode_image(pixels), dim=1).mean(dim=0), dim=0)
            expected = (clip.module.logit_scale.exp() * vectors @ video).softmax(dim=0)
            assert [found[name][one] for one in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-5) for row in found.values())


@pytest.mark.parametrize("frame_agg", ["mlp", "qscore"])
def test_a_run_of_classification_has_its_own_classes_and_templates(
    project: Settings, files: Path, tmp_path: Path, capsys: Capsys, frame_agg: str
) -> None:
    own = {"classes": str(files / "classes.txt"), "templates": "action", "normalize": True}
    run = write_run(
        tmp_path / "run", {**project, "frame_agg": frame_agg, "task": {"method": "classification", "config": own}}
    )
    found = classified(run, files / "videos/b.png", files / "videos/a.mp4", capsys=capsys)
    assert list(found) == ["b.png", "a.mp4"] and all(set(row) == set(CLASSES) for row in found.values())
    other = classified(run, files / "videos/a.mp4", "--templates", "none", capsys=capsys)
    assert list(other["a.mp4"].values()) != pytest.approx(list(found["a.mp4"].values()), abs=1e-6)
    if frame_agg == "mlp":
        model, videos = load_retriever(run), files / "videos"
        texts = model.encode_text(CLASSES)
        vectors = {"b.png": model.encode_image(videos / "b.png"), "a.mp4": model.encode_video(videos / "a.mp4")[0]}
        bare = classified(run, *(videos / name for name in vectors), "--templates", "none", capsys=capsys)
        for name, vector in vectors.items():
            expected = (model.model.scorer.scale().item() * texts @ vector).softmax(dim=0)
            assert [bare[name][one] for one in CLASSES] == pytest.approx(expected.tolist(), abs=1e-5)


def test_lines_name_the_best_classes_and_what_cannot_be_read(project: Settings, files: Path, capsys: Capsys) -> None:
    paths = [files / "videos/a.mp4", files / "videos/notes.txt", files / "videos/b.png"]
    words = ["classify", project["clip_weights"], *paths, "--classes", files / "classes.txt", "-k", "2"]
    assert main([*map(str, words), "--num_workers", "0"]) == 1
    captured = capsys.readouterr()
    assert "notes.txt: cannot be read" in captured.err and "b.png" not in captured.err
    first, second = captured.out.splitlines()
    assert first.startswith(str(paths[0])) and second.startswith(str(paths[2]))
    best, other = (float(word) for word in first.replace("%", "").split() if word.replace(".", "").isdigit())
    assert 100 >= best >= other and 100 / 3 < best + other < 100.1

    long = files / "long.txt"
    long.write_text("grey\n" + "red " * 40)
    assert main([*map(str, words[:3]), "--classes", str(long), "--templates", "kinetics", "--num_workers", "0"]) == 0
    assert "max_txt_len 32 cuts 28 of 56" in capsys.readouterr().err
    more = ["--classes", str(long), "--max_txt_len", "64", "--num_workers", "0"]
    assert main([*map(str, words[:3]), *more]) == 0 and "cuts" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["CLIP", "videos", "--classes", "none.txt"], "none.txt"),
        (["CLIP", "none", "--classes", "classes.txt"], "none: there is no such file or folder"),
        (["CLIP", "empty", "--classes", "classes.txt"], "neither videos nor pictures"),
        (["CLIP", "videos"], "--classes FILE"),
        (["CLIP", "videos", "--classes", "classes.txt", "-k", "0"], "-k 0"),
        (["CLIP", "videos", "--classes", "classes.txt", "--templates", "knetics"], "templates knetics"),
        (["no-such-model", "videos", "--classes", "classes.txt"], "Nor is it a CLIP"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    project: Settings, files: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str
) -> None:
    monkeypatch.chdir(files)
    Path("empty").mkdir(exist_ok=True)
    assert main(["classify", *(str(project["clip_weights"]) if word == "CLIP" else word for word in words)]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "Traceback" not in captured.err and not captured.out
