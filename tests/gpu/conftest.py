"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def without_tf32() -> Iterator[None]:
    """Products of fp32 in fp32. By hand: these settings are no attributes that monkeypatch could put back."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    kept = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    yield
    for place, value in zip(places, kept, strict=True):
        place.allow_tf32 = value
