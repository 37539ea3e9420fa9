"""`adaclip index`: the command line of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.commands.model_flags import a_path, add_model_flags, given_of, model_settings
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from adaclip_finetune.search.build import Indexed
    from adaclip_finetune.search.retriever import Retriever
    from adaclip_finetune.search.videos import Source

_PLACES = ("video_dir", "frames_dir", "img_tmpl")
_READING = ("num_workers", "val_batch_size")


def run(words: Sequence[str]) -> int:
    """Make an index, or bring it up to date. Returns 0, or 1 if videos were broken; raises UserError."""
    arguments = _parser().read(words)
    if not arguments.output.absolute().parent.is_dir():
        raise UserError(f"-o {arguments.output}: there is no folder {arguments.output.absolute().parent}")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"-o {arguments.output}: is a file; an index is a folder")
    if not arguments.videos.exists():
        raise UserError(f"{arguments.videos}: there is no such folder of videos, or annotation")
    places = given_of(arguments, *_PLACES)
    if places and arguments.videos.is_dir():
        raise UserError(
            f"--{next(iter(places))} says where the videos of an annotation are; {arguments.videos} is a folder"
        )
    settings = model_settings(arguments, *_READING)

    from adaclip_finetune.search.build import index_videos
    from adaclip_finetune.search.request import Request
    from adaclip_finetune.search.retriever import load_retriever
    from adaclip_finetune.training.signals import StopSignals

    with StopSignals():
        if "video_dir" in places or "frames_dir" in places:
            places = {"video_dir": None, "frames_dir": None} | places
        model = load_retriever(arguments.run, **settings | places)
        model.refuse_query_dependent()
        source = _source(arguments.videos, model)
        count = len(source.clips) + len(source.broken)
        print(f"{arguments.run} → {arguments.output}: {count} videos of {printable(source.name)}")
        request = Request(arguments.kind, arguments.dtype, arguments.sync, settings)
        try:
            return _tell(index_videos(model, source, arguments.output, request), arguments)
        except KeyboardInterrupt:
            print("what is finished is kept; the same command goes on", file=sys.stderr)
            raise


def _parser() -> Parser:
    parser = Parser(
        "adaclip index",
        "Embed videos for `adaclip search`. What is in the index already is kept, what is new or changed is added, "
        "what was interrupted goes on with the same command. Exit code 1 if videos cannot be read: they are listed, "
        "and the others are indexed.",
    )
    parser.add_argument("run", metavar="RUN", type=a_path, help="a run folder, or a checkpoint")
    parser.add_argument(
        "videos", metavar="VIDEOS", type=a_path, help="a folder, with all in it and below it; or an annotation (JSON)"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="NAME.index", type=a_path, help="the folder that is made"
    )
    parser.add_argument("--sync", action="store_true", help="drop what is no longer there")
    parser.add_argument(
        "--kind",
        choices=("flat", "hnsw"),
        help="flat (the default): exact; hnsw: a graph, faster where videos are many",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), help="of the vectors; float16 takes half the room. Default: float32"
    )
    add_model_flags(parser, *_PLACES, *_READING)
    return parser


def _source(videos: Path, model: Retriever) -> Source:
    from adaclip_finetune.search.videos import videos_of_annotation, videos_of_folder

    return videos_of_folder(videos) if videos.is_dir() else videos_of_annotation(videos, model.config)


def _tell(done: Indexed, arguments: Any) -> int:
    from adaclip_finetune.data.readable import listing
    from adaclip_finetune.search.recall import K

    rate = f", {done.embedded / done.seconds:.1f} videos/s" if done.embedded else ""
    print(f"{done.embedded} embedded{rate}; {done.kept} were there already; {done.count} in the index")
    if done.vanished and arguments.sync:
        print(f"{len(done.vanished)} vanished ones dropped")
    elif done.vanished:
        names = ", ".join(map(printable, done.vanished[:5])) + (" …" if len(done.vanished) > 5 else "")
        print(f"{len(done.vanished)} are in the index and no longer there ({names}): --sync drops them")
    if (recall := done.about.recall) is not None:
        what, when = f"{done.about.kind}, {done.about.dtype}", f"; measured with {recall.videos} videos"
        asked = recall.asked + (when if recall.videos != done.count else "")
        print(f"{what}: finds {100 * recall.share:.2f} % of the {K} nearest by {recall.by} (asked: {asked})")
    if done.broken:
        print(f"{len(done.broken)} cannot be read:\n{listing(done.broken, at_most=None)}", file=sys.stderr)
    return 1 if done.broken else 0
