"""Rows of a model that adapts to each query by a reward, and of the baselines that the adaptation has to beat."""

from __future__ import annotations

from dataclasses import replace

from adaclip_finetune.compare.checkpoints import OpenCandidate, tell
from adaclip_finetune.compare.table import RowKind, TableRow
from adaclip_finetune.config.choices import Chosen, ClipRewardSettings
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.evaluation.adaptation.clip_reward import ITSELF
from adaclip_finetune.evaluation.metrics import Metrics
from adaclip_finetune.evaluation.reward import Rewarded
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport


def adapted_rows(
    model: OpenCandidate, split: EvaluationSplit, plain: RetrievalReport, row: TableRow, adaptation: Chosen
) -> list[TableRow]:
    """Return the rows that belong to the `row` of a model: its reward alone, the model's first candidates ordered by
    the reward, both together, the model adapted by itself as the reward, and the model adapted by the reward.

    `plain` is the report of the model as it is. Only the directions that `adaptation` names have figures.
    """
    settings = adaptation.config
    assert isinstance(settings, ClipRewardSettings) and plain.similarity is not None, "there is one process"
    names = " + ".join(settings.reward)

    def new(label: str, kind: RowKind, metrics: Metrics, note: str) -> TableRow:
        directions = ("t2v", "v2t") if settings.directions == "both" else (settings.directions,)
        ranks = {name: row.ranks[name]._replace(ranks=getattr(metrics, name).ranks) for name in directions}
        figures = {name: getattr(metrics, name).as_dict() if name in ranks else None for name in ("t2v", "v2t")}
        baseline = row.baseline if kind == "adapted" else None
        return replace(
            row,
            label=label,
            kind=kind,
            figures=figures,
            ranks=ranks,
            gallery=row.gallery.splitlines()[0],
            cost={},
            baseline=baseline,
            note=note,
            model=row.label,
        )

    def adapted(label: str, kind: RowKind, chosen: ClipRewardSettings) -> tuple[TableRow, RetrievalReport]:
        tell(label)
        section = adaptation.model_copy(update={"config": chosen})
        _, report = model.measure(split, label, section)
        assert isinstance(report, RetrievalReport)
        times = [f"{name.upper()} {seconds:.2g} s a query" for name, seconds in report.query_seconds.items()]
        note = f"adapted to each query ({chosen.learns.method}, {chosen.steps} steps), {', '.join(times)}"
        found = new(label, kind, report.metrics, note)
        return replace(found, cost={f"{name}_query_seconds": s for name, s in report.query_seconds.items()}), report

    last, report = adapted(f"{row.label} + {adaptation.method}", "adapted", settings)
    numbers = (settings.candidates, settings.caption_candidates)
    rewarded = Rewarded(plain.similarity, report.others, settings.weights, *numbers)
    rows = [
        new(f"reward alone: {names}", "baseline", rewarded.alone(plain.queries), "the reward by itself"),
        new(
            f"{row.label}, reranked by the reward",
            "baseline",
            rewarded.reranked(plain.queries),
            f"its first {numbers[0]} videos of a text, or {numbers[1]} texts of a video, ordered by the reward",
        ),
        new(
            f"{row.label} + the reward",
            "baseline",
            rewarded.ensemble(plain.queries),
            "the mean of both scores, each standardised over the candidates of a query",
        ),
    ]
    if settings.reward != (ITSELF,):
        itself = settings.model_copy(update={"reward": (ITSELF,), "weights": ()})
        rows.append(adapted(f"{row.label} + {adaptation.method} by itself", "baseline", itself)[0])
    return [*rows, last]
