"""The caption cleaning that LlamaGen's text models were trained with: lower case, no links, markup or shop noise.

An ordered table of substitutions, applied twice. Source of the behaviour: LlamaGen ``language/t5.py``, which follows
DeepFloyd IF and PixArt. Needs ftfy and beautifulsoup4 (the ``t2i`` extra).
"""

from __future__ import annotations

import html
import re
import urllib.parse

from gear_engine.errors import BackendUnavailableError

__all__ = ["clean_caption"]

_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_IMAGE_SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
#: Every dash of Unicode, the Hebrew, Mongolian, CJK and full-width ones included.
_DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
#: Strokes, phonetic extensions, enclosed and compatibility characters, extension A, hexagrams, unified ideographs.
_CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
_PUNCTUATION = "#®•©™&@·º½¾¿¡§~)([]{}|\\/*"

Rules = list[tuple[re.Pattern[str], str]]


def _rules(*rules: tuple[str, str]) -> Rules:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


def _link(scheme: str) -> str:
    """A link's beginning, or a host under a well-known domain with its path; not the host of a mail address."""
    return rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b/?(?!@))"


_PLACEHOLDERS_AND_LINKS = _rules(("<person>", "person"), (_link("https?"), ""), (_link("www"), ""))
_NOISE = _rules(
    (r"@[\w\d]+\b", ""),
    (f"[{_CJK}]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),  # noqa: RUF001
    ("[‘’]", "'"),  # noqa: RUF001
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_IMAGE_SUFFIXES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (f"[{re.escape(_PUNCTUATION)}]+", " "),
    (r"\s+\.\s+", " "),
)
_SEPARATOR = re.compile("[-_]")
_SHOP_NOISE = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_IMAGE_SUFFIXES})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # noqa: RUF001
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def clean_caption(text: str) -> str:
    """A caption as LlamaGen's text models saw captions in training.

    Raises:
        BackendUnavailableError: ftfy or beautifulsoup4 is not installed.
    """
    try:
        import bs4
        import ftfy
    except ImportError as error:
        raise BackendUnavailableError(
            f"cleaning captions needs {error.name}: pip install 'gear-engine[t2i]'"
        ) from error
    # Twice: unquoting and unescaping can bring up what an earlier rule removes.
    for _ in range(2):
        text = urllib.parse.unquote_plus(str(text)).strip().lower()
        text = bs4.BeautifulSoup(_apply(_PLACEHOLDERS_AND_LINKS, text), features="html.parser").text
        text = _apply(_NOISE, text)
        # A few hyphens belong to words; many are a file name or a slug.
        if len(_SEPARATOR.findall(text)) > 3:
            text = _SEPARATOR.sub(" ", text)
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = _apply(_SHOP_NOISE, text).strip()
    return text
