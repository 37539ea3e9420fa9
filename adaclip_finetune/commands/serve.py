"""`adaclip serve`: its flags, and the server."""

from __future__ import annotations

import os
import re
import secrets
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.commands.model_flags import a_path, add_model_flags, model_settings
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.serve.address import is_loopback, listen, url

if TYPE_CHECKING:
    from adaclip_finetune.search.serve.engine import Encoder

PORT = 8765


def run(words: Sequence[str]) -> int:
    """Serve until Ctrl-C, which raises KeyboardInterrupt. Raises UserError."""
    arguments = _parser().read(words)
    token, settings = _token(arguments), model_settings(arguments)
    listening = listen(arguments.host, arguments.port)
    port = listening.getsockname()[1]

    import uvicorn

    from adaclip_finetune.search.index import VideoIndex
    from adaclip_finetune.search.serve.app import create_app
    from adaclip_finetune.search.serve.connection import server_config
    from adaclip_finetune.search.serve.engine import Engine
    from adaclip_finetune.search.serve.guard import Policy
    from adaclip_finetune.search.serve.library import Library
    from adaclip_finetune.search.serve.picture import MAX_BYTES

    index = VideoIndex.load(arguments.index)
    library = Library(index)

    def load() -> Encoder:
        from adaclip_finetune.search.retriever import retriever_of

        library.open()
        return retriever_of(index, arguments.model, **settings)

    engine = Engine(load)
    policy = Policy(arguments.host, port, not is_loopback(arguments.host), token, MAX_BYTES)
    app = create_app(engine, library, policy)
    print(f"{arguments.index}: {len(index):,} videos; the model is being loaded meanwhile. Ctrl-C ends this")
    print(url(arguments.host, port) + (f"?token={token}" if token else ""), flush=True)
    engine.start()
    try:
        uvicorn.Server(server_config(app)).run([listening])
    except KeyboardInterrupt:
        if engine.working or library.working:
            _end_at_once()
        raise
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip serve",
        "A page to search an index by text or picture, in a browser on this machine. It comes at once; the model is "
        "loaded meanwhile. Ctrl-C ends it. Its /docs tells of the JSON API behind it, /openapi.json tells programs.",
    )
    parser.add_argument("index", metavar="NAME.index", type=a_path, help="what `adaclip index` made")
    parser.add_argument(
        "--model",
        metavar="RUN",
        type=a_path,
        help="the run or checkpoint that the index was made with, if it has moved",
    )
    parser.add_argument("--port", metavar="N", type=int, default=PORT, help=f"0: a free one; default {PORT}")
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="listen there; default 127.0.0.1, which only this machine reaches. Any other needs --token. There is no "
        "encryption: what is sent can be read on the way",
    )
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        nargs="?",
        const="",
        help="only who knows it may ask: letters, digits, - and _, at least 16; left out, one is made. The address "
        "that is printed holds it",
    )
    add_model_flags(parser)
    return parser


def _token(arguments: Namespace) -> str | None:
    """What was given, or made; None where none is asked for. Raises UserError."""
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: must be from 0 to 65535")
    if arguments.token is None:
        if not is_loopback(arguments.host):
            raise UserError(
                f"--host {arguments.host}: others can reach that, and would see the videos: add --token (one is made), "
                "or leave --host out"
            )
        return None
    if not arguments.token:
        return secrets.token_urlsafe(24)
    if not re.fullmatch(r"[A-Za-z0-9_-]{16,200}", arguments.token):
        raise UserError("--token: must be 16 to 200 letters, digits, - and _; --token alone makes one")
    return str(arguments.token)


def _end_at_once() -> NoReturn:
    """A thread that is inside torch or FFmpeg cannot be interrupted, and Python may fall over it while it ends."""
    print("adaclip: interrupted", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)
