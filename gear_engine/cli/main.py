"""``gear-engine COMMAND``: parses, runs, and turns errors and signals into messages and exit statuses.

Exit statuses: 0 done; 1 stopped by something outside the request (a full disk, a lost process); 2 refused: the request
is at fault and nothing was written; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, ModuleType
from typing import NoReturn

from gear_engine.errors import GearError, NumericalError, WorkerLostError

__all__ = ["COMMANDS", "build_parser", "main"]

#: Command name -> the module that has ``add_parser(subparsers)`` and ``run(args) -> int``.
COMMANDS = {
    "sample": "gear_engine.cli.sample",
    "sample-t2i": "gear_engine.cli.sample_t2i",
    "reconstruct": "gear_engine.cli.reconstruct",
    "train": "gear_engine.cli.train",
    "convert": "gear_engine.cli.convert",
    "demo": "gear_engine.cli.demo",
    "info": "gear_engine.cli.info",
    "bench": "gear_engine.cli.bench",
    "report": "gear_engine.cli.report",
}

DONE, STOPPED, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_RESUME = "Finished work is kept: run the same command again to go on"


class _Terminated(BaseException):
    """SIGTERM came."""


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The parser of all commands and the commands' modules by name; imports no torch."""
    parser = argparse.ArgumentParser(
        prog="gear-engine", description="GEAR and LlamaGen image models: inference, training."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(path) for name, path in COMMANDS.items()}
    for module in modules.values():
        module.add_parser(subparsers)
    return parser, modules


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser, modules = build_parser()
    args = parser.parse_args(argv)
    command = f"gear-engine {args.command}"
    try:
        with _sigterm_raises():
            status: int = modules[args.command].run(args)
            return status
    except (WorkerLostError, NumericalError) as error:
        return _say(command, str(error), STOPPED)
    except GearError as error:
        return _say(command, f"error: {error}", REFUSED)
    except KeyboardInterrupt:
        return _say(command, f"interrupted. {_RESUME}", INTERRUPTED)
    except _Terminated:
        return _say(command, f"terminated. {_RESUME}", TERMINATED)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _say(command, f"no space left to write to ({error}). Free some. {_RESUME}", STOPPED)
        return _say(command, f"stopped: {error}. {_RESUME}", STOPPED)
    except (MemoryError, RuntimeError) as error:
        # Memory that was free when the run was planned has gone since.
        if not _is_out_of_memory(error):
            raise
        first_line = (str(error) or "the system gave no more").splitlines()[0]
        return _say(command, f"out of memory: {first_line}. Ask for smaller batches. {_RESUME}", STOPPED)


def _is_out_of_memory(error: BaseException) -> bool:
    """Also torch's errors: an accelerator's by its name (torch is not imported here), a CPU's by its message."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _say(command: str, message: str, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(f"{command}{'' if rank == '0' else f' (process {rank})'}: {message}", file=sys.stderr, flush=True)
    return status


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM unwinds the stack as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
