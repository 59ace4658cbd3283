"""Imports every module that registers benchmarks."""

from __future__ import annotations

from gear_engine.bench import (
    suite_coder_ops,
    suite_end_to_end,
    suite_models,
    suite_ops,
    suite_rollout,
    suite_tokenizers,
)

__all__ = [
    "suite_coder_ops", "suite_end_to_end", "suite_models", "suite_ops", "suite_rollout", "suite_tokenizers",
]  # fmt: skip
