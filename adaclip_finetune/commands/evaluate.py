"""`adaclip evaluate`: the figures of checkpoints on data sets, in one table."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaclip_finetune.commands.flags import (
    Parser,
    add_checkpoint_flags,
    check_inputs,
    check_outputs,
    given,
    write_output,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

_MOST_SHARES = 101  # each of them is an evaluation


def run(words: Sequence[str]) -> int:
    """Evaluate, print the table and write what was asked for. Return 0; raise UserError."""
    a = _parser().read(words)
    _check_flags(a)
    shares = read_shares(a.alpha)
    check_inputs({"--annot": a.annot, "--config": [a.config], "--bank": [a.bank], "--val-annot": [a.val_annot]})
    outputs = {"--markdown": a.markdown, "--json": a.json, "--errors": a.errors}
    read = [*a.annot, a.config, a.bank, a.val_annot, *a.checkpoints, *(a.interpolate or [])]
    check_outputs(outputs, {"--markdown": ".md", "--json": ".json", "--errors": ".html"}, read)

    from adaclip_finetune.compare.evaluate import Reranking, best_point, evaluate, interpolate
    from adaclip_finetune.compare.table import as_dict, as_markdown, as_text

    content: dict[str, Any] = {"command": ["adaclip", "evaluate", *words]}
    if a.interpolate:
        finetuned = Path(a.interpolate[1])
        curve, data_sets = interpolate(finetuned, shares, a.val_annot, a.annot, a.config, given(a))
        content["validation"] = [{"alpha": point.alpha, **point.figures} for point in curve]
        print(f"{printable(a.val_annot)}, by the share α of the finetuned weights:")
        for point in curve:
            print(f"{point.alpha:6.3g}  {point.line}{'  ← chosen' if point is best_point(curve) else ''}")
        print()
    else:
        reranking = Reranking(list(dict.fromkeys(a.rerank)), a.temperature, a.bank, a.val_annot)
        data_sets, page = evaluate(a.checkpoints, a.annot, a.config, given(a), reranking, bool(a.errors))
        if page:
            write_output("--errors", a.errors, page)
    print(as_text(data_sets))
    if a.markdown:
        write_output("--markdown", a.markdown, as_markdown(data_sets))
    if a.json:
        write_output("--json", a.json, json.dumps(content | as_dict(data_sets), indent=1, ensure_ascii=False) + "\n")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip evaluate",
        "Evaluate checkpoints on data sets, in one table: zero-shot first, with 95 % intervals, paired p-values and "
        "costs.",
        "adaclip evaluate RUN_OR_CHECKPOINT [MORE ...] --annot FILE [--annot FILE ...] [--SETTING VALUE ...]\n"
        "       adaclip evaluate --interpolate zero-shot RUN_OR_CHECKPOINT --val-annot FILE --annot FILE",
        "Each checkpoint is evaluated with its own settings and the task of its run. Reranking adds marked rows below "
        "those of the model, because it uses other queries than the one that is asked.",
    )
    add = parser.add_argument
    checkpoints = "run folders (their best.safetensors) or weights files: ours, adapters, or published ones"
    add("checkpoints", metavar="RUN_OR_CHECKPOINT", nargs="*", type=Path, help=checkpoints)
    add("--annot", metavar="FILE", action="append", required=True, help="captions to evaluate; may be given again")
    add("--markdown", metavar="FILE.md", type=Path, help="also write the table as Markdown")
    add("--json", metavar="FILE.json", type=Path, help="also write all figures as JSON")
    errors = "also write a page about the errors of one checkpoint on one annotation: worst queries, recall by length"
    add("--errors", metavar="FILE.html", type=Path, help=errors)
    add = parser.add_argument_group("Reranking").add_argument
    rerank = "dual_softmax: transductive, sees all test queries at once; qb_norm: needs --bank. Give it twice for both"
    add("--rerank", action="append", choices=("dual_softmax", "qb_norm"), default=[], help=rerank)
    add("--bank", metavar="TRAIN.json", help="training captions for qb_norm")
    temperature = "divides the logits in the softmax [default: 1 for dual_softmax, 5 for qb_norm, or by --val-annot]"
    add("--temperature", metavar="T", type=float, help=temperature)
    add("--val-annot", metavar="FILE", help="validation captions that choose temperature or alpha")
    add = parser.add_argument_group("Interpolation (WiSE-FT)").add_argument
    interpolate = "mix the weights of CLIP before and after finetuning: the word zero-shot, and a run or checkpoint"
    add("--interpolate", nargs=2, metavar=("zero-shot", "RUN_OR_CHECKPOINT"), help=interpolate)
    add("--alpha", metavar="FROM:TO:STEP", default="0:1:0.1", help="shares to try [default: 0:1:0.1]")
    add_checkpoint_flags(parser)
    return parser


def _check_flags(a: Namespace) -> None:
    """Raise UserError for flags that do not go together: the first rule that is broken."""
    tuned = a.temperature is not None
    rules = (
        (bool(a.checkpoints) != bool(a.interpolate), "give either RUN_OR_CHECKPOINT or --interpolate (see --help)"),
        (not a.interpolate or a.interpolate[0] == "zero-shot", "--interpolate: the first word must be zero-shot"),
        (not (a.interpolate and (a.rerank or a.errors)), "--interpolate goes without --rerank and --errors"),
        (not a.interpolate or a.val_annot, "--interpolate needs --val-annot FILE: the captions that choose alpha"),
        (not a.errors or len(a.checkpoints) == len(a.annot) == 1, "--errors needs one checkpoint and one --annot"),
        (not tuned or 0 < a.temperature < float("inf"), f"--temperature {a.temperature}: must be a number above 0"),
        (a.rerank or not tuned, "--temperature belongs to --rerank"),
        (("qb_norm" in a.rerank) == bool(a.bank), "--rerank qb_norm and --bank belong together"),
        (a.rerank or a.interpolate or not a.val_annot, "--val-annot belongs to --rerank or --interpolate"),
        (not (a.val_annot and tuned), "--val-annot would choose the temperature that --temperature gives"),
    )
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def read_shares(text: str) -> list[float]:
    """Return the numbers that FROM:TO:STEP stands for, such as `0:1:0.1`, both ends included. Raise UserError."""
    try:
        start, end, step = map(float, text.split(":"))
        holds = 0 <= start <= end <= 1 and (end - start) / step + 1e-9 < _MOST_SHARES and step > 0
    except (ValueError, ZeroDivisionError):
        holds = False
    if not holds:
        raise UserError(f"--alpha {text}: must be FROM:TO:STEP between 0 and 1 with at most {_MOST_SHARES} steps")
    return [round(start + number * step, 10) for number in range(int((end - start) / step + 1e-9) + 1)]
