"""Prefetching: order, completeness, endings; and what is asked of the streams, on a backend that keeps a record."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from adaclip_finetune.data.dataset import TrainBatch, VideoBatch
from adaclip_finetune.training.prefetch import prefetched

CPU = torch.device("cpu")


class StubDevice:
    """A device named cuda whose tensors are the CPU's; `log` tells what was asked of it, in order."""

    def __init__(self, log: list[str]) -> None:
        self.type, self.log = "cuda", log


class StubStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.copies = name, log, 0

    def record_event(self) -> str:
        self.copies += 1
        self.log.append(f"copied {self.copies}")
        return f"copied {self.copies}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class StubCuda:
    """What prefetching asks of torch.cuda or torch.xpu."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.active = log, "main"

    def Stream(self, device: object) -> StubStream:
        return StubStream("side", self.log)

    def current_stream(self, device: object) -> StubStream:
        return StubStream(self.active, self.log)

    @contextmanager
    def stream(self, stream: StubStream) -> Iterator[None]:
        before, self.active = self.active, stream.name
        yield
        self.active = before


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda, copies to it and record_stream are stubs that write here."""
    events: list[str] = []
    stub = StubCuda(events)

    def to(self: VideoBatch, device: object, non_blocking: bool = False) -> VideoBatch:
        assert non_blocking
        events.append(f"copy of {self.video_ids[0]} on {stub.active}")
        return self._mapped(torch.clone)

    def record_stream(self: Tensor, stream: StubStream) -> None:
        events.append(f"kept for {stream.name}")

    monkeypatch.setattr(torch, "cuda", stub)
    monkeypatch.setattr(VideoBatch, "to", to)
    monkeypatch.setattr(Tensor, "record_stream", record_stream)
    return events


def batch(number: int) -> TrainBatch:
    frames = torch.full((1, 2, 3, 4, 4), number, dtype=torch.uint8)
    videos = VideoBatch(frames, torch.ones(1, 2, dtype=torch.bool), None, torch.zeros(1, 2), [f"video{number}"])
    return TrainBatch(videos, torch.tensor([[number]]), torch.zeros(1, 2))


def numbers(batches: Iterator[TrainBatch]) -> list[int]:
    found = []
    for item in batches:
        assert item.videos.frames[0, 0, 0, 0, :1].tolist() == item.token_ids.flatten().tolist()
        found.append(int(item.token_ids))
    return found


class Source:
    """A generator of batches that tells how many were read and whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.read, self.closed = 0, False
        self._count, self._fails_at = count, fails_at

    def __call__(self) -> Iterator[TrainBatch]:
        try:
            for number in range(self._count):
                if number == self._fails_at:
                    raise OSError("the disk is gone")
                self.read += 1
                yield batch(number)
        finally:
            self.closed = True


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("stubbed", [False, True])
def test_every_batch_comes_once_and_in_order(count: int, stubbed: bool, request: pytest.FixtureRequest) -> None:
    device: Any = StubDevice(request.getfixturevalue("log")) if stubbed else CPU
    assert numbers(prefetched(Source(count)(), device)) == list(range(count))
    assert numbers(prefetched([batch(number) for number in range(count)], device)) == list(range(count))


@pytest.mark.parametrize(("stubbed", "ahead"), [(False, 0), (True, 1)])
def test_at_most_one_batch_is_read_ahead(stubbed: bool, ahead: int, request: pytest.FixtureRequest) -> None:
    device: Any = StubDevice(request.getfixturevalue("log")) if stubbed else CPU
    source = Source(5)
    for number, _ in enumerate(prefetched(source(), device)):
        assert source.read == min(number + 1 + ahead, 5)


@pytest.mark.parametrize("stubbed", [False, True])
def test_errors_pass_through_and_the_source_is_closed(stubbed: bool, request: pytest.FixtureRequest) -> None:
    device: Any = StubDevice(request.getfixturevalue("log")) if stubbed else CPU
    failing = Source(5, fails_at=2)
    with pytest.raises(OSError, match="the disk is gone"):
        numbers(prefetched(failing(), device))
    stopped = Source(5)
    batches = prefetched(stopped(), device)
    next(batches)
    assert not stopped.closed
    batches.close()  # type: ignore[attr-defined]
    assert stopped.closed and stopped.read < 5


def test_the_next_batch_is_copied_beside_and_waited_for_when_its_turn_comes(log: list[str]) -> None:
    device: Any = StubDevice(log)
    for item in prefetched([batch(0), batch(1)], device):
        log.append(f"work on {item.videos.video_ids[0]}")
    assert log == [
        *("copy of video0 on side", "copied 1"),
        *("copy of video1 on side", "copied 2"),
        *("main waits for copied 1", *["kept for main"] * 3, "work on video0"),
        *("main waits for copied 2", *["kept for main"] * 3, "work on video1"),
    ]


def test_token_ids_and_noise_stay_where_they_are(log: list[str]) -> None:
    given = batch(3)
    device: Any = StubDevice(log)
    (copied,) = prefetched([given], device)
    assert copied.token_ids is given.token_ids and copied.noise is given.noise
    assert copied.videos.frames is not given.videos.frames
