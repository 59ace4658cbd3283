"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels then run in Triton's interpreter; it must be known before the first of them is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """Numbers that the official implementation returned: ``$GEAR_GOLDENS`` or ``shared/goldens`` near the checkout."""
    root = Path(__file__).resolve().parent.parent
    candidates = [root.parent / "shared" / "goldens", root / "shared" / "goldens"]
    if "GEAR_GOLDENS" in os.environ:
        candidates.insert(0, Path(os.environ["GEAR_GOLDENS"]))
    for path in candidates:
        if (path / "index.json").is_file():
            return path
    if os.environ.get("CI"):
        pytest.fail("goldens not found; CI must have them (set GEAR_GOLDENS)")
    pytest.skip("goldens not found; set GEAR_GOLDENS to their folder")


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads() -> None:
    """One thread: the models under test are tiny, and waking threads for them costs more than they save.

    Tests of what threads may not change set their own number.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
