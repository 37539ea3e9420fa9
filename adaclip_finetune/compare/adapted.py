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
from adaclip_finetune.evaluation.tasks.base import QueryRanks, Report
from adaclip_finetune.evaluation.tasks.captioning import PREFERRED, CaptioningFigures, CaptioningReport
from adaclip_finetune.evaluation.tasks.classification import ClassificationReport
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport

Measured = Metrics | ClassificationReport | CaptioningFigures


def adapted_rows(
    model: OpenCandidate, split: EvaluationSplit, plain: Report, row: TableRow, adaptation: Chosen
) -> list[TableRow]:
    """Return the rows that belong to the `row` of a model: the baselines by the reward without a step, the model
    adapted by itself as the reward, and the model adapted by the reward.

    The baselines are the reward alone, the model's first candidates ordered by the reward, and both together; of a
    captioner, the candidates that the reward prefers. `plain` is the report of the model as it is. In retrieval, only
    the directions that `adaptation` names have figures.
    """
    settings = adaptation.config
    assert isinstance(settings, ClipRewardSettings)

    def new(label: str, kind: RowKind, found: Measured, note: str) -> TableRow:
        figures, ranks = _figures_and_ranks(row, found, settings)
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
        if isinstance(report, CaptioningReport):
            seconds = report.caption_seconds / len(report.captions)
            how = f"adapted to each video ({chosen.steps} steps), {seconds:.2g} s each"
            return new(label, kind, report.figures, how), report
        assert isinstance(report, RetrievalReport | ClassificationReport)
        what = "video" if isinstance(report, ClassificationReport) else "query"
        times = [f"{name.upper()} {seconds:.2g} s a {what}" for name, seconds in report.query_seconds.items()]
        how = f"{chosen.loss}, {chosen.learns.method}, {chosen.steps} steps"
        found = report if isinstance(report, ClassificationReport) else report.metrics
        line = new(label, kind, found, f"adapted to each {what} ({how}), {', '.join(times)}")
        return replace(line, cost={f"{name}_query_seconds": s for name, s in report.query_seconds.items()}), report

    last, report = adapted(f"{row.label} + {adaptation.method}", "adapted", settings)
    rows = [new(label, "baseline", *one) for label, one in _baselines(row.label, plain, report, settings).items()]
    if settings.reward != (ITSELF,):
        itself = settings.model_copy(update={"reward": (ITSELF,), "weights": ()})
        rows.append(adapted(f"{row.label} + {adaptation.method} by itself", "baseline", itself)[0])
    return [*rows, last]


def _baselines(model: str, plain: Report, report: Any, settings: ClipRewardSettings) -> dict[str, tuple[Measured, str]]:
    """Return label → figures and note of what the reward does without a step. `report` is that of the adapted model."""
    if isinstance(report, CaptioningReport):
        note = f"of {settings.caption_candidates} captions a video, before any step"
        return {f"{model}, preferred by the reward": (report.baselines[PREFERRED], note)}
    found: Mapping[str, Measured]
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
    return {
        f"reward alone: {' + '.join(settings.reward)}": (found["alone"], "the reward by itself"),
        f"{model}, reranked by the reward": (found["reranked"], f"its first {first}, ordered by the reward"),
        f"{model} + the reward": (found["ensemble"], together),
    }


def _figures_and_ranks(
    row: TableRow, found: Measured, settings: ClipRewardSettings
) -> tuple[dict[str, Any], dict[str, QueryRanks]]:
    """Return figures and ranks on the queries of a row; of retrieval in the adapted directions."""
    if isinstance(found, CaptioningFigures):
        return found.as_dict(), {}
    if isinstance(found, ClassificationReport):
        return found.as_dict(), {"top1": row.ranks["top1"]._replace(ranks=found.ranks)}
    directions = ("t2v", "v2t") if settings.directions == "both" else (settings.directions,)
    ranks = {name: row.ranks[name]._replace(ranks=getattr(found, name).ranks) for name in directions}
    return {name: getattr(found, name).as_dict() if name in ranks else None for name in ("t2v", "v2t")}, ranks
