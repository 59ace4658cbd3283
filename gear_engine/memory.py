"""Whether a plan fits in memory, decided before anything is allocated."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gear_engine.config import GeneratorConfig, TokenizerConfig
from gear_engine.errors import GearError, OutOfMemoryError
from gear_engine.kv_cache import StaticKVCache
from gear_engine.ops.decode_attention import FP8
from gear_engine.segments import buckets

__all__ = [
    "available_bytes", "check_engine_fits", "check_fits", "decoder_bytes", "engine_plan", "images_that_fit",
    "out_of_memory_is_typed",
]  # fmt: skip

#: Device memory per kernel of a captured graph: an estimate, until graphs have been captured on hardware.
_GRAPH_NODE_BYTES = 16 << 10
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _cached_files(path: Path, names: tuple[str, ...]) -> int:
    """Bytes of file cache, by a ``memory.stat``: what was just read counts as used until memory is short."""
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
        return sum(int(fields.get(name, 0)) for name in names)
    except (OSError, ValueError):
        return 0


def _group_bytes() -> list[int]:
    """What each control group above this process leaves, versions 2 and 1; a job scheduler's limit may be far up."""
    try:
        lines = [line.split(":", 2) for line in _OWN_GROUP.read_text().splitlines()]
    except OSError:
        lines = []
    found = []
    kinds = (
        ("", _CGROUP, "memory.max", "memory.current", ("active_file", "inactive_file")),
        (
            "memory",
            _CGROUP / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"),
        ),
    )
    for controller, root, limit_file, used_file, cached in kinds:
        own = next((parts[2] for parts in lines if len(parts) == 3 and controller in parts[1].split(",")), "/")
        group = root / own.strip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            limit, used = _read_number(folder / limit_file), _read_number(folder / used_file)
            if limit is not None and used is not None:
                found.append(max(limit - used + _cached_files(folder / "memory.stat", cached), 0))
    return found


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None if the system does not say.

    On a CPU: the system's available memory, or what a control group leaves if that is less; file cache counts as free.
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
    return min(found + _group_bytes(), default=None)


#: What errors say that have no type of their own: the CUDA runtime's (from graphs, and from our kernels), those of its
#: libraries (CUBLAS_STATUS_ALLOC_FAILED), and that of torch's allocator for the CPU.
_SAYS_OUT_OF_MEMORY = re.compile(r"out of memory|alloc_failed|not enough memory|can't allocate memory", re.IGNORECASE)


def _out_of_memory_in(error: BaseException | None, before: BaseException | None) -> BaseException | None:
    """``error``, or what it was raised in the wake of, if that says that memory ran out: ending a capture that failed
    for lack of memory raises an error of its own. Not ``before``, which others are dealing with."""
    while error is not None and error is not before:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _SAYS_OUT_OF_MEMORY.search(str(error)):
            return error
        error = error.__context__
    return None


@contextmanager
def out_of_memory_is_typed(hint: str) -> Iterator[None]:
    """Turns errors for memory that is not there, torch's, CUDA's and the C++ library's, into
    :class:`gear_engine.errors.OutOfMemoryError`.

    What the work held in its variables is let go of, so that who catches the error has that memory again.
    """
    before = sys.exception()
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        cause = _out_of_memory_in(error, before)
        if cause is None or isinstance(error, GearError):
            raise
        for each in (cause, error):
            traceback.clear_frames(each.__traceback__)
        message = str(cause).split("\n")[0]
        raise OutOfMemoryError(f"the device ran out of memory ({message}); {hint}") from None


def check_fits(plan: Mapping[str, int], available: int | None, hint: str | Callable[[], str]) -> None:
    """Compares a plan (what -> bytes) with what is available.

    Raises:
        OutOfMemoryError: the sum is larger; the message holds the arithmetic and ``hint``.
    """
    total = sum(plan.values())
    if available is None or total <= available:
        return
    sizes = " + ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in plan.items() if size)
    advice = hint if isinstance(hint, str) else hint()
    raise OutOfMemoryError(f"{sizes} = {total / _GIB:.2f} GiB, but {available / _GIB:.2f} GiB are available; {advice}")


def engine_plan(
    config: GeneratorConfig,
    *,
    num_slots: int,
    max_tokens: int,
    dtype: torch.dtype,
    weight_bytes: int,
    cache_dtype: torch.dtype | None = None,
    graphs: bool = False,
) -> dict[str, int]:
    """Bytes that an engine allocates.

    Args:
        num_slots: cache slots, two per image.
        max_tokens: image tokens per slot.
        dtype: of weights and activations.
        cache_dtype: of keys and values; None means ``dtype``.
        weight_bytes: weights that are copied because their dtype or device changes; 0 if they are read in place.
        graphs: decode steps are captured: their logits and activations have a pool of memory to themselves.
    """
    cache_dtype = cache_dtype or dtype
    widest = max(config.ffn_dim * 3, config.qkv_dim + config.dim * 3)
    # The reference multiplies fp8 entries by their scales in fp32.
    gathered = (torch.float32 if cache_dtype == FP8 else dtype).itemsize
    plan = {
        "weights": weight_bytes,
        "key/value cache": StaticKVCache.nbytes(config, num_slots, max_tokens, cache_dtype),
        # Logits, their filtered copy, its order and the noise of every image; one layer's activations.
        "logits": num_slots * config.vocab_size * 4 * 4,
        # One layer's keys and values where rows of scattered slots are gathered, and their scores.
        "activations": num_slots * (widest * dtype.itemsize + (1 + max_tokens) * 2 * config.kv_dim * gathered)
        + num_slots * config.n_head * (1 + max_tokens) * 4,
    }
    if graphs:
        # Buckets share the pool, so the largest one decides; every graph has its kernels: up to seven a layer (four
        # linear layers, two norms of their own, attention) and the rest. Images of classes start by graphs of their
        # own.
        nodes = 7 * config.n_layer + 24
        if config.conditioning == "class":
            nodes += 7 * config.n_layer + 48
        nodes *= len(buckets(num_slots))
        plan["captured graphs"] = plan["logits"] + plan["activations"] + nodes * _GRAPH_NODE_BYTES
    return plan


def check_engine_fits(config: GeneratorConfig, available: int | None, max_images: int, **plan: Any) -> None:
    """Raises :class:`OutOfMemoryError`, with the arithmetic and the number of images that would fit, unless an engine
    does; ``plan``: arguments of :func:`engine_plan`."""

    def hint() -> str:
        fit = images_that_fit(config, available or 0, **plan)
        return f"{fit} images at a time fit, max_images is {max_images}; or choose a smaller dtype"

    check_fits(engine_plan(config, num_slots=2 * max_images, **plan), available, hint)


def images_that_fit(
    config: GeneratorConfig,
    budget: int,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
    weight_bytes: int = 0,
    graphs: bool = False,
    tokenizer: TokenizerConfig | None = None,
    decode_batch: int = 1,
) -> int:
    """How many images an engine can have in flight (``max_images``) within ``budget`` bytes; 0 if not even one.

    Args:
        config: the generator; its ``block_size`` is the resolution.
        dtype, cache_dtype, weight_bytes, graphs: see :func:`engine_plan`.
        max_tokens: image tokens per image; None means ``block_size``.
        tokenizer: leaves room for decoding ``decode_batch`` images at once, in fp32, while the caches are held.
    """
    tokens = config.block_size if max_tokens is None else max_tokens

    def needed(images: int) -> int:
        total = 0
        if tokenizer is not None:
            size = config.grid_size * tokenizer.downsample
            total += decoder_bytes(tokenizer, size, size, min(decode_batch, images), torch.float32)
        plan = engine_plan(
            config,
            num_slots=2 * images,
            max_tokens=tokens,
            dtype=dtype,
            weight_bytes=weight_bytes,
            cache_dtype=cache_dtype,
            graphs=graphs,
        )
        return total + sum(plan.values())

    fits, too_many = 0, 1
    while needed(too_many) <= budget:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if needed(middle) <= budget else (fits, middle)
    return fits


def decoder_bytes(config: TokenizerConfig, height: int, width: int, images: int, dtype: torch.dtype) -> int:
    """Bytes that decoding ``images`` images at once takes, beside the weights.

    The largest maps are the full-size ones of the first level. Five to seven of them live at once in its residual
    blocks (block input, norm, convolution, and what the convolution packs): measured on VQ-16 and LFQ-16. The system's
    allocator has been seen to keep almost one more. Small images take less than the weights that a CPU converts: the
    spectra of the widest convolution (16 numbers for each of its products) and what is kept of others (less than 48).
    """
    maps = 8 * config.ch * config.ch_mult[0] * height * width * images
    return (maps + 64 * (config.ch * max(config.ch_mult)) ** 2) * dtype.itemsize
