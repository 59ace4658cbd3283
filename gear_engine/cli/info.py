"""``gear-engine info``: version, build, devices, and which backend each op takes here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gear_engine.cli.environment import DTYPE_NAMES

if TYPE_CHECKING:
    import torch

__all__ = ["add_parser", "run"]


def add_parser(subparsers: Any) -> None:
    """Adds ``info`` to the command line."""
    parser = subparsers.add_parser("info", help="show version, build, devices and backends")
    parser.add_argument("--dtype", default="fp32", choices=DTYPE_NAMES, help="dtype that the backend table is for")


def run(args: argparse.Namespace) -> int:
    """Prints what is installed and what it will use."""
    import torch

    from gear_engine.cli.environment import dtype_of, versions
    from gear_engine.ops.native import module, unavailable

    for name, value in versions().items():
        print(f"{name:<14} {value}")
    reason = unavailable("build_info")
    if reason is None:
        for name, value in module().build_info().items():
            print(f"{'build ' + name:<14} {value}")
        print(f"{'cpu isa':<14} {module().cpu_isa()} (best here: {module().best_cpu_isa()})")
    else:
        print(f"{'build':<14} none: {reason}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        print(f"{'device ' + str(device):<14} {_describe(device)}")
    kinds = {device.type: device for device in devices}
    for device in kinds.values():
        _print_backends(device, dtype_of(args.dtype), args.dtype)
    return 0


def _describe(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        return f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"
    return f"{torch.get_num_threads()} threads"


def _print_backends(device: torch.device, dtype: torch.dtype, name: str) -> None:
    import gear_engine.ops  # noqa: F401  (fills the registry)
    from gear_engine.ops import backends

    print(f"\nBackends on {device.type} for {name}:")
    rows = backends.table(device, dtype)
    for op, backend, status in rows:
        print(f"  {op:<20} {backend:<10} {status}")
    if not rows:
        print("  none")
