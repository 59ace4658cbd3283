"""What every command shares: a quick start, short messages, exit statuses."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gear_engine.cli import main as cli
from gear_engine.errors import InvalidRequestError, OutOfMemoryError, WorkerLostError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], int]:
    """Runs a command whose work is the given function."""

    def run(work: Callable[[], int]) -> int:
        command = types.ModuleType("gear_engine.cli.fake")
        command.add_parser = lambda subparsers: subparsers.add_parser("fake")  # type: ignore[attr-defined]
        command.run = lambda args: work()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gear_engine.cli.fake", command)
        monkeypatch.setattr(cli, "COMMANDS", {"fake": "gear_engine.cli.fake"})
        return cli.main(["fake"])

    return run


def raising(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InvalidRequestError("top_p is wrong"), 2, "error: top_p is wrong"),
        (OutOfMemoryError("does not fit"), 2, "error: does not fit"),
        (WorkerLostError("lost"), 1, "lost"),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.png"), 1, "no space left"),
        (PermissionError(errno.EACCES, "denied", "a.png"), 1, "denied"),
        (MemoryError(), 1, "out of memory: the system gave no more. Ask for smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nSecond line"), 1, "Tried 2 GiB"),
        (RuntimeError("x: DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "out of memory: x"),
    ],
)
def test_errors_become_messages(
    run_failing: Callable[[Callable[[], int]], int],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    assert run_failing(raising(error)) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes do not match")])
def test_a_programming_error_is_not_hidden(run_failing: Callable[[Callable[[], int]], int], error: Exception) -> None:
    with pytest.raises(type(error)):
        run_failing(raising(error))


def test_sigterm_unwinds_and_the_handler_is_put_back(
    run_failing: Callable[[Callable[[], int]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    unwound = []

    def work() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            unwound.append(True)
        return 0

    assert run_failing(work) == 143
    assert unwound
    assert "terminated" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from gear_engine.cli.main import build_parser\n"
        "parser, _ = build_parser()\n"
        "assert 'sample-t2i' in parser.format_help()\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cpu_draws_without_triton(tmp_path: Path) -> None:
    """Neither the package nor a run loads Triton, nor torch's compiler, which loads it."""
    code = (
        "import sys\n"
        "import gear_engine\n"
        "print(sorted({'torch', 'numpy', 'triton'} & set(sys.modules)))\n"
        "from gear_engine.cli.main import main\n"
        "from gear_engine.pretrained import SHAPES\n"
        "words = ['sample', '--ckpt-path', str(SHAPES), '--output-dir', sys.argv[1], '--fid-num', '1']\n"
        "assert main([*words, '--image-size-eval', '64', '--device', 'cpu', '--per-proc-batch-size', '1']) == 0\n"
        "gear_engine.Pipeline.from_pretrained(SHAPES)(class_labels=[6], seeds=[1])\n"
        "print(sorted({'torch', 'triton', 'torch._dynamo'} & set(sys.modules)))\n"
    )
    # The variable makes Triton's kernels run on a CPU, for the tests alone.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "['torch']")
    assert list(tmp_path.rglob("samples.npz"))


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"gear-engine {command}" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["paint"], ["sample"], ["sample", "--ckpt-path", "a", "--output-dir"]])
def test_unknown_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err
