"""`adaclip index --runner ray`: embed videos on a Ray cluster, whose Ray Data schedules batches and repeats those of
processes and machines that die.

Each actor loads the model and embeds whole batches of videos as one process does. It sends vectors, rows and pictures
back, and the process that started it writes them, so that the machines need to share the videos and the model only.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from adaclip_finetune.durable import write_durably
from adaclip_finetune.errors import UserError
from adaclip_finetune.search.build import Embedded, Work, embed_videos
from adaclip_finetune.search.search_model import SearchModel, load_retriever
from adaclip_finetune.search.stored import EmbeddedVideo

_VIDEOS = 32  # of a batch, at most
_BATCHES = 4  # for each actor, at least
_TASKS = 10_000  # into which Ray Data divides the batches, at most


@dataclass(frozen=True)
class RayRunner:
    """Embeds videos on the Ray cluster that RAY_ADDRESS names, or that runs on this machine, or else on one that it
    starts here, with an actor for each GPU or, without any, for each CPU.

    `source` and `settings` are those with which the model was loaded.
    """

    source: str
    settings: Mapping[str, Any]

    def __call__(self, model: SearchModel, work: Work, thumbs: Path) -> Iterator[Embedded]:
        """Embed videos as `embed_videos` does. Raise UserError without Ray, and for the errors of a model."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError(f"--runner ray needs Ray ({error}): pip install 'adaclip-finetune[ray]'") from error
        collection, undivided = work.collection, work.undivided
        videos = [*work.new, *(video for video in collection.videos if video.id in undivided)]
        if not videos:
            return
        ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
        resources = ray.cluster_resources()
        gpus = 0 if self.settings.get("device") == "cpu" else int(resources.get("GPU", 0))
        cpus = int(resources["CPU"])
        actors, readers = (gpus, min(model.config.num_workers, cpus // gpus)) if gpus else (cpus, 0)
        size = max(1, min(_VIDEOS, len(videos) // (_BATCHES * actors)))
        items = []
        for start in range(0, len(videos), size):
            batch = videos[start : start + size]
            whole = {video.id: undivided[video.id] for video in batch if video.id in undivided}
            new = [video for video in batch if video.id not in undivided]
            items.append({"work": pickle.dumps(Work(collection.only(batch), new, whole, work.moments))})
        settings = {**self.settings, "num_workers": readers}
        done = ray.data.from_items(items, override_num_blocks=min(len(items), _TASKS)).map(
            _Embedder,
            fn_constructor_args=(self.source, settings, model.fingerprint),
            num_cpus=max(1, readers),
            num_gpus=1 if gpus else 0,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(items))),
        )
        for row in done.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, UserError):
                raise result
            embedded, failed, pictures = result
            for name, picture in pictures.items():
                write_durably(thumbs / name, picture)
            yield embedded, failed


class _Embedder:
    """What an actor does: it embeds batches."""

    def __init__(self, source: str, settings: Mapping[str, Any], fingerprint: str) -> None:
        self._loading = source, settings, fingerprint
        self._model: SearchModel | None = None

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return the videos, failures and pictures of a batch, or the UserError that the model raised."""
        try:
            return {"result": pickle.dumps(self._embed(pickle.loads(row["work"])))}
        except UserError as error:  # Ray would wrap it
            return {"result": pickle.dumps(UserError(str(error)))}

    def _embed(self, work: Work) -> tuple[list[EmbeddedVideo], dict[str, str], dict[str, bytes]]:
        embedded: dict[str, EmbeddedVideo] = {}
        failed: dict[str, str] = {}
        with TemporaryDirectory() as place:
            folder = Path(place)
            for batch, broken in embed_videos(self._loaded(), work, folder):
                embedded |= {video.row["id"]: video for video in batch}
                failed |= broken
            pictures = {path.name: path.read_bytes() for path in folder.iterdir()}
        return [video for name, video in embedded.items() if name not in failed], failed, pictures

    def _loaded(self) -> SearchModel:
        if self._model is None:
            source, settings, fingerprint = self._loading
            torch.set_num_threads(1)
            model = load_retriever(source, **settings)
            if model.fingerprint != fingerprint:
                raise UserError(f"{source}: is another model on a machine of the Ray cluster")
            self._model = model
        return self._model
