"""The API behind the page: what it answers, and what it refuses."""

import io
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import index_of, write_frames, write_video
from PIL import Image
from serving import Axes, Server, about, axis, row, running, write_small_index

from adaclip_finetune.cli import main
from adaclip_finetune.data.frame_store import FrameStore
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.serve.address import is_loopback, listen, may_be_called, url
from adaclip_finetune.search.serve.engine import Engine
from adaclip_finetune.search.serve.media import key_of
from adaclip_finetune.search.serve.picture import MAX_BYTES, BadPicture, decode_picture
from adaclip_finetune.search.serve.ranges import Span, Unsatisfiable, parse_range
from adaclip_finetune.search.serve.rates import Rate
from adaclip_finetune.search.stored import write_index
from adaclip_finetune.search.videos import VideoFiles

TOKEN = "0123456789abcdef-_"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_small_index(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(index: VideoIndex) -> Iterator[Server]:
    with running(index, requests=Rate(1000, 10_000), queries=Rate(1000, 10_000)) as server:
        yield server


def picture(colour: tuple[int, int, int] = (30, 0, 0), kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, kind)
    return content.getvalue()


# What it answers


def test_a_search_by_text(server: Server, index: VideoIndex) -> None:
    answer = server.ask("/api/search?q=3").json
    assert (answer["page"], answer["pages"], answer["videos"]) == (1, 1, 5)
    assert [found["rank"] for found in answer["found"]] == [1, 2, 3, 4, 5]
    first = answer["found"][0]
    assert (first["id"], first["score"]) == ("video3.mp4", pytest.approx(1))
    assert first["captions"] == ["two dogs run"]
    assert [(frame["time"], frame["weight"]) for frame in first["frames"]] == [(0.2, 0.25), (1.2, 0.75)]
    assert (first["best"], first["duration"], first["path"]) == (1, 2.0, str(index.videos[3].path))


def test_a_search_by_picture(server: Server) -> None:
    for kind in ("PNG", "WEBP"):
        reply = server.ask("/api/search/image?k=2", "POST", picture((40, 0, 0), kind))
        assert [reply.status, reply.json["found"][0]["id"], len(reply.json["found"])] == [200, "video4.mp4", 2]


def test_pages_put_together_are_the_whole(server: Server) -> None:
    pages = [server.ask(f"/api/search?q=2&k=2&page={page}").json for page in (1, 2, 3, 4)]
    found = [one for page in pages for one in page["found"]]
    assert found[0]["id"] == "video2.mp4"
    assert sorted(one["id"] for one in found) == [f"video{number}.mp4" for number in range(5)]  # the others score alike
    assert [one["rank"] for one in found] == [1, 2, 3, 4, 5]
    assert [page["pages"] for page in pages] == [3, 3, 3, 3]
    assert pages[3]["found"] == []


def test_files_of_a_video(server: Server, index: VideoIndex) -> None:
    found = server.ask("/api/search?q=1").json["found"][0]
    video, poster = server.ask(found["video"]), server.ask(found["poster"])
    assert video.body == index.videos[1].path.read_bytes()
    assert (video.headers["content-type"], video.headers["accept-ranges"]) == ("video/mp4", "bytes")
    assert index.videos[1].thumb is not None
    assert (poster.body, poster.headers["content-type"]) == (index.videos[1].thumb.read_bytes(), "image/jpeg")
    frames = [server.ask(frame["picture"]) for frame in found["frames"]]
    assert [index_of(np.asarray(Image.open(io.BytesIO(frame.body)))) for frame in frames] == [5, 30]
    assert server.ask(f"/api/videos/{key_of(index.videos[1])}/frames/2").status == 404


@pytest.mark.parametrize("wanted", ["0-99", "100-", "-7", "0-0", "5-999999999"])
def test_a_range_is_that_part(server: Server, index: VideoIndex, wanted: str) -> None:
    content = index.videos[0].path.read_bytes()
    first, last = wanted.split("-")
    expected = content[-int(last) :] if not first else content[int(first) : int(last) + 1 if last else None]
    place = f"/api/videos/{key_of(index.videos[0])}/file"
    reply = server.ask(place, Range=f"bytes={wanted}")
    start = content.index(expected) if len(expected) > 50 else len(content) - 7 if not first else 0
    assert (reply.status, reply.body) == (206, expected)
    assert reply.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{len(content)}"
    whole = server.ask(place)
    assert server.ask(place, Range=f"bytes={wanted}", If_Range=whole.headers["etag"]).body == expected
    assert server.ask(place, Range=f"bytes={wanted}", If_Range='"another"').body == content


def test_a_range_that_is_not_there(server: Server, index: VideoIndex) -> None:
    size = index.videos[0].path.stat().st_size
    for wanted in (f"bytes={size}-", "bytes=-0", "bytes=99999999999-"):
        reply = server.ask(f"/api/videos/{key_of(index.videos[0])}/file", Range=wanted)
        assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{size}")


@pytest.mark.parametrize("header", ["bytes=9-3", "bytes=-", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "bytes=1" * 99])
def test_what_is_no_range_means_the_whole(header: str) -> None:
    assert parse_range(header, 10) is None


def test_ranges_at_the_edges() -> None:
    assert [parse_range(f"bytes={one}", 10) for one in ("9-", "-99", "0-9")] == [Span(9, 10), Span(0, 10), Span(0, 10)]
    with pytest.raises(Unsatisfiable):
        parse_range("bytes=0-", 0)


def test_the_page_and_what_it_loads(server: Server) -> None:
    kinds = {"/": "text/html", "/style.css": "text/css", "/script.js": "javascript", "/icon.svg": "image/svg+xml"}
    kinds |= {f"/{name}.js": "javascript" for name in ("cards", "player", "docs")} | {"/docs": "text/html"}
    for path, kind in kinds.items():
        reply = server.ask(path)
        assert (reply.status, kind in reply.headers["content-type"]) == (200, True)
        assert "http://" not in reply.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "unsafe" not in reply.headers["content-security-policy"]


def test_the_api_describes_itself_and_loads_nothing_from_elsewhere(server: Server) -> None:
    paths = server.ask("/openapi.json").json["paths"]
    assert {"/api/status", "/api/search", "/api/search/image", "/api/videos/{key}/file"} <= set(paths)
    assert server.ask("/redoc").status == 404


def test_refusals_are_as_the_api_says(server: Server) -> None:
    api = server.ask("/openapi.json").json
    refused = api["components"]["schemas"]["Refused"]["properties"]
    for methods in api["paths"].values():
        for operation in methods.values():
            assert set(operation["responses"]) <= {"200", "206", "default"}
            schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Refused"}
    for path in ("/api/search", "/api/nothing", "/api/videos/x/file", f"/api/videos/{'0' * 20}/file"):
        assert set(server.ask(path).json) == set(refused)


@pytest.mark.parametrize(
    ("path", "name"), [(".", "my.index"), ("thumbs/..", "my.index"), ("../latest.index", "latest.index")]
)
def test_an_index_has_a_name_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    index = write_small_index(tmp_path, 0)
    (tmp_path / "latest.index").symlink_to(index.folder)
    monkeypatch.chdir(index.folder)
    with running(VideoIndex.load(path)) as server:
        assert server.ask("/api/status").json["index"] == name


# What it refuses


@pytest.mark.parametrize(
    "query",
    ["", "q=", "q=%20", f"q={'a' * 501}", "q=1&page=0", "q=1&page=51", "q=1&page=x", "q=1&k=0", "q=1&k=51", "q=1&k=-1"],
)
def test_queries_out_of_bounds(server: Server, query: str) -> None:
    reply = server.ask(f"/api/search?{query}")
    assert reply.status == 422
    assert set(reply.json) == {"detail"}


def test_an_address_without_end(server: Server) -> None:
    assert server.ask(f"/api/search?q={'a' * 9000}").status == 414
    assert server.ask(f"/{'a' * 9000}").status == 414


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/api/videos/../../../etc/passwd",
        "/api/videos/..%2f..%2f..%2fetc%2fpasswd/file",
        "/api/videos/%2fetc%2fpasswd/file",
        "/api/videos/0/file",
        f"/api/videos/{'0' * 20}/file",
        f"/api/videos/{'0' * 20}/poster",
        f"/api/videos/{'0' * 20}/frames/0",
        "/style.css/../app.py",
        "/app.py",
        "/page/index.html",
        "/index.json",
        "/vectors.safetensors",
        "/%00",
    ],
)
def test_nothing_else_can_be_fetched(server: Server, path: str) -> None:
    reply = server.ask(path)
    assert reply.status in (404, 422)
    assert b"root:" not in reply.body


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8765", "", "127.0.0.1.evil.example", "10.0.0.7", "[::2]"),
        *("[::1", "[::1]evil.example", "127.0.0.1:evil.example", "127.0.0.1@evil.example", "[127.0.0.1]x", "\xff"),
    ],
)
def test_a_host_that_is_not_ours(server: Server, host: str) -> None:
    assert server.ask("/api/status", host=host).status == 421
    assert server.ask("/", host=host).status == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:80"])
def test_a_host_that_is(server: Server, host: str) -> None:
    assert server.ask("/api/status", host=host).status == 200


def test_two_hosts(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert connection.recv(100).split()[1] in (b"400", b"421")


def test_pages_of_other_sites(server: Server, index: VideoIndex) -> None:
    video = f"/api/videos/{key_of(index.videos[0])}/file"
    for path, method, body in (("/api/search/image", "POST", picture()), ("/api/search?q=1", "GET", None)):
        assert server.ask(path, method, body, origin="http://evil.example").status == 403
        assert server.ask(path, method, body, origin="null").status == 403
        assert server.ask(path, method, body, origin="http://[").status == 403
        assert server.ask(path, method, body, Sec_Fetch_Site="cross-site").status == 403
        assert server.ask(path, method, body, Sec_Fetch_Site="same-site").status == 403  # another port of this machine
        assert server.ask(path, method, body, origin=f"http://127.0.0.1:{server.port}").status == 200
        assert server.ask(path, method, body, Sec_Fetch_Site="same-origin").status == 200
    assert server.ask(video, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status == 403
    assert server.ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200  # a link to the page
    assert server.ask(video).headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods(server: Server, method: str) -> None:
    assert server.ask("/api/search?q=1", method).status == 405


def test_pictures_that_are_none(server: Server, tmp_path: Path) -> None:
    truncated = picture(size=(200, 200), kind="JPEG")[:400]
    wrong = [
        b"",
        b"GIF89a",
        b"\x00" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        truncated,
        picture(kind="BMP"),
    ]
    for content in wrong:
        reply = server.ask("/api/search/image", "POST", content)
        assert (reply.status, "JPEG, PNG, WEBP" in reply.json["detail"]) == (400, True)


def test_a_picture_of_too_many_pixels_is_not_decoded(server: Server) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for side in (8000, 30_000, 2**31 - 1):  # the last two are more than Pillow itself opens
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        with pytest.raises(BadPicture) as caught:
            decode_picture(bomb)
        assert caught.value.too_large
        assert server.ask("/api/search/image", "POST", bomb).status == 413


def test_a_body_that_is_too_large(server: Server) -> None:
    assert server.ask("/api/search/image", "POST", b"", Content_Length=str(MAX_BYTES + 1)).status == 413
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:  # which does not say so before
        connection.sendall(b"POST /api/search/image HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        block = b"100000\r\n" + b"a" * 2**20 + b"\r\n"
        sent = 0
        try:
            for sent in range(40):  # noqa: B007
                connection.sendall(block)
            answer = connection.recv(100)
        except OSError:  # hung up on, which is an answer too
            answer = b"HTTP/1.1 413"
    assert answer.split()[1] == b"413"
    assert server.ask("/api/status").status == 200


def test_a_rate_is_a_burst_and_then_a_trickle() -> None:
    now = [0.0]
    rate = Rate(per_second=2, burst=3, clock=lambda: now[0])
    assert [rate.allows("a") for _ in range(5)] == [True, True, True, False, False]
    assert rate.allows("b")
    now[0] = 0.5
    assert [rate.allows("a") for _ in range(2)] == [True, False]
    now[0] = 100
    assert sum(rate.allows("a") for _ in range(9)) == 3


def test_a_rate_does_not_remember_everybody() -> None:
    rate = Rate(per_second=1, burst=1)
    for number in range(5000):
        rate.allows(str(number))
    assert len(rate._buckets) <= 1024


def test_too_many_searches(index: VideoIndex) -> None:
    with running(index, queries=Rate(0.001, 2)) as server:
        replies = [server.ask("/api/search?q=1") for _ in range(4)]
        assert [reply.status for reply in replies] == [200, 200, 429, 429]
        assert replies[2].headers["retry-after"]
        assert server.ask("/api/status").status == 200  # the page itself goes on


def test_others_do_not_use_up_the_rate(index: VideoIndex) -> None:
    with running(index, requests=Rate(0.001, 2)) as server:
        assert {server.ask("/api/status", host="evil.example").status for _ in range(5)} == {421}
        assert {server.ask("/api/status", origin="http://evil.example").status for _ in range(5)} == {403}
        assert [server.ask("/api/status").status for _ in range(3)] == [200, 200, 429]


def test_too_many_at_once(index: VideoIndex) -> None:
    class Slow(Axes):
        def encode_text(self, texts: Sequence[str]) -> Any:
            gate.wait(30)
            return super().encode_text(texts)

    gate, statuses = threading.Event(), []
    with running(index, Slow()) as server:
        threads = [
            threading.Thread(target=lambda: statuses.append(server.ask("/api/search?q=1").status)) for _ in range(15)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while len(statuses) < 6 and time.monotonic() < deadline:  # those who are sent away need not wait
            time.sleep(0.02)
        gate.set()
        for thread in threads:
            thread.join()
    assert (statuses.count(503), statuses.count(200)) == (6, 9)  # one is answered, eight wait


# The token


@pytest.fixture(scope="module")
def locked(index: VideoIndex) -> Iterator[Server]:
    with running(index, token=TOKEN) as server:
        yield server


def test_without_the_token_there_is_nothing(locked: Server, index: VideoIndex) -> None:
    key = key_of(index.videos[0])
    for path in ("/", "/script.js", "/api/status", "/api/search?q=1", f"/api/videos/{key}/file", "/openapi.json", "/x"):
        assert locked.ask(path).status == 401
        assert locked.ask(path, Authorization=f"Bearer {TOKEN}x").status == 401
        assert locked.ask(path, Authorization=TOKEN).status == 401
        assert locked.ask(path, Cookie=f"adaclip_{locked.port}=wrong; ;=\x01").status == 401
    assert locked.ask(f"/api/status?token={TOKEN}").status == 401  # only the page takes it from the address
    assert locked.ask("/?token=wrong&token=").status == 401


def test_with_the_token(locked: Server) -> None:
    assert locked.ask("/api/status", Authorization=f"Bearer {TOKEN}").status == 200
    answer = locked.ask(f"/?q=red+%26+blue&token={TOKEN}")
    assert (answer.status, answer.headers["location"]) == (303, "/?q=red+%26+blue")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie
    for others in ("", "odd[name]=1; ", "=; a b=c; "):  # of other servers on this machine
        assert locked.ask("/", Cookie=others + cookie.partition(";")[0]).status == 200


# What may change behind it


def test_a_file_that_is_not_what_it_was(tmp_path: Path) -> None:
    index = write_small_index(tmp_path)
    changed, gone, linked, pipe, same = (video.path for video in index.videos)
    changed.write_bytes(b"something else")
    gone.unlink()
    linked.unlink()
    linked.symlink_to("/etc/passwd")
    pipe.unlink()
    os.mkfifo(pipe)
    with running(index) as server:
        for video in index.videos:
            expected = 200 if video.path == same else 404
            for place in ("file", "frames/0"):
                reply = server.ask(f"/api/videos/{key_of(video)}/{place}")
                assert reply.status == expected
                if video.path in (changed, linked, pipe):
                    assert "was changed since it was indexed; run `adaclip index` again" in reply.json["detail"]


def test_a_picture_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 1)
    thumb = index.videos[0].thumb
    assert thumb is not None
    thumb.unlink()
    thumb.symlink_to("/etc/passwd")
    with running(index) as server:
        assert server.ask(f"/api/videos/{key_of(index.videos[0])}/poster").status == 404


def test_an_index_that_names_what_is_no_video(tmp_path: Path) -> None:
    folder = tmp_path / "their.index"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("s")
    write_index(folder, about(tmp_path), axis(0)[None], [row(secret, "../../secret")])
    index = VideoIndex.load(folder)
    with running(index) as server:
        found = server.ask("/api/search?q=0").json["found"][0]
        assert found["video"] is None
        for place in ("file", "poster", "frames/0"):
            assert server.ask(f"/api/videos/{key_of(index.videos[0])}/{place}").status == 404


def test_an_index_of_frames(tmp_path: Path) -> None:
    folder = tmp_path / "my.index"
    folder.mkdir()
    frames = write_frames(tmp_path / "frames" / "video0", 40)
    write_index(folder, about(tmp_path / "frames"), axis(0)[None], [row(frames, "")])
    with running(VideoIndex.load(folder)) as server:
        found = server.ask("/api/search?q=0").json["found"][0]
        assert (found["video"], found["poster"]) == (None, None)
        picture = server.ask(found["frames"][1]["picture"]).body
        assert index_of(np.asarray(Image.open(io.BytesIO(picture)))) == 30


def test_an_index_of_frames_of_other_names(tmp_path: Path) -> None:
    folder = tmp_path / "my.index"
    folder.mkdir()
    frames = write_frames(tmp_path / "frames" / "video0", 40)
    for number, image in enumerate(sorted(frames.iterdir()), 1):
        image.rename(frames / f"f{number}.jpg")
    settings = {"img_tmpl": "f{}.jpg"}
    write_index(folder, replace(about(frames.parent), settings=settings), axis(0)[None], [row(frames, "")])
    with running(VideoIndex.load(folder)) as server:
        picture = server.ask(server.ask("/api/search?q=0").json["found"][0]["frames"][1]["picture"]).body
        assert index_of(np.asarray(Image.open(io.BytesIO(picture)))) == 30


def test_frames_in_a_folder_that_is_called_like_a_video(tmp_path: Path) -> None:
    folder = tmp_path / "my.index"
    folder.mkdir()
    frames = write_frames(tmp_path / "frames" / "video0.mp4", 40)
    write_index(folder, about(tmp_path / "frames"), axis(0)[None], [row(frames, "")])
    index = VideoIndex.load(folder)
    with running(index) as server:
        found = server.ask("/api/search?q=0").json["found"][0]
        assert found["video"] is None
        assert "made of its frames" in server.ask(f"/api/videos/{key_of(index.videos[0])}/file").json["detail"]
        picture = server.ask(found["frames"][1]["picture"]).body
        assert index_of(np.asarray(Image.open(io.BytesIO(picture)))) == 30


def test_a_video_whose_folder_may_not_be_looked_into_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    index = write_small_index(tmp_path, 1)
    with running(index) as server:
        monkeypatch.setattr(Path, "is_dir", denied)
        assert server.ask("/api/search?q=0").json["found"][0]["video"]


def test_frames_of_a_video_outside_the_folder_that_was_indexed_last(tmp_path: Path) -> None:
    """One that vanished stays in the index, though the annotation's videos lie elsewhere now."""
    index = write_small_index(tmp_path, 1)
    (tmp_path / "elsewhere").mkdir()
    write_index(index.folder, about(tmp_path / "elsewhere"), axis(0)[None], [row(index.videos[0].path, "0.jpg")])
    with running(VideoIndex.load(index.folder)) as server:
        picture = server.ask(server.ask("/api/search?q=0").json["found"][0]["frames"][1]["picture"]).body
        assert index_of(np.asarray(Image.open(io.BytesIO(picture)))) == 30


def test_a_file_that_is_swapped_while_its_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(store: FrameStore, name: str) -> int:
        write_video(path, 10)
        return count(store, name)

    index, count = write_small_index(tmp_path, 1), VideoFiles.count
    path, before = index.videos[0].path, tmp_path / "before"
    shutil.copy2(path, before)
    with running(index) as server:
        picture = server.ask("/api/search?q=0").json["found"][0]["frames"][1]["picture"]
        monkeypatch.setattr(VideoFiles, "count", swapped)
        reply = server.ask(picture)
        assert (reply.status, "was changed since it was indexed" in reply.json["detail"]) == (404, True)
        monkeypatch.undo()
        shutil.copy2(before, path)
        assert index_of(np.asarray(Image.open(io.BytesIO(server.ask(picture).body)))) == 30


def test_an_empty_index(tmp_path: Path) -> None:
    with running(write_small_index(tmp_path, 0)) as server:
        answer = server.ask("/api/search?q=1").json
        assert (answer["page"], answer["pages"], answer["videos"], answer["found"]) == (1, 0, 0, [])


def test_a_damaged_video(tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 1)
    path = index.videos[0].path
    path.write_bytes(path.read_bytes()[:300])
    write_index(index.folder, about(path.parent), axis(0)[None], [row(path, "")])
    index = VideoIndex.load(index.folder)
    with running(index) as server:
        reply = server.ask(f"/api/videos/{key_of(index.videos[0])}/frames/0")
        assert (reply.status, "cannot be read" in reply.json["detail"]) == (404, True)


# The model


def test_a_model_that_is_loading_and_one_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> Axes:
        gate.wait(30)
        raise UserError("it is another model")

    gate, engine = threading.Event(), Engine(load)
    engine.start()
    assert engine.state == ("loading", None)
    gate.set()
    deadline = time.monotonic() + 20
    while engine.state.name == "loading" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.state == ("failed", "it is another model")
    assert re.search("it is another model\nNothing can be searched until .* Ctrl-C", capsys.readouterr().err)


def test_an_error_of_the_model_is_told(index: VideoIndex, capfd: pytest.CaptureFixture[str]) -> None:
    with running(index) as server:
        reply = server.ask("/api/search?q=notanumber")
        assert (reply.status, reply.json) == (500, {"detail": "something went wrong here; the terminal tells more"})
        assert server.ask("/api/search?q=1").status == 200
    assert "ValueError" in capfd.readouterr().err


# The command


def test_only_this_machine_reaches_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "127.9.9.9")] == [True, True, True]
    assert not is_loopback("0.0.0.0")
    with pytest.raises(UserError, match=r"--host no\.such\.host\.invalid"):
        is_loopback("no.such.host.invalid")


def test_names_where_others_can_reach_it() -> None:
    name = socket.gethostname()
    assert all(may_be_called(host, "0.0.0.0", True) for host in ("10.0.0.7:80", "[fe80::1]:80", name, "localhost"))
    assert not any(may_be_called(host, "0.0.0.0", True) for host in ("evil.example", "10.0.0.7.evil.example", ""))
    assert (url("::1", 80), url("127.0.0.1", 80)) == ("http://[::1]:80/", "http://127.0.0.1:80/")
    assert url("0.0.0.0", 80) == f"http://{name}:80/"


def test_a_port_that_is_taken(index: VideoIndex, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(index.folder), "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 cannot be had" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "add --token"),
        (["--host", "0.0.0.0", "--token", "short"], "16 to 200"),
        (["--token", "sixteen letters; two"], "16 to 200"),
        (["--host", "203.0.113.1", "--token"], "no address of this machine"),
        (["--port", "65536"], "0 to 65535"),
        (["--hots", "x"], "the nearest is --host"),
        (["--model", ""], "argument --model: is empty"),
    ],
)
def test_flags_that_are_refused(
    index: VideoIndex, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["serve", str(index.folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "none.index"), "--port", "0"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["serve", ""]) == 2
    assert "argument NAME.index: is empty" in capsys.readouterr().err


def test_json_says_what_the_page_reads(server: Server) -> None:
    schema = server.ask("/openapi.json").json["components"]["schemas"]
    assert set(server.ask("/api/search?q=1").json["found"][0]) == set(schema["Found"]["properties"])
    assert json.loads(server.ask("/api/status").body)["state"] == "ready"
