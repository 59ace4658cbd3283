"""What the drop-in functions keep between calls does not pass from test to test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gear_engine import compat


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    compat.release()
