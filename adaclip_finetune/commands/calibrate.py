"""`adaclip calibrate`: measure from which score on a search has found something."""

from __future__ import annotations

from collections.abc import Sequence

from adaclip_finetune.commands.flags import Parser, a_path, add_index, model_settings
from adaclip_finetune.errors import UserError


def run(words: Sequence[str]) -> int:
    """Measure the thresholds of an index, keep them with it, and print them. Return 0. Raise UserError."""
    arguments = _parser().read(words)
    if not 0 <= arguments.false_finds < 100:
        raise UserError(f"--false-finds {arguments.false_finds:g}: must be from 0 to below 100 percent")
    settings = model_settings(arguments)

    from adaclip_finetune.data.annotations import load_annotations
    from adaclip_finetune.search.index import VideoIndex
    from adaclip_finetune.search.search_model import search_model_of
    from adaclip_finetune.search.stores.places import is_milvus
    from adaclip_finetune.search.threshold import UNSURE, calibrate, captions_of

    if is_milvus(arguments.index):
        raise UserError(
            f"{arguments.index}: thresholds are kept in the folder of an index, not in Milvus: give the folder"
        )
    index = VideoIndex.load(arguments.index)
    if arguments.captions is None:
        entries = [(video.id, video.captions) for video in index.videos]
    else:
        entries = [(video.video_id, video.sentences) for video in load_annotations(arguments.captions)]
    captions = captions_of(index, entries)
    if not captions:
        if arguments.captions is None:
            raise UserError(f"{arguments.index} holds no captions of its videos; give an annotation that does")
        raise UserError(f"{arguments.captions}: none of its videos that have captions is in {arguments.index}")
    found = calibrate(index, search_model_of(index, arguments.model, **settings), captions, arguments.false_finds)
    for way, one in found.items():
        ranked = "by their own vectors" if way == "whole" else "by their best moments"
        print(f"videos ranked {ranked}: threshold {one.score:.3f}, measured with {one.captions:,} captions")
        print(f"  {one.false_finds} of captions whose video is hidden are found")
        print(f"  {one.misses} of captions whose video is there are missed")
    if any(one.misses.percent > UNSURE for one in found.values()):
        print(
            f"Where more than {UNSURE:g} % are missed, a search says no more than that perhaps nothing was found. A "
            "higher --false-finds misses fewer, and so does a model that was finetuned on such videos."
        )
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip calibrate",
        "Measure below which score nothing in an index shows what was asked for, so that searches and the page can say "
        "so. Each caption is asked among all videos, and among those that are not its own, where what it describes is "
        "absent. Run it again when many videos were added.",
    )
    add_index(parser, "the folder that `adaclip index` made")
    add = parser.add_argument
    captions = "an annotation (JSON) of its videos, unseen in training; default: the captions in the index"
    add("captions", metavar="CAPTIONS.json", nargs="?", type=a_path, help=captions)
    wanted = "how many of the captions whose video is hidden may be found; default 5"
    add("--false-finds", metavar="PERCENT", type=float, default=5.0, help=wanted)
    return parser
