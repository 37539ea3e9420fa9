"""`adaclip caption`: annotations that can be trained on, from a folder of videos or an annotation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from indexing import write_run
from media import write_video

from adaclip_finetune.cli import main
from adaclip_finetune.data.annotations import load_annotations

Project = dict[str, Any]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(project: Project, language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a captioner that says random bytes."""
    config = {"language_model": str(language_model), "prefix_length": 2, "max_tokens": 12}
    settings = {
        **project,
        "concat_captions": "indep-one",
        "captioner": {"method": "mlp", "config": config},
        "objective": {"method": "captioning"},
        "task": {"method": "captioning", "config": {"beams": 2}},
    }
    return write_run(tmp_path_factory.mktemp("captioning") / "run", settings)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos") / "videos"
    write_video(folder / "a.mp4", 40)
    write_video(folder / "below/b.mp4", 12)
    return folder


def captioned(*words: object, code: int = 0) -> dict[str, Any]:
    *_, target = words
    assert main(["caption", *map(str, words), "--num_workers", "0"]) == code
    content: dict[str, Any] = json.loads(Path(str(target)).read_text(encoding="utf-8"))
    return content


def test_a_folder_becomes_an_annotation_that_can_be_read(
    run: Path, videos: Path, tmp_path: Path, capsys: Capsys
) -> None:
    found = captioned(run, videos, "-o", tmp_path / "captions.json")
    assert list(found) == ["a.mp4", "below/b.mp4"]
    assert all(set(entry) == {"sentences"} and len(entry["sentences"]) == 1 for entry in found.values())
    listed = load_annotations(tmp_path / "captions.json")
    assert [video.sentences[0] for video in listed] == [entry["sentences"][0] for entry in found.values()]
    assert "2 videos, 2 beams" in capsys.readouterr().out
    wider = captioned(run, videos, "--beams", "9", "-o", tmp_path / "wider.json")
    assert wider.keys() == found.keys() and wider != found


def test_captions_are_those_that_the_run_itself_writes(run: Path, project: Project, tmp_path: Path) -> None:
    path, words = tmp_path / "settings.json", ["--do_inference", "--resume", str(run / "best.safetensors")]
    settings = json.loads((run / "config.json").read_text())
    path.write_text(json.dumps({**settings, "output_dir": str(tmp_path / "out")}))
    assert main(["train", "--config", str(path), *words]) == 0
    (found,) = tmp_path.glob("out/tiny/*/captions.json")
    rows = {row["video"]: row["caption"] for row in json.loads(found.read_text(encoding="utf-8"))}
    captions = captioned(run, project["test_annot"], "-o", tmp_path / "captions.json")
    assert {name: entry["auxiliary"][-1] for name, entry in captions.items()} == rows


def test_captions_of_an_annotation_are_added_to_auxiliary(run: Path, project: Project, tmp_path: Path) -> None:
    before = json.loads(Path(project["val_annot"]).read_text())
    before["video0"] |= {"auxiliary": ["one of before"], "duration": 4.0}
    (tmp_path / "before.json").write_text(json.dumps(before))
    after = captioned(run, tmp_path / "before.json", "-o", tmp_path / "after.json")
    assert after["video0"]["auxiliary"][0] == "one of before" and len(after["video0"]["auxiliary"]) == 2
    for name, entry in after.items():
        added = entry.pop("auxiliary")
        assert added[-1] and entry == {key: value for key, value in before[name].items() if key != "auxiliary"}
    captioned(run, tmp_path / "after.json", "-o", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "after.json").read_bytes()

    auxiliary = {"objective": {"method": "auxiliary_captions"}, "train_annot": str(tmp_path / "after.json")}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({**project, **auxiliary, "output_dir": str(tmp_path / "out"), "num_epochs": 1}))
    assert main(["train", "--config", str(path)]) == 0


def test_videos_without_a_caption_are_named(run: Path, videos: Path, tmp_path: Path, capsys: Capsys) -> None:
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos/c.mp4").write_bytes(b"no video")
    found = captioned(run, tmp_path / "videos", "-o", tmp_path / "captions.json", code=1)
    assert list(found) == ["a.mp4", "below/b.mp4"] and "c.mp4: no caption" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "none", "-o", "c.json"], "none: there is no such"),
        (["RUN", "VIDEOS", "-o", "c.txt"], ".json"),
        (["RUN", "VIDEOS", "-o", "c.json", "--beams", "0"], "--beams 0"),
        (["RUN", "VIDEOS", "-o", "c.json", "--video_dir", "x"], "is a folder"),
        (["CLIP", "VIDEOS", "-o", "c.json"], "no captioner"),
        (["RUN", "VIDEOS", "-o", "c.json", "--captioner.config.language_model", "no/such/model"], "no/such/model"),
    ],
)
def test_what_is_wrong_is_refused(
    run: Path, videos: Path, project: Project, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch,
    words: list[str], told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"RUN": str(run), "VIDEOS": str(videos), "CLIP": str(project["clip_weights"])}
    assert main(["caption", *(places.get(word, word) for word in words)]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and "Traceback" not in captured.err and not list(tmp_path.iterdir())
