"""Annotation files: good ones are read as they stand, bad ones are refused with file, video and value."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip_finetune.data.annotations import KEYS, VideoAnnotation, load_annotations
from adaclip_finetune.errors import UserError


def write(folder: Path, content: Any) -> Path:
    path = folder / "annot.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_key_is_kept(tmp_path: Path) -> None:
    entry = {
        "sentences": [" a dog runs.", "it stops "],
        "extension": ".MP4",
        "timestamps": [[0, 1.5], [1.5, 3]],
        "duration": 3,
        "start": 10.5,
        "end": 13.5,
        "group": "source-1",
    }
    path = write(tmp_path, {"v_x-1.2": entry, "deep/er": {"sentences": ["b"]}})
    assert load_annotations(path) == [
        VideoAnnotation(
            "v_x-1.2",
            ("a dog runs.", "it stops"),
            "mp4",
            ((0.0, 1.5), (1.5, 3.0)),
            duration=3.0,
            start=10.5,
            end=13.5,
            group="source-1",
        ),
        VideoAnnotation("deep/er", ("b",)),
    ]


def test_data_subset_keeps_the_first(tmp_path: Path) -> None:
    path = write(tmp_path, {name: {"sentences": [name]} for name in "cab"})
    assert [video.video_id for video in load_annotations(path, data_subset=2)] == ["c", "a"]
    assert len(load_annotations(path, data_subset=0)) == 3
    assert len(load_annotations(path, data_subset=99)) == 3


def test_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "annot.json"
    path.write_text('{"a": {"sentences": ["é"]}}', encoding="utf-8-sig")
    assert load_annotations(path)[0].sentences == ("é",)


@pytest.mark.parametrize(
    "name",
    [
        "../../x", "a/../../x", "..", ".", "", " ", "/etc/passwd", "C:/x", "C:x", "//server/x", "a//b", "a/", "./a",
        "a\0b", "..\\..\\x", "a\\b", "\ud800",
    ],
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {"good": {"sentences": ["x"]}, name: {"sentences": ["x"]}})
    with pytest.raises(UserError, match=r"annot\.json: video .*this name"):
        load_annotations(path)


@pytest.mark.parametrize("name", ["0WjR.3", "-dash", "a b'\"$(x);", "日本", "line\nbreak", "...", "a..b", "x" * 300])
def test_odd_but_harmless_names_are_kept(tmp_path: Path, name: str) -> None:
    assert load_annotations(write(tmp_path, {name: {"sentences": ["x"]}}))[0].video_id == name


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["x"], "expected an object"),
        ({}, 'has no "sentences"'),
        ({"sentences": "a dog"}, "must be a list of strings, got 'a dog'"),
        ({"sentences": []}, "is empty"),
        ({"sentences": ["a", " \t"]}, "sentence 2 of 2"),
        ({"sentences": ["a", "b", 3]}, "sentence 3 of 3 .* got 3"),
        ({"sentences": ["\ud83d"]}, "sentence 1 of 1"),
        ({"sentence": ["a"]}, "unknown key 'sentence'; did you mean 'sentences'"),
        ({"sentences": ["a"], "foo": 1}, "unknown key 'foo'; known are"),
        ({"sentences": ["a"], "duration": float("nan")}, '"duration" must be a number'),
        ({"sentences": ["a"], "duration": True}, '"duration" must be a number'),
        ({"sentences": ["a"], "start": -1}, '"start" must be a number'),
        ({"sentences": ["a"], "end": "3"}, '"end" must be a number'),
        ({"sentences": ["a"], "timestamps": [[0]]}, '"timestamps" must be a list'),
        ({"sentences": ["a"], "timestamps": {"a": 1}}, '"timestamps" must be a list'),
        ({"sentences": ["a"], "extension": "../mp4"}, '"extension" must be like "mp4"'),
        ({"sentences": ["a"], "group": 5}, '"group" must be a string'),
    ],
)
def test_wrong_entries_name_file_video_and_value(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"annot\.json: video 'clip'.*{message}"):
        load_annotations(write(tmp_path, {"clip": entry}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object"),
        ("{}", "holds no video"),
        ("", "not JSON at line 1"),
        ('{"a": {"sentences": ["x"]},}', "not JSON at line 1, column"),
        ("[" * 200_000, "not JSON that can be read"),
        ('{"a": {"sentences": ["x"], "duration": 1' + "0" * 5000 + "}}", "not JSON that can be read"),
        ('{"a": {"sentences": ["x"]}, "a": {"sentences": ["y"]}}', "the video 'a' stands twice"),
        ('{"a": {"sentences": ["x"], "sentences": ["y"]}}', "video 'a': the key 'sentences' stands twice"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"annot\.json.*{message}"):
        load_annotations(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_annotations(tmp_path / "absent.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_annotations(tmp_path)
    path = tmp_path / "latin.json"
    path.write_bytes('{"a": {"sentences": ["é"]}}'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 22"):
        load_annotations(path)


def test_real_annotations(shared: Path) -> None:
    for path, count in [("panda70m/train.json", 92), ("panda70m/val.json", 20), ("msrvtt_frames/train.json", 1000)]:
        videos = load_annotations(shared / "data" / path)
        assert len(videos) == count and all(video.sentences[0] for video in videos)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["../x", "/", "a", "mp4"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.sampled_from(KEYS), inner, max_size=4)
        | st.fixed_dictionaries({"sentences": st.lists(st.text(min_size=1), min_size=1)}, optional={"start": inner})
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(content=st.dictionaries(st.text(), JSON, max_size=3) | JSON)
def test_junk_is_parsed_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = write(tmp_path_factory.getbasetemp(), json.dumps(content))
    try:
        videos = load_annotations(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert len(videos) == len(content) and all(video.sentences for video in videos)


@settings(deadline=None)
@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]":,a0.\\ud8', max_size=60).map(str.encode))
def test_random_bytes_are_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    try:
        load_annotations(path)
    except UserError as error:
        assert str(path) in str(error)
