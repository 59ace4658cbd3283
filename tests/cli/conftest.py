"""Checkpoints that several command-line tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli import tiny


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny class-conditional stage-1 file at ``<tmp>/exp/checkpoints/0000007.pt``."""
    return tiny.stage1(tmp_path_factory.mktemp("c2i") / "exp" / "checkpoints" / "0000007.pt")


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text-to-image file that bundles its tokenizer."""
    return tiny.stage1(tmp_path_factory.mktemp("t2i") / "0000009.pt", tiny.TEXT_GENERATOR)
