"""All that has to be seen on a GPU, in one command under ten minutes: ``make gpu-test``, ``make gpu-peers``.

    python3 bench/gpu_test.py [--out FOLDER] [--goldens PATH] [--official PATH] [--budget S] [--dry-run] [STAGE ...]

Needs the standard library to start, no network and no virtual environment: it builds in place, for the architecture of
the GPU that it finds, against the python3 that runs it, and makes that Python find ``gear_engine.bench`` and
``gear_engine.triton_kernels`` by a folder on PYTHONPATH. Every stage (:mod:`gear_engine.bench.gpu_stages`) has a limit
of its own and writes ``FOLDER/STAGE.json`` when it is done: ``status`` is ``passed``, ``failed``, ``timed out`` or
``not run`` with the reason; ``FOLDER/log.txt`` has all that was printed. A tool that is missing is reported, and the
other stages run. The exit status is 0 if every stage passed or lacked a tool, 1 if one failed or timed out, 2 if there
is no GPU, so that nothing was shown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if __name__ == "__main__":  # a script beside that file; nothing is installed yet
    from gpu_stages import BUDGET, BUILD, ROOT, Command, Machine, Stage, plan
else:
    from gear_engine.bench.gpu_stages import BUDGET, BUILD, ROOT, Command, Machine, Stage, plan

_TAIL = 6000
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


def environment(
    machine: Machine, out: Path, architecture: str | None, goldens: Path | None, official: Path | None = None
) -> dict[str, str]:
    """What the stages' programs see."""
    path = out / "path"
    path.mkdir(parents=True, exist_ok=True)
    mapped = {name: str(ROOT / folder) for name, folder in _MAPPED.items()}
    (path / "sitecustomize.py").write_text(_HOOK.replace("{mapped!r}", repr(mapped)))
    found = dict(machine.environment)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), str(ROOT), found.get("PYTHONPATH"))))
    # Another compiler's new warnings are no reason to learn nothing.
    found |= {"GEAR_CUDA": "ON", "GEAR_GPU_SMOKE": "ON", "GEAR_WERROR": "OFF"}
    found |= {"GEAR_BUILD_DIR": str(BUILD), "PYTHONUNBUFFERED": "1"}
    if architecture is not None:
        found["GEAR_CUDA_ARCHS"] = architecture
    for name, folder in (("GEAR_GOLDENS", goldens), ("GEAR_OFFICIAL", official)):
        if folder is not None:
            # The programs start in another folder.
            found[name] = str(folder.absolute())
    compiler = machine.tool("nvcc")
    if compiler is not None:
        found.setdefault("CUDACXX", compiler)
    return found


def _tests_of(report: Path) -> dict[str, Any]:
    """What a test run's JUnit file says: how many tests passed, failed and were skipped, and why those were."""
    counts, reasons = {"passed": 0, "failed": 0, "skipped": 0}, Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        elif skipped is not None:
            counts["skipped"] += 1
            reasons[skipped.get("message") or ""] += 1
        else:
            counts["passed"] += 1
    return {**counts, "skip_reasons": dict(reasons.most_common())}


def run_command(command: Command, limit: float, env: dict[str, str], log: Path) -> dict[str, Any]:
    """Runs it with all its children, at most ``limit`` seconds, and adds what it prints to ``log``; never raises."""
    begin = time.monotonic()
    record: dict[str, Any] = {"name": command.name, "command": " ".join(command.words)}
    if command.junit is not None:
        command.junit.unlink(missing_ok=True)
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
    unseen = [pattern for pattern in command.shows if not re.search(pattern, output)]
    if unseen and status == "passed":
        status, output = "failed", f"{output}\nnothing is printed that matches {', '.join(unseen)}"
    if command.junit is not None:
        # A run that was ended has written none.
        record["tests"] = _tests_of(command.junit) if command.junit.exists() else None
    with log.open("a") as file:
        file.write(f"==== {record['command']}\n{output}\n==== {status}, {seconds} s\n")
    return {**record, "status": status, "exit": process.returncode, "seconds": seconds, "output": output[-_TAIL:]}


def run_stage(stage: Stage, limit: float, env: dict[str, str], log: Path) -> dict[str, Any]:
    """All commands of a stage, also after one that failed; the stage's limit is shared."""
    begin, results = time.monotonic(), []
    for command in stage.commands:
        left = limit - (time.monotonic() - begin)
        if left <= 0:
            results.append({"name": command.name, "status": "timed out", "seconds": 0.0, "output": "no time was left"})
            continue
        results.append(run_command(command, left, env, log))
    every = [result["status"] for result in results]
    status = next((bad for bad in ("failed", "timed out") if bad in every), "passed")
    return {"stage": stage.name, "status": status, "limit": limit, "results": results}


def _told(tests: dict[str, Any]) -> str:
    """Counts, and why tests were skipped: a test that was is no test that passed."""
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "skipped"))
    return "".join([counts, *(f"\n    {count} skipped: {why}" for why, count in tests["skip_reasons"].items())])


def _not_run(stage: Stage, reason: str) -> dict[str, Any]:
    commands = [" ".join(command.words) for command in stage.commands]
    return {"stage": stage.name, "status": "not run", "reason": reason, "commands": commands}


def main(arguments: Sequence[str] | None = None, machine: Machine | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="default: all but the peers")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-test" / "results")
    parser.add_argument("--goldens", type=Path, help="outputs of the official code (default: where the tests look)")
    parser.add_argument("--official", type=Path, help="checkout of the official code, for the peers and the op tests")
    parser.add_argument("--budget", type=float, help=f"seconds for all stages ({BUDGET}; peers alone: their limits)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    args = parser.parse_args(arguments)
    machine = machine or Machine()
    official = None if args.official is None else args.official.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    gpu = machine.gpu()
    stages = plan(machine, args.out, official)
    names = args.stages or [stage.name for stage in stages if not stage.asked]
    unknown = [name for name in names if name not in {stage.name for stage in stages}]
    if unknown:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(stage.name for stage in stages)}")
    env = environment(machine, args.out, gpu[1] if gpu else None, args.goldens, official)
    alone = {stage.name for stage in stages if stage.asked}.issuperset(names)
    budget = args.budget or (sum(stage.limit for stage in stages if stage.asked) if alone else BUDGET)
    begin, records, log = time.monotonic(), [], args.out / "log.txt"
    log.write_text("")
    print(f"GPU: {f'{gpu[0]} (sm_{gpu[1]})' if gpu else 'none'}; results in {args.out}", flush=True)
    for name in names:
        # Planned anew: the build leaves programs behind that later stages need.
        stage = next(stage for stage in plan(machine, args.out, official) if stage.name == name)
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
            record = run_stage(stage, min(stage.limit, left), env, log)
        record["seconds"] = round(time.monotonic() - begin - (budget - left), 2)
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        records.append(record)
        reason = f": {record['reason']}" if "reason" in record else ""
        print(f"{name}: {record['status']}{reason} ({record['seconds']:.0f} s)", flush=True)
        for result in record.get("results", []):
            if result.get("tests"):
                print(f"  {result['name']}: {_told(result['tests'])}", flush=True)
            if result["status"] != "passed":
                print(f"  {result['name']}: {result['status']}\n{result['output'][-1500:]}", flush=True)
    summary = {"gpu": gpu, "stages": {record["stage"]: record["status"] for record in records}}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if gpu is None and not args.dry_run:
        return 2
    return int(any(record["status"] in ("failed", "timed out") for record in records))


if __name__ == "__main__":
    sys.exit(main())
