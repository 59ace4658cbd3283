"""The driver of ``make gpu-test`` with tools made for the test: what it runs, what it writes, and what it admits."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gear_engine.bench import gpu_rollout, gpu_stages, gpu_test, registry
from gear_engine.bench.gpu_stages import Command, Machine, Stage, plan
from gear_engine.bench.gpu_test import main, run_stage
from gear_engine.cli.main import build_parser


def _tool(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a GPU and every tool; none of them does anything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _tool(folder, "nvidia-smi", 'echo "Made-up GPU, 9.0"')
    for name in ("nvcc", "cmake", "ninja", "compute-sanitizer"):
        _tool(folder, name, f'echo "{name} $@"')
    # The question for modules gets no answer: none is missing. The profiler finds all kernels in what it echoes.
    _tool(folder, "python3", 'test "$1" = -c || echo "python3 $@"')
    _tool(folder, "ncu", f'echo "ncu $@ {" ".join(gpu_stages.PROFILED.values())}"')
    _tool(folder, "gpu_smoke", "echo ok")
    monkeypatch.setattr(gpu_stages, "_PROGRAM", folder / "gpu_smoke")

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
    assert set(records) == {"build", "kernels", "smoke", "ops", "sanitizer", "bench", "ncu"}
    assert all((record["status"], record["reason"]) == ("not run", "no GPU") for record in records.values())
    assert summary == {"gpu": None, "stages": dict.fromkeys(summary["stages"], "not run")}
    assert capsys.readouterr().out.count("not run: no GPU") == 7


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
    env = gpu_test.environment(machine, tmp_path, architecture, tmp_path / "goldens", tmp_path / "checkout")
    assert (env["GEAR_CUDA"], env["GEAR_CUDA_ARCHS"]) == ("ON", architecture)
    assert env["GEAR_GOLDENS"] == str(tmp_path / "goldens")
    assert env["GEAR_OFFICIAL"] == str(tmp_path / "checkout")
    assert env["CUDACXX"] == str(tmp_path / "bin" / "nvcc")


def test_a_dry_run_runs_nothing(tmp_path: Path, machine: Machine) -> None:
    assert main(["--out", str(tmp_path / "out"), "--dry-run"], machine) == 0
    records = _records(tmp_path / "out")
    assert {record.get("reason") for name, record in records.items() if name != "summary"} == {"dry run"}
    assert "setup.py -q build_ext --inplace" in records["build"]["commands"][0]
    assert [command.split(" --tool ")[1].split()[0] for command in records["sanitizer"]["commands"]] == list(
        gpu_stages.SANITIZERS
    )


def test_every_stage_writes_what_it_ran(tmp_path: Path, machine: Machine) -> None:
    assert main(["--out", str(tmp_path / "out")], machine) == 0
    records = _records(tmp_path / "out")
    assert records["summary"]["gpu"] == ["Made-up GPU", "90a"]
    assert set(records["summary"]["stages"].values()) == {"passed"}
    assert records["build"]["results"][0]["output"].startswith("python3 setup.py")
    assert [result["name"] for result in records["sanitizer"]["results"]] == list(gpu_stages.SANITIZERS)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("==== passed") == sum(len(record.get("results", ())) for record in records.values())


def test_a_profile_without_a_kernel_fails(tmp_path: Path, machine: Machine) -> None:
    """A name that no longer is a kernel's, or a kernel that the profiled program does not launch."""
    _tool(tmp_path / "bin", "ncu", "echo attend_kernel propose_kernel sample_kernel skinny::narrow::kernel")
    assert main(["--out", str(tmp_path / "out"), "ncu"], machine) == 1
    assert "skinny::wide::kernel" in _records(tmp_path / "out")["ncu"]["results"][0]["output"]


_JUNIT = """<testsuites><testsuite tests="5">
<testcase name="a"/><testcase name="b"/>
<testcase name="c"><failure message="assert 1 == 2">...</failure></testcase>
<testcase name="d"><skipped type="pytest.skip" message="GEAR_OFFICIAL names no checkout">...</skipped></testcase>
<testcase name="e"><skipped type="pytest.skip" message="GEAR_OFFICIAL names no checkout">...</skipped></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_and_skips_told_with_their_reason(
    tmp_path: Path, machine: Machine, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official checkout reaches the tests; what was skipped all the same is no pass."""
    out, checkout = tmp_path / "out", tmp_path / "checkout"
    script = f"""test "$1" = -c && exit 0
for word in "$@"; do case "$word" in --junitxml=*) echo '{_JUNIT}' > "${{word#*=}}";; esac; done
echo "official is $GEAR_OFFICIAL" """
    _tool(tmp_path / "bin", "python3", script)
    monkeypatch.chdir(tmp_path)
    assert main(["--out", "out", "--official", "checkout", "ops", "smoke"], machine) == 0
    (result,) = _records(out)["ops"]["results"]
    assert f"official is {checkout}" in result["output"], "from the folder where the tests run, too"
    assert result["tests"] == {
        "passed": 2,
        "failed": 1,
        "skipped": 2,
        "skip_reasons": {"GEAR_OFFICIAL names no checkout": 2},
    }
    printed = capsys.readouterr().out
    assert "pytest: 2 passed, 1 failed, 2 skipped\n    2 skipped: GEAR_OFFICIAL names no checkout" in printed
    assert "tests" not in _records(out)["smoke"]["results"][0]
    _tool(tmp_path / "bin", "python3", 'test "$1" = -c || echo killed')
    main(["--out", "out", "ops"], machine)
    assert _records(out)["ops"]["results"][0]["tests"] is None, "not those of the run before"


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
    record = run_stage(stage, 1.0, dict(os.environ), tmp_path / "log.txt")
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
    """What runs by default, and the build followed by the peers of one model, each in one call."""
    stages = plan(machine, tmp_path, None)
    assert sum(stage.limit for stage in stages if not stage.asked) <= gpu_stages.BUDGET < 600
    asked = [stage for stage in stages if stage.asked]
    assert [stage.name for stage in asked] == ["peers-xl", "peers-b"]
    assert all("--official" in stage.missing[0] for stage in asked)
    assert all(stages[0].limit + stage.limit <= gpu_stages.BUDGET for stage in asked)
    assert not any(stage.missing for stage in plan(machine, tmp_path, tmp_path))


_OPTIONS = {
    "compute-sanitizer": {"--tool", "--error-exitcode"},
    "ncu": {"--profile-from-start", "--clock-control", "--set", "--section", "--csv", "--kernel-name-base"},
}


def test_every_command_can_be_read_by_its_program(tmp_path: Path, machine: Machine) -> None:
    """Options, benchmarks, fields and test files exist; tools that are not here get no option unknown to this list."""
    for stage in plan(machine, tmp_path, tmp_path):
        for command in stage.commands:
            tool, words = Path(command.words[0]).name, list(command.words[1:])
            if tool in _OPTIONS:
                end = next(index for index, word in enumerate(words) if Path(word).is_file())
                assert {word for word in words[:end] if word.startswith("--")} <= _OPTIONS[tool]
                tool, words = Path(words[end]).name, words[end + 1 :]
            if tool == "gpu_smoke":
                assert not words
                continue
            assert tool == "python3"
            _read(words)


def _read(words: list[str]) -> None:
    if words[0] == "setup.py":
        assert words[1:] == ["-q", "build_ext", "--inplace"]
        return
    assert words.pop(0) == "-m"
    module = words.pop(0)
    if module == "gear_engine.bench.gpu_rollout":
        found = gpu_rollout.options(words)
        assert all(gpu_rollout.generator_config(name) for name in found.model)
    elif module == "gear_engine.cli":
        args = build_parser()[0].parse_args(words)
        grid = {name: values.split(",") for name, _, values in (pair.partition("=") for pair in args.grid)}
        cases = registry.select(args.names, args.preset, grid, args.filter)
        assert {case.benchmark.name for case in cases} == set(args.names)
        for field, values in grid.items():
            assert all(str(case.params.get(field, values[0])) in values for case in cases)
    else:
        assert module == "pytest"
        paths = [gpu_stages.ROOT / word for word in words if word.startswith("tests/")]
        assert len(paths) >= 2 + 5
        assert all(path.exists() for path in paths)


def test_the_path_finds_what_an_installation_would_map(tmp_path: Path) -> None:
    env = gpu_test.environment(Machine(), tmp_path, None, None)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import importlib.util as u\n"
        "for name in ('gear_engine.bench.timing', 'gear_engine.triton_kernels'): print(u.find_spec(name).origin)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    root = gpu_stages.ROOT
    assert done.stdout.split() == [str(root / "bench/timing.py"), str(root / "triton_kernels/__init__.py")]
