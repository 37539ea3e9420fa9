"""Rows of a model that adapts to each query by a reward, and of the baselines that the adaptation has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adaclip_finetune.compare.checkpoints import OpenCandidate, tell
from adaclip_finetune.compare.table import RowKind, TableRow
from adaclip_finetune.config.choices.adaptations import ClipRewardSettings
from adaclip_finetune.config.choices.base import Chosen
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.evaluation.adaptation.clip_reward import ITSELF
from adaclip_finetune.evaluation.metrics import Metrics
from adaclip_finetune.evaluation.reward import Rewarded, class_baselines
from adaclip_finetune.evaluation.tasks.base import Figures, QueryRanks, Report
from adaclip_finetune.evaluation.tasks.captioning import PREFERRED, CaptioningReport
from adaclip_finetune.evaluation.tasks.classification import ClassificationReport
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport


def adapted_rows(
    model: OpenCandidate, split: EvaluationSplit, plain: Report, row: TableRow, adaptation: Chosen
) -> list[TableRow]:
    """Return the rows that belong to the `row` of a model: its reward alone, the model's first candidates ordered by
    the reward, both together, the model adapted by itself as the reward, and the model adapted by the reward.

    `plain` is the report of the model as it is. In retrieval, only the directions that `adaptation` names have figures.
    """
    settings = adaptation.config
    assert isinstance(settings, ClipRewardSettings)
    if isinstance(plain, CaptioningReport):
        return _of_captions(model, split, row, adaptation, settings)
    directions = ("t2v", "v2t") if settings.directions == "both" else (settings.directions,)
    names = " + ".join(settings.reward)

    def new(label: str, kind: RowKind, found: Metrics | ClassificationReport, note: str) -> TableRow:
        figures, ranks = (
            _of_classes(row, found) if isinstance(found, ClassificationReport) else _of(row, found, directions)
        )
        return replace(
            row,
            label=label,
            kind=kind,
            figures=figures,
            ranks=ranks,
            gallery=row.gallery.splitlines()[0],
            cost={},
            baseline=row.baseline if kind == "adapted" else None,
            note=note,
            model=row.label,
        )

    def adapted(label: str, kind: RowKind, chosen: ClipRewardSettings) -> tuple[TableRow, Any]:
        tell(label)
        _, report = model.measure(split, label, adaptation.model_copy(update={"config": chosen}))
        assert isinstance(report, RetrievalReport | ClassificationReport)
        what = "video" if isinstance(report, ClassificationReport) else "query"
        times = [f"{name.upper()} {seconds:.2g} s a {what}" for name, seconds in report.query_seconds.items()]
        how = f"{chosen.loss}, {chosen.learns.method}, {chosen.steps} steps"
        note = f"adapted to each {what} ({how}), {', '.join(times)}"
        found = new(label, kind, report if isinstance(report, ClassificationReport) else report.metrics, note)
        return replace(found, cost={f"{name}_query_seconds": s for name, s in report.query_seconds.items()}), report

    last, report = adapted(f"{row.label} + {adaptation.method}", "adapted", settings)
    found: Mapping[str, Metrics | ClassificationReport]
    if isinstance(plain, ClassificationReport):
        assert plain.scores is not None, "there is one process"
        scores = class_baselines(plain.scores, report.others, settings.weights, settings.class_candidates)
        found = {name: plain.ranked_by(own) for name, own in scores.items()}
        first = f"{settings.class_candidates} classes of a video"
    else:
        assert isinstance(plain, RetrievalReport) and plain.similarity is not None, "there is one process"
        numbers = (settings.candidates, settings.caption_candidates)
        rewarded, queries = Rewarded(plain.similarity, report.others, settings.weights, *numbers), plain.queries
        found = {"alone": rewarded.alone(queries), "reranked": rewarded.reranked(queries)}
        found["ensemble"] = rewarded.ensemble(queries)
        first = f"{numbers[0]} videos of a text, or {numbers[1]} texts of a video"
    together = "the mean of both scores, each standardised over the candidates of a query"
    rows = [
        new(f"reward alone: {names}", "baseline", found["alone"], "the reward by itself"),
        new(
            f"{row.label}, reranked by the reward",
            "baseline",
            found["reranked"],
            f"its first {first}, ordered by the reward",
        ),
        new(f"{row.label} + the reward", "baseline", found["ensemble"], together),
    ]
    if settings.reward != (ITSELF,):
        itself = settings.model_copy(update={"reward": (ITSELF,), "weights": ()})
        rows.append(adapted(f"{row.label} + {adaptation.method} by itself", "baseline", itself)[0])
    return [*rows, last]


def _of_captions(
    model: OpenCandidate, split: EvaluationSplit, row: TableRow, adaptation: Chosen, settings: ClipRewardSettings
) -> list[TableRow]:
    """Return the rows of a captioner: the candidates that the reward prefers, and the captioner adapted by itself as
    the reward, and by the reward."""

    def new(label: str, kind: RowKind, figures: Figures, note: str) -> TableRow:
        return replace(
            row,
            label=f"{row.label}{label}",
            kind=kind,
            figures=figures.as_dict(),
            gallery=row.gallery.splitlines()[0],
            cost={},
            note=note,
            model=row.label,
        )

    def adapted(label: str, kind: RowKind, chosen: ClipRewardSettings) -> tuple[TableRow, CaptioningReport]:
        tell(f"{row.label}{label}")
        _, report = model.measure(split, label, adaptation.model_copy(update={"config": chosen}))
        assert isinstance(report, CaptioningReport)
        seconds = report.caption_seconds / len(report.captions)
        return new(
            label, kind, report.figures, f"adapted to each video ({chosen.steps} steps), {seconds:.2g} s each"
        ), report

    last, report = adapted(f" + {adaptation.method}", "adapted", settings)
    note = f"of {settings.caption_candidates} captions a video, before any step"
    rows = [new(", preferred by the reward", "baseline", report.baselines[PREFERRED], note)]
    if settings.reward != (ITSELF,):
        itself = settings.model_copy(update={"reward": (ITSELF,), "weights": ()})
        rows.append(adapted(f" + {adaptation.method} by itself", "baseline", itself)[0])
    return [*rows, last]


def _of(row: TableRow, metrics: Metrics, directions: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, QueryRanks]]:
    """Return figures and ranks in these directions, on the queries of a row."""
    ranks = {name: row.ranks[name]._replace(ranks=getattr(metrics, name).ranks) for name in directions}
    return {name: getattr(metrics, name).as_dict() if name in ranks else None for name in ("t2v", "v2t")}, ranks


def _of_classes(row: TableRow, report: ClassificationReport) -> tuple[dict[str, Any], dict[str, QueryRanks]]:
    """Return figures and ranks on the videos of a row."""
    return report.as_dict(), {"top1": row.ranks["top1"]._replace(ranks=report.ranks)}
