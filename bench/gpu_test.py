"""All that has to be seen on a GPU, in one command under ten minutes: ``make gpu-test``, ``make gpu-peers``.

    python3 bench/gpu_test.py [--out FOLDER] [--goldens PATH] [--official PATH] [--budget S] [--dry-run] [STAGE ...]

Needs the standard library to start, no network and no virtual environment: it builds in place, for the architecture of
the GPU that it finds, against the python3 that runs it, and makes that Python find ``gear_engine.bench`` and
``gear_engine.triton_kernels`` by a folder on PYTHONPATH. Every stage has a limit of its own and writes
``FOLDER/STAGE.json`` when it is done: ``status`` is ``passed``, ``failed``, ``timed out`` or ``not run`` with the
reason. A tool that is missing is reported, and the other stages run. The exit status is 0 if every stage passed or
lacked a tool, 1 if one failed or timed out, 2 if there is no GPU, so that nothing was shown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Kernels that the profiler looks at, as regular expressions over their names.
PROFILED = ("decode_attention", "skinny_linear", "sample_tokens", "codebook_quantize", "group_norm_silu")
#: Seconds for everything but the peers.
BUDGET = 570
_TAIL = 6000
_BUILD = ROOT / "build" / "gpu-test" / "cmake"
#: The op tests in C++ without torch, left behind by the build.
_PROGRAM = _BUILD / "gpu_smoke"
#: Where a Python started by the stages finds the packages that live at the top of the repository.
_MAPPED = {"gear_engine.bench": "bench", "gear_engine.triton_kernels": "triton_kernels"}
_HOOK = '''"""Made by bench/gpu_test.py: what an installation would map."""
import importlib.util, os, sys

class _Mapped:
    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = {mapped!r}.get(name)
        if folder is None:
            return None
        init = os.path.join(folder, "__init__.py")
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[folder])

sys.meta_path.insert(0, _Mapped)
'''


@dataclass
class Machine:
    """What is here: the seam that tests replace."""

    python: str = sys.executable
    which: Callable[[str], str | None] = shutil.which
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def tool(self, name: str) -> str | None:
        """Path of a program: on PATH, beside the Python, or where CUDA toolkits are installed."""
        homes = [self.environment.get("CUDA_HOME", ""), "/usr/local/cuda"]
        folders = [os.path.dirname(self.python), *(os.path.join(home, "bin") for home in homes if home)]
        beside = (os.path.join(folder, name) for folder in folders)
        return self.which(name) or next((path for path in beside if os.access(path, os.X_OK)), None)

    def gpu(self) -> tuple[str, str] | None:
        """(name, CMake architecture) of the first GPU, or None."""
        smi = self.which("nvidia-smi")
        if smi is None:
            return None
        query = [smi, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
            name, capability = done.stdout.splitlines()[0].rsplit(",", 1)
            major, minor = (int(part) for part in capability.strip().split("."))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return None
        # From Hopper on, the tensor cores' newest instructions are in the architecture's own variant only.
        return name.strip(), f"{major}{minor}{'a' if major in (9, 10) else ''}"


@dataclass(frozen=True)
class Command:
    """One program of a stage; ``name`` tells it from the stage's others."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """``limit`` seconds for all ``commands`` together; ``missing`` tools keep it from running."""

    name: str
    limit: float
    commands: tuple[Command, ...]
    missing: tuple[str, ...] = ()


def _modules(machine: Machine, names: Sequence[str]) -> tuple[str, ...]:
    """Which Python modules are not there."""
    test = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n) is None])"
    done = subprocess.run([machine.python, "-c", test, *names], capture_output=True, text=True, check=False)
    return tuple(f"Python module {name}" for name in done.stdout.split())


def plan(machine: Machine, out: Path, official: Path | None) -> list[Stage]:
    """The stages in order, with what each lacks."""
    python, results = machine.python, ["--official", str(official)] if official else []

    def lacks(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if machine.tool(name) is None)

    def module(name: str, *words: str) -> tuple[str, ...]:
        return (python, "-m", name, *words)

    op_tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/ops").glob("test_cuda_*.py"))
    tests = ("tests/gpu", "tests/ops/test_triton_kernels.py", *op_tests)
    sanitizer, profiler = machine.tool("compute-sanitizer") or "compute-sanitizer", machine.tool("ncu") or "ncu"
    rollout = module("gear_engine.bench.gpu_rollout")
    profile = (profiler, "--set", "basic", "--launch-count", "1", "--csv", "--kernel-name-base", "demangled")
    return [
        Stage(
            "build",
            200,
            (Command("extension", (python, "setup.py", "-q", "build_ext", "--inplace")),),
            lacks("nvcc", "cmake", "ninja") + _modules(machine, ["pybind11", "setuptools", "torch"]),
        ),
        Stage("smoke", 60, (Command("smoke", (*rollout, "--smoke")),), _modules(machine, ["torch", "triton"])),
        Stage(
            "ops",
            180,
            (Command("pytest", module("pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests)),),
            _modules(machine, ["pytest", "hypothesis", "safetensors"]),
        ),
        Stage(
            "sanitizer",
            120,
            tuple(
                Command(kind, (sanitizer, "--tool", kind, "--error-exitcode", "9", str(_PROGRAM)))
                for kind in SANITIZERS
            ),
            lacks("compute-sanitizer") + (() if _PROGRAM.exists() else (f"{_PROGRAM.name}, the C++ test program",)),
        ),
        Stage(
            "bench",
            150,
            (
                Command("rollout", (*rollout, "--json", str(out / "rollout.json"), "--budget", "80")),
                Command(
                    "ops",
                    (
                        *module("gear_engine.cli", "bench", "--device", "cuda", "--max-seconds", "0.3"),
                        *("decode_attention", "skinny_linear", "sample_tokens", "codebook_quantize", "decode_step"),
                        *("--grid", "dtype=bf16", "model=LlamaGen-XL", "--out", str(out / "ops-report.json"), *results),
                    ),
                ),
            ),
        ),
        Stage(
            "ncu",
            90,
            tuple(
                Command(name, (*profile, "--kernel-name", f"regex:{name}", *rollout, "--profile")) for name in PROFILED
            ),
            lacks("ncu"),
        ),
        # Slow, so only when it is asked for: compiling the official model takes minutes.
        Stage(
            "peers",
            1500,
            (Command("peers", (*rollout, "--peers", "--json", str(out / "peers-rollout.json"), *results)),),
            () if official else ("--official with a checkout of the official code",),
        ),
    ]


def environment(machine: Machine, out: Path, architecture: str | None, goldens: Path | None) -> dict[str, str]:
    """What the stages' programs see."""
    path = out / "path"
    path.mkdir(parents=True, exist_ok=True)
    mapped = {name: str(ROOT / folder) for name, folder in _MAPPED.items()}
    (path / "sitecustomize.py").write_text(_HOOK.replace("{mapped!r}", repr(mapped)))
    found = dict(machine.environment)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), str(ROOT), found.get("PYTHONPATH"))))
    # Another compiler's new warnings are no reason to learn nothing.
    found |= {"GEAR_CUDA": "ON", "GEAR_GPU_SMOKE": "ON", "GEAR_WERROR": "OFF"}
    found |= {"GEAR_BUILD_DIR": str(_BUILD), "PYTHONUNBUFFERED": "1"}
    if architecture is not None:
        found["GEAR_CUDA_ARCHS"] = architecture
    if goldens is not None:
        found["GEAR_GOLDENS"] = str(goldens)
    compiler = machine.tool("nvcc")
    if compiler is not None:
        found.setdefault("CUDACXX", compiler)
    return found


def run_command(command: Command, limit: float, env: dict[str, str]) -> dict[str, Any]:
    """Runs it with all its children, at most ``limit`` seconds; never raises."""
    begin = time.monotonic()
    record: dict[str, Any] = {"name": command.name, "command": " ".join(command.words)}
    try:
        process = subprocess.Popen(
            command.words, cwd=ROOT, env=env, text=True, errors="replace", start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        return {**record, "status": "failed", "seconds": 0.0, "output": str(error)}
    try:
        output, _ = process.communicate(timeout=limit)
        status = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "timed out"
    seconds = round(time.monotonic() - begin, 2)
    return {**record, "status": status, "exit": process.returncode, "seconds": seconds, "output": output[-_TAIL:]}


def run_stage(stage: Stage, limit: float, env: dict[str, str]) -> dict[str, Any]:
    """All commands of a stage, also after one that failed; the stage's limit is shared."""
    begin, results = time.monotonic(), []
    for command in stage.commands:
        left = limit - (time.monotonic() - begin)
        if left <= 0:
            results.append({"name": command.name, "status": "timed out", "seconds": 0.0, "output": "no time was left"})
            continue
        results.append(run_command(command, left, env))
    every = [result["status"] for result in results]
    status = next((bad for bad in ("failed", "timed out") if bad in every), "passed")
    return {"stage": stage.name, "status": status, "limit": limit, "results": results}


def _not_run(stage: Stage, reason: str) -> dict[str, Any]:
    commands = [" ".join(command.words) for command in stage.commands]
    return {"stage": stage.name, "status": "not run", "reason": reason, "commands": commands}


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all but peers")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-test" / "results")
    parser.add_argument("--goldens", type=Path, help="outputs of the official code (default: where the tests look)")
    parser.add_argument("--official", type=Path, help="checkout of the official code")
    parser.add_argument("--budget", type=float, help=f"seconds for all stages ({BUDGET}; peers alone: no limit)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    args = parser.parse_args(arguments)
    machine = machine or Machine()
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = machine.gpu()
    stages = plan(machine, args.out, args.official)
    names = args.stages or [stage.name for stage in stages if stage.name != "peers"]
    unknown = [name for name in names if name not in {stage.name for stage in stages}]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(stage.name for stage in stages)}")
    env = environment(machine, args.out, gpu[1] if gpu else None, args.goldens)
    budget = args.budget or (1e9 if names == ["peers"] else BUDGET)
    begin, records = time.monotonic(), []
    print(f"GPU: {f'{gpu[0]} (sm_{gpu[1]})' if gpu else 'none'}; results in {args.out}", flush=True)
    for name in names:
        # Planned anew: the build leaves programs behind that later stages need.
        stage = next(stage for stage in plan(machine, args.out, args.official) if stage.name == name)
        left = budget - (time.monotonic() - begin)
        if args.dry_run:
            record = _not_run(stage, "dry run")
        elif gpu is None:
            record = _not_run(stage, "no GPU")
        elif stage.missing:
            record = _not_run(stage, f"missing: {', '.join(stage.missing)}")
        elif left < 1:
            record = _not_run(stage, f"the budget of {budget:.0f} s is spent")
        else:
            record = run_stage(stage, min(stage.limit, left), env)
        record["seconds"] = round(time.monotonic() - begin - (budget - left), 2)
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        records.append(record)
        print(f"{name}: {record['status']}{': ' + record['reason'] if 'reason' in record else ''}", flush=True)
        for result in record.get("results", []):
            if result["status"] != "passed":
                print(f"  {result['name']}: {result['status']}\n{result['output'][-1500:]}", flush=True)
    summary = {"gpu": gpu, "stages": {record["stage"]: record["status"] for record in records}}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if gpu is None and not args.dry_run:
        return 2
    return int(any(record["status"] in ("failed", "timed out") for record in records))


if __name__ == "__main__":
    sys.exit(main())
