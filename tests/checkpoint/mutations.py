"""Ways in which a checkpoint can be wrong, by accident or on purpose. Every mutation is a function of a seeded rng.

A mutation returns the bytes of a file. ``SENTINEL`` is what a payload would create if it ever ran.
"""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from gear_engine.config import GeneratorConfig
from tests.checkpoint.files import generator_state

TINY = GeneratorConfig(dim=8, n_layer=2, n_head=2, ffn_dim=8, vocab_size=8, num_classes=3, block_size=4)
ARGS = {"image_size": 32, "downsample_ratio": 16, "num_classes": 3, "codebook_size": 8, "exp_name": "tiny"}
SENTINEL = "gear_engine_fuzz_payload_ran"
Rng = random.Random


def tiny_root() -> dict[str, Any]:
    live, averaged = generator_state(TINY, 1.0), generator_state(TINY)
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]}
    return {"ar": live, "ema": averaged, "opt": optimizer, "args": dict(ARGS), "steps": 3}


def saved(root: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(root, buffer)
    return buffer.getvalue()


BASE = saved(tiny_root())
with zipfile.ZipFile(io.BytesIO(BASE)) as _archive:
    RECORDS = {info.filename: _archive.read(info) for info in _archive.infolist()}
PICKLE = next(name for name in RECORDS if name.endswith("data.pkl"))
DIRECTORY = BASE.index(b"PK\x01\x02")


def packed(records: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """The records as a zip file whose sizes and checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in records.items() if isinstance(records, dict) else records:
            archive.writestr(name, data)
    return buffer.getvalue()


def with_pickle(data: bytes) -> bytes:
    return packed({**RECORDS, PICKLE: data})


# -- bytes of the file ---------------------------------------------------------
def flip(rng: Rng, data: bytes, first: int = 0) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        out[rng.randrange(first, len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def disturb(rng: Rng, data: bytes) -> bytes:
    """Bytes lost, zeroed, doubled, exchanged or inserted."""
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    b = min(b, a + rng.choice((1, 4, 64, 4096)))
    return rng.choice(
        (
            data[:a],
            data[:a] + data[b:],
            data[:a] + bytes(b - a) + data[b:],
            data[:b] + data[a:b] + data[b:],
            data[b:] + data[:a],
            data[:a] + rng.randbytes(b - a) + data[b:],
            data[:a] + rng.randbytes(8) + data[a:],
        )
    )


def file_bytes(rng: Rng) -> bytes:
    return flip(rng, BASE) if rng.random() < 0.6 else disturb(rng, BASE)


def directory_bytes(rng: Rng) -> bytes:
    """The zip directory: flips, and fields that claim a great deal."""
    if rng.random() < 0.5:
        return flip(rng, BASE, DIRECTORY)
    out = bytearray(BASE)
    at = rng.randrange(DIRECTORY, len(out) - 8)
    out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", struct.pack("<I", len(out))))
    return bytes(out)


# -- records ---------------------------------------------------------------------
def records(rng: Rng) -> bytes:
    names = list(RECORDS)
    name = rng.choice(names)
    folder = PICKLE.partition("/")[0]
    changed = dict(RECORDS)
    kind = rng.randrange(7)
    if kind == 0:
        del changed[name]
    elif kind == 1:
        changed[name] = disturb(rng, changed[name] + b"x")
    elif kind == 2:
        return packed(changed, zipfile.ZIP_DEFLATED)
    elif kind == 3:
        return packed([*changed.items(), (name, changed[name])])
    elif kind == 4:
        changed[f"{folder}/{rng.choice(('code/x.py', 'evil.pkl', 'data/999', '../x', 'constants.pkl'))}"] = payload(rng)
    elif kind == 5:
        other = rng.choice(names)
        changed[name], changed[other] = changed[other], changed[name]
    else:
        return packed({(key if key != name else f"other/{key}"): value for key, value in changed.items()})
    return packed(changed)


# -- the pickle ------------------------------------------------------------------
def payload(rng: Rng) -> bytes:
    """A pickle that would create SENTINEL if anything ran it."""
    command = f"touch {SENTINEL}"
    calls = (
        ("os", "system", command),
        ("posix", "system", command),
        ("subprocess", "Popen", ["touch", SENTINEL]),
        ("builtins", "eval", f"open({SENTINEL!r}, 'w')"),
        ("builtins", "exec", f"open({SENTINEL!r}, 'w')"),
        ("builtins", "open", SENTINEL),
        ("builtins", "getattr", "x"),
        ("torch", "load", SENTINEL),
        ("torch.serialization", "load", SENTINEL),
        ("numpy", "load", SENTINEL),
        ("argparse", "FileType", "w"),
        ("pathlib", "Path", SENTINEL),
    )
    module, name, argument = rng.choice(calls)
    head = f"c{module}\n{name}\n".encode() if rng.random() < 0.5 else _stack_name(module, name)
    return head + pickle.dumps(argument, 2)[2:-1] + b"\x85R"


def _stack_name(module: str, name: str) -> bytes:
    parts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return b"".join(parts) + b"\x93"


def pickle_bytes(rng: Rng) -> bytes:
    data = RECORDS[PICKLE]
    kind = rng.randrange(4)
    if kind == 0:
        return with_pickle(flip(rng, data))
    if kind == 1:
        return with_pickle(disturb(rng, data))
    at = rng.randrange(2, len(data))
    inserted = payload(rng) + rng.choice((b"", b"0", b".")) if kind == 2 else bytes(rng.choices(_OPCODES, k=3))
    return with_pickle(data[:at] + inserted + data[at:])


_OPCODES = (
    b"(.012FIJKLMNPQRSTUVXabcdeghijlopqrstu}]).\x80\x81\x82\x83\x85\x86\x87\x88\x8a\x8b\x8c\x8e\x8f\x93\x94\x95\x96"
)


def pickle_bombs(rng: Rng) -> bytes:
    """Short pickles that describe something enormous, deep, or endless."""
    count = rng.choice((1000, 20_000, 100_000))
    bombs: tuple[Callable[[], bytes], ...] = (
        lambda: b"(" * count,
        lambda: b"]" * count + b"a" * (count - 1),
        lambda: b"}" + b"K\x01" * 2 + b"s" * count,
        lambda: b")" + b"\x85" * count + b"}" + b"q\0",
        lambda: b"}" + b")" + b"\x85" * count + b"K\x01s",
        lambda: b"]q\0" + b"h\0" * count + b"t",
        lambda: b"]q\0" + b"(h\0h\0h\0h\0eq\0" * 40,
        lambda: b"]q\0(" + b"K\x01" * (count // 10) + b"eq\0" + b"ctorch\nSize\nh\0\x85R" * (count // 100),
        lambda: b"\x8e" + struct.pack("<Q", 2 ** rng.randrange(20, 63)),
        lambda: b"X" + struct.pack("<I", 2**32 - 1),
        lambda: b"\x8b" + struct.pack("<i", 2**31 - 1),
        lambda: b"Nr" + struct.pack("<I", 2**32 - 1),
        lambda: b"\x8a\xff" + b"\x7f" * 255,
        lambda: b"}" * count,
        lambda: b"N0" * count + b"N",
        lambda: b"X" + struct.pack("<I", count) + b"a" * count + b"q\0" + b"h\0" * 1000,
    )
    return with_pickle(b"\x80\x02" + rng.choice(bombs)() + b".")


def pickle_numbers(rng: Rng) -> bytes:
    """Sizes, strides, offsets and storages that are not what the file holds."""
    root = tiny_root()
    state = root["ema"]
    name = rng.choice([name for name in state if state[name].dim() == 2])
    marker = 71 + rng.randrange(20)
    state[name] = torch.zeros(1, marker)
    data = saved(root)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = {info.filename: archive.read(info) for info in archive.infolist()}
    path = next(key for key in found if key.endswith("data.pkl"))
    huge = rng.choice((2**31 - 1, 2**40, 2**62, 2**63, -1, 0, 2**200))
    size = (
        b"\x8a"
        + bytes([(huge.bit_length() + 8) // 8])
        + huge.to_bytes((huge.bit_length() + 8) // 8, "little", signed=True)
    )
    parts = found[path].split(b"K" + bytes([marker]))
    chosen = rng.randrange(1, 2 ** (len(parts) - 1))
    out = parts[0]
    for index, part in enumerate(parts[1:]):
        out += (size if chosen >> index & 1 else b"K" + bytes([marker])) + part
    return packed({**found, path: out})
