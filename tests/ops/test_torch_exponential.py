"""The compiled draw gives the bits of torch's own and leaves the generator where torch's would."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gear_engine.errors import BackendUnavailableError
from gear_engine.ops import backends, native
from gear_engine.ops import torch_exponential as module
from gear_engine.ops.torch_exponential import torch_exponential
from tests.ops.cpu_paths import PATHS, forced, threads

needs_kernel = pytest.mark.skipif(
    native.unavailable("torch_exponential_cpu") is not None, reason="needs the compiled module"
)
pytestmark = needs_kernel


def _pair(seed: int, words: int = 0) -> list[torch.Generator]:
    """Two generators alike, ``words`` 32-bit words after their seed."""
    pair = [torch.Generator().manual_seed(seed) for _ in range(2)]
    for generator in pair:
        if words:
            torch.empty(words, dtype=torch.int32).random_(generator=generator)
    return pair


def _assert_equal(shape: tuple[int, ...], pair: list[torch.Generator]) -> None:
    expected, found = torch.empty(shape), torch.full(shape, -1.0)
    torch_exponential(expected, pair[0], backend="reference")
    torch_exponential(found, pair[1], backend="cpu")
    assert torch.equal(found, expected)
    assert torch.equal(pair[0].get_state(), pair[1].get_state())


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("path", PATHS)
def test_bits_of_torch(path: str, count: int) -> None:
    """Lengths around the generator's 312 numbers, a block of 64 and a piece of 4096, one after the other."""
    pair = _pair(11)
    with forced(path), threads(count):
        for shape in ((1,), (63,), (247,), (312,), (313,), (2, 2048), (4097,), (3, 5000), (0,), (8, 16384)):
            _assert_equal(shape, pair)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63 - 1), words=st.integers(0, 1300), lengths=st.lists(st.integers(0, 9000), max_size=4))
def test_any_state_and_length(isa: str, seed: int, words: int, lengths: list[int]) -> None:
    pair = _pair(seed, words)
    for length in lengths:
        _assert_equal((length,), pair)


@pytest.mark.parametrize(("seed", "length"), [(0, 1_818_530), (50, 639_286), (60, 1_014_597)])
def test_rare_numbers(isa: str, seed: int, length: int) -> None:
    """The last number of each lies so near the middle between two floats that the kernel asks the C library, and its
    own guess would be the other float."""
    _assert_equal((length,), _pair(seed))


def _untempered(word: int) -> int:
    """The word of the state that is given out as ``word``."""
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    found = word
    for _ in range(5):
        found = word ^ ((found << 7) & 0x9D2C5680)
    word = found
    for _ in range(3):
        found = word ^ (found >> 11)
    return found


def _before(*words: int) -> list[torch.Generator]:
    """Two generators that give out these words, the last ones before all are made anew."""
    state = torch.Generator().get_state()
    count = len(words)
    state[8:12].view(torch.int32).fill_(count + 1)
    state[16:24].view(torch.int64).fill_(624 - count)
    places = state[24 : 24 + 8 * 624].view(torch.int64)
    places[624 - count :] = torch.tensor([_untempered(word) for word in words])
    return [torch.Generator().set_state(state) for _ in range(2)]


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ((0, 0), 0.0),  # x = 0
        ((0xFFE00000, 0), 0.0),  # bits above the 53rd do not count
        ((0, 1), 2.0**-53),
        ((0xFFFFFFFF, 0xFFFFFFFF), 36.7368),  # x = 1 - 2^-53
        ((0x100000, 0), 0.693147),  # x = 1/2
    ],
)
def test_the_ends_of_the_range(isa: str, words: tuple[int, int], number: float) -> None:
    out = torch.full((1,), -1.0)
    torch_exponential(out, _before(*words)[0], backend="cpu")
    assert out.item() == pytest.approx(number, rel=1e-6)
    assert not torch.signbit(out).any()
    _assert_equal((1,), _before(*words))
    _assert_equal((700,), _before(*words))


def test_threads_that_share_a_generator_draw_different_numbers() -> None:
    source = torch.Generator().manual_seed(2)
    outs = [torch.zeros(20000) for _ in range(4)]
    callers = [threading.Thread(target=torch_exponential, args=(out, source)) for out in outs]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    in_turn = torch.empty(4, 20000).exponential_(1, generator=torch.Generator().manual_seed(2))
    assert sorted(out[0].item() for out in outs) == sorted(in_turn[:, 0].tolist())
    assert all(any(torch.equal(out, row) for row in in_turn) for out in outs)


def test_a_failing_call_leaves_the_generator_where_the_kernel_did() -> None:
    source, expected, out = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2), torch.empty(10)
    torch_exponential(out, expected)
    with pytest.raises(KeyboardInterrupt), module.moving(source) as state:
        native.cpu_kernels().torch_exponential_cpu(state.data_ptr(), 10, out.data_ptr())
        raise KeyboardInterrupt
    assert torch.equal(source.get_state(), expected.get_state())


def test_the_default_generator() -> None:
    torch.manual_seed(6)
    expected = torch.empty(1000).exponential_(1)
    after = torch.get_rng_state()
    torch.manual_seed(6)
    found = torch.empty(1000)
    torch_exponential(found)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_normal_number_kept_for_later_stays() -> None:
    pair = _pair(3)
    for generator in pair:
        torch.randn(1, generator=generator)
    _assert_equal((50,), pair)
    assert torch.equal(*(torch.randn(3, generator=generator) for generator in pair))


@pytest.mark.parametrize(
    "out", [torch.empty(3, dtype=torch.float64), torch.empty(4, 4)[:, :2], torch.empty(3, dtype=torch.bfloat16)]
)
def test_what_cannot_be_filled(out: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    with pytest.raises(ValueError, match="fp32 and contiguous"):
        torch_exponential(out, generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(("left", "following"), [(0, 0), (-3, 0), (625, 0), (5, 3), (1, 700), (2, 2**40)])
def test_bytes_that_are_no_state(left: int, following: int) -> None:
    state = torch.Generator().get_state()
    state[8:12].view(torch.int32).fill_(left)
    state[16:24].view(torch.int64).fill_(following)
    out = torch.zeros(4)
    with pytest.raises(ValueError, match="no state"):
        native.cpu_kernels().torch_exponential_cpu(state.data_ptr(), 4, out.data_ptr())
    assert not out.any()


def test_a_torch_that_draws_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out when the backend is chosen: asked for by name it is refused, and ``"auto"`` takes torch's."""

    def reversed_words(out: torch.Tensor, generator: torch.Generator | None = None) -> None:
        out.copy_(torch.empty(out.shape).exponential_(1, generator=generator).flip(0))

    monkeypatch.setattr(module, "reference", reversed_words)
    module._why_not.cache_clear()
    try:
        with pytest.raises(BackendUnavailableError, match="in another way"):
            backends.resolve("torch_exponential", torch.device("cpu"), torch.float32, "cpu")
        assert backends.resolve("torch_exponential", torch.device("cpu"), torch.float32).backend == "reference"
    finally:
        module._why_not.cache_clear()
    monkeypatch.undo()
    assert backends.resolve("torch_exponential", torch.device("cpu"), torch.float32).backend == "cpu"
