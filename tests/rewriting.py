"""An index that is written anew without end, in a process of its own: `python rewriting.py FOLDER`."""

import sys
from pathlib import Path

from indexing import about, row, unit_rows

from adaclip_finetune.search.stored import write_index


def rewrite(folder: Path, count: int) -> None:
    """Names and vectors follow from the count, so that a mixture of two would be seen."""
    folder.mkdir(exist_ok=True)
    write_index(folder, about(), unit_rows(count, seed=count), [row(1000 * count + n) for n in range(count)])


if __name__ == "__main__":
    while True:
        for rows in (5, 4):
            rewrite(Path(sys.argv[1]), rows)
