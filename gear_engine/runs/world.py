"""The processes of one run, as ``torchrun`` and ``accelerate launch`` describe them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from gear_engine.errors import ConfigError, GearError, WorkerLostError

__all__ = ["World", "detect_world"]

T = TypeVar("T")

#: How long a process waits for the others to start.
_START = timedelta(minutes=10)
#: How long a process waits for the others to finish their share. One that dies is noticed at once.
_FINISH = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """This process among ``size`` processes.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its machine: the index of its accelerator.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def join(self) -> None:
        """Meets the other processes.

        Raises:
            WorkerLostError: they did not all come.
        """
        if self.size > 1:
            import torch.distributed as dist

            self._guarded(lambda: dist.init_process_group("gloo", timeout=_START))

    def leave(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def wait(self) -> None:
        """Returns when every process has come here.

        Raises:
            WorkerLostError: one of them ended before.
        """
        if self.size > 1:
            import torch.distributed as dist

            self._guarded(lambda: dist.monitored_barrier(timeout=_FINISH))

    def share(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns on rank 0, on every rank; an error of ours is raised on every rank too."""
        if self.size == 1:
            return compute()
        import torch.distributed as dist

        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = compute()
            except GearError as error:
                box[1] = error
        self._guarded(lambda: dist.broadcast_object_list(box, src=0))
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def _guarded(self, communicate: Callable[[], object]) -> None:
        try:
            communicate()
        except RuntimeError as error:
            raise WorkerLostError(
                f"process {self.rank} of {self.size} lost another process of the run. "
                "What is finished is kept: run the same command again to go on"
            ) from error


def detect_world(environ: Mapping[str, str] = os.environ) -> World:
    """Reads RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process.

    Raises:
        ConfigError: they contradict each other, or there is no address at which the processes can meet.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, size, local_rank = (int(environ.get(n, d)) for n, d in zip(names, ("0", "1", "0"), strict=True))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be integers: {error}") from None
    if not (0 <= rank < size and local_rank >= 0):
        raise ConfigError(f"RANK {rank}, WORLD_SIZE {size} and LOCAL_RANK {local_rank} contradict each other")
    if size > 1 and not ("MASTER_ADDR" in environ and "MASTER_PORT" in environ):
        raise ConfigError("WORLD_SIZE is above 1 but MASTER_ADDR is not set; start with torchrun or accelerate launch")
    return World(rank, size, local_rank)
