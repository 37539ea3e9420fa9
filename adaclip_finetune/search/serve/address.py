"""Where the page listens, and by which names it may be called."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket

from adaclip_finetune.errors import UserError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:]+))(?::[0-9]{0,5})?")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound there. Raises UserError if the port is taken, or there is no such address here."""
    family, address = _resolved(host, port)
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host}: is no address of this machine") from error
        raise UserError(
            f"port {port} of {host} cannot be had ({error.strerror}); --port N takes another, --port 0 a free one"
        ) from error
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. Raises UserError for a name that stands for no address."""
    return ipaddress.ip_address(_resolved(host, 0)[1][0].partition("%")[0]).is_loopback


def may_be_called(header: str, host: str, reachable: bool) -> bool:
    """Whether a Host header names this server, which listens on `host`, where other machines can reach it or not.

    A page of another site whose name was made to point here (DNS rebinding) calls us by its own name. An address
    cannot be made to point elsewhere, so where we are reachable, any address will do.
    """
    name = _without_port(header).lower().rstrip(".")
    if name in LOOPBACK_NAMES or name == host.lower():
        return True
    return reachable and (_is_address(name) or name in _own_names())


def url(host: str, port: int) -> str:
    """What a browser is given; an address that means all of them becomes this machine's name."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def _resolved(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: stands for no address ({error})") from error
    family, _, _, _, address = found[0]
    return family, (str(address[0]), int(address[1]))


def _without_port(header: str) -> str:
    """Empty for what is no host with or without a port."""
    found = _HOST.fullmatch(header)
    return (found[1] or found[2]) if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"}
