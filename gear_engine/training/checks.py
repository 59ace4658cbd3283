"""Checks of settings, with the field's name in the message."""

from __future__ import annotations

import math
from typing import Any

from gear_engine.errors import ConfigError

__all__ = ["at_least", "below_one", "one_of", "require"]


def require(condition: bool, message: str) -> None:
    """Raises :class:`ConfigError` with ``message`` unless ``condition``."""
    if not condition:
        raise ConfigError(message)


def at_least(settings: Any, low: float, *names: str) -> None:
    """Refuses fields that are no finite numbers from ``low``."""
    for name in names:
        value = getattr(settings, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        require(number and value >= low, f"{name} must be at least {low}, got {value!r}")


def below_one(settings: Any, *names: str) -> None:
    """Refuses fields outside [0, 1)."""
    at_least(settings, 0.0, *names)
    for name in names:
        require(getattr(settings, name) < 1, f"{name} must lie in [0, 1), got {getattr(settings, name)!r}")


def one_of(settings: Any, name: str, choices: tuple[str, ...]) -> None:
    """Refuses a field that is none of ``choices``."""
    value = getattr(settings, name)
    require(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
