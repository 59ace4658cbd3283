"""The seam around captured steps: executors, and buffers that are filled while copies are under way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gear_engine.cuda_graph import CaptureCost, EagerLauncher, GraphLauncher, StagingRing, on_device
from gear_engine.engine import Engine
from gear_engine.request import ImageRequest
from tests.models_for_tests import small_model
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


class _Stream:
    """A stream that keeps what it is asked to wait for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: _Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[_Stream]]:
    """(log, streams) of what a launcher asks of torch.cuda; the last stream is the current one."""
    log: list[str] = []
    current = [_Stream("main", log)]

    @contextlib.contextmanager
    def use(stream: _Stream) -> Iterator[None]:
        depth = len(current)
        current.append(stream)
        try:
            yield
        finally:
            del current[depth:]

    class Capture:
        """As torch's: if the capture cannot be ended, the stream stays."""

        def __init__(self, graph: object, *, pool: object, stream: _Stream, capture_error_mode: str) -> None:
            self._stream = stream

        def __enter__(self) -> None:
            current.append(self._stream)

        def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            current.pop()

    for name, replacement in {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda device: _Stream("side", log),
        "current_stream": lambda *which: current[-1],
        "stream": use,
        "graph": Capture,
        "CUDAGraph": lambda: "graph",
        "graph_pool_handle": lambda: None,
        "synchronize": lambda: log.append("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (100 - 10 * log.count("synchronize"), 1000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return log, current


class TestGraphLauncher:
    """What it asks of the CUDA runtime, in order; the captures themselves need a GPU."""

    def test_a_capture(self, runtime: tuple[list[str], list[_Stream]]) -> None:
        log, current = runtime
        ran_on: list[str] = []
        executor = GraphLauncher(torch.device("cuda")).prepare(lambda: ran_on.append(current[-1].name))
        assert ran_on == ["side"] * 3, "two warm-ups and the capture"
        assert log.index("side waits for main") < log.index("main waits for side") < log.index("synchronize")
        assert executor.cost.nbytes == 10
        assert [stream.name for stream in current] == ["main"]

    @pytest.mark.parametrize("failing", [1, 2])
    def test_a_warm_up_that_fails_is_waited_for(self, runtime: tuple[list[str], list[_Stream]], failing: int) -> None:
        """What ran before the failure goes on writing: the current stream must not overtake it."""
        log, current = runtime
        calls = 0

        def step() -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise torch.OutOfMemoryError("full")

        with pytest.raises(torch.OutOfMemoryError):
            GraphLauncher(torch.device("cuda")).prepare(step)
        assert "main waits for side" in log
        assert [stream.name for stream in current] == ["main"]

    def test_a_capture_that_fails_gives_the_stream_back(self, runtime: tuple[list[str], list[_Stream]]) -> None:
        _, current = runtime
        calls = 0

        def step() -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise torch.OutOfMemoryError("full")

        with pytest.raises(RuntimeError, match="previous error during capture"):
            GraphLauncher(torch.device("cuda")).prepare(step)
        assert [stream.name for stream in current] == ["main"]


class TestCurrentDevice:
    """An engine need not be on the current device: what it launches is, and afterwards nothing has changed."""

    def test_of_the_cpu_there_is_none(self) -> None:
        with on_device(CPU):
            pass
        found: Any = on_device(torch.device("cuda", 1))
        assert isinstance(found, torch.cuda.device)
        assert found.idx == 1

    def test_copies_and_their_events(self, monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[str] = []
        entered = _entered(monkeypatch, "gear_engine.cuda_graph.on_device")
        ring = StagingRing(4, CPU, event=lambda: _Event(log))
        monkeypatch.setattr(_Event, "record", lambda self: log.append(f"record on {entered[-1]}"))
        ring.acquire()
        ring.send(torch.zeros(4, dtype=torch.uint8))
        assert log == ["record on cpu"]
        assert entered == []

    def test_every_op_of_an_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entered = _entered(monkeypatch, "gear_engine.engine.on_device")
        engine = Engine(small_model(), max_images=2, execution="eager", backend="reference")
        seen: list[list[torch.device]] = []
        for op in ("skinny_linear", "decode_attention", "sample_tokens"):
            run = getattr(engine.ops, op)
            spy = lambda *a, run=run, **k: (seen.append(list(entered)), run(*a, **k))[1]  # noqa: E731
            object.__setattr__(engine.ops, op, spy)
        engine.warm_up()
        engine.generate([1, 2], max_new_tokens=3, callback=lambda *a: seen.append([CPU, *entered]))
        engine.add_request(ImageRequest(label=1, max_new_tokens=2))
        while engine.num_unfinished:
            engine.step()
        assert len(seen) > 3
        assert all(found == [CPU] for found in seen), "the callback is not inside, ops are"


def _entered(monkeypatch: pytest.MonkeyPatch, where: str) -> list[torch.device]:
    """The devices that are current by the function at ``where``."""
    inside: list[torch.device] = []

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        inside.append(device)
        try:
            yield
        finally:
            inside.pop()

    monkeypatch.setattr(where, enter)
    return inside
