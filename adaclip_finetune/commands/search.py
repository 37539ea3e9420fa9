"""`adaclip search`: the command line of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.commands.model_flags import a_path, add_model_flags, model_settings, not_empty
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from argparse import Namespace

    from adaclip_finetune.search.index import Hit, IndexedVideo

_AT_ONCE = 256  # queries, of which all are read before the first is answered
_SHOWN = 5  # frames of a video that --explain prints


def run(words: Sequence[str]) -> int:
    """Search, and print what was found. Returns 0; raises UserError."""
    arguments = _parser().read(words)
    if sum(x is not None for x in (arguments.text, arguments.image, arguments.queries)) != 1:
        raise UserError('what is to be found? Give one of: a text ("two dogs"), --image FILE, --queries FILE')
    if arguments.k < 1:
        raise UserError(f"-k {arguments.k}: a whole number from 1 up is needed")
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("the text to search for is empty")
    queries = None if arguments.queries is None else _lines(arguments.queries)
    settings = model_settings(arguments)

    from adaclip_finetune.search.index import VideoIndex
    from adaclip_finetune.search.retriever import retriever_of

    index = VideoIndex.load(arguments.index)
    if not len(index):
        raise UserError(f"{arguments.index}: is empty; `adaclip index` adds videos")
    model = retriever_of(index, arguments.model, **settings)
    if arguments.image is not None:
        vector = model.encode_image(arguments.image)
        _print(str(arguments.image), index.search(vector[None], arguments.k)[0], arguments)
        return 0
    texts = [arguments.text] if queries is None else queries
    if cut := model.loaded.count_cut(texts, model.config.max_txt_len):
        what = f"max_txt_len {model.config.max_txt_len} of the model cuts {cut} of {len(texts)} queries"
        print(f"adaclip: {what}", file=sys.stderr)
    for start in range(0, len(texts), _AT_ONCE):
        block = texts[start : start + _AT_ONCE]
        for text, hits in zip(block, index.search(model.encode_text(block), arguments.k), strict=True):
            _print(text, hits, arguments)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip search",
        "Find videos in an index by a text or a picture: rank, score (the cosine), the time of the frame that weighs "
        "most, and the file.",
        "adaclip search NAME.index (TEXT | --image FILE | --queries FILE) [-k N] [--json] [--explain]",
    )
    parser.add_argument("index", metavar="NAME.index", type=a_path, help="what `adaclip index` made")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="what the videos should show")
    parser.add_argument("--image", metavar="FILE", type=a_path, help="search by a picture")
    parser.add_argument(
        "--queries", metavar="FILE", type=not_empty, help="many texts, a line each; - reads them from standard input"
    )
    parser.add_argument("-k", metavar="N", type=int, default=10, help="how many videos to find; default 10")
    parser.add_argument("--json", action="store_true", help="print a JSON object a query, each on a line of its own")
    parser.add_argument("--explain", action="store_true", help="show which frames of a video weigh most in its vector")
    parser.add_argument(
        "--model", metavar="RUN", type=a_path, help="where the model of the index is, should it have moved"
    )
    add_model_flags(parser)
    return parser


def _lines(path: str) -> list[str]:
    """Those that are not blank. A line feed ends one, and nothing else that Unicode knows for it. Raises UserError."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        texts = [line.strip() for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"--queries {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--queries {path}: not UTF-8 text at byte {error.start}") from error
    if not texts:
        raise UserError(f"--queries {path}: holds no query")
    return texts


def _print(query: str, hits: Sequence[Hit], arguments: Namespace) -> None:
    if arguments.json:
        print(json.dumps({"query": query, "hits": [_as_json(hit, arguments.explain) for hit in hits]}))
        return
    print(printable(query))
    for hit in hits:
        names = f"{printable(hit.video.id)}  {printable(hit.video.path)}"
        print(f"{hit.rank:4}  {hit.score:.4f}  {clock(hit.video.best_time):>9}  {names}")
        if arguments.explain:
            print(f"{'':25}{', '.join(_explained(hit.video))}")


def _explained(video: IndexedVideo) -> Iterator[str]:
    """The frames that weigh most, in the order of their weight."""
    order = sorted(range(len(video.frames)), key=lambda place: (-video.weights[place], place))
    for place in order[:_SHOWN]:
        yield f"{clock(video.times[place])} (frame {video.frames[place]}) {100 * video.weights[place]:.1f} %"
    if len(order) > _SHOWN:
        yield f"and {len(order) - _SHOWN} more"


def _as_json(hit: Hit, explain: bool) -> dict[str, Any]:
    video = hit.video
    found: dict[str, Any] = {"rank": hit.rank, "score": round(hit.score, 6), "id": video.id, "path": str(video.path)}
    found |= {"time": video.best_time, "duration": video.duration}
    if explain:
        rows = zip(video.frames, video.times, video.weights, strict=True)
        found["frames"] = [{"index": index, "time": time, "weight": weight} for index, time, weight in rows]
    return found


def clock(seconds: float | None) -> str:
    """1:05.3, or 1:00:05.3 from an hour on: frames are often less than a second apart. A dash where the time is not
    known."""
    if seconds is None:
        return "–"
    whole, tenths = divmod(int(10 * seconds), 10)
    minutes, rest = divmod(whole, 60)
    hours = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else f"{minutes}"
    return f"{hours}:{rest:02}.{tenths}"
