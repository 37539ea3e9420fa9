"""Evaluations that are killed and go on, and that several processes share: figures are the same, bit for bit."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import evaluated, killed, outcome, together

from adaclip_finetune import durable
from adaclip_finetune.config import load_config
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.readable import UnreadableVideos
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.embed import on_main
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.tasks.base import value
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalFigures
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import is_main
from adaclip_finetune.weights.clip_weights import load_clip

Project = dict[str, Any]

# Eight videos, sixteen texts: four batches of videos and eight of texts.
SMALL = {"val_batch_size": 2, "concat_captions": "indep-all"}
NUM_PARTS = 12


@pytest.fixture
def small(project: Project) -> Project:
    return {**project, **SMALL}


@pytest.fixture
def broken(small: Project, tmp_path: Path) -> Project:
    """video6 and video9 turn out broken only when they are read: at their fifth frame."""
    frames = tmp_path / "frames"
    shutil.copytree(small["frames_dir"], frames)
    for name in ("video9", "video6"):
        (frames / name / "image_00005.jpg").write_bytes(b"no picture")
    return {**small, "frames_dir": str(frames)}


def mend(broken: Project, small: Project) -> None:
    shutil.copytree(small["frames_dir"], broken["frames_dir"], dirs_exist_ok=True)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of what goes through the towers: videos positive, texts negative."""
    sizes: list[int] = []
    video, text = VideoRetriever.encode_video, VideoRetriever.encode_text

    def encode_video(self: VideoRetriever, batch: Any) -> Any:
        sizes.append(len(batch))
        return video(self, batch)

    def encode_text(self: VideoRetriever, tokens: torch.Tensor) -> Any:
        sizes.append(-len(tokens))
        return text(self, tokens)

    monkeypatch.setattr(VideoRetriever, "encode_video", encode_video)
    monkeypatch.setattr(VideoRetriever, "encode_text", encode_text)
    yield sizes


def test_a_gallery_is_embedded_in_batches(small: Project, encoded: list[int]) -> None:
    found = evaluated(small)
    assert encoded == [2] * 4 + [-2] * 8
    assert found["videos"] == [f"video{number}" for number in range(4, 12)] and len(found["texts"]) == 16
    assert sum(found["usage"]) == 8 * small["top_k"]
    assert evaluated({**small, "use_policy": False})["usage"] is None


@pytest.mark.parametrize("settings", [{}, {"frame_agg": "qscore"}, {"use_policy": False, "num_workers": 1}])
def test_a_killed_evaluation_goes_on_bit_for_bit(
    settings: Project, small: Project, tmp_path: Path, encoded: list[int]
) -> None:
    small = {**small, **settings}
    expected, keep = evaluated(small), tmp_path / "run" / "embeddings"
    killed(small, keep, 2, tmp_path / "log")
    assert {path.name for path in keep.iterdir()} == {
        "about.json", "videos-000000.safetensors", "videos-000001.safetensors",
    }  # fmt: skip
    killed(small, keep, 3, tmp_path / "log")
    encoded.clear()
    assert evaluated(small, keep) == expected
    assert encoded == [-2] * 7, "four batches of videos and one of texts were kept"
    encoded.clear()
    assert evaluated(small, keep) == expected
    assert encoded == []


def test_videos_that_were_skipped_stay_skipped(broken: Project, small: Project, tmp_path: Path) -> None:
    lenient = {**broken, "skip_missing": True}
    expected, keep = evaluated(lenient), tmp_path / "embeddings"
    assert expected["videos"] == [f"video{number}" for number in (4, 5, 7, 8, 10, 11)]
    assert expected["figures"]["videos_evaluated"] == 6 and expected["figures"]["videos_listed"] == 8
    assert len(expected["texts"]) == 12
    killed(lenient, keep, 6, tmp_path / "log")
    mend(broken, small)
    assert evaluated(lenient, keep) == expected


def test_videos_that_were_mended_are_read_again(
    broken: Project, small: Project, tmp_path: Path, encoded: list[int]
) -> None:
    expected, keep = evaluated(small), tmp_path / "embeddings"
    for _ in range(2):
        with pytest.raises(UnreadableVideos, match="2 of 8 videos") as caught:
            evaluated(broken, keep)
        assert list(caught.value.reasons) == ["video6", "video9"]
        assert "image_00005.jpg" in caught.value.reasons["video9"]
    mend(broken, small)
    encoded.clear()
    assert evaluated(broken, keep) == expected
    assert encoded == [2, 2] + [-2] * 8, "the batches of the two, and the texts"


def test_a_gallery_of_which_nothing_is_left_is_refused(broken: Project) -> None:
    for number in range(4, 12):
        (Path(broken["frames_dir"]) / f"video{number}" / "image_00005.jpg").write_bytes(b"no picture")
    with pytest.raises(UnreadableVideos, match="8 of 8 videos"):
        evaluated({**broken, "skip_missing": True})


@pytest.mark.parametrize("other", [{"top_k": 3}, {"precision": "bf16"}, {"test_annot": "val"}, {"seed": 1}])
def test_what_belongs_to_something_else_is_not_used(
    other: Project, small: Project, tmp_path: Path, encoded: list[int]
) -> None:
    keep, seed = tmp_path / "embeddings", other.pop("seed", 0)
    evaluated(small, keep)
    (keep / "notes.txt").write_text("mine")
    changed = {**small, **other}
    if "test_annot" in other:
        changed["test_annot"] = small["val_annot"]
    encoded.clear()
    assert evaluated(changed, keep, seed) == evaluated(changed, None, seed)
    assert len(encoded) in (24, 18), "all of it, twice"
    assert (keep / "notes.txt").exists()


def test_where_things_lie_does_not_matter(small: Project, tmp_path: Path, encoded: list[int]) -> None:
    expected = evaluated(small, tmp_path / "embeddings")
    for name in ("frames_dir", "clip_weights"):
        shutil.copytree(small[name], tmp_path / name)
    encoded.clear()
    moved = {name: str(tmp_path / name) for name in ("frames_dir", "clip_weights")}
    assert evaluated({**small, **moved, "num_workers": 1}, tmp_path / "embeddings") == expected
    assert encoded == []


def test_parts_that_did_not_reach_the_disk_are_made_again(small: Project, tmp_path: Path, encoded: list[int]) -> None:
    keep = tmp_path / "embeddings"
    expected = evaluated(small, keep)
    first, second = keep / "videos-000001.safetensors", keep / "texts-000003.safetensors"
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-1])
    encoded.clear()
    assert evaluated(small, keep) == expected
    assert encoded == [2, -2]
    (keep / "about.json").write_text("{")
    encoded.clear()
    assert evaluated(small, keep) == expected
    assert len(encoded) == NUM_PARTS


def test_a_full_disk_is_said_and_leaves_what_was_kept(
    small: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    expected, keep = evaluated(small), tmp_path / "embeddings"
    with monkeypatch.context() as patch:
        fsync, calls = durable.os.fsync, []

        def full(file: int) -> None:
            calls.append(1)
            if len(calls) > 6:  # a file and its folder: about.json, and two batches
                raise OSError(28, "No space left on device")
            fsync(file)

        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(UserError, match=r"videos-000002.*No space left on device.*make room, and go on"):
            evaluated(small, keep)
    assert sorted(path.name for path in keep.iterdir()) == [
        "about.json", "videos-000000.safetensors", "videos-000001.safetensors",
    ]  # fmt: skip
    encoded.clear()
    assert evaluated(small, keep) == expected
    assert len(encoded) == NUM_PARTS - 2


def test_a_place_where_nothing_can_be_kept_is_refused(small: Project, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/embeddings: embeddings cannot be kept here"):
        evaluated(small, tmp_path / "file" / "embeddings")


JOBS: dict[str, Project] = {
    "plain": {},
    "depends on the query": {"frame_agg": "qscore"},
    "reading processes": {"num_workers": 1, "val_batch_size": 3},
    "fewer batches than processes": {"val_batch_size": 500},
}


def evaluations(small: Project, broken: Project, folder: Path) -> dict[str, Any]:
    """What the test below compares: run by one process, and by two together."""
    keep = folder / "embeddings" if is_main() else None
    found = {name: outcome(lambda job=job: evaluated({**small, **job})) for name, job in JOBS.items()}
    found["broken"] = outcome(lambda: evaluated(broken))
    found["without the broken"] = outcome(lambda: evaluated({**broken, "skip_missing": True}))
    found["kept"] = outcome(lambda: evaluated(small, keep))
    found["diverged"] = outcome(lambda: evaluated(small, diverged=True))
    found["cannot be kept"] = outcome(lambda: evaluated(small, Path(broken["test_annot"]) / "embeddings"))
    found["a fault"] = outcome(lambda: on_main(lambda: 1 // 0))
    return found


@pytest.mark.parametrize("primary", [None, "v2t.MeanR"])
def test_the_primary_figure_decides_and_a_tie_goes_to_what_came_first(primary: str | None, small: Project) -> None:
    matrices = (torch.eye(4), torch.eye(4)[[1, 0, 2, 3]])
    config = load_config(None, {**small, "primary": primary})
    loaded, split = load_clip(config), evaluation_split(config, small["test_annot"])
    with closing(Retrieval(config, split, loaded, Views(loaded.image), "test")) as task:
        assert task.primary == (primary or "t2v.R@1")
        good, bad = (RetrievalFigures(retrieval_metrics([m], range(4)), 4, 4) for m in matrices)
        assert value(good.as_dict(), task.primary) != value(bad.as_dict(), task.primary)
        assert task.is_better(bad, None) and task.is_better(good, bad)
        assert not task.is_better(bad, good) and not task.is_better(good, good)


def test_several_processes_find_what_one_finds(
    small: Project, broken: Project, tmp_path: Path, encoded: list[int]
) -> None:
    alone = evaluations(small, broken, tmp_path)
    shutil.rmtree(tmp_path / "embeddings")
    main, other = together(2, evaluations, small, broken, tmp_path, folder=tmp_path / "two")
    assert main == json.loads(json.dumps(alone))
    assert list(main["broken"]) == ["UnreadableVideos"] and "row 0 is NaN" in main["diverged"]["UserError"]
    assert "cannot be kept" in main["cannot be kept"]["UserError"]
    assert other.pop("a fault") == {
        "RuntimeError": f"the main process failed: {main.pop('a fault')['ZeroDivisionError']}"
    }
    for name, expected in main.items():
        if "figures" in expected:
            assert other[name].pop("matrix") is None and expected.pop("matrix")
        assert other[name] == expected, name
    # What two processes kept is what one would have kept.
    encoded.clear()
    assert evaluated(small, tmp_path / "embeddings") == alone["kept"] == alone["plain"]
    assert encoded == []
