"""The seam around captured steps: executors, and buffers that are filled while copies are under way."""

from __future__ import annotations

import torch

from gear_engine.cuda_graph import CaptureCost, EagerLauncher, StagingRing
from tests.test_architecture import ROOT

CPU = torch.device("cpu")


class _Event:
    """Says when it is waited for."""

    made = 0

    def __init__(self, log: list[str]) -> None:
        self.name, self.log = f"event {_Event.made}", log
        _Event.made += 1

    def record(self) -> None:
        self.log.append(f"record {self.name}")

    def synchronize(self) -> None:
        self.log.append(f"wait {self.name}")


def test_a_buffer_is_filled_again_only_when_its_copy_is_done() -> None:
    log: list[str] = []
    _Event.made = 0
    ring, target = StagingRing(4, CPU, depth=2, event=lambda: _Event(log)), torch.zeros(4, dtype=torch.uint8)
    for value in range(5):
        number = ring.acquire()
        assert number == value % 2
        ring.buffers[number].fill_(value)
        ring.send(target)
        assert target.tolist() == [value] * 4
    assert log == [
        *("record event 0", "record event 1"),
        *("wait event 0", "record event 0", "wait event 1", "record event 1", "wait event 0", "record event 0"),
    ]


def test_without_events_copies_are_done_when_they_return() -> None:
    ring = StagingRing(2, CPU, depth=1)
    for value in (1, 2):
        ring.buffers[ring.acquire()].fill_(value)
        target = torch.zeros(2, dtype=torch.uint8)
        ring.send(target)
        assert target.tolist() == [value, value]


def test_an_eager_executor_calls_the_step() -> None:
    calls: list[int] = []
    executor = EagerLauncher().prepare(lambda: calls.append(1))
    assert not calls
    executor.run()
    executor.run()
    assert len(calls) == 2
    assert executor.cost == CaptureCost(0.0, 0)
    assert CaptureCost(1.5, 10) + CaptureCost(0.5, 5) == CaptureCost(2.0, 15)


def test_only_one_file_knows_about_graphs() -> None:
    found = [path.name for path in (ROOT / "gear_engine").rglob("*.py") if "torch.cuda.graph" in path.read_text()]
    assert found == ["cuda_graph.py"]
