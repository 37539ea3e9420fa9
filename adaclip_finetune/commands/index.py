"""`adaclip index`: make or update an index, merge the parts of one that shards wrote, or push it to where others
search it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adaclip_finetune.commands.flags import (
    MODEL,
    PLACES,
    Parser,
    a_path,
    a_place,
    a_word,
    add_checkpoint_flags,
    model_settings,
    places_of,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from adaclip_finetune.search.build import IndexingReport
    from adaclip_finetune.search.moments import MomentSettings


def run(words: Sequence[str]) -> int:
    """Make or update an index. Return 1 if some videos cannot be read, else 0. Raise UserError."""
    if words and words[0] == "merge":
        return _merge(words[1:])
    if words and words[0] == "push":
        return _push(words[1:])
    arguments = _parser().read(words)
    from adaclip_finetune.data.video.remote import path_of
    from adaclip_finetune.search.shards import Shard

    shard = None if arguments.shard is None else Shard.parse(arguments.shard)
    output = arguments.output if shard is None else shard.part(arguments.output)
    _check_output(output)
    videos = path_of(arguments.videos)
    if isinstance(videos, Path) and not videos.exists():
        raise UserError(f"{videos}: there is no such folder or annotation")
    settings = model_settings(arguments)
    moments = _moments(arguments)
    places = places_of(settings, videos, isinstance(videos, Path) and not videos.is_dir())
    settings = {name: value for name, value in settings.items() if name not in PLACES}

    from adaclip_finetune.data.video.discovery import describe_unknown_files
    from adaclip_finetune.processes import leave_group
    from adaclip_finetune.search.build import index_videos
    from adaclip_finetune.search.collection import collect_annotation, collect_folder, collect_remote
    from adaclip_finetune.search.search_model import load_retriever
    from adaclip_finetune.search.transcripts import update_transcripts
    from adaclip_finetune.training.signals import StopSignals

    with StopSignals():
        model = load_retriever(arguments.model, **settings | places)
        leave_group()  # of torchrun, which has assigned the device: from here on, shards do not wait for each other
        model.refuse_query_dependent()
        if isinstance(videos, Path):
            collection = collect_folder(videos) if videos.is_dir() else collect_annotation(videos, model.config)
        else:
            collection = collect_remote(videos)
        count = len(collection.videos) + len(collection.broken)
        trained = ", which was not finetuned" if model.untrained else ""
        share = f"the share {shard.number}/{shard.of} of " if shard else ""
        print(f"{arguments.model}{trained} → {output}: {share}{count} videos of {printable(collection.name)}")
        if collection.others:
            print(describe_unknown_files(collection.others))
        for problem in collection.problems:
            print(f"passed over: {printable(problem)}", file=sys.stderr)
        runner, how = None, {"dtype": arguments.dtype, "sync": arguments.sync, "settings": settings}
        if arguments.runner == "ray":
            from adaclip_finetune.search.ray_runner import RayRunner

            runner = RayRunner(str(arguments.model), settings | places)
        try:
            report = index_videos(model, collection, output, moments=moments, shard=shard, runner=runner, **how)
        except KeyboardInterrupt:
            print("Finished batches are kept; the same command continues", file=sys.stderr)
            raise
        _print_report(report, arguments)
        ids, mine = [video.id for video in collection.videos], collection if shard is None else shard.share(collection)
        transcripts = update_transcripts(output, mine.transcripts, ids, arguments.sync)
    if transcripts is not None:
        print(f"lines of transcripts in the index: {transcripts.lines:,} (files read: {transcripts.read:,})")
        for problem in transcripts.problems:
            print(f"passed over: {printable(problem)}", file=sys.stderr)
    if arguments.shard == "auto":
        return 0  # torchrun would stop the other shards
    return 1 if report.broken else 0


def _merge(words: Sequence[str]) -> int:
    """Merge the parts that shards wrote. Raise UserError."""
    parser = Parser(
        "adaclip index merge",
        "Merge the parts that `adaclip index --shard` wrote into one index, whose bytes are those of an index that one "
        "process makes. Parts that are missing, or of different models, settings or videos, are refused.",
    )
    parser.add_argument("parts", nargs="+", metavar="PART", type=a_path, help="a folder that --shard wrote")
    parser.add_argument("-o", "--output", required=True, metavar="NAME.index", type=a_path, help="the folder to write")
    arguments = parser.read(words)
    _check_output(arguments.output)

    from adaclip_finetune.search.merge import merge_parts

    count = merge_parts(arguments.parts, arguments.output)
    print(f"{len(arguments.parts)} parts → {arguments.output}: {count} videos")
    return 0


def _check_output(output: Path) -> None:
    if not output.absolute().parent.is_dir():
        raise UserError(f"-o {output}: there is no folder {output.absolute().parent}")
    if output.is_file():
        raise UserError(f"-o {output}: is a file; an index is a folder")


def _push(words: Sequence[str]) -> int:
    """Copy an index to a place where others search it. Raise UserError."""
    parser = Parser(
        "adaclip index push",
        "Copy an index to Milvus, a vector database, or to another folder, where `adaclip search`, `cut` and `serve` "
        "search it. The same command updates the copy: new and changed videos are stored, and those that the index no "
        "longer has are deleted. It continues after an interruption.",
        "adaclip index push NAME.index PLACE [--hnsw]",
        "PLACE is milvus://HOST:PORT/COLLECTION, milvus+https://HOST:PORT/COLLECTION, milvus:///PATH/TO/FILE.db (Milvus"
        " Lite) or a folder. The environment variable MILVUS_TOKEN holds the key or USER:PASSWORD, if one is needed.",
    )
    parser.add_argument("index", metavar="NAME.index", type=a_path, help="the folder that `adaclip index` made")
    parser.add_argument("place", metavar="PLACE", type=a_place, help="where to copy it")
    hnsw = "search approximately, by an HNSW graph; default: compare with all vectors"
    parser.add_argument("--hnsw", action="store_true", help=hnsw)
    arguments = parser.read(words)

    from adaclip_finetune.search.stores.places import open_store, push

    try:
        pushed = push(arguments.index, open_store(arguments.place, arguments.hnsw))
    except KeyboardInterrupt:
        print("What was stored is kept; the same command continues", file=sys.stderr)
        raise
    print(f"{arguments.index} → {arguments.place}: {pushed.stored} stored, {pushed.kept} unchanged, ", end="")
    print(f"{pushed.deleted} deleted")
    return 0


def _moments(arguments: Namespace) -> MomentSettings | None:
    """Return how the videos are to be divided. Raise UserError."""
    if arguments.moments is None:
        for flag in ("window", "stride"):
            if getattr(arguments, flag) is not None:
                raise UserError(f"--{flag} belongs to --moments")
        return None
    if arguments.moments == "shots" and arguments.stride is not None:
        raise UserError("--stride belongs to --moments windows; shots follow each other")

    from adaclip_finetune.search.moments import WINDOW, MomentSettings

    window = WINDOW if arguments.window is None else arguments.window
    return MomentSettings(arguments.moments, window, window / 2 if arguments.stride is None else arguments.stride)


def _parser() -> Parser:
    parser = Parser(
        "adaclip index",
        "Embed videos for `adaclip search` and `adaclip serve`, with a model that was finetuned or with a pretrained "
        "CLIP, which takes num_frm uniform frames of a video and their mean. Videos that are in the index already are "
        "kept, new and changed ones are added, and the same command continues after an interruption. Exit code 1 if "
        "some videos cannot be read: they are listed, and the others are indexed. `adaclip index merge PART... -o "
        "NAME.index` merges the parts that --shard wrote, and `adaclip index push` copies an index to Milvus.",
    )
    add = parser.add_argument
    model = "a run folder or checkpoint, or a pretrained CLIP: an open_clip name[:tag], or a file or folder of weights"
    add("model", metavar="MODEL", type=a_path, help=model)
    videos = "a folder of videos, with its subfolders, or its URL (s3://bucket/videos), or an annotation (JSON)"
    add("videos", metavar="VIDEOS", type=a_word, help=videos)
    add("-o", "--output", required=True, metavar="NAME.index", type=a_path, help="the folder of the index")
    add("--sync", action="store_true", help="drop videos that are no longer there")
    dtype = "of the vectors; float16 halves their size. Default: float32"
    add("--dtype", choices=("float32", "float16"), help=dtype)
    divided = "embed parts of the videos too: windows of equal length (the default), or shots"
    add("--moments", nargs="?", const="windows", choices=("windows", "shots"), help=divided)
    window = "length of a window, or the greatest of a shot; default 8"
    add("--window", metavar="SECONDS", type=float, help=window)
    stride = "time from the start of a window to that of the next; default half of --window"
    add("--stride", metavar="SECONDS", type=float, help=stride)
    shard = "embed a share of the videos, such as 1/4, into NAME.index-1-of-4; auto: that of the torchrun process"
    add("--shard", metavar="I/N", help=shard)
    add("--runner", choices=("ray",), help="embed the videos on a Ray cluster, with an actor for each GPU, or each CPU")
    add_checkpoint_flags(parser, *MODEL, *PLACES, "num_frm", "num_workers", "val_batch_size")
    return parser


def _print_report(report: IndexingReport, arguments: Namespace) -> None:
    from adaclip_finetune.data.readable import listing

    rate = f" ({report.embedded / report.seconds:.1f} videos/s)" if report.embedded else ""
    copies = f", {report.copies} with the bytes of another" if report.copies else ""
    moments = f", with {report.moments} moments" if report.moments else ""
    print(f"{report.embedded} embedded{rate}{copies}, {report.kept} unchanged; {report.count} in the index{moments}")
    if report.vanished and arguments.sync:
        print(f"{len(report.vanished)} dropped, which are no longer there")
    elif report.vanished:
        names = ", ".join(map(printable, report.vanished[:5])) + (" …" if len(report.vanished) > 5 else "")
        print(f"{len(report.vanished)} in the index are no longer there ({names}): --sync drops them")
    if report.broken:
        print(f"{len(report.broken)} cannot be read:\n{listing(report.broken, at_most=None)}", file=sys.stderr)
