"""`adaclip index` on real files: what it embeds, keeps, drops and tells."""

import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from indexing import write_run
from media import coded_frame, index_of, write_video
from PIL import Image

from adaclip_finetune.cli import main
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.search import embed
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.parts import Parts
from adaclip_finetune.search.retriever import load_retriever
from adaclip_finetune.search.stored import read_index, version_of
from adaclip_finetune.search.videos import VideoFiles, videos_of_folder

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def run(project: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", project)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        write_video(folder / ("deep/er" if number % 2 else "") / f"clip {number}.mp4", 20 + 10 * number)
    (folder / "notes.txt").write_text("no video")
    (folder / ".hidden.mp4").write_text("no video")
    return folder


@pytest.fixture
def library(clips: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(clips, tmp_path / "library"))


def rows(folder: Path) -> dict[str, np.ndarray]:
    stored = read_index(folder)
    return {video["id"]: vector for video, vector in zip(stored.videos, stored.vectors, strict=True)}


IDS = ["clip 0.mp4", "clip 2.mp4", "clip 4.mp4", "deep/er/clip 1.mp4", "deep/er/clip 3.mp4"]


def test_a_folder_and_all_below_it(run: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["index", str(run), str(clips), "-o", str(tmp_path / "my.index"), "--device", "cpu", "--num_workers", "1"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert f"5 videos of {clips}" in told.out and "5 embedded, " in told.out and "5 in the index" in told.out
    index = VideoIndex.load(tmp_path / "my.index")
    assert [video.id for video in index.videos] == IDS
    assert list(index.about.settings) == ["clip_weights"]  # it may be searched on another machine
    assert sorted(path.name for path in (tmp_path / "my.index").iterdir()) == [
        ".adaclip-index",
        "index.json", "thumbs", "vectors.safetensors", "videos.jsonl",
    ]  # fmt: skip
    model = load_retriever(run)
    for video in index.videos:
        vector, frames, weights = model.encode_video(video.path)
        assert index.search(vector[None], 1)[0][0].video == video
        assert index.search(vector[None], 1)[0][0].score == pytest.approx(1, abs=1e-5)
        assert (list(video.frames), sum(video.weights)) == (frames, pytest.approx(1, abs=1e-5))
        assert list(video.weights) == pytest.approx(weights, abs=1e-5)
        assert video.times == tuple(pytest.approx(frame / 25, abs=1e-3) for frame in frames)
        count = 20 + 10 * int(video.id[-5])
        assert video.duration == pytest.approx(count / 25, abs=0.05)
        assert video.weights[video.best] == max(video.weights)
        assert video.thumb is not None
        with Image.open(video.thumb) as picture:  # the frame itself, not another one
            assert index_of(np.asarray(picture)) == video.frames[video.best]


def test_the_vector_is_that_of_an_evaluation(run: Path, clips: Path) -> None:
    model = load_retriever(run)
    reader = VideoReader(VideoFiles(clips, {"a": "clip 4.mp4"}), model.config, model.model.views())
    batch = collate([reader.read("a")]).videos
    assert batch is not None
    with torch.no_grad():
        features = model.model.encode_video(batch)
    assert features.vector is not None and features.selection is not None
    vector, frames, weights = model.encode_video(clips / "clip 4.mp4")
    torch.testing.assert_close(vector, features.vector[0] / features.vector[0].norm())
    chosen = batch.frame_indices[0][features.selection.indices[0]]
    assert frames == sorted(chosen.tolist())
    with torch.no_grad():
        shares = model.model.aggregator.scorer(features.tokens)[0, :, 0].softmax(0)  # type: ignore[operator, union-attr]
    assert weights == pytest.approx(shares[chosen.argsort()].tolist())
    mixed = (shares[:, None] * features.tokens[0]).sum(0)
    torch.testing.assert_close(vector, mixed / mixed.norm())


def test_what_is_there_is_kept_and_what_changed_is_made_anew(
    run: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", str(run), str(library), "-o", str(tmp_path / "i")]
    assert main(command) == 0
    before = rows(tmp_path / "i")
    capsys.readouterr()
    assert main(command) == 0
    assert "0 embedded; 5 were there already; 5 in the index" in capsys.readouterr().out
    write_video(library / "clip 0.mp4", 50, crf="40")
    write_video(library / "a new one.webm", 20, codec="libvpx-vp9")
    (library / "clip 2.mp4").unlink()
    (library / "clip 4.mp4").write_bytes((library / "clip 4.mp4").read_bytes()[:300])
    assert main(command) == 1
    told = capsys.readouterr()
    assert "2 embedded" in told.out and "2 were there already; 5 in the index" in told.out
    assert "1 are in the index and no longer there (clip 2.mp4): --sync drops them" in told.out
    assert "1 cannot be read:" in told.err and "clip 4.mp4: " in told.err
    after = rows(tmp_path / "i")
    assert list(after) == ["a new one.webm", "clip 0.mp4", "deep/er/clip 1.mp4", "deep/er/clip 3.mp4", "clip 2.mp4"]
    for name in ("deep/er/clip 1.mp4", "deep/er/clip 3.mp4", "clip 2.mp4"):
        assert (after[name] == before[name]).all()
    assert not np.allclose(after["clip 0.mp4"], before["clip 0.mp4"], atol=1e-3)
    assert main([*command, "--sync"]) == 1
    assert "1 vanished ones dropped" in capsys.readouterr().out
    assert list(rows(tmp_path / "i")) == list(after)[:4]
    thumbs = {path.name for path in (tmp_path / "i" / "thumbs").iterdir()}
    assert thumbs == {video["thumb"] for video in read_index(tmp_path / "i").videos}


def test_a_library_that_moved_is_not_embedded_again(
    run: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(run), str(library), "-o", str(tmp_path / "i")]) == 0
    library.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["index", str(run), str(tmp_path / "elsewhere"), "-o", str(tmp_path / "i")]) == 0
    assert "0 embedded; 5 were there already" in capsys.readouterr().out
    assert all(video.path.is_file() for video in VideoIndex.load(tmp_path / "i").videos)


def test_a_folder_that_is_empty_now_drops_nothing(
    run: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that is not mounted is an empty folder."""
    command = ["index", str(run), str(library), "-o", str(tmp_path / "i"), "--sync"]
    assert main(command) == 0
    shutil.rmtree(library)
    library.mkdir()
    assert main(command) == 2
    assert "holds no video; nothing is dropped" in capsys.readouterr().err
    assert len(VideoIndex.load(tmp_path / "i")) == 5


def test_a_folder_of_other_things_is_refused(
    run: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (library / "parts").mkdir()
    shutil.copy(library / "clip 0.mp4", library / "parts" / "holiday.mp4")
    before = sorted(path.relative_to(library) for path in library.rglob("*"))
    assert main(["index", str(run), str(library), "-o", str(library)]) == 2
    assert "holds other things and is no index" in capsys.readouterr().err
    assert sorted(path.relative_to(library) for path in library.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert main(["index", str(run), str(library), "-o", str(tmp_path / "empty")]) == 0


def test_what_an_annotation_lists_and_is_gone_stays_until_sync(
    run: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({f"clip {n}": {"sentences": ["a clip"]} for n in (0, 2, 4)}))
    command = ["index", str(run), str(tmp_path / "a.json"), "--video_dir", str(library), "-o", str(tmp_path / "i")]
    assert main(command) == 0
    (library / "clip 2.mp4").unlink()
    assert main(command) == 1
    assert "1 are in the index and no longer there (clip 2): --sync drops them" in capsys.readouterr().out
    assert list(rows(tmp_path / "i")) == ["clip 0", "clip 4", "clip 2"]
    for number in (0, 4):
        (library / f"clip {number}.mp4").unlink()
    assert main([*command, "--sync"]) == 2
    assert "none of its videos can be read; nothing is dropped:" in capsys.readouterr().err
    assert len(rows(tmp_path / "i")) == 3


def test_times_are_those_of_a_player(tmp_path: Path) -> None:
    """Sound from 0 on, a picture from 2 s on; a frame's time is never before the frame."""
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        picture = container.add_stream("libx264", rate=30)
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuv420p"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000 * 5), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16000, 0
        container.mux(sound.encode(silence))
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 60 + number, Fraction(1, 30)
            container.mux(picture.encode(frame))
        container.mux([*picture.encode(), *sound.encode()])
    with av.open(str(path)) as container:
        begins = (container.start_time or 0) / av.time_base
        true = sorted(float(frame.pts * frame.time_base) - begins for frame in container.decode(video=0))
    assert true[0] > 1.9
    source = videos_of_folder(tmp_path)
    _, shown = source.times(source.clips[0], range(60))
    assert all(real - 1e-9 <= told < real + 0.0011 for real, told in zip(true, shown, strict=True) if told is not None)
    assert None not in shown


def test_an_interruption_keeps_what_is_finished(
    run: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", str(run), str(clips), "-o", str(tmp_path / "i"), "--val_batch_size", "2"]
    written: list[int] = []
    original = Parts.write

    def write(self: Parts, videos: Any, vectors: Any) -> None:
        original(self, videos, vectors)
        written.append(len(videos))
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "write", write)
    assert main(command) == 130
    assert written == [2, 2]
    assert "the same command goes on" in capsys.readouterr().err
    with pytest.raises(UserError, match="goes on"):
        VideoIndex.load(tmp_path / "i")
    capsys.readouterr()
    (tmp_path / "i" / "parts" / "000001.safetensors").write_bytes(b"torn")
    assert main(command) == 0
    assert "3 embedded" in (told := capsys.readouterr().out) and "2 were there already; 5 in the index" in told
    assert not (tmp_path / "i" / "parts").exists()
    assert main(["index", str(run), str(clips), "-o", str(tmp_path / "whole")]) == 0
    for name, vector in rows(tmp_path / "whole").items():
        np.testing.assert_allclose(rows(tmp_path / "i")[name], vector, atol=1e-6)


def test_parts_of_something_else_are_not_taken_up(
    run: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is stopped, and the next one is of another folder."""
    original = Parts.write

    def write(self: Parts, videos: Any, vectors: Any) -> None:
        original(self, videos, vectors)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "write", write)
    assert main(["index", str(run), str(clips), "-o", str(tmp_path / "i")]) == 130
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "other" / "x.mp4", 20)
    assert main(["index", str(run), str(tmp_path / "other"), "-o", str(tmp_path / "i")]) == 0
    assert list(rows(tmp_path / "i")) == ["x.mp4"]
    assert not (tmp_path / "i" / "parts").exists()


def test_an_index_that_would_be_the_same_is_left_alone(run: Path, library: Path, tmp_path: Path) -> None:
    """So that a page which has loaded it need not load it again."""
    command = ["index", str(run), str(library), "-o", str(tmp_path / "i")]
    assert main(command) == 0
    index = VideoIndex.load(tmp_path / "i")
    assert main(command) == 0
    assert version_of(tmp_path / "i") == index.version
    (library / "clip 0.mp4").unlink()
    assert main([*command, "--sync"]) == 0
    assert version_of(tmp_path / "i") != index.version


def frames_of(folder: Path, tmpl: str, first: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, 7):
        Image.fromarray(coded_frame(first + number)).save(folder / tmpl.format(number))


def test_how_frames_are_called_is_remembered(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames_of(tmp_path / "frames" / "v", "f-{:02d}.png", 0)
    frames_of(tmp_path / "frames" / "v", "g{}.png", 100)
    (tmp_path / "a.json").write_text(json.dumps({"v": {"sentences": ["x"]}}))
    command = ["index", str(run), str(tmp_path / "a.json"), "-o", str(tmp_path / "i")]
    command += ["--frames_dir", str(tmp_path / "frames"), "--img_tmpl"]
    assert main([*command, "f-{:02d}.png"]) == 0
    assert VideoIndex.load(tmp_path / "i").about.settings["img_tmpl"] == "f-{:02d}.png"
    before = rows(tmp_path / "i")["v"]
    capsys.readouterr()
    assert main([*command, "g{}.png"]) == 0  # other images of the same folder
    assert "1 embedded" in capsys.readouterr().out
    (video,) = VideoIndex.load(tmp_path / "i").videos
    assert VideoIndex.load(tmp_path / "i").about.settings["img_tmpl"] == "g{}.png"
    assert not np.allclose(rows(tmp_path / "i")["v"], before, atol=1e-3)
    with Image.open(video.thumb or "") as picture:
        assert index_of(np.asarray(picture)) == 101 + video.frames[video.best]
    assert main([*command, "no place for a number"]) == 2
    assert "img_tmpl" in capsys.readouterr().err


def test_a_frame_that_was_replaced_under_its_name_is_noticed(
    run: Path, project: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(str(project["frames_dir"]), tmp_path / "frames")
    command = ["index", str(run), str(project["test_annot"]), "-o", str(tmp_path / "i")]
    command += ["--frames_dir", str(tmp_path / "frames")]
    assert main(command) == 0
    images = sorted((tmp_path / "frames" / "video5").iterdir())
    shutil.copyfile(images[0], images[-1])  # written into the same file: the folder does not change
    capsys.readouterr()
    assert main(command) == 0
    assert "1 embedded" in (told := capsys.readouterr().out) and "7 were there already" in told


def test_pictures_that_are_gone_are_made_again(run: Path, clips: Path, tmp_path: Path) -> None:
    command = ["index", str(run), str(clips), "-o", str(tmp_path / "i")]
    assert main(command) == 0
    before = {path.name for path in (tmp_path / "i" / "thumbs").iterdir()}
    shutil.rmtree(tmp_path / "i" / "thumbs")
    assert main(command) == 0
    assert {path.name for path in (tmp_path / "i" / "thumbs").iterdir()} == before and len(before) == 5


def test_what_is_called_like_a_video_and_is_no_file(
    run: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(library / "pipe.mp4")  # whose reader waits for ever
    (library / "self.mp4").symlink_to("self.mp4")
    (library / "all.mp4").symlink_to(library)
    (library / "folder.mp4").mkdir()
    (library / "link.mp4").symlink_to(library / "clip 0.mp4")
    assert main(["index", str(run), str(library), "-o", str(tmp_path / "i")]) == 1
    told = capsys.readouterr().err
    assert "2 cannot be read:" in told and "pipe.mp4: is no file" in told and "self.mp4: Too many levels" in told
    assert sorted(rows(tmp_path / "i")) == sorted([*IDS, "link.mp4"])


def test_a_refusal_leaves_no_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["index", str(run), str(tmp_path / "empty"), "-o", str(tmp_path / "i")]) == 2
    (tmp_path / "empty" / "a.mp4").write_text("none")
    assert main(["index", str(run), str(tmp_path / "empty"), "-o", str(tmp_path / "i")]) == 2
    assert not (tmp_path / "i").exists()
    (tmp_path / "mine").mkdir()
    assert main(["index", str(run), str(tmp_path / "empty"), "-o", str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine").is_dir()


def test_one_writer_at_a_time(run: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "i").mkdir()
    lock = FolderLock(tmp_path / "i")
    lock.take()
    assert main(["index", str(run), str(clips), "-o", str(tmp_path / "i")]) == 2
    assert "is being written by process" in capsys.readouterr().err
    lock.release()
    assert main(["index", str(run), str(clips), "-o", str(tmp_path / "i")]) == 0
    assert not (tmp_path / "i" / "lock.json").exists()


def test_an_annotation_with_captions_and_frames(
    run: Path, project: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation = json.loads(Path(project["test_annot"]).read_text())
    annotation["video4"]["duration"] = 4.0
    annotation["gone"] = {"sentences": ["not there"]}
    (tmp_path / "a.json").write_text(json.dumps(annotation))
    command = ["index", str(run), str(tmp_path / "a.json"), "-o", str(tmp_path / "i"), "--dtype", "float16"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "8 embedded" in told.out and "gone: " in told.err
    first, second = VideoIndex.load(tmp_path / "i").videos[:2]
    assert (first.id, first.captions) == ("video4", ("a red thing number 4", "it is red"))
    assert first.path == Path(project["frames_dir"]) / "video4"
    assert first.duration == 4.0 and first.times == tuple(frame / 2 for frame in first.frames)
    assert second.duration is None and second.best_time is None
    assert main(command) == 1
    assert "0 embedded; 8 were there already" in capsys.readouterr().out


def test_where_an_annotations_videos_are_can_be_said(
    run: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"deep/er/clip 3": {"sentences": ["x"]}}))
    command = ["index", str(run), str(tmp_path / "a.json"), "-o", str(tmp_path / "i"), "--video_dir", str(clips)]
    assert main(command) == 0
    (video,) = VideoIndex.load(tmp_path / "i").videos
    assert (video.path, video.id) == (clips / "deep/er/clip 3.mp4", "deep/er/clip 3")
    assert video.times[0] is not None


def test_float16_and_hnsw_tell_what_they_cost(
    run: Path, project: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(str(project["frames_dir"]), tmp_path / "frames")
    shutil.copy(project["train_annot"], tmp_path / "a.json")
    command = ["index", str(run), str(tmp_path / "a.json"), "-o", str(tmp_path / "i")]
    command += ["--frames_dir", str(tmp_path / "frames")]

    def told(*flags: str) -> str:
        assert main([*command, *flags]) == 0
        return capsys.readouterr().out

    def nearest(by: str, asked: str = "24 captions") -> str:
        return f"finds 100.00 % of the 10 nearest by {by} (asked: {asked})"

    said = "hnsw, float16: " + nearest("exact float32")
    assert said in told("--dtype", "float16", "--kind", "hnsw")
    stored = read_index(tmp_path / "i")
    assert (stored.vectors.dtype, stored.about.kind) == (np.float16, "hnsw")
    assert stored.about.recall is not None and stored.about.recall.share == 1
    assert (tmp_path / "i" / "faiss.index").is_file()
    assert said in told()  # as it is
    annotation = json.loads(Path(project["train_annot"]).read_text())
    shutil.copytree(tmp_path / "frames" / "video4", tmp_path / "frames" / "new")
    (tmp_path / "a.json").write_text(json.dumps(annotation | {"new": {"sentences": ["x"]}}))
    by = "exact search, 12 of 13 vectors being float16 already"
    assert "hnsw, float16: " + nearest(by, "25 captions") in told()
    assert "finds" not in told("--kind", "flat")  # what it cost to round can no longer be seen
    assert not (tmp_path / "i" / "faiss.index").exists()
    assert main([*command, "--dtype", "float32"]) == 2
    assert "rounded away cannot be had back" in capsys.readouterr().err


def test_what_float16_cost_is_remembered_where_it_cannot_be_measured_again(
    run: Path, project: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation = json.loads(Path(project["train_annot"]).read_text())
    command = ["index", str(run), str(tmp_path / "a.json"), "-o", str(tmp_path / "i"), "--dtype", "float16", "--sync"]
    (tmp_path / "a.json").write_text(json.dumps(annotation))
    assert main(command) == 0
    (tmp_path / "a.json").write_text(json.dumps(dict(list(annotation.items())[1:])))
    capsys.readouterr()
    assert main(command) == 0
    assert "by exact float32 (asked: 24 captions; measured with 12 videos)" in capsys.readouterr().out


def test_query_dependent_models_are_refused(
    project: Settings, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", project | {"frame_agg": "qscore"})
    assert main(["index", str(run), str(clips), "-o", str(tmp_path / "i")]) == 2
    assert "frame_agg qscore weighs the frames of a video anew for every query" in capsys.readouterr().err
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize(
    "others",
    [
        {"frame_agg": None},
        {"frame_agg": None, "reuse_scores": True},
        {"frame_agg": "transformer", "sim_header": "transformer"},
        {"frame_agg": "mlp", "reuse_scores": True},
        {"use_policy": False},
        {"policy_backbone": "clip"},
        {"num_frm": 30, "num_frm_subset": 20},
    ],
    ids=str,
)
def test_every_model_says_what_its_frames_weigh(
    project: Settings, clips: Path, tmp_path: Path, others: Settings
) -> None:
    model = load_retriever(write_run(tmp_path / "run", project | others))
    vector, frames, weights = model.encode_video(clips / "clip 0.mp4")  # 20 frames: some stand twice in 30
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    assert frames == sorted(set(frames)) and min(frames) >= 0 and len(frames) == len(weights)
    assert sum(weights) == pytest.approx(1, abs=1e-5) and min(weights) > 0
    if others == {"frame_agg": None}:
        assert weights == [0.5, 0.5]


def test_an_index_of_something_else(
    run: Path, project: Settings, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", str(run), str(library), "-o", str(tmp_path / "i")]) == 0
    other = write_run(tmp_path / "other", project, seed=1)
    assert main(["index", str(other), str(library), "-o", str(tmp_path / "i")]) == 2
    assert f"is an index made with another model ({run})" in capsys.readouterr().err
    assert main(["index", str(run), str(library / "deep"), "-o", str(tmp_path / "i")]) == 2
    assert f"is the index of {library}; give another name" in capsys.readouterr().err
    assert main(["index", str(run), str(library / "deep"), "-o", str(tmp_path / "i"), "--sync"]) == 0
    assert list(rows(tmp_path / "i")) == ["er/clip 1.mp4", "er/clip 3.mp4"]


def test_wrong_requests(
    run: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_text("no video")
    (tmp_path / "file").write_text("")
    out = ["-o", str(tmp_path / "i")]

    def refused(*words: str) -> str:
        assert main(["index", *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "there is no such folder of videos, or annotation" in refused(run, tmp_path / "nowhere", *out)
    assert "best.safetensors not found" in refused(clips, clips, *out)
    assert "there is no folder" in refused(run, clips, "-o", tmp_path / "no" / "i")
    assert "is a file; an index is a folder" in refused(run, clips, "-o", tmp_path / "file")
    assert "holds no video" in refused(run, tmp_path / "empty", *out)
    assert "none of its videos can be read" in (said := refused(run, tmp_path / "broken", *out)) and "a.mp4" in said
    assert "--video_dir says where the videos of an annotation are" in refused(run, clips, *out, "--video_dir", clips)
    assert "num_workers" in refused(run, clips, *out, "--num_workers", "-1")
    assert "invalid int value: 'x'" in refused(run, clips, *out, "--num_workers", "x")
    for words in (("", clips, *out), (run, "", *out), (run, clips, "-o", ""), (run, clips, *out, "--video_dir", "")):
        assert "is empty" in refused(*words)  # of an unset variable, say: not the current folder
    monkeypatch.setattr(embed, "write_thumbnail", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert "No space left" in refused(run, clips, *out)


def test_weights_that_diverged_are_not_indexed(
    run: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = embed.Retriever.embed

    def nan(self: Any, batch: Any) -> Any:
        vectors, weighed = original(self, batch)
        return vectors * float("nan"), weighed

    monkeypatch.setattr(embed.Retriever, "embed", nan)
    assert main(["index", str(run), str(clips), "-o", str(tmp_path / "i")]) == 2
    assert "the weights have probably diverged" in capsys.readouterr().err


def test_names_that_are_no_names(clips: Path, tmp_path: Path) -> None:
    shutil.copy(clips / "clip 0.mp4", os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4"))
    shutil.copy(clips / "clip 0.mp4", tmp_path / "a\\b.mp4")
    shutil.copy(clips / "clip 0.mp4", tmp_path / "ü \u2028 ñ.MP4")
    source = videos_of_folder(tmp_path)
    assert [clip.id for clip in source.clips] == ["ü \u2028 ñ.MP4"]
    assert len(source.broken) == 2
    json.dumps(source.broken).encode()


def test_a_folder_whose_name_is_no_text(
    run: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b"))
    folder.mkdir()
    shutil.copy(clips / "clip 0.mp4", folder)
    assert main(["index", str(run), str(folder), "-o", str(tmp_path / "i")]) == 0
    assert main(["search", str(tmp_path / "i"), "a \x1b thing"]) == 0
    told = capsys.readouterr().out
    assert "\\udcff\\x1b/clip 0.mp4" in told and "\x1b" not in told
    (video,) = VideoIndex.load(tmp_path / "i").videos
    assert video.path.is_file()


@pytest.mark.parametrize("suffix", ["avi", "ts", "mkv"])
def test_times_of_other_containers(tmp_path: Path, suffix: str) -> None:
    codec = "mpeg4" if suffix == "avi" else "libx264"
    write_video(tmp_path / f"v.{suffix}", 30, codec=codec)
    store: Callable[..., Any] = VideoFiles(tmp_path, {"v": f"v.{suffix}"}).times
    duration, times, *_ = store("v", [0, 10, 29])
    assert times == [pytest.approx(frame / 25, abs=0.002) for frame in (0, 10, 29)]
    assert duration == pytest.approx(1.2, abs=0.13)


def test_a_folder_that_may_not_be_written_into_is_told(
    run: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(lock: FolderLock) -> None:
        raise PermissionError(13, "Permission denied", str(lock.path))

    monkeypatch.setattr(FolderLock, "take", refuse)
    assert main(["index", str(run), str(clips), "-o", str(tmp_path / "i")]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'i'}: cannot be written into (Permission denied)" in told and "Traceback" not in told
