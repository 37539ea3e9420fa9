"""What it costs to index a video, split into decoding, choosing frames, encoding them and aggregating.

    OMP_WAIT_POLICY=passive python scripts/bench/indexing.py RUN dataset_example/videos --videos 96
    OMP_WAIT_POLICY=passive python scripts/bench/indexing.py vit-b-32 dataset_example/videos --videos 16

RUN is a run folder; `vit-b-32` stands for ViT-B/32 with random weights (time does not depend on them) that encodes 12
of 32 frames, MobileNetV3-Large choosing. One process reads, and computes one video at a time, as `adaclip index` does
on a CPU. `decode` is reading, decoding and resizing, `select` policy backbone and selector, `encode` CLIP's image tower
on the chosen frames, `aggregate` header and aggregator; what is between them (normalising pixels, mostly) is `rest`.
CPU time is that of all threads: on a machine that does other work it says more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from torch import nn

from adaclip_finetune import load_retriever
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.dataset import VideoReader, collate
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.search.collection import collect_folder
from adaclip_finetune.weights.loaded import LoadedClip

RANDOM = "vit-b-32"
BATCH = 8
PARTS = ("decode", "select", "encode", "aggregate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    for name, default in (("videos", 100), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model, config = random_model() if a.run == RANDOM else trained_model(a.run)
    collection = collect_folder(a.folder)
    reader = VideoReader(collection.store, config, model.views())
    clocks = [Clock(model, time.perf_counter), Clock(model, time.process_time)]
    ids = [video.id for video in collection.videos[: a.videos + BATCH]]
    for start in range(0, len(ids), BATCH):
        if start == BATCH:  # the first batch warms up
            for clock in clocks:
                clock.seconds = dict.fromkeys(clock.seconds, 0.0)
        began = [clock.now() for clock in clocks]
        videos = collate([reader.read(name) for name in ids[start : start + BATCH]]).videos
        read = [clock.now() for clock in clocks]
        assert videos is not None
        with torch.inference_mode():
            for place in range(len(videos.video_ids)):
                model.encode_video(videos.rows(place, place + 1))
        for number, clock in enumerate(clocks):
            clock.seconds["decode"] += read[number] - began[number]
            clock.seconds["all"] += clock.now() - began[number]
    count = len(ids) - BATCH
    print(
        f"{a.run}: {config.num_frm} frames, of which {model.top_k} are encoded; {count} videos, {a.threads} threads\n"
    )
    print(f"| ms a video | {' | '.join(PARTS)} | rest | all |\n|---|{'---|' * (len(PARTS) + 2)}")
    for name, clock in zip(("time", "CPU time"), clocks, strict=True):
        spent = [clock.seconds[part] for part in PARTS]
        cells = [*spent, clock.seconds["all"] - sum(spent), clock.seconds["all"]]
        print(f"| {name} | {' | '.join(f'{1000 * seconds / count:.2f}' for seconds in cells)} |")
    shares = [100 * clock.seconds[part] / clock.seconds["all"] for part in PARTS]
    print(f"| % of CPU time | {' | '.join(f'{share:.1f}' for share in [*shares, 100 - sum(shares), 100])} |")


class Clock:
    """Adds up the time that the parts of a model take."""

    def __init__(self, model: VideoRetriever, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds = dict.fromkeys((*PARTS, "all"), 0.0)
        self._began = 0.0
        assert model.selector is not None and model.selector.backbone is not None
        visual = model.clip.get_submodule("visual")
        parts = {"select": [model.selector, model.selector.backbone], "encode": [visual]}
        parts["aggregate"] = [module for module in (model.header, model.aggregator) if module is not None]
        for name, modules in parts.items():
            for module in modules:
                self._watch(name, module)

    def _watch(self, name: str, module: nn.Module) -> None:
        def begin(*_: object) -> None:
            self._began = self.now()

        def end(*_: object) -> None:
            self.seconds[name] += self.now() - self._began

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def trained_model(run: str) -> tuple[VideoRetriever, Config]:
    retriever = load_retriever(run, device="cpu")
    return retriever.model, retriever.config


def random_model() -> tuple[VideoRetriever, Config]:
    config = load_config(None, {"num_frm": 32, "top_k": 12, "policy_weights": "random", "frame_agg": "mlp"})
    image = ImageSpec(224, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    clip = open_clip.create_model("ViT-B-32-quickgelu")
    model = VideoRetriever(config, LoadedClip(clip, image, None, None, 77, "random"))  # type: ignore[arg-type]
    return model.eval(), config


if __name__ == "__main__":
    main()
