"""Mutations of what is saved: contents, safetensors files, Lightning files; and how many of each the fuzzer draws."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch

from tests.checkpoint import files
from tests.checkpoint.files import LFQ, generator_state, tokenizer_state
from tests.checkpoint.mutations import (
    ARGS,
    TINY,
    Rng,
    directory_bytes,
    disturb,
    file_bytes,
    flip,
    pickle_bombs,
    pickle_bytes,
    pickle_numbers,
    records,
    saved,
    tiny_root,
)


# -- what is saved -----------------------------------------------------------------
def content(rng: Rng) -> bytes:
    root = tiny_root()
    if rng.random() < 0.1:
        del root["ar"], root["args"]
    state: dict[str, Any] = root["ema"]
    name, other = rng.sample(list(state), 2)
    tensor = state[name]
    kind = rng.randrange(17)
    if kind == 0:
        state[rng.choice((name + "x", "x." + name, "_orig_mod." + other, name.upper(), ""))] = state.pop(name)
    elif kind == 1:
        del state[name]
    elif kind == 2:
        state[name], state[other] = state[other], state[name]
    elif kind == 3:
        state[name] = tensor.t().contiguous() if tensor.dim() == 2 else tensor[:-1].clone()
    elif kind == 4:
        state[name] = tensor.clone()
        state[name].view(-1)[rng.randrange(tensor.numel())] = rng.choice((torch.nan, torch.inf, -torch.inf))
    elif kind == 5:
        state[name] = tensor[:1].expand_as(tensor) if tensor.dim() == 2 else tensor[:1].expand(8)
    elif kind == 6:
        state[name] = rng.choice((tensor.to_sparse, tensor.int, tensor.bool, tensor.cfloat, tensor.half))()
    elif kind == 7:
        state[name] = rng.choice((None, 3, "text", [tensor], {"a": tensor}, tensor[:0], tensor.to("meta")))
    elif kind == 8:
        state[name] = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
    elif kind == 9:
        shared = torch.randn(4096)
        state[name] = shared[rng.randrange(9) :].as_strided(tensor.shape, tensor.stride())
        state[other] = shared[rng.randrange(9) :].as_strided(state[other].shape, state[other].stride())
    elif kind == 10:
        root.setdefault("args", dict(ARGS))[rng.choice(list(ARGS))] = rng.choice(
            (-1, 0, 7, 2**70, "x", [1], None, float("nan"), {"a": 1}, True)
        )
    elif kind == 11:
        root["args"] = rng.choice((None, [], "x", 3, {"ar_model": "LlamaGen-B"}, {"ar_model": 7}, {1: 2}))
    elif kind == 12:
        deep: Any = tensor
        for _ in range(rng.choice((3, 90))):
            deep = {"state_dict": deep}
        root = deep
    elif kind == 13:
        root = rng.choice(({}, [], tensor, {"model": {}}, {"ema": [1]}, {1: tensor}, {"state_dict": state, "x": 1}))
    elif kind == 14:
        state |= {f"layers.{rng.choice((7, 10**9))}.attention.wqkv.weight": tensor}
    elif kind == 15:
        root["ema"] = {"_orig_mod." * rng.randrange(3) + key: value for key, value in state.items()}
    else:
        root["ema"] = copy.deepcopy(root["ema"]) | {rng.choice((b"k", 3, 2.5, None, True)): tensor}
    return saved(root)


# -- safetensors -----------------------------------------------------------------
SAFE_BASE = safetensors.torch.save(generator_state(TINY))


def safe(rng: Rng) -> bytes:
    length = struct.unpack_from("<Q", SAFE_BASE)[0]
    kind = rng.randrange(5)
    if kind == 0:
        return flip(rng, SAFE_BASE[: 8 + length]) + SAFE_BASE[8 + length :]
    if kind == 1:
        return disturb(rng, SAFE_BASE)
    if kind == 2:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**27, 2**40, 2**64 - 1))) + SAFE_BASE[8:]
    if kind == 3:
        nested = b"{" + b'"a":' + b"[" * rng.choice((10, 10_000)) + b"}"
        return struct.pack("<Q", len(nested)) + nested
    header = json.loads(SAFE_BASE[8 : 8 + length])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(
        ("F64", "F8_E4M3", "X", [2**62, 2**62], [0, 2**63], [-1], [], 7, None)
    )
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + SAFE_BASE[8 + length :]


# -- a Lightning file with a tokenizer ------------------------------------------------
TOKENIZER_STATE = {
    name: tensor.half() for name, tensor in tokenizer_state(LFQ.replace(ch_mult=(1,), downsample=1)).items()
}


def lightning_root() -> dict[str, Any]:
    live = {name: tensor + 1 for name, tensor in TOKENIZER_STATE.items()}
    root = files.lightning(live, TOKENIZER_STATE)
    del root["optimizer_states"]
    return root


LIGHTNING = saved(lightning_root())


def lightning(rng: Rng) -> bytes:
    if rng.random() < 0.5:
        return flip(rng, LIGHTNING) if rng.random() < 0.5 else disturb(rng, LIGHTNING)
    root = lightning_root()
    state = root["state_dict"]
    name, other = rng.sample(list(state), 2)
    kind = rng.randrange(5)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state[name], state[other] = state[other], state[name]
    elif kind == 2:
        state[name.replace(".", "", 1)] = state.pop(name)
    elif kind == 3:
        state["model_ema." + other] = state[other]
    else:
        state[name] = state[name].new_full((rng.choice((1, 2, 32)),), 0.5)
    return saved(root)


#: Mutation -> how many of 10,000.
MUTATIONS: dict[Callable[[Rng], bytes], int] = {
    file_bytes: 3400,
    directory_bytes: 900,
    records: 600,
    pickle_bytes: 2500,
    pickle_bombs: 300,
    pickle_numbers: 500,
    content: 1100,
    safe: 500,
    lightning: 200,
}
