"""`adaclip search`: find videos in an index."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaclip_finetune.commands.flags import MODEL, Parser, a_path, add_checkpoint_flags, model_settings
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from adaclip_finetune.search.index import FoundMoment, Hit

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
    settings = model_settings(arguments)

    from adaclip_finetune.search.index import VideoIndex
    from adaclip_finetune.search.search_model import search_model_of

    index = VideoIndex.load(arguments.index)
    if not len(index):
        raise UserError(f"{arguments.index}: is empty; `adaclip index` adds videos")
    find = index.search_moments if arguments.by == "moment" else index.search
    if arguments.by == "moment":
        index.need_moments()
    model = search_model_of(index, arguments.model, **settings)
    if model.untrained:
        print(f"searched with {index.info.model_name}, which was not finetuned", file=sys.stderr)
    if arguments.image is not None:
        _print(str(arguments.image), find(model.encode_image(arguments.image)[None], arguments.k)[0], arguments)
        return 0
    if cut := model.loaded.count_cut(texts, model.config.max_txt_len):
        what = f"max_txt_len {model.config.max_txt_len} of the model cuts {cut} of {len(texts)} queries"
        print(f"adaclip: {what}", file=sys.stderr)
    for start in range(0, len(texts), _QUERIES_AT_ONCE):
        block = texts[start : start + _QUERIES_AT_ONCE]
        for text, hits in zip(block, find(model.encode_text(block), arguments.k), strict=True):
            _print(text, hits, arguments)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip search",
        "Find videos in an index by a text or a picture. Each line shows rank, score (the cosine), the time of the "
        "frame with the greatest weight, and the file. If the index has moments, it shows from when to when the best "
        "one lasts.",
        "adaclip search NAME.index (TEXT | --image FILE | --queries FILE) [-k N] [--by moment] [--json] [--explain]",
    )
    add = parser.add_argument
    add("index", metavar="NAME.index", type=a_path, help="the folder that `adaclip index` made")
    add("text", metavar="TEXT", nargs="?", help="what the videos should show")
    add("--image", metavar="FILE", type=a_path, help="search by a picture")
    add("--queries", metavar="FILE", type=a_path, help="many texts, one per line; - reads them from standard input")
    add("-k", metavar="N", type=int, default=10, help="how many to find; default 10")
    by = "find videos (the default), or moments, of which a video may have several"
    add("--by", choices=("video", "moment"), default="video", help=by)
    add("--json", action="store_true", help="print one JSON object per query and line")
    add("--explain", action="store_true", help="show the frames with the greatest weight, and further moments")
    moved = "the run or checkpoint that the index was made with, if it moved"
    add("--model", metavar="RUN", type=a_path, help=moved)
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


def _print(query: str, hits: Sequence[Hit], arguments: Namespace) -> None:
    if arguments.json:
        print(json.dumps({"query": query, "hits": [_as_json(hit, arguments.explain) for hit in hits]}))
        return
    print(printable(query))
    width = 17 if any(hit.moments for hit in hits) else 9
    for hit in hits:
        names = f"{printable(hit.video.id)}  {printable(hit.video.path)}"
        print(f"{hit.rank:4}  {hit.score:.4f}  {_when(hit):>{width}}  {names}")
        for copy in hit.copies:
            print(f"{'':{16 + width}}also {printable(copy.id)}  {printable(copy.path)}")
        if arguments.explain:
            frames = sorted(hit.video.frames, key=lambda frame: -frame.weight)[:_FRAMES_SHOWN]
            shown = [f"{clock(frame.time)} (frame {frame.index}) {100 * frame.weight:.1f} %" for frame in frames]
            moments = [f"{_span(moment)} ({moment.score:.4f})" for moment in hit.moments]
            for line in filter(None, (shown, moments)):
                print(f"{'':{16 + width}}{', '.join(line)}")


def _when(hit: Hit) -> str:
    return _span(hit.moments[0]) if hit.moments else clock(hit.video.best_time)


def _span(moment: FoundMoment) -> str:
    return f"{clock(moment.start)}–{clock(moment.end)}"


def _as_json(hit: Hit, explain: bool) -> dict[str, Any]:
    video = hit.video
    found = {"rank": hit.rank, "score": round(hit.score, 6), "id": video.id, "path": str(video.path)}
    if hit.moments:
        best = hit.moments[0]
        found |= {"start": best.start, "end": best.end, "time": best.time, "duration": video.duration}
        found["moments"] = [{"start": one.start, "end": one.end, "score": round(one.score, 6)} for one in hit.moments]
    else:
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
