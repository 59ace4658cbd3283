"""What ``make gpu-test`` runs: the stages with their commands, limits and tools (:mod:`gear_engine.bench.gpu_test`).

Standard library only: it is read before anything is built or installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["BUDGET", "BUILD", "PROFILED", "ROOT", "SANITIZERS", "Command", "Machine", "Stage", "plan"]

ROOT = Path(__file__).resolve().parent.parent
#: Seconds for all stages of a run.
BUDGET = 570
BUILD = ROOT / "build" / "gpu-test" / "cmake"
#: The op tests in C++ without torch, left behind by the build.
_PROGRAM = BUILD / "gpu_smoke"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: Op -> a regular expression that finds its main kernel among the names that the profiler prints.
PROFILED = {
    "codebook_quantize": "propose_kernel",
    "decode_attention": "attend_kernel",
    "sample_tokens": "sample_kernel",
    "skinny_linear, few rows": "skinny::narrow::kernel",
    "skinny_linear, many rows": "skinny::wide::kernel",
}


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
    """One program of a stage; ``name`` tells it from the stage's others.

    Attributes:
        shows: regular expressions; the command fails if one of them finds nothing in what it prints.
        junit: where a test run writes its results as JUnit XML.
    """

    name: str
    words: tuple[str, ...]
    shows: tuple[str, ...] = ()
    junit: Path | None = None


@dataclass(frozen=True)
class Stage:
    """``limit`` seconds for all ``commands`` together; ``missing`` tools keep it from running.

    Attributes:
        asked: it runs only if it is asked for by name.
    """

    name: str
    limit: float
    commands: tuple[Command, ...]
    missing: tuple[str, ...] = ()
    asked: bool = False


def _modules(machine: Machine, names: Sequence[str]) -> tuple[str, ...]:
    """Which Python modules are not there."""
    test = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n) is None])"
    done = subprocess.run([machine.python, "-c", test, *names], capture_output=True, text=True, check=False)
    return tuple(f"Python module {name}" for name in done.stdout.split())


def _tests(machine: Machine) -> tuple[str, ...]:
    """The op tests that run kernels on a GPU; on several processes where pytest can, as Triton compiles on the CPU."""
    ops = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/ops").glob("test_cuda_*.py"))
    several = () if _modules(machine, ["xdist"]) else ("-n", "4")
    plain = ("-v", "--tb=short", "--durations=15", "-m", "not slow", "-p", "no:cacheprovider", *several)
    others = ("test_triton_kernels.py", "test_not_finite.py")
    return (*plain, "tests/gpu", *(f"tests/ops/{name}" for name in others), *ops)


def plan(machine: Machine, out: Path, official: Path | None) -> list[Stage]:
    """The stages, the most telling ones first; later ones go without where the budget ends."""
    python, peer = machine.python, ("--official", str(official)) if official else ()

    def lacks(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if machine.tool(name) is None)

    def module(name: str, *words: str) -> tuple[str, ...]:
        return (python, "-m", name, *words)

    program = () if _PROGRAM.exists() else (f"{_PROGRAM.name}, the C++ test program: run the build stage",)
    sanitizer, profiler = machine.tool("compute-sanitizer") or "compute-sanitizer", machine.tool("ncu") or "ncu"
    rollout, junit = module("gear_engine.bench.gpu_rollout"), out.absolute() / "ops-tests.xml"
    # From the range that the program marks. The clocks stay as they are: the profiler's default would lock them.
    profile = (profiler, "--profile-from-start", "off", "--clock-control", "none", "--set", "basic",
               "--section", "MemoryWorkloadAnalysis", "--csv", "--kernel-name-base", "demangled")  # fmt: skip
    bench = (
        *("decode_attention", "skinny_linear", "sample_tokens", "codebook_quantize"),
        *("group_norm_silu", "residual_moments"),
        *("--device", "cuda", "--max-seconds", "0.3", "--grid", "dtype=bf16", "model=LlamaGen-XL"),
    )

    decoder = (
        *("decoder", "--device", "cuda", "--max-seconds", "0.3"),
        *("--grid", "tokenizer=VQ-16", "images=1,64", "dtype=bf16"),
    )

    def peers(model: str) -> Stage:
        """Compiling the official model takes minutes."""
        name = f"peers-{model.rpartition('-')[2].lower()}"
        words = ("--peers", "--model", model, "--images", "64", "1", "8", "--rounds", "3", "--budget", "300")
        lacking = () if official else ("--official with a checkout of the official code",)
        command = Command(name, (*rollout, *words, "--json", str(out / f"{name}-rollout.json"), *peer))
        return Stage(name, 420, (command,), lacking, asked=True)

    return [
        Stage(
            "build",
            150,
            (Command("extension", (python, "setup.py", "-q", "build_ext", "--inplace")),),
            lacks("nvcc", "cmake", "ninja") + _modules(machine, ["pybind11", "setuptools", "torch"]),
        ),
        Stage("kernels", 25, (Command("cases", (str(_PROGRAM),)),), program),
        Stage("smoke", 50, (Command("smoke", (*rollout, "--smoke")),), _modules(machine, ["torch", "triton"])),
        Stage(
            "ops",
            130,
            (Command("pytest", module("pytest", *_tests(machine), f"--junitxml={junit}"), junit=junit),),
            _modules(machine, ["pytest", "hypothesis", "safetensors"]),
        ),
        Stage(
            "bench",
            110,
            (
                Command("rollout", (*rollout, "--json", str(out / "rollout.json"), "--budget", "70")),
                Command("ops", (*module("gear_engine.cli", "bench", *bench), "--out", str(out / "ops-report.json"))),
                Command("decoder", (*module("gear_engine.cli", "bench", *decoder), "--out", str(out / "decoder.json"))),
            ),
        ),
        Stage(
            "ncu",
            45,
            (Command("kernels", (*profile, *rollout, "--profile"), tuple(PROFILED.values())),),
            lacks("ncu"),
        ),
        Stage(
            "sanitizer",
            60,
            tuple(
                Command(kind, (sanitizer, "--tool", kind, "--error-exitcode", "9", str(_PROGRAM)))
                for kind in SANITIZERS
            ),
            lacks("compute-sanitizer") + program,
        ),
        peers("LlamaGen-XL"),
        peers("LlamaGen-B"),
    ]
