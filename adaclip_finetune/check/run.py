"""All checks of a run, in order: its data, its model, and what it takes, measured by two real training steps.

Nothing is changed: no folder is made, and weights that would have to be downloaded are random.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import optuna
import psutil
from torch import Tensor

from adaclip_finetune.check.data import CheckedSplit, check_captions, check_entries, check_overlap, check_videos
from adaclip_finetune.check.report import Finding, plural
from adaclip_finetune.config import Config
from adaclip_finetune.config.parts import is_lazy, parts_of
from adaclip_finetune.data.dataset import VideoReader
from adaclip_finetune.data.frame_store import FrameError
from adaclip_finetune.data.queries import train_entries
from adaclip_finetune.data.splits import batch_plan
from adaclip_finetune.errors import UserError
from adaclip_finetune.training.device import describe_device, make_accelerator, total_memory_gib
from adaclip_finetune.training.memory import StepCost, explain_out_of_memory, try_steps
from adaclip_finetune.training.session import Session, open_model
from adaclip_finetune.tuning.run import describe
from adaclip_finetune.weights.checkpoints import read_checkpoint, with_its_clip
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.loaded import LoadedClip

_READ_VIDEOS = 16
_SHARED_MEMORY = Path("/dev/shm")


def check_data(config: Config, splits: Sequence[CheckedSplit], deep: bool) -> list[Finding]:
    """Check annotation files by themselves: entries, videos, overlap and captions."""
    findings = [finding for split in splits for finding in check_entries(split)]
    findings += [finding for split in splits for finding in check_videos(split, config, deep)]
    findings += check_overlap(splits, config.task_settings.of_classes)
    clip: LoadedClip | None = None
    with suppress(UserError):  # without weights or a network, the lengths of captions cannot be checked
        clip = _tokenizer(config)
    return findings + [finding for split in splits for finding in check_captions(split, config, clip)]


def check_run(config: Config, splits: Sequence[CheckedSplit], deep: bool) -> list[Finding]:
    """Check all that a run of `config` would do: data, hyperparameter study, model and, for training, the cost."""
    findings = check_data(config, splits, deep)
    if config.optuna_cfg is not None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            findings.append(Finding("fine", "tuning", "run", describe(config)[0]))
        except UserError as error:
            findings.append(Finding("fails", "tuning", "run", str(error)))
    try:
        learn = not config.do_inference
        session = open_model(config, values="random", accelerator=make_accelerator(config), learn=learn)
        trained = [split for split in splits if split.trains]
        if learn and all(split.good for split in trained):
            session.method.on_epoch_start(0)
            for finding in check_cost(session, trained):  # keep those before an error
                findings.append(finding)
    except UserError as error:
        findings.append(Finding("fails", "model", "run", str(error)))
    return findings


def check_cost(session: Session, splits: Sequence[CheckedSplit]) -> Iterator[Finding]:
    """Yield findings about disk, memory and time of training on `splits`, which have readable videos.

    Raise UserError for a part of a mixture that is too small for its share of a batch.
    """
    config, model, device = session.config, session.model, session.device
    assert config.train_annot is not None, "check_paths refuses this"
    entries = [_count_entries(split, config) for split in splits]
    phases = session.method.phases(config.num_epochs, config.batch_size)
    size = max(phase.batch_size for phase in phases)
    if isinstance(config.train_annot, str):
        size = min(size, sum(entries))
    batches = config.num_epochs * batch_plan(config.train_annot, entries, config.seed).num_batches(size)
    yield from _disk(session)

    # If frames that do not fit were made, Linux would end this process. Reading processes have two batches ready each.
    views = model.views()
    pixels = config.num_frm * sum(
        view.channels * view.size**2 for view in (views.clip, views.selector) if view
    )  # bytes
    ahead = pixels * size * (2 * config.num_workers + 2)
    free, held = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    rooms = {"memory": free}
    if config.num_workers and _SHARED_MEMORY.is_dir():
        rooms["shared_memory"] = shutil.disk_usage(_SHARED_MEMORY).free
    for check, room in rooms.items():
        if ahead > room:
            message = f"batches that are read ahead take {_size(ahead)} of {check}, of which {_size(room)} are free"
            advice = "lower num_workers, batch_size or num_frm"
            if check == "shared_memory":
                advice += f", or enlarge {_SHARED_MEMORY} (docker run --shm-size)"
            yield _within(ahead, room, check, message, advice)
            return

    model.start_epoch(0)  # with the largest K of the run
    assert session.accelerator is not None
    on_cpu = device.type == "cpu"
    tried = min(2, size) if on_cpu else size
    step = try_steps(config, session.objective, session.loaded.tokenize, session.accelerator, tried)
    if isinstance(step, str):
        explained = explain_out_of_memory(MemoryError(step), config.model_copy(update={"batch_size": tried}))
        yield Finding("warning" if config.auto_batch_size else "fails", "memory", "run", str(explained))
        return
    together = min(size, config.grad_cache_chunk or size)
    needed = step.peak_bytes + step.kept_bytes * (together - min(tried, together)) // tried + (ahead if on_cpu else 0)
    total = free + held if on_cpu else int(total_memory_gib(device) * 2**30)
    message = f"memory of {describe_device(device)}: about {_size(needed)} of {_size(total)}"
    yield _within(needed, total, "memory", message, "lower batch_size or num_frm, or give --precision bf16")
    yield _time(session, splits, step, size, batches)


def _count_entries(split: CheckedSplit, config: Config) -> int:
    """Return the number of training entries, of JSON Lines and tar shards as if all of them could be read."""
    if is_lazy(split.path):
        return split.listed
    good = set(split.good)
    return len(train_entries([video for video in split.videos if video.video_id in good], config.concat_captions))


def _time(session: Session, splits: Sequence[CheckedSplit], step: StepCost, size: int, batches: int) -> Finding:
    """Return the finding about the time to compute a batch and the whole run, and to read a batch in one process."""
    config = session.config
    twice = 4 / 3 if step.videos <= config.grad_cache_chunk < size else 1  # a second forward pass
    compute = twice * step.seconds * size / step.videos + step.update_seconds
    again, readable = session.objective.second_view(config), list[tuple[list[VideoReader], str]]()
    for split, part in zip(splits, parts_of(config.train_annot or []), strict=True):
        readers = [VideoReader(split.store, config, session.model.views())]
        if again is not None and (session.objective.second_of_labelled or not part.labelled):
            readers.append(VideoReader(split.store, *again))
        readable += [(readers, video_id) for video_id in split.good]
    chosen = readable[:: -(-len(readable) // _READ_VIDEOS)]  # from the whole list
    started = time.monotonic()
    for readers, video_id in chosen:
        with suppress(FrameError):
            for reader in readers:
                reader.read(video_id)
    reading = (time.monotonic() - started) / len(chosen) * size
    message = (
        f"time on {describe_device(session.device)}, from two steps on {plural(step.videos, 'video')}: a batch of "
        f"{plural(size, 'video')} takes {_duration(compute)} to compute, and {_duration(reading)} to read in one "
        f"process (num_workers is {config.num_workers}); {plural(config.num_epochs, 'epoch')}, {batches} batches in "
        f"all, take {_duration(batches * compute)} to compute, without validation"
    )
    advice = ""
    if reading > compute * max(1, config.num_workers):
        frame_size = session.loaded.image.size
        advice = f"reading is slower: raise num_workers, or adaclip extract --frame_size {frame_size}"
    items = {"batch_size": size, "computing_a_batch": compute, "reading_a_batch": reading, "run": batches * compute}
    return Finding("fine", "time", "run", message, items, advice)


def _disk(session: Session) -> Iterator[Finding]:
    """Yield whether the disk has room for two snapshots, the old one and the new one, and for the best weights."""
    config, model = session.config, session.model
    if config.no_output:
        return
    learned = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    needed = 2 * (2 * _bytes(model.state_dict().values()) + 2 * learned)
    output = Path(config.output_dir).absolute()
    free = shutil.disk_usage(next(place for place in (output, *output.parents) if place.is_dir())).free
    message = f"disk: a run writes up to {_size(needed)} to output_dir {output}, where {_size(free)} are free"
    yield _within(needed, free, "disk", message, "make room, or set output_dir to another disk")


def _within(needed: int, free: int, check: str, message: str, advice: str) -> Finding:
    items = {"needed": needed, "free": free}
    if needed <= free:
        return Finding("fine", check, "run", message, items)
    return Finding("fails", check, "run", message, items, advice)


def _tokenizer(config: Config) -> LoadedClip:
    """Return the CLIP of a run as shapes alone, for its tokenizer. Raise UserError if it cannot be built."""
    if config.resume is None:
        return load_clip(config, with_weights=False)
    checkpoint = read_checkpoint(Path(config.resume))
    return load_clip(with_its_clip(checkpoint, config), with_weights=False, from_checkpoint=checkpoint.towers())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
