"""Evaluations that are killed and resumed, or shared by several processes: the figures are the same, bit for bit."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluating import evaluated, killed, outcome, together

from adaclip_finetune.config import load_config
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.readable import UnreadableVideos
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.evaluation.embed import on_main
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalFigures
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.processes import is_main
from adaclip_finetune.weights.clip_weights import load_clip

Project = dict[str, Any]


@pytest.fixture
def small(project: Project) -> Project:
    """Eight videos in four batches, and sixteen texts in eight."""
    return {**project, "val_batch_size": 2, "concat_captions": "indep-all"}


@pytest.fixture
def broken(small: Project, tmp_path: Path) -> Project:
    """video6 and video9 turn out to be broken only when their fifth frame is read."""
    frames = tmp_path / "frames"
    shutil.copytree(small["frames_dir"], frames)
    for name in ("video9", "video6"):
        (frames / name / "image_00005.jpg").write_bytes(b"not a picture")
    return {**small, "frames_dir": str(frames)}


def repair(broken: Project, small: Project) -> None:
    shutil.copytree(small["frames_dir"], broken["frames_dir"], dirs_exist_ok=True)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that go through the towers: of videos positive, of texts negative."""
    sizes: list[int] = []
    for name, sign in (("encode_video", 1), ("encode_text", -1)):
        original = getattr(VideoRetriever, name)

        def encode(self: VideoRetriever, batch: Any, original: Any = original, sign: int = sign) -> Any:
            sizes.append(sign * len(batch))
            return original(self, batch)

        monkeypatch.setattr(VideoRetriever, name, encode)
    return sizes


def test_a_gallery_is_embedded_in_batches(small: Project, encoded: list[int]) -> None:
    found = evaluated(small)
    assert encoded == [2] * 4 + [-2] * 8
    assert found["videos"] == [f"video{number}" for number in range(4, 12)] and len(found["texts"]) == 16
    assert sum(found["usage"]) == 8 * small["top_k"]
    assert evaluated({**small, "use_policy": False})["usage"] is None


def test_skipped_videos_stay_skipped_when_an_evaluation_continues(
    broken: Project, small: Project, tmp_path: Path
) -> None:
    lenient = {**broken, "skip_missing": True}
    expected, keep = evaluated(lenient), tmp_path / "embeddings"
    assert expected["videos"] == [f"video{number}" for number in (4, 5, 7, 8, 10, 11)]
    assert expected["figures"]["videos_evaluated"] == 6 and expected["figures"]["videos_listed"] == 8
    assert len(expected["texts"]) == 12
    killed(lenient, keep, 6, tmp_path / "log")
    repair(broken, small)
    assert evaluated(lenient, keep) == expected


def test_repaired_videos_are_read_again(broken: Project, small: Project, tmp_path: Path, encoded: list[int]) -> None:
    expected, keep = evaluated(small), tmp_path / "embeddings"
    with pytest.raises(UnreadableVideos) as caught:
        evaluated(broken, keep)
    assert list(caught.value.reasons) == ["video6", "video9"]
    repair(broken, small)
    encoded.clear()
    assert evaluated(broken, keep) == expected
    assert encoded == [2, 2] + [-2] * 8, "the batches of the two videos, and the texts"


def test_an_empty_gallery_is_refused(broken: Project) -> None:
    for number in range(4, 12):
        (Path(broken["frames_dir"]) / f"video{number}" / "image_00005.jpg").write_bytes(b"not a picture")
    with pytest.raises(UnreadableVideos, match="8 of 8 videos"):
        evaluated({**broken, "skip_missing": True})


@pytest.mark.parametrize("other", [{"top_k": 3}, {"precision": "bf16"}, {"test_annot": "val"}])
def test_batches_of_another_evaluation_are_not_used(
    other: Project, small: Project, tmp_path: Path, encoded: list[int]
) -> None:
    keep = tmp_path / "embeddings"
    evaluated(small, keep)
    changed = {**small, **other}
    if "test_annot" in other:
        changed["test_annot"] = small["val_annot"]
    encoded.clear()
    assert evaluated(changed, keep) == evaluated(changed)
    assert len(encoded) in (24, 18), "everything, twice"
    encoded.clear()
    evaluated(changed, keep, seed=1)
    assert len(encoded) in (12, 9), "other weights too"


def test_kept_batches_are_used_wherever_the_data_lie(small: Project, tmp_path: Path, encoded: list[int]) -> None:
    expected = evaluated(small, tmp_path / "embeddings")
    for name in ("frames_dir", "clip_weights"):
        shutil.copytree(small[name], tmp_path / name)
    encoded.clear()
    moved = {name: str(tmp_path / name) for name in ("frames_dir", "clip_weights")}
    assert evaluated({**small, **moved, "num_workers": 1}, tmp_path / "embeddings") == expected
    assert encoded == []


def test_incomplete_batches_are_embedded_again(small: Project, tmp_path: Path, encoded: list[int]) -> None:
    keep = tmp_path / "embeddings"
    expected = evaluated(small, keep)
    first, second = keep / "videos-000001.safetensors", keep / "texts-000003.safetensors"
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-1])
    encoded.clear()
    assert evaluated(small, keep) == expected and encoded == [2, -2]
    (keep / "about.json").write_text("{")
    encoded.clear()
    assert evaluated(small, keep) == expected and len(encoded) == 12


@pytest.mark.parametrize("primary", [None, "v2t.MeanR"])
def test_the_primary_figure_decides_and_a_tie_keeps_the_earlier(primary: str | None, small: Project) -> None:
    config = load_config(None, {**small, "primary": primary})
    loaded, split = load_clip(config), evaluation_split(config, small["test_annot"])
    matrices = (torch.eye(4), torch.eye(4)[[1, 0, 2, 3]])
    good, bad = (RetrievalFigures(retrieval_metrics([matrix], range(4)), 4, 4) for matrix in matrices)
    with closing(Retrieval(config, split, loaded, Views(loaded.image), "test")) as task:
        assert task.primary == (primary or "t2v.R@1")
        assert task.is_better(bad, None) and task.is_better(good, bad)
        assert not task.is_better(bad, good) and not task.is_better(good, good)


JOBS: dict[str, Project] = {
    "plain": {},
    "depends on the query": {"frame_agg": "qscore"},
    "reading processes": {"num_workers": 1, "val_batch_size": 3},
    "fewer batches than processes": {"val_batch_size": 500},
}


def evaluations(small: Project, broken: Project, folder: Path) -> dict[str, Any]:
    """What the test below compares between one process and two together."""
    keep = folder / "embeddings" if is_main() else None
    found = {name: outcome(lambda job=job: evaluated({**small, **job})) for name, job in JOBS.items()}
    found["broken"] = outcome(lambda: evaluated(broken))
    found["without the broken"] = outcome(lambda: evaluated({**broken, "skip_missing": True}))
    found["kept"] = outcome(lambda: evaluated(small, keep))
    found["diverged"] = outcome(lambda: evaluated(small, diverged=True))
    found["cannot be kept"] = outcome(lambda: evaluated(small, Path(broken["test_annot"]) / "embeddings"))
    found["a fault"] = outcome(lambda: on_main(lambda: 1 // 0))
    return found


def test_several_processes_find_what_one_finds(
    small: Project, broken: Project, tmp_path: Path, encoded: list[int]
) -> None:
    alone = evaluations(small, broken, tmp_path)
    shutil.rmtree(tmp_path / "embeddings")
    main, other = together(2, evaluations, small, broken, tmp_path, folder=tmp_path / "two")
    assert main == json.loads(json.dumps(alone))
    assert list(main["broken"]) == ["UnreadableVideos"]
    diverged = main.pop("diverged")["NotFinite"]
    assert "row 0 is NaN" in diverged and other.pop("diverged") == {"UserError": diverged}
    assert "cannot be kept" in main["cannot be kept"]["UserError"]
    fault = main.pop("a fault")["ZeroDivisionError"]
    assert other.pop("a fault") == {"RuntimeError": f"the main process failed: {fault}"}
    for name, expected in main.items():
        if "figures" in expected:
            assert other[name].pop("matrix") is None and expected.pop("matrix")
        assert other[name] == expected, name
    # Two processes kept what one would have kept.
    encoded.clear()
    assert evaluated(small, tmp_path / "embeddings") == alone["kept"] == alone["plain"]
    assert encoded == []
