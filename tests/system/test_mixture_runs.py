"""Whole runs on mixtures, JSON Lines and tar shards: what is trained on, resumed, reported and checked."""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from checking import checked, finding, kinds
from loading import IMAGE, tokenize
from media import write_video

from adaclip_finetune.compare.checkpoints import overlap_of_files
from adaclip_finetune.config import ContrastiveSettings, load_config
from adaclip_finetune.config.resume import continued_config
from adaclip_finetune.data.dataset import TrainDataset, VideoReader
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.loader import TrainLoader
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.data.splits import train_split
from adaclip_finetune.errors import UserError
from adaclip_finetune.training import optimizer
from adaclip_finetune.training.trainer import fit

Project = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_pictures")
Parts = list[dict[str, Any]]


@pytest.fixture
def parts(project: Project, tmp_path: Path) -> Parts:
    """Three parts: seven videos of the run's folder, three others of the same names, and four in tar shards."""
    listed = json.loads(Path(project["train_annot"]).read_text())
    names = list(listed)
    (tmp_path / "a.json").write_text(json.dumps({name: listed[name] for name in names[:7]}))
    lines = [json.dumps({"video": name, "sentences": [f"another {name}", "a second text"]}) for name in names[:3]]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    for number, name in enumerate(names[:3]):
        shutil.copytree(Path(project["frames_dir"]) / names[number + 7], tmp_path / "frames" / name)
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / f"shards/{shard}.tar", "w") as tar:
            for key in (f"s{2 * shard}", f"s{2 * shard + 1}"):
                tar.add(write_video(tmp_path / "made" / f"{key}.mp4", 8), f"{key}.mp4")
                text = tarfile.TarInfo(f"{key}.txt")
                text.size = len(content := f"a coded clip {key}".encode())
                tar.addfile(text, io.BytesIO(content))
    return [
        {"annotation": str(tmp_path / "a.json"), "weight": 2.0},
        {"annotation": str(tmp_path / "b.jsonl"), "weight": 1.0, "frames_dir": str(tmp_path / "frames")},
        {"annotation": str(tmp_path / "shards"), "weight": 1.0},
    ]


def settings_of(project: Project, parts: Parts, output: Path, **more: Any) -> Project:
    given = {"train_annot": parts, "output_dir": str(output), "concat_captions": "indep-one", "coef_lr": 1.0}
    return {**project, **given, "sampling": "random", **more}


def test_batches_hold_the_rows_of_each_part_with_their_labels(
    project: Project, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ContrastiveSettings, "uses_unlabelled", True)
    parts[1]["labelled"] = False
    config = load_config(None, settings_of(project, parts, tmp_path, objective={"method": "contrastive"}))
    assert config.train_annot is not None
    split = train_split(config, config.train_annot)
    assert not split.left_out and len(split.entries) == 7 + 3 + 4
    reader = VideoReader(split.store, config, Views(IMAGE, None))
    dataset = TrainDataset(split.entries, reader, second=reader, second_of_labelled=False)
    drawn: dict[str, set[Any]] = {}
    first = Counter[str]()
    for epoch in range(2):
        batches = list(TrainLoader(dataset, config, tokenize, split.plan).epoch(epoch, batch_size=4))
        assert len(batches) == 4, "the shards have most batches"
        for batch in batches:
            one, two, other, coded = batch.videos.video_ids
            assert "//" not in one + two and other.rpartition("//")[0] == str(tmp_path / "frames")
            assert coded.rpartition("//")[0] == str(tmp_path / "shards")
            assert batch.labelled is not None and batch.labelled.tolist() == [True, True, False, True]
            assert batch.second is not None and batch.second.frame_mask.all()
            assert batch.second.frames.flatten(1).any(dim=1).tolist() == [False, False, True, False], "black: not read"
            draws = zip(batch.videos.video_ids, batch.videos.frame_indices.tolist(), batch.noise.tolist(), strict=True)
            for name, *values in draws:
                drawn.setdefault(name, set()).add(str(values))
            first.update([one, two])
    assert sum(len(values) for values in drawn.values()) == 2 * 4 * 4, "a row that comes up again is drawn anew"
    assert set(first) == {f"video{number}" for number in range(7)}


@pytest.mark.parametrize("more", [
    {"num_workers": 1},
    {"peft": {"method": "ibs", "config": {"num_pre_epochs": 1, "pre_batch_size": 8}}},
], ids=["full", "IBS with another batch size in its first phase"])  # fmt: skip
def test_a_killed_run_on_a_mixture_resumes_bit_for_bit(
    more: Project, project: Project, parts: Parts, tmp_path: Path
) -> None:
    one, other = killed.whole_and_resumed(settings_of(project, parts, tmp_path, **more), tmp_path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_not_resumed_with_other_parts(
    project: Project, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        clamp, calls = optimizer.clamp_logit_scale, iter(range(9))
        patched.setattr(optimizer, "clamp_logit_scale", lambda clip: stop() if next(calls) == 2 else clamp(clip))
        fit(load_config(None, settings_of(project, parts, tmp_path / "runs", save_every_steps=1)))
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    lines = tmp_path / "b.jsonl"
    for changed, text in (
        ([{**part, "weight": weight} for part, weight in zip(parts, (1.0, 1.0, 2.0), strict=True)], None),
        (parts, lines.read_text().replace("second", "changed")),
    ):
        before = lines.read_text()
        lines.write_text(text or before)
        config = continued_config(load_config(None, {"resume": str(folder), "train_annot": changed}))
        with pytest.raises(UserError, match="resume: the training data"):
            fit(config, folder=folder)
        lines.write_text(before)
    fit(continued_config(load_config(None, {"resume": str(folder)})), folder=folder)
    assert (folder / "metrics.json").exists()


def test_what_is_wrong_in_a_large_corpus_is_left_out_and_reported(project: Project, tmp_path: Path) -> None:
    rows = [{"video": f"video{number}", "sentences": [f"thing {number}"]} for number in range(5)]
    rows[3] = {"video": "gone", "sentences": ["nothing"]}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), '{"video": "video5"}']))
    given = {"train_annot": str(path), "batch_size": 3, "num_epochs": 1, "num_workers": 1}
    found = fit(load_config(None, {**project, **given, "output_dir": str(tmp_path / "runs")}))
    assert found.folder is not None
    gone, wrong = sorted((found.folder / "missing_videos.txt").read_text().splitlines())
    assert gone.startswith("gone\t") and "No such file" in gone
    assert wrong == f'row 6 of rows.jsonl\t{path}: line 6: has no "sentences"'


def test_a_video_of_a_part_that_cannot_be_read_is_named_with_its_folder(
    project: Project, parts: Parts, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "frames" / "video1")
    config = load_config(None, settings_of(project, parts, tmp_path))
    assert config.train_annot is not None
    split = train_split(config, config.train_annot)
    name = f"{tmp_path}/frames//video1"
    assert name in [entry.video_id for entry in split.entries] and not split.left_out, "it is not tried beforehand"
    for ask in (split.store.count, lambda name: list(split.store.scan(name))):
        with pytest.raises(FrameError, match="No such file") as caught:
            ask(name)
        assert caught.value.video_id == name and caught.value.kind == "missing"
    listed = {f"video{number}": {"sentences": ["x"]} for number in range(3)}
    (tmp_path / "b.json").write_text(json.dumps(listed))
    parts[1]["annotation"] = str(tmp_path / "b.json")
    split = train_split(config := load_config(None, settings_of(project, parts, tmp_path)), config.train_annot or "")
    assert list(split.left_out) == [name] and len(split.entries) == 7 + 2 + 4


def test_the_check_reads_each_part_and_a_sample_of_a_large_one(
    project: Project, parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaclip_finetune.check.data._SAMPLE", 5)
    lines = [json.dumps({"video": f"video{n % 3}", "sentences": [f"line {n}"]}) for n in range(40)]
    lines[-1] = '{"video": "video1", "sentences": []}'
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.json").write_text(json.dumps(settings_of(project, parts, tmp_path)))
    _, found = checked(capsys, "--config", str(tmp_path / "config.json"))
    assert [name for name in found["splits"] if found["splits"][name]["trains"]] == ["train 1", "train 2", "train 3"]
    assert finding(found, "sample", "train 2").items == {"read": 5, "listed": 40}
    assert next(iter(finding(found, "annotation", "train 2").items)).startswith("line 40: ")
    assert ("videos", "train 3") in kinds(found, "fine")
    assert ("shared_videos", "train 1, val") in kinds(found, "warning")
    assert "80 batches" in finding(found, "time", "run").message  # one of the 40 rows in each, 2 epochs


def test_what_a_corpus_shares_with_an_evaluation_is_told(project: Project, parts: Parts) -> None:
    assert overlap_of_files(parts[1]["annotation"], str(project["val_annot"])).startswith("3 of these 6 videos")
    assert overlap_of_files(parts[2]["annotation"], str(project["val_annot"])) == ""
