"""The connections of the server: how many there may be, and how long each may make it wait.

uvicorn waits without end for the rest of a request, and counts whoever it waits for among those it serves. Here a
connection that sends no whole request in time is closed; and where too many are open, whoever comes takes the place of
the one that has kept the server waiting longest, of the address that holds the most. So nobody shuts others out.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from typing import Any, ClassVar

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_OPEN = 256  # each may hold a file, too; a process usually has 1024


class Connection(H11Protocol):
    """One of them."""

    times: ClassVar[dict[Any, float]] = {h11.IDLE: 10.0, h11.SEND_BODY: 75.0}
    """Seconds in which a request's head, and then its body, must have arrived; who sends a picture is told sooner."""

    _phase: Any = None  # what the client is doing, as h11 names it
    _deadline: asyncio.TimerHandle | None = None
    _waiting_since = math.inf  # of the loop's clock; inf: the server is working for it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Of asyncio, as what follows."""
        super().connection_made(transport)
        self._look()
        if len(self.connections) > MAX_OPEN:
            _close_one([other for other in self.connections if isinstance(other, Connection)])

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._waiting_since = min(self._waiting_since, self.loop.time())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._note_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._set_deadline(None)

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP: JSON as everywhere, where an answer can still be given."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return self.transport.abort()
        content = json.dumps({"detail": msg}).encode()
        length = str(len(content)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length), (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=content),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _look(self) -> None:
        """A phase's time begins when the phase does, whatever trickles in."""
        if self.conn.their_state is not self._phase:
            self._phase = self.conn.their_state
            self._set_deadline(self.times.get(self._phase))
            self._note_waiting()

    def _note_waiting(self) -> None:
        waiting = self._phase in self.times or self.flow.write_paused
        self._waiting_since = self.loop.time() if waiting else math.inf

    def _set_deadline(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._hang_up)

    def _hang_up(self) -> None:
        self.connections.discard(self)  # it counts no more, though asyncio tells of the end only later
        self.transport.abort()


def server_config(app: ASGIApp, connection: type[Connection] = Connection) -> uvicorn.Config:
    """How uvicorn is to serve `app`."""
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        access_log=False,  # an address may hold the token
        log_config=None,
        log_level="critical",
        server_header=False,
        proxy_headers=False,
        backlog=128,  # as many may be accepted at once, over MAX_OPEN
        timeout_graceful_shutdown=0,
    )


def _close_one(connections: list[Connection]) -> None:
    held = Counter(_address(connection) for connection in connections)
    waited_for = [connection for connection in connections if connection._waiting_since < math.inf]  # the newest is
    min(waited_for, key=lambda one: (-held[_address(one)], one._waiting_since))._hang_up()


def _address(connection: Connection) -> str:
    return connection.client[0] if connection.client else ""
