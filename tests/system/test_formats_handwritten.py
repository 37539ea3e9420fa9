"""adaclip convert on formats of which no real file is at hand: every file here is hand-written after its format."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from converting import Convert, convert, counts, save, written
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip_finetune.cli import main
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.formats import webvid
from adaclip_finetune.data.formats.clip import Source
from adaclip_finetune.data.formats.write import write_splits

__all__ = ["convert"]  # a fixture: used by name


def test_table_with_splits_and_clips(tmp_path: Path, convert: Convert) -> None:
    text = (
        "v\ts\tt\tc\tpart\n"
        "a.b.mp4\t0\t2.5\tone\ttrain\n"
        "a.b.mp4\t2.5\t4\ttwo\tvalidation\n"
        "a.b.mp4\t0\t2.5\tone\tTRAIN\n"
        "x/y\t1\t2\t\tdev\n"
    )
    flags = ["--video-column", "v", "--caption-column", "c", "--start", "s", "--end", "t", "--split", "part"]
    printed = convert("table", "--data", save(tmp_path / "t.tsv", text), *flags)
    clip = {"sentences": ["one"], "start": 0.0, "end": 2.5, "extension": "mp4", "group": "a.b"}
    assert written(tmp_path, "train") == {"a.b_0_2.5": clip}
    assert written(tmp_path, "val") == {"a.b_2.5_4": clip | {"sentences": ["two"], "start": 2.5, "end": 4.0}}
    assert counts(printed, "train") == [1, 1, 1, 0, 0] and counts(printed, "val") == [1, 1, 0, 1, 0]
    assert "warning: train and val share 1 source videos, such as 'a.b'" in printed


def test_table_in_jsonl_and_csv(tmp_path: Path, convert: Convert) -> None:
    lines = save(tmp_path / "a.jsonl", '{"v": 7, "c": ["x", "y"]}\n\n{"v": "Q.v2", "c": "z"}\n')
    rows = save(tmp_path / "b.csv", '\ufeffc,v\n"say ""hi"", then\nleave",007\n')
    convert("table", "--train", lines, "--val", rows, "--video-column", "v", "--caption-column", "c")
    assert written(tmp_path, "train") == {"7": {"sentences": ["x", "y"]}, "Q.v2": {"sentences": ["z"]}}
    assert written(tmp_path, "val") == {"007": {"sentences": ['say "hi", then\nleave']}}


DIDEMO = [
    {"annotation_id": 1, "video": "1@N01_2.mov", "description": "the dog turns ", "times": [[2, 3], [1, 1], [1, 1]],
     "num_segments": 6, "dl_link": "x"},
    {"annotation_id": 2, "video": "b.avi", "description": "a cat.", "times": [[0, 0]]},
    {"annotation_id": 3, "video": "1@N01_2.mov", "description": "the dog turns", "times": [[1, 1]]},
    {"annotation_id": 3, "video": "1@N01_2.mov", "description": "the dog turns", "times": [[1, 1]]},
    {"annotation_id": 4, "video": "c.mov", "description": "left out", "times": [[0, 5]]},
]  # fmt: skip


def test_didemo(tmp_path: Path, convert: Convert) -> None:
    data = save(tmp_path / "d.json", DIDEMO)
    listed = save(tmp_path / "l.txt", "b.avi.mp4\n1@N01_2\nzz.mp4\n")
    printed = convert("didemo", "--train", data, "--test", data, "--test-ids", listed)
    paragraph = {"sentences": ["the dog turns.", "the dog turns."], "timestamps": [[5.0, 10.0], [5.0, 10.0]]}
    cat = {"sentences": ["a cat."], "timestamps": [[0.0, 5.0]]}
    assert written(tmp_path, "train") == {
        "1@N01_2": paragraph | {"extension": "mov"},
        "b": cat | {"extension": "avi"},
        "c": {"sentences": ["left out."], "timestamps": [[0.0, 30.0]], "extension": "mov"},
    }
    assert written(tmp_path, "test") == {"1@N01_2": paragraph | {"extension": "mov"}, "b": cat | {"extension": "mp4"}}
    assert counts(printed, "train") == [3, 4, 1, 0, 0] and counts(printed, "test") == [2, 3, 1, 0, 1]


def test_youcook2(tmp_path: Path, convert: Convert) -> None:
    parts = [
        {"id": 0, "segment": [90, 102], "sentence": "spread margarine"},
        {"id": 1, "segment": [114, 127.5], "sentence": "place cheese"},
    ]
    database = {
        "GLd3aX16zBg": {"subset": "training", "recipe_type": "113", "duration": 241.62, "annotations": parts},
        "xxx": {"subset": "validation", "recipe_type": 7, "annotations": parts[:1]},
        "yyy": {"subset": "testing", "recipe_type": "7"},
    }
    printed = convert("youcook2", "--data", save(tmp_path / "d.json", {"database": database}))
    group = "training/113/GLd3aX16zBg"
    assert written(tmp_path, "train") == {
        f"{group}_0": {"sentences": ["spread margarine"], "start": 90.0, "end": 102.0, "group": group},
        f"{group}_1": {"sentences": ["place cheese"], "start": 114.0, "end": 127.5, "group": group},
    }
    assert list(written(tmp_path, "val")) == ["validation/7/xxx_0"]
    assert not (tmp_path / "out/test.json").exists() and counts(printed, "test") == [0, 0, 0, 0, 0]


LSMDC = (
    "0001_American_Beauty_00.00.51.926-00.00.54.129\t00.00.51.926\t00.00.54.129\t00.00.51.426\t00.00.54.629\t"
    'He says "no.\n'
    "0001_American_Beauty_00.01.00.000-00.01.04.000\t00.01.00.000\t00.01.04.000\t00.01.00.000\t00.01.04.000\tHe sits.\n"
    "0001_American_Beauty_00.00.51.926-00.00.54.129\t00.00.51.926\t00.00.54.129\t00.00.51.426\t00.00.54.629\tHe goes.\n"
)


def test_lsmdc(tmp_path: Path, convert: Convert) -> None:
    data = save(tmp_path / "train.csv", LSMDC)
    convert("lsmdc", "--train", data)
    movie, clip = "0001_American_Beauty", "0001_American_Beauty_00.00.51.926-00.00.54.129"
    train = written(tmp_path, "train")
    assert train[clip] == {"sentences": ['He says "no.', "He goes."], "duration": 3.203, "group": movie}
    assert len(train) == 2
    convert("lsmdc", "--train", data, "--nested", "--overwrite")
    assert next(iter(written(tmp_path, "train"))) == f"{movie}/{clip}"


VATEX = [
    {"videoID": "Ptf_2VRj-V0_000122_000132", "enCap": ["A man", "He lifts", "A man"], "chCap": ["一个人", "他"]},
    {"videoID": "b_000001_000011"},
]


@pytest.mark.parametrize(("language", "sentences"), [("en", ["A man", "He lifts"]), ("zh", ["一个人", "他"])])
def test_vatex(tmp_path: Path, convert: Convert, language: str, sentences: list[str]) -> None:
    printed = convert("vatex", "--val", save(tmp_path / "v.json", VATEX), "--language", language)
    assert written(tmp_path, "val") == {
        "Ptf_2VRj-V0_000122_000132": {"sentences": sentences, "duration": 10.0, "group": "Ptf_2VRj-V0"}
    }
    assert counts(printed, "val") == [1, 2, int(language == "en"), 1, 0]


def test_vatex_with_lists(tmp_path: Path, convert: Convert) -> None:
    data = save(tmp_path / "ref_captions.json", {"a_000001_000002": ["x"], "b_000001_000011": ["y", "z"]})
    printed = convert("vatex", "--data", data, "--test", save(tmp_path / "test_list.txt", "b_000001_000011\nc\n"))
    assert written(tmp_path, "test") == {"b_000001_000011": {"sentences": ["y", "z"], "duration": 10.0, "group": "b"}}
    assert counts(printed, "test") == [1, 2, 0, 0, 1]


def test_clipvip(tmp_path: Path, convert: Convert) -> None:
    text = (
        '{"clip_id": "a.3.mp4", "text": "x"}\n{"clip_id": "b", "text": ["y", "z"]}\n{"clip_id": "a.3", "text": "w"}\n'
    )
    convert("clipvip", "--train", save(tmp_path / "t.jsonl", text))
    assert written(tmp_path, "train") == {
        "a.3": {"sentences": ["x", "w"], "extension": "mp4"},
        "b": {"sentences": ["y", "z"]},
    }


WEBVID = (
    "videoid,name,page_idx,page_dir,duration,contentUrl\n"
    "001,Kid on a swing,3,000001_000050,PT00H01M15S,https://x\n"
    '20,"Sea, waves",3,000051_000100,,https://x\n'
    "001,Kid on a swing,3,000001_000050,PT00H01M15S,https://x\n"
    "20,Waves,3,000051_000100,PT2.5S,https://x\n"
    "30,,3,000051_000100,PT2S,https://x\n"
    "1,one,3,000051_000100,PT2S,https://x\n"
)


def test_webvid(tmp_path: Path, convert: Convert) -> None:
    data = save(tmp_path / "w.csv", WEBVID)
    printed = convert("webvid", "--train", data)
    assert written(tmp_path, "train") == {
        "1": {"sentences": ["one"], "duration": 2.0},
        "001": {"sentences": ["Kid on a swing"], "duration": 75.0},
        "20": {"sentences": ["Sea, waves", "Waves"]},
    }
    assert counts(printed, "train") == [3, 4, 1, 1, 0]
    convert("webvid", "--train", data, "--nested", "--overwrite")
    assert set(written(tmp_path, "train")) == {"000001_000050/001", "000051_000100/20", "000051_000100/1"}


def test_webvid_takes_no_more_than_its_hashes_in_memory(tmp_path: Path) -> None:
    rows = 8000
    name = "a long caption of a short video " * 8
    data = save(tmp_path / "w.csv", "videoid,name\n" + "".join(f"{row},{name} {row}\n" for row in range(rows)))
    clips = webvid._clips(data, nested=False)
    tracemalloc.start()
    try:
        write_splits({"train": Source(clips)}, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(json.loads((tmp_path / "train.json").read_text())) == rows
    assert peak < data.stat().st_size / 3, "the file does not stand in memory"


@pytest.mark.parametrize(
    ("words", "name", "content", "told"),
    [
        ("table V C --train", "f.csv", "v,d\n", "line 1: expected .* column 'c', got v, d"),
        ("table V C --train", "f.csv", "", "line 1: expected .* got nothing"),
        ("table V C --train", "f.csv", "v,x,c\na,b\n", "line 2: expected 3 columns, got 2"),
        ("table V C --train", "f.xls", "", "expected a file named .csv"),
        ("table V C --train", "f.jsonl", "[1]\n", "line 1: expected an object"),
        ("table V C --train", "f.jsonl", '{"v": 1.5, "c": "x"}', "line 1: video: expected"),
        ("table V C --split s --data", "f.csv", "v,c,s\na,b,x\n", "line 2: .* got 'x'"),
        ("table V C --data", "f.csv", "v,c\n", "--data and --split belong together"),
        ("table V C --start s --train", "f.csv", "", "--start and --end belong"),
        ("table V C --start s --end t --train", "f.csv", "v,c,s,t\na,b,2,1\n",
         "line 2: expected an end after the start, got 2 to 1"),
        ("table V C --start s --end t --train", "f.csv", "v,c,s,t\na,b,x,1\n",
         "line 2: start: expected a number of seconds from 0 up, got 'x'"),
        ("table V C --start s --end t --train", "f.csv", "v,c,s,t\n ,b,1,2\n", "line 2: this name is empty"),
        ("didemo --train", "f.json", {}, "expected a list of"),
        ("didemo --train", "f.json", [{"annotation_id": 1, "video": "a", "description": "b", "times": [[3, 1]]}],
         "entry 1: 'times': expected .first, last. segment"),
        ("youcook2 --data", "f.json", {"database": {"a": {"subset": "x"}}}, "video 'a': 'subset': expected training"),
        ("youcook2 --data", "f.json",
         {"database": {"a": {"subset": "testing", "recipe_type": "1", "annotations": [{"id": 0, "segment": [2, 1]}]}}},
         "video 'a': annotation 1: 'segment': expected an end after the start"),
        ("lsmdc --val", "f.csv", "a\tb\n", r"line 1: expected 6 columns with tabs between them \(clip_id, .* got 2"),
        ("lsmdc --val", "f.csv", "a\tb\tc\tx\te\tf\n", "line 1: expected a time such as 00.01.59.370, got 'e'"),
        ("vatex --test", "f.json", [{"enCap": []}], "entry 1: expected 'videoID'"),
        ("vatex --test", "f.json", [{"videoID": "a", "enCap": "b"}], "entry 1: expected a list of texts, got 'b'"),
        ("webvid --train", "f.csv", "videoid,caption\n", "line 1: expected a header with the column 'name'"),
        ("webvid --train", "f.csv", "videoid,name,duration\n1,a,soon\n", "line 2: expected a duration .* got 'soon'"),
        ("clipvip --train", "f.jsonl", '{"clip_id": 3, "text": "x"}', "line 1: 'clip_id': expected a text, got 3"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_with_its_place(
    tmp_path: Path, convert: Convert, words: str, name: str, content: Any, told: str
) -> None:
    printed = convert(
        *words.replace("V C", "--video-column v --caption-column c").split(), save(tmp_path / name, content), code=2
    )
    assert re.search(told, printed), printed
    assert not list((tmp_path / "out").glob("*"))


def known(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Objects with some of the keys that formats have."""
    keys = "videos sentences annotations database video_id image_id caption url split subset recipe_type id segment"
    more = "videoID enCap annotation_id video description times timestamps duration sentence clip_id text v c"
    return st.fixed_dictionaries({}, optional=dict.fromkeys(f"{keys} {more}".split(), inner))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a", "../x", "train", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3) | known(inner),
    max_leaves=14,
)


@settings(deadline=None, max_examples=60)
@given(content=JUNK)
@pytest.mark.parametrize(
    "words",
    [
        "msrvtt --data", "activitynet --test", "didemo --test", "youcook2 --data", "vatex --test", "clipvip --test",
        "msrvtt --test", "lsmdc --test", "webvid --test",
        "table --video-column v --caption-column c --split split --data",
    ],
)  # fmt: skip
def test_junk_is_converted_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, words: str, content: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    path = save(folder / "junk.jsonl", json.dumps(content))
    code = main(["convert", *words.split(), str(path), "-o", str(folder / "junk"), "--overwrite"])
    assert code in (0, 2), "anything but a UserError would have been raised"
    if code == 0:
        for made in (folder / "junk").glob("*.json"):
            assert load_annotations(made)
