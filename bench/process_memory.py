"""Resident memory of a process, and measuring in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["in_new_process", "reset_peak", "resident"]


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Lowers ``VmHWM`` to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def in_new_process(module: str, *arguments: str) -> Any:
    """What ``python -m module arguments`` prints, one JSON value.

    Raises:
        RuntimeError: the process failed; the message is the end of its output.
    """
    command = [sys.executable, "-m", module, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise RuntimeError(f"measuring memory failed: {child.stderr[-2000:]}")
    return json.loads(child.stdout)
