"""The rollout benchmark that ``make gpu-test`` runs, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gear_engine.bench import gpu_rollout
from gear_engine.bench.timing import Ceilings

_TINY = gpu_rollout.GeneratorConfig(dim=32, n_layer=1, n_head=2, vocab_size=50, block_size=16, num_classes=9)


@pytest.fixture(autouse=True)
def _known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes seconds, and is tested elsewhere."""
    monkeypatch.setattr(gpu_rollout.timing, "measure_ceilings", lambda device: Ceilings(1e9, {}))


def test_rows(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_rollout, "generator_config", lambda name: _TINY)
    words = ["--device", "cpu", "--execution", "eager", "--model", "any", "--images", "1", "3", "--tokens", "4"]
    assert gpu_rollout.main([*words, "--rounds", "2", "--json", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(row["images"], row["equal"], row["runs"]) for row in record["rows"]] == [(1, True, 2), (3, True, 2)]
    assert all(row["of_floor_%"] == 100 * row["floor_ms"] / row["ms_per_step"] for row in record["rows"])
    assert record["device"]
    assert "of_floor_%" in capsys.readouterr().out


def test_a_spent_budget_is_listed(tmp_path: Path, capsys: Any) -> None:
    gpu_rollout.main(["--device", "cpu", "--budget", "-1", "--json", str(tmp_path / "out.json")])
    record = json.loads((tmp_path / "out.json").read_text())
    assert (len(record["rows"]), len(record["skipped"])) == (0, 6)


def test_smoke(capsys: Any) -> None:
    assert gpu_rollout.main(["--device", "cpu", "--smoke"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["equal_to_direct"] == {"direct": True, "eager": True}
    assert record["equal_to_cpu_%"] == 100


def test_the_profiled_program_calls_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once per number of images within what it marks, the codebook search too."""
    marked: list[list[str]] = []
    calls: list[str] = []

    @contextlib.contextmanager
    def mark(device: torch.device) -> Iterator[None]:
        calls.clear()
        yield
        marked.append(list(calls))

    resolve = gpu_rollout.backends.resolve

    def counted(op: str, *args: Any, **options: Any) -> Any:
        found = resolve(op, *args, **options)
        load = found.load()
        return dataclasses.replace(found, load=lambda: lambda *a, **o: (calls.append(op), load(*a, **o))[1])

    monkeypatch.setattr(gpu_rollout, "_profiled", mark)
    monkeypatch.setattr(gpu_rollout.backends, "resolve", counted)
    plain = {"decode_attention": "reference"}  # or the compiled backend would make a step in one call
    monkeypatch.setattr(gpu_rollout, "Engine", functools.partial(gpu_rollout.Engine, backend=plain))
    gpu_rollout.profile(torch.device("cpu"), _TINY, vectors=3)
    assert [set(ops) for ops in marked[:3]] == [{"decode_attention", "skinny_linear", "sample_tokens"}] * 3
    assert marked[0].count("skinny_linear") == 5
    assert marked[3:] == [["codebook_quantize"]]


@pytest.mark.parametrize(("skips", "launches", "status"), [(0, 3, 0), (1, 3, 1), (0, 0, 1)])
def test_a_compiled_peer_without_graphs_fails(
    skips: int, launches: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One skipped graph, or none launched, and the comparison would be with something slower than it says."""
    counters = {"inductor": Counter[str]()}

    def rollout(*args: Any, compiled: bool = False) -> Callable[[], None]:
        def call() -> None:
            counters["inductor"]["cudagraph_skips"] += skips * compiled

        return call

    monkeypatch.setattr(gpu_rollout, "inductor_counters", lambda: counters["inductor"])
    monkeypatch.setattr(gpu_rollout, "generator_config", lambda name: _TINY)
    monkeypatch.setattr(gpu_rollout, "official_rollout", rollout)
    monkeypatch.setattr(gpu_rollout, "graph_launches", lambda call: launches)
    words = ["--device", "cpu", "--peers", "--official", str(tmp_path), "--model", "any", "--images", "1"]
    assert gpu_rollout.main([*words, "--tokens", "4", "--rounds", "1"]) == status
