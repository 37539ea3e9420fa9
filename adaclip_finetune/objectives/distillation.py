"""`objective: distillation`, labelled pairs and a teacher on unlabelled videos (FitCLIP, Castro & Caba Heilbron 2022).

The student is the retriever. The teacher is frozen: the CLIP that the run starts from, one frame at a time, or another
model. Labelled pairs are contrasted with each other; on unlabelled videos the student's softmax over the texts of the
batch, and over its videos, follows the teacher's. The two parts of a batch are never contrasted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaclip_finetune.config import ChoiceSettings, Config
from adaclip_finetune.config.choices.objectives import DistillationSettings
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.formats.reading import text_lines
from adaclip_finetune.data.preprocess import Views
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.features import TextFeatures, at_least_float32
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.model.scoring import Scorer
from adaclip_finetune.model.zero_shot import zero_shot_config
from adaclip_finetune.objectives.base import Group, Objective, Opened, Rows
from adaclip_finetune.objectives.contrastive import contrastive_loss
from adaclip_finetune.weights.loaded import LoadedClip
from adaclip_finetune.weights.plain import plain_copy

_LARGEST_LOG_SCALE = -math.log(0.001)


class Distillation(Objective):
    """Contrasts labelled pairs, and lets the similarities of unlabelled videos follow those of a frozen teacher.

    The teacher's weights are not part of the state of this module: a run that resumes opens it again.
    """

    settings_class = DistillationSettings
    settings: DistillationSettings
    second_of_labelled = False  # of which the teacher sees nothing

    def __init__(self, settings: ChoiceSettings, retriever: VideoRetriever) -> None:
        super().__init__(settings, retriever)
        fitted = self.settings.fit_temperature
        self.student_log_scale = nn.Parameter(torch.tensor(-math.log(self.settings.temperature)), fitted)
        self.teacher_log_scale = nn.Parameter(torch.tensor(-math.log(self.settings.teacher_temperature)), fitted)
        self._teacher: tuple[Opened, ...] = ()  # in a tuple, which hides it from torch's registration of submodules
        self._prompts: tuple[Tensor, Tensor] | None = None  # token ids (P, L) for student and teacher
        self._prompts_of_teacher: Tensor | None = None  # vectors (P, D), once they were needed

    def choose(self) -> None:
        """Freeze CLIP's own scale and bias, on which this loss does not depend."""
        for name in ("logit_scale", "logit_bias"):
            if isinstance(parameter := getattr(self.retriever.clip, name, None), nn.Parameter):
                parameter.requires_grad_(False)

    def start(self, config: Config, loaded: LoadedClip, open_other: Callable[[str], Opened]) -> None:
        if self.settings.teacher is None:
            plain, copied = zero_shot_config(config), replace(loaded, module=plain_copy(loaded.module))
            model = VideoRetriever(plain, copied).requires_grad_(False).eval()
            teacher = Opened(plain, copied, model, plain=True)
        else:
            try:
                teacher = open_other(self.settings.teacher)
            except UserError as error:
                raise UserError(f"objective.config.teacher: {error}") from error
        self._teacher = (teacher,)
        if self.settings.prompts is not None:
            texts = _lines(Path(self.settings.prompts))
            of_teacher = teacher.loaded.tokenize(texts, teacher.config.max_txt_len)
            self._prompts = loaded.tokenize(texts, config.max_txt_len), of_teacher

    @property
    def teacher(self) -> Opened:
        """The teacher, once `start` was called."""
        return self._teacher[0]

    def second_view(self, config: Config) -> tuple[Config, Views]:
        """Return how the teacher sees a video: frames of its own, drawn and augmented as the student's are."""
        drawn = {"sampling": config.sampling, "augmentation": config.augmentation}
        return self.teacher.config.model_copy(update=drawn), self.teacher.retriever.views()

    @torch.no_grad()
    def embed_fixed(self, batch: TrainBatch) -> Rows:
        """Return which rows are `labelled`, and the teacher's vectors of the others; those of labelled rows are 0.

        The teacher computes in float32 whatever the precision of the run.
        """
        assert batch.second is not None
        count, device = len(batch.token_ids), batch.second.frames.device
        labelled = torch.ones(count, dtype=torch.bool) if batch.labelled is None else batch.labelled
        places = (~labelled).nonzero()[:, 0].tolist() or [0]  # one row shows the shape if all are labelled
        with torch.autocast(device.type, enabled=False):
            rows = {"teacher_video": self._videos_of_teacher(batch, places)}
            if self._prompts is None:
                rows["teacher_text"] = self._texts_of_teacher(self._token_ids_of_teacher(batch, places))
        for name, found in rows.items():
            rows[name] = found.new_zeros(count, *found.shape[1:])
            rows[name][places] = found
        return {"labelled": labelled.to(device), **rows}

    def loss(self, rows: Rows, group: Group) -> dict[str, Tensor]:
        self._hold_temperatures()
        gathered = {name: group.gather(tensor) for name, tensor in rows.items()}
        labelled, text, video = gathered["labelled"], gathered["text"], gathered["video"]
        unlabelled, scorer, terms = ~labelled, self.retriever.scorer, {}
        if labelled.any():
            logits = similarity(scorer, text[labelled], video[labelled]) * self.student_log_scale.exp()
            loss = 2 * contrastive_loss(logits, group.same(labelled.device)[labelled][:, labelled])
            terms["labelled"] = self.settings.labelled_weight * loss
        if unlabelled.any():
            texts, texts_of_teacher = self._texts_of_unlabelled(gathered, unlabelled)
            student = similarity(scorer, texts, video[unlabelled])
            teacher = similarity(self.teacher.retriever.scorer, texts_of_teacher, gathered["teacher_video"][unlabelled])
            scales = self.student_log_scale.exp(), self.teacher_log_scale.exp()
            loss = distillation_loss(student * scales[0], teacher * scales[1])
            terms["distillation"] = self._kd_weight() * loss
        return terms

    def _kd_weight(self) -> Tensor | float:
        """Return the weight of the distillation; one in proportion to 1/T², as published, if the teacher's T learns."""
        if not self.settings.fit_temperature:
            return self.settings.kd_weight
        start = -math.log(self.settings.teacher_temperature)
        return self.settings.kd_weight * (2 * (self.teacher_log_scale - start)).exp()

    @torch.no_grad()
    def _hold_temperatures(self) -> None:
        for log_scale in (self.student_log_scale, self.teacher_log_scale):
            log_scale.clamp_(max=_LARGEST_LOG_SCALE)

    def _texts_of_unlabelled(self, gathered: Rows, unlabelled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of the texts of the unlabelled videos, by student and teacher."""
        if self._prompts is None:
            return gathered["text"][unlabelled], gathered["teacher_text"][unlabelled]
        own, of_teacher = self._prompts
        if self._prompts_of_teacher is None:
            with torch.no_grad(), torch.autocast(unlabelled.device.type, enabled=False):
                self._prompts_of_teacher = self._texts_of_teacher(of_teacher)
        return at_least_float32(self.retriever.encode_text(own).sentence), self._prompts_of_teacher

    def _token_ids_of_teacher(self, batch: TrainBatch, places: list[int]) -> Tensor:
        if self.settings.teacher is None:
            return batch.token_ids[places]
        captions = [batch.captions[place] for place in places] if batch.captions else [""]
        return self.teacher.loaded.tokenize(captions, self.teacher.config.max_txt_len)

    def _texts_of_teacher(self, token_ids: Tensor) -> Tensor:
        return at_least_float32(self.teacher.retriever.encode_text(token_ids).sentence)

    def _videos_of_teacher(self, batch: TrainBatch, places: list[int]) -> Tensor:
        assert batch.second is not None
        videos = self.teacher.retriever.encode_video(batch.second.at(places))
        if self.teacher.plain:  # as published, the mean of unit vectors is not normalised again
            assert videos.vector is not None
            return at_least_float32(videos.vector)
        return self.teacher.retriever.scorer.keep(videos)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert the teacher as well."""
        for teacher in self._teacher:
            teacher.retriever._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


def similarity(scorer: Scorer, text: Tensor, kept: Tensor) -> Tensor:
    """Return the similarities (t, v) without CLIP's scale. A bias remains, which a softmax cancels."""
    logits: Tensor = scorer(TextFeatures(text), kept)
    return logits / scorer.scale()


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) ‖ softmax(student)), a mean over the rows of both (t, v), plus the same over columns.

    Nothing is masked: of equal texts or videos the teacher has equal similarities, which the student follows. The loss
    is float32 even under autocast, and float64 for float64 logits.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        return _divergence(student, teacher) + _divergence(student.T, teacher.T)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    logs = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return F.kl_div(*logs, reduction="batchmean", log_target=True)


def _lines(path: Path) -> list[str]:
    try:
        texts = [line.strip() for line in text_lines(path) if line.strip()]
    except UserError as error:
        raise UserError(f"objective.config.prompts {error}") from error
    if len(texts) < 2:
        raise UserError(f"objective.config.prompts {path}: holds {len(texts)} texts, one in each line; give at least 2")
    return texts
