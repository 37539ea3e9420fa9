"""`adaclip evaluate`: the figures of checkpoints on data sets, in one table."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaclip_finetune.commands.flags import (
    Parser,
    adaptation_settings,
    add_adapt_flags,
    add_checkpoint_flags,
    check_inputs,
    check_outputs,
    given,
    require,
    write_output,
)
from adaclip_finetune.errors import UserError
from adaclip_finetune.printable import printable

_NOT_COMPARABLE = (
    "each query that the model adapts to has scores by weights of its own, and reranking compares those of "
    "different queries"
)


def run(words: Sequence[str]) -> int:
    """Evaluate, print the table and write what was asked for. Return 0; raise UserError."""
    a = _parser().read(words)
    _check_flags(a)
    check_inputs({"--annot": a.annot, "--config": [a.config], "--bank": [a.bank], "--val-annot": [a.val_annot]})
    outputs = {"--markdown": a.markdown, "--json": a.json, "--errors": a.errors, "--save": a.save}
    read = [*a.annot, a.config, a.bank, a.val_annot, *a.checkpoints]
    check_outputs(outputs, {"--markdown": ".md", "--json": ".json", "--errors": ".html"}, read)

    from adaclip_finetune.compare.evaluate import Reranking, best_point, evaluate, interpolate
    from adaclip_finetune.compare.table import as_dict, as_markdown, as_text

    content: dict[str, Any] = {"command": ["adaclip", "evaluate", *words]}
    if a.interpolate:
        curves, data_sets = interpolate(a.checkpoints, a.interpolate, a.val_annot, a.annot, a.config, given(a), a.save)
        content["validation"] = [
            {"label": point.label, "alpha": point.alpha, **point.figures} for curve in curves for point in curve
        ]
        for curve in curves:
            print(f"{printable(curve[0].label)} on {printable(a.val_annot)}, by the share α of the finetuned weights:")
            for point in curve:
                print(f"{point.alpha:6.3g}  {point.line}{'  ← chosen' if point is best_point(curve) else ''}")
            print()
    else:
        reranking = Reranking(list(dict.fromkeys(a.rerank)), a.temperature, a.bank, a.val_annot)
        data_sets, page = evaluate(
            a.checkpoints, a.annot, a.config, given(a) | adaptation_settings(a), reranking, bool(a.errors)
        )
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
        "       adaclip evaluate RUN_OR_CHECKPOINT --annot FILE --interpolate A[,A...] [--val-annot FILE]\n"
        "       adaclip evaluate RUN_OR_CHECKPOINT --annot FILE --adapt clip_reward --reward CLIP[,CLIP...]",
        "Each checkpoint is evaluated with its own settings and the task of its run. Reranking adds marked rows below "
        "those of the model, because it uses other queries than the one that is asked.",
    )
    add = parser.add_argument
    checkpoints = "run folders (their best.safetensors) or weights files: ours, adapters, or published ones"
    add("checkpoints", metavar="RUN_OR_CHECKPOINT", nargs="+", type=Path, help=checkpoints)
    annot = "captions to evaluate; may be given several times"
    add("--annot", metavar="FILE", action="append", required=True, help=annot)
    add("--markdown", metavar="FILE.md", type=Path, help="also write the table as Markdown")
    add("--json", metavar="FILE.json", type=Path, help="also write all figures as JSON")
    errors = "also write a page about the errors of one checkpoint on one annotation: worst queries, recall by length"
    add("--errors", metavar="FILE.html", type=Path, help=errors)
    add = parser.add_argument_group("Reranking").add_argument
    rerank = "dual_softmax: transductive, sees all test queries at once; qb_norm: needs --bank; both: give it twice"
    add("--rerank", action="append", choices=("dual_softmax", "qb_norm"), default=[], help=rerank)
    add("--bank", metavar="TRAIN.json", help="training captions for qb_norm")
    temperature = "the logits are divided by T [default: 1 for dual_softmax, 5 for qb_norm, or by --val-annot]"
    add("--temperature", metavar="T", type=float, help=temperature)
    add("--val-annot", metavar="FILE", help="validation captions that choose the temperature, or A of --interpolate")
    add = parser.add_argument_group("Interpolation (WiSE-FT)").add_argument
    interpolate = "add rows whose CLIP is (1 - A) * the pretrained + A * the finetuned one, A from 0 to 1"
    add("--interpolate", metavar="A[,A...]", type=_shares, help=interpolate)
    save = "write the mixed model to a new folder, which every command takes like a run folder"
    add("--save", metavar="FOLDER", type=Path, help=save)
    adapt = "add rows of each model adapted to each query, below what the reward does without a gradient"
    add_adapt_flags(parser, adapt)
    add_checkpoint_flags(parser)
    return parser


def _check_flags(a: Namespace) -> None:
    """Raise UserError for flags that do not go together: the first rule that is broken."""
    tuned = a.temperature is not None
    mixes = 0 if a.interpolate is None else len(a.checkpoints) * (1 if a.val_annot else len(a.interpolate))
    rules = (
        (not (a.interpolate and (a.rerank or a.errors)), "--interpolate goes without --rerank and --errors"),
        (not a.save or mixes == 1, "--save needs one mix: --interpolate with one A or --val-annot, and one checkpoint"),
        (not a.save or not a.save.exists(), f"--save {a.save}: already exists; give another name"),
        (not a.errors or len(a.checkpoints) == len(a.annot) == 1, "--errors needs one checkpoint and one --annot"),
        (not tuned or 0 < a.temperature < float("inf"), f"--temperature {a.temperature}: must be a number above 0"),
        (a.rerank or not tuned, "--temperature belongs to --rerank"),
        (("qb_norm" in a.rerank) == bool(a.bank), "--rerank qb_norm and --bank belong together"),
        (a.rerank or a.interpolate or not a.val_annot, "--val-annot belongs to --rerank or --interpolate"),
        (not (a.val_annot and tuned), "--val-annot would choose the temperature that --temperature gives"),
        (not (a.adapt and a.rerank), f"--rerank {', '.join(a.rerank)} goes without --adapt: {_NOT_COMPARABLE}"),
        (not (a.adapt and (a.interpolate or a.errors)), "--adapt goes without --interpolate and --errors"),
    )
    require(rules)
    adaptation_settings(a)


def _shares(text: str) -> list[float]:
    """Return the numbers in a list such as `0,0.5,1`. Raise UserError unless all are from 0 to 1."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UserError(f"--interpolate {text}: must be numbers from 0 to 1, separated by commas")
    return list(dict.fromkeys(shares))
