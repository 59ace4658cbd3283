"""Numbers that belong to an image of a run, whatever process or batch draws it."""

from __future__ import annotations

__all__ = ["image_label", "image_seed"]

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _stream(run_seed: int, purpose: int, index: int) -> int:
    start = _mix((run_seed + _GOLDEN * (purpose + 1)) & _MASK)
    return _mix((start + _GOLDEN * (index + 1)) & _MASK)


def image_seed(run_seed: int, index: int) -> int:
    """The Philox key, in [0, 2**63), of image ``index`` of a run."""
    return _stream(run_seed, 0, index) >> 1


def image_label(run_seed: int, index: int, num_classes: int) -> int:
    """The label of image ``index``, uniform over ``num_classes`` (the excess of any label is below 2**-50)."""
    return (_stream(run_seed, 1, index) * num_classes) >> 64
