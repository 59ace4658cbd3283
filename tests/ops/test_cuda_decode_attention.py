"""The CUDA kernel of decode attention, emulated on the CPU: against the reference on odd shapes; bits in any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gear_engine.ops import decode_attention as op
from gear_engine.ops import decode_attention_cuda

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
Run = Callable[..., torch.Tensor]


@pytest.fixture
def run(emulated: Callable[[str], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The ``cuda`` backend; ``splits`` is how many blocks share a head."""
    kernel = emulated("decode_attention")

    def call(*operands: Any, splits: int = 1, **options: Any) -> torch.Tensor:
        monkeypatch.setattr(decode_attention_cuda, "num_splits", lambda device, blocks, chunks: min(splits, chunks))
        found: torch.Tensor = kernel(*operands, **options)
        return found

    return call


class Case:
    """Rows with a random cache, heads padded to 16 bytes, in an order of slots."""

    def __init__(
        self, slots: list[int], positions: list[int], head_dim: int, heads: tuple[int, int], dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None, entries: int = 72,
    ) -> None:  # fmt: skip
        self.n_head, n_kv_head = heads
        self.slots, self.positions = torch.tensor(slots), torch.tensor(positions)
        stored = cache_dtype or dtype
        padded = -(-head_dim * stored.itemsize // 16) * 16 // stored.itemsize
        wide = torch.randn(2, 4, n_kv_head, entries, padded)
        self.scales: dict[str, torch.Tensor] = {}
        if stored == op.FP8:
            cache, scales = op.quantize_entries(wide[..., :head_dim])
            wide = torch.zeros(*wide.shape, dtype=op.FP8)
            wide.view(torch.uint8)[..., :head_dim] = cache.view(torch.uint8)
            self.scales = {"k_scale": scales[0], "v_scale": scales[1]}
        self.stored = wide.to(stored)
        self.head_dim = head_dim
        self.bias = torch.tensor([0.0, 1.3, float("-inf"), 5.7])
        self.qkv = (2 * torch.randn(len(slots), (self.n_head + 2 * n_kv_head) * head_dim)).to(dtype)
        self.rope = torch.randn(entries, head_dim // 2, 2)

    def operands(self) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
        """With copies of the cache, so that both sides write to one of their own."""
        kv = self.stored.clone()[..., : self.head_dim]
        scales = {name: scale.clone() for name, scale in self.scales.items()}
        return (self.qkv, kv[0], kv[1], self.bias, self.slots, self.positions, self.rope, self.n_head), scales


SHAPES = [
    # (slots, positions, head size, (heads, key/value heads))
    ([2, 0], [0, 70], 32, (2, 2)),
    ([1], [62], 64, (1, 1)),
    ([3, 2], [63, 5], 72, (2, 1)),
    ([1, -1, 0], [66, 900, 1], 100, (3, 1)),
    ([0], [64], 128, (1, 1)),
    ([2], [40], 256, (1, 1)),
    ([2], [7], 4, (1, 1)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=[str(shape[2]) for shape in SHAPES])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "fp8"])
def test_matches_the_reference(run: Run, shape: tuple[Any, ...], kind: str) -> None:
    slots, positions, head_dim, heads = shape
    dtype = torch.bfloat16 if kind == "fp8" else getattr(torch, kind)
    case = Case(slots, positions, head_dim, heads, dtype, op.FP8 if kind == "fp8" else None)
    operands, scales = case.operands()
    expected_operands, expected_scales = case.operands()
    if kind != "fp8":
        operands[1][:, :, 0] = float("nan")  # prefix keys are never read
        expected_operands[1][:, :, 0] = 0
    else:
        expected_operands[1].view(torch.uint8)[:, :, 0] = 0
    expected = op.reference(*expected_operands, **expected_scales)
    out = run(*operands, splits=1 + head_dim % 3, **scales)
    assert (out.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * expected.float().abs().max()
    for mine, theirs in zip(operands[1:3], expected_operands[1:3], strict=True):
        a, b = mine[:, :, 1:].float(), theirs[:, :, 1:].float()
        # A rotated number that lies between two roundings may go either way.
        assert (a - b).abs().max() <= {"float32": 1e-6, "fp8": 2.0**-3}.get(kind, 2.0**-7) * b.abs().max()
    for name, scale in scales.items():
        assert torch.allclose(scale.float(), expected_scales[name].float(), rtol=2.0**-7)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, op.FP8])
def test_bits_do_not_depend_on_batch_or_split(run: Run, cache_dtype: torch.dtype) -> None:
    dtype = torch.float32 if cache_dtype == op.FP8 else cache_dtype
    case = Case([3, 0, 1], [140, 70, 3], 20, (2, 1), dtype, cache_dtype, entries=144)
    results = []
    for splits in (1, 2, 3):
        operands, scales = case.operands()
        results.append(run(*operands, splits=splits, **scales))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for row in range(3):
        operands, scales = case.operands()
        qkv, keys, values, bias, slots, positions, *rest = operands
        one = slice(row, row + 1)
        alone = run(qkv[one], keys, values, bias, slots[one], positions[one], *rest, splits=1 + row % 2, **scales)
        assert torch.equal(alone, results[0][one])


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("vector", [0, 2, 3])
def test_numbers_that_are_none_reach_the_output(run: Run, kind: str, vector: int) -> None:
    """One in a query (one of two heads), a key or a value, beside rows that do not notice; in the second chunk too.

    In an fp8 cache the scale of a vector is none then, and all of its numbers with it.
    """
    dtype = torch.float32 if kind == "fp8" else getattr(torch, kind)
    case = Case([1, 0], [3, 70], 32, (2, 1), dtype, op.FP8 if kind == "fp8" else None)
    operands, scales = case.operands()
    operands[0][1, vector * 32 + 5] = float("nan")
    out = run(*operands, splits=2, **scales).view(2, 2, 32).isfinite()
    assert out[0].all()
    noticed = {0: out[1, 0], 2: out[1], 3: out[1] if kind == "fp8" else out[1, :, 5]}[vector]
    assert not noticed.any()
    assert int(out[1].sum()) == out[1].numel() - noticed.numel()
    if kind == "fp8" and vector > 0:
        expected_operands, expected_scales = case.operands()
        expected_operands[0][1, vector * 32 + 5] = float("nan")
        op.reference(*expected_operands, **expected_scales)
        cache, scale = vector - 1, ("k_scale", "v_scale")[vector - 2]
        entry = (0, 0, 71)  # slot, head, entry of position 70
        assert expected_scales[scale][entry].isnan()
        assert scales[scale][entry].isnan()
        stored, expected = (x[cache].view(torch.uint8)[entry] for x in (operands, expected_operands))
        assert torch.equal(stored, expected)


def test_caches_that_are_not_made_of_words_are_refused(run: Run) -> None:
    cache = torch.zeros(2, 1, 8, 100, dtype=torch.bfloat16)
    qkv, index = torch.zeros(1, 300, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="16 bytes"):
        run(qkv, cache, cache.clone(), torch.zeros(2), index, index, torch.zeros(8, 50, 2), 1)
