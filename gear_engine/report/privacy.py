"""Keeps user names, host names and paths out of reports, which people publish."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from collections.abc import Iterator
from typing import Any

from gear_engine.errors import ReportError

__all__ = ["check_private", "leaves", "scrub"]

#: An absolute or home-relative path of at least two components, POSIX or Windows.
_PATH = re.compile(r"(?<![\w/.:<])(?:~|[A-Za-z]:\\|/(?=[\w.~-]+/))[^\s'\",;:)\]]*")
#: Names that say nothing about anybody and are ordinary words of error messages.
_COMMON = frozenset(
    {"root", "user", "localhost", "runner", "ubuntu", "admin", "python", "torch", "cuda", "main", "test"}
)


def _names() -> dict[str, str]:
    """Word that must not appear -> what stands for it."""
    found = {}
    with contextlib.suppress(KeyError, OSError):  # a process without an entry in the user database has no name to hide
        found[getpass.getuser()] = "USER"
    host = socket.gethostname()
    for name in (host, host.split(".")[0]):  # the longer one is replaced first
        found[name] = "HOST"
    return {name: word for name, word in found.items() if len(name) >= 3 and name.lower() not in _COMMON}


def scrub(text: str) -> str:
    """``text`` with paths replaced by PATH, this machine's name by HOST and the user's by USER."""
    text = _PATH.sub("PATH", text)
    for name, word in _names().items():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
    return text


def leaves(value: Any, where: str = "report") -> Iterator[tuple[str, Any]]:
    """(place, value) of every key, text and number in a record."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{where}.{key}", str(key)
            yield from leaves(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{where}[{index}]")
    else:
        yield where, value


def check_private(record: dict[str, Any]) -> None:
    """Refuses a record that holds a path, this machine's name or the user's.

    Raises:
        ReportError: names the field, not its content.
    """
    for where, text in leaves(record):
        if isinstance(text, str) and scrub(text) != text:
            raise ReportError(f"{where} holds a path, a host name or a user name; reports must hold none")
