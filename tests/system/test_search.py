"""`adaclip search`, and the model that it loads."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import write_clip_folder
from indexing import write_random_index, write_run
from media import coded_frame, write_video
from PIL import Image
from safetensors.torch import load_file

from adaclip_finetune.cli import main
from adaclip_finetune.commands.search import clock
from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.frame_folder import FrameFolder
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation import build_adaptation
from adaclip_finetune.evaluation.adaptation.base import QueryBatch
from adaclip_finetune.search.collection import VideoFiles
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.search_model import SearchModel, load_retriever, search_model_of
from adaclip_finetune.training.session import open_any, open_model

Settings = dict[str, Any]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(run: Path) -> SearchModel:
    return load_retriever(run)


@pytest.fixture(scope="module")
def index(run: Path, project: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of an annotation's twelve videos, which are folders of frames."""
    folder = tmp_path_factory.mktemp("index") / "my.index"
    assert main(["index", str(run), str(project["train_annot"]), "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def clips(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two video files, with their index."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 40)
    write_video(folder / "b.mp4", 30)
    assert main(["index", str(run), str(folder), "-o", str(folder / "my.index")]) == 0
    return folder


def order(model: SearchModel, index: Path, text: str) -> tuple[list[str], list[float]]:
    """Return names and cosines by brute force, best first."""
    with torch.no_grad():
        query = model.model.encode_text(model.loaded.tokenize([text], model.config.max_txt_len)).sentence[0]
    names = [video.id for video in VideoIndex.load(index).videos]
    cosines = torch.nn.functional.cosine_similarity(load_file(index / "vectors.safetensors")["vectors"], query[None])
    best = cosines.argsort(descending=True)
    return [names[row] for row in best], cosines[best].tolist()


def test_a_text(model: SearchModel, index: Path, capsys: Capsys) -> None:
    assert main(["search", str(index), "red " * 50]) == 0
    assert "max_txt_len 20" in capsys.readouterr().err  # it is cut
    assert main(["search", str(index), "a red thing", "-k", "3"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    names, cosines = order(model, index, "a red thing")
    assert (first, len(lines)) == ("a red thing", 3)
    for rank, line in enumerate(lines, 1):
        found = line.split()
        assert (found[0], found[3]) == (str(rank), names[rank - 1])
        assert float(found[1]) == pytest.approx(cosines[rank - 1], abs=1e-4)


def test_many_queries_as_json_lines(
    model: SearchModel, index: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = "\ufeffa red thing\r\n\n  it\x0bis\u2028so\x85blue \n".encode()
    (tmp_path / "q.txt").write_bytes(content)
    command = ["search", str(index), "--json", "-k", "100", "--queries"]
    assert main([*command, str(tmp_path / "q.txt")]) == 0
    told = capsys.readouterr().out
    answers = [json.loads(line) for line in told.splitlines()]
    assert [answer["query"] for answer in answers] == ["a red thing", "it\x0bis\u2028so\x85blue"]
    for answer in answers:
        assert [hit["id"] for hit in answer["hits"]] == order(model, index, answer["query"])[0]
        assert [hit["rank"] for hit in answer["hits"]] == list(range(1, 13))
    assert "frames" not in answers[0]["hits"][0]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert main([*command, "-"]) == 0
    assert capsys.readouterr().out == told


def test_two_indexes_side_by_side(
    project: Settings, model: SearchModel, index: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Each with its own model, and behind each video its rank in the other index."""
    other = tmp_path / "old.index"
    old = write_run(tmp_path / "old", project, seed=1)
    assert main(["index", str(old), str(project["train_annot"]), "-o", str(other)]) == 0
    names, before = order(model, index, "a red thing")[0], order(load_retriever(old), other, "a red thing")[0]
    assert names != before
    capsys.readouterr()
    assert main(["search", str(index), "a red thing", "-k", "3", "--compare", str(other)]) == 0
    head, query, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["my.index", "(run)", "old.index", "(old)"] and query == "a red thing"
    for rank, line in enumerate(lines):
        left, right = names[rank], before[rank]
        shown = [str(rank + 1), left, f"({before.index(left) + 1})", right, f"({names.index(right) + 1})"]
        assert [word for word in line.split() if "." not in word] == shown
    assert main(["search", str(index), "a red thing", "-k", "3", "--compare", str(other), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [[hit["id"] for hit in answer[key]] for key in ("hits", "compared")] == [names[:3], before[:3]]
    for words in (["--explain"], ["--by", "moment"]):
        assert main(["search", str(index), "x", "--compare", str(other), *words]) == 2
        assert "--compare" in capsys.readouterr().err


def test_explain_shows_frames_by_weight(model: SearchModel, clips: Path, capsys: Capsys) -> None:
    command = ["search", str(clips / "my.index"), "x", "-k", "1", "--explain"]
    assert main(command) == 0
    video = VideoIndex.load(clips / "my.index").search(model.encode_text(["x"]), 1)[0][0].video
    *_, line = capsys.readouterr().out.splitlines()
    shown = [f"(frame {f.index}) {100 * f.weight:.1f} %" for f in sorted(video.frames, key=lambda f: -f.weight)]
    assert len(shown) == 2 and line.index(shown[0]) < line.index(shown[1])
    assert main([*command, "--json"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)["hits"]
    assert [(frame["index"], frame["time"]) for frame in hit["frames"]] == [(f.index, f.time) for f in video.frames]
    assert (hit["time"], hit["path"]) == (video.best_time, str(video.path))


def test_the_vector_of_a_picture_is_that_of_a_video_which_shows_nothing_else(
    model: SearchModel, clips: Path, tmp_path: Path, capsys: Capsys
) -> None:
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
    for hit in json.loads(capsys.readouterr().out)["hits"]:
        own = model.encode_video(hit["path"])[0]
        assert hit["score"] == pytest.approx(float(own @ vector), abs=1e-5)


def test_texts_a_picture_and_a_video_combine(clips: Path, model: SearchModel, tmp_path: Path, capsys: Capsys) -> None:
    Image.new("RGB", (40, 36), (220, 30, 30)).save(tmp_path / "p.png")
    index = VideoIndex.load(clips / "my.index")
    video = index.videos[0].path
    dog, snow = model.encode_text(["a dog", "snow"])
    picture, moving = model.encode_image(tmp_path / "p.png"), model.encode_video(video)[0]
    examples = ["--image", str(tmp_path / "p.png"), "--video", str(video)]
    for words, vector in (
        (['"a dog" - 0.5 "snow"'], dog - 0.5 * snow),
        (examples, picture + moving),
        (["a dog", *examples], dog + picture + moving),
    ):
        assert main(["search", str(clips / "my.index"), *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["hits"]
        expected = index.search(vector[None], k=10)[0]
        assert [hit["id"] for hit in found] == [hit.video.id for hit in expected]
        assert [hit["score"] for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    with pytest.raises(UserError, match="cancel"):
        model.encode_query(['"a dog" - "a dog"'])


def test_the_model_of_an_index(project: Settings, run: Path, tmp_path: Path, capsys: Capsys) -> None:
    """Another model is refused, and one that moved is asked for."""
    moved, index = Path(shutil.copytree(run, tmp_path / "before")), tmp_path / "i"
    assert main(["index", str(moved), str(project["test_annot"]), "-o", str(index)]) == 0
    other = write_run(tmp_path / "other", project, seed=1)
    setting = write_run(tmp_path / "setting", project | {"frame_agg_temp": 2.0})
    for wrong in (other, setting):
        assert main(["search", str(index), "x", "--model", str(wrong)]) == 2
        assert f"made with another model ({moved}" in capsys.readouterr().err
    moved.rename(tmp_path / "after")
    assert main(["search", str(index), "x"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["search", str(index), "x", "--model", str(tmp_path / "after" / "best.safetensors")]) == 0


def test_an_index_is_searched_from_any_folder(
    project: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the run names its CLIP weights relative to another folder."""
    shutil.copytree(str(project["clip_weights"]), tmp_path / "here" / "clip")
    monkeypatch.chdir(tmp_path / "here")
    run = write_run(tmp_path / "run", project | {"clip_weights": "clip"})
    assert main(["index", str(run), str(project["test_annot"]), "-o", str(tmp_path / "i")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["search", "i", "x"]) == 0
    assert main(["index", str(run), str(project["test_annot"]), "-o", "k", "--clip_weights", "here/clip"]) == 0
    assert len({VideoIndex.load(tmp_path / name).info.fingerprint for name in "ik"}) == 1
    monkeypatch.chdir(tmp_path / "here")
    assert main(["search", str(tmp_path / "k"), "x"]) == 0


def test_command_lines_that_are_refused(index: Path, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "blank").write_bytes(b"\n \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    write_random_index(tmp_path / "empty", count=0)
    cases: list[tuple[list[object], str]] = [
        ([index], "--queries"),
        ([index, "x", "--queries", "-"], "--queries"),
        ([index, "x", "--model", ""], "--model: is empty"),
        ([index, "x", "-k", 0], "-k 0"),
        ([index, "  "], "empty"),
        (["", "x"], "NAME.index: is empty"),
        ([tmp_path / "no", "x"], "no such folder"),
        ([index, "--queries", tmp_path / "no"], "No such file"),
        ([index, "--queries", tmp_path / "blank"], "no query"),
        ([index, "--queries", tmp_path / "binary"], "UTF-8"),
        ([index, "--image", tmp_path / "binary"], "JPEG"),
        ([tmp_path / "empty", "x"], "adaclip index"),
    ]
    for words, fact in cases:
        assert main(["search", *map(str, words)]) == 2
        assert fact in capsys.readouterr().err
    with pytest.raises(UserError, match="binary"):
        search_model_of(VideoIndex.load(index)).encode_video(tmp_path / "binary")


def test_clocks() -> None:
    given = (None, 0.0, 65.96, 3599.25, 3605.0)
    assert [clock(seconds) for seconds in given] == ["–", "0:00.0", "1:05.9", "59:59.2", "1:00:05.0"]


@pytest.mark.parametrize(
    "others",
    [
        {"frame_agg": None},
        {"frame_agg": "transformer", "sim_header": "transformer"},
        {"frame_agg": "mlp", "reuse_scores": True},
        {"use_policy": False},
        {"num_frm": 30, "num_frm_subset": 20},
    ],
    ids=str,
)
def test_every_model_says_what_its_frames_weigh(project: Settings, clips: Path, others: Settings) -> None:
    torch.manual_seed(0)
    session = open_model(load_config(None, project | others))
    session.model.eval()
    model = SearchModel(Path("run"), session)
    vector, frames, weights = model.encode_video(clips / "b.mp4")  # short: some frames are repeated
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    assert frames == sorted(set(frames)) and min(frames) >= 0 and len(frames) == len(weights)
    assert sum(weights) == pytest.approx(1, abs=1e-5) and min(weights) > 0
    if others == {"frame_agg": None}:
        assert weights == [0.5, 0.5]


def test_the_vector_of_a_video_is_that_of_an_evaluation(model: SearchModel, clips: Path) -> None:
    reader = VideoReader(VideoFiles(clips, {"a": "a.mp4"}), model.config, model.model.views())
    batch = collate([reader.read("a")]).videos
    assert batch is not None
    with torch.no_grad():
        features = model.model.encode_video(batch)
        shares = model.model.aggregator.scorer(features.tokens)[0, :, 0].softmax(0)  # type: ignore[operator, union-attr]
    assert features.vector is not None and features.selection is not None
    vector, frames, weights = model.encode_video(clips / "a.mp4")
    torch.testing.assert_close(vector, features.vector[0] / features.vector[0].norm())
    chosen = batch.frame_indices[0][features.selection.indices[0]]
    assert frames == sorted(chosen.tolist())
    assert weights == pytest.approx(shares[chosen.argsort()].tolist())
    mixed = (shares[:, None] * features.tokens[0]).sum(0)
    torch.testing.assert_close(vector, mixed / mixed.norm())


def test_a_selector_that_chooses_blank_frames_alone(model: SearchModel, clips: Path) -> None:
    reader = VideoReader(VideoFiles(clips, {"a": "a.mp4"}), model.config, model.model.views())
    batch = collate([reader.read("a")]).videos
    assert batch is not None
    _, (weighted,) = model.embed(replace(batch, frame_indices=torch.full_like(batch.frame_indices, -1)))
    assert (weighted.frames, weighted.weights, weighted.best) == ([], [], 0)


# ---- adapted to each query ----


@pytest.fixture(scope="module")
def adapt(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that adapt to each text by the reward of another CLIP, with steps that change scores."""
    reward = tmp_path_factory.mktemp("rewarding") / "clip"
    write_clip_folder(reward, seed=3)
    own = ["--adaptation.config.learning_rate", "0.01", "--adaptation.config.learns.method", "bitfit"]
    return ["--adapt", "clip_reward", *own, "--reward", str(reward)]


def found_scores(capsys: Capsys, *words: object) -> list[dict[str, Any]]:
    """Return what `adaclip search` prints as JSON for each query, with the scores of the hits by video."""
    capsys.readouterr()
    assert main(["search", *map(str, words), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line | {"hits": {hit["id"]: hit["score"] for hit in line["hits"]}} for line in found]


def test_a_search_adapts_to_each_text_by_itself(adapt: list[str], clips: Path, tmp_path: Path, capsys: Capsys) -> None:
    queries = tmp_path / "queries.txt"
    queries.write_text("a dog\na cat\na dog\n")
    place = clips / "my.index"
    (plain,) = found_scores(capsys, place, "a dog")
    (adapted,) = found_scores(capsys, place, "a dog", *adapt)
    assert adapted["adaptation"] == "clip_reward" and adapted["seconds"] > 0 and "adaptation" not in plain
    assert adapted["hits"].keys() == plain["hits"].keys() == {"a.mp4", "b.mp4"} and adapted["hits"] != plain["hits"]
    first, other, again = found_scores(capsys, place, *adapt, "--queries", queries)
    assert first["hits"] == again["hits"] == adapted["hits"] != other["hits"]
    for changed in (["--adaptation.config.steps", "0"], ["--adaptation.config.momentum", "0.5"]):
        (found,) = found_scores(capsys, place, "a dog", *adapt, *changed)
        assert found["hits"] == (plain if "0" in changed else adapted)["hits"]
    (in_bf16,) = found_scores(capsys, place, "a dog", *adapt, "--precision", "bf16")
    for name, score in in_bf16["hits"].items():
        assert abs(score - adapted["hits"][name]) < 0.3 * abs(score - plain["hits"][name]), "the steps count in bf16"
    assert main(["search", str(place), "a dog", *adapt[:-1], "self"]) == 0
    assert "adapted to this query" in capsys.readouterr().out


def test_a_search_adapts_as_an_evaluation_does(adapt: list[str], clips: Path, capsys: Capsys) -> None:
    """The softmax over the candidates alone has the gradient of that over the whole gallery."""
    names, model = ("a.mp4", "b.mp4"), search_model_of(VideoIndex.load(clips / "my.index"))
    own: Settings = {"reward": ["self"], "learning_rate": 0.01, "learns": {"method": "bitfit"}}
    section = {"method": "clip_reward", "config": own}
    config = load_config(None, {**model.config.model_dump(), "do_inference": True, "adaptation": section})
    other = SearchModel(Path(adapt[-1]), open_any(adapt[-1], {"num_frm": config.top_k}))
    gallery, rewarded = (torch.stack([one.encode_video(clips / name)[0] for name in names]) for one in (model, other))
    rewards, tokens = other.encode_text(["a dog"]) @ rewarded.T, model.loaded.tokenize(["a dog"], config.max_txt_len)
    assert rewards.max() > 0, "there is something to learn"
    adaptation = build_adaptation(config)
    adaptation.start(config, Mock())
    asked = QueryBatch("t2v", lambda: model.model.scorer(model.model.encode_text(tokens), gallery), lambda: [rewards])
    with adaptation.prepared(model.model), adaptation(model.model, asked):
        expected = (model.encode_text(["a dog"]) @ gallery.T)[0].tolist()
    (found,) = found_scores(capsys, clips / "my.index", "a dog", *adapt)
    assert [found["hits"][name] for name in names] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--image", "picture.jpg", "--adapt", "clip_reward", "--reward", "self"], ["--image", "--adapt"]),
        (["a dog", "--adapt", "clip_reward", "--reward", "self", "--adaptation.config.loss", "distillation"], ["loss"]),
        (["a dog", "--adaptation.config.steps", "1"], ["--adaptation.config.steps", "--adapt"]),
        (["a dog", "--adapt", "clip_reward", "--reward", "self,nowhere"], ["adaptation.config.reward", "nowhere"]),
    ],
)
def test_adapted_searches_that_are_refused(words: list[str], named: list[str], clips: Path, capsys: Capsys) -> None:
    assert main(["search", str(clips / "my.index"), *words]) == 2
    captured = capsys.readouterr()
    assert all(name in captured.err for name in named) and "Traceback" not in captured.err and not captured.out


def test_only_video_files_have_a_reward(adapt: list[str], index: Path, capsys: Capsys) -> None:
    assert main(["search", str(index), "a dog", *adapt]) == 2
    told = capsys.readouterr().err
    assert "cannot be read as a video file" in told and "video" in told


def test_an_adapted_search_is_compared_with_another_index(adapt: list[str], clips: Path, capsys: Capsys) -> None:
    place = clips / "my.index"
    (found,) = found_scores(capsys, place, "a dog", *adapt, "--compare", place)
    (plain,) = found_scores(capsys, place, "a dog")
    assert {hit["id"]: hit["score"] for hit in found["compared"]} == plain["hits"] != found["hits"]


def test_a_search_imports_nothing_that_it_does_not_need(index: Path) -> None:
    """What other models need can still be used afterwards: a tower of timm's and one of transformers'."""
    code = f"""
import sys
from adaclip_finetune.cli import main
assert main(["search", {str(index)!r}, "a red thing", "--device", "cpu"]) == 0
unneeded = {{"timm", "transformers", "torch._dynamo", "torch._inductor", "scipy.stats", "boto3"}} & set(sys.modules)
assert not unneeded, unneeded
from adaclip_finetune.model.vit import tower_blocks
from tiny import build_timm_clip
clip = build_timm_clip()
print(len(tower_blocks(clip, "image")), type(clip.text.transformer).__module__)
"""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "transformers." in done.stdout.splitlines()[-1]
