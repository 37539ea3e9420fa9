"""The setting `embedding_cache`: encode each frame once, if nothing learns through which frames go.

Where the image tower and the selector's features are frozen, an epoch is the work of the parts behind them, and of the
text tower.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from adaclip_finetune.data.dataset import GalleryDataset, VideoReader
from adaclip_finetune.data.frame_store import FrameError, FrameStore
from adaclip_finetune.data.frame_vectors import FrameVectors, VectorsOfFrames
from adaclip_finetune.data.loader import GalleryLoader
from adaclip_finetune.errors import UserError
from adaclip_finetune.processes import gather_objects, is_main, rank, world_size
from adaclip_finetune.training.session import Session
from adaclip_finetune.weights.plain import weights_digest

_FORMAT = 2  # to be raised when other vectors would come of the same weights and settings


def open_vectors(session: Session) -> FrameVectors | None:
    """Return where the vectors of this model are kept; None without an `embedding_cache`. Raise UserError."""
    config, model = session.config, session.model
    if config.embedding_cache is None:
        return None
    visual = model.clip.get_submodule("visual")
    if learns := [name for name, parameter in visual.named_parameters() if parameter.requires_grad]:
        raise UserError(
            f"embedding_cache keeps what the image tower makes of frames, but its {learns[0]} learns: change "
            "peft.config.keep_module_keywords, or leave embedding_cache out"
        )
    if any(isinstance(part, _BatchNorm) for part in visual.modules()):
        raise UserError(
            f"embedding_cache: the batch norms of {config.clip_backbone} follow the training batches, even if all "
            "weights are frozen; leave embedding_cache out, or take a ViT"
        )
    backbone = None if model.selector is None else model.selector.backbone
    names = ("num_frm", "num_frm_subset", "segment_sampling", "to_last_frame", "precision", "tf32")
    about = {
        "format": _FORMAT,
        "weights": weights_digest(nn.ModuleList([visual, *([] if backbone is None else [backbone])])),
        "scored": config.policy_backbone if model.selector is not None else None,
        "views": repr(model.views()),
        **{name: getattr(config, name) for name in names},
    }
    return FrameVectors(Path(config.embedding_cache), about)


def encode_frames(session: Session, store: FrameStore, video_ids: Iterable[str], label: str) -> int:
    """Keep the vectors of all videos that have none yet, with all processes, and return how many these were.

    A video that cannot be read gets no vectors. Raise UserError if they cannot be written.
    """
    vectors, config, model = session.vectors, session.config, session.model
    assert vectors is not None, "the run has an embedding_cache"
    missing = [video_id for video_id in dict.fromkeys(video_ids) if not _kept(vectors, store, video_id)]
    missing = sorted({video_id for part in gather_objects(missing) for video_id in part})
    training = model.training
    model.eval()
    dataset = GalleryDataset(missing, VideoReader(store, config, model.views()))
    bar = tqdm(total=len(missing), desc=label, unit="videos", leave=False, disable=None if is_main() else True)
    try:
        with closing(GalleryLoader(dataset, config)) as loader, bar, session.autocast():
            for collated in loader.read(range(len(loader))[rank() :: world_size()]):
                bar.update(len(collated.failures))
                if collated.videos is None:
                    continue
                videos = collated.videos
                found, features = model.frame_vectors(videos.to(model.device, non_blocking=config.pin_mem))
                rows = found.float().cpu().numpy()
                scored = None if features is None else features.float().cpu().numpy()
                for row, video_id in enumerate(videos.video_ids):
                    own = None if scored is None else scored[row]
                    record = VectorsOfFrames(videos.frame_indices[row].numpy(), rows[row], own)
                    vectors.write(store, video_id, record)
                bar.update(len(videos))
    except OSError as error:
        raise UserError(f"embedding_cache {config.embedding_cache}: cannot be written ({error})") from error
    finally:
        model.train(training)
    gather_objects(None)  # no process begins before all have written
    return len(missing)


def _kept(vectors: FrameVectors, store: FrameStore, video_id: str) -> bool:
    try:
        return vectors.kept(store, video_id)
    except FrameError:  # whoever reads it will tell
        return True
