"""Annotation files: right ones are read as they are, wrong ones are refused with file, video and value."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaclip_finetune.cli import main
from adaclip_finetune.data.annotations import KEYS, VideoAnnotation, load_annotations, same_captions, sound_entries
from adaclip_finetune.errors import UserError


def write(folder: Path, content: Any) -> Path:
    path = folder / "annot.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")  # a byte order mark is no content
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
        "tags": [["order", "two things"], []],
        "metadata": {"season": 3, "length": 1.5, "live": True, "title": "A dog", "people": ["Ann", "Ben"]},
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
            tags=(("order", "two things"), ()),
            metadata={"season": 3, "length": 1.5, "live": True, "title": "A dog", "people": ["Ann", "Ben"]},
        ),
        VideoAnnotation("deep/er", ("b",)),
    ]


def test_the_same_captions_are_recognised_under_another_name_and_with_tags(tmp_path: Path) -> None:
    entries: dict[str, Any] = {"a": {"sentences": ["x", "y"]}, "b": {"sentences": ["z"]}}
    plain = write(tmp_path, entries).rename(tmp_path / "plain.json")
    entries["a"]["tags"] = [["order"], []]
    assert same_captions(plain, write(tmp_path, entries))
    entries["b"]["sentences"] = ["other"]
    assert not same_captions(plain, write(tmp_path, entries))


@pytest.mark.parametrize(
    "name",
    ["../../x", "a/../../x", "..", ".", " ", "/etc/passwd", "C:x", "a//b", "a/", "a\0b", "..\\x", "\ud800"],
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, {"good": {"sentences": ["x"]}, name: {"sentences": ["x"]}})
    with pytest.raises(UserError, match=r"annot\.json: video .*this name"):
        load_annotations(path)


def test_odd_but_harmless_names_and_captions_are_kept(tmp_path: Path) -> None:
    names = ["0WjR.3", "-dash", "a b'\"$(x);", "日本", "line\nbreak", "...", "a..b", "x" * 300]
    names += ["v0.mp4", "v0.mkv", "v0.1", "V0"]  # files that differ in their extension are two videos
    captions = ("a\u200bb", "👩‍🚀", "हिन्दी", "\u0e01\u0e33", "7")
    path = write(tmp_path, {name: {"sentences": captions} for name in names})
    assert load_annotations(path) == [VideoAnnotation(name, captions) for name in names]
    assert load_annotations(path, data_subset=2) == load_annotations(path)[:2]


@pytest.mark.parametrize(
    ("one", "other"), [("v0", "v0.mp4"), ("v0.MTS", "v0"), ("caf\xe9", "cafe\u0301"), ("caf\xe9.mp4", "cafe\u0301")]
)
def test_two_names_of_one_video_are_refused_with_both(tmp_path: Path, one: str, other: str) -> None:
    path = write(tmp_path, {"a": {"sentences": ["x"]}, one: {"sentences": ["x"]}, other: {"sentences": ["y"]}})
    with pytest.raises(UserError, match="same video") as caught:
        load_annotations(path)
    assert ascii(one) in str(caught.value) and ascii(other) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "facts"),
    [
        (["x"], ["object"]),
        ({}, ['"sentences"']),
        ({"sentences": "a dog"}, ['"sentences"', "list", "'a dog'"]),
        ({"sentences": []}, ['"sentences"', "at least 1"]),
        ({"sentences": ["a", "\u200b\u2060\ufeff\x07\u00ad \u3164"]}, ['"sentences", entry 2', "blank"]),
        ({"sentences": ["a", "b", 3]}, ['"sentences", entry 3', "got 3"]),
        ({"sentences": ["\ud83d"]}, ['"sentences", entry 1']),
        ({"sentence": ["a"]}, ["'sentence'", "known are sentences"]),
        ({"sentences": ["a"], "start": -1}, ['"start"', "got -1"]),
        ({"sentences": ["a"], "end": "3"}, ['"end"', "number", "got '3'"]),
        ({"sentences": ["a"], "timestamps": [[0, 1], [0]]}, ['"timestamps", entry 2, entry 2']),
        ({"sentences": ["a"], "extension": "../mp4"}, ['"extension"', "'../mp4'"]),
        ({"sentences": ["a", "b"], "tags": [["order"]]}, ['"tags"', "each of the 2 sentences", "has 1"]),
        ({"sentences": ["a"], "metadata": ["x"]}, ['"metadata"', "['x']"]),
        ({"sentences": ["a"], "metadata": {"a b": 3}}, ['"metadata", "a b"', "letters"]),
        ({"sentences": ["a"], "metadata": {"season": None}}, ['"metadata", "season"', "got None"]),
        ({"sentences": ["a"], "tags": ["order"]}, ['"tags", entry 1', "'order'"]),
        ({"sentences": ["a"], "tags": [["(no tag)"]]}, ['"tags", entry 1, entry 1', "'(no tag)'"]),
    ],
)
def test_wrong_entries_name_file_video_and_value(tmp_path: Path, entry: Any, facts: list[str]) -> None:
    path = write(tmp_path, {"good": {"sentences": ["x"]}, "clip": entry})
    with pytest.raises(UserError) as caught:
        load_annotations(path)
    assert all(fact in str(caught.value) for fact in [f"{path}: video 'clip': ", *facts]), caught.value
    videos, problems = sound_entries(path)
    assert [video.video_id for video in videos] == ["good"] and problems == [str(caught.value)]


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("[]", "expected an object"),
        ('{"a": {"sentences": ["x"], "duration": NaN}}', "NaN"),
        ("{}", "holds no video"),
        ('{"a": {"sentences": ["x"]}}\n{"b": {"sentences": ["x"]}}', "Extra data in line 2"),
        ("[" * 200_000, "too deeply"),
        ('{"a": {"sentences": ["x"], "duration": 1' + "0" * 5000 + "}}", "integer"),
        ('{"a": {"sentences": ["x"]}, "a": {"sentences": ["y"]}}', '"a" appears twice'),
        ('{"a": {"sentences": ["x"], "sentences": ["y"]}}', '"sentences" appears twice'),
        ('{"a": {"sentences": ["é"]}}'.encode("latin-1"), "byte 22"),
        (None, "no such file"),
    ],
)
def test_wrong_files(tmp_path: Path, content: str | bytes | None, fact: str) -> None:
    path = tmp_path / "annot.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=rf"annot\.json.*{fact}"):
        load_annotations(path)


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("f.json", [{"mp4": "a", "caption": "x"}], "table --video-column NAME --caption-column NAME --train"),
        ("f.json", [{"videoID": "a", "enCap": ["x"]}], "vatex --train"),
        ("f.json", [{"annotation_id": 1, "video": "a", "description": "x"}], "didemo --train"),
        ("f.json", [{"id": "1", "template": "[x] falls", "placeholders": ["a cup"]}], "something --train"),
        ("f.json", {"videos": [], "sentences": []}, "msrvtt --data"),
        ("f.json", {"annotations": [], "images": []}, "msrvtt --train LIST --test LIST --data"),
        ("f.json", {"database": {}}, "youcook2 --data"),
        ("f.json", '{"clip_id": "a", "text": "x"}\n{"clip_id": "b", "text": "y"}\n', "clipvip --train"),
        ("f.jsonl", '{"video": "a", "caption": "x"}\n{"video": "b", "caption": "y"}\n', "table --video-column NAME"),
        (
            "f.jsonl",
            '{"video": "a", "sentences": ["x"]}\n{"video": "b", "sentences": []}',
            "table --video-column video --caption-column sentences",
        ),
        ("my table.csv", 'key,"video_id",text\n', "table --video-column NAME --caption-column NAME"),
    ],
)
def test_other_forms_are_met_with_the_command_that_converts_them(
    tmp_path: Path, name: str, content: Any, command: str
) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        load_annotations(path)
    told, _, words = str(caught.value).rpartition("adaclip ")
    assert told.startswith(f"{path}: ") and words.startswith(f"convert {command}")
    assert shlex.split(words)[-3:] == [str(path), "-o", "DIR"]


@pytest.mark.parametrize("name", ["f.json", "f.jsonl"])
def test_the_command_for_another_form_works(tmp_path: Path, name: str) -> None:
    rows = [{"video_id": "clip0.mp4", "caption": "x"}, {"video_id": "clip1.mp4", "caption": "y"}]
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name == "f.json" else "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        load_annotations(path)
    command = str(caught.value).rpartition("adaclip ")[2].replace("NAME", "video_id", 1).replace("NAME", "caption", 1)
    words = shlex.split(command)
    assert main([*words[:-1], str(tmp_path)]) == 0
    assert [video.sentences for video in load_annotations(tmp_path / "train.json")] == [("x",), ("y",)]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.sampled_from(["../x", "/", "a", "mp4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", *KEYS]), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=30)
@given(JSON.map(lambda junk: json.dumps(junk).encode()) | st.binary(max_size=60))
def test_junk_is_parsed_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "annot.json"
    path.write_bytes(content)
    try:
        videos = load_annotations(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert len(videos) == len(json.loads(content)) and all(video.sentences for video in videos)
