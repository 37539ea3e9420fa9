"""Train a language model of 0.7 million parameters on the captions of an annotation, as a folder of transformers.

It stands in for a pretrained one where none can be downloaded, and knows no sentence but such captions. The sentences
of a video follow each other in random order, so that the model learns to say again, in other words, what it reads. The
validation captions show how well it does.

    python scripts/pretrain_tiny_language_model.py --train dataset_example/train.json --val dataset_example/val.json \\
        --out tiny_language_model

It took 8 minutes on a core that other work used, too.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from adaclip_finetune.data.annotations import VideoAnnotation, load_annotations

END = "</s>"
BATCH = 32
LONGEST = 128
LEARNING_RATE = 3e-3


def main() -> None:
    """Train, save, and print the loss of a caption with and without another one before it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=Path("dataset_example/train.json"))
    parser.add_argument("--val", type=Path, default=Path("dataset_example/val.json"))
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help=f"updates of {BATCH} videos each")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, val = load_annotations(args.train), load_annotations(args.val)
    tokenizer = train_tokenizer([text for video in train for text in video.sentences])
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=128,
            word_embed_proj_dim=128,
            num_hidden_layers=3,
            ffn_dim=512,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    learn(model, tokenizer, train, args.steps, random.Random(args.seed))
    model.eval().save_pretrained(args.out)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(args.out)
    print(f"{model.num_parameters():,} parameters, {tokenizer.get_vocab_size()} tokens")
    for name, loss in evaluate(model, tokenizer, val).items():
        print(f"{name}: {loss:.2f} nats a token")


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a tokenizer of bytes and of their frequent sequences, whose token 0 is the end."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=640, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def learn(
    model: OPTForCausalLM, tokenizer: Tokenizer, videos: Sequence[VideoAnnotation], steps: int, draw: random.Random
) -> None:
    """AdamW with a one-cycle schedule. Each text begins at a random place, so that all positions learn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in (bar := tqdm(range(steps), desc="pretraining", unit="update")):
        rows = []
        for video in draw.sample(videos, BATCH):
            texts = draw.sample(video.sentences, len(video.sentences))
            rows.append([0, *(token for text in texts for token in (*tokenizer.encode(text).ids, 0))])
        length = max(map(len, rows))
        before = draw.randrange(LONGEST - length + 1) if length < LONGEST else 0
        ids = torch.tensor([[0] * before + (row + [0] * (length - len(row)))[:LONGEST] for row in rows])
        logits = model(ids).logits[:, before:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, before + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def evaluate(model: OPTForCausalLM, tokenizer: Tokenizer, videos: Sequence[VideoAnnotation]) -> dict[str, float]:
    """Return the loss a token of the second sentence of each video, by itself and behind the first one."""
    found: dict[str, list[Tensor]] = {"by itself": [], "behind another caption of its video": []}
    for video in (video for video in videos if len(video.sentences) > 1):
        first, second = (tokenizer.encode(text).ids for text in video.sentences[:2])
        for losses, context in zip(found.values(), ([0], [0, *first, 0]), strict=True):
            logits = model(torch.tensor([context + second])).logits[0, len(context) - 1 :]
            losses.append(F.cross_entropy(logits, torch.tensor([*second, 0])))
    return {name: torch.stack(losses).mean().item() for name, losses in found.items()}


if __name__ == "__main__":
    main()
