"""Train `dataset_example/tiny_clip/` from scratch: a CLIP of 4 million parameters that knows stills of shapes.

Contrastive training (CLIP, Radford et al. 2021) on images and captions that `shapes_stills.py` renders on the fly: no
clip of the example data, no video at all. Writes an open_clip folder (`open_clip.create_model("local-dir:…")`) with
weights in float16.

    python scripts/pretrain_tiny_clip.py --out dataset_example/tiny_clip --seed 0

About 15 minutes on 2 cores. The same seed gives the same weights where torch and the processor are the same, else
ones as good.

`--blocks 8 6 --start dataset_example/tiny_clip` grows it to twice the depth: the new blocks change nothing at first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import shapes_world as world
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from shapes_stills import Stills
from torch import Tensor
from tqdm import tqdm

MODEL: dict[str, Any] = {
    "embed_dim": 96,
    "vision_cfg": {"image_size": world.SIZE, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
    "quick_gelu": True,
}
PREPROCESS: dict[str, Any] = {
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
BATCH = 256
LEARNING_RATE = 1.5e-3
THREADS = 2


def main() -> None:
    """Train, save, reload what was saved and measure that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dataset_example/tiny_clip"), help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200, help=f"updates of {BATCH} stills each")
    parser.add_argument("--learning_rate", type=float, default=LEARNING_RATE, help="highest learning rate")
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 3), help="blocks of the image and the text tower")
    parser.add_argument("--start", type=Path, help="CLIP to start from: a folder that this script wrote")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    config = with_blocks(*args.blocks)
    model = open_clip.CLIP(**config)
    if args.start:
        grow(model, load_file(args.start / "open_clip_model.safetensors"))
    train(model, Stills(np.random.default_rng(args.seed)), args.steps, args.learning_rate)
    save(model, args.out, config)
    for name, figure in evaluate(open_clip.create_model(f"local-dir:{args.out}").eval()).items():
        print(f"{name}: {figure:.1f} %")


def with_blocks(image: int, text: int) -> dict[str, Any]:
    """Return MODEL with other numbers of blocks."""
    towers = {"vision_cfg": image, "text_cfg": text}
    return {**MODEL, **{name: {**MODEL[name], "layers": count} for name, count in towers.items()}}


def grow(model: open_clip.CLIP, smaller: Mapping[str, Tensor]) -> None:
    """Give the model the weights of one with fewer blocks, and the same outputs: further blocks add nothing yet."""
    for name, parameter in model.state_dict().items():
        if name in smaller:
            parameter.copy_(smaller[name])
        elif "out_proj" in name or "c_proj" in name:
            parameter.zero_()


def train(model: open_clip.CLIP, stills: Stills, steps: int, learning_rate: float) -> None:
    """AdamW with a one-cycle schedule; embeddings, biases and norms do not decay."""
    plain = {name for name, p in model.named_parameters() if p.ndim < 2 or "embedding" in name}
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in plain) == is_plain], "weight_decay": decay}
        for is_plain, decay in ((True, 0.0), (False, 0.05))
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(1, steps), pct_start=0.1)
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    model.train()
    for _ in (bar := tqdm(range(steps), desc="pretraining", unit="update")):
        images, captions = stills.batch(BATCH)
        loss = contrastive_loss(model, images, captions, tokenizer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        bar.set_postfix(loss=f"{loss.item():.3f}")


def contrastive_loss(
    model: open_clip.CLIP, images: NDArray[np.uint8], captions: list[str], tokenizer: open_clip.SimpleTokenizer
) -> Tensor:
    """Symmetric cross-entropy; another still with the very same caption is not counted as wrong."""
    image = F.normalize(model.visual(pixels(images)), dim=-1)
    logits = model.logit_scale.exp() * image @ F.normalize(encode_text(model, tokenizer(captions)), dim=-1).T
    number = {caption: i for i, caption in enumerate(captions)}
    numbers, target = torch.tensor([number[caption] for caption in captions]), torch.arange(len(captions))
    same = (numbers[:, None] == numbers[None, :]) & (target[:, None] != target[None, :])
    logits = logits.masked_fill(same, -1e4)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def encode_text(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """The text tower on no more places than the longest caption (n, length) takes: the same result in half the time."""
    length = int((tokens != 0).sum(dim=1).max())
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return x[torch.arange(len(tokens)), tokens.argmax(dim=1)] @ model.text_projection


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (n, H, W, 3) → what the image tower takes."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(PREPROCESS[key])[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def save(model: open_clip.CLIP, folder: Path, config: dict[str, Any]) -> None:
    """An open_clip folder. Rows of words that no caption holds stay as they were drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").chmod(0o644)


@torch.no_grad()
def evaluate(model: open_clip.CLIP, scenes: int = 250) -> dict[str, float]:
    """Text → image R@1 among scenes it has not met: by one moment of each, and by the mean of four."""
    rng = np.random.default_rng(99)
    drawn = [world.random_scene(rng) for _ in range(scenes)]
    moments = []
    for scene in drawn:
        layout = world.random_layout(scene, rng)
        moments += [world.sprites(scene, layout, t) for t in (0.05, 0.35, 0.65, 0.95)]
    images = world.render(moments, world.lights(scenes, np.ones(scenes, bool), rng).repeat(4, axis=0), rng)
    image = F.normalize(model.visual(pixels(images)), dim=-1).unflatten(0, (scenes, 4))
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    text = F.normalize(model.encode_text(tokenizer([scene.sentences()[0] for scene in drawn])), dim=-1)
    embeddings = {"R@1, one moment": image[:, 1], "R@1, mean of four moments": F.normalize(image.mean(dim=1), dim=-1)}
    right = torch.arange(scenes)
    return {name: 100 * ((text @ x.T).argmax(dim=1) == right).float().mean().item() for name, x in embeddings.items()}


if __name__ == "__main__":
    main()
