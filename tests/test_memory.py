"""The memory plan against what is really allocated, and the error that it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gear_engine import memory
from gear_engine.engine import Engine
from gear_engine.errors import OutOfMemoryError
from tests.models_for_tests import CLASS, small_model

CPU = torch.device("cpu")


def test_available_bytes_of_a_cpu() -> None:
    available = memory.available_bytes(CPU)
    assert available is not None
    assert 2**20 < available < 2**50


def test_control_group_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.available_bytes(CPU) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = memory.available_bytes(CPU)
    assert unlimited is None or unlimited > 4000


def test_arithmetic() -> None:
    plan = {"weights": 3 * 2**30, "nothing": 0, "cache": 2**30}
    memory.check_fits(plan, 4 * 2**30, "hint")
    memory.check_fits(plan, None, "hint")
    message = r"weights 3.00 GiB \+ cache 1.00 GiB = 4.00 GiB, but 3.50 GiB are available; buy more"
    with pytest.raises(OutOfMemoryError, match=message):
        memory.check_fits(plan, 7 * 2**29, "buy more")


def test_plan_holds_what_is_allocated() -> None:
    engine = Engine(small_model(), max_images=3, dtype=torch.float16)
    weights = small_model().weights()
    plan = memory.engine_plan(
        CLASS, num_slots=6, max_tokens=16, dtype=torch.float16, weight_bytes=weights.nbytes_as(torch.float16)
    )
    assert plan["key/value cache"] == engine.cache.kv.nbytes
    assert plan["weights"] == engine.weights.nbytes
    assert weights.nbytes_as(torch.float32) == 0


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_plan_of_packed_weights(kind: object) -> None:
    packed = small_model().weights().to(pack_kind=kind)  # type: ignore[arg-type]
    planned = small_model().weights().nbytes_as(torch.float32, kind)  # type: ignore[arg-type]
    shared = {w.data_ptr() for _, w in small_model().weights()._named() if isinstance(w, torch.Tensor)}
    copied = sum(w.nbytes for _, w in packed._named() if not (isinstance(w, torch.Tensor) and w.data_ptr() in shared))
    assert copied == planned


def test_nothing_is_allocated_by_a_plan_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr("gear_engine.engine.StaticKVCache.__init__", fail)
    with pytest.raises(OutOfMemoryError, match="max_images"):
        Engine(small_model(), memory_budget=1000)
