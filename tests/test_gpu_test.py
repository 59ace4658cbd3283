"""The driver of ``make gpu-test`` with tools made for the test: what it runs, what it writes, and what it admits."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gear_engine.bench import gpu_rollout, gpu_test
from gear_engine.bench.gpu_test import Command, Machine, Stage, main, plan, run_stage
from gear_engine.bench.timing import Ceilings


def _tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with a GPU and every tool; none of them does anything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _tool(folder, "nvidia-smi", 'echo "Made-up GPU, 9.0"')
    for name in ("nvcc", "cmake", "ninja", "ncu", "compute-sanitizer"):
        _tool(folder, name, f'echo "{name} $@"')
    # The question for modules gets no answer: none is missing.
    _tool(folder, "python3", 'test "$1" = -c || echo "python3 $@"')

    def which(name: str) -> str | None:
        path = folder / name
        return str(path) if path.exists() else None

    return Machine(python=str(folder / "python3"), which=which, environment={"PATH": os.environ["PATH"]})


def _records(out: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_without_a_gpu_every_stage_says_so(tmp_path: Path, machine: Machine, capsys: Any) -> None:
    (tmp_path / "bin" / "nvidia-smi").unlink()
    assert main(["--out", str(tmp_path / "out")], machine) == 2
    records = _records(tmp_path / "out")
    summary = records.pop("summary")
    assert set(records) == {"build", "smoke", "ops", "sanitizer", "bench", "ncu"}
    assert all((record["status"], record["reason"]) == ("not run", "no GPU") for record in records.values())
    assert summary == {"gpu": None, "stages": dict.fromkeys(summary["stages"], "not run")}
    assert capsys.readouterr().out.count("not run: no GPU") == 6


def test_a_broken_driver_is_no_gpu(tmp_path: Path, machine: Machine) -> None:
    _tool(tmp_path / "bin", "nvidia-smi", "echo 'Failed to initialize NVML'; exit 9")
    assert machine.gpu() is None
    _tool(tmp_path / "bin", "nvidia-smi", "echo nonsense")
    assert machine.gpu() is None


@pytest.mark.parametrize(
    ("line", "architecture"), [("H100, 9.0", "90a"), ("A100, 8.0", "80"), ("B200, 10.0", "100a"), ("5090, 12.0", "120")]
)
def test_the_native_architecture(tmp_path: Path, machine: Machine, line: str, architecture: str) -> None:
    _tool(tmp_path / "bin", "nvidia-smi", f'echo "{line}"')
    assert machine.gpu() == (line.split(",")[0], architecture)
    env = gpu_test.environment(machine, tmp_path, architecture, tmp_path / "goldens")
    assert (env["GEAR_CUDA"], env["GEAR_CUDA_ARCHS"]) == ("ON", architecture)
    assert env["GEAR_GOLDENS"] == str(tmp_path / "goldens")
    assert env["CUDACXX"] == str(tmp_path / "bin" / "nvcc")


def test_a_dry_run_runs_nothing(tmp_path: Path, machine: Machine) -> None:
    assert main(["--out", str(tmp_path / "out"), "--dry-run"], machine) == 0
    records = _records(tmp_path / "out")
    assert {record.get("reason") for name, record in records.items() if name != "summary"} == {"dry run"}
    assert "setup.py -q build_ext --inplace" in records["build"]["commands"][0]
    assert [command.split(" --tool ")[1].split()[0] for command in records["sanitizer"]["commands"]] == list(
        gpu_test.SANITIZERS
    )
    assert len(records["ncu"]["commands"]) == 5


def test_every_stage_writes_what_it_ran(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_test, "_PROGRAM", tmp_path / "bin" / "python3")
    assert main(["--out", str(tmp_path / "out")], machine) == 0
    records = _records(tmp_path / "out")
    assert records["summary"]["gpu"] == ["Made-up GPU", "90a"]
    assert set(records["summary"]["stages"].values()) == {"passed"}
    assert records["build"]["results"][0]["output"].startswith("python3 setup.py")
    assert [result["name"] for result in records["sanitizer"]["results"]] == list(gpu_test.SANITIZERS)


def test_missing_tools_are_reported_and_not_fatal(tmp_path: Path, machine: Machine) -> None:
    for name in ("ncu", "compute-sanitizer"):
        (tmp_path / "bin" / name).unlink()
    machine.environment["CUDA_HOME"] = str(tmp_path)
    assert main(["--out", str(tmp_path / "out"), "ncu", "sanitizer", "smoke"], machine) == 0
    records = _records(tmp_path / "out")
    assert records["ncu"]["reason"] == "missing: ncu"
    assert records["sanitizer"]["reason"].startswith("missing: compute-sanitizer")
    assert records["smoke"]["status"] == "passed"


def test_a_failure_is_told_and_the_rest_runs(tmp_path: Path, machine: Machine, capsys: Any) -> None:
    _tool(tmp_path / "bin", "python3", 'case "$*" in *setup.py*) echo broken; exit 3;; *-c*) ;; *) echo fine;; esac')
    assert main(["--out", str(tmp_path / "out"), "build", "smoke"], machine) == 1
    records = _records(tmp_path / "out")
    assert (records["build"]["status"], records["build"]["results"][0]["exit"]) == ("failed", 3)
    assert records["smoke"]["status"] == "passed"
    assert "broken" in capsys.readouterr().out


def test_limits_hold_for_whole_process_trees(tmp_path: Path) -> None:
    _tool(tmp_path, "hang", "echo begun; sleep 600 & sleep 600")
    stage = Stage("slow", 1, (Command("one", (str(tmp_path / "hang"),)), Command("two", ("true",))))
    record = run_stage(stage, 1.0, dict(os.environ))
    assert record["status"] == "timed out"
    assert record["results"][0]["output"].strip() == "begun"
    assert record["results"][1]["output"] == "no time was left"


def test_a_spent_budget_is_no_pass(tmp_path: Path, machine: Machine) -> None:
    main(["--out", str(tmp_path / "out"), "--budget", "0.5", "smoke"], machine)
    assert "budget" in _records(tmp_path / "out")["smoke"]["reason"]


def test_unknown_stages_are_refused(tmp_path: Path, machine: Machine, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "nosuch"], machine)
    assert "nosuch" in capsys.readouterr().err


def test_limits_fit_into_ten_minutes_and_peers_are_apart(tmp_path: Path, machine: Machine) -> None:
    stages = plan(machine, tmp_path, None)
    assert [stage.name for stage in stages if stage.missing][-1] == "peers"
    assert "--official" in stages[-1].missing[0]
    assert not plan(machine, tmp_path, tmp_path)[-1].missing
    assert gpu_test.BUDGET < 600


def test_the_path_finds_what_an_installation_would_map(tmp_path: Path) -> None:
    env = gpu_test.environment(Machine(), tmp_path, None, None)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import importlib.util as u\n"
        "for name in ('gear_engine.bench.timing', 'gear_engine.triton_kernels'): print(u.find_spec(name).origin)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    root = gpu_test.ROOT
    assert done.stdout.split() == [str(root / "bench/timing.py"), str(root / "triton_kernels/__init__.py")]


class TestRollout:
    """The benchmark that the driver runs, on the CPU."""

    @pytest.fixture(autouse=True)
    def _known_bandwidth(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Measuring it takes seconds, and is tested elsewhere."""
        monkeypatch.setattr(gpu_rollout.timing, "measure_ceilings", lambda device: Ceilings(1e9, {}))

    def test_rows(self, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_rollout, "generator_config", lambda name: _TINY)
        words = ["--device", "cpu", "--execution", "eager", "--model", "any", "--images", "1", "3", "--tokens", "4"]
        assert gpu_rollout.main([*words, "--rounds", "2", "--json", str(tmp_path / "out.json")]) == 0
        record = json.loads((tmp_path / "out.json").read_text())
        assert [(row["images"], row["equal"], row["runs"]) for row in record["rows"]] == [(1, True, 2), (3, True, 2)]
        assert all(row["of_floor_%"] == 100 * row["floor_ms"] / row["ms_per_step"] for row in record["rows"])
        assert record["device"]
        assert "of_floor_%" in capsys.readouterr().out

    def test_a_spent_budget_is_listed(self, tmp_path: Path, capsys: Any) -> None:
        gpu_rollout.main(["--device", "cpu", "--budget", "-1", "--json", str(tmp_path / "out.json")])
        record = json.loads((tmp_path / "out.json").read_text())
        assert (len(record["rows"]), len(record["skipped"])) == (0, 6)

    def test_smoke(self, capsys: Any) -> None:
        assert gpu_rollout.main(["--device", "cpu", "--smoke"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["equal_to_direct"] == {"direct": True, "eager": True}
        assert record["equal_to_cpu_%"] == 100

    @pytest.mark.parametrize(("skips", "launches", "status"), [(0, 3, 0), (1, 3, 1), (0, 0, 1)])
    def test_a_compiled_peer_without_graphs_fails(
        self, skips: int, launches: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


_TINY = gpu_rollout.GeneratorConfig(dim=32, n_layer=1, n_head=2, vocab_size=50, block_size=16, num_classes=9)
