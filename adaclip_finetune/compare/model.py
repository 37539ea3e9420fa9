"""A checkpoint, built and ready to be measured, and the zero-shot baseline that belongs to it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.compare.rows import Cost, Row
from adaclip_finetune.compare.source import Source
from adaclip_finetune.config import Config
from adaclip_finetune.data.splits import EvaluationSplit
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.similarity import SimilarityBlocks
from adaclip_finetune.evaluation.tasks.retrieval import Retrieval, RetrievalReport
from adaclip_finetune.evaluation.zero_shot import zero_shot_config
from adaclip_finetune.model.flops import count_gflops
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.peft.report import TrainableReport
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.training.data import read_split
from adaclip_finetune.training.device import launched_processes, make_accelerator
from adaclip_finetune.training.measure import measure
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import Session, open_model
from adaclip_finetune.weights.digest import weights_digest
from adaclip_finetune.weights.loaded import LoadedClip


class Baseline(NamedTuple):
    """Zero-shot of a CLIP: what tells it from others, and the figures."""

    key: tuple[Any, ...]
    row: Row


class OpenModel:
    """A checkpoint on its device. It is measured on one annotation after the other."""

    def __init__(self, source: Source) -> None:
        """Raises UserError where the weights do not fit the settings, or the device is not there."""
        if launched_processes() > 1:
            raise UserError("evaluate and predict are for one process: start them without torchrun and accelerate")
        self.source = source
        accelerator = make_accelerator(source.config)
        set_seed(source.config.seed)
        self.session: Session = open_model(source.config, accelerator=accelerator, learn=False)

    @property
    def config(self) -> Config:
        """With the CLIP that the checkpoint was made with."""
        return self.session.config

    def read(self, annotation: str) -> EvaluationSplit:
        """What is to be evaluated; videos that are left out, on request, are told on stderr. Raises UserError."""
        loud = RunFolder(self.config, sys.stderr)
        split = read_split(self.config, annotation, loud, annotation)
        cut = self.session.loaded.count_cut(split.queries.texts, self.config.max_txt_len)
        if cut:
            tell(f"{annotation}: max_txt_len {self.config.max_txt_len} cuts {cut} of {len(split.queries.texts)} texts")
        return split

    def measure(self, split: EvaluationSplit, label: str) -> RetrievalReport:
        """The figures on a split."""
        return self._measured(split, self.config, self.session.loaded, self.session.model, label)

    def row(self, result: RetrievalReport, label: str, note: str = "") -> Row:
        """A line of the table."""
        shares = trained_shares(self.source, self.session)
        cost = Cost(*shares, self.session.gflops.video, videos_per_second(result))
        return Row(label, "model", result.metrics.t2v, result.metrics.v2t, result.queries, result.num_listed, cost,
                   note=note)  # fmt: skip

    def zero_shot(
        self, split: EvaluationSplit, known: Sequence[Baseline], towers: LoadedClip | None = None, of: str = ""
    ) -> Baseline:
        """The baseline of this model, measured unless it is among the `known`; or with other `towers`, named in `of`.

        Raises UserError where CLIP as it was before is not at hand.
        """
        config, pretrained = zero_shot_config(self.config), towers or self.session.pretrained()
        seen = (config.num_frm, config.segment_sampling, config.max_txt_len, config.concat_captions, config.precision)
        frames = (config.frames_dir, config.video_dir, config.img_tmpl, config.skip_missing)
        key = (weights_digest(pretrained.module), *seen, *frames)
        if same := [baseline for baseline in known if baseline.key == key]:
            return same[0]
        model = VideoRetriever(config, pretrained).to(self.session.device)
        result = self._measured(split, config, pretrained, model, "zero-shot")
        label = f"zero-shot{of}, {config.num_frm} frames"
        if same_label := [baseline for baseline in known if baseline.row.label.startswith(label)]:
            label += f" ({len(same_label) + 1})"
        cost = Cost(0.0, 0.0, count_gflops(model, config.num_frm).video, videos_per_second(result))
        note = f"{pretrained.source}, {config.num_frm} uniform frames, their mean"
        metrics = result.metrics
        return Baseline(
            key, Row(label, "zero-shot", metrics.t2v, metrics.v2t, result.queries, result.num_listed, cost, note=note)
        )

    def _measured(
        self, split: EvaluationSplit, config: Config, loaded: LoadedClip, model: VideoRetriever, label: str
    ) -> RetrievalReport:
        with closing(Retrieval(config, split, loaded, model.views(), label)) as task:
            report = measure(self.session, task, model)
        assert isinstance(report, RetrievalReport)
        return report

    def bank(self, result: RetrievalReport, texts: Sequence[str]) -> SimilarityBlocks:
        """The similarity of other texts to the gallery of `result`."""
        assert result.similarity is not None, "there is one process"
        return replace(result.similarity, text=self.encode(texts).to(result.similarity.text.device))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors (T, D) of texts, not normalised, float32 on the CPU."""
        model, size = self.session.model.eval(), self.config.val_batch_size
        parts = []
        with self.session.autocast():
            for start in tqdm(range(0, len(texts), size), "texts", leave=False, disable=None):
                tokens = self.session.loaded.tokenize(texts[start : start + size], self.config.max_txt_len)
                parts.append(model.encode_text(tokens).sentence.float().cpu())
        return torch.cat(parts)


def trained_shares(source: Source, session: Session) -> tuple[float | None, float | None]:
    """Percent of the parameters of CLIP, and of all, that learned: as the run noted, else as its settings say. What IBS
    selected is known only from its run folder."""
    noted = None if source.folder is None else _noted(source.folder / "metrics.json")
    told = session.checkpoint is not None and "parameters" in session.checkpoint.metadata
    if noted is None and not told and session.config.peft.method in ("ibs", "lora"):
        return None, None
    report = noted or session.parameters
    return report.clip.percent, report.all.percent


def _noted(path: Path) -> TrainableReport | None:
    """What a finished run wrote of its parameters; None for a file that says nothing of the kind."""
    if not path.is_file():
        return None
    try:
        return TrainableReport.from_dict(read_json(path)["parameters"])
    except (UserError, AttributeError, KeyError, TypeError):
        return None


def videos_per_second(result: RetrievalReport) -> float:
    """Of the gallery, from reading to vectors."""
    return len(result.queries.video_ids) / max(result.video_seconds, 1e-9)


def tell(text: str) -> None:
    """To stderr, without tearing a progress bar: stdout is for results."""
    tqdm.write(text, file=sys.stderr)
