"""Imports every module that registers benchmarks; they are listed in this order."""

from __future__ import annotations

from gear_engine.bench import (
    suite_coder_ops,
    suite_models,
    suite_ops,
    suite_rollout,
    suite_tokenizers,
    suite_whole_images,
)

__all__ = [
    "suite_coder_ops", "suite_models", "suite_ops", "suite_rollout", "suite_tokenizers", "suite_whole_images",
]  # fmt: skip
