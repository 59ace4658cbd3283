"""Decode attention over an fp8 cache, by what runs without a GPU: the reference's bytes and numbers, its writes only.

The CUDA kernel's tests are in test_cuda_decode_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_engine.ops import decode_attention as op
from tests.golden_weights import relative_error
from tests.ops.cpu_paths import LEVELS, forced, threads

#: Of outputs; bf16 and fp16 ones are rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass
class Case:
    """Rows and the cache that they write to, with heads padded to 16 bytes as in ``StaticKVCache``."""

    qkv: torch.Tensor
    stored: torch.Tensor  # uint8 (2, slots, kv heads, entries, padded head)
    scales: torch.Tensor  # fp16 (2, slots, kv heads, entries)
    bias: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    rope: torch.Tensor
    n_head: int

    @classmethod
    def make(
        cls, slots: list[int], positions: list[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype
    ) -> Case:
        n_head, n_kv_head = heads
        num_slots, entries = max(slots) + 2, max(positions) + 3
        cache = torch.randn(2, num_slots, n_kv_head, entries, head_dim)
        cache *= torch.logspace(-3, 2, entries)[torch.randperm(entries)][:, None]
        cache[0] *= 0.2
        cache[0, :, :, 0] = 0  # prefix keys
        numbers, scales = op.quantize_entries(cache)
        stored = torch.zeros(*cache.shape[:-1], -(-head_dim // 16) * 16, dtype=torch.uint8)
        stored[..., :head_dim] = numbers.view(torch.uint8)
        qkv = (2 * torch.randn(len(slots), (n_head + 2 * n_kv_head) * head_dim)).to(dtype)
        bias = torch.tensor([0.0, 1.3, float("-inf"), 5.7]).repeat(num_slots)[:num_slots]
        rope = torch.randn(entries, head_dim // 2, 2)
        return cls(qkv, stored, scales, bias, torch.tensor(slots), torch.tensor(positions), rope, n_head)

    @property
    def head_dim(self) -> int:
        return 2 * self.rope.shape[1]

    def rows(self, order: list[int], slots: list[int]) -> Case:
        """The rows ``order``, in other slots."""
        num_slots, entry = max(slots) + 1, self.slots[order]
        stored, scales = (torch.zeros(2, num_slots, *x.shape[2:], dtype=x.dtype) for x in (self.stored, self.scales))
        bias = torch.zeros(num_slots)
        stored[:, slots], scales[:, slots], bias[slots] = self.stored[:, entry], self.scales[:, entry], self.bias[entry]
        where = torch.tensor(slots), self.positions[order]
        return Case(self.qkv[order], stored, scales, bias, *where, self.rope, self.n_head)

    def run(self, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, and copies of the cache and of its scales after the call."""
        stored, scales = self.stored.clone(), self.scales.clone()
        keys, values = stored.view(op.FP8)[..., : self.head_dim]
        out = op.decode_attention(
            self.qkv, keys, values, self.bias, self.slots, self.positions, self.rope, self.n_head,
            k_scale=scales[0], v_scale=scales[1], backend=backend,
        )  # fmt: skip
        return out, stored, scales

    def check(self, backend: str) -> None:
        """Equal bytes and scales everywhere, so the others' entries and the padding too; outputs within rounding."""
        expected, expected_stored, expected_scales = self.run("reference")
        out, stored, scales = self.run(backend)
        assert torch.equal(stored, expected_stored)
        assert torch.equal(scales.view(torch.int16), expected_scales.view(torch.int16))
        assert relative_error(out, expected) <= TOLERANCE[self.qkv.dtype]


SHAPES = [
    # (slots, positions, (heads, key/value heads), head size)
    ([2, 0], [0, 70], (2, 2), 32),
    ([1], [62], (4, 1), 64),
    ([3, 2, 0], [63, 5, 130], (4, 2), 72),
    ([1, 3], [66, 1], (3, 1), 100),
    ([0, 2], [64, 9], (2, 1), 128),
]


def crafted(head_dim: int) -> torch.Tensor:
    """fp32 (rows, head_dim): values whose scale is 1 and that lie on, between and beside e4m3 numbers; then scales that
    are rounded down, up, below fp16's normal numbers, to zero, and to infinity."""
    numbers = torch.arange(127, dtype=torch.uint8).view(op.FP8).float()
    middle = (numbers[1:] + numbers[:-1]) / 2
    around = [x.nextafter(torch.tensor(y)) for x in (numbers, middle) for y in (-1.0, 500.0)]
    tested = torch.cat((numbers, middle, *around))
    tested = torch.cat((tested, -tested)).clamp(-448, 448)
    width = head_dim - 1
    tested = torch.nn.functional.pad(tested, (0, -tested.numel() % width)).view(-1, width)
    rows = [torch.cat((torch.full((len(tested), 1), 448.0), tested), dim=1)]
    tops = torch.tensor(
        [448 * (1 + 2.0**-11.5), 448 * (1 + 3 * 2.0**-11.5), 0.02, 1e-4, 448 * 2.0**-25, 1e-12, 0.0, 3e7]
    )
    rows.append(tops[:, None] * torch.rand(len(tops), head_dim).index_fill(1, torch.tensor(3), 1.0))
    return torch.cat(rows)


def check_crafted_values(backend: str) -> None:
    values = crafted(124)
    rows = len(values)
    case = Case.make(list(range(rows)), [1] * rows, (1, 1), 124, torch.float32)
    case.qkv[:, 2 * 124 :] = values
    _, stored, scales = case.run(backend)
    expected, expected_scales = op.quantize_entries(values)
    assert torch.equal(stored[1, :rows, 0, 2, :124], expected.view(torch.uint8))
    assert len(expected.view(torch.uint8).unique()) == 254, "all numbers and both zeros, and nothing else"
    assert torch.equal(scales[1, :rows, 0, 2], expected_scales)
    assert expected_scales.isinf().any()
    assert ((expected_scales > 0) & (expected_scales < 2.0**-14)).any()


def check_numbers_that_are_none(backend: str) -> None:
    """They reach the output, from which the engine tells; zeros are stored under a scale that is none."""
    case = Case.make([0, 1], [5, 5], (2, 1), 16, torch.float32)
    for vector in (2, 3):  # the key, the value
        broken = Case(**{**vars(case), "qkv": case.qkv.clone()})
        broken.qkv[1, vector * 16 + 3] = float("nan")
        out, stored, scales = broken.run(backend)
        assert bool(out[0].isfinite().all())
        assert not bool(out[1].isfinite().any())
        assert bool(scales[vector - 2, 1, 0, 6].isnan())
        if vector == 3:  # no rotation spreads it
            assert not stored[1, 1, 0, 6].any()


def check_inert_rows(backend: str) -> None:
    case = Case.make([2, -1, 0], [5, 0, 0], (4, 2), 12, torch.float32)
    case.positions[1] = 10**6
    case.qkv[1] = float("nan")
    case.check(backend)
    assert not case.run(backend)[0][1].any()


@pytest.mark.parametrize("path", LEVELS)
class TestCpu:
    @settings(max_examples=40, deadline=None)
    @given(
        rows=st.lists(
            st.one_of(st.integers(0, 40), st.sampled_from([61, 62, 63, 64, 126, 199])), min_size=1, max_size=4
        ),
        head_dim=st.one_of(st.sampled_from([32, 64, 72, 100, 128, 256]), st.integers(1, 64).map(lambda i: 4 * i)),
        groups=st.sampled_from([(1, 1), (4, 1), (2, 3), (1, 5)]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 10**6),
    )
    def test_odd_shapes(
        self, path: str, rows: list[int], head_dim: int, groups: tuple[int, int], dtype: torch.dtype, seed: int
    ) -> None:
        torch.manual_seed(seed)
        case = Case.make(
            torch.randperm(6)[: len(rows)].tolist(), rows, (groups[0] * groups[1], groups[1]), head_dim, dtype
        )
        with forced(path):
            case.check("cpu")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("head_dim", [64, 100])
    def test_bits_do_not_depend_on_batch_slot_or_threads(self, path: str, head_dim: int, dtype: torch.dtype) -> None:
        case = Case.make(list(range(17)), torch.randint(0, 150, (17,)).tolist(), (4, 2), head_dim, dtype)
        with forced(path):
            with threads(1):
                alone = [case.rows([row], [0]).run("cpu") for row in range(17)]
            for count, rows in ((1, 17), (2, 1), (2, 8), (5, 3), (5, 17)):
                order, slots = torch.randperm(17)[:rows].tolist(), torch.randperm(rows + 4)[:rows].tolist()
                with threads(count):
                    out, stored, scales = case.rows(order, slots).run("cpu")
                assert torch.equal(out, torch.cat([alone[row][0] for row in order]))
                assert torch.equal(stored[:, slots], torch.cat([alone[row][1][:, :1] for row in order], dim=1))
                assert torch.equal(scales[:, slots], torch.cat([alone[row][2][:, :1] for row in order], dim=1))

    def test_rounds_as_the_reference(self, path: str) -> None:
        with forced(path):
            check_crafted_values("cpu")

    def test_numbers_that_are_none(self, path: str) -> None:
        with forced(path):
            check_numbers_that_are_none("cpu")

    def test_inert_rows(self, path: str) -> None:
        with forced(path):
            check_inert_rows("cpu")


class TestTriton:
    @pytest.fixture(autouse=True)
    def _triton(self) -> None:
        pytest.importorskip("triton", reason="triton is not installed")

    @pytest.mark.parametrize("dtype", list(TOLERANCE))
    @pytest.mark.parametrize("shape", SHAPES, ids=[str(shape[-1]) for shape in SHAPES])
    def test_has_the_reference_s_bytes_and_numbers(self, shape: Any, dtype: torch.dtype) -> None:
        Case.make(*shape, dtype).check("triton")

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, where infinity is meant
    def test_rounds_as_the_reference(self) -> None:
        check_crafted_values("triton")

    def test_numbers_that_are_none(self) -> None:
        check_numbers_that_are_none("triton")

    def test_inert_rows(self) -> None:
        check_inert_rows("triton")
