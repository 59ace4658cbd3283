"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a failure is the change's; HYPOTHESIS_PROFILE=exploring looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("exploring")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

if not torch.cuda.is_available():
    # Triton kernels then run in Triton's interpreter; it must be known before the first of them is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def goldens_dir() -> Path:
    """Numbers that the official implementation returned; ``$GEAR_GOLDENS`` names another set."""
    path = Path(os.environ.get("GEAR_GOLDENS", Path(__file__).resolve().parent / "goldens"))
    assert (path / "index.json").is_file(), f"no goldens in {path}"
    return path


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads() -> None:
    """One thread: the models under test are tiny, and waking threads for them costs more than they save.

    Tests of what threads may not change set their own number.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
