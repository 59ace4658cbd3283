"""The caption cleaning of LlamaGen's text models, rule by rule; test_official.py compares it with the original."""

from __future__ import annotations

import builtins
from typing import Any

import pytest

from gear_engine.caption_cleaning import clean_caption
from gear_engine.errors import BackendUnavailableError


def test_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "ftfy":
            raise ImportError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendUnavailableError, match=r"needs ftfy: pip install 'gear-engine\[t2i\]'"):
        clean_caption("a cat")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "A blue Porsche 356 parked in front of a yellow brick wall.",
            "a blue porsche 356 parked in front of a yellow brick wall.",
        ),
        ("  Two   spaces ", "two spaces"),
        ("a+cat%20here", "a cat here"),
        ("<person> on a horse", "person on a horse"),
        ("see http://foo.com/x now", "see now"),
        ("shop foo.com/a-b today", "shop today"),
        ("<b>bold</b> &amp; bright", "bold bright"),
        ("by @nick in \u6f22\u5b57 style", "by in style"),
        ("a \u2014 b \u2013\u2013 c", "a - b - c"),
        ("\u201cquoted\u201d", "quoted"),
        ("don\u2019t", "don't"),
        ("at 127.0.0.1 #12 #12345 1234567", "at"),
        ("photo img_01.png of a cat", "photo of a cat"),
        ("wow!!! ... [really] {yes} (no) a|b*c~d", "wow!!! really yes no a b c d"),
        ("a-b_c-d-e", "a b c d e"),
        ("one-two", "one-two"),
        ("free shipping on ab123 jpg image page 12", "on"),
        ("a 3x4 grid", "a grid"),
        ("red,green", "red, green"),
        ("", ""),
    ],
)
def test_rules(text: str, expected: str) -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    assert clean_caption(text) == expected
