"""The fp8 cache's benchmark at a tiny size."""

from __future__ import annotations

from gear_engine.bench import fp8_cache
from tests.models_for_tests import small_model


def test_rows() -> None:
    rows = fp8_cache.measure(small_model().weights(), images=2, tokens=6, rounds=2, seed=0)
    assert [row["what"] for row in rows] == list(fp8_cache.FORMATS)
    exact, *others = rows
    assert (exact["kl"], exact["equal_tokens_%"]) == (0, 100)
    assert all(0 < row["kl"] < 1 and 50 <= row["equal_tokens_%"] <= 100 for row in others)
    assert all(row["runs"] == 2 and row["median_ms"] > 0 for row in rows)
    sizes = [row["cache_MB"] for row in rows]
    assert sizes[1] == sizes[3] < min(sizes[0], sizes[2])
