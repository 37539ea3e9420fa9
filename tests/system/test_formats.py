"""adaclip convert: what is written, counted and refused, for every format and on the real files of three of them.

No real file was at hand for the other formats: their files here are written by hand after the published descriptions.
"""

import csv
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip_finetune.cli import main
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.formats.published import FORMATS
from adaclip_finetune.data.formats.write import write_splits

Convert = Callable[..., str]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Run `adaclip convert WORDS -o tmp_path/out` and return what it printed, on either stream.

    `files` are written first, and a word that is the name of one becomes its path. The exit code is checked.
    """

    def run(words: str, files: Mapping[str, Any] | None = None, code: int = 0) -> str:
        for name, content in (files or {}).items():
            if content is not None:  # None: the name is that of a folder
                save(tmp_path / name, content)
        paths = [str(tmp_path / word) if word in (files or {}) else word for word in words.split()]
        assert main(["convert", *paths, "-o", str(tmp_path / "out")]) == code
        out, err = capsys.readouterr()
        assert bool(err) == (code != 0) and "Traceback" not in err
        return out + err

    return run


def written(tmp_path: Path, split: str) -> Any:
    """Return the content of a split's file, which the loader takes, too."""
    path = tmp_path / "out" / f"{split}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [video.video_id for video in load_annotations(path)] == list(content)
    return content


def save(path: Path, content: Any) -> Path:
    """Write bytes, text, or anything else as JSON."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def counts(printed: str, split: str) -> list[int]:
    """Return the numbers printed for a split: videos, captions, duplicates, without captions, absent."""
    [line] = [line for line in printed.splitlines() if line.startswith(f"{split} ")]
    return [int(number.replace(",", "")) for number in line.split()[1:]]


# ---- real files ----


def test_real_msrvtt(shared: Path, tmp_path: Path, convert: Convert) -> None:
    """The list of training videos is real; the captions of three of them are hand-written."""
    real = shared / "reference/annotations"
    test, ids = real / "MSRVTT_JSFUSION_test.csv", real / "MSRVTT_train.7k.csv"
    listed = ids.read_text().split()[1:]
    data = {"videos": [], "sentences": [{"video_id": video, "caption": video} for video in listed[2::-1]]}
    printed = convert(f"msrvtt --data data.json --train {ids} --test {test}", {"data.json": data})
    assert counts(printed, "train") == [3, 3, 0, 0, 7007] and list(written(tmp_path, "train")) == listed[:3]
    assert counts(printed, "test") == [1000, 1000, 0, 0, 0]
    with test.open(newline="") as file:
        rows = {row["video_id"]: {"sentences": [row["sentence"]]} for row in csv.DictReader(file)}
    assert written(tmp_path, "test") == rows


def test_real_activitynet(shared: Path, tmp_path: Path, convert: Convert) -> None:
    real = shared / "reference/annotations"
    source, ids = real / "activitynet_val_1.json", real / "activitynet_val_ids.json"
    printed = convert(f"activitynet --test {source} --test-ids {ids}")
    assert counts(printed, "test") == [4917, 17505, 0, 0, 9]
    content = json.loads(source.read_text())
    absent = [video for video in json.loads(ids.read_text()) if video not in content]
    assert f"{', '.join(absent[:5])}, …" in printed
    for entry in content.values():
        entry["sentences"] = [sentence.strip() for sentence in entry["sentences"]]
    assert written(tmp_path, "test") == content


def test_real_msvd_lists(shared: Path, tmp_path: Path, convert: Convert) -> None:
    """The lists are real; the captions are hand-written."""
    lists = {split: shared / f"reference/annotations/msvd_{split}_list.txt" for split in ("train", "test")}
    ids = [video for path in lists.values() for video in path.read_text().split()]
    captions = {video: [["a", "caption", "of", video], ["two"]] for video in ids if video != "-4wsuPCjDBc_5_15"}
    pickled = pickle.dumps(captions, protocol=2)
    printed = convert(f"msvd --captions c.pkl --train {lists['train']} --test {lists['test']}", {"c.pkl": pickled})
    assert counts(printed, "train") == [1199, 2398, 0, 0, 1]
    assert counts(printed, "test") == [670, 1340, 0, 0, 0]
    sentences = ["a caption of -7KMZQEsJW4_205_208", "two"]
    clip = {"sentences": sentences, "duration": 3.0, "group": "-7KMZQEsJW4"}
    assert written(tmp_path, "train")["-7KMZQEsJW4_205_208"] == clip


# ---- hand-written files of every format: words, files, what is written, and the numbers of one split ----


def msrvtt_video(number: int, split: str, start: float, end: float, source: str) -> dict[str, Any]:
    url = f"https://www.youtube.com/watch?v={source}&t=3"
    return {"video_id": f"video{number}", "url": url, "start time": start, "end time": end, "split": split}


ENTRY = {"duration": 3, "timestamps": [[0, 1], [1, 2.5], [2, 3]], "sentences": [" He waves.", "  ", " He waves."]}
PARAGRAPH = {"sentences": ["He waves.", "He waves."], "timestamps": [[0.0, 1.0], [2.0, 3.0]], "duration": 3.0}
TURNS = {"sentences": ["It turns.", "It turns."], "timestamps": [[5.0, 10.0], [5.0, 10.0]]}
CAT = {"sentences": ["a cat."], "timestamps": [[0.0, 5.0]]}
BEAUTY = "0001_American_Beauty"
SITS = f"{BEAUTY}_00.01.00.000-00.01.04.000"
RECIPE = "training/113/GLd3a"
PARTS = [{"id": 0, "segment": [90, 102], "sentence": "spread"}, {"id": 1, "segment": [114, 127.5], "sentence": "place"}]
PART = {"extension": "mp4", "group": "a.b"}
COLUMNS = "--video-column v --caption-column c"

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[int]]] = {
    "msrvtt with its own splits": (
        "msrvtt --data d.json",
        {"d.json": {
            "videos": [
                msrvtt_video(0, "train", 137.72, 149.44, "9lZi22qLlEo"), msrvtt_video(1, "validate", 1, 2, "A" * 11),
                msrvtt_video(2, "test", 10, 20, "9lZi22qLlEo"), msrvtt_video(3, "test", 10, 20, "B" * 11),
            ],
            "sentences": [
                {"video_id": "video2", "caption": "a man talks"}, {"video_id": "video0", "caption": " A man talks "},
                {"video_id": "video2", "caption": "a man talks"}, {"video_id": "video2", "caption": " \u200b"},
                {"video_id": "video1", "caption": "é"},
            ],
        }},
        {
            "train": {"video0": {"sentences": ["A man talks"], "duration": 11.72, "group": "9lZi22qLlEo"}},
            "val": {"video1": {"sentences": ["é"], "duration": 1.0, "group": "A" * 11}},
            "test": {"video2": {"sentences": ["a man talks"], "duration": 10.0, "group": "9lZi22qLlEo"}},
        },
        [1, 1, 1, 2, 0],  # a blank sentence of video2, and video3, which has none
    ),
    "msrvtt as Frozen-in-Time has it": (
        "msrvtt --data d.json --val val.txt --test list.txt",
        {
            "d.json": {"annotations": [{"image_id": f"video{n % 3}", "caption": f"caption {n}"} for n in range(6)]},
            "val.txt": "video2", "list.txt": "video1\nvideo0\n\nvideo9\n",
        },
        {
            "val": {"video2": {"sentences": ["caption 2", "caption 5"]}},
            "test": {"video1": {"sentences": ["caption 1", "caption 4"]},
                     "video0": {"sentences": ["caption 0", "caption 3"]}},
        },
        [2, 4, 0, 0, 1],
    ),
    "activitynet with ids": (
        "activitynet --test d.json --test-ids i.json",
        {"d.json": {"v_a": ENTRY, "v_v_b": ENTRY, "v_c": ENTRY, "v_d": ENTRY}, "i.json": ["c", "v_b", "v_a", "x"]},
        {"test": {"v_c": PARAGRAPH, "v_v_b": PARAGRAPH, "v_a": PARAGRAPH}},
        [3, 6, 0, 3, 1],
    ),
    "didemo with ids": (
        "didemo --train d.json --test d.json --test-ids l.txt",
        {
            "d.json": [
                {"annotation_id": 1, "video": "1@N01_2.mov", "description": "It turns ",
                 "times": [[2, 3], [1, 1], [1, 1]]},
                {"annotation_id": 2, "video": "b.avi", "description": "a cat.", "times": [[0, 0]]},
                {"annotation_id": 3, "video": "1@N01_2.mov", "description": "It turns", "times": [[1, 1]]},
                {"annotation_id": 3, "video": "1@N01_2.mov", "description": "It turns", "times": [[1, 1]]},
                {"annotation_id": 4, "video": "c.mov", "description": "left out", "times": [[0, 5]]},
            ],
            "l.txt": "1@N01_2\nb.avi.mp4\nzz.mp4\n",
        },
        {
            "train": {"1@N01_2": TURNS | {"extension": "mov"}, "b": CAT | {"extension": "avi"},
                      "c": {"sentences": ["left out."], "timestamps": [[0.0, 30.0]], "extension": "mov"}},
            "test": {"1@N01_2": TURNS | {"extension": "mov"}, "b": CAT | {"extension": "mp4"}},
        },
        [2, 3, 1, 0, 1],
    ),
    "youcook2": (
        "youcook2 --data d.json",
        {"d.json": {"database": {
            "GLd3a": {"subset": "training", "recipe_type": "113", "annotations": PARTS},
            "xxx": {"subset": "testing", "recipe_type": 7, "annotations": PARTS[:1]},
            "yyy": {"subset": "validation", "recipe_type": "7"},
        }}},
        {
            "train": {
                f"{RECIPE}_0": {"sentences": ["spread"], "start": 90.0, "end": 102.0, "group": RECIPE},
                f"{RECIPE}_1": {"sentences": ["place"], "start": 114.0, "end": 127.5, "group": RECIPE},
            },
            "test": {"testing/7/xxx_0": {"sentences": ["spread"], "start": 90.0, "end": 102.0,
                                           "group": "testing/7/xxx"}},
        },
        [1, 1, 0, 0, 0],
    ),
    "lsmdc": (
        "lsmdc --test d.csv --nested",
        {"d.csv": "".join(f"{SITS}\t00.01.00.000\t00.01.04.000\t00.00.59.500\t00.01.04.703\t{text}\n"
                          for text in ('He says "no.', "He goes."))},
        {"test": {f"{BEAUTY}/{SITS}": {"sentences": ['He says "no.', "He goes."], "duration": 5.203, "group": BEAUTY}}},
        [1, 2, 0, 0, 0],
    ),
    "vatex in Chinese": (
        "vatex --test d.json --language zh",
        {"d.json": [{"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A man"], "chCap": ["一个人", "他", "他"]},
                    {"videoID": "b_000001_000011"}]},
        {"test": {"Ptf_2VRj-V0_000122_000132":
                  {"sentences": ["一个人", "他"], "duration": 10.0, "group": "Ptf_2VRj-V0"}}},
        [1, 2, 1, 1, 0],
    ),
    "vatex with lists, in another Unicode form": (
        "vatex --data d.json --test l.txt",
        {"d.json": {"a_000001_000002": ["x"], "caf\xe9_000001_000011": ["y", "z"]},
         "l.txt": "cafe\u0301_000001_000011.mp4\nc\n"},
        {"test": {"caf\xe9_000001_000011":
                  {"sentences": ["y", "z"], "duration": 10.0, "extension": "mp4", "group": "caf\xe9"}}},
        [1, 2, 0, 0, 1],
    ),
    "webvid": (
        "webvid --test d.csv --nested",
        {"d.csv": "videoid,name,page_idx,page_dir,duration,contentUrl\n"
                  "001,Kid on a swing,3,p1,PT00H01M15S,https://x\n"
                  '20,"Sea, waves",3,p2,,https://x\n'
                  "001,Kid on a swing,3,p1,PT00H01M15S,https://x\n"
                  "20,Waves,3,p2,PT2.5S,https://x\n"
                  "30,,3,p2,PT2S,https://x\n"
                  "1,one,3,p2,PT2S,https://x\n"},
        {"test": {"p2/1": {"sentences": ["one"], "duration": 2.0},
                  "p1/001": {"sentences": ["Kid on a swing"], "duration": 75.0},
                  "p2/20": {"sentences": ["Sea, waves", "Waves"]}}},
        [3, 4, 1, 1, 0],
    ),
    "clipvip": (
        "clipvip --test d.jsonl",
        {"d.jsonl": '{"clip_id": "a.3.mp4", "text": "x"}\n\n{"clip_id": "b", "text": ["y", "z"]}\n'
                    '{"clip_id": "a.3", "text": "w"}\n'},
        {"test": {"a.3": {"sentences": ["x", "w"], "extension": "mp4"}, "b": {"sentences": ["y", "z"]}}},
        [2, 4, 0, 0, 0],
    ),
    "ucf101": (
        "ucf101 --train trainlist01.txt --test testlist01.txt",
        {
            "trainlist01.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nYoYo/v_YoYo_g25_c05.avi 101\r\n",
            "testlist01.txt": "HandstandPushups/v_HandStandPushups_g01_c01.avi\n\nYoYo/v_YoYo_g01_c01.avi\n",
        },
        {
            "train": {"ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01":
                      {"sentences": ["Apply Eye Makeup"], "extension": "avi", "group": "ApplyEyeMakeup_g08"},
                      "YoYo/v_YoYo_g25_c05": {"sentences": ["Yo Yo"], "extension": "avi", "group": "YoYo_g25"}},
            "test": {"HandstandPushups/v_HandStandPushups_g01_c01":
                     {"sentences": ["Handstand Pushups"], "extension": "avi", "group": "HandStandPushups_g01"},
                     "YoYo/v_YoYo_g01_c01": {"sentences": ["Yo Yo"], "extension": "avi", "group": "YoYo_g01"}},
        },
        [2, 2, 0, 0, 0],
    ),
    "hmdb51, second split": (
        "hmdb51 --data splits --fold 2",
        {
            "splits/brush_hair_test_split2.txt": "April_09_brush_hair_u_0.avi 1 \n#4_hair;&_1.avi 2 \nc.avi 0 \n",
            "splits/wave_test_split2.txt": "a_wave_0.avi 2\n",
            "splits/wave_test_split1.txt": "a_wave_0.avi 1\n",
            "splits": None,
        },
        {
            "train": {"brush_hair/April_09_brush_hair_u_0": {"sentences": ["brush hair"], "extension": "avi"}},
            "test": {"brush_hair/#4_hair;&_1": {"sentences": ["brush hair"], "extension": "avi"},
                     "wave/a_wave_0": {"sentences": ["wave"], "extension": "avi"}},
        },
        [2, 2, 0, 0, 0],
    ),
    "kinetics, a file a split": (
        "kinetics --train train.csv --test test.csv --nested",
        {
            "train.csv": "label,youtube_id,time_start,time_end,split\n\"tai chi\",-4_x,12,22,train\n",
            "test.csv": "label,youtube_id,time_start,time_end,split,is_cc\nabseiling,b,105,115,test,0\n"
                        "abseiling,b,105,115,test,0\n,c,1,11,test,0\n",
        },
        {
            "train": {"tai chi/-4_x_000012_000022": {"sentences": ["tai chi"], "duration": 10.0, "group": "-4_x"}},
            "test": {"abseiling/b_000105_000115": {"sentences": ["abseiling"], "duration": 10.0, "group": "b"}},
        },
        [1, 1, 1, 1, 0],
    ),
    "kinetics, one file": (
        "kinetics --data all.csv",
        {"all.csv": "label,youtube_id,time_start,time_end,split\nyoga,a,0,10,validate\nyoga,b,3,13,test\n"},
        {
            "val": {"a_000000_000010": {"sentences": ["yoga"], "duration": 10.0, "group": "a"}},
            "test": {"b_000003_000013": {"sentences": ["yoga"], "duration": 10.0, "group": "b"}},
        },
        [1, 1, 0, 0, 0],
    ),
    "something": (
        "something --test d.json",
        {"d.json": [{"id": "74225", "label": "spinning cube that quickly stops spinning",
                     "template": "Spinning [something] that quickly stops spinning", "placeholders": ["cube"]},
                    {"id": "116154", "label": "holding a cup in front of a tree",
                     "template": "Holding [something] in front of [something]", "placeholders": ["a cup", "a tree"]}]},
        {"test": {"74225": {"sentences": ["Spinning something that quickly stops spinning"]},
                  "116154": {"sentences": ["Holding something in front of something"]}}},
        [2, 2, 0, 0, 0],
    ),
    "moments": (
        "moments --test d.csv",
        {"d.csv": "clapping/yt-a_1.mp4,clapping,4,1\nadult+female+singing/b.mp4,adult+female+singing,3,0\n"},
        {"test": {"clapping/yt-a_1": {"sentences": ["clapping"], "extension": "mp4"},
                  "adult+female+singing/b": {"sentences": ["adult female singing"], "extension": "mp4"}}},
        [2, 2, 0, 0, 0],
    ),
    "table with splits and clips": (
        f"table --data d.tsv {COLUMNS} --start s --end t --split part",
        {"d.tsv": "v\ts\tt\tc\tpart\na.b.mp4\t0\t2.5\tone\ttrain\na.b.mp4\t2.5\t4\ttwo\tTest\n"
                  "a.b.mp4\t0\t2.5\tone\tTRAIN\nx/y\t1\t2\t\ttest\n"},
        {
            "train": {"a.b_0_2.5": PART | {"sentences": ["one"], "start": 0.0, "end": 2.5}},
            "test": {"a.b_2.5_4": PART | {"sentences": ["two"], "start": 2.5, "end": 4.0}},
        },
        [1, 1, 0, 1, 0],
    ),
    "table in CSV, JSON and JSON Lines": (
        f"table --train a.json --val b.jsonl --test c.csv {COLUMNS}",
        {
            "a.json": [{"v": "clip.mp4", "c": "x", "other": None}],
            "b.jsonl": '{"v": 7, "c": ["x", "y"]}\n\n{"v": "Q.v2", "c": "z"}\n',
            "c.csv": '\ufeffc,v\n"say ""hi"", then\nleave",007\n',
        },
        {
            "train": {"clip": {"sentences": ["x"], "extension": "mp4"}},
            "val": {"7": {"sentences": ["x", "y"]}, "Q.v2": {"sentences": ["z"]}},
            "test": {"007": {"sentences": ['say "hi", then\nleave']}},
        },
        [1, 1, 0, 0, 0],
    ),
    "quotation marks in tab-separated tables": (
        f"table --train d.txt --test d.tsv {COLUMNS}",
        {"d.tsv": 'v\tc\na\t"Stop" he shouts\nb\t"an unclosed quote\nc\tclosed here" again\nd\t"all of it"\n'
                  'e\t"""Stop"" he writes"\n',  # as spreadsheet programs write it
         "d.txt": '\ufeff"v"\t"c"\n"a"\t"say ""hi""\tnow"\n'},
        {"train": {"a": {"sentences": ['say "hi"\tnow']}},
         "test": {name: {"sentences": [text]} for name, text in [
            ("a", '"Stop" he shouts'), ("b", '"an unclosed quote'), ("c", 'closed here" again'), ("d", '"all of it"'),
            ("e", '"Stop" he writes'),
        ]}},
        [5, 5, 0, 0, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "files", "expected", "numbers"), CASES.values(), ids=CASES)
def test_formats(
    tmp_path: Path, convert: Convert, words: str, files: Any, expected: dict[str, Any], numbers: list[int]
) -> None:
    printed = convert(words, files)
    assert {path.stem for path in (tmp_path / "out").iterdir()} == expected.keys()
    assert {split: written(tmp_path, split) for split in expected} == expected
    assert [list(written(tmp_path, split)) for split in expected] == [list(videos) for videos in expected.values()]
    assert counts(printed, "test") == numbers


def test_rows_over_several_lines_are_reported(convert: Convert, caplog: pytest.LogCaptureFixture) -> None:
    """Two marks that were never closed look like one caption; nothing in the file tells them apart."""
    convert(f"table --test d.csv {COLUMNS}", {"d.csv": 'v,c\na,x\nb,"he said\nc,she said"\n'})
    assert "d.csv: 1 rows" in caplog.text and "in line 3" in caplog.text


def test_webvid_keeps_no_more_than_hashes_in_memory(tmp_path: Path) -> None:
    rows, caption = 2000, "a long caption of a short video " * 8
    text = "videoid,name\n" + "".join(f"{row},{caption} {row}\n" for row in range(rows))
    options = {"train": save(tmp_path / "w.csv", text), "val": None, "test": None, "nested": False}
    tracemalloc.start()
    try:
        write_splits(FORMATS["webvid"].read(options), tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(json.loads((tmp_path / "train.json").read_text())) == rows
    assert peak < len(text) / 3


def test_a_pickle_runs_nothing(tmp_path: Path, convert: Convert) -> None:
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    content = pickle.dumps({"a_1_2": [["x"]], "b": Evil()})
    files = {"ids.txt": "a_1_2", "c.pkl": content}
    assert "nothing was run" in convert("msvd --captions c.pkl --test ids.txt", files, code=2)
    assert not canary.exists() and not (tmp_path / "out").exists()
    assert pickle.loads(content) and canary.exists(), "the same pickle does run where it is allowed to"


# ---- what all formats have in common ----

TABLE = f"table --test t.csv {COLUMNS}"


def test_all_splits_are_written_or_none(tmp_path: Path, convert: Convert) -> None:
    def convert_rows(train: str, test: str, *more: str, code: int = 0) -> str:
        files = {"a.csv": f"v,c\n{train}\n", "b.csv": f"v,c\n{test}\n"}
        return convert(" ".join(["table --train a.csv --test b.csv", COLUMNS, *more]), files, code)

    assert "no video has a caption" in convert_rows("a,", "b, ", code=2)
    convert_rows("a,old", "b,old")
    assert "--overwrite" in convert_rows("a,new", "b,new", code=2)
    assert "b.csv: line 3" in convert_rows("a,new", "b,new\n../b,out", "--overwrite", code=2)
    assert [written(tmp_path, split) for split in ("train", "test")] == [
        {"a": {"sentences": ["old"]}}, {"b": {"sentences": ["old"]}},
    ]  # fmt: skip
    convert_rows("a,new", "b,new", "--overwrite")
    assert written(tmp_path, "test") == {"b": {"sentences": ["new"]}}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.json", "test.json"}
    source = save(tmp_path / "out/train.json", {"v_a": {"sentences": [" x"]}})
    assert "out/train.json" in convert(f"activitynet --train {source} --overwrite", code=2)
    assert json.loads(source.read_text()) == {"v_a": {"sentences": [" x"]}}


def test_files_are_counted_as_training_finds_them(tmp_path: Path, convert: Convert) -> None:
    videos = tmp_path / "videos"
    (videos / "deep").mkdir(parents=True)
    for name in ("a.MP4", "b.txt", "c.avi", "deep/d.MTS", "e.mp4"):
        (videos / name).touch()
    table = {"t.csv": "v,c\na,1\nb,2\nc.mp4,3\ndeep/d,4\nno/f,5\n"}
    printed = convert(f"{TABLE} --videos {videos}", table)
    assert counts(printed, "test") == [5, 5, 0, 0, 0, 2]
    assert f"no file for 3 of them in {videos}, such as b, c.mp4, no/f" in printed
    clips = {"t.csv": "v,c,s,t\ne,1,0,1\ng,2,0,1\n"}
    assert counts(convert(f"{TABLE} --start s --end t --overwrite --videos {videos}", clips), "test")[-1] == 1
    assert "nowhere" in convert(f"{TABLE} --overwrite --videos nowhere", table, code=2)


def test_help_of_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    for name, known in FORMATS.items():
        assert main(["convert", name, "--help"]) == 0
        told = capsys.readouterr().out
        assert all(flag in told for flag in ["--overwrite", *known.flags])
    assert main(["convert", "msrvt"]) == 2 and "msrvtt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "content", "told"),
    [
        ("msrvtt --data f", "[]", ["f: ", "object", "[]"]),
        ("msrvtt --data f", {"annotations": [{"image_id": "a", "caption": "b"}]}, ["annotations: entry 1", "split"]),
        ("msrvtt --test f", "video_id\nv\n", ["f: ", "sentence", "--data"]),
        ("msrvtt --test f", 'video_id,sentence\nu,t\nv,"x\nw,y\n', ["f: line 3", "quotation mark"]),
        ("activitynet --test f", {"v_a": {"sentences": [3]}}, ["video 'v_a': \"sentences\", entry 1", "got 3"]),
        ("activitynet --test f", {"v_a": {"sentences": ["a"], "timestamps": []}}, ["got 0 for 1"]),
        ("activitynet --test f", {"v_a": {"sentences": ["a"], "duration": -1}}, ['"duration"', "-1"]),
        ("activitynet --train-ids f", ["a"], ["--train FILE"]),
        ("msvd --test /dev/null --captions f", "no pickle", ["f: expected a pickle"]),
        ("clipvip --test f", '{"clip_id": "a", "text": "b"}\n{"clip_id"', ["f: line 2", "not JSON"]),
        ("didemo --train f", [{"annotation_id": 1, "video": "a", "description": "b", "times": [[3, 1]]}],
         ["entry 1: 'times'", "[3, 1]"]),
        ("youcook2 --data f", {"database": {"a": {"subset": "x", "recipe_type": 1, "annotations": PARTS}}},
         ["video 'a'", "'x'"]),
        ("youcook2 --data f",
         {"database": {"a": {"subset": "testing", "recipe_type": "1", "annotations": [{"id": 0, "segment": [2, 1]}]}}},
         ["video 'a': annotations: entry 1: 'segment'", "[2, 1]"]),
        ("youcook2 --data f",
         {"database": {"a": {"subset": "testing", "recipe_type": "1", "annotations": [*PARTS, PARTS[1] | {"id": 0}]}}},
         ["entry 3", "other times"]),
        ("lsmdc --val f", "a\tb\n", ["line 1", "expected 6 columns", "got 2"]),
        ("lsmdc --val f", "a\tb\tc\tx\te\tf\n", ["line 1", "00.01.59.370", "'x'"]),
        ("vatex --language en --test f --data f", {}, ["--language"]),
        ("ucf101 --test f", "Archery/v_Archery_g01_c01.avi\nArchery\n", ["f: line 2", "'Archery'"]),
        ("hmdb51 --data f", "", ["f: holds no file <class>_test_split1.txt"]),
        ("kinetics --test f", "label,youtube_id,time_start,time_end\na,x,10,5\n", ["line 2", "'time_start'"]),
        ("kinetics --test f", "label,youtube_id,time_start,time_end\na,x,1,5\nB,x,1,5\n", ["line 2", "'a' and 'B'"]),
        ("something --test f", [{"id": "1"}], ["entry 1", "'template'"]),
        ("moments --train f", "a.mp4,25,197\n", ["line 1", "several", "25"]),
        ("moments --train f", "a.mp4,run,3\nb.mp4,run,jump\n", ["line 2", "several", "jump"]),
        ("webvid --train f", "videoid,caption\n", ["line 1", "'name'"]),
        ("webvid --train f", "videoid,name,duration\n1,a,soon\n", ["line 2", "'soon'"]),
        ("table V C --train f.csv", "v,d\n", ["line 1", "'c'", "v, d"]),
        ("table V C --train f.csv", "v,c\na,b, and c\n", ["line 2", "expected 2 columns, got 3"]),
        ("table V C --train f.csv", b"v,c\na,\xff\n", ["f.csv", "UTF-8"]),
        ("table V C --train f.csv", "v,c\na.mp4,x\na.mkv,y\n", ["line 3", "a.mp4 and a.mkv"]),
        ("table V C --train f.jsonl", '{"v": 1.5, "c": "x"}', ["line 1: \"video\"", "1.5"]),
        ("table V C --data f.csv", "v,c\n", ["--split"]),
        ("table V C --start s --end t --train f.csv", "v,c,s,t\na,b,x,1\n", ["line 2", "number", "'x'"]),
    ],
)  # fmt: skip
def test_wrong_input_is_told_with_its_place(
    tmp_path: Path, convert: Convert, words: str, content: Any, told: list[str]
) -> None:
    [name] = {word for word in words.split() if word in ("f", "f.csv", "f.jsonl")}
    printed = convert(words.replace("V C", COLUMNS), {name: content}, code=2)
    assert all(fact in printed for fact in told), printed
    assert not list((tmp_path / "out").glob("*"))


KEYS = [
    "videos", "sentences", "annotations", "database", "video_id", "image_id", "caption", "subset", "recipe_type", "id",
    "segment", "videoID", "enCap", "annotation_id", "video", "description", "times", "timestamps", "duration",
    "clip_id", "text", "v", "c", "template",
]  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["a", "../x", "train", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, inner)),
    max_leaves=14,
)


@settings(deadline=None)
@given(
    content=JUNK,
    words=st.sampled_from([
        "msrvtt --data", "activitynet --test", "didemo --test", "youcook2 --data", "vatex --test", "clipvip --test",
        "msrvtt --test", "lsmdc --test", "webvid --test", "ucf101 --test", "kinetics --test", "something --test",
        "moments --test", f"table {COLUMNS} --split split --data",
    ]),
)  # fmt: skip
def test_junk_is_converted_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, words: str, content: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = save(folder / "junk.jsonl", json.dumps(content))
    code = main(["convert", *words.split(), str(path), "-o", str(folder / "junk"), "--overwrite"])
    assert code in (0, 2), "anything but a UserError would have been raised"
    if code == 0:
        assert all(load_annotations(made) for made in (folder / "junk").glob("*.json"))
