"""Caption the videos of a folder or an annotation with the captioner of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from adaclip_finetune.config.choices.tasks import CaptioningSettings
from adaclip_finetune.data.dataset import GalleryDataset, VideoReader
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.captioning import CAPTIONED_AT_ONCE
from adaclip_finetune.search.collection import VideoCollection
from adaclip_finetune.strict_json import read_json
from adaclip_finetune.training.memory import memory_explained
from adaclip_finetune.training.session import open_any


class VideoCaptioner:
    """The captioner of a run folder or a checkpoint, which searches captions with `beams` beams (default: those of the
    run). `settings` override those of the run. Raise UserError for a model without a captioner."""

    def __init__(self, source: str, beams: int | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self.session = open_any(source, settings or {})
        self.config, self.model = self.session.config, self.session.model
        if self.model.captioner is None:
            raise UserError(f"{source}: this model has no captioner; train one with --objective.method captioning")
        self.captioner = self.model.captioner
        own = self.config.task.config
        self.beams = beams or (own if isinstance(own, CaptioningSettings) else CaptioningSettings()).beams
        self.captioner.language_model()

    def __call__(self, collection: VideoCollection) -> Iterator[tuple[str, str, str]]:
        """Yield each video of a collection, in its order, with its caption and "", or with "" and why it has none."""
        names = [video.id for video in collection.videos]
        dataset = GalleryDataset(names, VideoReader(collection.store, self.config, self.model.views()))
        with closing(GalleryLoader(dataset, self.config)) as loader, tqdm(total=len(names), disable=None) as bar:
            for collated in loader.read(range(len(loader))):
                for error in collated.failures:
                    yield error.video_id, "", error.reason
                if collated.videos is not None:
                    with memory_explained(self.config), torch.no_grad(), self.session.autocast():
                        features = self.model.encode_video(collated.videos.to(self.model.device))
                        captions = self._captions(self.captioner.inputs(features))
                    for name, caption in zip(collated.videos.video_ids, captions, strict=True):
                        yield name, caption, "" if caption else "its caption is blank"
                bar.update(len(collated.failures) + (0 if collated.videos is None else len(collated.videos)))

    def _captions(self, vectors: Tensor) -> list[str]:
        starts = range(0, len(vectors), CAPTIONED_AT_ONCE)
        ids = [self.captioner.generate(vectors[start : start + CAPTIONED_AT_ONCE], self.beams) for start in starts]
        return self.captioner.language_model().texts(torch.cat(ids))


def as_annotation(captions: Mapping[str, str], annotation: Path | None) -> dict[str, Any]:
    """Return captions of videos, by name, as an annotation.

    Without `annotation` they are the videos' sentences. Otherwise they are added to the auxiliary captions of that
    file's videos, of which everything else stays as it is.
    """
    if annotation is None:
        return {name: {"sentences": [caption]} for name, caption in captions.items()}
    content: dict[str, Any] = read_json(annotation)
    for name, caption in captions.items():
        known = content[name].get("auxiliary", [])
        content[name]["auxiliary"] = known if caption in known else [*known, caption]
    return content
