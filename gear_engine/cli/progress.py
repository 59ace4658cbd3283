"""A progress bar in images, with images per second, the time left, and the token that is being drawn."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

__all__ = ["Progress"]

_REFRESH = 0.5  # seconds


class Progress:
    """Counts the images of one run on standard error.

    Args:
        total: images of this process's share.
        label: what is being sampled.
        visible: False for the processes that are not the main one.
    """

    def __init__(self, total: int, label: str, visible: bool) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, desc=label, unit="image", disable=not visible, dynamic_ncols=True)
        self._known_start = False
        self._shown = 0.0

    def images(self, count: int) -> None:
        """``count`` more images are finished; the first call says how many were so at the start."""
        if not self._known_start:
            # Not counted into images per second.
            self._bar.initial = count
            self._known_start = True
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update(count)

    def token(self, step: int, total: int, tokens: object = None) -> None:
        """The batch has drawn its token ``step`` of ``total``."""
        now = time.monotonic()
        if now - self._shown > _REFRESH:
            self._shown = now
            self._bar.set_postfix_str(f"token {step}/{total}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.set_postfix_str("", refresh=False)
        self._bar.close()
