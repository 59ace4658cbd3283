"""The process that reads a checkpoint for conversion: it leaves the network before it imports anything of ours.

Run as a script with ``{"path": sys.path, "job": …}`` on standard input; prints one line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SOCKET_EVENTS = ("socket.__new__", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")


def leave_network() -> str:
    """``"none"`` after moving to an empty network namespace, ``"guarded"`` where the system permits none.

    In both cases a hook that cannot be removed refuses every socket inside the interpreter.
    """
    sys.addaudithook(_refuse_sockets)
    if not sys.platform.startswith("linux"):
        return "guarded"
    libc = ctypes.CDLL(None, use_errno=True)
    # Alone it needs privileges; with a user namespace of its own, none. That one needs a process of one thread, so
    # this runs before numpy or torch are imported.
    for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET):
        if libc.unshare(flags) == 0:
            return "none"
    return "guarded"


def _refuse_sockets(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _SOCKET_EVENTS:
        raise PermissionError("the process that reads a checkpoint may not use the network")


def main() -> None:
    message = json.loads(sys.stdin.read())
    network = leave_network()
    sys.path[:] = message["path"]
    # Whatever an import prints must not mix with the answer.
    answer_to, sys.stdout = sys.stdout, sys.stderr
    from gear_engine.checkpoint.conversion import run_job
    from gear_engine.errors import GearError

    try:
        answer: dict[str, Any] = {"result": {**run_job(message["job"]), "network": network}}
    except GearError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        answer = {"errno": error.errno, "message": error.strerror or str(error)}
    answer_to.write("\n" + json.dumps(answer))
    answer_to.flush()


if __name__ == "__main__":
    main()
