"""`adaclip search`, and the model that it loads."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from indexing import write_random_index, write_run
from media import coded_frame, write_video
from PIL import Image
from safetensors.torch import load_file

from adaclip_finetune.cli import main
from adaclip_finetune.commands.search import clock
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.data.video.file import read_frames
from adaclip_finetune.data.video.index import index_video
from adaclip_finetune.errors import UserError
from adaclip_finetune.search import retriever
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.retriever import load_retriever, retriever_of

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def run(project: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", project)


@pytest.fixture(scope="module")
def index(run: Path, project: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "my.index"
    assert main(["index", str(run), str(project["train_annot"]), "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def clips(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, and the index of them."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 40)
    write_video(folder / "b.mp4", 30)
    assert main(["index", str(run), str(folder), "-o", str(folder / "my.index")]) == 0
    return folder


def order(run: Path, index: Path, text: str) -> tuple[list[str], list[float]]:
    """Names and cosines by brute force, best first."""
    model = load_retriever(run)
    with torch.no_grad():
        query = model.model.encode_text(model.loaded.tokenize([text], model.config.max_txt_len)).sentence[0]
    names = [video.id for video in VideoIndex.load(index).videos]
    cosines = torch.nn.functional.cosine_similarity(load_file(index / "vectors.safetensors")["vectors"], query[None])
    best = cosines.argsort(descending=True)
    return [names[place] for place in best], cosines[best].tolist()


def test_a_text(run: Path, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(index), "a red thing", "-k", "3"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    names, cosines = order(run, index, "a red thing")
    assert first == "a red thing"
    for rank, line in enumerate(lines, 1):
        found = line.split()
        assert (found[0], found[3]) == (str(rank), names[rank - 1])
        assert float(found[1]) == pytest.approx(cosines[rank - 1], abs=1e-4)
    assert len(lines) == 3


def test_json_lines_of_many_queries(
    run: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeffa red thing\r\n\n  it\x0bis\u2028so\x85blue \n".encode()
    (tmp_path / "q.txt").write_bytes(content)
    command = ["search", str(index), "--json", "-k", "100", "--queries"]
    assert main([*command, str(tmp_path / "q.txt")]) == 0
    told = capsys.readouterr().out
    answers = [json.loads(line) for line in told.splitlines()]
    assert [answer["query"] for answer in answers] == ["a red thing", "it\x0bis\u2028so\x85blue"]
    for answer in answers:
        assert [hit["id"] for hit in answer["hits"]] == order(run, index, answer["query"])[0]
        assert [hit["rank"] for hit in answer["hits"]] == list(range(1, 13))
    assert "frames" not in answers[0]["hits"][0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert main([*command, "-"]) == 0
    assert capsys.readouterr().out == told


def test_explain_shows_frames_by_weight(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["search", str(clips / "my.index"), "x", "-k", "1", "--explain"]
    assert main(command) == 0
    video = VideoIndex.load(clips / "my.index").search(load_retriever_of(clips).encode_text(["x"]), 1)[0][0].video
    *_, line = capsys.readouterr().out.splitlines()
    heavy, light = sorted(range(2), key=lambda place: -video.weights[place])
    for place in (heavy, light):
        assert f"(frame {video.frames[place]}) {100 * video.weights[place]:.1f} %" in line
    assert line.index(f"(frame {video.frames[heavy]})") < line.index(f"(frame {video.frames[light]})")
    assert main([*command, "--json"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert [frame["index"] for frame in hit["frames"]] == list(video.frames)
    assert hit["time"] == video.best_time


def load_retriever_of(clips: Path) -> Any:
    return retriever_of(VideoIndex.load(clips / "my.index"))


def test_a_picture(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its vector is that of a video which shows nothing else."""
    model = load_retriever_of(clips)
    Image.fromarray(coded_frame(7)).save(tmp_path / "p.png")
    (tmp_path / "still").mkdir()
    for number in range(1, 7):
        shutil.copy(tmp_path / "p.png", tmp_path / "still" / f"image_{number:05d}.png")
    reader = VideoReader(FrameFolder(tmp_path, "image_{:05d}.png"), model.config, model.model.views())
    still = collate([reader.read("still")]).videos
    assert still is not None
    vector = model.encode_image(tmp_path / "p.png")
    torch.testing.assert_close(vector, model.embed(still)[0][0], atol=1e-5, rtol=1e-4)
    with Image.open(tmp_path / "p.png") as picture:
        torch.testing.assert_close(model.encode_image(picture), vector)
    assert main(["search", str(clips / "my.index"), "--image", str(tmp_path / "p.png"), "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    vectors = {video.id: model.encode_video(video.path)[0] for video in VideoIndex.load(clips / "my.index").videos}
    assert [hit["score"] for hit in hits] == [
        pytest.approx(float(vectors[hit["id"]] @ vector), abs=1e-5) for hit in hits
    ]


def test_a_picture_that_was_held_sideways(run: Path, tmp_path: Path) -> None:
    model, pixels = load_retriever(run), coded_frame(9)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    turned = Image.fromarray(np.rot90(pixels))
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: to be turned by 90° clockwise
    turned.save(tmp_path / "b.png", exif=exif)
    torch.testing.assert_close(model.encode_image(tmp_path / "b.png"), model.encode_image(tmp_path / "a.png"))


@pytest.mark.parametrize("header", ["transformer", "seqTransf"])
def test_a_picture_passes_the_header(project: Settings, clips: Path, tmp_path: Path, header: str) -> None:
    run = write_run(tmp_path / "run", project | {"sim_header": header, "num_frm": 1, "top_k": 1})
    write_video(tmp_path / "one.mkv", 1, codec="ffv1", pix_fmt="bgr0")
    model = load_retriever(run)
    frame = read_frames(tmp_path / "one.mkv", index_video(tmp_path / "one.mkv"), [0])[0]
    torch.testing.assert_close(
        model.encode_image(Image.fromarray(frame)), model.encode_video(tmp_path / "one.mkv")[0], atol=1e-5, rtol=1e-4
    )


def test_another_model_is_refused(
    project: Settings, run: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", project, seed=1)
    temperature = write_run(tmp_path / "temperature", project | {"frame_agg_temp": 2.0})
    for model in (other, temperature):
        assert main(["search", str(index), "x", "--model", str(model)]) == 2
        assert f"was made with another model ({run}" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "same")
    assert main(["search", str(index), "x", "--model", str(tmp_path / "same" / "best.safetensors")]) == 0


def test_a_model_that_moved_is_asked_for(project: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", project)
    assert main(["index", str(run), str(project["test_annot"]), "-o", str(tmp_path / "i")]) == 0
    run.rename(tmp_path / "moved")
    assert main(["search", str(tmp_path / "i"), "x"]) == 2
    assert "say where it is: --model RUN_OR_CHECKPOINT" in capsys.readouterr().err
    assert main(["search", str(tmp_path / "i"), "x", "--model", str(tmp_path / "moved")]) == 0


def test_from_any_folder_though_the_run_names_its_clip_from_another(
    project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(str(project["clip_weights"]), tmp_path / "here" / "clip")
    monkeypatch.chdir(tmp_path / "here")
    run = write_run(tmp_path / "run", project | {"clip_weights": "clip"})
    assert main(["index", str(run), str(project["test_annot"]), "-o", str(tmp_path / "i")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["search", "i", "x"]) == 0
    command = ["index", str(run), str(project["test_annot"]), "-o"]
    assert main([*command, "j"]) == 0
    assert main([*command, "k", "--clip_weights", "here/clip"]) == 0
    assert len({VideoIndex.load(tmp_path / name).about.fingerprint for name in "ijk"}) == 1
    monkeypatch.chdir(tmp_path / "here")
    assert main(["search", str(tmp_path / "k"), "x"]) == 0


def test_a_foreign_checkpoint_needs_its_settings(
    run: Path, project: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--format", "published", "-o", str(tmp_path / "p.pth")]) == 0
    command = ["index", str(tmp_path / "p.pth"), str(project["test_annot"]), "-o", str(tmp_path / "i")]
    frames = ["--frames_dir", str(project["frames_dir"])]
    assert main([*command, *frames]) == 2
    assert "its tensors contradict these settings" in capsys.readouterr().err
    shutil.copy(run / "config.json", tmp_path / "settings.json")
    assert main([*command, *frames, "--config", str(tmp_path / "settings.json")]) == 0
    assert main(["search", str(tmp_path / "i"), "x"]) == 0


def test_long_queries_are_cut_and_told(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", str(index), "red " * 50]) == 0
    assert "max_txt_len 20 of the model cuts 1 of 1 queries" in capsys.readouterr().err


def test_wrong_requests(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        assert main(["search", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "what is to be found?" in refused(index)
    assert "what is to be found?" in refused(index, "x", "--queries", "-")
    assert "-k 0: a whole number from 1 up" in refused(index, "x", "-k", 0)
    assert "is empty" in refused(index, "  ")
    assert "argument NAME.index: is empty" in refused("", "x")
    for flag in ("--image", "--queries", "--model", "--config", "--clip_weights"):
        assert f"argument {flag}: is empty" in refused(index, flag, "")
    assert "there is no such folder" in refused(tmp_path / "no", "x")
    assert "cannot be read (No such file" in refused(index, "--queries", tmp_path / "no")
    (tmp_path / "q").write_bytes(b"\n \n")
    assert "holds no query" in refused(index, "--queries", tmp_path / "q")
    (tmp_path / "q").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text at byte 0" in refused(index, "--queries", tmp_path / "q")
    assert "cannot be decoded as one of JPEG" in refused(index, "--image", tmp_path / "q")
    assert "No such file" in refused(index, "--image", tmp_path / "no.png")
    write_random_index(tmp_path / "empty", count=0)
    assert "is empty; `adaclip index` adds videos" in refused(tmp_path / "empty", "x")
    with pytest.raises(UserError, match="it is no video of a known kind"):
        retriever_of(VideoIndex.load(index)).encode_video(tmp_path / "q")


def test_clocks() -> None:
    given = (None, 0.0, 65.96, 3599.25, 3605.0)
    assert [clock(seconds) for seconds in given] == ["–", "0:00.0", "1:05.9", "59:59.2", "1:00:05.0"]


def test_help_needs_no_torch() -> None:
    code = """
import sys
from adaclip_finetune.cli import main
assert main(["search", "--help"]) == 0 and main(["index", "--help"]) == 0
assert not set(sys.modules) & {"torch", "faiss", "numpy", "open_clip"}, "too much"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--explain" in done.stdout and "--sync" in done.stdout


def test_a_picture_like_a_thread_is_cut_before_it_is_brought_to_size(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = load_retriever(run), list[tuple[int, ...]]()
    real = retriever.to_square

    def noted(frames: Any, spec: Any) -> Any:
        seen.append(frames.shape)
        return real(frames, spec)

    monkeypatch.setattr(retriever, "to_square", noted)
    ramp = np.linspace(0, 255, 600).astype(np.uint8)
    wide = Image.fromarray(np.repeat(np.tile(ramp, (60, 1))[..., None], 3, axis=2))
    middle = wide.crop((180, 0, 420, 60))
    torch.testing.assert_close(model.encode_image(wide), model.encode_image(middle))
    model.encode_image(Image.new("RGB", (50_000, 1)))
    model.encode_image(Image.new("RGB", (1, 50_000)))
    assert seen == [(1, 60, 240, 3), (1, 60, 240, 3), (1, 1, 4, 3), (1, 4, 1, 3)]
