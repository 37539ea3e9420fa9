"""What is said when memory does not suffice, and the batch size that fits, on a model that refuses larger ones."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from adaclip_finetune.config import Config, load_config
from adaclip_finetune.data.dataset import TrainBatch
from adaclip_finetune.errors import UserError
from adaclip_finetune.model.features import TextFeatures, VideoFeatures
from adaclip_finetune.model.retriever import VideoRetriever
from adaclip_finetune.objectives import build_objective
from adaclip_finetune.training import memory
from adaclip_finetune.training.device import make_accelerator
from adaclip_finetune.training.memory import (
    explain_out_of_memory,
    explain_out_of_memory_in_evaluation,
    fitting_batch_size,
    is_out_of_memory,
)
from adaclip_finetune.weights.clip_weights import load_clip
from adaclip_finetune.weights.loaded import LoadedClip

Project = dict[str, Any]
CPU = torch.device("cpu")
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.2 GiB"

# ---- what counts, and what is said ----


@pytest.fixture
def retriever(project: Project) -> VideoRetriever:
    return retriever_with(project)


def retriever_with(project: Project, **settings: Any) -> VideoRetriever:
    """The model of the default settings and these, with small random weights."""
    small = {"clip_weights": project["clip_weights"], "policy_weights": "random"}
    config = load_config(None, {**small, **settings})
    return VideoRetriever(config, load_clip(config))


def unallocatable() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    return raised.value


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError(CUDA_MESSAGE),
    unallocatable(),
    MemoryError(),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
])  # fmt: skip
def test_every_way_to_run_out_of_memory_is_told(error: Exception, retriever: VideoRetriever) -> None:
    assert is_out_of_memory(error)
    assert isinstance(explain_out_of_memory(error, load_config(), CPU, 32, retriever), UserError)


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("out of memory"),
    KeyboardInterrupt(),
])  # fmt: skip
def test_other_errors_stay_what_they_are(error: BaseException, retriever: VideoRetriever) -> None:
    assert explain_out_of_memory(error, load_config(), CPU, 32, retriever) is None
    assert explain_out_of_memory_in_evaluation(error, load_config(), CPU) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose name and size are known."""
    monkeypatch.setattr(memory, "describe_device", lambda device: "cuda: Stub 80")
    monkeypatch.setattr(memory, "total_memory_gib", lambda device: 79.2)
    return torch.device("cuda")


@pytest.fixture
def said(gpu: torch.device, project: Project) -> Callable[..., str]:
    """What is said of a step that did not fit there, of a model with the default settings and those given."""

    def explain(batch_size: int = 32, epoch: int = 0, **settings: Any) -> str:
        error, model = torch.OutOfMemoryError(CUDA_MESSAGE), retriever_with(project, **settings)
        model.start_epoch(epoch)
        return str(explain_out_of_memory(error, load_config(None, settings), gpu, batch_size, model))

    return explain


def test_it_says_what_was_too_much_and_what_to_change_cheapest_first(said: Callable[..., str]) -> None:
    message = said()
    for fact in ("cuda: Stub 80", "79.2 GiB", "batch_size 32", "num_frm 16", "8 go through CLIP", "fp32", CUDA_MESSAGE):
        assert fact in message
    flags = [line.split()[0] for line in message.splitlines() if line.startswith("  --")]
    assert flags == [
        *("--precision", "--gradient_checkpointing", "--top_k", "--num_frm", "--batch_size", "--auto_batch_size"),
    ]
    assert "--batch_size 16" in message and "--top_k 4" in message and "--num_frm 8" in message


@pytest.mark.parametrize(("settings", "absent"), [
    ({"precision": "bf16"}, "--precision"),
    ({"gradient_checkpointing": True}, "--gradient_checkpointing"),
    ({"auto_batch_size": True}, "--auto_batch_size"),
    ({"policy_backbone": "clip"}, "  --top_k"),
    ({"use_policy": False}, "--top_k"),
    ({"num_frm": 1, "top_k": 1}, "--num_frm"),
])  # fmt: skip
def test_it_does_not_advise_what_is_so_already_or_of_no_use(
    settings: dict[str, Any], absent: str, said: Callable[..., str]
) -> None:
    assert absent in said()
    assert absent not in said(**settings)


def test_it_knows_how_many_frames_have_gradients(said: Callable[..., str]) -> None:
    assert "of which 16 go through CLIP with gradients" in said(policy_backbone="clip")
    assert "of which 16 go through CLIP with gradients" in said(use_policy=False)
    warm = said(warmup_epochs=4)
    assert "of which 15 go through CLIP with gradients" in warm
    assert "--warmup_epochs 0" in warm and "--warmup_epochs 0" not in said(warmup_epochs=4, epoch=4)


def test_it_names_the_batch_size_that_counts(said: Callable[..., str]) -> None:
    ibs = {"method": "ibs", "config": {"pre_batch_size": 64}}
    assert "--peft.config.pre_batch_size 32" in said(batch_size=64, peft=ibs)
    assert "--batch_size 16" in said(batch_size=32, peft=ibs)


def test_a_cpu_is_not_advised_to_search(retriever: VideoRetriever) -> None:
    message = str(explain_out_of_memory(MemoryError(), load_config(), CPU, 32, retriever))
    assert "out of memory on cpu: " in message and "GiB" in message
    assert "--batch_size 16" in message and "--auto_batch_size" not in message


def test_an_evaluation_is_told_from_training(gpu: torch.device) -> None:
    error = torch.OutOfMemoryError(CUDA_MESSAGE)
    message = str(explain_out_of_memory_in_evaluation(error, load_config(None, {"val_batch_size": 100}), gpu))
    assert "val_batch_size 100" in message and "--val_batch_size 8" in message


# ---- the batch size that fits ----


class Search:
    """`fitting_batch_size` for a model that runs out of memory above `limit` videos, with a record of its steps."""

    def __init__(self, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.config: Config = load_config(None, settings)
        self.loaded: LoadedClip = load_clip(self.config)
        torch.manual_seed(0)
        self.model = VideoRetriever(self.config, self.loaded)
        self.objective = build_objective(self.config, self.model)
        self.limit, self.tried, self.k, self.said, self.cleared = 0, [], set(), [], []
        self.on_step: Callable[[], None] = lambda: None
        self._forward = VideoRetriever.forward
        monkeypatch.setattr(memory, "_refuses_memory", lambda device: True)
        monkeypatch.setattr(memory, "clear_device_cache", lambda garbage_collection: self.cleared.append(True))
        monkeypatch.setattr(VideoRetriever, "forward", lambda model, *given: self.forward(*given))

    limit: int
    tried: list[int]
    cleared: list[bool]
    k: set[int]
    said: list[str]

    def forward(self, batch: TrainBatch) -> tuple[TextFeatures, VideoFeatures]:
        assert self.model.training and len(batch) == len(batch.token_ids) == len(batch.noise)
        assert batch.token_ids.argmax(dim=1).eq(self.config.max_txt_len - 1).all(), "captions of full length"
        self.tried.append(len(batch))
        self.k.add(int(self.model.schedule()["k"]))
        self.on_step()
        if len(batch) > self.limit:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        return self._forward(self.model, batch)

    def __call__(self, limit: int, batch_size: int, accelerator: Accelerator | None = None) -> int:
        self.limit, self.tried, self.said, self.cleared = limit, [], [], []
        self.k.clear()
        chosen = accelerator or make_accelerator(self.config)
        given = (self.config, self.objective, self.loaded.tokenize, chosen, self.said.append)
        return fitting_batch_size(*given, batch_size)


@pytest.fixture
def search(project: Project, monkeypatch: pytest.MonkeyPatch) -> Search:
    return Search(project, monkeypatch)


@pytest.mark.parametrize(("limit", "batch_size", "tried"), [
    (32, 16, [16]),
    (4, 16, [16, 8, 4]),
    (5, 11, [11, 5]),
    (2, 5, [5, 2]),
    (2, 3, [3, 2]),
    (1, 1, [1]),
])  # fmt: skip
def test_it_halves_until_a_step_fits(limit: int, batch_size: int, tried: list[int], search: Search) -> None:
    assert search(limit, batch_size) == tried[-1]
    assert search.tried == tried
    assert len(search.cleared) == 2 * len(tried), "the cache is given back before and after each"
    assert bool(search.said) == (len(tried) > 1)
    assert all(f"a batch of {batch_size} does not fit" in line and f"it is {tried[-1]}" in line for line in search.said)


def test_where_nothing_fits_it_says_what_to_change(search: Search) -> None:
    with pytest.raises(UserError, match="batch_size 2, num_frm 6, of which 2 go through CLIP") as error:
        search(1, 8)
    assert search.tried == [8, 4, 2]
    assert "Tried to allocate 2.00 GiB" in str(error.value)


def test_another_error_is_not_taken_for_memory(search: Search) -> None:
    def fail() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    search.on_step = fail
    before = copy.deepcopy(search.model.state_dict())
    with pytest.raises(RuntimeError, match="shapes cannot"):
        search(8, 8)
    assert search.tried == [8]
    assert all(torch.equal(before[name], value) for name, value in search.model.state_dict().items())


@pytest.mark.parametrize(("settings", "k"), [
    ({}, 2),
    ({"warmup_epochs": 2}, 5),
    ({"use_policy": False}, 6),
])  # fmt: skip
def test_it_tries_the_largest_k_of_the_run(
    settings: dict[str, Any], k: int, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search({**project, **settings}, monkeypatch)
    search(8, 4)
    assert search.k == {k}


def test_it_leaves_everything_as_it_was(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    network = {"policy_backbone": "mobilenet_v3_large", "policy_weights": "random", "freeze_cnn": False}
    search = Search({**project, **network, "num_frm": 2, "top_k": 1}, monkeypatch)
    model = search.model.eval()
    model.clip.train()
    gradients = {name: torch.full_like(parameter, 3) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = {name: module.training for name, module in model.named_modules()}
    counted = [name for name in state if name.endswith("num_batches_tracked")]
    assert counted, "this model has statistics that a step changes"
    changed_meanwhile = []

    def look() -> None:
        now = model.state_dict()
        changed_meanwhile.append(any(not torch.equal(state[name], now[name]) for name in counted))
        torch.rand(3)

    search.on_step = look
    assert search(2, 4) == 2
    search.config = search.config.model_copy(update={"gradient_accumulation_steps": 8})
    assert search(2, 4) == 2
    assert True in changed_meanwhile, "the test sees that a step changes them"
    after = model.state_dict()
    assert all(torch.equal(state[name], after[name]) for name in state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name] and bool((parameter.grad == 3).all())
    assert torch.equal(random, torch.get_rng_state())
    assert modes == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize(("steps", "expected"), [(1, [4]), (2, [4, 4]), (8, [4, 4])])
def test_an_accumulated_batch_is_tried_on_top_of_the_gradients_before_it(
    steps: int, expected: list[int], search: Search
) -> None:
    search.config = search.config.model_copy(update={"gradient_accumulation_steps": steps})
    found: list[bool] = []
    search.on_step = lambda: found.append(search.model.clip.logit_scale.grad is not None)
    search(4, 4)
    assert search.tried == expected
    assert found == [False, True][: len(expected)]


def test_the_moments_of_what_learns_are_held_meanwhile(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    held: weakref.WeakSet[Tensor] = weakref.WeakSet()
    empty_like, seen = torch.empty_like, []

    def remembered(*given: Any, **options: Any) -> Tensor:
        tensor = empty_like(*given, **options)
        held.add(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty_like", remembered)
    for name, parameter in search.model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    search.on_step = lambda: seen.append(sum(tensor.numel() for tensor in held))
    search(4, 4)
    learning = sum(parameter.numel() for parameter in search.model.parameters() if parameter.requires_grad)
    assert seen == [2 * learning]
    assert not held


def test_processes_agree_on_the_smallest(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, the other one fits no more than three of its own."""

    def gather(value: str) -> list[str]:
        return [value, "the other is full" if search.tried[-1] > 3 else ""]

    monkeypatch.setattr(memory, "world_size", lambda: 2)
    monkeypatch.setattr(memory, "gather_objects", gather)
    assert search(8, 17) == 4
    assert search.tried == [9, 4, 2], "a share of each: 17 → 8 → 4 together"


def test_on_a_cpu_it_has_no_effect(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert search(0, 64) == 64
    assert not search.tried
    (line,) = search.said
    assert "auto_batch_size is ignored" in line and "CPU" in line
