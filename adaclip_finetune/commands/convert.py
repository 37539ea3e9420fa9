"""`adaclip convert FORMAT …`: a command for each format, with flags and help of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.config.layers import nearest
from adaclip_finetune.data.formats.published import FORMATS, SPLITS
from adaclip_finetune.errors import UserError


def run(words: Sequence[str]) -> int:
    """Write the annotation files of a published data set as train.json, val.json and test.json.

    Return the exit code, 2 if no format is named. Raises UserError.
    """
    if not words or words[0] in ("-h", "--help"):
        print("usage: adaclip convert FORMAT ... -o DIR\n")
        print("Write the annotation files of a published data set as train.json, val.json and test.json.\n")
        print(*(f"  {name:12} {known.help}" for name, known in FORMATS.items()), sep="\n")
        print("\n`adaclip convert FORMAT --help` lists the files that a format needs.")
        return 0 if words else 2
    name = words[0]
    if name not in FORMATS:
        raise UserError(
            f"there is no format {name}; the nearest is {nearest(name, FORMATS)} (adaclip convert --help), "
            "and `table` reads any CSV, TSV, JSON list or JSON Lines"
        )
    known = FORMATS[name]
    parser = Parser(
        f"adaclip convert {name}",
        f"Convert {known.help}. The splits that the source has are written as train.json, val.json and test.json "
        "(docs/formats.md).",
    )
    add = parser.add_argument
    for flag, settings in known.flags.items():
        add(flag, **settings)
    add("-o", "--output", metavar="DIR", type=Path, required=True, help="folder for the JSON files")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--videos", metavar="DIR", type=Path, help="count how many of the videos have a file in there")
    arguments = parser.read(words[1:])
    targets = {(arguments.output / f"{split}.json").resolve() for split in SPLITS}
    if sources := [path for path in vars(arguments).values() if isinstance(path, Path) and path.resolve() in targets]:
        raise UserError(f"{sources[0]}: is what is converted, and would be written over; give another -o DIR")

    from adaclip_finetune.data.formats.write import write_splits

    for line in write_splits(known.read(vars(arguments)), arguments.output, arguments.overwrite, arguments.videos):
        print(line)
    return 0
