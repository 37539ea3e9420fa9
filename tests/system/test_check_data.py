"""The data audit of `adaclip check`: entries, videos, captions and splits, held against the code of a run."""

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from checking import checked, finding, kinds, write_annotation, write_damaged_frames
from media import write_frames, write_video

from adaclip_finetune.check import data
from adaclip_finetune.check.data import CheckedSplit, check_videos, splits_of_files
from adaclip_finetune.cli import main
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations
from adaclip_finetune.data.splits import evaluation_split, train_split
from adaclip_finetune.errors import UserError

BROKEN = ("gone", "gap", "first")
ALL = ("good", "other", "late", "odd", "short", *BROKEN)
LONG = "one two three four five six seven eight nine ten eleven twelve"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    return write_damaged_frames(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sound")
    for name in "abcdef":
        write_frames(folder / name, 4, height=8, width=8)
    return str(folder)


def annotations(folder: Path, *names: str) -> dict[str, str]:
    videos = {name: [f"what {name} shows"] for name in names}
    return {split: write_annotation(folder / f"{split}.json", videos) for split in ("train", "val")}


def words(frames: str | Path, *paths: str) -> list[str]:
    return [*(word for path in paths for word in ("--annot", path)), "--frames_dir", str(frames), "--num_frm", "4"]


def config_of(frames: str | Path) -> Config:
    return load_config(None, {"frames_dir": str(frames), "num_frm": 4, "top_k": 2})


# ---- entries ----


def test_every_refused_entry_is_listed(sound: str, tmp_path: Path, capsys: Captured) -> None:
    entries: dict[str, Any] = {"a": ["fine"], "b": [], "c": [""], "../f": ["x"]}
    entries["d"] = {"sentences": ["x"], "duration": -1}
    entries["e"] = {"sentences": ["x"], "extention": "mp4"}
    path = write_annotation(tmp_path / "val.json", entries)
    code, found = checked(capsys, *words(sound, path))
    refused = finding(found, "annotation", "val")
    assert (code, refused.severity, len(refused.items)) == (1, "fails", 5)
    for name in ("b", "c", "d", "e", "../f"):
        assert any(f"'{name}'" in reason for reason in refused.items)
    with pytest.raises(UserError) as first:  # what a run would say is one of them
        load_annotations(path)
    assert str(first.value).removeprefix(f"{path}: ") in refused.items
    assert finding(found, "captions", "val").items["videos"] == 1


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_files_without_entries(sound: str, tmp_path: Path, capsys: Captured, content: str) -> None:
    path = tmp_path / "val.json"
    path.write_text(content)
    code, found = checked(capsys, *words(sound, str(path)))
    assert code == 1 and len(finding(found, "annotation", "val").items) == 1


def test_the_subset_of_a_run_is_checked(sound: str, tmp_path: Path) -> None:
    entries: dict[str, Any] = {f"v{number}": [f"caption {number}"] for number in range(100)}
    entries["v70"] = []
    path = write_annotation(tmp_path / "train.json", entries)
    (split,) = splits_of_files([path], load_config(None, {"data_subset": 80, "frames_dir": sound}))
    assert [video.video_id for video in split.videos] == [f"v{number}" for number in range(81) if number != 70]
    assert len(split.refused) == 1 and "'v70'" in split.refused[0]


# ---- videos ----


def test_videos_are_judged_as_a_run_does(frames: Path, tmp_path: Path, capsys: Captured) -> None:
    """Training leaves out what it cannot read; an evaluation stops, or with skip_missing leaves it out."""
    paths, config = annotations(tmp_path, *ALL), config_of(frames)
    code, found = checked(capsys, *words(frames, paths["train"]))
    assert code == 0 and found["verdict"] == "warning"
    told = {name for entry in found["findings"] if entry["check"] != "short_videos" for name in entry["items"]}
    assert set(train_split(config, paths["train"]).left_out) == set(BROKEN) == told & set(ALL)
    assert finding(found, "short_videos", "train").items == {"short": "2 frames"}

    code, found = checked(capsys, *words(frames, paths["val"]))
    assert code == 1
    assert kinds(found, "fails") == {("missing_videos", "val"), ("gaps", "val"), ("broken_frames", "val")}
    assert list(finding(found, "missing_videos", "val").items) == ["gone"]
    gap = finding(found, "gaps", "val")
    assert "image_00003.jpg" in gap.items["gap"] and "1 of 8" in gap.message and "--skip_missing" in gap.advice
    with pytest.raises(UserError):
        evaluation_split(config, paths["val"])

    code, found = checked(capsys, *words(frames, paths["val"]), "--skip_missing")
    skipping = config.model_copy(update={"skip_missing": True})
    assert set(evaluation_split(skipping, paths["val"]).left_out) == set(BROKEN)
    assert code == 0 and "skip_missing" in finding(found, "gaps", "val").message


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_readable_video_fails(frames: Path, tmp_path: Path, capsys: Captured, split: str) -> None:
    path = annotations(tmp_path, *BROKEN)[split]
    code, found = checked(capsys, *words(frames, path), "--skip_missing")
    assert code == 1 and "none is left" in finding(found, "gaps", split).message
    assert "--skip_missing" not in finding(found, "gaps", split).advice


def test_deep_finds_damage_behind_the_first_frame(frames: Path, tmp_path: Path, capsys: Captured) -> None:
    """Of 8 frames, num_frm 8 reads all, and num_frm 2 the first and the fifth."""
    paths = annotations(tmp_path, "good", "late", "odd")
    val, train = ["--annot", paths["val"]], ["--annot", paths["train"]]
    source = ["--frames_dir", str(frames), "--num_frm"]
    code, found = checked(capsys, *val, *source, "8")
    assert code == 0 and ("videos", "val") in kinds(found, "fine")
    code, found = checked(capsys, *val, *source, "8", "--deep")
    late, odd = finding(found, "broken_frames", "val"), finding(found, "frame_sizes", "val")
    assert code == 1 and late.severity == odd.severity == "fails"
    assert list(late.items) == ["late"] and "image_00006.jpg" in late.items["late"]
    assert list(odd.items) == ["odd"] and "66" in odd.items["odd"] and "80" in odd.items["odd"]
    code, found = checked(capsys, *val, *source, "2", "--deep")
    assert finding(found, "broken_frames", "val").severity == "warning"  # a run passes over it
    assert finding(found, "frame_sizes", "val").severity == "fails"  # the fifth
    for more in (["8"], ["2", "--sampling", "random"]):
        code, found = checked(capsys, *train, *source, *more, "--deep")
        assert code == 0 and "left out of their batches" in finding(found, "broken_frames", "train").message


def test_deep_names_every_damaged_image(tmp_path: Path, capsys: Captured) -> None:
    folder = write_frames(tmp_path / "frames" / "v", 150)
    for number in (2, 70, 149):
        (folder / f"image_{number:05d}.jpg").write_bytes(b"")
    path = annotations(tmp_path, "v")["val"]
    _, found = checked(capsys, "--annot", path, "--frames_dir", str(tmp_path / "frames"), "--deep")
    named = finding(found, "broken_frames", "val").items["v"]
    assert [f"image_{number:05d}.jpg" in named for number in (2, 70, 149, 3)] == [True, True, True, False]


def test_video_files(tmp_path: Path, capsys: Captured) -> None:
    bytes_of = write_video(tmp_path / "good.mp4", 100).read_bytes()
    (tmp_path / "text.mp4").write_text("no video at all")
    (tmp_path / "empty.mp4").write_bytes(b"")
    hurt = bytearray(bytes_of)
    start = bytes_of.index(b"mdat") + len(bytes_of) * 2 // 3
    hurt[start : start + 3000] = b"\xff" * 3000
    (tmp_path / "hurt.mp4").write_bytes(hurt)
    path = annotations(tmp_path, "good", "text", "empty", "hurt", "gone")["val"]
    request = ("--annot", path, "--video_dir", str(tmp_path), "--num_frm", "100")
    code, found = checked(capsys, *request)
    assert code == 1 and set(finding(found, "unreadable_videos", "val").items) == {"text", "empty"}
    assert list(finding(found, "missing_videos", "val").items) == ["gone"]
    code, found = checked(capsys, *request, "--deep")
    told = {name for entry in found["findings"] if entry["severity"] == "fails" for name in entry["items"]}
    assert code == 1 and told == {"text", "empty", "hurt", "gone"}


def test_packs(tmp_path: Path, capsys: Captured) -> None:
    """Videos that a pack lacks are missing; --deep finds damaged images."""
    for name, height in (("v", 66), ("w", 80)):
        write_frames(tmp_path / "frames" / name, 8, height=height)
    packed = tmp_path / "frames.lmdb"
    assert main(["pack", str(tmp_path / "frames"), "-o", str(packed)]) == 0
    capsys.readouterr()
    shutil.move(tmp_path / "frames", tmp_path / "elsewhere")
    path = annotations(tmp_path, "v", "w")["val"]
    request = ("--annot", path, "--frames_dir", str(packed), "--num_frm", "8", "--deep")
    assert checked(capsys, *request)[0] == 0
    content, image = packed.read_bytes(), (tmp_path / "elsewhere" / "w" / "image_00004.jpg").read_bytes()
    at = content.index(image[-64:]) + 64 - len(image)  # its header
    packed.write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    code, found = checked(capsys, *request)
    told = finding(found, "broken_frames", "val").items
    assert code == 1 and list(told) == ["w"] and "4" in told["w"]
    code, found = checked(capsys, *words(packed, annotations(tmp_path, "v", "gone")["val"]))
    assert code == 1 and kinds(found, "fails") == {("missing_videos", "val")}


def test_clips_of_videos_that_are_read_in_place(tmp_path: Path, capsys: Captured) -> None:
    for name in ("v", "w"):
        write_video(tmp_path / f"{name}.mp4", 50)
        write_frames(tmp_path / name, 20)
    clip = {"sentences": ["x"], "start": 1.0, "end": 1.5}
    path = write_annotation(tmp_path / "val.json", {"v": clip, "w": ["y"]})
    code, found = checked(capsys, "--annot", path, "--video_dir", str(tmp_path))
    clips = finding(found, "clips", "val")
    assert code == 0 and clips.severity == "warning" and clips.items == {"v": "1 s to 1.5 s"}
    assert f"adaclip extract --clips {path}" in clips.advice
    _, found = checked(capsys, "--annot", path, "--frames_dir", str(tmp_path))
    assert ("clips", "val") not in kinds(found, "warning")


def test_deep_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the main thread stops a thread that is in the middle of an endless video."""
    going, ended = threading.Event(), threading.Event()

    class Endless:
        def count(self, video_id: str) -> int:
            return 10**9

        def read(self, video_id: str, indices: Any) -> Any:
            return np.zeros((len(indices), 4, 4, 3), np.uint8)

        def scan(self, video_id: str, stopped: Any = lambda: False) -> Any:
            while not stopped():
                going.set()
                yield 0, np.zeros((4, 4, 3), np.uint8)
            ended.set()

    def interrupted(looks: Any, *_: object, **__: object) -> Any:
        assert going.wait(60)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "tqdm", interrupted)
    split = CheckedSplit("val", "val.json", False, [VideoAnnotation("v", ("x",))], [], Endless())
    with pytest.raises(KeyboardInterrupt):
        list(check_videos(split, load_config(None, {"video_dir": str(tmp_path)}), deep=True))
    assert ended.wait(60)


# ---- captions ----


def test_long_captions(sound: str, tmp_path: Path, capsys: Captured) -> None:
    """Twelve words of a token each, and two for start and end: max_txt_len 14 suffices."""
    entries = {"a": [LONG], "b": ["short", LONG + " thirteen"], "c": ["short one"]}
    request = words(sound, write_annotation(tmp_path / "val.json", entries))
    code, found = checked(capsys, *request, "--concat_captions", "indep-all", "--max_txt_len", "10")
    long = finding(found, "long_captions", "val")
    assert code == 0 and long.severity == "warning" and "2 of 4 captions (50.0%)" in long.message
    assert long.items["a"] == [{"kept": "one two three four five six seven eight", "cut": "nine ten eleven twelve"}]
    assert long.advice.startswith("max_txt_len 15 cuts none")
    _, found = checked(capsys, *request, "--concat_captions", "indep-all", "--max_txt_len", "15")
    assert finding(found, "long_captions", "val").severity == "fine"
    _, found = checked(capsys, *request, "--concat_captions", "concat", "--max_txt_len", "15")
    joined = finding(found, "long_captions", "val")
    assert list(joined.items) == ["b"] and "concat_captions" in joined.message and "1 of 3" in joined.message


@pytest.mark.parametrize(
    ("text", "limit"), [("unbroken" * 60, 77), ("狗 一个男人在公园里跑步然后停下来和他的狗玩耍", 20), (LONG * 10, 77)]
)
def test_the_kept_part_of_a_caption_is_what_fits(
    sound: str, tmp_path: Path, capsys: Captured, text: str, limit: int
) -> None:
    tokens = open_clip.get_tokenizer("ViT-B-32")
    request = words(sound, write_annotation(tmp_path / "val.json", {"a": [text]}))
    _, found = checked(capsys, *request, "--max_txt_len", str(limit))
    (told,) = finding(found, "long_captions", "val").items["a"]
    assert (told["kept"] + told["cut"]).replace(" ", "") == text.replace(" ", "")
    assert limit - 7 <= len(tokens.encode(told["kept"])) <= limit - 2


@pytest.mark.parametrize("limit", [3, 20, 76, 77])
def test_captions_that_are_cut_are_those_with_too_many_tokens(
    sound: str, tmp_path: Path, capsys: Captured, limit: int
) -> None:
    """Captions of every length, some with the character that the tokenizer pads with ("!")."""
    tokens = open_clip.get_tokenizer("ViT-B-32")
    texts = [" ".join(["cat"] * count) + end for count in range(90) for end in ("", " !", " dog !")]
    captions = {f"v{number}": text for number, text in enumerate(texts) if text.strip()}
    path = write_annotation(tmp_path / "train.json", {name: [text] for name, text in captions.items()})
    _, found = checked(capsys, *words(sound, path), "--max_txt_len", str(limit))
    cut = {name for name, text in captions.items() if len(tokens.encode(text.strip())) + 2 > limit}
    assert set(finding(found, "long_captions", "train").items) == cut


def test_captions_of_several_videos(sound: str, tmp_path: Path, capsys: Captured) -> None:
    entries = {"a": ["A Dog", "x"], "b": ["a  dog"], "c": ["a cat"], "d": ["a dog"]}
    request = words(sound, write_annotation(tmp_path / "train.json", entries))
    code, found = checked(capsys, *request, "--concat_captions", "indep-one")
    shared = finding(found, "shared_captions", "train")
    assert code == 0 and shared.severity == "warning" and shared.items == {"A Dog": ["a", "b", "d"]}
    counts = finding(found, "captions", "train").items
    assert counts == {"videos": 4, "captions": 5, "min": 1, "median": 1, "max": 2}


# ---- splits ----


def test_overlap(sound: str, tmp_path: Path, capsys: Captured) -> None:
    groups = dict(zip("abcdef", "111223", strict=True))
    of = {name: {"sentences": [f"caption {name}"], "group": group} for name, group in groups.items()}
    paths = {
        split: write_annotation(tmp_path / f"{split}.json", {name: of[name] for name in names})
        for split, names in {"train": "ab", "val": "bc", "test": "def"}.items()
    }
    code, found = checked(capsys, *words(sound, *paths.values()))
    assert code == 0
    assert kinds(found, "warning") == {("shared_videos", "train, val"), ("shared_groups", "train, val")}
    assert list(finding(found, "shared_videos", "train, val").items) == ["b"]
    assert finding(found, "shared_groups", "train, val").items == {"1": ["c"]}

    other = write_annotation(tmp_path / "other.json", {"f": {"sentences": ["Caption  A", "of its own"]}})
    _, found = checked(capsys, *words(sound, paths["train"], other))
    assert finding(found, "captions_of_both", "train, other").items == {"Caption  A": ["a", "f"]}

    _, found = checked(capsys, *words(sound, paths["train"], paths["test"]))
    assert finding(found, "overlap", "train, test").severity == "fine"


def test_the_same_data_twice(sound: str, tmp_path: Path, capsys: Captured) -> None:
    paths = [write_annotation(tmp_path / f"{split}.json", {"a": ["one"]}) for split in ("val", "test", "train")]
    _, found = checked(capsys, *words(sound, *paths[:2]))
    assert kinds(found, "warning") == {("same_data", "val, test")}
    _, found = checked(capsys, *words(sound, *paths[1:]))
    assert kinds(found, "warning") == {("shared_videos", "test, train")}


def test_files_of_one_name_are_told_apart_by_their_folders(sound: str, tmp_path: Path, capsys: Captured) -> None:
    paths = []
    for split, video in (("training", "a"), ("held out", "b")):
        (tmp_path / split).mkdir()
        paths.append(write_annotation(tmp_path / split / "captions.json", {video: [f"what {video} shows"]}))
    _, found = checked(capsys, *words(sound, *paths))
    told = {name: split["trains"] for name, split in found["splits"].items()}
    assert told == {"training/captions": True, "held out/captions": False}


@pytest.mark.parametrize(
    ("name", "trains"), [("train", True), ("msrvtt_train9k", True), ("Training-1", True), ("restrained", False)]
)
def test_the_word_train_means_training_data(sound: str, tmp_path: Path, name: str, trains: bool) -> None:
    path = write_annotation(tmp_path / f"{name}.json", {"a": ["x"]})
    (split,) = splits_of_files([path], load_config(None, {"frames_dir": sound}))
    assert split.trains is trains
