"""`adaclip search`: find videos in an index."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import repeat, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaclip_finetune.commands.flags import (
    Parser,
    a_path,
    a_place,
    adaptation_settings,
    add_adapt_flags,
    add_index,
    model_settings,
    read_queries,
    require,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable
from adaclip_finetune.search.query import is_one_text, terms_of
from adaclip_finetune.search.where import conditions

if TYPE_CHECKING:
    from torch import Tensor

    from adaclip_finetune.search.index import Hit
    from adaclip_finetune.search.indexed_moments import FoundMoment
    from adaclip_finetune.search.search_model import SearchModel
    from adaclip_finetune.search.stores.base import Searchable
    from adaclip_finetune.search.threshold import RankedBy
    from adaclip_finetune.search.transcripts import Transcripts

_QUERIES_AT_ONCE = 256
_FRAMES_SHOWN = 5  # of a video, by --explain
_COMPARED = 100  # hits of each index among which --compare looks for those of the other
_COLUMN = 40  # characters
_COMBINED = """texts combine as '"a dog" + "snow" - 0.5 "a sled"'"""


def run(words: Sequence[str]) -> int:
    """Search, and print what was found. Return 0. Raise UserError."""
    arguments = _parser().read(words)
    examples = [arguments.image, arguments.video]
    _check_flags(arguments)
    name = arguments.text or arguments.image or arguments.video
    texts = [str(name)] if arguments.queries is None else read_queries(arguments.queries)
    settings, adaptation = model_settings(arguments), adaptation_settings(arguments)
    if adaptation and (any(examples) or any(len(terms_of(text)) > 1 for text in texts)):
        raise UserError("--adapt adapts to single texts: leave out --image, --video and combinations of texts")

    index, model = _open(arguments.index, arguments.model, settings)
    if "moment" in (arguments.by, arguments.score):
        index.need_moments()
    find = partial(index.search, score=arguments.score) if arguments.by == "video" else index.search_moments
    # Ranks in the other index are told down to _COMPARED.
    wanted = arguments.k if arguments.compare is None else max(arguments.k, _COMPARED)
    search = partial(find, k=wanted, where=arguments.where)
    encode, other = _encoder(model, arguments), None
    if arguments.compare is not None:
        others_settings = {name: value for name, value in settings.items() if name != "clip_weights"}
        old, old_model = _open(arguments.compare, None, others_settings)
        other = _encoder(old_model, arguments), partial(old.search, k=wanted, where=arguments.where)
        if not arguments.json:
            _print_names(index, old)
    if cut := model.count_cut(texts) if arguments.text or arguments.queries else 0:
        what = f"max_txt_len {model.config.max_txt_len} of the model cuts {cut} of {len(texts)} queries"
        print(f"adaclip: {what}", file=sys.stderr)
    said = _transcripts(index) if arguments.hybrid else None
    nothing = None
    if not (adaptation or other or said or any(examples)):
        nothing = _nothing_found(index, "moment" if arguments.by == "moment" else index.ranked_by(arguments.score))
    with _adapting(model, index, adaptation) as adapted:
        size = 1 if adapted else _QUERIES_AT_ONCE
        for start in range(0, len(texts), size):
            block = texts[start : start + size]
            vectors, seconds = adapted(block[0]) if adapted else (encode(block), None)
            before: Iterable[list[Hit] | None] = repeat(None) if other is None else other[1](other[0](block))
            found = search(vectors, lines=list(map(said.find, block))) if said else search(vectors)
            for text, hits, others in zip(block, found, before, strict=False):
                _print(text, hits, others, arguments, seconds, nothing(text, hits) if nothing else None)
    return 0


def _check_flags(a: Namespace) -> None:
    """Raise UserError for what cannot be searched, before anything is loaded: the first rule that is broken."""
    has_text, by_moment = a.text is not None or a.queries is not None, a.by == "moment"
    what = 'give what to search for: a text ("two dogs"), --queries FILE, --image FILE or --video FILE'
    if not ("//" in a.index or Path(a.index).exists()):
        what = f"{a.index} is no index; name one before the text, and {what}"
    ranks = "--compare shows the ranks of videos: leave out --explain and --by moment"
    said = "--hybrid ranks videos by what is said in them, too: leave out --by moment and --compare"
    rules = (
        (a.text is None or a.queries is None, "give either a text or --queries FILE"),
        (has_text or a.image or a.video, what),
        (a.k >= 1, f"-k {a.k}: a whole number from 1 up is needed"),
        (a.text is None or a.text.strip(), "the text to search for is empty"),
        (not (a.compare and (by_moment or a.explain)), ranks),
        (not (a.score and by_moment), "--score says what ranks videos: leave out --by moment"),
        (not (a.hybrid and (by_moment or a.compare)), said),
        (has_text or not a.hybrid, "--hybrid looks for a text in what is said: give a text, or --queries"),
    )
    require(rules)
    conditions(a.where)


def _open(place: str, moved: Path | None, settings: Mapping[str, Any]) -> tuple[Searchable, SearchModel]:
    from adaclip_finetune.search.search_model import search_model_of
    from adaclip_finetune.search.stores.places import open_index

    index = open_index(place)
    if not len(index):
        raise UserError(f"{place}: is empty; `adaclip index` adds videos")
    model = search_model_of(index, moved, **settings)
    if model.untrained:
        print(f"searched with {index.info.model_name}, which was not finetuned", file=sys.stderr)
    return index, model


def _encoder(model: SearchModel, arguments: Namespace) -> Callable[[Sequence[str]], Tensor]:
    """Return what gives the vectors (Q, D) of queries: sums of each text, the picture and the video that are given."""
    examples = [model.encode_image(arguments.image)[None]] if arguments.image else []
    examples += [model.encode_video(arguments.video)[0][None]] if arguments.video else []
    if arguments.text is None and arguments.queries is None:
        return lambda texts: sum(examples[1:], examples[0])
    return lambda texts: sum(examples, model.encode_query(texts))


def _transcripts(index: Searchable) -> Transcripts:
    from adaclip_finetune.search.transcripts import Transcripts

    if not index.fuses:
        raise UserError(f"{index.place}: --hybrid needs the folder of the index: search there")
    transcripts = Transcripts(index.folder)
    transcripts.need()
    return transcripts


def _nothing_found(index: Searchable, ranked_by: RankedBy) -> Callable[[str, Sequence[Hit]], str | None] | None:
    """Return what says that the hits of a text are too far from it, or None if that was not measured."""
    from adaclip_finetune.search.threshold import thresholds_of

    threshold = thresholds_of(index).get(ranked_by)
    if threshold is None:
        return None
    return lambda text, hits: (
        threshold.nothing_found(hits[0].score, index.distinct) if hits and is_one_text(text) else None
    )


def _adapting(model: SearchModel, index: Searchable, settings: Mapping[str, Any]) -> AbstractContextManager[Any]:
    if not settings:
        return nullcontext()
    from adaclip_finetune.search.adapted import adapting

    return adapting(model, index, settings)


def _parser() -> Parser:
    parser = Parser(
        "adaclip search",
        "Find videos in an index by texts, a picture or a video. Each line shows rank, score (the cosine), the time of "
        "the frame with the greatest weight, and the file. If the index has moments, it shows from when to when the "
        "best one lasts.",
        "adaclip search NAME.index [TEXT | --queries FILE] [--image FILE] [--video FILE] [--where CONDITION] [-k N]\n"
        "       [--hybrid] [--json] [--explain] [--by moment] [--score moment] [--compare OLD.index]\n"
        "       [--adapt clip_reward --reward CLIP[,CLIP...]]",
    )
    add_index(parser)
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="?", help=f"what the videos should show; {_COMBINED}")
    add("--image", metavar="FILE", type=a_path, help="search by a picture, alone or together with the text")
    add("--video", metavar="FILE", type=a_path, help="search by a video, alone or together with the text")
    add("--queries", metavar="FILE", type=a_path, help="many texts, one per line; - reads them from standard input")
    where = "find only videos for which this holds: 'duration > 60', 'name = *beach*', 'folder = holidays', "
    where += "'date >= 2026-05', 'season = 3'; several times, or with 'and' between them"
    add("--where", metavar="CONDITION", action="append", default=[], help=where)
    add("-k", metavar="N", type=int, default=10, help="how many to find; default 10")
    by = "find videos (the default), or moments, of which a video may have several"
    add("--by", choices=("video", "moment"), default="video", help=by)
    score = "what ranks videos: their own vector, or their best moment; default: whole, and moment if not finetuned"
    add("--score", choices=("whole", "moment"), help=score)
    hybrid = "look for the text in transcripts, too, and fuse both rankings (reciprocal rank fusion)"
    add("--hybrid", action="store_true", help=hybrid)
    add("--json", action="store_true", help="print one JSON object per query and line")
    add("--explain", action="store_true", help="show the frames with the greatest weight, and further moments")
    compared = "show beside it what another index of the same videos finds, such as one made before finetuning"
    add("--compare", metavar="OLD.index", type=a_place, help=compared)
    add_adapt_flags(parser, "rank by the model adapted to each text, by the reward of other CLIPs")
    return parser


def _print(
    query: str,
    hits: Sequence[Hit],
    others: Sequence[Hit] | None,
    arguments: Namespace,
    seconds: float | None,
    nothing: str | None,
) -> None:
    """Print what a query found; `seconds` is the time that adapting the model to it took, `nothing` that the hits are
    too far from it."""
    shown = hits[: arguments.k]
    if arguments.json:
        adapted = {} if seconds is None else {"adaptation": arguments.adapt, "seconds": round(seconds, 3)}
        found: dict[str, Any] = {"query": query, **adapted, "hits": [_as_json(hit, arguments.explain) for hit in shown]}
        found |= {"nothing": nothing} if nothing else {}
        if others is not None:
            found["compared"] = [_as_json(hit, False) for hit in others[: arguments.k]]
        print(json.dumps(found))
        return
    how = "" if seconds is None else f"  (the model was adapted to this query by {arguments.adapt}, {seconds:.2g} s)"
    print(f"{printable(query)}{how}")
    if nothing:
        print(f"{nothing} The best below it:")
    if others is not None:
        _print_beside(shown, hits, others)
    else:
        _print_hits(shown, arguments)


def _print_names(index: Searchable, other: Searchable) -> None:
    names = (f"{printable(one.name)} ({printable(one.info.model_name)})" for one in (index, other))
    print("{:6}{:<{width}}  {}".format("", *names, width=_COLUMN))


def _print_beside(shown: Sequence[Hit], hits: Sequence[Hit], others: Sequence[Hit]) -> None:
    """Print two rankings side by side; behind each video is its rank in the other one, if it is known."""
    ranks = [{hit.video.id: hit.rank for hit in found} for found in (others, hits)]
    for pair in zip_longest(shown, others[: len(shown)]):
        cells = []
        for hit, elsewhere in zip(pair, ranks, strict=True):
            there = f"({elsewhere.get(hit.video.id, '–')})" if hit else ""
            cells.append(f"{hit.score:.4f}  {printable(hit.video.id)} {there}" if hit else "")
        print(f"{(pair[0] or pair[1]).rank:4}  {cells[0]:<{_COLUMN}}  {cells[1]}")


def _print_hits(hits: Sequence[Hit], arguments: Namespace) -> None:
    width = 17 if any(hit.moments for hit in hits) else 9
    for hit in hits:
        names = f"{printable(hit.video.id)}  {printable(hit.video.path)}"
        print(f"{hit.rank:4}  {hit.score:.4f}  {_when(hit):>{width}}  {names}")
        if hit.line:
            print(f"{'':{16 + width}}{clock(hit.line.start)}–{clock(hit.line.end)} “{printable(hit.line.text)}”")
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
    found |= {"line": hit.line._asdict()} if hit.line else {}
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
