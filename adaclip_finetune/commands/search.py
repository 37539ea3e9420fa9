"""`adaclip search`: find videos in an index."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaclip_finetune.commands.flags import (
    MODEL,
    Parser,
    a_path,
    adaptation_settings,
    add_adapt_flags,
    add_checkpoint_flags,
    model_settings,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from adaclip_finetune.search.index import Hit

_QUERIES_AT_ONCE = 256
_FRAMES_SHOWN = 5  # of a video, by --explain


def run(words: Sequence[str]) -> int:
    """Search, and print what was found. Return 0. Raise UserError."""
    arguments = _parser().read(words)
    if sum(given is not None for given in (arguments.text, arguments.image, arguments.queries)) != 1:
        raise UserError('give one thing to search for: a text ("two dogs"), --image FILE or --queries FILE')
    if arguments.k < 1:
        raise UserError(f"-k {arguments.k}: a whole number from 1 up is needed")
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("the text to search for is empty")
    texts = [arguments.text] if arguments.queries is None else _lines(arguments.queries)
    settings, adaptation = model_settings(arguments), adaptation_settings(arguments)
    if adaptation and arguments.image is not None:
        raise UserError("--adapt adapts to texts, and goes without --image")

    from adaclip_finetune.search.adapted import adapting
    from adaclip_finetune.search.index import VideoIndex
    from adaclip_finetune.search.search_model import search_model_of

    index = VideoIndex.load(arguments.index)
    if not len(index):
        raise UserError(f"{arguments.index}: is empty; `adaclip index` adds videos")
    model = search_model_of(index, arguments.model, **settings)
    if model.untrained:
        print(f"searched with {index.info.model_name}, which was not finetuned", file=sys.stderr)
    if arguments.image is not None:
        _print(str(arguments.image), index.search(model.encode_image(arguments.image)[None], arguments.k)[0], arguments)
        return 0
    if cut := model.loaded.count_cut(texts, model.config.max_txt_len):
        what = f"max_txt_len {model.config.max_txt_len} of the model cuts {cut} of {len(texts)} queries"
        print(f"adaclip: {what}", file=sys.stderr)
    if adaptation:
        with adapting(model, index, adaptation) as adapted:
            for text in texts:
                vector, seconds = adapted(text)
                _print(text, index.search(vector, arguments.k)[0], arguments, seconds)
        return 0
    for start in range(0, len(texts), _QUERIES_AT_ONCE):
        block = texts[start : start + _QUERIES_AT_ONCE]
        for text, hits in zip(block, index.search(model.encode_text(block), arguments.k), strict=True):
            _print(text, hits, arguments)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip search",
        "Find videos in an index by a text or a picture. Each line shows rank, score (the cosine), the time of the "
        "frame with the greatest weight, and the file.",
        "adaclip search NAME.index (TEXT | --image FILE | --queries FILE) [-k N] [--json] [--explain]\n"
        "       adaclip search NAME.index (TEXT | --queries FILE) --adapt clip_reward --reward CLIP[,CLIP...]",
    )
    add = parser.add_argument
    add("index", metavar="NAME.index", type=a_path, help="the folder that `adaclip index` made")
    add("text", metavar="TEXT", nargs="?", help="what the videos should show")
    add("--image", metavar="FILE", type=a_path, help="search by a picture")
    add("--queries", metavar="FILE", type=a_path, help="many texts, one per line; - reads them from standard input")
    add("-k", metavar="N", type=int, default=10, help="how many videos to find; default 10")
    add("--json", action="store_true", help="print one JSON object per query and line")
    add("--explain", action="store_true", help="show which frames of a video have the greatest weight")
    moved = "the run or checkpoint that the index was made with, if it moved"
    add("--model", metavar="RUN", type=a_path, help=moved)
    add_adapt_flags(parser, "rank by the model adapted to each text, by the reward of other CLIPs")
    add_checkpoint_flags(parser, *MODEL)
    return parser


def _lines(path: Path) -> list[str]:
    """Return the lines that are not blank. Only a line feed ends a line. Raise UserError."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        texts = [line.strip() for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"--queries {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--queries {path}: not UTF-8 text at byte {error.start}") from error
    if not texts:
        raise UserError(f"--queries {path}: holds no query")
    return texts


def _print(query: str, hits: Sequence[Hit], arguments: Namespace, seconds: float | None = None) -> None:
    """Print what a query found; `seconds` is the time that adapting the model to it took."""
    if arguments.json:
        said = {} if seconds is None else {"adaptation": arguments.adapt, "seconds": round(seconds, 3)}
        print(json.dumps({"query": query, **said, "hits": [_as_json(hit, arguments.explain) for hit in hits]}))
        return
    how = (
        f"  (the model was adapted to this query by {arguments.adapt}, {seconds:.2g} s)" if seconds is not None else ""
    )
    print(f"{printable(query)}{how}")
    for hit in hits:
        names = f"{printable(hit.video.id)}  {printable(hit.video.path)}"
        print(f"{hit.rank:4}  {hit.score:.4f}  {clock(hit.video.best_time):>9}  {names}")
        for copy in hit.copies:
            print(f"{'':25}also {printable(copy.id)}  {printable(copy.path)}")
        if arguments.explain:
            frames = sorted(hit.video.frames, key=lambda frame: -frame.weight)[:_FRAMES_SHOWN]
            shown = (f"{clock(frame.time)} (frame {frame.index}) {100 * frame.weight:.1f} %" for frame in frames)
            print(f"{'':25}{', '.join(shown)}")


def _as_json(hit: Hit, explain: bool) -> dict[str, Any]:
    video = hit.video
    found = {"rank": hit.rank, "score": round(hit.score, 6), "id": video.id, "path": str(video.path)}
    found |= {"time": video.best_time, "duration": video.duration}
    found |= {"copies": [{"id": copy.id, "path": str(copy.path)} for copy in hit.copies]} if hit.copies else {}
    return found | ({"frames": [asdict(frame) for frame in video.frames]} if explain else {})


def clock(seconds: float | None) -> str:
    """Return a time as 1:05.3, from an hour on as 1:00:05.3, and as a dash if it is not known."""
    if seconds is None:
        return "–"
    whole, tenths = divmod(int(10 * seconds), 10)
    minutes, rest = divmod(whole, 60)
    hours = f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else f"{minutes}"
    return f"{hours}:{rest:02}.{tenths}"
