"""`adaclip cut`: write the moments that a search finds as clips."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from adaclip_finetune.commands.flags import Parser, a_path, add_index, model_settings, require
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable


def run(words: Sequence[str]) -> int:
    """Search for moments, and cut them out. Return 1 if some cannot be cut, else 0. Raise UserError."""
    arguments = _parser().read(words)
    text, image, folder = arguments.text, arguments.image, arguments.output
    rules = (
        ((text is None) != (image is None), 'give one thing to search for: a text ("two dogs") or --image FILE'),
        (text is None or text.strip(), "the text to search for is empty"),
        (folder.absolute().parent.is_dir(), f"-o {folder}: there is no folder {folder.absolute().parent}"),
        (folder.is_dir() or not folder.exists(), f"-o {folder}: is a file; clips are written into a folder"),
    )
    require(rules)
    settings = model_settings(arguments)

    from adaclip_finetune.search.cut import CutFailed, clip_name, cut
    from adaclip_finetune.search.search_model import search_model_of
    from adaclip_finetune.search.stores.places import open_index

    index = open_index(arguments.index)
    index.need_moments()
    model = search_model_of(index, arguments.model, **settings)
    vector = model.encode_query([text])[0] if image is None else model.encode_image(image)
    hits = index.search_moments(vector[None], arguments.k, where=arguments.where)[0]
    names = [f"{hit.rank:02}_{clip_name(hit.video, *hit.moments[0].span, arguments.exact)}" for hit in hits]
    if there := [name for name in names if (folder / name).exists() and not arguments.overwrite]:
        raise UserError(f"{folder / there[0]}: is there already; --overwrite replaces it, or give another folder")
    folder.mkdir(exist_ok=True)
    failed = 0
    for hit, name in zip(hits, names, strict=True):
        try:
            cut(hit.video, *hit.moments[0].span, folder / name, arguments.exact)
        except CutFailed as error:
            failed += 1
            print(f"{hit.rank:4}  {printable(hit.video.id)}: cannot be cut: {error}", file=sys.stderr)
        else:
            print(f"{hit.rank:4}  {hit.score:.4f}  {printable(folder / name)}")
    return 1 if failed else 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip cut",
        "Search an index for moments, and write each as a video file of its own, named by rank, video and seconds. By "
        "default the stored video is copied, which takes no time; the clip then begins at the key frame before the "
        "moment, but most players skip to the moment in an mp4. Files such as ts and mpg are always re-encoded. The "
        "exit code is 1 if some moments could not be cut; they are listed.",
        "adaclip cut NAME.index (TEXT | --image FILE) [--where CONDITION] [-k N] -o DIR [--exact] [--overwrite]",
    )
    add_index(parser, "the folder that `adaclip index --moments` made, or milvus://…")
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="?", help="what the moments should show")
    add("--image", metavar="FILE", type=a_path, help="search by a picture")
    where = "cut only out of videos for which this holds, as for `adaclip search`"
    add("--where", metavar="CONDITION", action="append", default=[], help=where)
    add("-k", metavar="N", type=int, default=5, help="how many moments to cut; [default: 5]")
    add("-o", "--output", required=True, metavar="DIR", type=a_path, help="the folder for the clips")
    add("--exact", action="store_true", help="re-encode (H.264, AAC), so that clips start and end at the exact frame")
    add("--overwrite", action="store_true", help="replace clips that have the same names")
    return parser
