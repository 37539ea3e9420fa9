"""The story of `adaclip evaluate` with models: each checkpoint on each data set, zero-shot first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaclip_finetune.compare.model import Baseline, OpenModel, tell
from adaclip_finetune.compare.reranked import Bank, Scores, reranked_rows
from adaclip_finetune.compare.rows import Group, Row
from adaclip_finetune.compare.source import Source, find_source
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.queries import evaluation_queries
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.retrieval import RetrievalReport

OnResult = Callable[[OpenModel, EvaluationSplit, RetrievalReport], None]


@dataclass(frozen=True)
class Reranking:
    """Which methods, with what: the training captions of the bank, and the captions that choose the temperature."""

    methods: Sequence[str] = ()
    temperature: float | None = None
    bank: str | None = None
    validation: str | None = None


@dataclass
class Found:
    """Of one data set."""

    baselines: list[Baseline] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def group(self, name: str) -> Group:
        """Zero-shot first."""
        return Group(name, [*(baseline.row for baseline in self.baselines), *self.rows], self.remarks)


def evaluate(
    checkpoints: Sequence[Path],
    annotations: Sequence[str],
    settings: Path | None,
    overrides: Mapping[str, Any],
    reranking: Reranking,
    on_result: OnResult | None = None,
) -> list[Group]:
    """The rows of each annotation. `on_result` may look at each model's result before the model is dropped.

    Raises UserError, before anything is measured where that can be told.
    """
    check_annotations(*annotations, reranking.bank, reranking.validation)
    sources = [find_source(given, settings, overrides, annotations[0]) for given in checkpoints]
    found = {annotation: Found() for annotation in annotations}
    for source, label in zip(sources, _labels(sources), strict=True):
        model = OpenModel(source)
        splits = {annotation: model.read(annotation) for annotation in annotations}
        validation = _validation_scores(model, reranking)
        for annotation, split in splits.items():
            result = measure_on(model, annotation, split, label, found[annotation])
            if reranking.methods:
                scores = _scores(model, annotation, result, reranking)
                row = found[annotation].rows[-1]
                found[annotation].rows += reranked_rows(
                    row, scores, reranking.methods, reranking.temperature, validation
                )
            if on_result is not None:
                on_result(model, split, result)
    return [found[annotation].group(annotation) for annotation in annotations]


def check_annotations(*annotations: str | None) -> None:
    """Raises UserError for one that is wrong, before any of them is evaluated."""
    for annotation in annotations:
        if annotation is not None:
            load_annotations(annotation)


def measure_on(model: OpenModel, annotation: str, split: EvaluationSplit, label: str, found: Found) -> RetrievalReport:
    """Zero-shot, if this CLIP was not measured yet, then the model: both go to `found`."""
    tell(f"{label} on {annotation}")
    baseline = None
    try:
        baseline = model.zero_shot(split, found.baselines)
    except UserError as error:
        found.remarks.append(f"zero-shot of {label} is NOT measured: {error}")
    if baseline is not None and baseline not in found.baselines:
        found.baselines.append(baseline)
    result = model.measure(split, label)
    row = model.row(result, label, model.source.acquainted(annotation))
    found.rows.append(replace(row, baseline=None if baseline is None else baseline.row.label))
    return result


def _validation_scores(model: OpenModel, reranking: Reranking) -> Scores | None:
    if reranking.validation is None or reranking.temperature is not None:
        return None
    result = model.measure(model.read(reranking.validation), "validation")
    return _scores(model, reranking.validation, result, reranking)


def _scores(model: OpenModel, annotation: str, result: RetrievalReport, reranking: Reranking) -> Scores:
    assert result.similarity is not None, "there is one process"
    bank = None
    if reranking.bank is not None and "qb_norm" in reranking.methods:
        texts = evaluation_queries(load_annotations(reranking.bank), model.config.concat_captions).texts
        bank = Bank(model.bank(result, texts), texts)
    return Scores(annotation, result.similarity, result.queries, bank)


def _labels(sources: Sequence[Source]) -> list[str]:
    """Numbered where names are the same."""
    labels = [source.label for source in sources]
    return [
        label if labels.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(labels, start=1)
    ]
