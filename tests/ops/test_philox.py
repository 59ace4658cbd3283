"""Philox words against the published vectors, and the exponential variate against double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gear_engine.ops import philox


def _words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    words = philox.philox4x32(
        tuple(torch.tensor(c) for c in counter),  # type: ignore[arg-type]
        tuple(torch.tensor(k) for k in key),  # type: ignore[arg-type]
    )
    return [int(word) for word in words]


# Known answers that Random123 (Salmon et al.) publishes for philox4x32, 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], expected: list[int]) -> None:
    assert _words(counter, key) == expected


def test_layout_of_counter_and_key() -> None:
    seed, position, vocab_size = (0x24093822 << 32) | 0x299F31D0, 77, 10
    u = philox.uniform(torch.tensor([seed]), torch.tensor([position]), vocab_size)
    for v in range(vocab_size):
        word = _words((v // 4, position, 0, 0), (0x299F31D0, 0x24093822))[v % 4]
        expected = np.minimum((np.float32(word) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
        assert u[0, v].item() == expected


def test_depends_on_seed_and_position_only() -> None:
    seeds, positions = torch.tensor([5, 9, 5]), torch.tensor([3, 3, 4])
    noise = philox.reference(seeds, positions, 37)
    assert torch.equal(noise[1:2], philox.reference(seeds[1:2], positions[1:2], 37))
    assert torch.equal(noise[:, :11], philox.reference(seeds, positions, 11))
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_exponential_is_accurate() -> None:
    tiny = 2.0 ** -torch.linspace(0.01, 33, 50_001)
    near_one = 1 - torch.arange(1, 2000) * 2.0**-24
    edges = torch.tensor([2.0**-33, 1 - 2.0**-24, 0.5, 0.25, 1 - math.sqrt(0.5), math.sqrt(0.5)])
    u = torch.cat((torch.rand(200_000), tiny, near_one, edges)).clamp(2.0**-33, 1 - 2.0**-24)
    q = philox.exponential(u)
    exact = -np.log1p(-u.double().numpy())
    assert np.abs(q.double().numpy() / exact - 1).max() < 4e-7
    assert q.dtype == torch.float32
    assert (q > 0).all()


def test_exponential_takes_one_rounded_operation_at_a_time() -> None:
    """The formula in numpy's fp32 scalars: no fused multiply-add can hide in either."""
    u = philox.uniform(torch.tensor([1]), torch.tensor([0]), 4096)[0]
    f32 = np.float32
    y = f32(1) - u.numpy()
    exponent = (y.view(np.int32) - np.int32(philox.SQRT_HALF_BITS)) >> 23
    m = (y.view(np.int32) - (exponent << 23)).view(np.float32)
    f = np.where(exponent == 0, -u.numpy(), m - f32(1))
    s = f * f
    r = np.full_like(f, f32(philox.LOG1P[8]))
    for k in range(7, -1, -1):
        r = r * f + f32(philox.LOG1P[k])
    e = exponent.astype(np.float32)
    t = (f * s) * r + e * f32(philox.LN2_LOW) - s * f32(0.5)
    q = -((f + t) + e * f32(philox.LN2_HIGH))
    assert np.array_equal(q.view(np.int32), philox.exponential(u).numpy().view(np.int32))


def test_constants_are_float32() -> None:
    for constant in (*philox.LOG1P, philox.LN2_HIGH, philox.LN2_LOW):
        assert float(np.float32(constant)) == constant


def test_moments() -> None:
    noise = philox.reference(torch.arange(64), torch.zeros(64, dtype=torch.int64), 4096).double()
    assert abs(noise.mean().item() - 1) < 5 / 512
    assert abs(noise.var().item() - 1) < 10 / 512
