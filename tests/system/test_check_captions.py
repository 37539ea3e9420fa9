"""`adaclip check` of annotations: entries that are refused, captions that are cut or shared, splits that overlap."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from checking import checked, finding, kinds, write_annotation
from media import write_frames

from adaclip_finetune.check.captions import check_captions
from adaclip_finetune.check.model import load_tokenizer
from adaclip_finetune.check.overlap import check_overlap
from adaclip_finetune.check.source import Split, splits_of_config, splits_of_files
from adaclip_finetune.config import load_config
from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.errors import UserError

LONG = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("frames")
    for name in "abcdef":
        write_frames(folder / name, 4, height=8, width=8)
    return str(folder)


def words(frames: str, *paths: str) -> list[str]:
    return [*(word for path in paths for word in ("--annot", path)), "--frames_dir", frames, "--num_frm", "4"]


def test_all_that_is_refused_is_listed(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries: dict[str, Any] = {
        "a": ["fine"],
        "b": [""],
        "c": {"sentences": []},
        "d": ["fine, too"],
        "e": {"sentences": ["x"], "extention": "mp4"},
        "../f": ["x"],
    }
    path = write_annotation(tmp_path / "val.json", entries)
    code, found = checked(capsys, *words(frames, path))
    refused = finding(found, "annotation", "val")
    assert (code, refused.severity) == (1, "fails") and "4 entries" in refused.message
    for name, told in {"b": "sentence 1", "c": '"sentences" is empty', "e": "extension", "../f": "leads out"}.items():
        assert [told in line for line in refused.items if line.startswith(f"video '{name}'")] == [True]
    with pytest.raises(UserError) as first:  # what a run would say is one of them
        load_annotations(path)
    assert str(first.value).removeprefix(f"{path}: ") in refused.items
    assert finding(found, "captions", "val").items["videos"] == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "expected an object"),
        ("{", "not JSON"),
        ('{"a": {"sentences": ["x"]}, "a": {}}', "stands twice"),
        ("{}", "holds no video"),
    ],
)
def test_files_that_are_none(
    frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, told: str
) -> None:
    path = tmp_path / "val.json"
    path.write_text(content)
    code, found = checked(capsys, *words(frames, str(path)))
    (problem,) = finding(found, "annotation", "val").items
    assert code == 1 and told in problem


def test_a_thousand_entries_one_of_them_wrong(tmp_path: Path) -> None:
    entries: dict[str, Any] = {f"v{number}": [f"caption {number}"] for number in range(1000)}
    entries["v700"] = []
    path = write_annotation(tmp_path / "train.json", entries)
    (split,) = splits_of_files([path], load_config(None, {"data_subset": 800}))
    assert [video.video_id for video in split.videos] == [f"v{number}" for number in range(801) if number != 700]
    assert len(split.problems) == 1 and f"{path}: video 'v700'" in split.problems[0]


def test_one_wrong_entry_hides_no_other(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key twice, a NaN, a name twice: each is one problem of one entry."""
    path = tmp_path / "val.json"
    path.write_text(
        '{"a": {"sentences": ["x"], "sentences": ["y"]}, "b": {"sentences": []}, '
        '"c": {"sentences": ["x"], "duration": NaN}, "d": {"sentences": ["x"]}, "d": {"sentences": ["y"]}}'
    )
    code, found = checked(capsys, *words(frames, str(path)))
    refused = finding(found, "annotation", "val")
    assert code == 1 and len(refused.items) == 4
    for told in ("'sentences' stands twice", '"sentences" is empty', '"duration" must be', "'d' stands twice"):
        assert [told in problem for problem in refused.items].count(True) == 1
    assert finding(found, "captions", "val").items["videos"] == 1


def test_long_captions(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve words of a token each, and two for start and end: max_txt_len 14 suffices."""
    tokens = open_clip.get_tokenizer("ViT-B-32")
    assert len(tokens.encode(LONG)) == 12
    path = write_annotation(
        tmp_path / "val.json", {"a": [LONG], "b": ["short", LONG + " thirteen"], "c": ["short one"]}
    )
    options = ["--concat_captions", "indep-all", "--max_txt_len"]
    code, found = checked(capsys, *words(frames, path), *options, "10")
    long = finding(found, "long_captions", "val")
    assert code == 0 and long.severity == "warning" and "2 of 4 captions (50.0 %)" in long.message
    assert long.items["a"] == [{"kept": "one two three four five six seven eight", "cut": "nine ten eleven twelve"}]
    assert long.advice == "max_txt_len 15 cuts none of them"
    _, found = checked(capsys, *words(frames, path), *options, "15")
    assert finding(found, "long_captions", "val").severity == "fine"
    _, found = checked(capsys, *words(frames, path), "--concat_captions", "concat", "--max_txt_len", "15")
    joined = finding(found, "long_captions", "val")
    assert list(joined.items) == ["b"] and "concat_captions" in joined.message and "1 of 3" in joined.message
    path = write_annotation(tmp_path / "val.json", {"a": [LONG * 10], "b": ["unbroken" * 60]})
    _, found = checked(capsys, *words(frames, path), "--max_txt_len", "77")
    (unbroken,) = finding(found, "long_captions", "val").items["b"]
    assert unbroken["kept"] + unbroken["cut"] == "unbroken" * 60
    assert 70 <= len(tokens.encode(unbroken["kept"])) <= 75


def test_what_is_cut_of_a_script_without_spaces(
    frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, tokens = "一个男人在公园里跑步然后停下来和他的狗玩耍", open_clip.get_tokenizer("ViT-B-32")
    path = write_annotation(tmp_path / "val.json", {"a": [f"狗 {text}"]})
    _, found = checked(capsys, *words(frames, path), "--max_txt_len", "20")
    (told,) = finding(found, "long_captions", "val").items["a"]
    assert f"狗 {text}" == told["kept"] + told["cut"] and told["kept"].startswith("狗 一个")
    assert len(tokens.encode(told["kept"])) <= 18 < len(tokens.encode(told["kept"] + told["cut"][0]))


@pytest.mark.parametrize("limit", [3, 8, 20, 76, 77])
def test_what_is_cut_is_what_the_tower_cuts(limit: int) -> None:
    """Held against a count of tokens, of captions of every length, some with what the tokenizer pads by ("!")."""
    loaded = load_tokenizer(load_config(None, {}))
    tokens = open_clip.get_tokenizer("ViT-B-32")
    texts = [" ".join(["cat"] * count) + end for count in range(90) for end in ("", " !", " dog !")]
    videos = [VideoAnnotation(f"v{number}", (text,)) for number, text in enumerate(texts) if text.strip()]
    config = load_config(None, {"max_txt_len": limit})
    found = {one.check: one for one in check_captions(Split("train", "x", True, videos, []), config, loaded)}
    cut = {video.video_id for video in videos if len(tokens.encode(video.sentences[0])) + 2 > limit}
    assert set(found["long_captions"].items) == cut


def test_captions_of_several_videos(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_annotation(
        tmp_path / "train.json", {"a": ["A Dog", "x"], "b": ["a  dog"], "c": ["a cat"], "d": ["a dog"]}
    )
    code, found = checked(capsys, *words(frames, path), "--concat_captions", "indep-one")
    shared = finding(found, "shared_captions", "train")
    assert code == 0 and shared.severity == "warning" and shared.items == {"A Dog": ["a", "b", "d"]}
    counts = finding(found, "captions", "train").items
    assert counts == {"videos": 4, "captions": 5, "min": 1, "median": 1, "max": 2}


def test_overlap(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = {
        name: {"sentences": [f"caption {name}"], "group": group} for name, group in zip("abcdef", "111223", strict=True)
    }
    splits = {"train": "ab", "val": "bc", "test": "def"}
    paths = [
        write_annotation(tmp_path / f"{split}.json", {name: of[name] for name in names})
        for split, names in splits.items()
    ]
    code, found = checked(capsys, *words(frames, *paths))
    assert code == 0
    assert kinds(found, "warning") == {("shared_videos", "train, val"), ("shared_groups", "train, val")}
    assert list(finding(found, "shared_videos", "train, val").items) == ["b"]
    assert finding(found, "shared_groups", "train, val").items == {"1": ["c"]}

    other = write_annotation(tmp_path / "other.json", {"f": {"sentences": ["Caption  A", "of its own"]}})
    _, found = checked(capsys, *words(frames, paths[0], other))
    both = finding(found, "captions_of_both", "train, other")
    assert both.items == {"Caption  A": ["a", "f"]}

    _, found = checked(capsys, *words(frames, paths[0], paths[2]))
    assert finding(found, "overlap", "train, test").severity == "fine"


def test_files_of_one_name(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their folders tell them apart, and which one is learned from."""
    for split, video in (("training", "a"), ("held out", "b")):
        (tmp_path / split).mkdir()
        write_annotation(tmp_path / split / "captions.json", {video: [f"what {video} shows"]})
    paths = [str(tmp_path / split / "captions.json") for split in ("training", "held out")]
    _, found = checked(capsys, *words(frames, *paths))
    told = {name: split["trains"] for name, split in found["splits"].items()}
    assert told == {"training/captions": True, "held out/captions": False}
    with pytest.raises(UserError, match="given twice"):
        splits_of_files([paths[0], paths[0]], load_config())


@pytest.mark.parametrize(
    ("name", "trains"),
    [("train", True), ("msrvtt_train9k", True), ("Training-1", True), ("restrained", False), ("constraints", False)],
)
def test_the_word_train_tells_what_is_learned_from(tmp_path: Path, name: str, trains: bool) -> None:
    (split,) = splits_of_files([write_annotation(tmp_path / f"{name}.json", {"a": ["x"]})], load_config())
    assert split.trains is trains


def test_a_file_called_val_and_test_is_one_file(tmp_path: Path) -> None:
    paths = [write_annotation(tmp_path / f"{name}.json", {name: [name]}) for name in ("val, test", "other")]
    assert {one.severity for one in check_overlap(splits_of_files(paths, load_config()))} == {"fine"}


def test_one_file_for_validation_and_test(tmp_path: Path) -> None:
    paths = [write_annotation(tmp_path / f"{split}.json", {split: [split]}) for split in ("train", "held")]
    values = {"train_annot": paths[0], "val_annot": paths[1], "test_annot": str(tmp_path / "." / "held.json")}
    splits = splits_of_config(load_config(None, values))
    assert [(split.name, split.trains) for split in splits] == [("train", True), ("val, test", False)]
    assert {one.check: one.severity for one in check_overlap(splits)} == {"same_data": "warning"}


def test_the_same_data_twice(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_annotation(tmp_path / f"{split}.json", {"a": ["one"]}) for split in ("val", "test")]
    _, found = checked(capsys, *words(frames, *paths))
    assert kinds(found, "warning") == {("same_data", "val, test")}
    paths[0] = write_annotation(tmp_path / "train.json", {"a": ["one"]})
    _, found = checked(capsys, *words(frames, *paths))
    assert kinds(found, "warning") == {("shared_videos", "train, test")}


def test_the_object_is_json_of_all(frames: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_annotation(tmp_path / "val.json", {f"gone{number}": ["x y"] for number in range(40)})
    code, found = checked(capsys, *words(frames, path))
    assert code == 1 and set(found) == {"verdict", "splits", "findings"} and found["verdict"] == "fails"
    assert found["splits"] == {"val": {"path": path, "trains": False}}
    for entry in found["findings"]:
        assert set(entry) == {"severity", "check", "split", "message", "items", "advice"}
    assert len(finding(found, "missing_videos", "val").items) == 40
    assert json.loads(json.dumps(found)) == found
