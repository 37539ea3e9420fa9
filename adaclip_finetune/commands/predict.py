"""`adaclip predict`: write the best videos of each query to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaclip_finetune.commands.flags import (
    Parser,
    add_checkpoint_flags,
    check_inputs,
    check_outputs,
    given,
    read_queries,
    write_output,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable


def run(words: Sequence[str]) -> int:
    """Embed, rank and write. Return 0; raise UserError."""
    parser = Parser(
        "adaclip predict",
        "For each query, write the best videos of an annotation and their scores.",
        "adaclip predict RUN_OR_CHECKPOINT --annot FILE [--queries FILE.txt] [-k N] --output FILE.jsonl|FILE.csv "
        "[--save-embeddings FILE.safetensors] [--SETTING VALUE ...]",
    )
    add = parser.add_argument
    add("run", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run folder, or a weights file")
    add("--annot", metavar="FILE", required=True, help="annotation of the videos; its captions are the queries")
    add("--queries", metavar="FILE.txt", type=Path, help="other queries in place of the captions, one per line")
    add("-k", type=int, default=10, metavar="N", help="videos per query [default: 10]")
    told = ".jsonl: one object per query; .csv: one line per query and video"
    add("--output", metavar="FILE", type=Path, required=True, help=told)
    told = "also write the vectors of queries and videos, and their ids to a .json file of the same name"
    add("--save-embeddings", metavar="FILE.safetensors", type=Path, help=told)
    add_checkpoint_flags(parser)
    a = parser.read(words)
    if a.k < 1:
        raise UserError(f"-k {a.k}: must be a whole number >= 1")
    vectors = a.save_embeddings
    ids = None if vectors is None else vectors.with_suffix(".json")
    check_inputs({"--annot": [a.annot], "--config": [a.config], "--queries": [a.queries]})
    outputs = {"--output": a.output, "--save-embeddings": vectors, "--save-embeddings, its ids": ids}
    suffixes = {"--output": ".jsonl .csv", "--save-embeddings": ".safetensors", "--save-embeddings, its ids": ".json"}
    check_outputs(outputs, suffixes, [a.annot, a.config, a.queries, a.run])
    queries = None if a.queries is None else read_queries(a.queries)

    from adaclip_finetune.compare.predict import predict

    found = predict(a.run, a.annot, queries, a.k, a.config, given(a))
    write_output("--output", a.output, found.as_csv() if a.output.suffix == ".csv" else found.as_json_lines())
    without = f", WITHOUT {found.missing} that cannot be read" if found.missing else ""
    best = f"the best {min(a.k, len(found.videos))} of {len(found.videos):,} videos{without}"
    print(f"queries: {len(found.queries):,}, {best}: {printable(a.output)}")
    if ids is not None:
        content, names = found.vectors()
        write_output("--save-embeddings", vectors, content)
        write_output("--save-embeddings", ids, names)
        print(f"vectors: {printable(vectors)}, ids beside it in {printable(ids.name)}")
    return 0
