"""Tar shards: the same frames and captions as files in a folder, from an index of where the members are."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import write_video

from adaclip_finetune.config import load_config
from adaclip_finetune.data import tar_shards
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.frames import open_store
from adaclip_finetune.data.tar_shards import ShardCaptions, TarShards
from adaclip_finetune.data.video.folder import VideoFolder
from adaclip_finetune.errors import UserError

LONG = "long" * 40  # a name that takes a header of its own


def write_shard(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", 30)
    write_video(folder / "b.webm", 7, "libvpx-vp9")
    write_video(folder / "é.avi", 9, "mpeg4")
    write_video(folder / f"{LONG}.mkv", 5, shown=[0, 40, 500, 520, 900])
    return folder


@pytest.fixture
def shards(videos: Path, tmp_path: Path) -> Path:
    of = {path.stem: (path.name, path.read_bytes()) for path in videos.iterdir()}
    first = {"./a.json": b'{"caption": "an a", "width": 3}', f"./{of['a'][0]}": of["a"][1], "./a.txt": b" the text\n"}
    second = {of["b"][0]: of["b"][1], "b.json": json.dumps({"sentences": ["one", "two"]}).encode(), "notes.md": b"-"}
    third = {of[name][0]: of[name][1] for name in ("é", LONG)} | {f"{LONG}.json": b'{"caption": ["x", "y"]}'}
    for name, members in {"0": first, "1": second, "10": third}.items():
        write_shard(tmp_path / "shards" / f"{name}.tar", members)
    return tmp_path / "shards"


def test_videos_are_those_of_the_folder_pixel_by_pixel(videos: Path, shards: Path) -> None:
    folder, store = VideoFolder(videos), TarShards(shards)
    for path in videos.iterdir():
        for one in (store, pickle.loads(pickle.dumps(store))):
            for name in (path.stem, path.name):
                assert one.count(name) == folder.count(path.stem)
        times, expected = store.times(path.stem), folder.times(path.stem)
        assert (times is None and expected is None) or np.array_equal(times, expected)
        wanted = [3, 0, 4, 3]
        assert np.array_equal(store.read(path.stem, wanted), folder.read(path.stem, wanted))
        scans = [list(each.scan(path.stem)) for each in (store, folder)]
        assert len(scans[0]) == len(scans[1]) == folder.count(path.stem)
        assert all(i == j and np.array_equal(x, y) for (i, x), (j, y) in zip(*scans, strict=True))
    with pytest.raises(FrameError, match="no shard holds a video") as caught:
        store.count("gone")
    assert caught.value.kind == "missing"


def test_captions_come_in_the_order_of_the_shards_and_text_before_json(shards: Path) -> None:
    captions = ShardCaptions(TarShards(shards))
    found = [(video.video_id, video.sentences) for video in captions]
    assert found == [("a", ("the text",)), ("b", ("one", "two")), (LONG, ("x", "y"))]
    assert [(video.video_id, video.sentences) for video in pickle.loads(pickle.dumps(captions))] == found
    assert ShardCaptions(TarShards(shards)).digest == captions.digest
    first = ShardCaptions(TarShards(shards), at_most=1)
    assert len(first) == 1 and first[0] == captions[0] and first.digest != captions.digest


def test_the_index_is_remembered_until_a_shard_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indexed: list[str] = []
    index = tar_shards._index

    def noting(number: int, path: Path) -> Any:
        indexed.append(path.name)
        return index(number, path)

    monkeypatch.setattr(tar_shards, "_index", noting)
    assert np.array_equal(TarShards(shards).samples, TarShards(shards).samples)
    assert indexed == ["0.tar", "1.tar", "10.tar"]
    write_shard(shards / "1.tar", {"c.txt": b"new"})
    assert [video.video_id for video in ShardCaptions(TarShards(shards))] == ["a", "c", LONG]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert len(TarShards(shards).samples) == 4 and len(indexed) == 9


@pytest.mark.parametrize(("members", "told"), [
    ({"a.txt": b"x", "a.mp4": b"", "a.webm": b""}, "two members video of the key 'a'"),
    ({"b.mp4": b"", "b.txt": b"x"}, r"0\.tar and 9\.tar hold samples of one key"),
])  # fmt: skip
def test_a_key_that_occurs_twice_is_refused(members: dict[str, bytes], told: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/0.tar", {"b.txt": b"x"})
    write_shard(tmp_path / "shards/9.tar", members)
    with pytest.raises(UserError, match=told):
        TarShards(tmp_path / "shards")


@pytest.mark.parametrize(("name", "content", "told"), [
    ("x.json", b"[]", 'expected an object with "caption" or "sentences"'),
    ("x.json", b'{"width": 3}', 'expected an object with "caption" or "sentences"'),
    ("x.json", b'{"caption": 3}', '"sentences"'),
    ("x.json", b"{", "not JSON"),
    ("x.txt", b" ", "blank"),
    ("x.txt", b"\xff", "not UTF-8 at byte 0"),
    ("../x.txt", b"x", "leads out of the folder"),
])  # fmt: skip
def test_a_wrong_caption_is_refused_with_its_shard_and_member(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    write_shard(tmp_path / "shards/0.tar", {"a.txt": b"sound", name: content})
    captions = ShardCaptions(TarShards(tmp_path / "shards"))
    assert captions[0].sentences == ("sound",)
    with pytest.raises(UserError, match=rf"0\.tar: .*x\.(json|txt).*{told}|0\.tar.*{told}"):
        captions[1]


def test_what_is_no_plain_tar_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match=r"0\.tar: cannot be read as a plain tar file"):
        TarShards(folder)
    whole = write_shard(folder / "0.tar", {"a.txt": b"x" * 5000, "b.txt": b"y" * 5000})
    os.truncate(whole, 3000)
    with pytest.raises(UserError, match=r"0\.tar: cannot be read as a plain tar file"):
        TarShards(folder)
    write_shard(whole, {"a.md": b"x"})
    with pytest.raises(UserError, match="holds a caption"):
        ShardCaptions(TarShards(folder))


def test_a_damaged_video_is_named_with_its_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "shards/0.tar", {"a.mp4": b"", "b.mp4": b"no video"})
    store = TarShards(tmp_path / "shards")
    for name, told in {"a": "the file is empty", "b": "no video of a known kind"}.items():
        with pytest.raises(FrameError, match=told) as caught:
            store.read(name, [0])
        assert caught.value.path == tmp_path / "shards/0.tar"


def test_a_folder_is_read_as_shards_if_it_holds_nothing_else(videos: Path, shards: Path) -> None:
    config = load_config(None, {"video_dir": str(shards)})
    assert isinstance(open_store(config, []), TarShards)
    (shards / "a.mp4").write_bytes((videos / "a.mp4").read_bytes())  # an archive beside the videos that came out of it
    assert isinstance(open_store(config, []), VideoFolder)
    (shards / "a.mp4").unlink()
    (shards / "below").mkdir()
    assert isinstance(open_store(config, []), VideoFolder)
