"""`adaclip index` on real files: what it embeds, keeps, drops and reports."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_clip, write_clip_folder
from indexing import write_run
from media import coded_frame, index_of, write_frames, write_video
from PIL import Image
from safetensors.torch import load_file, save_file

from adaclip_finetune.cli import main
from adaclip_finetune.data.dataset import VideoReader
from adaclip_finetune.data.frame_folder import FRAME_TIMES, FrameFolder
from adaclip_finetune.data.frame_store import FileStamp
from adaclip_finetune.errors import UserError
from adaclip_finetune.lock import FolderLock
from adaclip_finetune.search import build, search_model
from adaclip_finetune.search.build import index_videos
from adaclip_finetune.search.collection import (
    CollectionVideo,
    VideoCollection,
    VideoFiles,
    collect_annotation,
    collect_folder,
)
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.search_model import SearchModel, load_retriever
from adaclip_finetune.search.serve.served import ServedVideos
from adaclip_finetune.search.stored import read_index
from adaclip_finetune.weights import clip_weights

Settings = dict[str, Any]
Capsys = pytest.CaptureFixture[str]

EXAMPLE = Path(__file__).resolve().parents[2] / "dataset_example"
IDS = ["clip 0.mp4", "clip 2.mp4", "clip 4.mp4", "deep/er/clip 1.mp4", "deep/er/clip 3.mp4"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        write_video(folder / ("deep/er" if number % 2 else "") / f"clip {number}.mp4", 20 + 10 * number)
    (folder / ".hidden.mp4").write_text("no video")
    return folder


@pytest.fixture
def index(run: Path, tmp_path: Path, capsys: Capsys, load_once: Any) -> Callable[..., tuple[int, str, str]]:
    """Call `adaclip index` into the folder i, and return exit code, output and errors."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main(["index", str(run), *map(str, words), "-o", str(tmp_path / "i")])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


Index = Callable[..., tuple[int, str, str]]


def counts(told: str) -> tuple[int, ...]:
    """Return how many videos were embedded and unchanged, and how many are in the index."""
    found = re.search(r"^(\d+) embedded.*, (\d+) unchanged; (\d+) in the index$", told, re.MULTILINE)
    assert found is not None, told
    return tuple(map(int, found.groups()))


def vectors(folder: Path) -> dict[str, np.ndarray]:
    return {video.row["id"]: video.vector for video in read_index(folder).videos()}


def test_a_folder_and_its_subfolders(run: Path, clips: Path, tmp_path: Path, index: Index) -> None:
    code, out, _ = index(clips, "--device", "cpu", "--num_workers", "1")
    assert (code, counts(out)) == (0, (5, 0, 5))
    loaded = VideoIndex.load(tmp_path / "i")
    assert [video.id for video in loaded.videos] == IDS
    assert list(loaded.info.settings) == ["clip_weights"]  # the index may be searched on another machine
    assert sorted(path.name for path in (tmp_path / "i").iterdir()) == ["thumbs", "vectors.safetensors", "videos.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "i" / "videos.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == IDS
    model = load_retriever(run)
    for video in loaded.videos:
        vector, frames, weights = model.encode_video(video.path)
        (hit,) = loaded.search(vector[None], 1)[0]
        assert (hit.video, hit.score) == (video, pytest.approx(1, abs=1e-5))
        assert [frame.index for frame in video.frames] == frames
        assert [frame.weight for frame in video.frames] == pytest.approx(weights, abs=1e-5)
        assert [frame.time for frame in video.frames] == [pytest.approx(frame / 25, abs=1e-3) for frame in frames]
        assert video.duration == pytest.approx((20 + 10 * int(video.id[-5])) / 25, abs=0.05)
        assert video.frames[video.best].weight == max(frame.weight for frame in video.frames)
        with Image.open(video.thumb) as picture:
            assert index_of(np.asarray(picture)) == video.frames[video.best].index


def test_a_pretrained_clip_searches_without_training(clips: Path, tmp_path: Path, capsys: Capsys) -> None:
    write_clip_folder(tmp_path / "clip")
    words = [str(tmp_path / "clip"), str(clips), "-o", str(tmp_path / "i"), "--num_frm", "3", "--device", "cpu"]
    assert main(["index", *words, "--num_workers", "0"]) == 0
    assert "clip, which was not finetuned" in capsys.readouterr().out
    index = VideoIndex.load(tmp_path / "i")
    clip, model = build_tiny_clip(), search_model.search_model_of(index)
    assert model.untrained and index.info.model_name == "clip" and model.config.num_frm == 3
    for video in index.videos:
        reader = VideoReader(VideoFiles(video.path.parent, {"it": video.path.name}), model.config, model.model.views())
        pixels = (torch.from_numpy(reader.read("it").frames) / 255 - 0.5) / 0.25
        with torch.no_grad():
            wanted = F.normalize(F.normalize(clip.encode_image(pixels), dim=1).mean(dim=0), dim=0)
        torch.testing.assert_close(model.encode_video(video.path)[0], wanted, rtol=0, atol=1e-6)
        assert [frame.index for frame in video.frames] == reader.read("it").indices.tolist()
    assert main(["search", str(tmp_path / "i"), "a red thing"]) == 0
    assert "clip, which was not finetuned" in capsys.readouterr().err


def test_copies_are_embedded_once_and_found_as_one(
    library: Path,
    tmp_path: Path,
    index: Index,
    run: Path,
    load_once: Any,
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(library / "clip 2.mp4", library / "deep" / "again.mp4")
    code, out, _ = index(library)
    assert code == 0 and "5 embedded" in out and "1 with the bytes of another" in out
    shutil.copy(library / "clip 2.mp4", library / "z.mp4")
    code, out, _ = index(library)
    assert code == 0 and "0 embedded, 1 with the bytes of another, 6 unchanged; 7 in the index" in out
    loaded = VideoIndex.load(tmp_path / "i")
    assert (len(loaded), loaded.distinct) == (7, 5)
    hits = loaded.search(load_once(run).encode_video(library / "z.mp4")[0][None], 10)[0]
    assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5]
    assert hits[0].video.id == "clip 2.mp4" and not hits[1].copies
    assert [copy.path for copy in hits[0].copies] == [library / "z.mp4", library / "deep/again.mp4"]
    assert main(["search", str(tmp_path / "i"), "a red thing", "--json"]) == 0
    (found,) = [hit for hit in json.loads(capsys.readouterr().out)["hits"] if "copies" in hit]
    assert [copy["id"] for copy in found["copies"]] == ["z.mp4", "deep/again.mp4"]
    shutil.copy(library / "clip 2.mp4", library / "a.mp4")  # listed before the one that is known
    code, out, _ = index(library)
    assert code == 0 and "0 embedded, 1 with the bytes of another, 7 unchanged" in out
    assert VideoIndex.load(tmp_path / "i").distinct == 5
    with monkeypatch.context() as patched:  # a file that breaks only when it is embedded, and its copy
        patched.setattr(build, "find_unreadable", lambda *_: {})
        for name in ("v.mp4", "w.mp4"):
            (library / name).write_bytes(b"no longer a video")
        code, _, err = index(library)
        assert code == 1 and "v.mp4: " in err and "w.mp4: " in err
    (library / "clip 2.mp4").write_bytes(b"no video")
    (library / "y.mp4").write_bytes(b"no video")
    code, out, err = index(library)
    assert code == 1 and "clip 2.mp4: " in err and "y.mp4: " in err
    assert VideoIndex.load(tmp_path / "i").distinct == 5


def test_an_index_names_a_clip_of_open_clip(
    clips: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_weights, "_fetch", lambda module, weights: None)
    monkeypatch.setattr(search_model, "_fingerprint", lambda session: session.loaded.source)  # of random weights
    words = ["index", "RN50:openai", str(clips), "-o", str(tmp_path / "i"), "--num_frm", "1", "--device", "cpu"]
    assert main([*words, "--num_workers", "0"]) == 0
    index = VideoIndex.load(tmp_path / "i")
    assert index.info.has_named_clip and index.info.model_name == "RN50:openai"
    assert search_model.search_model_of(index).untrained
    capsys.readouterr()
    assert main(["index", "nonesuch", *words[2:]]) == 2
    told = capsys.readouterr().err
    assert "nonesuch: there is no such file or folder" in told and "open_clip has no model 'nonesuch'" in told

    def unreachable(module: object, weights: object) -> None:
        raise UserError("RN50:openai: the weights could not be downloaded")

    monkeypatch.setattr(clip_weights, "_fetch", unreachable)
    assert main(words) == 2
    assert capsys.readouterr().err == "adaclip: error: RN50:openai: the weights could not be downloaded\n"


def test_search_without_training_finds_what_zero_shot_finds(tmp_path: Path) -> None:
    model = load_retriever(EXAMPLE / "tiny_clip", num_frm=4, device="cpu", num_workers=0)
    config = model.config.model_copy(update={"video_dir": str(EXAMPLE / "videos"), "frames_dir": None})
    index_videos(model, collect_annotation(EXAMPLE / "test.json", config), tmp_path / "i")
    index, listed = VideoIndex.load(tmp_path / "i"), json.loads((EXAMPLE / "test.json").read_text())
    queries = [(name, text) for name, entry in listed.items() for text in entry["sentences"]]
    found = index.search(model.encode_text([text for _, text in queries]), 1)
    right = sum(hits[0].video.id == name for (name, _), hits in zip(queries, found, strict=True))
    assert right == 6, "1.8 % of 340: the zero-shot row of the demo"


def test_unchanged_videos_are_kept_and_changed_ones_embedded_again(library: Path, tmp_path: Path, index: Index) -> None:
    assert index(library)[0] == 0
    before = vectors(tmp_path / "i")
    code, out, _ = index(library)
    assert (code, counts(out)) == (0, (0, 5, 5))
    write_video(library / "clip 0.mp4", 50, crf="40")
    write_video(library / "a new one.webm", 20, codec="libvpx-vp9")
    (library / "clip 2.mp4").unlink()
    (library / "clip 4.mp4").write_bytes((library / "clip 4.mp4").read_bytes()[:300])
    code, out, err = index(library)
    assert (code, counts(out)) == (1, (2, 2, 5))
    assert "clip 2.mp4" in out and "--sync" in out and "clip 4.mp4: " in err
    after = vectors(tmp_path / "i")
    assert list(after) == ["a new one.webm", "clip 0.mp4", "deep/er/clip 1.mp4", "deep/er/clip 3.mp4", "clip 2.mp4"]
    for name in ("deep/er/clip 1.mp4", "deep/er/clip 3.mp4", "clip 2.mp4"):
        assert (after[name] == before[name]).all()
    assert not np.allclose(after["clip 0.mp4"], before["clip 0.mp4"], atol=1e-3)
    assert index(library, "--sync")[0] == 1
    assert list(vectors(tmp_path / "i")) == list(after)[:4]
    thumbs = {path.name for path in (tmp_path / "i" / "thumbs").iterdir()}
    assert thumbs == {video.thumb.name for video in VideoIndex.load(tmp_path / "i").videos}


def test_what_is_not_there_for_a_while_is_not_embedded_again(library: Path, tmp_path: Path, index: Index) -> None:
    """The folder moves, thumbnails are deleted, and then the folder is empty, as a disk is that is not mounted."""
    index(library)
    before = {path.name for path in (tmp_path / "i" / "thumbs").iterdir()}
    library = library.rename(tmp_path / "elsewhere")
    code, out, _ = index(library)
    assert (code, counts(out)) == (0, (0, 5, 5))
    assert all(video.path.is_file() for video in VideoIndex.load(tmp_path / "i").videos)
    shutil.rmtree(tmp_path / "i" / "thumbs")
    assert counts(index(library)[1]) == (5, 0, 5)
    assert {path.name for path in (tmp_path / "i" / "thumbs").iterdir()} == before and len(before) == 5
    shutil.rmtree(library)
    library.mkdir()
    code, _, err = index(library, "--sync")
    assert (code, "nothing is dropped" in err, len(vectors(tmp_path / "i"))) == (2, True, 5)


def test_which_files_are_videos(library: Path, tmp_path: Path, index: Index) -> None:
    """Whatever can be opened as one, and links; others are counted, and what is no file is reported."""
    write_video(tmp_path / "a.ts", 20)
    (tmp_path / "a.ts").rename(library / "camera.MTS")
    shutil.copy(library / "clip 0.mp4", library / "deep" / "recording.dat")
    (library / "deep" / "notes.txt").write_text("no video")
    os.mkfifo(library / "pipe.mp4")  # whose reader would wait for ever
    (library / "self.mp4").symlink_to("self.mp4")
    (library / "all.mp4").symlink_to(library)
    (library / "folder.mp4").mkdir()
    (library / "link.mp4").symlink_to(library / "clip 0.mp4")
    code, out, err = index(library)
    assert (code, counts(out), out.count("1 other file passed over: notes.txt")) == (1, (6, 0, 8), 1)
    assert "pipe.mp4: " in err and "self.mp4: " in err
    assert set(vectors(tmp_path / "i")) == {*IDS, "camera.MTS", "deep/recording.dat", "link.mp4"}


def test_metadata_beside_the_videos(library: Path, tmp_path: Path, index: Index) -> None:
    """They are read anew by each run, without embedding the video again."""
    downloaded = {
        "title": "Dogs",
        "duration": 1,
        "formats": [{"url": "x"}],
        "description": "long " * 50,
        "tags": ["dog"],
    }
    (library / "clip 0.info.json").write_text(json.dumps(downloaded))
    (library / "clip 0.json").write_text(json.dumps({"title": "Two dogs", "season": 3, "a b": 1}))
    (library / "clip 2.json").write_text("[]")
    (library / "notes.txt").write_text("")
    code, out, err = index(library)
    assert (code, counts(out), "1 other file passed over: notes.txt" in out) == (0, (5, 0, 5), True)
    assert "clip 2.json" in err and "object" in err
    found = VideoIndex.load(tmp_path / "i")
    assert found.videos[0].metadata == {"title": "Two dogs", "season": 3, "duration": 1, "tags": ["dog"]}
    assert [video.id for video in found.videos if video.metadata] == [IDS[0]]
    assert found.count(["season = 3"]) == found.count(["tags = dog and title = *dogs"]) == 1
    (library / "clip 0.info.json").unlink()
    (library / "clip 0.json").unlink()
    assert counts(index(library)[1]) == (0, 5, 5)
    assert not any("metadata" in video.row for video in read_index(tmp_path / "i").videos())


def test_transcripts_beside_the_videos(library: Path, tmp_path: Path, index: Index, capsys: Capsys) -> None:
    """They are found, with their times, and read again when they change."""
    (library / "clip 4.en.srt").write_text("1\n00:00:00,500 --> 00:01:02,000\nA whale sings\n")
    (library / "clip 2.vtt").write_text("WEBVTT\n")
    code, out, err = index(library)
    assert (code, "transcripts in the index: 1 (files read: 1)" in out, "passed over: " not in out) == (0, True, True)
    assert "clip 2.vtt" in err and "other file" not in out
    command = ["search", str(tmp_path / "i"), "the whale sings", "--hybrid"]
    assert main(command) == 0
    first, line = capsys.readouterr().out.splitlines()[1:3]
    assert "clip 4.mp4" in first and line.split() == ["0:00.5–1:02.0", "“A", "whale", "sings”"]
    assert main([*command, "--json", "-k", "2"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert hits[0]["line"] == {"start": 0.5, "end": 62.0, "text": "A whale sings"} and "line" not in hits[1]
    (library / "clip 4.en.srt").unlink()
    assert "in the index: 0 (files read: 0)" in index(library)[1]
    assert main(command) == 2
    assert ".srt" in capsys.readouterr().err
    for words in (["x", "--by", "moment"], ["--image", "p.png"], ["x", "--compare", "old.index"]):
        assert main(["search", str(tmp_path / "i"), *words, "--hybrid"]) == 2
        assert "--hybrid" in capsys.readouterr().err


def test_names_that_are_not_text(run: Path, clips: Path, tmp_path: Path, index: Index, capsys: Capsys) -> None:
    """A file with such a name is listed as broken; a folder with such a name can be indexed and searched."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b"))
    folder.mkdir()
    for name in (b"\xff.mp4", b"a\\b.mp4", "ü \u2028 ñ.MP4".encode()):
        shutil.copy(clips / "clip 0.mp4", os.fsdecode(os.fsencode(folder) + b"/" + name))
    (folder / "ü \u2028 ñ.srt").write_text("1\n00:00:00,500 --> 00:00:01,000\nhello\n")
    code, out, err = index(folder)
    assert (code, counts(out), err.count("mp4: "), "(files read: 1)" in out) == (1, (1, 0, 1), 2, True)
    assert main(["search", str(tmp_path / "i"), "a \x1b thing"]) == 0
    told = capsys.readouterr().out
    assert "\\udcff\\x1b/ü" in told and "\x1b" not in told
    assert VideoIndex.load(tmp_path / "i").videos[0].path.is_file()


def test_an_interruption_keeps_finished_batches(clips: Path, tmp_path: Path, run: Path, index: Index) -> None:
    """They are used again for the same folder only."""

    def interrupt(model: SearchModel, videos: int) -> None:
        embed, calls = model.embed, list[int]()

        def stop(batch: Any) -> Any:
            calls.append(len(batch))
            if len(calls) > videos:
                raise KeyboardInterrupt
            return embed(batch)

        model.embed = stop  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            index_videos(model, collect_folder(clips), tmp_path / "i")
        assert calls == [1] * (videos + 1)

    interrupt(load_retriever(run, val_batch_size=2), 3)
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "other" / "x.mp4", 20)
    assert counts(index(tmp_path / "other")[1]) == (1, 0, 1)
    assert list(vectors(tmp_path / "i")) == ["x.mp4"] and not (tmp_path / "i" / "parts").exists()
    shutil.rmtree(tmp_path / "i")

    interrupt(load_retriever(run, val_batch_size=2), 4)
    with pytest.raises(UserError, match="continues"):
        VideoIndex.load(tmp_path / "i")
    (tmp_path / "i" / "parts" / "000001.safetensors").write_bytes(b"torn")
    code, out, _ = index(clips, "--val_batch_size", 2)
    assert (code, counts(out)) == (0, (3, 2, 5))
    assert not (tmp_path / "i" / "parts").exists()
    index_videos(load_retriever(run), collect_folder(clips), tmp_path / "whole")
    for name, vector in vectors(tmp_path / "whole").items():
        np.testing.assert_array_equal(vectors(tmp_path / "i")[name], vector)


def test_one_writer_at_a_time(clips: Path, tmp_path: Path, index: Index) -> None:
    (tmp_path / "i").mkdir()
    lock = FolderLock(tmp_path / "i")
    lock.take()
    code, _, err = index(clips)
    assert (code, f"process {os.getpid()}" in err) == (2, True)
    lock.release()
    assert index(clips)[0] == 0
    assert not (tmp_path / "i" / "lock.json").exists()


def test_an_annotation_with_captions_and_frames(project: Settings, tmp_path: Path, index: Index) -> None:
    annotation = json.loads(Path(project["test_annot"]).read_text())
    annotation["video4"] |= {"duration": 4.0, "metadata": {"season": 3}}
    annotation["gone"] = {"sentences": ["not there"]}
    (tmp_path / "a.json").write_text(json.dumps(annotation))
    shutil.copytree(str(project["frames_dir"]), tmp_path / "frames")
    command = (tmp_path / "a.json", "--frames_dir", tmp_path / "frames", "--dtype", "float16")
    code, out, err = index(*command)
    assert (code, counts(out), "gone: " in err) == (1, (8, 0, 8), True)
    first, second, *_ = VideoIndex.load(tmp_path / "i").videos
    assert (first.id, first.captions) == ("video4", ("a red thing number 4", "it is red"))
    assert (first.path, first.duration) == (tmp_path / "frames" / "video4", 4.0)
    assert [frame.time for frame in first.frames] == [frame.index / 2 for frame in first.frames]
    assert second.duration is None and second.best_time is None
    assert (first.metadata, second.metadata) == ({"season": 3}, {})
    images = sorted((tmp_path / "frames" / "video5").iterdir())
    shutil.copyfile(images[0], images[-1])  # written into the same file: the folder itself does not change
    assert counts(index(*command)[1]) == (1, 7, 8)


def test_another_img_tmpl_embeds_the_same_folder_again(tmp_path: Path, index: Index) -> None:
    for template, first in (("f-{:02d}.png", 0), ("g{}.png", 100)):
        (tmp_path / "frames" / "v").mkdir(parents=True, exist_ok=True)
        for number in range(1, 7):
            Image.fromarray(coded_frame(first + number)).save(tmp_path / "frames" / "v" / template.format(number))
    (tmp_path / "a.json").write_text(json.dumps({"v": {"sentences": ["x"]}}))
    command = (tmp_path / "a.json", "--frames_dir", tmp_path / "frames", "--img_tmpl")
    assert index(*command, "f-{:02d}.png")[0] == 0
    assert counts(index(*command, "f-{:02d}.png")[1]) == (0, 1, 1)
    assert counts(index(*command, "g{}.png")[1]) == (1, 0, 1)
    loaded = VideoIndex.load(tmp_path / "i")
    (video,) = loaded.videos
    assert loaded.info.settings["img_tmpl"] == "g{}.png"
    with Image.open(video.thumb) as picture:
        assert index_of(np.asarray(picture)) == 101 + video.frames[video.best].index
    code, _, err = index(*command, "no place for a number")
    assert (code, "img_tmpl" in err) == (2, True)


def test_float16_stays_float16(clips: Path, tmp_path: Path, index: Index) -> None:
    index(clips)
    exact = vectors(tmp_path / "i")
    for words in (("--dtype", "float16"), ()):
        assert counts(index(clips, *words)[1]) == (0, 5, 5)
        for name, vector in vectors(tmp_path / "i").items():
            assert vector.dtype == np.float16 and (vector == exact[name].astype(np.float16)).all()


def test_what_is_refused_leaves_no_folder(
    run: Path, project: Settings, clips: Path, tmp_path: Path, index: Index, capsys: Capsys
) -> None:
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.mp4").write_text("no video")
    (tmp_path / "file").touch()
    diverged = Path(shutil.copytree(run, tmp_path / "diverged"))
    nan = {name: tensor * float("nan") for name, tensor in load_file(run / "best.safetensors").items()}
    save_file(nan, diverged / "best.safetensors")
    query_dependent, target = write_run(tmp_path / "q", project | {"frame_agg": "qscore"}), tmp_path / "i"
    cases: list[tuple[list[object], str]] = [
        ([run, tmp_path / "nowhere", "-o", target], "nowhere"),
        ([run, tmp_path / "empty", "-o", target], "no video"),
        ([run, tmp_path / "broken", "-o", target], "a.mp4"),
        ([run, clips, "-o", target, "--video_dir", clips], "--video_dir"),
        ([run, clips, "-o", target, "--num_workers", "-1"], "num_workers"),
        ([run, "", "-o", target], "VIDEOS: is empty"),
        ([query_dependent, clips, "-o", target], "qscore"),
        ([diverged, clips, "-o", target], "diverged"),
        ([clips, clips, "-o", target], "best.safetensors"),
        ([run, clips, "-o", tmp_path / "no" / "i"], "no folder"),
        ([run, clips, "-o", tmp_path / "file"], "file"),
    ]
    for words, fact in cases:
        assert main(["index", *map(str, words)]) == 2
        assert fact in capsys.readouterr().err
        assert not target.exists()


def test_an_index_of_something_else_is_not_overwritten(
    run: Path, project: Settings, library: Path, tmp_path: Path, index: Index, capsys: Capsys
) -> None:
    index(library)
    other = write_run(tmp_path / "other", project, seed=1)
    assert main(["index", str(other), str(library), "-o", str(tmp_path / "i")]) == 2
    assert str(run) in capsys.readouterr().err
    code, _, err = index(library / "deep")
    assert (code, str(library) in err) == (2, True)
    assert index(library / "deep", "--sync")[0] == 0
    assert list(vectors(tmp_path / "i")) == ["er/clip 1.mp4", "er/clip 3.mp4"]


def test_a_folder_of_other_things_is_not_touched(run: Path, library: Path, capsys: Capsys) -> None:
    (library / "parts").mkdir()
    shutil.copy(library / "clip 0.mp4", library / "parts" / "holiday.mp4")
    before = sorted(path.relative_to(library) for path in library.rglob("*"))
    assert main(["index", str(run), str(library), "-o", str(library)]) == 2
    assert "not an index" in capsys.readouterr().err
    assert sorted(path.relative_to(library) for path in library.rglob("*")) == before


def test_a_write_that_fails_is_reported(tmp_path: Path, clips: Path, index: Index) -> None:
    (tmp_path / "i" / "parts").mkdir(parents=True)
    (tmp_path / "i" / "parts" / "about.json").touch()
    (tmp_path / "i" / "thumbs").write_text("in the way of a folder")
    code, _, err = index(clips)
    assert (code, "thumbs" in err, "Traceback" in err) == (2, True, False)


def test_times_are_those_of_a_player(tmp_path: Path) -> None:
    """The sound begins at 0 and the picture at 2 s; a frame's time is never before the frame."""
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
    collection = collect_folder(tmp_path)
    _, shown = collection.times(collection.videos[0], range(60))
    assert None not in shown
    assert all(real - 1e-9 <= told < real + 0.0011 for real, told in zip(true, shown, strict=True) if told is not None)


def test_times_of_extracted_frames_are_those_written_beside_them(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "v", 3)
    (frames / FRAME_TIMES).write_text("[0.0, 0.5, 7.25]")
    video = CollectionVideo("v", frames, FileStamp(0, 0), duration=8.0)
    collection = VideoCollection(tmp_path, tmp_path, [video], {}, FrameFolder(tmp_path, "image_{:05d}.jpg"))
    assert collection.times(video, [0, 2]) == (8.0, [0.0, 7.25])


def test_pictures_show_what_the_model_sees(run: Path, shared: Path, tmp_path: Path) -> None:
    """The thumbnail, and the frames on the page; the display matrix of this video mirrors it."""
    (tmp_path / "v").mkdir()
    shutil.copy(shared / "cases" / "01-mirrored-videos" / "rot90hflip.mp4", tmp_path / "v" / "v.mp4")
    index_videos(load_retriever(run), collect_folder(tmp_path / "v"), tmp_path / "i")
    index = VideoIndex.load(tmp_path / "i")
    video = index.videos[0]
    frame = VideoFiles(tmp_path / "v", {"v": "v.mp4"}).read("v", [video.frames[video.best].index])[0]
    for picture in (Path(video.thumb).read_bytes(), ServedVideos(index).frame(video.key, video.best)):
        with Image.open(io.BytesIO(picture)) as shown:
            expected = np.asarray(Image.fromarray(frame).resize(shown.size), int)
            assert np.abs(np.asarray(shown, int) - expected).mean() < 8
