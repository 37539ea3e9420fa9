"""Clients that keep the server waiting, over real sockets: they are hung up on, and shut nobody out meanwhile."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import h11
import pytest
from serving import Server, about, axis, row, running, write_small_index

from adaclip_finetune.search.index import VideoIndex
from adaclip_finetune.search.serve import connection
from adaclip_finetune.search.serve.connection import Connection
from adaclip_finetune.search.serve.media import key_of
from adaclip_finetune.search.serve.rates import Rate
from adaclip_finetune.search.stored import write_index

HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-More:"
PATIENCE = 20  # seconds


class Hasty(Connection):
    times: ClassVar[dict[Any, float]] = {h11.IDLE: 0.5, h11.SEND_BODY: 0.8}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> VideoIndex:
    return write_small_index(tmp_path_factory.mktemp("served"))


@contextmanager
def opened(server: Server, count: int, said: bytes = HALF) -> Iterator[list[socket.socket]]:
    """Connections on which only this is said."""
    with ExitStack() as stack:
        made = []
        for _ in range(count):
            made.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE)))
            made[-1].sendall(said)
        yield made


def is_open(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(65536) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        one.settimeout(PATIENCE)


def until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def answers(server: Server) -> bool:
    try:
        return server.ask("/api/status").status == 200
    except OSError:
        return False


@pytest.mark.parametrize(
    "said", [b"", HALF, b"POST /api/search/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"]
)
def test_three_hundred_that_never_finish_shut_nobody_out(index: VideoIndex, said: bytes) -> None:
    with (
        running(index, requests=Rate(9999, 9999), queries=Rate(9999, 9999)) as server,
        opened(server, 300, said) as half,
    ):
        for _ in range(5):
            assert server.ask("/api/search?q=1").json["found"][0]["id"] == "video1.mp4"
        assert sum(map(is_open, half)) <= connection.MAX_OPEN
        assert sum(map(is_open, half)) >= connection.MAX_OPEN - 10  # those who might yet finish are left alone


def test_who_never_finishes_is_hung_up_on(index: VideoIndex) -> None:
    body = b"POST /api/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1"
    second = b"GET /icon.svg HTTP/1.1\r\nHost: localhost\r\n\r\n" + HALF  # after one that is whole
    with running(index, connection=Hasty) as server, ExitStack() as stack:
        half = [one for said in (b"", HALF, body, second) for one in stack.enter_context(opened(server, 20, said))]
        assert until(lambda: not any(map(is_open, half)))
        assert server.ask("/api/status").status == 200


@pytest.mark.parametrize(
    "begin", [HALF, b"POST /api/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n"]
)
def test_a_trickle_does_not_prolong_it(index: VideoIndex, begin: bytes) -> None:
    with running(index, connection=Hasty) as server, opened(server, 1, begin) as (slow,):
        with pytest.raises(OSError):
            for _ in range(PATIENCE * 20):
                slow.sendall(b"a")
                time.sleep(0.05)
        assert server.ask("/api/status").status == 200


def test_a_slow_picture_is_told(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaclip_finetune.search.serve.app.BODY_TIME", 0.2)
    said = b"POST /api/search/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nx"
    with running(index) as server, opened(server, 1, said) as (slow,):
        assert slow.recv(12) == b"HTTP/1.1 408"


def test_who_hangs_up_in_the_middle_is_no_error(index: VideoIndex, capfd: pytest.CaptureFixture[str]) -> None:
    said = b"POST /api/search/image HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nx"
    with running(index) as server:
        with opened(server, 3, said):
            time.sleep(0.2)
        bad = said.replace(b"Content-Length: 99", b"Transfer-Encoding: chunked") + b"x\r\n"
        with opened(server, 1, bad) as (one,):
            assert one.recv(65536).startswith(b"HTTP/1.1 400 Bad Request")
        assert server.ask("/api/status").status == 200
    assert capfd.readouterr().err == ""


def test_who_does_not_read_makes_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(16 * 2**20))  # more than fits into the buffers between us
    (tmp_path / "my.index").mkdir()
    write_index(tmp_path / "my.index", about(tmp_path), axis(0)[None], [row(large, "")])
    index = VideoIndex.load(tmp_path / "my.index")
    ask = f"GET /api/videos/{key_of(index.videos[0])}/file HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    monkeypatch.setattr(connection, "MAX_OPEN", 20)
    with running(index) as server, opened(server, 20, ask):
        until(lambda: answers(server))  # when the buffers are full
        assert [server.ask("/api/status").status for _ in range(5)] == [200] * 5


def test_one_address_does_not_push_out_another(index: VideoIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_OPEN", 20)
    with running(index) as server, ExitStack() as stack:
        other = socket.create_connection(("127.0.0.1", server.port), PATIENCE, source_address=("127.0.0.2", 0))
        stack.enter_context(other)
        stack.enter_context(opened(server, 60))
        assert server.ask("/api/status").status == 200
        other.sendall(b"GET /api/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000,
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
    ],
)
def test_what_is_no_http_is_told_so_in_json(index: VideoIndex, said: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with running(index, connection=Hasty) as server, opened(server, 1, said) as (one,):
        answer = b""
        while part := one.recv(65536):
            answer += part
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert b"application/json" in head and content.startswith(b'{"detail": ')
    assert "Traceback" not in capfd.readouterr().err
