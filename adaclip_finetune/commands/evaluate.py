"""`adaclip evaluate`: the figures of checkpoints on data sets, in one table."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaclip_finetune.commands.checkpoint_flags import add_checkpoint_flags, check_inputs, check_outputs, write_output
from adaclip_finetune.commands.flags import Parser, given
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

if TYPE_CHECKING:
    from adaclip_finetune.compare.evaluate import Reranking
    from adaclip_finetune.compare.table import DataSetRows

_RERANKINGS = ("dual_softmax", "qb_norm")
_SUFFIXES = {"--markdown": ".md", "--json": ".json", "--errors": ".html"}
_MOST_SHARES = 101  # each of them is an evaluation


def run(words: Sequence[str]) -> int:
    """Evaluate, print the table and write what was asked for. Returns 0; raises UserError."""
    arguments = _parser().read(words)
    _check_flags(arguments)
    shares = read_shares(arguments.alpha)
    _check_files(arguments)

    from adaclip_finetune.compare.table import as_dict, as_markdown, as_text

    content: dict[str, Any] = {"command": ["adaclip", "evaluate", *words]}
    if arguments.similarity:
        data_sets = [_matrices(arguments)]
    elif arguments.interpolate:
        data_sets, content["validation"] = _interpolated(arguments, shares)
    else:
        data_sets = _checkpoints(arguments)
    print(as_text(data_sets))
    if arguments.markdown:
        write_output("--markdown", arguments.markdown, as_markdown(data_sets))
    if arguments.json:
        text = json.dumps(content | as_dict(data_sets), indent=1, ensure_ascii=False)
        write_output("--json", arguments.json, text + "\n")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip evaluate",
        "Evaluate checkpoints on data sets, in one table: zero-shot first, with 95 % intervals, paired p-values and "
        "costs.",
        "adaclip evaluate RUN_OR_CHECKPOINT [MORE ...] --annot FILE [--annot FILE ...] [--SETTING VALUE ...]\n"
        "       adaclip evaluate --interpolate zero-shot RUN_OR_CHECKPOINT --val-annot FILE --annot FILE\n"
        "       adaclip evaluate --similarity S.npy [--ids S.json] [--zero-shot Z.npy]",
        "Each checkpoint is evaluated with its own settings and the task of its run. Reranking adds marked rows below "
        "those of the model, because it uses other queries than the one that is asked.",
    )
    add = parser.add_argument
    checkpoints = "run folders (their best.safetensors) or weights files: ours, adapters, or published ones"
    add("checkpoints", metavar="RUN_OR_CHECKPOINT", nargs="*", type=Path, help=checkpoints)
    add("--annot", metavar="FILE", action="append", default=[], help="captions to evaluate; may be given several times")
    add("--markdown", metavar="FILE.md", type=Path, help="also write the table as Markdown")
    add("--json", metavar="FILE.json", type=Path, help="also write all figures as JSON")
    errors = (
        "write an error analysis of one checkpoint on one annotation: a page with the worst queries, the frames that "
        "were chosen, and recall by length; with --similarity without frames"
    )
    add("--errors", metavar="FILE.html", type=Path, help=errors)
    add = parser.add_argument_group("Reranking").add_argument
    rerank = "dual_softmax: transductive, sees all test queries at once; qb_norm: needs --bank. Give it twice for both"
    add("--rerank", action="append", choices=_RERANKINGS, default=[], help=rerank)
    bank = "training captions for qb_norm; with --similarity the .npy of their similarity to the same videos"
    add("--bank", metavar="TRAIN.json", help=bank)
    temperature = "divides the logits in the softmax [default: 1 for dual_softmax, 5 for qb_norm, or by --val-annot]"
    add("--temperature", metavar="T", type=float, help=temperature)
    validation = "validation captions that choose temperature or alpha; with --similarity the .npy of their similarity"
    add("--val-annot", metavar="FILE", help=validation)
    add = parser.add_argument_group("Interpolation (WiSE-FT)").add_argument
    interpolate = "mix the weights of CLIP: the word zero-shot, or CLIP weights on disk, with a run or checkpoint"
    add("--interpolate", nargs=2, metavar=("ZERO_SHOT", "FINETUNED"), help=interpolate)
    add("--alpha", metavar="FROM:TO:STEP", default="0:1:0.1", help="shares to try [default: 0:1:0.1]")
    add = parser.add_argument_group("Without a model").add_argument
    similarity = "a matrix from `adaclip train --save_similarity`; give several of the same queries to compare them"
    add("--similarity", metavar="S.npy", type=Path, action="append", default=[], help=similarity)
    ids = "the queries and videos of all matrices [default: the .json with the name of each]"
    add("--ids", metavar="IDS.json", type=Path, help=ids)
    zero_shot = (
        "the matrix of zero-shot, for the first row: `adaclip train --do_inference --save_similarity` without --resume "
        "writes it"
    )
    add("--zero-shot", metavar="Z.npy", type=Path, help=zero_shot)
    add_checkpoint_flags(parser)
    return parser


def _check_flags(arguments: Namespace) -> None:
    """Raise UserError for flags that do not go together: the first rule that is broken."""
    a, overrides = arguments, given(arguments)
    modes = {"RUN_OR_CHECKPOINT": a.checkpoints, "--interpolate": a.interpolate, "--similarity": a.similarity}
    chosen = [name for name, value in modes.items() if value]
    several = any(len(values) > 1 for values in (a.checkpoints, a.annot, a.similarity))
    tuned = a.temperature is not None
    rules = (
        (len(chosen) == 1, f"give one of {', '.join(modes)} (adaclip evaluate --help)"),
        (not (a.similarity and a.annot), "--annot does not go with --similarity, whose ids are the captions"),
        (not (a.similarity and (overrides or a.config)), "--similarity uses no model, and so no settings of one"),
        (a.similarity or a.annot, "--annot FILE is missing: the captions to evaluate"),
        (a.similarity or not a.ids, "--ids belongs to --similarity"),
        (a.similarity or not a.zero_shot, "--zero-shot belongs to --similarity"),
        (not (a.interpolate and a.rerank), "--rerank does not go with --interpolate: give the run alone"),
        (not (a.interpolate and a.errors), "--errors does not go with --interpolate: give the run alone"),
        (not a.interpolate or a.val_annot, "--interpolate needs --val-annot FILE: the captions that choose alpha"),
        (not (a.errors and several), "--errors needs exactly one checkpoint and one annotation, or one matrix"),
        (len(set(a.rerank)) == len(a.rerank), "--rerank: the same method is given twice"),
        (not tuned or 0 < a.temperature < float("inf"), f"--temperature {a.temperature}: must be a number above 0"),
        (a.rerank or not tuned, "--temperature belongs to --rerank"),
        (("qb_norm" in a.rerank) == bool(a.bank), "--rerank qb_norm and --bank belong together"),
        (a.rerank or a.interpolate or not a.val_annot, "--val-annot belongs to --rerank or --interpolate"),
        (
            not (a.similarity and a.bank and a.val_annot),
            "a saved --bank holds no videos of --val-annot: --temperature T",
        ),
        (not (a.val_annot and tuned), "--val-annot would choose the temperature that --temperature gives"),
    )
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def _check_files(arguments: Namespace) -> None:
    """Raise UserError for inputs that cannot be read, and outputs that cannot be written."""
    a = arguments
    inputs: dict[str, list[Any]] = {"--annot": a.annot, "--similarity": a.similarity}
    inputs |= {"--config": [a.config], "--bank": [a.bank], "--val-annot": [a.val_annot]}
    inputs |= {"--ids": [a.ids], "--zero-shot": [a.zero_shot]}
    check_inputs(inputs)
    read = [path for paths in inputs.values() for path in paths if path is not None]
    read += [Path(path).with_suffix(".json") for path in read if str(path).endswith(".npy")]  # the ids of a matrix
    outputs = {"--markdown": a.markdown, "--json": a.json, "--errors": a.errors}
    check_outputs(outputs, _SUFFIXES, [*read, *a.checkpoints, *(a.interpolate or [])])


def read_shares(text: str) -> list[float]:
    """Return the numbers that FROM:TO:STEP stands for, such as `0:1:0.1`, both ends included. Raises UserError."""
    wrong = UserError(f"--alpha {text}: must be FROM:TO:STEP between 0 and 1, such as 0:1:0.1")
    try:
        start, end, step = map(float, text.split(":"))
    except ValueError:
        raise wrong from None
    if not (0 <= start <= end <= 1 and step > 0):
        raise wrong
    if (end - start) / step + 1e-9 >= _MOST_SHARES:
        raise UserError(f"--alpha {text}: more than {_MOST_SHARES} shares, each of which is an evaluation")
    return [round(start + number * step, 10) for number in range(int((end - start) / step + 1e-9) + 1)]


def _checkpoints(arguments: Namespace) -> list[DataSetRows]:
    from adaclip_finetune.compare.error_page import error_page
    from adaclip_finetune.compare.evaluate import evaluate

    def write_errors(*measured: Any) -> None:
        write_output("--errors", arguments.errors, error_page(*measured))

    on_report = write_errors if arguments.errors else None
    settings, overrides = arguments.config, given(arguments)
    return evaluate(arguments.checkpoints, arguments.annot, settings, overrides, _reranking(arguments), on_report)


def _interpolated(arguments: Namespace, shares: list[float]) -> tuple[list[DataSetRows], list[dict[str, Any]]]:
    """Print the curve; return the rows, and the points of the curve for JSON."""
    from adaclip_finetune.compare.interpolate import best_point, interpolate

    zero_shot, finetuned = arguments.interpolate
    validation, settings, overrides = arguments.val_annot, arguments.config, given(arguments)
    curve, data_sets = interpolate(zero_shot, Path(finetuned), shares, validation, arguments.annot, settings, overrides)
    print(f"{printable(validation)}, by the share α of the finetuned weights:")
    for point in curve:
        mark = "  ← chosen" if point is best_point(curve) else ""
        print(f"{point.alpha:6.3g}  {point.line}{mark}")
    print()
    return data_sets, [{"alpha": point.alpha, **point.figures} for point in curve]


def _matrices(arguments: Namespace) -> DataSetRows:
    from adaclip_finetune.compare.error_page import error_page_of_matrix
    from adaclip_finetune.compare.evaluate import evaluate_matrices
    from adaclip_finetune.evaluation.similarity_file import similarity_file

    found = evaluate_matrices(arguments.similarity, arguments.ids, arguments.zero_shot, _reranking(arguments))
    if arguments.errors:
        page = error_page_of_matrix(similarity_file(arguments.similarity[0], arguments.ids))
        write_output("--errors", arguments.errors, page)
    return found


def _reranking(arguments: Namespace) -> Reranking:
    from adaclip_finetune.compare.evaluate import Reranking

    return Reranking(arguments.rerank, arguments.temperature, arguments.bank, arguments.val_annot)
