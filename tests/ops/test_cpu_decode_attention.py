"""Compiled decode attention: against the reference on odd shapes; equal bits in any batch, slot and thread count."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.ops.decode_attention import decode_attention
from tests.ops.cpu_paths import forced, threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """Rows with caches of their own, one per slot; ``order`` lays them out."""

    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    positions: torch.Tensor
    rope: torch.Tensor
    n_head: int

    @classmethod
    def make(
        cls, rows: int, head_dim: int, n_head: int, n_kv: int, entries: int, dtype: torch.dtype, seed: int
    ) -> Case:
        rng = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=rng)

        keys, values = noise(rows, n_kv, entries, head_dim).to(dtype), noise(rows, n_kv, entries, head_dim).to(dtype)
        keys[:, :, 0] = 0
        bias = torch.tensor([0.0, 1.3, float("-inf"), 5.7])[torch.randint(0, 4, (rows,), generator=rng)]
        positions = torch.randint(0, entries - 1, (rows,), generator=rng)
        qkv = (2 * noise(rows, (n_head + 2 * n_kv) * head_dim)).to(dtype)
        return cls(qkv, keys, values, bias, positions, noise(entries, head_dim // 2, 2), n_head)

    def run(self, order: list[int], slots: list[int], backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output rows, and the keys and values that their slots hold afterwards."""
        num_slots = max(slots) + 1
        caches = []
        for cache in (self.keys, self.values):
            spread = torch.zeros(num_slots, *cache.shape[1:], dtype=cache.dtype)
            spread[slots] = cache[order]
            caches.append(spread)
        bias = torch.zeros(num_slots)
        bias[slots] = self.bias[order]
        out = decode_attention(
            self.qkv[order], *caches, bias, torch.tensor(slots), self.positions[order], self.rope, self.n_head,
            backend=backend,
        )  # fmt: skip
        return out, caches[0][slots], caches[1][slots]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    head_dim=st.one_of(st.sampled_from([16, 32, 64, 72, 100, 128, 256]), st.integers(1, 64).map(lambda i: 4 * i)),
    groups=st.sampled_from([(1, 1), (4, 1), (2, 3), (1, 5)]),
    entries=st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 66, 67, 129, 200])),
    dtype=st.sampled_from(sorted(DTYPES)),
    path=st.sampled_from(["portable", "avx2", "avx512"]),
    seed=st.integers(0, 10**6),
)
def test_matches_the_reference(
    rows: int, head_dim: int, groups: tuple[int, int], entries: int, dtype: str, path: str, seed: int
) -> None:
    case = Case.make(rows, head_dim, groups[0] * groups[1], groups[1], entries, DTYPES[dtype], seed)
    order = list(range(rows))
    expected, expected_keys, expected_values = case.run(order, order, "reference")
    with forced(path):
        out, keys, values = case.run(order, order, "cpu")
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert (out.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()
    assert torch.equal(values, expected_values)
    # A rotated number that lies between two roundings may go either way.
    step = 1e-6 if dtype == "float32" else 2.0**-7
    assert (keys.float() - expected_keys.float()).abs().max() <= step * expected_keys.float().abs().max()


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("head_dim", [64, 100])
def test_bits_do_not_depend_on_batch_slot_or_threads(path: str, dtype: str, head_dim: int) -> None:
    case = Case.make(17, head_dim, 4, 2, 150, DTYPES[dtype], 3)
    with forced(path):
        with threads(1):
            alone = [case.run([row], [0], "cpu") for row in range(17)]
        for count in (1, 2, 5):
            with threads(count):
                for rows in (1, 3, 8, 17):
                    order = torch.randperm(17)[:rows].tolist()
                    slots = torch.randperm(rows + 4)[:rows].tolist()
                    found = case.run(order, slots, "cpu")
                    for part in range(3):
                        assert torch.equal(found[part], torch.cat([alone[row][part] for row in order]))


def test_an_absent_prefix_is_never_read_into_the_sum() -> None:
    case = Case.make(1, 32, 2, 2, 20, torch.float32, 0)
    case.bias[:] = float("-inf")
    expected = case.run([0], [0], "cpu")[0]
    case.values[:, :, 0] = 1e30
    assert torch.equal(case.run([0], [0], "cpu")[0], expected)


@pytest.mark.parametrize("path", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("vector", [0, 2, 3])
def test_numbers_that_are_none_reach_the_output(path: str, dtype: str, vector: int) -> None:
    """One in a query (one of two heads), a key or a value, beside rows that do not notice."""
    case = Case.make(2, 32, 2, 1, 90, DTYPES[dtype], 0)
    case.positions[:] = 70
    case.qkv[1, vector * 32 + 5] = float("nan")
    with forced(path):
        out = case.run([0, 1], [0, 1], "cpu")[0].view(2, 2, 32).isfinite()
    assert out[0].all()
    broken = {0: out[1, 0], 2: out[1], 3: out[1, :, 5]}[vector]
    assert not broken.any()
    assert int(out[1].sum()) == out[1].numel() - broken.numel()


def test_slots_and_positions_are_checked_before_anything_is_written() -> None:
    case = Case.make(2, 16, 1, 1, 10, torch.float32, 0)
    before = case.keys.clone()
    for slots, positions, what in (([0, 2], [1, 1], "slot"), ([0, -2], [1, 1], "slot"), ([0, 1], [1, 9], "position")):
        with pytest.raises(IndexError, match=what):
            decode_attention(
                case.qkv, case.keys, case.values, case.bias, torch.tensor(slots), torch.tensor(positions), case.rope, 1,
                backend="cpu",
            )  # fmt: skip
        assert torch.equal(case.keys, before)
