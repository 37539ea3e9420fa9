"""`adaclip index` run again while the page is served."""

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import write_frames, write_video
from serving import Server, about, axis, row, running, write_small_index

from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.json_lines import JsonLines
from adaclip_finetune.search.serve.engine import NotReady
from adaclip_finetune.search.serve.library import Library
from adaclip_finetune.search.serve.media import Media, key_of
from adaclip_finetune.search.serve.worker import Worker
from adaclip_finetune.search.stored import read_index, write_index

PATIENCE = 20  # seconds


@pytest.fixture(autouse=True)
def at_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "often", 0.0)
    monkeypatch.setattr(Library, "again", 0.0)


def until(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def names(server: Server, query: str = "q=1") -> list[str]:
    return [one["id"] for one in server.ask(f"/api/search?{query}").json.get("found", [])]


def test_a_new_index_takes_the_place_of_the_old_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    index = write_small_index(tmp_path, 3)
    with running(index) as server:
        before = server.ask("/api/search?q=1").json
        new = write_video(tmp_path / "videos" / "new.mp4", 50)
        rows = [*read_index(index.folder).videos[1:], row(new, "0.jpg")]
        write_index(index.folder, index.about, np.stack([axis(number) for number in (1, 2, 5)]), rows)
        assert until(lambda: names(server, "q=5")[0] == "new.mp4")
        after = server.ask("/api/search?q=1").json
        assert after["version"] != before["version"] == index.version
        assert {one["id"] for one in after["found"]} == {"video1.mp4", "video2.mp4", "new.mp4"}
        assert all(server.ask(one[place]).status == 200 for one in after["found"] for place in ("poster", "video"))
        gone = next(one for one in before["found"] if one["id"] == "video0.mp4")
        reply = server.ask(gone["video"])
        assert (reply.status, "search again" in reply.json["detail"]) == (404, True)
        assert server.ask("/api/status").json["videos"] == 3
    assert capfd.readouterr().out.count("was made anew; now it holds 3 videos") == 1


def test_the_old_one_answers_while_the_new_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path) -> VideoIndex:
        reads.append(path)
        assert gate.wait(PATIENCE)
        return made(path)

    gate, reads, made = threading.Event(), list[Path](), VideoIndex.load
    index = write_small_index(tmp_path, 3)
    monkeypatch.setattr(VideoIndex, "load", load)
    monkeypatch.setattr(Library, "patience", 0.05)
    with running(index) as server:
        stored = read_index(index.folder)
        write_index(index.folder, index.about, stored.vectors[:2], stored.videos[:2])
        answers = [server.ask("/api/search?q=1").json for _ in range(4)]
        assert [(answer["version"], len(answer["found"])) for answer in answers] == [(index.version, 3)] * 4
        gate.set()
        assert until(lambda: len(names(server)) == 2)
        assert reads == [index.folder]  # once


def test_one_that_cannot_be_read_leaves_the_old_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def told() -> str:
        errors.append(capfd.readouterr().err)
        return "".join(errors)

    index, errors, other = write_small_index(tmp_path, 3), list[str](), tmp_path / "other"
    stored, about_it = read_index(index.folder), index.folder / "index.json"
    with running(index) as server:
        other.write_text('{"format": "another/9"}')
        other.replace(about_it)
        assert until(lambda: len(names(server)) == 3 and "has the format 'another/9'" in told())
        about_it.unlink()
        assert until(lambda: len(names(server)) == 3 and "is no finished index" in told())
        assert [len(names(server)) for _ in range(5)] == [3] * 5
        write_index(index.folder, index.about, stored.vectors[:2], stored.videos[:2])
        assert until(lambda: len(names(server)) == 2)
    assert (told().count("another/9"), told().count("is no finished index")) == (1, 1)  # not at every look
    assert "Until then the page searches what was loaded before" in told() and "Traceback" not in told()


def test_one_of_another_model_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    index = write_small_index(tmp_path, 3)
    stored = read_index(index.folder)
    with running(index) as server:
        write_index(index.folder, replace(stored.about, fingerprint="e" * 64), stored.vectors, stored.videos)
        assert until(lambda: server.ask("/api/search?q=1").status == 503)
        message = server.ask("/api/search?q=1").json["detail"]
        assert "was made anew with another model (nowhere). Stop `adaclip serve`" in message
        status = server.ask("/api/status").json
        assert (status["state"], status["message"]) == ("failed", message)
        write_index(index.folder, stored.about, stored.vectors[:2], stored.videos[:2])  # and again with the first
        assert until(lambda: server.ask("/api/status").json["state"] == "ready")
        assert len(names(server)) == 2
        write_index(index.folder, replace(stored.about, fingerprint="e" * 64), stored.vectors, stored.videos)
        assert until(lambda: server.ask("/api/search?q=1").status == 503)
        (index.folder / "index.json").unlink()  # what is refused is not there any more
        assert until(lambda: len(names(server)) == 2)
    assert capfd.readouterr().err.count("was made anew with another model") == 2


def test_a_changed_video_is_another_one(tmp_path: Path) -> None:
    """A page that still shows the old one's moments does not play the new one from them."""
    index = write_small_index(tmp_path, 1)
    with running(index) as server:
        before = server.ask("/api/search?q=0").json["found"][0]
        path = index.videos[0].path
        write_video(path, 70)
        assert "run `adaclip index` again" in server.ask(before["video"]).json["detail"]
        write_index(index.folder, index.about, axis(0)[None], [row(path, "0.jpg")])
        after = until(lambda: [one for one in server.ask("/api/search?q=0").json["found"] if one != before])[0]
        assert server.ask(after["video"]).body == path.read_bytes()
        assert server.ask(before["video"]).status == 404


def test_a_file_changed_between_indexing_and_the_start(tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 1)
    write_video(index.videos[0].path, 70)
    write_index(index.folder, about(tmp_path), axis(0)[None], read_index(index.folder).videos)  # the same ids
    with running(index) as server:
        found = server.ask("/api/search?q=0").json["found"][0]
        for place in (found["video"], found["frames"][0]["picture"]):
            reply = server.ask(place)
            assert (reply.status, "was changed since it was indexed" in reply.json["detail"]) == (404, True)


def test_a_frame_that_is_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "my.index"
    folder.mkdir()
    frames = write_frames(tmp_path / "frames" / "video0", 40)
    indexed = row(frames, "") | dict(zip(("size", "mtime_ns"), _of_all(frames), strict=True))
    write_index(folder, about(tmp_path / "frames"), axis(0)[None], [indexed])
    with running(VideoIndex.load(folder)) as server:
        picture = server.ask("/api/search?q=0").json["found"][0]["frames"][1]["picture"]
        assert server.ask(picture).status == 200
        one = sorted(frames.iterdir())[30]
        one.write_bytes(one.read_bytes() + b"x")  # the folder itself does not tell of it
        assert "was changed since it was indexed" in server.ask(picture).json["detail"]


def test_before_it_is_opened_there_is_nothing(tmp_path: Path) -> None:
    library = Library(write_small_index(tmp_path, 1))
    with pytest.raises(NotReady, match="still being read"):
        _ = library.media
    shutil.rmtree(library.index.folder)
    library.open()
    assert len(library.media.index) == 1


def test_a_line_that_is_not_as_it_was_written(tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 2)
    stored = read_index(index.folder)
    lines = [{name: value for name, value in line.items() if name != "size"} for line in stored.videos]
    write_index(index.folder, stored.about, stored.vectors, lines)
    with running(VideoIndex.load(index.folder)) as server:
        reply = server.ask("/api/search?q=1")
        assert (reply.status, "not as adaclip writes it" in reply.json["detail"]) == (500, True)


def test_for_the_keys_no_line_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, original = list[int](), JsonLines.__getitem__
    monkeypatch.setattr(JsonLines, "__getitem__", lambda self, place: parsed.append(place) or original(self, place))
    index = write_small_index(tmp_path, 3)
    media = Media(index, Worker("frames", 1))
    assert parsed == []
    for video in index.videos:
        media.video(key_of(video))[0].close()


def _of_all(frames: Path) -> tuple[int, int]:
    found = [path.stat() for path in (frames, *frames.iterdir())]
    return sum(one.st_size for one in found[1:]), max(one.st_mtime_ns for one in found)
