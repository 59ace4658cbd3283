"""Decode attention against attention written out in double precision, over the cache layouts that an engine makes."""

from __future__ import annotations

import math

import pytest
import torch

from gear_engine.config import GeneratorConfig
from gear_engine.errors import GearError
from gear_engine.models.rope import rope_table
from gear_engine.ops import decode_attention as op

BLOCK = 36
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Case:
    """A cache with random contents and one new token per row."""

    def __init__(
        self,
        slots: list[int],
        positions: list[int],
        *,
        n_head: int = 4,
        n_kv_head: int = 4,
        head_dim: int = 8,
        dtype: torch.dtype = torch.float32,
        bias: float = 1.5,
    ) -> None:
        config = GeneratorConfig(
            dim=n_head * head_dim, n_layer=1, n_head=n_head, n_kv_head=n_kv_head, block_size=BLOCK, vocab_size=7
        )
        self.n_head, self.rows = n_head, len(slots)
        kv = torch.randn(2, 7, n_kv_head, 40, head_dim)
        kv[0, :, :, 0] = 0  # prefix keys
        self.kv = kv.to(dtype)
        self.prefix_bias = torch.full((7,), bias)
        self.qkv = torch.randn(self.rows, config.qkv_dim).to(dtype)
        self.slots, self.positions = torch.tensor(slots), torch.tensor(positions)
        self.rope = rope_table(config)

    def run(self, backend: str = "reference", **hints: int) -> torch.Tensor:
        return op.decode_attention(
            self.qkv,
            self.kv[0],
            self.kv[1],
            self.prefix_bias,
            self.slots,
            self.positions,
            self.rope,
            self.n_head,
            backend=backend,
            **hints,  # type: ignore[arg-type]
        )

    def expected(self) -> torch.Tensor:
        """Row by row, head by head, with complex rotations."""
        _, _, n_kv, _, width = self.kv.shape
        out = torch.zeros(self.rows, self.n_head, width, dtype=torch.float64)
        turns = torch.view_as_complex(self.rope.double().contiguous())
        for row in range(self.rows):
            slot, t = int(self.slots[row]), int(self.positions[row])
            heads = self.qkv[row].double().view(-1, width)
            turned = torch.view_as_real(torch.view_as_complex(heads.reshape(len(heads), -1, 2)) * turns[t])
            turned = turned.flatten(1).to(self.qkv.dtype).double()
            for h in range(self.n_head):
                g = h // (self.n_head // n_kv)
                keys, values = self.kv[0, slot, g, : t + 2].double(), self.kv[1, slot, g, : t + 2].double()
                keys[t + 1], values[t + 1] = turned[self.n_head + g], heads[self.n_head + n_kv + g]
                scores = keys @ turned[h] / math.sqrt(width)
                scores[0] += self.prefix_bias[slot]
                out[row, h] = scores.softmax(0) @ values
        return out.flatten(1)


CASES = {
    "one row, first token": ([0], [0]),
    "lockstep": ([0, 1, 2], [11, 11, 11]),
    "lockstep, later slots": ([3, 4, 5, 6], [35, 35, 35, 35]),
    "consecutive slots, own positions": ([1, 2, 3], [0, 7, 35]),
    "scattered": ([5, 0, 3], [4, 4, 20]),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", CASES)
def test_matches_double_precision(name: str, dtype: torch.dtype) -> None:
    case = Case(*CASES[name], dtype=dtype)
    expected = case.expected()
    assert (case.run().double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(("n_head", "n_kv_head", "head_dim"), [(4, 2, 8), (6, 1, 72), (3, 3, 100), (1, 1, 4)])
@pytest.mark.parametrize("name", ["lockstep", "scattered"])
def test_head_layouts(name: str, n_head: int, n_kv_head: int, head_dim: int) -> None:
    case = Case(*CASES[name], n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim)
    expected = case.expected()
    assert (case.run().double() - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_without_a_prefix(name: str) -> None:
    case = Case(*CASES[name], bias=-math.inf)
    expected = case.expected()
    assert (case.run().double() - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["lockstep", "scattered"])
def test_writes_its_own_entry_only(name: str) -> None:
    case = Case(*CASES[name])
    before = case.kv.clone()
    case.run()
    written = torch.zeros_like(before, dtype=torch.bool)
    written[:, case.slots, :, case.positions + 1] = True
    assert torch.equal(case.kv[~written], before[~written])
    assert not torch.equal(case.kv[written], before[written])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("slots", [[5, -1, 3], [-1, 0, 1], [-1, -1, -1]])
def test_inert_rows_take_no_part(slots: list[int], backend: str) -> None:
    """Zeros out, nothing written, whatever their position and input are; the other rows do not notice."""
    case = Case(slots, [4, 7, 20])
    case.positions[[slot < 0 for slot in slots]] = 10**9
    case.qkv[[slot < 0 for slot in slots]] = math.nan
    before = case.kv.clone()
    out = case.run(backend)
    live = [row for row, slot in enumerate(slots) if slot >= 0]
    written = torch.zeros_like(before, dtype=torch.bool)
    if live:
        others = Case([slots[row] for row in live], [int(case.positions[row]) for row in live])
        others.kv, others.qkv = before.clone(), case.qkv[live]
        assert torch.equal(others.run(backend), out[live])
        written[:, others.slots, :, others.positions + 1] = True
    assert torch.equal(case.kv[~written], before[~written])
    assert not out[[row for row in range(3) if row not in live]].any()


def test_hints_change_nothing() -> None:
    case = Case(*CASES["lockstep"])
    assert torch.equal(case.run(first_slot=0, position=11), case.run())


def test_stale_entries_are_not_seen() -> None:
    case = Case(*CASES["consecutive slots, own positions"])
    out = case.run()
    for row, (slot, t) in enumerate(zip(*CASES["consecutive slots, own positions"], strict=True)):
        case.kv[:, slot, :, t + 2 :] = 1e4
        assert torch.equal(case.run()[row], out[row])


def test_lockstep_does_not_copy_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(*CASES["lockstep"])
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        seen.extend((key, value))
        return attend(query, key, value, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(op.F, "scaled_dot_product_attention", spy)
    case.run()
    assert [tensor.untyped_storage().data_ptr() for tensor in seen] == [case.kv.untyped_storage().data_ptr()] * 2


def test_prefix_entry_stands_for_many_equal_keys() -> None:
    """Entry 0 with logit log n and the mean value = n keys of zero with their own values."""
    case = Case([2], [3], n_head=1, n_kv_head=1, bias=math.log(5))
    values = torch.randn(5, 8, dtype=torch.float64)
    case.kv[1, 2, 0, 0] = values.mean(0)
    out = case.run().double()
    keys = torch.cat((torch.zeros(5, 8, dtype=torch.float64), case.kv[0, 2, 0, 1:5].double()))
    every = torch.cat((values, case.kv[1, 2, 0, 1:5].double()))
    q = op.rotate(case.qkv[:, :8].view(1, 1, 8), case.rope[3])[0, 0].double()
    expected = (keys @ q / math.sqrt(8)).softmax(0) @ every
    assert (out[0] - expected).abs().max() < 1e-6


class TestFp8:
    def test_numbers(self) -> None:
        """Within half a step of e4m3 of the row's scale; the largest number is exact to fp16's rounding."""
        x = torch.randn(40, 3, 20) * torch.logspace(-6, 5, 40)[:, None, None]
        x[0, 0] = 0
        stored, scales = op.quantize_entries(x)
        assert (stored.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float16)
        assert bool(torch.isfinite(stored.float()).all())
        back = op.dequantize_entries(stored, scales)
        top = x.abs().amax(-1, keepdim=True)
        normal = top[..., 0] > 448 * 2**-14  # below, fp16 scales lose bits
        assert ((back - x).abs() <= x.abs() / 16 * 1.001 + top * 2**-18)[normal].all()
        assert ((back - x).abs() <= top)[~normal].all()
        assert not back[0, 0].any()

    def test_tiny_numbers_become_zero_and_not_nan(self) -> None:
        back = op.dequantize_entries(*op.quantize_entries(torch.full((2, 8), 1e-12)))
        assert not back.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", CASES)
    def test_attends_to_what_is_stored(self, name: str, dtype: torch.dtype) -> None:
        """As over a cache in fp32 that holds the dequantized numbers, its own entry included."""
        case = Case(*CASES[name], dtype=dtype, n_head=4, n_kv_head=2, head_dim=12)
        stored, scales = op.quantize_entries(case.kv)
        args = (case.prefix_bias, case.slots, case.positions, case.rope, case.n_head)
        before, before_scales = stored.clone(), scales.clone()
        out = op.decode_attention(case.qkv, stored[0], stored[1], *args, k_scale=scales[0], v_scale=scales[1])
        where = (slice(None), case.slots, slice(None), case.positions + 1)
        kept = torch.ones(scales.shape, dtype=torch.bool)
        kept[where] = False
        assert torch.equal(stored.view(torch.uint8)[kept], before.view(torch.uint8)[kept])
        assert torch.equal(scales[kept], before_scales[kept])
        # Keys are rotated, and rounded to qkv's dtype, before they are stored.
        heads = case.qkv.view(case.rows, -1, 12)
        new_k = op.rotate(heads[:, 4:6], case.rope[case.positions])
        expected_new = torch.stack((new_k, heads[:, 6:8]))  # [2, R, G, D]
        expected_stored, expected_scales = op.quantize_entries(expected_new)
        # (kv, slots, :, positions) puts the indexed dimensions first: [R, 2, G, D].
        assert torch.equal(stored.view(torch.uint8)[where].transpose(0, 1), expected_stored.view(torch.uint8))
        assert torch.equal(scales[where].transpose(0, 1), expected_scales)
        exact = op.dequantize_entries(stored, scales)
        q = op.rotate(heads[:, :4], case.rope[case.positions]).double()
        for row, (slot, t) in enumerate(zip(case.slots.tolist(), case.positions.tolist(), strict=True)):
            for h in range(4):
                keys, values = exact[0, slot, h // 2, : t + 2].double(), exact[1, slot, h // 2, : t + 2].double()
                scores = keys @ q[row, h] / math.sqrt(12)
                scores[0] += case.prefix_bias[slot]
                wanted = scores.softmax(0) @ values
                found = out[row].view(4, 12)[h].double()
                assert (found - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()

    def test_scales_go_with_the_cache(self) -> None:
        case = Case([0], [0])
        stored, scales = op.quantize_entries(case.kv)
        args = (case.prefix_bias, case.slots, case.positions, case.rope, 4)
        with pytest.raises(ValueError, match="fp16"):
            op.decode_attention(case.qkv, stored[0], stored[1], *args)
        with pytest.raises(ValueError, match="fp8 cache"):
            op.decode_attention(case.qkv, case.kv[0], case.kv[1], *args, k_scale=scales[0], v_scale=scales[1])
        spread = torch.zeros(*scales.shape, 2, dtype=torch.float16)[..., 0]
        with pytest.raises(ValueError, match="contiguous"):
            op.decode_attention(case.qkv, stored[0], stored[1], *args, k_scale=spread[0], v_scale=spread[1])
        with pytest.raises(GearError, match=r"decode_attention.*not float16"):
            op.decode_attention(
                case.qkv.half(), stored[0], stored[1], *args, k_scale=scales[0], v_scale=scales[1], backend="cpu"
            )


def test_bad_shapes() -> None:
    case = Case([0], [0])
    case.qkv = case.qkv[:, 1:]
    with pytest.raises(ValueError, match="heads"):
        case.run()
    case = Case([0], [0])
    case.slots = case.slots.to(torch.int32)
    with pytest.raises(ValueError, match="int64"):
        case.run()
    with pytest.raises(GearError, match="nosuch"):
        Case([0], [0]).run("nosuch")
