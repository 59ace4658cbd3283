"""Where the weights lie in each published checkpoint, and under which names: the only place that renames keys.

+-----------------------------------+------------------------------------------------------------------------+
| origin                            | sections                                                               |
+===================================+========================================================================+
| GEAR stage 0, 1, 2, published     | ``ar``, ``ema`` (generator), ``vq``, ``vq_ema`` (tokenizer), ``args``  |
| LlamaGen                          | ``model``, ``module`` or ``state_dict`` [, ``ema``, ``args``], or bare |
| TencentARC IBQ, Open-MAGVIT2      | ``state_dict`` with live keys and ``model_ema.<key without dots>``     |
+-----------------------------------+------------------------------------------------------------------------+

Any key may have ``_orig_mod.`` in it (torch.compile). Source: GEAR ``src/inference.py`` and ``src/utils.py``
(``load_pretrained_tokenizer_state_dict``), LlamaGen ``autoregressive/sample/sample_c2i.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gear_engine.checkpoint.stored import StoredTensor
from gear_engine.errors import CheckpointError

__all__ = ["Kind", "StateDict", "Weights", "contains", "find_weights", "saved_args"]

Kind = Literal["generator", "tokenizer"]
StateDict = dict[str, StoredTensor]

_PREFIXES: dict[Kind, tuple[str, ...]] = {
    "generator": ("layers.", "tok_embeddings.", "cls_embedding.", "output."),
    "tokenizer": ("encoder.", "decoder.", "quantize."),
}
#: Section names of live and EMA weights, most specific first.
_LIVE: dict[Kind, tuple[str, ...]] = {
    "generator": ("ar", "model", "module", "state_dict"),
    "tokenizer": ("vq", "model", "module", "state_dict"),
}
_EMA: dict[Kind, tuple[str, ...]] = {"generator": ("ema",), "tokenizer": ("vq_ema", "ema")}
#: Keys in published files that are no weights: sampling caches, usage statistics, losses, the EMA's own bookkeeping.
_LEFTOVERS = re.compile(
    r"layers\.\d+\.attention\.kv_cache\..+|quantize\.codebook_used|loss\..+|model_ema\.(decay|num_updates)"
)
_SHADOW = "model_ema."


@dataclass(frozen=True)
class Weights:
    """One model's weights as they lie in a file, under the official keys.

    Attributes:
        state: key -> stored tensor.
        section: where they were: ``"ema"``, ``"vq_ema"``, ``"state_dict"`` … or ``"the file itself"``.
        is_ema: exponential moving average or live weights.
        note: what a user should know about the choice, or "".
    """

    state: StateDict
    section: str
    is_ema: bool
    note: str = ""


def saved_args(root: Any) -> dict[str, Any]:
    """The training program's arguments, or {} where the file has none."""
    args = root.get("args") if isinstance(root, dict) else None
    if args is None:
        return {}
    if not isinstance(args, dict):
        raise CheckpointError(f"'args' is a {type(args).__name__}, not a dictionary or Namespace")
    return {key: value for key, value in args.items() if isinstance(key, str)}


def contains(root: Any, kind: Kind) -> bool:
    """Whether the file holds weights of this kind at all."""
    return isinstance(root, dict) and bool(_sections(root, kind))


def find_weights(root: Any, kind: Kind, *, ema: bool) -> Weights:
    """The generator's or the tokenizer's weights.

    Args:
        root: what the file holds.
        kind: ``"generator"`` or ``"tokenizer"``.
        ema: EMA weights if there are any, else live ones (the official choice); False: live ones.

    Raises:
        CheckpointError: no weights of this kind, EMA only while live ones are asked for, or keys that do not fit.
    """
    if not isinstance(root, dict):
        raise CheckpointError(f"holds a {type(root).__name__}, not a dictionary of weights")
    sections = _sections(root, kind)
    if not sections:
        raise CheckpointError(_explain_absence(root, kind))
    averaged = [name for name in _EMA[kind] if name in sections]
    live = [name for name in (*_LIVE[kind], "") if name in sections]
    name = (averaged + live)[0] if ema else [*live, ""][0]
    if name not in sections:
        raise CheckpointError(f"has EMA weights of the {kind} only ({averaged[0]!r}), no live ones; ask for EMA")
    is_ema = name in averaged
    where = name or "the file itself"
    state = sections[name]
    if any(key.startswith(_SHADOW) for key in state):
        state, is_ema = _split_shadows(state, kind, ema=ema), ema
        where += " (model_ema shadows)" if ema else " (live keys)"
    state = {key: value for key, value in state.items() if not _LEFTOVERS.fullmatch(key)}
    note = "no EMA weights in the file: live ones are used" if ema and not is_ema else ""
    return Weights(_only_tensors(state), where, is_ema, note)


def _sections(root: Mapping[Any, Any], kind: Kind) -> dict[str, dict[str, Any]]:
    """Section name -> its keys without ``_orig_mod.``; "" is the file itself (a bare state dict)."""
    own = {"generator": {"ar"}, "tokenizer": {"vq", "vq_ema"}}[kind]
    if kind == "generator" and "ar" in root:
        own = {"ar", "ema"}
    found = {}
    for name in (*_LIVE[kind], *_EMA[kind]):
        section = root.get(name)
        if isinstance(section, dict) and section:
            state = _without_compile_prefix(section)
            if name in own or _looks_like(state, kind):
                found[name] = state
    if not found and any(isinstance(value, StoredTensor) for value in root.values()):
        state = _without_compile_prefix(root)
        if _looks_like(state, kind):
            found[""] = state
    return found


def _looks_like(state: Mapping[str, Any], kind: Kind) -> bool:
    return any(key.startswith(_PREFIXES[kind]) for key in state)


def _without_compile_prefix(section: Mapping[Any, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in section.items():
        if not isinstance(key, str):
            raise CheckpointError(f"a state dict with a key that is no string: a {type(key).__name__}")
        name = ".".join(part for part in key.split(".") if part != "_orig_mod")
        if name in out:
            raise CheckpointError(f"two tensors are called {name!r} once '_orig_mod.' is removed")
        out[name] = value
    return out


def _split_shadows(state: Mapping[str, Any], kind: Kind, *, ema: bool) -> dict[str, Any]:
    """Lightning's state dict: live keys, or the shadows ``model_ema.<key without dots>`` under the live keys' names."""
    live = {key: value for key, value in state.items() if not key.startswith(_SHADOW)}
    if not ema:
        return live
    names: dict[str, str] = {}
    for key in live:
        if names.setdefault(key.replace(".", ""), key) != key:
            raise CheckpointError(f"keys {key!r} and {names[key.replace('.', '')]!r} differ in their dots only")
    averaged: dict[str, Any] = {}
    for key, value in state.items():
        if not key.startswith(_SHADOW) or _LEFTOVERS.fullmatch(key):
            continue
        # A shadow made after torch.compile has the prefix within, without its dot.
        name = names.get(key.removeprefix(_SHADOW).replace("_orig_mod", ""))
        if name is None:
            raise CheckpointError(f"EMA tensor {key!r} belongs to no live tensor of the {kind}")
        averaged[name] = value
    for key in live:
        if key not in averaged and not _LEFTOVERS.fullmatch(key):
            raise CheckpointError(
                f"tensor {key!r} has no EMA shadow while others have; ask for live weights (ema=False)"
            )
    return averaged


def _only_tensors(state: Mapping[str, Any]) -> StateDict:
    out: StateDict = {}
    for key, value in state.items():
        if not isinstance(value, StoredTensor):
            kind = getattr(value, "kind", type(value).__name__)
            raise CheckpointError(f"{key!r} is not a plain tensor but a {kind}")
        if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
            raise CheckpointError(
                f"{key!r} holds {value.dtype} numbers; weights are float32, bfloat16, float16, float64"
            )
        out[key] = value
    return out


def _explain_absence(root: Mapping[Any, Any], kind: Kind) -> str:
    other: Kind = "tokenizer" if kind == "generator" else "generator"
    names = ", ".join(repr(name)[:60] for name in list(root)[:8] if isinstance(name, str))
    if _sections(root, other):
        return f"holds a {other} but no {kind} (its entries: {names})"
    return f"holds no {kind} under any known name (its entries: {names or 'none'})"
