"""Time a training step with random weights and random pixels, and measure its peak memory on an accelerator.

    python scripts/bench/step.py --device cuda --precision bf16 --num_frm 16 --top_k 8 --batch_size 32 \
        --clip_backbone PE-Core-B-16:meta --peft.method lora
    python scripts/bench/step.py --config cfgs/demo.json --peft cfgs/peft/bitfit.json

The flags are those of `adaclip train`. Nothing is downloaded.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace

import torch

from adaclip_finetune.commands.flags import Parser, add_flags, given
from adaclip_finetune.config import Config, load_config
from adaclip_finetune.training.backward import Backward
from adaclip_finetune.training.device import describe_device, make_accelerator, peak_memory_mib
from adaclip_finetune.training.memory import blank_batch
from adaclip_finetune.training.optimizer import build_optimizer
from adaclip_finetune.training.session import open_model


def main() -> None:
    """Print the median time of a step."""
    parser = Parser("step.py", f"{(__doc__ or '').splitlines()[0]}")
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings")
    parser.add_argument("--untimed", type=int, default=3, help="steps before the timed ones (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default: 8)")
    add_flags(parser, Config)
    words = parser.read(sys.argv[1:])
    defaults = {"frame_agg": "mlp", "freeze_cnn": True, "max_txt_len": 32, "policy_weights": "random"}
    config = load_config(words.config, given(words) if words.config else defaults | given(words))
    torch.manual_seed(config.seed)
    session = open_model(config, values="random", accelerator=make_accelerator(config))
    optimizer, _ = build_optimizer(session.objective, config, words.untimed + words.steps)
    session.objective.train()
    batch, group = blank_batch(config, session.objective, session.loaded.tokenize, config.batch_size)
    videos = batch.videos
    pixels = torch.randint(0, 256, videos.frames.shape, dtype=torch.uint8)
    batch = replace(batch, videos=replace(videos, frames=pixels, frame_mask=torch.ones_like(videos.frame_mask)))
    batch, seconds = batch.to(session.device), []
    accelerator = session.accelerator
    assert accelerator is not None
    call = accelerator.autocast()(session.objective)
    backward = Backward(accelerator, session.objective, call, config.grad_cache_chunk)
    for _ in range(words.untimed + words.steps):
        started = time.perf_counter()
        backward(batch, group, int)
        optimizer.step()
        optimizer.zero_grad()
        if session.device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    step, memory = 1000 * statistics.median(seconds[words.untimed :]), peak_memory_mib(session.device) / 1024
    what = f"{config.clip_backbone} {config.peft.method} {config.precision}, batch {config.batch_size}"
    print(f"{what}, {session.model.top_k} of {config.num_frm} frames: {step:.1f} ms a step, {memory:.2f} GiB at most")
    print(describe_device(session.device))


if __name__ == "__main__":
    main()
