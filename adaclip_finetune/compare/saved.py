"""`adaclip evaluate --similarity`: the same table from matrices that were saved, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaclip_finetune.compare.reranked import Bank, Scores, reranked_rows
from adaclip_finetune.compare.rows import Group, Kind, Row, same_queries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.metrics import retrieval_metrics
from adaclip_finetune.evaluation.similarity_file import SimilarityFile, similarity_file

ZERO_SHOT: Kind = "zero-shot"
_NOT_TOLD = "saved matrices do not tell what was left out of the gallery, what learned, and what the model costs"
_NO_ZERO_SHOT = (
    "zero-shot is NOT in this table: --zero-shot Z.npy puts it there; `adaclip train --do_inference --save_similarity "
    "Z.npy`, with the settings of the run and without --resume, writes it"
)


@dataclass(frozen=True)
class SavedReranking:
    """What reranking needs, as files: the bank's similarity to the same videos, and that of the validation."""

    methods: Sequence[str]
    temperature: float | None
    bank: Path | None
    validation: Path | None


def evaluate_saved(paths: Sequence[Path], ids: Path | None, zero_shot: Path | None, reranking: SavedReranking) -> Group:
    """One row a matrix, in the order given, behind that of `zero_shot`; all are of the same queries and videos. Raises
    UserError."""
    files = [similarity_file(path, ids) for path in paths]
    baseline = None if zero_shot is None else similarity_file(zero_shot, ids)
    for file in [*files[1:], *([baseline] if baseline else [])]:
        _check_same(files[0], file)
    validation = None if reranking.validation is None else similarity_file(reranking.validation)
    bank = None if reranking.bank is None else similarity_file(reranking.bank)
    if bank is not None and validation is not None:
        raise UserError(
            f"--val-annot {validation.path}: a saved bank is of the videos of the test, and says nothing of those of "
            "the validation; give --temperature instead"
        )
    rows = [_row(baseline, f"{ZERO_SHOT} ({baseline.path.stem})", ZERO_SHOT)] if baseline else []
    of_all = rows[0].label if rows else None
    for file in files:
        label = file.path.stem if len({path.stem for path in paths}) == len(paths) else str(file.path)
        row = _row(file, label, "model", of_all)
        rows.append(row)
        scores = Scores(str(file.path), file, file.queries, _bank(bank, file))
        held_out = None if validation is None else Scores(str(validation.path), validation, validation.queries)
        rows += reranked_rows(row, scores, reranking.methods, reranking.temperature, held_out)
    return Group(", ".join(map(str, paths)), rows, [_NOT_TOLD, *([] if baseline else [_NO_ZERO_SHOT])])


def _row(file: SimilarityFile, label: str, kind: Kind, baseline: str | None = None) -> Row:
    metrics = retrieval_metrics(file, file.queries.video_of_text)
    listed = len(file.queries.video_ids)
    return Row(label, kind, metrics.t2v, metrics.v2t, file.queries, listed, baseline=baseline)


def _bank(bank: SimilarityFile | None, file: SimilarityFile) -> Bank | None:
    if bank is None:
        return None
    if bank.queries.video_ids != file.queries.video_ids:
        raise UserError(f"--bank {bank.path}: its videos are not those of {file.path}, in the same order")
    return Bank(bank, bank.queries.texts)


def _check_same(first: SimilarityFile, other: SimilarityFile) -> None:
    if not same_queries(first.queries, other.queries):
        raise UserError(
            f"--similarity {other.path}: its queries or videos are not those of {first.path}; one table is of one data "
            "set, so evaluate them one by one"
        )
