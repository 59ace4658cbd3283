"""The file helpers of :mod:`gear_engine.files`, under the name that the run modules use."""

from __future__ import annotations

from gear_engine.files import atomic_file, content_hash, remove_temporaries, write_atomic

__all__ = ["atomic_file", "content_hash", "remove_temporaries", "write_atomic"]
