"""What a report says about the machine and the software: facts without names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from gear_engine.errors import BackendUnavailableError
from gear_engine.ops import native

__all__ = ["commit", "cpu_facts", "device_facts", "versions"]

#: Of a CPU's flags, those that decide how fast these kernels can be.
_INSTRUCTION_SETS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimddp", "asimdhp", "sve", "bf16", "i8mm",
)  # fmt: skip
_LIBRARIES = ("numpy", "triton", "faiss-cpu", "faiss-gpu")


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _caches() -> dict[str, int]:
    """Cache sizes of CPU 0 by level, such as ``{"L1d": 49152}``, as the system tells."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind = (folder / "level").read_text().strip(), (folder / "type").read_text().strip()
            number = re.fullmatch(r"(\d+)([KMG]?)", (folder / "size").read_text().strip())
        except OSError:
            continue
        if number is not None:
            letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
            sizes[f"L{level}{letter}"] = int(number[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[number[2]]
    return sizes


def cpu_facts(threads: int) -> dict[str, Any]:
    """Model, instruction sets, cores, memory, caches; ``threads`` is what the run uses."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    try:
        isa: str | None = native.module().cpu_isa()
    except BackendUnavailableError:
        isa = None
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "isa": isa,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "caches": _caches(),
        "mhz": float(info["cpu MHz"]) if "cpu MHz" in info else None,
        "virtual": "hypervisor" in flags,
    }


def _gpu_facts(index: int) -> dict[str, Any]:
    """What torch and the driver's management library say of a GPU; fields that it does not offer are None."""
    from gear_engine.report import nvml

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": getattr(properties, "L2_cache_size", None),
        **nvml.facts(index),
    }


def device_facts(device: torch.device, threads: int) -> dict[str, Any]:
    """The ``device`` part of a report."""
    cpu = cpu_facts(threads)
    if device.type != "cuda":
        name = f"{cpu['model']}, {cpu['cores']} core{'s' if cpu['cores'] > 1 else ''}"
        return {"kind": "cpu", "name": name, "cpu": cpu, "gpu": None}
    gpu = _gpu_facts(device.index or 0)
    return {"kind": "cuda", "name": gpu["name"], "cpu": cpu, "gpu": gpu}


def versions() -> dict[str, str]:
    """Versions of everything that a timing may depend on."""
    found = {
        "gear_engine": importlib.metadata.version("gear-engine"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "linux": platform.release().split("-")[0],
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        build = native.module().build_info()
    except BackendUnavailableError:
        return found
    if "compiler" in build:
        found["compiler"] = str(build["compiler"])
    return found


def commit() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from and whether tracked files differ; None outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        if "gear_engine/report/facts.py" not in git("ls-files", "--full-name", "facts.py"):
            return None
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
