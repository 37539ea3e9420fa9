"""`adaclip evaluate`: checkpoints on data sets, zero-shot first, with reranked and interpolated rows.

Interpolation is WiSE-FT (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"): CLIP's parameters and running
statistics are mixed with the finetuned ones; the selector, the aggregator and what a tower added to CLIP stay those of
the finetuned model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, lerp

from adaclip_finetune.compare.adapted import adapted_rows
from adaclip_finetune.compare.checkpoints import OpenCandidate, find_candidates, tell
from adaclip_finetune.compare.error_page import error_page
from adaclip_finetune.compare.table import DataSetRows, TableRow
from adaclip_finetune.config import load_config
from adaclip_finetune.data.annotations import load_annotations
from adaclip_finetune.data.queries import evaluation_queries
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation import build_adaptation
from adaclip_finetune.evaluation.metrics import DirectionMetrics
from adaclip_finetune.evaluation.rerank import DEFAULT_TEMPERATURES, dual_softmax_metrics, qb_norm_metrics
from adaclip_finetune.evaluation.similarity import SimilarityBlocks
from adaclip_finetune.evaluation.tasks.base import Report, Task, value
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalReport
from adaclip_finetune.training.checkpoint import BEST, save_tensors
from adaclip_finetune.weights.clip_weights import save_tokenizer
from adaclip_finetune.weights.plain import strict_load

# The temperatures that validation chooses from.
_TEMPERATURES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(frozen=True)
class Reranking:
    """Reranking methods, a fixed temperature, and the annotations of the bank and of the validation that chooses it."""

    methods: Sequence[str] = ()
    temperature: float | None = None
    bank: str | None = None
    validation: str | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """The similarity of a model on one annotation and, for qb_norm, that of the bank's texts to the same videos."""

    annotation: str
    report: RetrievalReport
    bank: SimilarityBlocks | None

    def rerank(self, method: str, temperature: float) -> dict[str, DirectionMetrics]:
        """Return the metrics of each direction that the method has. Raise UserError for scores that are not finite."""
        blocks, owners = self.report.similarity, self.report.queries.video_of_text
        assert blocks is not None, "there is one process"
        try:
            if method == "dual_softmax":
                found = dual_softmax_metrics(blocks, owners, temperature)
                return {"t2v": found.t2v, "v2t": found.v2t}
            assert self.bank is not None, "the command refuses qb_norm without a bank"
            return {"t2v": qb_norm_metrics(blocks, self.bank, owners, temperature)}
        except ValueError as error:
            raise UserError(f"{self.annotation}: {error}") from error


def evaluate(
    checkpoints: Sequence[Path],
    annotations: Sequence[str],
    settings: Path | None,
    overrides: Mapping[str, Any],
    reranking: Reranking,
    errors: bool = False,
) -> tuple[list[DataSetRows], str]:
    """Return the rows of each annotation and, with `errors`, the error page of the last model on the last one.

    With an adaptation among the `overrides` each model is measured as it is, and then adapted by it. Raise UserError,
    before anything is measured where possible.
    """
    read = [*annotations, *filter(None, (reranking.bank, reranking.validation))]
    candidates = find_candidates(checkpoints, settings, overrides, read, bool(reranking.methods) or errors)
    found, page = [DataSetRows(annotation) for annotation in annotations], ""
    for candidate in candidates:
        adaptation, as_it_is = candidate.config.adaptation, {"adaptation": load_config().adaptation}
        if adaptation.method == "clip_reward":
            candidate.config = candidate.config.model_copy(update=as_it_is)
        model = OpenCandidate(candidate)
        adapting = model.config.model_copy(update={"adaptation": adaptation})
        build_adaptation(adapting).start(
            adapting, model.open_other
        )  # names what is not there before anything is measured
        splits = [model.read(annotation) for annotation in annotations]
        validation = None
        if reranking.validation is not None:
            task, report = model.measure(model.read(reranking.validation), "validation")
            validation = _scores(model, reranking.validation, task, report, reranking)
        for data_set, split in zip(found, splits, strict=True):
            task, report = model.add_rows(data_set, split)
            if adaptation.method == "clip_reward":
                data_set.models += adapted_rows(model, split, report, data_set.models[-1], adaptation)
            if reranking.methods:
                scores = _scores(model, data_set.name, task, report, reranking)
                row = data_set.models[-1]
                data_set.models += [
                    _reranked(row, method, scores, reranking, validation) for method in reranking.methods
                ]
            if errors:
                assert isinstance(report, RetrievalReport)
                page = error_page(model, data_set.name, split, report)
    return found, page


def _reranked(row: TableRow, method: str, scores: Scores, reranking: Reranking, validation: Scores | None) -> TableRow:
    """Return a row, marked for the other queries that the method uses.

    The temperature is that of `reranking`, else the best by T2V R@1 on `validation`, else the default.
    """
    temperature, chosen = DEFAULT_TEMPERATURES[method], "the default"
    if reranking.temperature is not None:
        temperature, chosen = reranking.temperature, "as given"
    elif validation is not None:
        # Of equal ones the first is taken, which is the default.
        tried = [temperature, *(value for value in _TEMPERATURES if value != temperature)]
        temperature = max(tried, key=lambda value: validation.rerank(method, value)["t2v"].recall(1))
        chosen = f"the best of {len(tried)} on {validation.annotation}"
    metrics = scores.rerank(method, temperature)
    mark, seen = "transductive", "sees all test queries at once"
    if method == "qb_norm" and scores.bank is not None:
        mark, seen = "query bank", f"bank of {len(scores.bank.text):,} training captions; text to video only"
    return replace(
        row,
        label=f"{row.label} + {method} ({mark})",
        kind="reranked",
        figures={"v2t": None, **{name: found.as_dict() for name, found in metrics.items()}},
        ranks={name: row.ranks[name]._replace(ranks=found.ranks) for name, found in metrics.items()},
        gallery=row.gallery.splitlines()[0],
        cost={},
        note=f"{seen}; temperature {temperature:g}, {chosen}",
    )


def _scores(model: OpenCandidate, annotation: str, task: Any, report: Any, reranking: Reranking) -> Scores:
    assert isinstance(task, Retrieval) and isinstance(report, RetrievalReport)
    if reranking.bank is None:
        return Scores(annotation, report, None)
    texts = evaluation_queries(load_annotations(reranking.bank), model.config.concat_captions).texts
    return Scores(annotation, report, model.similarity_of(texts, task, report))


# ---- interpolation ----


class SharePoint(NamedTuple):
    """The figures on validation with the share `alpha` of the finetuned weights, and the same as a line of text.

    `label` names the finetuned model. `score` is the primary figure, with its sign changed if lower is better.
    """

    label: str
    alpha: float
    figures: Mapping[str, Any]
    line: str
    score: float


def interpolate(
    checkpoints: Sequence[Path],
    alphas: Sequence[float],
    validation: str | None,
    annotations: Sequence[str],
    settings: Path | None,
    overrides: Mapping[str, Any],
    save: Path | None = None,
) -> tuple[list[list[SharePoint]], list[DataSetRows]]:
    """Return the curve of each model on `validation`, and for each annotation the rows of zero-shot, models and mixes.

    `alphas` are the shares of the finetuned weights in the mixes. With `validation` only the best one there is measured
    on the annotations; without, all are, and there are no curves. `save` is a new folder for the model of the last mix.
    Raise UserError, before anything is measured where possible.
    """
    read = [*annotations, *([] if validation is None else [validation])]
    found, curves = [DataSetRows(annotation) for annotation in annotations], []
    for candidate in find_candidates(checkpoints, settings, overrides, read):
        model = OpenCandidate(candidate)
        start, end = _ends(model)
        clip, chosen, choice = model.session.model.clip, list(alphas), ""
        splits = [model.read(annotation) for annotation in annotations]
        if validation is not None:
            split, curve = model.read(validation), []
            for alpha in alphas:
                clip.load_state_dict(mixed(start, end, alpha))
                curve.append(_point(model, alpha, *model.measure(split, "validation")))
                tell(f"α {alpha:g} of {model.label} on {validation}: {curve[-1].line}")
            chosen, choice = [best_point(curve).alpha], f", the best of {len(curve)} shares on {validation}"
            curves.append(curve)
        for data_set, split in zip(found, splits, strict=True):
            clip.load_state_dict(end)
            model.add_rows(data_set, split)
            finetuned = data_set.models[-1]
            note = "; ".join(filter(None, (f"WiSE-FT{choice}", finetuned.note)))
            for alpha in chosen:
                label = f"{model.label}, α = {alpha:g}"
                tell(f"{label} on {data_set.name}")
                clip.load_state_dict(mixed(start, end, alpha))
                row = model.row(label, *model.measure(split, label), finetuned.baseline, note)
                data_set.models.append(replace(row, kind="interpolated"))
        if save is not None:
            _save(model, chosen[-1], save)
    return curves, found


def _ends(model: OpenCandidate) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return CLIP's tensors before and after finetuning, by the same names.

    Raise UserError if the method cannot be merged, or if the pretrained CLIP is not available.
    """
    session, clip = model.session, model.session.model.clip
    if not session.method.mergeable:
        raise UserError(
            f"--interpolate: what peft.method {session.config.peft.method} of {model.label} added to CLIP cannot be "
            "merged into its weights, so they cannot be mixed with the pretrained ones; leave this checkpoint out"
        )
    pretrained = session.pretrained()
    end = {name: tensor.detach().clone() for name, tensor in clip.state_dict().items()}
    start = {name: tensor.to(session.device) for name, tensor in pretrained.module.state_dict().items()}
    if "logit_bias" in end:  # changes no rank; finetuning with the sigmoid loss adds it to a CLIP that has none
        start.setdefault("logit_bias", end["logit_bias"])
    strict_load(clip, start, f"--interpolate: {pretrained.source}")
    return start, end


def _point(model: OpenCandidate, alpha: float, task: Task, report: Report) -> SharePoint:
    figures = report.as_dict()
    score = value(figures, task.primary) * (1 if task.greater_is_better else -1)
    return SharePoint(model.label, alpha, figures, task.one_line(report.figures), score)


def _save(model: OpenCandidate, alpha: float, folder: Path) -> None:
    """Write the model as it is, with the settings of the finetuned one, to a folder that is read like a run's."""
    session = model.session
    known = (session.checkpoint and session.checkpoint.metadata) or session.description()
    try:
        folder.mkdir()
        save_tokenizer(session.loaded, folder / "tokenizer")
    except OSError as error:
        raise UserError(f"--save {folder}: could not be written ({error})") from error
    state = session.method.merged_state(session.model)
    save_tensors(folder / BEST, state, {**known, "content": "model", "alpha": f"{alpha:g}"})
    tell(f"{folder / BEST}: {model.label}, α = {alpha:g}")


def mixed(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return (1 − alpha) · start + alpha · end, exactly the ends at 0 and 1; integer tensors are those of `end`."""
    return {
        name: lerp(start[name], tensor, alpha) if tensor.is_floating_point() else tensor for name, tensor in end.items()
    }


def best_point(curve: Sequence[SharePoint]) -> SharePoint:
    """Return the best point by the primary figure; among equal ones the lowest T2V mean rank, then the first."""
    return max(curve, key=lambda point: (point.score, -point.figures.get("t2v", {}).get("MeanR", 0)))
