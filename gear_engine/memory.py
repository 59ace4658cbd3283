"""Whether a plan fits in memory, decided before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import OutOfMemoryError
from gear_engine.kv_cache import StaticKVCache

__all__ = ["available_bytes", "check_fits", "engine_plan"]

_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None if the system does not say.

    On a CPU: the system's available memory, or what the control group leaves if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator has reserved and does not use can be handed out again.
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    limit, used = _read_number(_CGROUP / "memory.max"), _read_number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        found.append(max(limit - used, 0))
    return min(found, default=None)


def check_fits(plan: Mapping[str, int], available: int | None, hint: str) -> None:
    """Compares a plan (what -> bytes) with what is available.

    Raises:
        OutOfMemoryError: the sum is larger; the message holds the arithmetic and ``hint``.
    """
    total = sum(plan.values())
    if available is None or total <= available:
        return
    sizes = " + ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in plan.items() if size)
    raise OutOfMemoryError(f"{sizes} = {total / _GIB:.2f} GiB, but {available / _GIB:.2f} GiB are available; {hint}")


def engine_plan(
    config: GeneratorConfig, *, num_slots: int, max_tokens: int, dtype: torch.dtype, weight_bytes: int
) -> dict[str, int]:
    """Bytes that an engine allocates.

    Args:
        num_slots: cache slots, two per image.
        max_tokens: image tokens per slot.
        dtype: of weights and cache.
        weight_bytes: weights that are copied because their dtype or device changes; 0 if they are read in place.
    """
    widest = max(config.ffn_dim * 3, config.qkv_dim + config.dim * 3)
    return {
        "weights": weight_bytes,
        "key/value cache": StaticKVCache.nbytes(config, num_slots, max_tokens, dtype),
        # Logits, their filtered copy, its order and the noise of every image; one layer's activations.
        "logits": num_slots * config.vocab_size * 4 * 4,
        "activations": num_slots * widest * dtype.itemsize,
    }
