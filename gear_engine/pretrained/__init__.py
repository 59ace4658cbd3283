"""Models that ship with the package, as folders that :meth:`gear_engine.Pipeline.from_pretrained` opens.

``shapes``: scenes of shapes at 64 px in 8 classes; its ``README.md`` is the model card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["SHAPES"]

#: Folder of the ``shapes`` model.
SHAPES: Final = Path(__file__).parent / "shapes"
