"""`adaclip serve`: the search page."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaclip_finetune.commands.flags import Parser, add_index, model_settings
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.serve.listening import listen

if TYPE_CHECKING:
    from adaclip_finetune.search.search_model import SearchModel

PORT = 8765


def run(words: Sequence[str]) -> int:
    """Serve the page until Ctrl-C, which ends the process with exit code 130. Raise UserError."""
    arguments = _parser().read(words)
    settings = model_settings(arguments)
    listening = listen(arguments.host, arguments.port)
    token = _token(arguments.host, listening, arguments.token)

    from adaclip_finetune.search.serve.app import create_app, make_server
    from adaclip_finetune.search.serve.served import ModelThread
    from adaclip_finetune.search.stores.places import open_index

    index = open_index(arguments.index)

    def load() -> SearchModel:
        from adaclip_finetune.search.search_model import search_model_of

        return search_model_of(index, arguments.model, **settings)

    model = ModelThread(load)
    server = make_server(create_app(model, index, token, arguments.host))
    try:
        print(f"{arguments.index}: {len(index):,} videos; the model is being loaded. Ctrl-C stops the server")
        # This machine's name stands for an address that means all addresses.
        name = socket.gethostname() if arguments.host in ("0.0.0.0", "::") else arguments.host
        where = f"[{name}]" if ":" in name else name
        print(f"http://{where}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else ""), flush=True)
        model.start()
        server.run([listening])
    except KeyboardInterrupt:
        # A thread inside torch or FFmpeg cannot be interrupted, and Python would wait for it.
        print("adaclip: interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip serve",
        "Serve a page to search an index by text or picture, in a browser on this machine. The page opens at once, "
        "while the model is being loaded. Ctrl-C stops the server. Its /openapi.json describes the JSON API.",
    )
    add_index(parser)
    add = parser.add_argument
    add("--port", metavar="N", type=int, default=PORT, help=f"0: a free one; default {PORT}")
    host = "address to listen on; default 127.0.0.1, this machine alone. Others need --token and are not encrypted"
    add("--host", metavar="ADDRESS", default="127.0.0.1", help=host)
    token = "answer only requests that know it: 16 to 200 letters, digits, - and _; without a value, one is made"
    add("--token", metavar="TOKEN", nargs="?", const="", help=token)
    return parser


def _token(host: str, listening: socket.socket, given: str | None) -> str | None:
    """Return the token that was given or made, or None if none is needed. Raise UserError."""
    if given is None:
        if not ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback:
            raise UserError(
                f"--host {host}: other machines can reach this address and would see the videos: add --token (one is "
                "made), or leave --host out"
            )
        return None
    if not given:
        return secrets.token_urlsafe(24)
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,200}", given):
        raise UserError("--token: must be 16 to 200 letters, digits, - and _; --token without a value makes one")
    return given
