"""A reader for the pickles in torch checkpoints that builds plain data and can do nothing else.

A pickle is a program for a stack machine. This one runs the instructions that build numbers, strings, lists,
dictionaries and references to stored tensors, and knows the few names that ``torch.save`` writes. It imports nothing,
calls nothing that a file names, builds no tensor (a reference keeps only where the bytes are and how they are shaped),
and keeps a budget: what it builds must be in proportion to the size of the file.

Source of the instruction set: CPython ``Lib/pickletools.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from gear_engine.checkpoint.pickle_names import CALLS, NAMES, NAMESPACE, Name, Namespace, refuse, set_item, storage_ref
from gear_engine.checkpoint.stored import OtherTensor, StoredTensor
from gear_engine.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["read_pickle"]

_MARK = object()
_U1, _U2, _U4, _U8 = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
#: Estimated bytes per Python object that an instruction leaves behind.
_COST = 128


class _Machine:
    def __init__(self, data: bytes, budget: int) -> None:
        self.data, self.position, self.budget = data, 0, budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    # -- input ---------------------------------------------------------------
    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise CheckpointError("truncated pickle")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise CheckpointError("damaged pickle: a name without an end")
        text = self.data[self.position : end]
        self.position = end + 1
        return text.decode("utf-8", errors="replace")

    def text(self, form: struct.Struct) -> str:
        raw = self.take(self.number(form))
        self.spend(4 * len(raw))
        try:
            return raw.decode("utf-8", errors="surrogatepass")
        except UnicodeDecodeError as error:
            raise CheckpointError("damaged pickle: a string is not UTF-8") from error

    def bytes(self, form: struct.Struct) -> bytes:
        raw = self.take(self.number(form))
        self.spend(len(raw))
        return raw

    # -- stack ---------------------------------------------------------------
    def spend(self, cost: int) -> None:
        self.budget -= cost
        if self.budget < 0:
            raise UnsafeCheckpointError("the file's pickle builds more objects than its size can justify")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise CheckpointError("damaged pickle: the stack runs empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise CheckpointError("damaged pickle: the stack runs empty")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                self.spend(8 * len(items))
                return items
        raise CheckpointError("damaged pickle: a mark is missing")

    def pop_tuple(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    # -- instructions ----------------------------------------------------------
    def name(self, path: str) -> Name:
        if path not in NAMES:
            refuse(path)
        return Name(path)

    def stack_name(self) -> Name:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError("damaged pickle: a name that is no string")
        return self.name(f"{module}.{name}")

    def call(self) -> Any:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise UnsafeCheckpointError("the file's pickle calls something that is no function")
        # What is called may copy its arguments, which the memo can repeat at two bytes a time.
        self.spend(sum(64 * len(arg) for arg in args if isinstance(arg, (list, tuple, dict, str, bytes))))
        if function.path == NAMESPACE and not args:
            return Namespace()
        if function.path not in CALLS:
            refuse(f"a call of {function.path}")
        try:
            return CALLS[function.path](*args)
        except TypeError as error:
            raise CheckpointError(f"damaged pickle: {function.path} with {len(args)} arguments") from error

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Namespace):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise CheckpointError("damaged pickle: a Namespace without named values")
            self.spend(64 * len(state))
            target.update(state)
        elif type(target) is not dict and not isinstance(target, (StoredTensor, OtherTensor)):
            raise UnsafeCheckpointError(f"the file's pickle sets the state of a {type(target).__name__}")
        # A state dict's own attribute (_metadata: module versions) and attributes of tensors are no weights.

    def append(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, list):
            raise CheckpointError("damaged pickle: items are added to something that is no list")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if len(items) % 2:
            raise CheckpointError("damaged pickle: a key without a value")
        self.spend(50 * len(items))
        for index in range(0, len(items), 2):
            set_item(target, items[index], items[index + 1])

    def remember(self, index: int) -> None:
        self.spend(_COST)
        self.memo[index] = self.top()

    def recall(self, index: int) -> Any:
        if index not in self.memo:
            raise CheckpointError("damaged pickle: an unknown memo entry")
        return self.memo[index]

    def run(self) -> Any:
        while True:
            code = self.take(1)
            if code == b".":
                break
            self.spend(_COST)
            if code in _PUSH:
                self.stack.append(_PUSH[code](self))
            elif code in _ACT:
                _ACT[code](self)
            else:
                raise UnsafeCheckpointError(
                    f"the file's pickle uses instruction {code!r}, which no state dict needs; nothing was run"
                )
        result = self.pop()
        if self.stack:
            raise CheckpointError("damaged pickle: it leaves several values")
        return result


def _long(machine: _Machine) -> int:
    raw = machine.take(machine.number(_U1))
    machine.spend(len(raw))
    return int.from_bytes(raw, "little", signed=True)


def _add_to_set(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.append(machine.top(), items)


def _append_one(machine: _Machine) -> None:
    item = machine.pop()
    machine.append(machine.top(), [item])


def _append_many(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.append(machine.top(), items)


def _set_one(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


#: Instructions that leave one value on the stack.
_PUSH: dict[bytes, Callable[[_Machine], Any]] = {
    b"(": lambda m: _MARK,
    b"N": lambda m: None,
    b"\x88": lambda m: True,
    b"\x89": lambda m: False,
    b"J": lambda m: m.number(_I4),
    b"K": lambda m: m.number(_U1),
    b"M": lambda m: m.number(_U2),
    b"\x8a": _long,
    b"G": lambda m: m.number(_F8),
    b"X": lambda m: m.text(_U4),
    b"\x8c": lambda m: m.text(_U1),
    b"\x8d": lambda m: m.text(_U8),
    b"C": lambda m: m.bytes(_U1),
    b"B": lambda m: m.bytes(_U4),
    b"\x8e": lambda m: m.bytes(_U8),
    b"U": lambda m: m.bytes(_U1).decode("latin1"),
    b"T": lambda m: m.bytes(_U4).decode("latin1"),
    b")": lambda m: (),
    b"t": lambda m: tuple(m.pop_mark()),
    b"\x85": lambda m: m.pop_tuple(1),
    b"\x86": lambda m: m.pop_tuple(2),
    b"\x87": lambda m: m.pop_tuple(3),
    b"]": lambda m: [],
    b"}": lambda m: {},
    b"\x8f": lambda m: [],
    b"h": lambda m: m.recall(m.number(_U1)),
    b"j": lambda m: m.recall(m.number(_U4)),
    b"c": lambda m: m.name(f"{m.line()}.{m.line()}"),
    b"\x93": lambda m: m.stack_name(),
    b"R": lambda m: m.call(),
    b"\x81": lambda m: m.call(),
    b"Q": lambda m: storage_ref(m.pop()),
}
#: Instructions that change something.
_ACT: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
    b"0": lambda m: m.pop(),
    b"1": lambda m: m.pop_mark(),
    b"a": _append_one,
    b"e": _append_many,
    b"\x90": _add_to_set,
    b"s": _set_one,
    b"u": lambda m: m.set_items(m.pop_mark()),
    b"b": lambda m: m.build(),
    b"q": lambda m: m.remember(m.number(_U1)),
    b"r": lambda m: m.remember(m.number(_U4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
}


def read_pickle(data: bytes, budget: int) -> Any:
    """The plain data that a pickle describes.

    Args:
        data: the pickle, protocol 2 to 5.
        budget: how many bytes of Python objects it may build.

    Returns:
        Dictionaries, lists, tuples, strings, numbers, :class:`StoredTensor`, :class:`OtherTensor`; an
        ``argparse.Namespace`` becomes a dictionary.

    Raises:
        UnsafeCheckpointError: it names or calls something else, or exceeds the budget.
        CheckpointError: damaged.
    """
    return _Machine(data, budget).run()
