"""`adaptation: clip_reward`: other CLIPs reward what the model finds, and the model learns from it (RLCF, Zhao et al.
2024, "Test-Time Adaptation with CLIP Reward for Zero-Shot Generalization in Vision-Language Models").

For each query the K candidates that the model ranks first are its samples. Frozen CLIPs reward each of them, the mean
reward is subtracted, and a few steps of AdamW on reward · cross-entropy change the tower that encodes the query. The
candidates' vectors stay as they are. After the query's vector was computed, the tower is put back.

In classification a query is a video: those of its views that the model is most certain of are the queries of a step.
In captioning a query is a video, too, its candidates are the captions that a beam search finds in each step, and the
captioner learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaclip_finetune.config import ChoiceSettings, Config
from adaclip_finetune.config.choices.adaptations import LEARNS, ClipRewardSettings
from adaclip_finetune.config.choices.base import implementation
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation.base import Adaptation, Direction, QueryBatch
from adaclip_finetune.evaluation.adaptation.context import Context
from adaclip_finetune.evaluation.adaptation.losses import (
    DISTILLATIONS,
    clip_scores,
    mean_entropy,
    policy_gradient_loss,
    weighted_mean,
)
from adaclip_finetune.evaluation.views import most_certain
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.peft.base import PeftMethod, learning
from adaclip_finetune.peft.freezing import apply_freezing

ITSELF = "self"
"""The name of the model itself among the CLIPs that reward."""

_EPSILON, _EPSILON_OF_CLASSES = 1e-6, 1e-8  # of AdamW, as published for retrieval and for classification


class ClipReward(Adaptation):
    """Adapts the text tower to each text, the image tower to each video, or each to its own.

    In classification it adapts the image tower, or the context of the class names, to each video, and in captioning the
    captioner.
    """

    settings: ClipRewardSettings
    queries_at_once = 1

    def __init__(self, settings: ChoiceSettings) -> None:
        super().__init__(settings)
        self.directions = ("t2v", "v2t") if self.settings.directions == "both" else (self.settings.directions,)
        self.in_order = bool(self.settings.momentum)
        self._learners: dict[Direction, Learner] = {}
        self._config: Config | None = None

    def start(self, config: Config, open_other: Callable[[str], Opened]) -> None:
        self._config, self.others = config, []
        if self._of_classes:
            self.directions, self.views = ("v2t",), self.settings.views
            self.changes_texts = self.settings.learns.method == "context"
        if config.task_settings.of_captions:
            self.directions = ("v2t",)
        for source in self.settings.reward:
            try:
                self.others.append(None if source == ITSELF else open_other(source))
            except UserError as error:
                raise UserError(f"adaptation.config.reward: {error}") from error

    @contextmanager
    def prepared(self, model: VideoRetriever) -> Iterator[None]:
        """Attach what `learns` adds to CLIP, with values drawn from the seed of the run, and choose what learns."""
        assert self._config is not None, "start was not called"
        if self._config.task_settings.of_captions:
            with self._captioner_learns(model):
                yield
            return
        clip = model.clip
        learned = [(parameter, parameter.requires_grad) for parameter in clip.parameters()]
        method: PeftMethod = implementation(LEARNS, self.settings.learns)(self.settings.learns.config)
        method.seed = self._config.seed
        merged = not any(isinstance(part, parametrize.ParametrizationList) for part in clip.modules())
        if not merged and self.settings.learns.method in ("lora", "ssf"):
            raise UserError(
                f"adaptation.config.learns {self.settings.learns.method} cannot be added to what peft.method "
                f"{self._config.peft.method} added to CLIP: take bitfit or full"
            )
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self._config.seed)
                method.attach(clip)
            apply_freezing(clip, -1, False)
            method.choose(model)
            self._learners = {direction: self._learner(direction, clip) for direction in self.directions}
            yield
        finally:
            self._learners = {}
            if isinstance(method, Context):
                method.detach(clip)
            for part in list(clip.modules()) if merged else []:
                if parametrize.is_parametrized(part):
                    for name in list(part.parametrizations):  # type: ignore[arg-type]
                        parametrize.remove_parametrizations(part, name, leave_parametrized=False)
            for parameter, learns in learned:
                parameter.requires_grad_(learns)

    @contextmanager
    def _captioner_learns(self, model: VideoRetriever) -> Iterator[None]:
        assert model.captioner is not None, "the settings refuse this"
        learned = [(parameter, parameter.requires_grad) for parameter in model.captioner.parameters()]
        try:
            model.captioner.requires_grad_(True)
            self._learners = {"v2t": Learner(list(model.captioner.parameters()), self.settings, _EPSILON)}
            yield
        finally:
            self._learners = {}
            for parameter, learns in learned:
                parameter.requires_grad_(learns)

    @contextmanager
    def __call__(self, model: VideoRetriever, queries: QueryBatch) -> Iterator[None]:
        learner = self._learners[queries.direction]
        with learner, _casts_not_kept(model.device):
            optimizer = learner.optimizer()
            for _ in range(self.settings.steps):
                with torch.enable_grad():
                    loss = self._loss(model, queries)
                optimizer.zero_grad()
                with torch.autocast(model.device.type, enabled=False):
                    loss.backward(inputs=learner.parameters)  # type: ignore[no-untyped-call]
                optimizer.step()
            yield

    def _loss(self, model: VideoRetriever, queries: QueryBatch) -> Tensor:
        settings, logits, cosines = self.settings, queries.logits(), queries.others()
        if settings.loss != "reward":
            retrievers = (model if other is None else other.retriever for other in self.others)
            scaled = [one.scorer.scale().detach() * own for one, own in zip(retrievers, cosines, strict=True)]
            return DISTILLATIONS[settings.loss](logits, weighted_mean(scaled, settings.weights))
        candidates = settings.candidates if queries.direction == "t2v" else settings.caption_candidates
        if self._of_classes:
            candidates = settings.class_candidates
        scores = clip_scores(cosines, settings.weights)
        loss = policy_gradient_loss(logits, scores, candidates, settings.baseline, settings.divide_by_std)
        return loss + settings.entropy_weight * mean_entropy(logits) if settings.entropy_weight else loss

    def certain(self, logits: Tensor) -> Tensor:
        return most_certain(logits, self.settings.certain_share)

    @property
    def _of_classes(self) -> bool:
        assert self._config is not None, "start was not called"
        return self._config.task_settings.of_classes

    def _learner(self, direction: Direction, clip: nn.Module) -> Learner:
        of_image = direction == "v2t" and not self.changes_texts
        parameters = [one for name, one in learning(clip) if name.startswith("visual.") == of_image]
        if not parameters:
            raise UserError(
                f"adaptation.config.learns {self.settings.learns.method}: nothing of the "
                f"{'image' if of_image else 'text'} tower learns, which encodes the queries; change its settings"
            )
        return Learner(parameters, self.settings, _EPSILON_OF_CLASSES if self._of_classes else _EPSILON)


class Learner:
    """The parameters that learn for the queries of one direction. As a context it spans one query, and on exit the
    parameters have their original values.

    With a momentum m, the values θ that a query ended with enter a slow average A ← m · A + (1 − m) · θ. After every
    `interval` queries, the next ones start from this average, or from its mix with the original values.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: ClipRewardSettings, epsilon: float) -> None:
        self.parameters, self.settings, self._epsilon = list(parameters), settings, epsilon
        self._original = [parameter.detach().clone() for parameter in parameters]
        self._average = [value.clone() for value in self._original] if settings.momentum else []
        self._start: list[Tensor] = []  # empty: the original values
        self._queries = 0

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer, since nothing that it gathers for a query is left for the next one."""
        own = self.settings
        return torch.optim.AdamW(self.parameters, own.learning_rate, weight_decay=own.weight_decay, eps=self._epsilon)

    @torch.no_grad()
    def __enter__(self) -> None:
        for parameter, value in zip(self.parameters, self._start, strict=False):
            parameter.copy_(value)

    @torch.no_grad()
    def __exit__(self, error: object, *details: object) -> None:
        if self._average and error is None:
            self._remember()
        for parameter, original in zip(self.parameters, self._original, strict=True):
            if self._start or parameter.grad is not None:  # without a gradient nothing moved
                parameter.copy_(original)
            parameter.grad = None

    def _remember(self) -> None:
        for average, parameter in zip(self._average, self.parameters, strict=True):
            average.lerp_(parameter, 1 - self.settings.momentum)
        self._queries += 1
        if self._queries % self.settings.interval == 0:
            pairs = zip(self._original, self._average, strict=True)
            self._start = [original.lerp(average, self.settings.average_share) for original, average in pairs]


def _casts_not_kept(device: torch.device) -> AbstractContextManager[object]:
    """Return the precision of the surrounding context, but without its cache of weights that were cast to it: these
    would be those from before a step."""
    kind = device.type
    active, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, active, cache_enabled=False)
