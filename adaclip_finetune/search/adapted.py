"""Search in which the model adapts to each text by the reward of other CLIPs (`adaptation: clip_reward`).

The index is the gallery: its vectors stay as they are. The other models see the video files of the candidates alone,
each of them once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaclip_finetune.config import load_config
from adaclip_finetune.config.choices.adaptations import ClipRewardSettings
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.adaptation.base import QueryBatch
from adaclip_finetune.evaluation.adaptation.clip_reward import ClipReward
from adaclip_finetune.model.features import at_least_float32
from adaclip_finetune.objectives.base import Opened
from adaclip_finetune.search.collection import VideoFiles
from adaclip_finetune.search.index import IndexedVideo
from adaclip_finetune.search.search_model import SearchModel
from adaclip_finetune.search.stores.base import Searchable
from adaclip_finetune.training.session import open_other

Encode = Callable[[str], tuple[Tensor, float]]


class OtherModel:
    """Another model that scores videos of an index: it reads their files, and remembers what it kept of each."""

    def __init__(self, opened: Opened, device: torch.device) -> None:
        self.config, self.loaded = opened.config, opened.loaded
        self.retriever = opened.retriever.to(device)
        self._kept: dict[str, Tensor] = {}

    def cosines(self, text: str, videos: Sequence[IndexedVideo]) -> Tensor:
        """Return the cosines (1, K) of a text and videos, float32. Raise UserError for a file that cannot be read."""
        with torch.no_grad(), torch.autocast(self.retriever.device.type, enabled=False):
            if new := [video for video in videos if video.key not in self._kept]:
                self._kept |= zip([video.key for video in new], self._encode(new), strict=True)
            tokens = self.loaded.tokenize([text], self.config.max_txt_len)
            vector = F.normalize(at_least_float32(self.retriever.encode_text(tokens).sentence), dim=-1)
            kept = torch.stack([self._kept[video.key] for video in videos])
            return self.retriever.scorer.cosines(vector, kept)

    def _encode(self, videos: Sequence[IndexedVideo]) -> Tensor:
        root = type(videos[0].path)(videos[0].path.anchor)
        store = VideoFiles(root, {video.key: str(video.path.relative_to(root)) for video in videos})
        reader = VideoReader(store, self.config, self.retriever.views())
        try:
            batch = collate([reader.read(video.key) for video in videos]).videos
        except FrameError as error:
            what = (
                f"cannot be read as a video file and has no reward ({error.reason}); `adaclip index` updates an index"
            )
            raise UserError(f"--adapt: {error.path}: {what}") from error
        assert batch is not None
        return self.retriever.scorer.keep(self.retriever.encode_video(batch.to(self.retriever.device)))


@contextmanager
def adapting(model: SearchModel, index: Searchable, settings: Mapping[str, Any]) -> Iterator[Encode]:
    """Return a function that adapts the model to a text, and returns the text's vector (1, D) and the seconds it took.

    `settings` are those of the adaptation. The model is as before after each text. Raise UserError.
    """
    own = model.config.model_dump(mode="json", exclude={"adaptation", "do_inference"})
    config = load_config(None, {**own, **settings, "adaptation.config.directions": "t2v", "do_inference": True})
    chosen = config.adaptation.config
    assert isinstance(chosen, ClipRewardSettings)
    if chosen.loss != "reward":
        raise UserError(f"--adapt: adaptation.config.loss {chosen.loss} needs the scores of all videos; take reward")
    adaptation = ClipReward(chosen)
    adaptation.start(config, partial(open_other, like=config))
    others = [opened and OtherModel(opened, model.device) for opened in adaptation.others]

    def encode(text: str) -> tuple[Tensor, float]:
        begun = time.monotonic()
        tokens, plain = model.loaded.tokenize([text], config.max_txt_len), model.encode_text([text])
        videos: list[IndexedVideo] = []  # the candidates whose logits were computed last, and their vectors (K, D)
        vectors = torch.empty(0)

        def logits() -> Tensor:
            nonlocal videos, vectors
            features = model.model.encode_text(tokens)
            vector = F.normalize(features.sentence[0].detach().float(), dim=-1)
            videos, found = index.nearest(vector.cpu().numpy(), chosen.candidates)
            vectors = torch.from_numpy(found)
            # Rewards have the mean 0, so that the logits of all other videos would have no gradient.
            scores: Tensor = model.model.scorer(features, vectors.to(model.device))
            return scores

        def cosines() -> list[Tensor]:
            with torch.autocast("cpu", enabled=False):
                own = plain @ vectors.T
            return [(own if other is None else other.cosines(text, videos)).to(model.device) for other in others]

        with model.autocast(), adaptation(model.model, QueryBatch("t2v", logits, cosines)):
            return model.encode_text([text]), time.monotonic() - begun

    with adaptation.prepared(model.model):
        yield encode
