"""`adaclip predict`: for each query the best videos, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import Parser, given
from adaclip_finetune.compare.options import add_overrides, check_file, check_targets
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

_LONGEST = 10_000  # letters of a query: far more than any text tower sees


def run(words: Sequence[str]) -> int:
    """Embed, rank and write. Returns 0; raises UserError."""
    parser = _parser()
    arguments = parser.read(words)
    if arguments.k < 1:
        raise UserError(f"-k {arguments.k}: must be a whole number >= 1")
    if arguments.output.suffix not in (".jsonl", ".csv"):
        raise UserError(f"--output {arguments.output}: must end in .jsonl or .csv, which decides the form")
    if (vectors := arguments.save_embeddings) is not None and vectors.suffix != ".safetensors":
        raise UserError(f"--save-embeddings {vectors}: must end in .safetensors")
    check_file("--annot", Path(arguments.annot))
    if arguments.config is not None:
        check_file("--config", arguments.config)
    targets = {"--output": arguments.output, "--save-embeddings": vectors}
    targets["the ids beside --save-embeddings,"] = None if vectors is None else vectors.with_suffix(".json")
    check_targets(targets, [arguments.annot, arguments.config, arguments.queries], [arguments.run])
    queries = None if arguments.queries is None else read_queries(arguments.queries)

    from adaclip_finetune.compare.predict import predict, write_embeddings, write_predictions

    predicted = predict(arguments.run, arguments.annot, queries, arguments.k, arguments.config, given(arguments))
    write_predictions(arguments.output, predicted)
    without = f", WITHOUT {predicted.missing} that cannot be read" if predicted.missing else ""
    each = min(arguments.k, len(predicted.videos))
    asked = f"{len(predicted.queries):,} {'query' if len(predicted.queries) == 1 else 'queries'}"
    found = f"the best {each} of {len(predicted.videos):,} videos{without}"
    print(f"{asked}, {found}: {printable(arguments.output)}")
    if vectors is not None:
        write_embeddings(vectors, predicted)
        print(f"vectors: {printable(vectors)}, ids beside it in {printable(vectors.with_suffix('.json').name)}")
    return 0


def read_queries(path: Path) -> list[str]:
    """One query a line; empty lines are none. Raises UserError, naming the line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--queries {path}: there is no such file (looked for in {Path.cwd()})") from None
    except OSError as error:
        raise UserError(f"--queries {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--queries {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    lines = text.split("\n")  # a line feed ends one, and nothing else that Unicode knows for it
    for number, line in enumerate(lines, start=1):
        if len(line) > _LONGEST:
            raise UserError(f"--queries {path}, line {number}: has {len(line):,} letters; at most {_LONGEST:,}")
    if not (queries := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--queries {path}: holds no query; write one a line")
    return queries


def _parser() -> Parser:
    parser = Parser(
        "adaclip predict",
        "For each query, the best videos of an annotation with their scores.",
        "adaclip predict RUN_OR_CHECKPOINT --annot FILE [--queries FILE.txt] [-k N] --output FILE.jsonl|FILE.csv "
        "[--save-embeddings FILE.safetensors] [--SETTING VALUE ...]",
    )
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run folder, or a weights file")
    parser.add_argument(
        "--annot", metavar="FILE", required=True, help="the videos, and the captions that are asked unless --queries"
    )
    parser.add_argument("--queries", metavar="FILE.txt", type=Path, help="ask these instead, one a line")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="videos for each query [default: 10]")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        required=True,
        help=".jsonl: an object a query; .csv: a line a query and video",
    )
    parser.add_argument(
        "--save-embeddings",
        metavar="FILE.safetensors",
        type=Path,
        help="keep the vectors of queries and videos; their ids come beside it in JSON",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings for a weights file that brings none")
    add_overrides(parser)
    return parser
