"""Devices, dtypes and versions, as the command line names them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING

from gear_engine.errors import ConfigError, InvalidRequestError
from gear_engine.runs.world import World

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPE_NAMES", "dtype_of", "parse_backend", "pick_device", "versions"]

DTYPE_NAMES = ("fp32", "bf16", "fp16")


def dtype_of(name: str) -> torch.dtype:
    """``fp32``, ``bf16`` or ``fp16`` as a torch dtype."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import numpy
    import torch

    try:
        own = importlib.metadata.version("gear-engine")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "gear_engine": own,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def pick_device(name: str | None, world: World) -> torch.device:
    """The device of this process: ``name``, or its accelerator, or the CPU.

    ``"cuda"`` without a number is the accelerator of this process's local rank.

    Raises:
        ConfigError: the device is not there.
    """
    import torch

    if name is None:
        wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        name = "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device; say cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = world.local_rank if device.index is None else device.index
        if index >= count:
            raise ConfigError(f"--device cuda:{index} is not there: torch sees {count} CUDA devices")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ConfigError(f"--device {name!r} is not supported; say cpu, cuda or cuda:N")
    return device


def parse_backend(text: str) -> str | dict[str, str]:
    """``NAME``, or ``OP=NAME,OP=NAME`` with ``auto`` for the other ops."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    for op, _, backend in pairs:
        if not (op and backend):
            raise InvalidRequestError(f"--backend {text!r}: say NAME, or OP=NAME,OP=NAME")
    return {op: backend for op, _, backend in pairs}
