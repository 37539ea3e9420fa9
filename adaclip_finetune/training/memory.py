"""Memory that does not suffice: what to change, and `auto_batch_size`, the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from adaclip_finetune.config import Config
from adaclip_finetune.data.blank import blank_videos
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.data.loader import FRAMES_A_GALLERY_BATCH
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives.base import Group, Objective
from adaclip_finetune.processes import gather_objects, world_size
from adaclip_finetune.training.device import describe_device, total_memory_gib

# What is no torch.OutOfMemoryError but means the same: MPS, the CPU (on Linux, on Windows), the CUDA driver, cuBLAS and
# cuDNN on their own, Level Zero.
_MESSAGES = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "OUT_OF_DEVICE_MEMORY",
    "OUT_OF_HOST_MEMORY",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of whichever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def explain_out_of_memory(
    error: BaseException, config: Config, device: torch.device, batch_size: int, retriever: VideoRetriever
) -> UserError | None:
    """What to tell a user whose training step on a batch of `batch_size` pairs, of all processes together, did not fit,
    with the K that the retriever is at; None if `error` is something else."""
    if not is_out_of_memory(error):
        return None
    return _too_much(str(error) or type(error).__name__, config, device, batch_size, retriever)


def explain_out_of_memory_in_evaluation(error: BaseException, config: Config, device: torch.device) -> UserError | None:
    """The same for a batch of an evaluation."""
    if not is_out_of_memory(error):
        return None
    at_once = FRAMES_A_GALLERY_BATCH // config.num_frm
    return UserError(
        f"out of memory on {_in_words(device)} in an evaluation, with val_batch_size {config.val_batch_size}, num_frm "
        f"{config.num_frm}, precision {config.precision} ({_first_line(str(error))}).\n"
        f"Try --val_batch_size {max(1, min(config.val_batch_size, at_once) // 4)}, or --precision bf16"
    )


def fitting_batch_size(
    config: Config,
    objective: Objective,
    tokenize: Callable[[Sequence[str], int], Tensor],
    accelerator: Accelerator,
    say: Callable[[str], None],
    batch_size: int,
) -> int:
    """The largest of batch_size, its half, its quarter, … (at least 2, and one for each process) at which a training
    step fits with what learns now, at the largest K of the run; all processes agree on it.

    Tries it out on blank videos and captions of max_txt_len. Weights, buffers, gradients and random states stay as they
    are. A CPU has no memory of its own: there it is batch_size. Raises UserError if nothing fits.
    """
    device = accelerator.device
    if not _refuses_memory(device):
        say("auto_batch_size is ignored on the CPU, which has no out-of-memory error to probe")
        return batch_size
    objective.retriever.start_epoch(0)
    smallest = min(batch_size, max(2, world_size()))
    size = batch_size
    with _untouched(objective, device):
        while reasons := _why_not(config, objective, tokenize, accelerator, size):
            if size <= smallest:
                raise _too_much(reasons[0], config, device, size, objective.retriever)
            size = max(size // 2, smallest)
    if size < batch_size:
        say(
            f"auto_batch_size: a batch of {batch_size} does not fit into {_in_words(device)}; it is {size} from here "
            "on, so each video is told from fewer others"
        )
    return size


def blank_batch(
    config: Config, retriever: VideoRetriever, tokenize: Callable[[Sequence[str], int], Tensor], size: int
) -> tuple[TrainBatch, Group]:
    """`size` blank videos with captions of max_txt_len, as one process's batch, to try a step out."""
    batch = TrainBatch(
        blank_videos(config.num_frm, retriever.views(), size),
        tokenize([" ".join(["video"] * config.max_txt_len)] * size, config.max_txt_len),
        torch.zeros(size, config.num_frm),
    )
    return batch, Group([batch.videos.video_ids])


def _refuses_memory(device: torch.device) -> bool:
    return device.type != "cpu"


def _why_not(
    config: Config,
    objective: Objective,
    tokenize: Callable[[Sequence[str], int], Tensor],
    accelerator: Accelerator,
    size: int,
) -> list[str]:
    """What the processes say for whom their share of a batch does not fit; none if it fits everywhere."""
    batch, group = blank_batch(config, objective.retriever, tokenize, -(-size // world_size()))
    clear_device_cache(garbage_collection=True)
    try:
        _try_out(config, objective, accelerator, batch, group)
        reason = ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error) or "out of memory"
    # Only here, outside of `except`, nothing holds the tensors of the failed step any more.
    objective.zero_grad()
    clear_device_cache(garbage_collection=True)
    return [reason for reason in gather_objects(reason) if reason]


def _try_out(config: Config, objective: Objective, accelerator: Accelerator, batch: TrainBatch, group: Group) -> None:
    """What a step holds at once: the optimizer's moments, the next batch, activations and gradients."""
    copies = 2 if world_size() == 1 else 3  # DistributedDataParallel gathers gradients in buckets of their own
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    held = [torch.empty_like(parameter) for parameter in learning for _ in range(copies)]
    coming = batch.to(accelerator.device)
    objective.train()
    # In an accumulated batch the gradients of the one before it are there from the start.
    for _ in range(min(config.gradient_accumulation_steps, 2)):
        with accelerator.autocast():
            terms = objective(batch.to(accelerator.device), group)
        sum(terms.values(), torch.zeros((), device=accelerator.device)).backward()
    del held, coming


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back, at the end, what a step leaves behind although it updates nothing."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    backend = torch.get_device_module(device)
    states = torch.get_rng_state(), None if device.type == "cpu" else backend.get_rng_state()
    model.zero_grad()
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes:
            module.training = training
        torch.set_rng_state(states[0])
        if states[1] is not None:
            backend.set_rng_state(states[1])


def _too_much(
    reason: str, config: Config, device: torch.device, batch_size: int, retriever: VideoRetriever
) -> UserError:
    encoded, k = retriever.frames_with_gradients, int(retriever.schedule()["k"])
    processes = f" (of {world_size()} processes together)" if world_size() > 1 else ""
    ways_out = "\n".join(f"  {flag:48} {effect}" for flag, effect in _ways_out(config, device, batch_size, k, encoded))
    checkpointing = "on" if config.gradient_checkpointing else "off"
    return UserError(
        f"out of memory on {_in_words(device)}: batch_size {batch_size}{processes}, num_frm {config.num_frm}, of which "
        f"{encoded} go through CLIP with gradients, precision {config.precision}, gradient_checkpointing "
        f"{checkpointing} ({_first_line(reason)}).\nWhat to change, what costs least first:\n{ways_out}"
    )


def _ways_out(config: Config, device: torch.device, batch_size: int, k: int, encoded: int) -> Iterator[tuple[str, str]]:
    """Flags and what they do, in the order of what they cost."""
    if config.precision == "fp32":
        yield "--precision bf16", "activations of half the size"
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing", "about a third more time"
    if config.use_policy and k > config.top_k:
        yield "--warmup_epochs 0", f"K begins at top_k {config.top_k}, not at {k}"
    if config.use_policy and encoded == k and config.top_k > 1:
        yield f"--top_k {config.top_k // 2}", "fewer frames in a video's embedding"
    if config.num_frm > 1:
        frames = config.num_frm // 2
        fewer = f" --top_k {frames}" if config.use_policy and config.top_k > frames else ""
        yield f"--num_frm {frames}{fewer}", "fewer frames to choose from"
    if batch_size > 2:
        own = getattr(config.peft.config, "pre_batch_size", None)
        name = "peft.config.pre_batch_size" if own == batch_size != config.batch_size else "batch_size"
        yield f"--{name} {batch_size // 2}", "each video is told from fewer others"
    if device.type != "cpu" and not config.auto_batch_size:
        yield "--auto_batch_size", "the same, as far as it takes"


def _in_words(device: torch.device) -> str:
    return f"{describe_device(device)}, {total_memory_gib(device):.1f} GiB"


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:200] if message.strip() else "no more is known"
