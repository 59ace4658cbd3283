"""Capture a step once, replay it often. The one file that knows about CUDA graphs.

What runs is a *step*: a function of no arguments over buffers that stay where they are. A :class:`Launcher` turns it
into an :class:`Executor`. :class:`EagerLauncher` calls the function, on any device; :class:`GraphLauncher` captures
what it launches and replays that with one call. Both give the same numbers: the function is the same.

A step that can be captured neither reads device numbers on the host nor allocates what a later step needs; its inputs
change by copies into its buffers (:class:`StagingRing`), in stream order.

``GraphLauncher`` has not been run on hardware yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["CaptureCost", "EagerLauncher", "Executor", "GraphLauncher", "Launcher", "StagingRing", "on_device"]

Step = Callable[[], None]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes ``device`` the current one if it is a CUDA device: events, and launches that name no stream, go there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class CaptureCost:
    """What it cost to prepare a step: seconds, and bytes of device memory that stay taken."""

    seconds: float = 0.0
    nbytes: int = 0

    def __add__(self, other: CaptureCost) -> CaptureCost:
        return CaptureCost(self.seconds + other.seconds, self.nbytes + other.nbytes)


class Executor(Protocol):
    """A prepared step."""

    cost: CaptureCost

    def run(self) -> None:
        """Runs the step once; returns when it is launched, which may be before it is done."""
        ...


class Launcher(Protocol):
    """Prepares steps.

    Attributes:
        warmups: how often :meth:`prepare` runs the step for real before it captures.
    """

    warmups: int

    def prepare(self, step: Step) -> Executor: ...


class _Eager:
    def __init__(self, step: Step) -> None:
        self._step = step
        self.cost = CaptureCost()

    def run(self) -> None:
        self._step()


class EagerLauncher:
    """Calls the step itself."""

    warmups = 0

    def prepare(self, step: Step) -> Executor:
        return _Eager(step)


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, cost: CaptureCost) -> None:
        # The step is not kept: what it refers to, such as weights, may be let go of.
        self._graph = graph
        self.cost = cost

    def run(self) -> None:
        self._graph.replay()


class GraphLauncher:
    """Captures steps into CUDA graphs that share one pool of memory: they never run at the same time.

    Args:
        device: a CUDA device.
    """

    #: Triton compiles, and libraries allocate their workspaces, at a first call; none of that can be captured.
    warmups = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def prepare(self, step: Step) -> Executor:
        begin = time.perf_counter()
        with on_device(self._device), torch.cuda.stream(torch.cuda.current_stream()):
            # The outer context: a capture that fails in its end would leave its own stream current.
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(self.warmups):
                        step()
            finally:
                # After an exception too: what follows reads and reuses what the steps that were launched write.
                current.wait_stream(self._stream)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before, _ = torch.cuda.mem_get_info()
            graph = torch.cuda.CUDAGraph()
            # Other threads (a decoder's, a data loader's) may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
            torch.cuda.synchronize()
            after, _ = torch.cuda.mem_get_info()
        return _Graph(graph, CaptureCost(time.perf_counter() - begin, max(before - after, 0)))


class _Event(Protocol):
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def _new_event() -> _Event:
    event: _Event = torch.cuda.Event()
    return event


class StagingRing:
    """Host buffers of which one is filled while copies of the others may still be under way.

    On CUDA the buffers are pinned, and an event behind each copy says when its buffer is free again: the host waits
    only if it is ``depth`` updates ahead of the device.

    Args:
        nbytes: size of every buffer.
        device: where copies go.
        depth: number of buffers.
        event: makes an event on the current stream; None: CUDA's on CUDA, otherwise copies are done when they return.
    """

    def __init__(
        self, nbytes: int, device: torch.device, depth: int = 4, event: Callable[[], _Event] | None = None
    ) -> None:
        pinned = device.type == "cuda"
        self.buffers = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(depth)]
        self._new_event = event or (_new_event if pinned else None)
        self._events: list[_Event | None] = [None] * depth
        self._next = 0

    def acquire(self) -> int:
        """The number of the next buffer, once its last copy is done."""
        event = self._events[self._next]
        if event is not None:
            event.synchronize()
        return self._next

    def send(self, target: torch.Tensor) -> None:
        """Copies the buffer acquired last to ``target``, in stream order."""
        # An event belongs to the current device's stream, a copy to the one of its target's.
        with on_device(target.device):
            target.copy_(self.buffers[self._next], non_blocking=True)
            if self._new_event is not None:
                event = self._events[self._next] or self._new_event()
                event.record()
                self._events[self._next] = event
        self._next = (self._next + 1) % len(self.buffers)
