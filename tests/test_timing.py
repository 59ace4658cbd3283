"""The ceilings that benchmarks hold their times against."""

from __future__ import annotations

import pytest

from gear_engine.bench import timing
from gear_engine.ops import native
from tests.ops.cpu_paths import forced

needs_native = pytest.mark.skipif(
    native.unavailable("multiply_rate_cpu") is not None, reason="needs the compiled module"
)


@needs_native
@pytest.mark.parametrize(
    ("path", "multiplied"),
    [("portable", ()), ("avx2", ("float32", "int8")), ("avx512", ("float32",)), ("avx512-dot", ("float32",))],
)
def test_products_in_registers(path: str, multiplied: tuple[str, ...]) -> None:
    """Counted for what an instruction set multiplies itself; narrow numbers no slower than wide ones."""
    with forced(path):
        rates = {name: native.cpu_kernels().multiply_rate_cpu(i, 0.01) for i, name in enumerate(timing.RATE_ORDER)}
    assert all((rates[name] > 1e8) == (rate > 0) for name, rate in rates.items())
    assert {name for name, rate in rates.items() if rate > 0} >= set(multiplied)
    if path == "portable":
        assert not any(rates.values())


@needs_native
def test_the_faster_of_two_products_is_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.module(), "multiply_rate_cpu", lambda dtype, seconds: 1e15 * (dtype + 1))
    ceilings = timing.measure_ceilings("cpu", ("float32", "int8"))
    assert ceilings.rate("float32") == 1e15
    assert ceilings.rate("int8") == 3e15
    monkeypatch.setattr(native.module(), "multiply_rate_cpu", lambda dtype, seconds: 0.0)
    assert 1e6 < timing.measure_ceilings("cpu").rate("float32") < 1e15
