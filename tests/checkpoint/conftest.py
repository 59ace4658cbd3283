"""A file that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint import files


@pytest.fixture
def stage1(tmp_path: Path) -> Path:
    return files.save(tmp_path / "stage1.pt", files.stage1())
