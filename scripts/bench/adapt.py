"""Processor time of a text query that `adaptation: clip_reward` adapts the model to, by what learns.

    OMP_NUM_THREADS=1 python scripts/bench/adapt.py

ViT-B/32 with random weights, 1,000 videos with random rewards, 8 steps; the least of three turns within one run.
"""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock

import open_clip
import torch
import torch.nn.functional as F

from adaclip_finetune.config import load_config
from adaclip_finetune.data.preprocess import ImageSpec
from adaclip_finetune.evaluation.adaptation.base import QueryBatch
from adaclip_finetune.evaluation.adaptation.clip_reward import ClipReward
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.weights.loaded import LoadedClip

STEPS, VIDEOS, TURNS = 8, 1000, 3
LEARNS: dict[str, dict[str, Any]] = {
    "bitfit": {"method": "bitfit"},
    "lora": {"method": "lora", "config": {"rank": 8, "towers": "text"}},
    "full": {"method": "full"},
}


def main() -> None:
    """Print the seconds of a query that is adapted in each way, and of one that is not."""
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32-quickgelu").eval()
    gallery, rewards = F.normalize(torch.randn(VIDEOS, 512), dim=-1), torch.rand(1, VIDEOS)
    tokens = open_clip.get_tokenizer("ViT-B-32")(["two dogs run along the water and a child throws a ball"])
    spec = ImageSpec(224, (0, 0, 0), (1, 1, 1))
    times: dict[str, list[float]] = {name: [] for name in ["not adapted", *LEARNS]}
    for _ in range(TURNS):
        for name, learns in LEARNS.items():
            section = {"method": "clip_reward", "config": {"learns": learns, "reward": ["self"], "steps": STEPS}}
            config = load_config(None, {"do_inference": True, "use_policy": False, "adaptation": section})
            model = VideoRetriever(config, LoadedClip(clip, spec, None, None, 77, "random")).eval()  # type: ignore[arg-type]
            adaptation = ClipReward(config.adaptation.config)
            adaptation.start(config, Mock())
            queries = QueryBatch(
                "t2v", lambda model=model: model.scorer(model.encode_text(tokens), gallery), lambda: [rewards]
            )
            with adaptation.prepared(model):
                begun = time.process_time()
                with adaptation(model, queries), torch.no_grad():
                    model.encode_text(tokens)
                times[name].append(time.process_time() - begun)
            begun = time.process_time()
            with torch.no_grad():
                model.encode_text(tokens)
            times["not adapted"].append(time.process_time() - begun)
    for name, seconds in times.items():
        print(f"{name:12} {min(seconds):6.2f} s, {min(seconds) / min(times['full']):.2f} of full")


if __name__ == "__main__":
    main()
