"""`adaclip evaluate`: checkpoints or saved matrices on data sets, zero-shot first, reranked rows below their model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from adaclip_finetune.compare.checkpoints import OpenCandidate, find_candidates
from adaclip_finetune.compare.table import DataSetRows, RowKind, TableRow, same_queries
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.queries import Queries, evaluation_queries
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import DirectionMetrics
from adaclip_finetune.evaluation.rerank import (
    DUAL_SOFTMAX_TEMPERATURE,
    QB_NORM_TEMPERATURE,
    dual_softmax_metrics,
    qb_norm_metrics,
)
from adaclip_finetune.evaluation.similarity_file import SimilarityFile, similarity_file
from adaclip_finetune.evaluation.tasks.retrieval import COLUMNS, Retrieval, RetrievalReport, report_of_matrix

TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""The temperatures that validation chooses from."""
_DEFAULTS = {"dual_softmax": DUAL_SOFTMAX_TEMPERATURE, "qb_norm": QB_NORM_TEMPERATURE}
_NOT_IN_A_MATRIX = "saved matrices do not tell which videos were left out, what learned, and what the model costs"
_NO_ZERO_SHOT = (
    "zero-shot is NOT in this table: add it by --zero-shot Z.npy, which `adaclip train --do_inference "
    "--save_similarity Z.npy` writes, with the settings of the run and without --resume"
)

OnReport = Callable[[OpenCandidate, str, EvaluationSplit, RetrievalReport], None]


@dataclass(frozen=True)
class Reranking:
    """Reranking methods, a fixed temperature, and the files of the bank and of the validation that chooses it.

    The files are annotations for checkpoints, and saved matrices for saved matrices.
    """

    methods: Sequence[str] = ()
    temperature: float | None = None
    bank: str | None = None
    validation: str | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """Logits (T, V) in row blocks with their queries, and for qb_norm those of the bank's texts (B, V)."""

    name: str
    blocks: Iterable[Tensor]
    queries: Queries
    bank: Iterable[Tensor] | None = None
    bank_size: int = 0


def evaluate(
    checkpoints: Sequence[Path],
    annotations: Sequence[str],
    settings: Path | None,
    overrides: Mapping[str, Any],
    reranking: Reranking,
    on_report: OnReport | None = None,
) -> list[DataSetRows]:
    """Return the rows of each annotation. `on_report` sees each result while its model is open.

    Raises UserError, before anything is measured where possible.
    """
    check_annotations(*annotations, reranking.bank, reranking.validation)
    needs_retrieval = bool(reranking.methods) or on_report is not None
    candidates = find_candidates(checkpoints, settings, overrides, annotations[0], needs_retrieval)
    found = [DataSetRows(annotation) for annotation in annotations]
    for candidate in candidates:
        model = OpenCandidate(candidate)
        splits = [model.read(annotation) for annotation in annotations]
        validation = None
        if reranking.validation is not None:
            found_there = model.retrieve(model.read(reranking.validation), "validation")
            validation = _scores(model, reranking.validation, *found_there, reranking)
        for data_set, split in zip(found, splits, strict=True):
            task, report = model.add_rows(data_set, split)
            if isinstance(task, Retrieval) and isinstance(report, RetrievalReport):
                if reranking.methods:
                    scores = _scores(model, data_set.name, task, report, reranking)
                    data_set.models += reranked_rows(data_set.models[-1], scores, reranking, validation)
                if on_report is not None:
                    on_report(model, data_set.name, split, report)
    return found


def check_annotations(*annotations: str | None) -> None:
    """Raise UserError for a wrong annotation file, before anything is evaluated."""
    for annotation in filter(None, annotations):
        load_annotations(annotation)


def evaluate_matrices(
    paths: Sequence[Path], ids: Path | None, zero_shot: Path | None, reranking: Reranking
) -> DataSetRows:
    """Return a row for each saved matrix, below that of `zero_shot`; all must have the same queries and videos.

    Raises UserError.
    """
    files = [similarity_file(path, ids) for path in paths]
    baseline = None if zero_shot is None else similarity_file(zero_shot, ids)
    for file in filter(None, (*files, baseline)):
        if not same_queries(files[0].queries, file.queries):
            raise UserError(
                f"--similarity {file.path}: its queries or videos are not those of {files[0].path}; a table has one "
                "data set, so evaluate them one by one"
            )
    bank = None if reranking.bank is None else similarity_file(Path(reranking.bank))
    validation = None
    if reranking.validation is not None:
        saved = similarity_file(Path(reranking.validation))
        validation = Scores(str(saved.path), saved, saved.queries)
    found = DataSetRows(", ".join(map(str, paths)), remarks=[_NOT_IN_A_MATRIX])
    label = None
    if baseline is None:
        found.remarks.append(_NO_ZERO_SHOT)
    else:
        label = f"zero-shot ({baseline.path.stem})"
        found.baselines[()] = _matrix_row(baseline, label, "zero-shot")
    for file in files:
        if bank is not None and bank.queries.video_ids != file.queries.video_ids:
            raise UserError(f"--bank {bank.path}: its videos are not those of {file.path}, in the same order")
        unique = len({path.stem for path in paths}) == len(paths)
        row = _matrix_row(file, file.path.stem if unique else str(file.path), "model", label)
        scores = Scores(str(file.path), file, file.queries, bank, len(bank.queries.texts) if bank else 0)
        found.models += [row, *reranked_rows(row, scores, reranking, validation)]
    return found


def reranked_rows(row: TableRow, scores: Scores, reranking: Reranking, validation: Scores | None) -> list[TableRow]:
    """Return a row for each reranking method, marked for the other queries that it uses.

    The temperature is that of `reranking`, else the best by T2V R@1 on `validation`, else the default. Raises UserError
    for scores that are not finite.
    """
    rows = []
    for method in reranking.methods:
        try:
            if reranking.temperature is not None:
                temperature, chosen = reranking.temperature, "as given"
            elif validation is not None:
                temperature = _best_temperature(method, validation)
                chosen = f"the best of {len(TEMPERATURES)} on {validation.name}"
            else:
                temperature, chosen = _DEFAULTS[method], "the default"
            metrics = _rerank(method, scores, temperature)
        except ValueError as error:
            raise UserError(f"{scores.name}: {error}") from error
        if method == "dual_softmax":
            mark, seen = "transductive", "sees all test queries at once"
        else:
            mark, seen = "query bank", f"bank of {scores.bank_size:,} training captions; text to video only"
        rows.append(
            replace(
                row,
                label=f"{row.label} + {method} ({mark})",
                kind="reranked",
                figures={"v2t": None, **{name: found.as_dict() for name, found in metrics.items()}},
                ranks={name: row.ranks[name]._replace(ranks=found.ranks) for name, found in metrics.items()},
                gallery=row.measured_on,
                cost=None,
                note=f"{seen}; temperature {temperature:g}, {chosen}",
            )
        )
    return rows


def _rerank(method: str, scores: Scores, temperature: float) -> dict[str, DirectionMetrics]:
    owners = scores.queries.video_of_text
    if method == "dual_softmax":
        found = dual_softmax_metrics(scores.blocks, owners, temperature)
        return {"t2v": found.t2v, "v2t": found.v2t}
    assert scores.bank is not None, "the command refuses qb_norm without a bank"
    return {"t2v": qb_norm_metrics(scores.blocks, scores.bank, owners, temperature)}


def _best_temperature(method: str, validation: Scores) -> float:
    """Return the default temperature unless another one has a strictly better T2V R@1."""
    default = _DEFAULTS[method]
    candidates = [default, *(value for value in TEMPERATURES if value != default)]
    return max(candidates, key=lambda value: _rerank(method, validation, value)["t2v"].recall(1))


def _scores(model: OpenCandidate, name: str, task: Retrieval, report: RetrievalReport, reranking: Reranking) -> Scores:
    assert report.similarity is not None, "there is one process"
    if reranking.bank is None:
        return Scores(name, report.similarity, report.queries)
    texts = evaluation_queries(load_annotations(reranking.bank), model.config.concat_captions).texts
    bank = model.similarity_of(texts, task, report)
    return Scores(name, report.similarity, report.queries, bank, len(texts))


def _matrix_row(file: SimilarityFile, label: str, kind: RowKind, baseline: str | None = None) -> TableRow:
    report = report_of_matrix(file)
    figures, ranks, gallery = report.as_dict(), report.ranks(), report.gallery()
    return TableRow(label, kind, figures, COLUMNS, ranks, report.queries, gallery, baseline=baseline)
