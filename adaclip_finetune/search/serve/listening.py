"""The socket that `adaclip serve` listens on."""

from __future__ import annotations

import socket

from adaclip_finetune.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there. Raise UserError if that is not possible."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server((str(address[0]), int(address[1])), family=family)
        # Connections inherit it. asyncio does not set it here, and the body of an answer would wait 40 ms for the
        # acknowledgement of its head.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on --host {host} --port {port} ({reason}); --port N takes another port, --port 0 a free one"
        ) from error
