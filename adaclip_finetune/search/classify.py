"""Classify video files and pictures, with a trained model or with a plain CLIP."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaclip_finetune.config.choices.tasks import ClassificationSettings
from adaclip_finetune.data.class_names import in_templates, read_classes, read_templates
from adaclip_finetune.data.dataset import GalleryDataset, VideoReader
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.data.preprocess import to_square
from adaclip_finetune.data.video.discovery import find_videos
from adaclip_finetune.errors import UserError
from adaclip_finetune.evaluation.tasks.classification import class_scores, class_vectors
from adaclip_finetune.model.features import VideoFeatures
from adaclip_finetune.search.collection import VideoFiles
from adaclip_finetune.search.pictures import open_picture, seen_pixels
from adaclip_finetune.training.memory import memory_explained
from adaclip_finetune.training.session import open_any

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and the videos and pictures in the given folders and their subfolders, sorted.

    Raise UserError for a path that does not exist, and for a folder that holds neither.
    """
    files = []
    for path in paths:
        if not path.is_dir():
            if not path.is_file():
                raise UserError(f"{path}: there is no such file or folder")
            files.append(path)
            continue
        try:
            videos, others = find_videos(path)
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be listed ({error.strerror})") from error
        found = sorted([*videos, *filter(_is_picture, others)])
        if not found:
            raise UserError(f"{path}: holds neither videos nor pictures")
        files += found
    return list(dict.fromkeys(files))


class Classifier:
    """Gives videos and pictures the probabilities of `classes`.

    `source` is a run folder, a weights file, or a CLIP: a file or folder of weights, or a name as `clip_backbone` has
    it. A CLIP encodes num_frm uniform frames and takes their mean. Classes and templates that are not given are those
    of the run, if its task was classification; bare names otherwise. `settings` override those of the run. Raise
    UserError.
    """

    def __init__(
        self, source: str, classes: Path | None, templates: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        session = open_any(source, settings or {})
        self.session, self.config, self.model = session, session.config, session.model
        own = self.config.task.config
        if not isinstance(own, ClassificationSettings):
            own = ClassificationSettings()
        if classes is None and own.classes is None:
            raise UserError(f"{source}: names no file of classes; give one: --classes FILE")
        self.classes = read_classes(Path(own.classes or "") if classes is None else classes)
        texts = in_templates(self.classes, read_templates(templates or own.templates))
        self.num_texts, self.num_cut = len(texts), session.loaded.count_cut(texts, self.config.max_txt_len)
        self._vectors = class_vectors(self._encode(texts), len(self.classes), own.normalize)

    def __call__(self, files: Sequence[Path]) -> Iterator[tuple[Path, Tensor | str]]:
        """Yield each file, in this order, with the probabilities of the classes (C,), or why it cannot be read."""
        places = {str(path): path.absolute() for path in files if not _is_picture(path)}
        root = Path(os.path.commonpath([place.parent for place in places.values()] or [Path.cwd()]))
        store = VideoFiles(root, {name: place.relative_to(root).as_posix() for name, place in places.items()})
        videos, reader = list(places), VideoReader(store, self.config, self.model.views())
        with closing(GalleryLoader(GalleryDataset(videos, reader), self.config)) as loader:
            answers = self._videos(videos, loader)
            for path in files:
                yield path, self._picture(path) if _is_picture(path) else next(answers)

    def _videos(self, videos: Sequence[str], loader: GalleryLoader) -> Iterator[Tensor | str]:
        place = {name: number for number, name in enumerate(videos)}
        for collated in loader.read(range(len(loader))):
            found: dict[str, Tensor | str] = {error.video_id: error.reason for error in collated.failures}
            if collated.videos is not None:
                with memory_explained(self.config), torch.no_grad(), self.session.autocast():
                    features = self.model.encode_video(collated.videos.to(self.model.device))
                found |= zip(collated.videos.video_ids, self._probabilities(features), strict=True)
            yield from (found[name] for name in sorted(found, key=place.__getitem__))

    def _picture(self, path: Path) -> Tensor | str:
        try:
            pixels = seen_pixels(open_picture(path))[None]
        except UserError as error:
            return str(error).removeprefix(f"{path}: ")
        frame = torch.from_numpy(to_square(pixels, self.session.loaded.image)).to(self.model.device)
        with torch.no_grad(), self.session.autocast():
            vector = self.model.encode_image(frame)
        weights = torch.ones(1, 1, device=vector.device)
        return self._probabilities(VideoFeatures(vector[:, None], vector, weights, None))[0]

    def _probabilities(self, features: VideoFeatures) -> Tensor:
        scorer = self.model.scorer
        scores = class_scores(self._vectors, scorer.keep(features).float(), scorer, self.config.val_batch_size)
        return scores.softmax(dim=1).cpu()

    def _encode(self, texts: Sequence[str]) -> Tensor:
        size, rows = self.config.val_batch_size, []
        for start in range(0, len(texts), size):
            tokens = self.session.loaded.tokenize(texts[start : start + size], self.config.max_txt_len)
            with torch.no_grad(), self.session.autocast():
                rows.append(self.model.encode_text(tokens).sentence.float())
        return torch.cat(rows)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES
