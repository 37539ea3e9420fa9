"""The API behind the page of `adaclip serve`: what it answers, and what it refuses."""

import asyncio
import io
import os
import socket
import struct
import threading
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media import index_of, write_frames, write_video
from PIL import Image
from serving import (
    Axes,
    Server,
    add_transcripts,
    running,
    until,
    write_clip,
    write_divided_index,
    write_one,
    write_small_index,
)

from adaclip_finetune.cli import main
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.serve.app import MAX_BYTES
from adaclip_finetune.search.serve.listening import listen
from adaclip_finetune.search.serve.served import ModelThread, Searches

TOKEN = "0123456789abcdef-_"
NO_KEY = "0" * 20


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_small_index(tmp_path_factory.mktemp("served"))


def picture(red: int = 30, kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(content, kind)
    return content.getvalue()


def shown(jpeg: bytes) -> int:
    """Return which coded frame a picture shows."""
    return index_of(np.asarray(Image.open(io.BytesIO(jpeg))))


def test_searches_that_wait_at_the_same_time_are_done_together(index: VideoIndex) -> None:
    """Each gets its own answer, or the error of its own query; those that ask for something else are done apart."""
    model, asked = ModelThread(Axes), list[tuple[int, int]]()
    searches = Searches(model)

    def search(queries: Any, k: int) -> Any:
        asked.append((len(queries), k))
        return index.search(queries, k)

    async def answers() -> list[Any]:
        model.start()
        while model.state == "loading":
            await asyncio.sleep(0.01)
        wanted = [("0", 1), ("3", 1), ("nothing", 1), ("2", 2), ("1", 1)]
        waiting = [
            searches.hits(lambda loaded, text=text: loaded.encode_query([text]), partial(search, k=k))
            for text, k in wanted
        ]
        return await asyncio.gather(*waiting, return_exceptions=True)

    zero, three, refused, two, one = asyncio.run(answers())
    assert [hit.video.id for hit in (*zero, *three, *two[:1], *one)] == [f"video{n}.mp4" for n in (0, 3, 2, 1)]
    assert len(two) == 2 and isinstance(refused, UserError)
    assert sorted(asked) == [(1, 2), (3, 1)]
    with pytest.raises(UserError, match="k 0"):
        asyncio.run(searches.hits(lambda loaded: loaded.encode_query(["1"]), partial(search, k=0)))
    assert len(asyncio.run(searches.hits(lambda loaded: loaded.encode_query(["1"]), partial(search, k=1)))) == 1

    async def two_widths() -> list[Any]:
        """Queries that cannot be compared together fail, and nothing remains of them."""
        widths = (3, 4)
        waiting = [searches.hits(lambda _, n=n: torch.ones(1, n), partial(search, k=1)) for n in widths]
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert all(isinstance(answer, RuntimeError) for answer in asyncio.run(two_widths()))
    assert len(asyncio.run(searches.hits(lambda loaded: loaded.encode_query(["1"]), partial(search, k=1)))) == 1


def test_an_answer_does_not_wait_for_an_acknowledgement() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_search_by_text(server: Server, index: VideoIndex) -> None:
    answer = server.ask("/api/search?q=3").json
    assert (answer["page"], answer["pages"], answer["videos"]) == (1, 1, 5)
    assert [found["rank"] for found in answer["found"]] == [1, 2, 3, 4, 5]
    first = answer["found"][0]
    assert (first["id"], first["score"], first["captions"]) == ("video3.mp4", pytest.approx(1), ["two dogs run"])
    assert [(frame["time"], frame["weight"]) for frame in first["frames"]] == [(0.2, 0.25), (1.2, 0.75)]
    assert (first["best"], first["duration"], first["path"]) == (1, 2.0, str(index.videos[3].path))


def test_a_search_by_picture(server: Server) -> None:
    for kind in ("PNG", "WEBP"):
        first, _ = server.ask("/api/search/image?k=2", "POST", picture(40, kind)).json["found"]
        assert first["id"] == "video4.mp4"
    cut = picture(size=(200, 200), kind="JPEG")[:400]
    for content in (b"", b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", cut, picture(kind="BMP")):
        reply = server.ask("/api/search/image", "POST", content)
        assert (reply.status, "JPEG, PNG, WEBP" in reply.json["detail"]) == (400, True)


def test_pages_together_hold_every_video_once(server: Server) -> None:
    pages = [server.ask(f"/api/search?q=2&k=2&page={page}").json for page in (1, 2, 3, 4)]
    found = [one for page in pages for one in page["found"]]
    assert found[0]["id"] == "video2.mp4"
    assert sorted(one["id"] for one in found) == [f"video{number}.mp4" for number in range(5)]  # the others score alike
    assert [one["rank"] for one in found] == [1, 2, 3, 4, 5]
    assert [(page["pages"], len(page["found"])) for page in pages] == [(3, 2), (3, 2), (3, 1), (3, 0)]


def test_the_files_of_a_video(server: Server, index: VideoIndex) -> None:
    found = server.found("q=1")[0]
    video, poster = server.ask(found["video"]), server.ask(found["poster"])
    content = index.videos[1].path.read_bytes()
    assert (video.body, video.headers["content-type"]) == (content, "video/mp4")
    assert (poster.body, poster.headers["content-type"]) == (index.videos[1].thumb.read_bytes(), "image/jpeg")
    assert [shown(server.ask(frame["picture"]).body) for frame in found["frames"]] == [5, 30]
    assert server.ask(found["frames"][0]["picture"].replace("/0", "/2")).status == 404
    part = server.ask(found["video"], Range="bytes=100-199")
    assert (part.status, part.body) == (206, content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(content)}"
    assert server.ask(found["video"], Range=f"bytes={len(content)}-").status == 416


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    kinds = {"/": "text/html", "/style.css": "text/css", "/icon.svg": "image/svg+xml", "/openapi.json": "json"}
    for path, kind in (kinds | {"/script.js": "javascript", "/videos.js": "javascript"}).items():
        reply = server.ask(path)
        assert (reply.status, kind in reply.headers["content-type"]) == (200, True)
        elsewhere = reply.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in elsewhere and "https://" not in elsewhere
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "unsafe" not in reply.headers["content-security-policy"]


def test_moments(tmp_path: Path) -> None:
    """Beside a video, or instead of it; with a picture each, and as files."""
    index = write_divided_index(tmp_path)
    with running(index) as server:
        assert server.ask("/api/status").json["moments"] == 9
        assert server.found("q=1")[0]["id"] == "video1.mp4"
        assert server.found("q=6&score=moment")[0]["id"] == "video1.mp4"
        (first, *others) = server.found("q=6&by=moment")
        (moment,) = first["moments"]
        assert (first["id"], first["rank"], first["score"]) == ("video1.mp4", 1, pytest.approx(1))
        assert (moment["start"], moment["end"], moment["time"], moment["score"]) == (0.5, 1.5, 1.1, pytest.approx(1))
        assert shown(server.ask(moment["poster"]).body) == 26
        pages = [server.ask(f"/api/search?q=6&by=moment&k=2&page={page}").json for page in (1, 2)]
        assert [one["moments"] for page in pages for one in page["found"]][:3] == [
            one["moments"] for one in (first, *others)
        ][:3]
        copied, exact = server.ask(moment["clip"]), server.ask(moment["clip"] + "&exact=true")
        for reply in (copied, exact):
            assert (reply.status, reply.headers["content-type"]) == (200, "video/mp4")
            assert 'filename="video1_0.5-1.5s.mp4"' in reply.headers["content-disposition"]
        assert coded(exact.body, tmp_path) == list(range(13, 38))
        for bad, status in {
            "start=1&end=1": 422,
            "start=0&end=700": 422,
            "start=-1&end=1": 422,
            "start=nan&end=1": 422,
        }.items():
            assert server.ask(moment["clip"].split("?")[0] + f"?{bad}").status == status
        assert server.ask(moment["poster"].replace("/1/", "/3/")).status == 404
        index.videos[1].path.write_bytes(b"another")
        reply = server.ask(moment["clip"])
        assert (reply.status, "has changed" in reply.json["detail"]) == (404, True)
    with running(write_small_index(tmp_path / "plain")) as server:
        reply = server.ask("/api/search?q=1&by=moment")
        assert (reply.status, "--moments" in reply.json["detail"]) == (422, True)
        assert server.found("q=1")[0]["moments"] == []


def coded(video: bytes, folder: Path) -> list[int]:
    """Return which coded frames a video shows."""
    (folder / "clip.mp4").write_bytes(video)
    with av.open(str(folder / "clip.mp4")) as container:
        return [index_of(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_openapi_describes_the_answers(server: Server) -> None:
    described = server.ask("/openapi.json").json["components"]["schemas"]
    assert set(server.found()[0]) == set(described["FoundVideo"]["properties"])
    assert set(server.ask("/api/status").json) == set(described["StatusAnswer"]["properties"])


def test_an_empty_index_with_a_name_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_small_index(tmp_path, 0).folder)
    with running(VideoIndex.load(".")) as server:
        about = {"state": "ready", "message": None, "index": "my.index", "videos": 0, "moments": 0, "lines": 0}
        about |= {"model": "run", "finetuned": True}
        assert server.ask("/api/status").json == about
        assert server.ask("/api/search?q=1").json["found"] == []


def test_conditions_narrow_a_search(server: Server) -> None:
    everything = [one["id"] for one in server.found("q=1&k=50")]
    found = server.found("q=1&k=50&where=name%20=%20*" + everything[2])
    assert [one["id"] for one in found] == [everything[2]]
    assert server.found("q=1&where=duration%20>%20100000") == []
    first, last = (server.ask(f"/api/search?q=1&k=3&where=name%20!=%20video4*&page={page}").json for page in (1, 2))
    assert [(page["pages"], page["videos"], len(page["found"])) for page in (first, last)] == [(2, 4, 3), (2, 4, 1)]
    assert server.ask("/api/search/image?where=name%20=%20video2*", "POST", picture(40)).json["videos"] == 1
    reply = server.ask("/api/search?q=1&where=season%20=%203")
    assert (reply.status, reply.json["detail"].startswith("where season")) == (422, True)


def test_transcripts_are_searched_too(tmp_path: Path) -> None:
    index = write_small_index(tmp_path)
    with running(index) as server:
        assert server.ask("/api/status").json["lines"] == 0
        reply = server.ask("/api/search?q=1&hybrid=true")
        assert (reply.status, "transcripts" in reply.json["detail"]) == (422, True)
        add_transcripts(index, video4="the number 1", video2="nothing of it")  # no restart is needed
        assert server.ask("/api/status").json["lines"] == 2
        first, second, *_ = server.found("q=1&hybrid=true")
        assert (first["id"], first["line"]["text"]) == ("video4.mp4", "the number 1")
        assert (first["line"]["start"], first["line"]["end"]) == (0.6, 1.8)
        assert (second["id"], second["line"]) == ("video1.mp4", None)
        assert server.found("q=1")[0]["id"] == "video1.mp4"
        assert server.ask("/api/search?q=1&hybrid=true&by=moment").status == 422
    index = write_divided_index(tmp_path / "divided")
    add_transcripts(index, video2="the number 1")
    with running(index) as server:
        assert server.ask("/api/search?q=6&hybrid=true&by=moment").status == 422


def test_queries_out_of_bounds(server: Server) -> None:
    bounds = ("q=1&page=0", "q=1&page=x", "q=1&k=0", "q=1&k=51")
    for query in ("", "q=", "q=%20", "q=nothing", "q=1&where=long", f"q={'a' * 501}", *bounds):
        reply = server.ask(f"/api/search?{query}")
        assert (reply.status, [type(value) for value in reply.json.values()]) == (422, [str]), query


def test_nothing_else_can_be_fetched(server: Server) -> None:
    for path in (
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/api/videos/../../../etc/passwd",
        "/api/videos/..%2f..%2f..%2fetc%2fpasswd/file",
        *(f"/api/videos/{NO_KEY}/{rest}" for rest in ("file", "poster", "frames/0")),
        "/style.css/../app.py",
        "/..%2fapp.py",
        "/docs",
        "/redoc",
        "/%00",
    ):
        reply = server.ask(path)
        assert reply.status in (404, 405, 422) and b"root:" not in reply.body and b"import" not in reply.body, path


def test_only_requests_to_this_machine_are_answered(server: Server) -> None:
    """The page of another site cannot point its own name here and then read the answers (DNS rebinding)."""
    refused = ("evil.example", "evil.example:8765", "", "127.0.0.1.evil.example", "10.0.0.7", "[::1]evil.example")
    hosts = dict.fromkeys(("127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:80"), 200) | dict.fromkeys(refused, 400)
    for host, status in hosts.items():
        assert {server.ask(path, host=host).status for path in ("/", "/api/status")} == {status}, host


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    video = server.found()[0]["video"]
    for site, status in {"cross-site": 403, "same-site": 403, "same-origin": 200, "none": 200}.items():
        for path, method, body in (("/api/search/image", "POST", picture()), (video, "GET", None)):
            assert server.ask(path, method, body, Sec_Fetch_Site=site).status == status
    assert server.ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200  # a link to the page
    assert server.ask(video).headers["cross-origin-resource-policy"] == "same-origin"


def test_a_picture_of_too_many_pixels_is_not_decoded(server: Server) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for side in (8000, 30_000, 2**31 - 1):  # the last two are more than Pillow itself opens
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
        assert server.ask("/api/search/image", "POST", bomb).status == 400


def test_a_body_that_is_too_large(server: Server) -> None:
    assert server.ask("/api/search/image", "POST", b"\0" * (MAX_BYTES + 1)).status == 413
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:  # without its length in the head
        connection.sendall(b"POST /api/search/image HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(21):
            connection.sendall(b"100000\r\n" + b"a" * 2**20 + b"\r\n")
        assert connection.recv(100).split()[1] == b"413"


def test_a_client_that_hangs_up_is_not_an_error(index: VideoIndex, capfd: pytest.CaptureFixture[str]) -> None:
    with running(index) as server:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
                connection.sendall(b"POST /api/search/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nx")
        assert server.ask("/api/status").status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_the_token(index: VideoIndex) -> None:
    with running(index, token=TOKEN) as server:
        for path in ("/", "/script.js", "/api/status", f"/api/videos/{NO_KEY}/file", "/openapi.json", "/x"):
            assert server.ask(path).status == 401
            assert server.ask(path, Authorization=f"Bearer {TOKEN}x").status == 401
            assert server.ask(path, Authorization=TOKEN).status == 401
            assert server.ask(path, Cookie=f"adaclip_{server.port}=wrong; ;=\x01").status == 401
        assert server.ask(f"/api/status?token={TOKEN}").status == 401  # only the page takes it from the address
        assert server.ask("/?token=wrong&token=").status == 401
        assert server.ask("/api/status", Authorization=f"Bearer {TOKEN}").status == 200
        assert server.ask("/api/status", host="nas.local:8765", Authorization=f"Bearer {TOKEN}").status == 200
        answer = server.ask(f"/?q=red+%26+blue&token={TOKEN}")
        assert (answer.status, answer.headers["location"]) == (303, "/?q=red+%26+blue")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie
        for others in ("", "odd[name]=1; ", "=; a b=c; "):  # of other servers on this machine
            assert server.ask("/", Cookie=others + cookie.partition(";")[0]).status == 200


def test_files_that_have_changed_since_indexing(tmp_path: Path) -> None:
    index = write_small_index(tmp_path, 5)
    changed, gone, linked, pipe, same = (video.path for video in index.videos)
    changed.write_bytes(b"something else")
    for path in (gone, linked, pipe):
        path.unlink()
    linked.symlink_to("/etc/passwd")
    os.mkfifo(pipe)
    with running(index) as server:
        for found in server.found():
            for place in (found["video"], found["frames"][0]["picture"]):
                reply = server.ask(place)
                assert reply.status == (200 if found["path"] == str(same) else 404)
                if found["path"] != str(same) and found["path"] != str(gone):
                    assert "adaclip index" in reply.json["detail"]
        seen = next(found for found in server.found() if found["path"] == str(same))["frames"][0]["picture"]
        write_video(same, 10)
        assert server.ask(seen).status == 404  # though its pictures are remembered


def test_an_index_that_names_other_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    index = write_one(tmp_path, tmp_path / "secret", "../../secret")
    thumb = index.folder / "thumbs" / "secret"
    thumb.parent.mkdir()
    thumb.symlink_to("/etc/passwd")
    with running(index) as server:
        (found,) = server.found()
        assert found["video"] is None
        for place in ("file", "poster", "frames/0"):
            assert server.ask(f"/api/videos/{index.videos[0].key}/{place}").status == 404


def test_an_index_of_frames(tmp_path: Path) -> None:
    """The folder of a video's frames may be named like a video file."""
    frames = write_frames(tmp_path / "frames" / "v.mp4", 40)
    for number, image in enumerate(sorted(frames.iterdir()), 1):
        image.rename(frames / f"f{number}.jpg")
    index = write_one(tmp_path, frames, settings={"img_tmpl": "f{}.jpg"})
    with running(index) as server:
        (found,) = server.found()
        assert found["video"] is None
        assert server.ask(f"/api/videos/{index.videos[0].key}/file").status == 404
        assert shown(server.ask(found["frames"][1]["picture"]).body) == 30
        one = frames / "f31.jpg"
        one.write_bytes(one.read_bytes() + b"x")  # the folder itself does not change
        assert server.ask(found["frames"][1]["picture"]).status == 404


def test_a_damaged_video(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "v" / "video0.mp4")
    path.write_bytes(path.read_bytes()[:300])
    with running(write_one(tmp_path, path)) as server:
        reply = server.ask(server.found()[0]["frames"][0]["picture"])
        assert (reply.status, "cannot be read" in reply.json["detail"]) == (404, True)


def test_a_model_that_is_loading_and_one_that_fails(index: VideoIndex, capfd: pytest.CaptureFixture[str]) -> None:
    def load() -> Axes:
        assert gate.wait(30)
        raise UserError("it is another model")

    gate = threading.Event()
    with running(index, load) as server:
        assert server.ask("/api/status").json["state"] == "loading"
        assert server.ask("/api/search?q=1").status == 503
        gate.set()
        status = until(lambda: (now := server.ask("/api/status").json)["state"] != "loading" and now)
        assert (status["state"], status["message"]) == ("failed", "it is another model")
        assert server.ask("/api/search?q=1").json["detail"] == "it is another model"
    assert "Ctrl-C" in capfd.readouterr().err


def test_errors_in_the_server(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The terminal shows more."""
    index = write_small_index(tmp_path, 1)
    with running(index) as server:
        reply = server.ask("/api/search?q=notanumber")
        assert (reply.status, "terminal" in reply.json["detail"]) == (500, True)
        assert server.ask("/api/search?q=1").status == 200
    assert "ValueError" in capfd.readouterr().err


def test_command_lines_that_are_refused(index: VideoIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        cases: list[tuple[list[Any], str]] = [
            ([index.folder, "--port", "0", "--host", "0.0.0.0"], "--token"),
            ([index.folder, "--port", "0", "--host", "0.0.0.0", "--token", "short"], "16 to 200"),
            ([index.folder, "--port", "0", "--token", "sixteen letters; two"], "16 to 200"),
            ([index.folder, "--port", "0", "--host", "203.0.113.1", "--token"], "203.0.113.1"),
            ([index.folder, "--port", "0", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
            ([index.folder, "--port", "65536"], "0 to 65535"),
            ([tmp_path / "none", "--port", "0"], "no such folder"),
            ([index.folder, "--port", port], f"--port {port}"),
        ]
        for words, fact in cases:
            assert main(["serve", *map(str, words)]) == 2
            assert fact in capsys.readouterr().err
