"""What `policy_size` 112 does to the frames that are chosen, on the example data.

    OMP_NUM_THREADS=1 python scripts/bench/policy_size.py --work /tmp/policy_size

CLIP and the selector's MobileNetV3 are frozen, so that frames are encoded once for each size. The CNN has random
weights, and the statistics of the clips in its batch norms. The selector is trained with frames of 224 and of 112
pixels, and once more with 224 and another seed: two runs that differ in chance alone do not choose the same frames
either. Figures are those of the best epoch on validation.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from adaclip_finetune.bench.policy import with_statistics
from adaclip_finetune.config import load_config
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.preprocess import IMAGENET, normalise
from adaclip_finetune.data.splits import evaluation_split
from adaclip_finetune.model.frame_features import CnnBackbone
from adaclip_finetune.training.frozen import open_vectors
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.session import open_model
from adaclip_finetune.training.trainer import run_trial
from adaclip_finetune.weights.plain import strict_load

CONFIG = Path("cfgs/demo.json")
RUNS = (("224", 224, 0), ("224, another seed", 224, 1), ("112", 112, 0))


def main() -> None:
    """Print a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the CNN and the encoded frames")
    parser.add_argument("--clips", type=int, default=600, help="clips to train on")
    parser.add_argument("--epochs", type=int, default=12)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    cnn = a.work / "mobilenet.pt"
    if not cnn.exists():
        make_cnn(cnn)
    clips = json.loads(Path(str(load_config(CONFIG, {}).train_annot)).read_text())
    (a.work / "train.json").write_text(json.dumps(dict(list(clips.items())[: a.clips])))
    first = None
    print("| frames, pixels | frames chosen as by the first | all K the same | T2V R@1 | R@5 |\n|---|---|---|---|---|")
    for name, size, seed in RUNS:
        chosen, figures = train(a.work, size, seed, a.epochs)
        first = chosen if first is None else first
        same = (chosen[:, :, None] == first[:, None]).any(dim=2).float().mean(dim=1)
        shares = f"{100 * same.mean():.1f} % | {100 * (same == 1).float().mean():.1f} %"
        print(f"| {name} | {shares} | {figures['R@1']:.1f} | {figures['R@5']:.1f} |", flush=True)


def settings(weights: str) -> dict[str, Any]:
    """Return the settings of all runs."""
    frozen = {"freeze_cnn": True, "freeze_clip": True, "peft": {"method": "full"}}
    policy = {"policy_backbone": "mobilenet_v3_large", "policy_weights": weights}
    return frozen | policy | {"val_batch_size": 4, "num_workers": 1, "no_output": True, "device": "cpu"}


def make_cnn(path: Path) -> None:
    """Write a MobileNetV3 with random weights whose batch norms have the statistics of 64 videos."""
    config = load_config(CONFIG, settings("random"))
    session = open_model(config)
    split = evaluation_split(config, str(config.train_annot))
    reader = VideoReader(split.store, config, session.model.views())
    videos = collate([reader.read(name) for name in split.queries.video_ids[:64]]).videos
    assert videos is not None and videos.policy_frames is not None
    assert session.model.selector is not None and isinstance(session.model.selector.backbone, CnnBackbone)
    frames = normalise(videos.policy_frames[:, ::4].flatten(0, 1), IMAGENET.mean, IMAGENET.std)
    own = with_statistics(session.model.selector.backbone, frames).cnn.state_dict()
    torch.save(torchvision.models.mobilenet_v3_large(weights=None).state_dict() | own, path)


def train(work: Path, size: int, seed: int, epochs: int) -> tuple[Tensor, dict[str, float]]:
    """Return the places (V, K) of the frames that the trained selector chooses on validation, and the T2V figures."""
    own = {"policy_size": size, "embedding_cache": str(work / str(size)), "num_epochs": epochs, "seed": seed}
    own |= {"train_annot": str(work / "train.json")}
    config = load_config(CONFIG, settings(str(work / "mobilenet.pt")) | own)
    with Path(os.devnull).open("w") as nowhere:
        trial = run_trial(config, RunFolder(config, nowhere), lambda _epoch, _figures: None)
    session = open_model(config)
    strict_load(session.model, trial.weights, "the best epoch")
    split = evaluation_split(config, str(config.val_annot))
    reader = VideoReader(split.store, config, session.model.views()._replace(vectors=open_vectors(session)))
    videos = collate([reader.read(name) for name in split.queries.video_ids]).videos
    assert videos is not None
    with torch.no_grad():
        selection = session.model.eval().encode_video(videos).selection
    assert selection is not None
    return selection.indices, trial.best.as_dict()["t2v"]


if __name__ == "__main__":
    main()
