"""adaclip convert: what is written, counted, warned of and refused; the real files of MSR-VTT, MSVD and ActivityNet."""

import csv
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from converting import Convert, convert, counts, save, written

from adaclip_finetune.cli import main
from adaclip_finetune.data.formats import FORMATS

__all__ = ["convert"]  # a fixture: used by name


# Real files


def test_real_msrvtt_1ka(shared: Path, tmp_path: Path, convert: Convert) -> None:
    source = shared / "reference/annotations/MSRVTT_JSFUSION_test.csv"
    assert counts(convert("msrvtt", "--test", source), "test") == [1000, 1000, 0, 0, 0]
    with source.open(newline="") as file:
        rows = {row["video_id"]: {"sentences": [row["sentence"]]} for row in csv.DictReader(file)}
    assert written(tmp_path, "test") == rows


def test_real_msrvtt_7k_list(shared: Path, tmp_path: Path, convert: Convert) -> None:
    """The list is real; the captions of three of its videos are hand-written."""
    folder = shared / "reference/annotations"
    data = save(tmp_path / "data.json", {"videos": [], "sentences": msrvtt_sentences("video0", "video1000", "video7")})
    printed = convert(
        "msrvtt",
        "--data",
        data,
        "--train",
        folder / "MSRVTT_train.7k.csv",
        "--test",
        folder / "MSRVTT_JSFUSION_test.csv",
    )
    listed = (folder / "MSRVTT_train.7k.csv").read_text().split()[1:]
    known = [video for video in listed if video in ("video0", "video1000", "video7")]
    assert list(written(tmp_path, "train")) == known
    assert counts(printed, "train") == [len(known), len(known), 0, 0, 7010 - len(known)]


def test_real_activitynet(shared: Path, tmp_path: Path, convert: Convert) -> None:
    folder = shared / "reference/annotations"
    source, ids = folder / "activitynet_val_1.json", folder / "activitynet_val_ids.json"
    printed = convert("activitynet", "--val", source, "--test", source, "--test-ids", ids)
    assert counts(printed, "val") == [4917, 17505, 0, 0, 0]
    assert counts(printed, "test") == [4917, 17505, 0, 0, 9]
    assert "warning: val and test share 4,917 source videos" in printed
    content, result = json.loads(source.read_text()), written(tmp_path, "test")
    absent = [video for video in json.loads(ids.read_text()) if video not in content]
    assert f"listed, but no captions are there for {', '.join(absent[:5])}, …" in printed
    for entry in content.values():
        entry["sentences"] = [sentence.strip() for sentence in entry["sentences"]]
    assert result == content


def test_real_msvd_lists(shared: Path, tmp_path: Path, convert: Convert) -> None:
    """The lists are real; the captions, which are not public as a file here, are hand-written."""
    folder = shared / "reference/annotations"
    lists = {split: folder / f"msvd_{split}_list.txt" for split in ("train", "test")}
    ids = {split: path.read_text().split() for split, path in lists.items()}
    captions = {video: [["a", "caption", "of", video], ["two"]] for names in ids.values() for video in names}
    del captions["-4wsuPCjDBc_5_15"]
    pickled = tmp_path / "raw-captions.pkl"
    pickled.write_bytes(pickle.dumps(captions, protocol=2))
    printed = convert("msvd", "--captions", pickled, "--train", lists["train"], "--test", lists["test"])
    assert counts(printed, "train") == [1199, 2398, 0, 0, 1]
    assert counts(printed, "test") == [670, 1340, 0, 0, 0]
    assert "source videos" not in printed
    assert "warning: train and test share 1 captions, such as 'two'" in printed
    assert written(tmp_path, "train")["-7KMZQEsJW4_205_208"] == {
        "sentences": ["a caption of -7KMZQEsJW4_205_208", "two"],
        "duration": 3.0,
        "group": "-7KMZQEsJW4",
    }


# MSR-VTT, MSVD and ActivityNet on hand-written files


def msrvtt_sentences(*videos: str) -> list[dict[str, Any]]:
    return [{"sen_id": i, "video_id": video, "caption": f"about {video}"} for i, video in enumerate(videos)]


MSRVTT = {
    "info": {},
    "videos": [
        {"video_id": "video0", "url": "https://www.youtube.com/watch?v=9lZi22qLlEo", "start time": 137.72,
         "end time": 149.44, "split": "train", "category": 9, "id": 0},
        {"video_id": "video1", "url": "https://www.youtube.com/watch?v=AAAAAAAAAAA&t=3", "start time": 1,
         "end time": 2, "split": "validate", "category": 9, "id": 1},
        {"video_id": "video2", "url": "https://www.youtube.com/watch?v=9lZi22qLlEo", "start time": 10,
         "end time": 20, "split": "test", "category": 9, "id": 2},
        {"video_id": "video3", "url": "https://www.youtube.com/watch?v=BBBBBBBBBBB", "start time": 10,
         "end time": 20, "split": "test", "category": 9, "id": 3},
    ],
    "sentences": [
        {"sen_id": 0, "video_id": "video2", "caption": "a man talks"},
        {"sen_id": 1, "video_id": "video0", "caption": " A man talks "},
        {"sen_id": 2, "video_id": "video2", "caption": "a man talks"},
        {"sen_id": 3, "video_id": "video2", "caption": "  "},
        {"sen_id": 4, "video_id": "video1", "caption": "é"},
    ],
}  # fmt: skip


def test_msrvtt_with_its_own_splits(tmp_path: Path, convert: Convert) -> None:
    printed = convert("msrvtt", "--data", save(tmp_path / "d.json", MSRVTT))
    assert written(tmp_path, "train") == {
        "video0": {"sentences": ["A man talks"], "duration": 11.72, "group": "9lZi22qLlEo"}
    }
    assert written(tmp_path, "val")["video1"] == {"sentences": ["é"], "duration": 1.0, "group": "AAAAAAAAAAA"}
    assert written(tmp_path, "test") == {
        "video2": {"sentences": ["a man talks"], "duration": 10.0, "group": "9lZi22qLlEo"}
    }
    assert counts(printed, "test") == [1, 1, 1, 2, 0]  # a blank sentence of video2, and video3 which has none
    assert "warning: train and test share 1 source videos, such as '9lZi22qLlEo'" in printed
    assert "warning: train and test share 1 captions, such as 'A man talks'" in printed
    assert "train and val" not in printed and "val and test" not in printed


def test_msrvtt_as_frozen_in_time_lays_it_out(tmp_path: Path, convert: Convert) -> None:
    (tmp_path / "annotation").mkdir()
    (tmp_path / "structured-symlinks").mkdir()
    annotations = [{"image_id": f"video{n % 3}", "caption": f"caption {n}", "id": n} for n in range(6)]
    data = save(tmp_path / "annotation/MSR_VTT.json", {"annotations": annotations, "images": [], "type": "captions"})
    lists = tmp_path / "structured-symlinks"
    printed = convert(
        "msrvtt", "--data", data,
        "--train", save(lists / "train_list_jsfusion.txt", "video1\nvideo0\n\nvideo9\n"),
        "--test", save(lists / "val_list_jsfusion.txt", "video2"),
    )  # fmt: skip
    assert written(tmp_path, "train") == {
        "video1": {"sentences": ["caption 1", "caption 4"]},
        "video0": {"sentences": ["caption 0", "caption 3"]},
    }
    assert list(written(tmp_path, "test")) == ["video2"]
    assert counts(printed, "train") == [2, 4, 0, 0, 1] and "no captions are there for video9" in printed
    assert "share" not in printed


def test_activitynet_ids_with_and_without_v(tmp_path: Path, convert: Convert) -> None:
    entry = {"duration": 3, "timestamps": [[0, 1], [1, 2.5], [2, 3]], "sentences": [" He waves.", "  ", " He waves."]}
    data = save(tmp_path / "train.json", {"v_a": entry, "v_v_b": entry, "v_c": entry, "v_d": entry})
    printed = convert(
        "activitynet", "--train", data, "--train-ids", save(tmp_path / "i.json", ["c", "v_b", "v_a", "x"])
    )
    assert list(written(tmp_path, "train")) == ["v_a", "v_v_b", "v_c"]
    assert written(tmp_path, "train")["v_a"] == {
        "sentences": ["He waves.", "He waves."],
        "timestamps": [[0.0, 1.0], [2.0, 3.0]],
        "duration": 3.0,
    }
    assert counts(printed, "train") == [3, 6, 0, 3, 1]


def test_a_pickle_runs_nothing(tmp_path: Path, convert: Convert) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    ids, pickled = save(tmp_path / "ids.txt", "a_1_2"), tmp_path / "raw-captions.pkl"
    for protocol in range(6):
        pickled.write_bytes(pickle.dumps({"a_1_2": [["x"]], "b": Evil()}, protocol))
        assert "nothing was run" in convert("msvd", "--captions", pickled, "--test", ids, code=2)
        assert not canary.exists() and not (tmp_path / "out").exists()
    assert pickle.loads(pickled.read_bytes()) and canary.exists(), "the same pickle does run where it is allowed to"


# What all formats have in common


def table(tmp_path: Path, text: str, name: str = "t.csv") -> list[Any]:
    return ["table", "--test", save(tmp_path / name, text), "--video-column", "v", "--caption-column", "c"]


def test_existing_files_are_refused_and_nothing_is_left_behind(tmp_path: Path, convert: Convert) -> None:
    words = table(tmp_path, "v,c\na,old\n")
    convert(*words)
    save(tmp_path / "t.csv", "v,c\na,new\n")
    assert "test.json is there already; choose another folder, or give --overwrite" in convert(*words, code=2)
    assert written(tmp_path, "test") == {"a": {"sentences": ["old"]}}
    convert(*words, "--overwrite")
    assert written(tmp_path, "test") == {"a": {"sentences": ["new"]}}
    save(tmp_path / "t.csv", "v,c\na,newest\n../b,out\n")
    assert "t.csv: line 3: this name leads out of the folder" in convert(*words, "--overwrite", code=2)
    assert written(tmp_path, "test") == {"a": {"sentences": ["new"]}}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.json"]


def test_the_source_is_never_written_over(tmp_path: Path, convert: Convert) -> None:
    (tmp_path / "out").mkdir()
    source = save(tmp_path / "out/train.json", {"v_a": {"sentences": [" x"]}})
    before = source.read_bytes()
    assert "is what is converted" in convert("activitynet", "--train", source, "--overwrite", code=2)
    assert source.read_bytes() == before
    (tmp_path / "out/test.json").mkdir()
    assert "test.json is there already" in convert(*table(tmp_path, "v,c\na,x\n"), "--overwrite", code=2)


def test_all_splits_or_none(tmp_path: Path, convert: Convert) -> None:
    train, test = save(tmp_path / "a.csv", "videoid,name\na,x\n"), save(tmp_path / "b.csv", "videoid,name\n/b,x\n")
    told = convert("webvid", "--train", train, "--test", test, code=2)
    assert "b.csv: line 2: this name is an absolute path" in told
    assert list((tmp_path / "out").iterdir()) == []


def test_files_are_counted_as_training_finds_them(tmp_path: Path, convert: Convert) -> None:
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    for name in ("a.MP4", "b.txt", "c.avi", "deep/d.webm", "e.mp4"):
        (videos / name).touch()
    words = table(tmp_path, "v,c\na,1\nb,2\nc.mp4,3\ndeep/d,4\nno/f,5\n")
    printed = convert(*words, "--videos", videos)
    assert counts(printed, "test") == [5, 5, 0, 0, 0, 2]
    assert f"no file for 3 of them in {videos}, such as b, c.mp4, no/f" in printed
    clips = [*table(tmp_path, "v,c,s,t\ne,1,0,1\ng,2,0,1\n"), "--start", "s", "--end", "t", "--overwrite"]
    assert counts(convert(*clips, "--videos", videos), "test")[-1] == 1
    assert "there is no such folder" in convert(*words, "--overwrite", "--videos", tmp_path / "nowhere", code=2)


def test_nothing_to_write(tmp_path: Path, convert: Convert) -> None:
    assert "nothing to write: of test no video has a caption" in convert(*table(tmp_path, "v,c\na,\nb, \n"), code=2)
    assert not list((tmp_path / "out").iterdir())


def test_help_of_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    overview = capsys.readouterr().out
    for name in FORMATS:
        assert f"\n  {name} " in overview
        assert main(["convert", name, "--help"]) == 0
        assert "--overwrite" in capsys.readouterr().out
    assert main(["convert", "msrvt"]) == 2
    assert "no format msrvt; the nearest is msrvtt" in capsys.readouterr().err
    assert main(["convert", "msrvtt"]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "content", "told"),
    [
        ("msrvtt --data", "[]", r"f: expected an object {videos, sentences} or {annotations}, got \[\]"),
        ("msrvtt --data", {"x": 1}, r"f: expected 'annotations' \(a list of {image_id, caption}\), got only 'x'"),
        ("msrvtt --data", {"videos": [{}], "sentences": []}, "f: videos, entry 1: expected 'video_id'"),
        ("msrvtt --data", {"videos": [], "sentences": [{"video_id": "a"}]}, "sentences, entry 1: expected 'caption'"),
        ("msrvtt --data", {"annotations": [{"image_id": "a", "caption": "b"}]}, "video 'a': expected a split"),
        ("msrvtt --test", "video_id\nv\n", "f: has no column sentence: the captions come from --data"),
        ("msrvtt --test", "video_id,sentence\nv\n", "f: line 2: expected 2 columns, got 1"),
        ("activitynet --test", {"v_a": []}, r"f: video 'v_a': expected an object .* got \[\]"),
        ("activitynet --test", {"v_a": {"sentences": "x"}}, "'sentences': expected a list of texts, got 'x'"),
        ("activitynet --test", {"v_a": {"sentences": [3]}}, "caption 1: expected a text, got 3"),
        ("activitynet --test", {"v_a": {"sentences": ["a"], "timestamps": []}}, "a timestamp a sentence, got 0 for 1"),
        ("activitynet --test", {"v_a": {"sentences": ["a"], "timestamps": [["x", 1]]}}, "timestamp 1: .* got 'x'"),
        ("activitynet --test", {"v_a": {"sentences": ["a"], "duration": -1}}, "'duration': expected a number of sec"),
        ("msvd --test /dev/null --captions", "no pickle", "f: expected a pickle of plain lists, dicts and text"),
        ("clipvip --test", {"clip_id": "a"}, "f: line 1: expected 'text'"),
        ("clipvip --test", '{"clip_id": "a", "text": "b"}\n{"clip_id"', "f: line 2: not JSON"),
    ],
)
def test_wrong_input_is_told_with_its_place(
    tmp_path: Path, convert: Convert, words: str, content: Any, told: str
) -> None:
    printed = convert(*words.split(), save(tmp_path / "f", content), code=2)
    assert re.search(told, printed), printed
    assert not list((tmp_path / "out").glob("*"))


def test_bytes_that_are_no_text(tmp_path: Path, convert: Convert) -> None:
    words = table(tmp_path, "")
    (tmp_path / "t.csv").write_bytes(b"v,c\na,\xff\n")
    assert "t.csv: after line 0: not UTF-8 text" in convert(*words, code=2)
    assert "t.csv: cannot be read (No such file" in convert(*words[:2], tmp_path / "x" / "t.csv", *words[3:], code=2)
