"""Rows `step` and `embedding`: training steps and vectors of videos that equal those of encoding all frames."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from adaclip_finetune.bench.hard_topk import loop
from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.config import Config, IbsSettings, load_config
from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.data.preprocess import IMAGENET, normalise
from adaclip_finetune.model.frame_features import CnnBackbone
from adaclip_finetune.model.pooling import MlpScore
from adaclip_finetune.model.text import encode_sentences
from adaclip_finetune.objectives.base import Group
from adaclip_finetune.training.backward import Backward
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.memory import blank_batch
from adaclip_finetune.training.optimizer import build_optimizer
from adaclip_finetune.training.session import Session, open_model

METHODS: dict[str, dict[str, Any]] = {
    "full": {"peft": {"method": "full"}},
    "bitfit": {"peft": {"method": "bitfit"}},
    "lora": {"peft": {"method": "lora"}},
    "ibs": {"peft": {"method": "ibs"}},
    "freeze_clip": {"peft": {"method": "full"}, "freeze_clip": True},
}
_WORDS = 32  # tokens of a caption at most
_STEPS = 1000  # of the learning rate's schedule


def step(setup: Setup) -> Iterator[Measured]:
    """Compare training steps with `EncodeAll`, for each method, and with their bound.

    The bound is the time of CLIP forward and backward on the selected frames, forward on the others, and of the CNN on
    all of them. A note tells the activations kept for the backward pass, as a share of those of `EncodeAll`.
    """
    sizes = [(2, 1, 2)] if setup.quick else [(8, 4, 4), (32, 16, 2)] if setup.device.type == "cpu" else [(32, 16, 16)]
    with model_settings(setup) as shared:
        for number, (frames, k, batch) in enumerate(sizes):
            for name, settings in METHODS.items():
                if number == 0 or name == "full":
                    size = {"num_frm": frames, "top_k": k, "batch_size": batch}
                    yield _method(setup, name, load_config(None, shared | size | settings))
                    gc.collect()


@contextmanager
def model_settings(setup: Setup) -> Iterator[dict[str, Any]]:
    """Give the settings of a ViT-B/32 with random weights, a frozen MobileNetV3 and MLP-Score."""
    shared = {"freeze_cnn": True, "policy_weights": "random", "max_txt_len": _WORDS, "frame_agg": "mlp"}
    shared |= {"precision": setup.precision, "device": setup.device.type}
    with TemporaryDirectory() as folder:
        yield shared | ({"clip_weights": str(small_clip(Path(folder)))} if setup.quick else {})


def small_clip(folder: Path) -> Path:
    """Write the random weights of a CLIP of one block a tower, and return the file."""
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    clip = open_clip.CLIP(64, vision, {"width": 64, "heads": 1, "layers": 1}, quick_gelu=True)
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, folder / "clip.safetensors")
    return folder / "clip.safetensors"


def _method(setup: Setup, name: str, config: Config) -> Measured:
    session, batch = _opened(config)
    reference = EncodeAll(session, config)
    _check_gradients(session, reference, batch.rows(0, 2))
    with setup.autocast():
        kept = kept_bytes(session, lambda: loss_of(session, batch)), kept_bytes(session, lambda: reference.loss(batch))
    ours, bound = our_step(session, config, batch), Bound(session, config, batch.videos)
    alternatives: dict[str, Callable[[], object]] = {
        "all frames": lambda: reference.step(batch),
        "bound": bound,
        "ours": ours,
    }
    aims = [Aim("ours", "all frames"), Aim("ours", "bound", 0.85)]
    if config.freeze_clip:
        alternatives["embeddings kept"] = our_step(session, config, _with_vectors(session, batch))
        aims.append(Aim("embeddings kept", "ours", 20))
    else:
        faster = config.model_copy(update={"policy_gradient": "selected"})
        alternatives["only selected"] = our_step(_opened(faster)[0], faster, batch)
        aims.append(Aim("only selected", "ours", 1.25))
    seconds = in_turns(setup, alternatives)
    case = f"{name}, {config.top_k} of {config.num_frm} frames, batch {config.batch_size}, {config.precision}"
    return Measured(case, seconds, aims, {"memory of activations": kept[0] / max(1, kept[1])})


def _opened(config: Config) -> tuple[Session, TrainBatch]:
    """Return a model that is about to train, and a batch. With IBS the tensors that keep learning are selected."""
    torch.manual_seed(config.seed)
    session = open_model(config, values="random", accelerator=make_accelerator(config))
    session.objective.train()
    batch = random_batch(session, config)
    if isinstance(config.peft.config, IbsSettings):
        first_phase = our_step(session, config, batch)
        for _ in range(2):  # the rate of the first step is zero
            first_phase()
        session.method.on_epoch_start(config.peft.config.num_pre_epochs)
    return session, batch


def random_batch(session: Session, config: Config) -> TrainBatch:
    """Return a batch of random pixels and captions of 6 to 20 words on the device."""
    random = torch.Generator().manual_seed(0)
    batch, _ = blank_batch(config, session.objective, session.loaded.tokenize, config.batch_size)
    captions = [" ".join(["video"] * (6 + 5 * number % 15)) for number in range(config.batch_size)]
    blank = {"frames": batch.videos.frames, "policy_frames": batch.videos.policy_frames}
    pixels: dict[str, Any] = {
        name: torch.randint(0, 256, frames.shape, dtype=torch.uint8, generator=random)
        for name, frames in blank.items()
        if frames is not None
    }
    videos = replace(batch.videos, **pixels, frame_mask=torch.ones_like(batch.videos.frame_mask))
    noise = -torch.empty_like(batch.noise).exponential_(generator=random).log()
    ids = session.loaded.tokenize(captions, config.max_txt_len)
    return replace(batch, videos=videos, captions=captions, token_ids=ids, noise=noise).to(session.device)


def _with_vectors(session: Session, batch: TrainBatch) -> TrainBatch:
    """Return the batch as an `embedding_cache` gives it: with vectors of frames in place of their pixels."""
    with session.autocast():
        vectors, features = session.model.frame_vectors(batch.videos)
    videos = replace(batch.videos, frames=batch.videos.frames[:, :, 0, 0, :0], policy_frames=None)
    return replace(batch, videos=replace(videos, vectors=vectors, features=features))


def our_step(session: Session, config: Config, batch: TrainBatch) -> Callable[[], None]:
    accelerator = session.accelerator
    assert accelerator is not None
    optimizer, schedule = build_optimizer(session.objective, config, _STEPS)
    backward = Backward(accelerator, session.objective, accelerator.autocast()(session.objective), 0)

    def step() -> None:
        backward(batch, Group([batch.pairs()]), int)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


class EncodeAll:
    """A plain retriever: CLIP encodes all frames, in training with gradients, and they are selected behind it.

    It computes with the modules of the session's model, and is otherwise written from the formulas: Hard-Top-k and
    MLP-Score (Hu et al. 2023), the symmetric cross-entropy (Radford et al. 2021), BertAdam (Devlin et al. 2019).
    """

    def __init__(self, session: Session, config: Config) -> None:
        self.model, self.objective, self.config = session.model, session.objective, config
        self.moments: dict[Tensor, tuple[Tensor, Tensor]] = {}

    def loss(self, batch: TrainBatch) -> Tensor:
        """Return the loss of a batch."""
        device, (frames, scores) = self.model.device, self._encode(batch.videos)
        text = encode_sentences(self.model.clip, batch.token_ids.to(device)).to(frames.dtype)
        with torch.autocast(device.type, enabled=False):
            scores = scores.softmax(dim=1).clamp(min=1e-8).log()
            noise = batch.noise.to(device, frames.dtype)
            weights, _ = loop(scores, self.config.top_k, self.config.init_tau, noise)
            chosen = weights @ frames
        video = self._pool(chosen)
        with torch.autocast(device.type, enabled=False):
            text, video = F.normalize(text, dim=-1), F.normalize(video, dim=-1)
            logits = self.model.logit_scale().exp() * text @ video.T
            right = torch.arange(len(logits), device=device)
            return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    @torch.no_grad()
    def embed(self, videos: VideoBatch) -> Tensor:
        """Return the vectors (B, D) of videos, from the K frames with the highest scores."""
        frames, scores = self._encode(videos)
        best = scores.argsort(dim=1, descending=True)[:, : self.config.top_k, None]
        return self._pool(frames.gather(1, best.expand(-1, -1, frames.shape[2])))

    def _encode(self, videos: VideoBatch) -> tuple[Tensor, Tensor]:
        """Return CLIP's embedding (B, N, D) and the selector's score (B, N) of each frame."""
        model, dtype, shape = self.model, self.model.logit_scale().dtype, videos.frames.shape[:2]
        selector = model.selector
        assert selector is not None and isinstance(selector.backbone, CnnBackbone) and videos.policy_frames is not None
        pixels = normalise(videos.frames.flatten(0, 1), model.image_spec.mean, model.image_spec.std).to(dtype)
        frames = model.clip.get_submodule("visual")(pixels).to(dtype).unflatten(0, shape)
        pixels = normalise(videos.policy_frames.flatten(0, 1), IMAGENET.mean, IMAGENET.std).to(dtype)
        features = selector.backbone.cnn(pixels).to(dtype).unflatten(0, shape)
        with torch.autocast(frames.device.type, enabled=False):
            encoded = features if selector.encoder is None else selector.encoder(features)
            return frames, selector.scorer(encoded)[..., 0]

    def _pool(self, chosen: Tensor) -> Tensor:
        assert isinstance(self.model.aggregator, MlpScore)
        scores = self.model.aggregator.scorer(chosen).to(chosen.dtype) / self.config.frame_agg_temp
        pooled: Tensor = (scores.softmax(dim=1) * chosen).sum(dim=1)
        return pooled

    def step(self, batch: TrainBatch) -> None:
        """Take a training step."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.loss(batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss of the reference is not finite")
        torch.autograd.backward(loss)
        with torch.no_grad():
            for group in self._groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group["lr"], group["weight_decay"])
                        parameter.grad = None

    @cached_property
    def _groups(self) -> list[dict[str, Any]]:
        return build_optimizer(self.objective, self.config, _STEPS)[0].param_groups

    def _update(self, parameter: Tensor, rate: float, decay: float) -> None:
        gradient, (first, second) = parameter.grad, self.config.betas
        assert gradient is not None
        nn.utils.clip_grad_norm_(parameter, 1.0)
        zeros = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean, square = self.moments.setdefault(parameter, zeros)
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        parameter -= rate * (mean / (square.sqrt() + 1e-6) + decay * parameter)


class Bound:
    """What cannot be done without: CLIP on K frames a video, with gradients if it learns, and the CNN on all N.

    In training CLIP also encodes the `others`, without gradients.
    """

    def __init__(self, session: Session, config: Config, videos: VideoBatch, others: bool = True) -> None:
        self.session, self.k, self.videos, self.others = session, config.top_k, videos, others
        spec = session.model.image_spec
        self.pixels = normalise(videos.frames, spec.mean, spec.std)

    def __call__(self) -> None:
        model, videos, k = self.session.model, self.videos, self.k
        assert model.selector is not None and isinstance(model.selector.backbone, CnnBackbone)
        assert videos.policy_frames is not None
        with self.session.autocast():
            model.selector.backbone(videos.policy_frames, videos.frame_mask, torch.float32)
            if self.others:
                with torch.no_grad():
                    model.tower(self.pixels[:, k:], videos.frame_mask[:, k:])
            tokens = model.tower(self.pixels[:, :k], videos.frame_mask[:, :k])
        if tokens.requires_grad:
            torch.autograd.backward(tokens.float().square().mean())
            self.session.objective.zero_grad()


def loss_of(session: Session, batch: TrainBatch) -> Tensor:
    return torch.stack(list(session.objective(batch, Group([batch.pairs()])).values())).sum()


def _check_gradients(session: Session, reference: EncodeAll, batch: TrainBatch) -> None:
    session.objective.double()
    expected = _gradients(session, reference.loss(batch))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in _gradients(session, loss_of(session, batch)).items():
        check(f"the gradients of {name}", gradient, expected[name], 1e-6, 1e-6 * largest)
    session.objective.float()


def _gradients(session: Session, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of everything that learns, by name."""
    torch.autograd.backward(loss)
    found = {name: p.grad for name, p in session.objective.named_parameters() if p.grad is not None}
    session.objective.zero_grad()
    return found


def kept_bytes(session: Session, forward: Callable[[], Tensor]) -> int:
    """Return the size of what a forward pass keeps for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in session.objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would refer to its own graph, which is then never freed

    with saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(size for storage, size in kept.items() if storage not in weights)
