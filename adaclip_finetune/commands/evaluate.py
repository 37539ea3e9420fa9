"""`adaclip evaluate`: figures of checkpoints on data sets, in one table."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaclip_finetune.commands.flags import Parser, given
from adaclip_finetune.compare.options import add_overrides, write_file
from adaclip_finetune.compare.request import RERANKINGS, check, read_shares
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from adaclip_finetune.compare.rows import Group


def run(words: Sequence[str]) -> int:
    """Evaluate, and print the table. Returns 0; raises UserError."""
    arguments = _parser().read(words)
    overrides = given(arguments)
    check(arguments, overrides)
    curve: list[Any] = []
    if arguments.similarity:
        groups = [_saved(arguments)]
    elif arguments.interpolate:
        curve, groups = _interpolated(arguments, overrides)
    else:
        groups = _measured(arguments, overrides)
    _show(arguments, groups, curve)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip evaluate",
        "Evaluate checkpoints on data sets, in one table: zero-shot first, with 95 % intervals, paired p-values and "
        "costs.",
        "adaclip evaluate RUN_OR_CHECKPOINT [MORE ...] --annot FILE [--annot FILE ...] [--SETTING VALUE ...]\n"
        "       adaclip evaluate --interpolate zero-shot RUN_OR_CHECKPOINT --val-annot FILE --annot FILE\n"
        "       adaclip evaluate --similarity S.npy [--ids S.json] [--zero-shot Z.npy]",
        "A checkpoint is evaluated with its own settings. Reranking is a row of its own below the model's, and marked, "
        "since it uses other queries than the one that is asked.",
    )
    parser.add_argument(
        "checkpoints",
        metavar="RUN_OR_CHECKPOINT",
        nargs="*",
        type=Path,
        help="a run folder (its best.safetensors), or a weights file: ours, an adapter, or a published one",
    )
    parser.add_argument(
        "--annot", metavar="FILE", action="append", help="captions to evaluate; several times if need be"
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings for a weights file that brings none")
    parser.add_argument("--markdown", metavar="FILE.md", type=Path, help="write the table as Markdown too")
    parser.add_argument("--json", metavar="FILE.json", type=Path, help="write all figures as JSON too")
    parser.add_argument(
        "--errors",
        metavar="FILE.html",
        type=Path,
        help="write an error analysis of the one checkpoint on the one annotation: a page with the worst queries, as "
        "frames, and recall by length; with --similarity without the frames",
    )
    rerank = parser.add_argument_group("Reranking")
    rerank.add_argument(
        "--rerank",
        action="append",
        choices=RERANKINGS,
        default=[],
        help="dual_softmax: transductive, sees all test queries at once; qb_norm: needs --bank. Given twice for both",
    )
    rerank.add_argument(
        "--bank",
        metavar="TRAIN.json",
        help="training captions for qb_norm; beside --similarity the .npy of their similarity to the same videos",
    )
    rerank.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        help="divides the logits in the softmax [default: 1 for dual_softmax, 5 for qb_norm; with --val-annot the best "
        "there]",
    )
    rerank.add_argument(
        "--val-annot",
        metavar="FILE",
        help="validation that chooses temperature or alpha; beside --similarity the .npy of it",
    )
    mix = parser.add_argument_group("Interpolation (WiSE-FT)")
    mix.add_argument(
        "--interpolate",
        nargs=2,
        metavar=("ZERO_SHOT", "FINETUNED"),
        help="mix the weights of CLIP: the word zero-shot, or CLIP weights on disk, with a run or checkpoint",
    )
    mix.add_argument("--alpha", metavar="FROM:TO:STEP", default="0:1:0.1", help="shares to try [default: 0:1:0.1]")
    saved = parser.add_argument_group("Without a model")
    saved.add_argument(
        "--similarity",
        metavar="S.npy",
        type=Path,
        action="append",
        help="a matrix from `adaclip train --save_similarity`; several of the same queries are compared",
    )
    saved.add_argument(
        "--ids",
        metavar="IDS.json",
        type=Path,
        help="their ids, of all alike [default: the .json of its name beside each]",
    )
    saved.add_argument(
        "--zero-shot",
        metavar="Z.npy",
        type=Path,
        help="the matrix of zero-shot, for the first row: `adaclip train --do_inference --save_similarity` without "
        "--resume writes it",
    )
    add_overrides(parser)
    return parser


def _measured(arguments: Namespace, overrides: dict[str, Any]) -> list[Group]:
    from adaclip_finetune.compare.error_page import error_page
    from adaclip_finetune.compare.error_report import error_report
    from adaclip_finetune.compare.evaluate import Reranking, evaluate

    def analyse(model: Any, split: Any, result: Any) -> None:
        page = error_page(error_report(model, arguments.annot[0], split, result))
        write_file("--errors", arguments.errors, page)

    reranking = Reranking(arguments.rerank, arguments.temperature, arguments.bank, arguments.val_annot)
    on_result = analyse if arguments.errors else None
    return evaluate(arguments.checkpoints, arguments.annot, arguments.config, overrides, reranking, on_result)


def _interpolated(arguments: Namespace, overrides: dict[str, Any]) -> tuple[list[Any], list[Group]]:
    from adaclip_finetune.compare.interpolate import curve_lines, interpolate

    zero_shot, finetuned = arguments.interpolate
    curve, groups = interpolate(
        zero_shot,
        Path(finetuned),
        read_shares(arguments.alpha),
        arguments.val_annot,
        arguments.annot,
        arguments.config,
        overrides,
    )
    print(*map(printable, curve_lines(curve, arguments.val_annot)), "", sep="\n")
    return curve, groups


def _saved(arguments: Namespace) -> Group:
    from adaclip_finetune.compare.saved import SavedReranking, evaluate_saved

    bank = None if arguments.bank is None else Path(arguments.bank)
    validation = None if arguments.val_annot is None else Path(arguments.val_annot)
    reranking = SavedReranking(arguments.rerank, arguments.temperature, bank, validation)
    group = evaluate_saved(arguments.similarity, arguments.ids, arguments.zero_shot, reranking)
    if arguments.errors:
        from adaclip_finetune.compare.error_page import error_page
        from adaclip_finetune.compare.error_report import error_report_of_matrix
        from adaclip_finetune.evaluation.similarity_file import similarity_file

        page = error_page(error_report_of_matrix(similarity_file(arguments.similarity[0], arguments.ids)))
        write_file("--errors", arguments.errors, page)
    return group


def _show(arguments: Namespace, groups: list[Group], curve: list[Any]) -> None:
    from adaclip_finetune.compare.rows import as_dict
    from adaclip_finetune.compare.table import as_markdown, as_text

    print(as_text(groups))
    if arguments.markdown:
        write_file("--markdown", arguments.markdown, as_markdown(groups))
    if arguments.json:
        content: dict[str, Any] = {"command": ["adaclip", *sys.argv[1:]], **as_dict(groups)}
        if curve:
            content["validation"] = [{"alpha": point.alpha, **point.metrics.as_dict()} for point in curve]
        write_file("--json", arguments.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
