"""The short way into the database: entries in which `sanitize.py` would change nothing, as nearly all are.

An entry is written as JSON, which it has to be anyway, and that text is looked at as a whole, by a few searches in C.
Whatever might have to be changed goes the long way. Measured: three times as fast as a look at each value by itself, which
took half of the daemon's own time.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from daemon.queue.base64_rule import LONGEST_URL, SHORTEST_TOKEN, URL
from daemon.queue.sanitize import DEEPEST, LONGEST_WAIT, MAX_SHOWN_BYTES, MAX_SHOWN_TOKENS

_EXPONENT = re.compile(r"[ \[]-?[\d.]+e[+-]?\d")
"""Of a number, which may be out of the database's range."""
_PADDING = 2
_TOKENS = bytes(120 if chr(code).isalnum() or chr(code) in "+/_-" else 32 for code in range(128)) + bytes(128)
"""Translates what a base64 token consists of to `x`, and all else to a blank."""

_encode = json.JSONEncoder(allow_nan=False).encode


def plain_json(entry: Mapping[str, Any], mask: Callable[[str], str]) -> str | None:
    """Return a settlement or progress entry as JSON if it can be written as it is; None if it has to be sanitized."""
    if not _in_range(entry):
        return None
    try:
        text = _encode(entry)
    except (TypeError, ValueError, RecursionError):
        return None
    # Without an escape sequence, every text in it is ASCII, has no control character, and is seen here as it is.
    if len(text) > MAX_SHOWN_BYTES or "\\" in text or text.count("{") + text.count("[") > DEEPEST:
        return None
    if "64," in text or _has_exponent(text) or _has_many_tokens(text) or mask(text) != text:
        return None
    return text


def _in_range(entry: Mapping[str, Any]) -> bool:
    """Return whether the numbers are in range that have columns of their own."""
    progress, due_in = entry.get("progress"), entry.get("due_in")
    return (progress is None or (type(progress) is int and 0 <= progress <= 100)) and (
        due_in is None or (type(due_in) in (int, float) and 0 <= due_in <= LONGEST_WAIT)
    )


def _has_exponent(text: str) -> bool:
    return ("e-" in text or "e+" in text) and _EXPONENT.search(text) is not None


def _has_many_tokens(text: str) -> bool:
    """Return whether the base64 rule may count more than a text that is shown may have."""
    # With its URLs, hardly any has.
    return _token_characters(text) > MAX_SHOWN_TOKENS and _token_characters(URL.sub(_blank, text)) > MAX_SHOWN_TOKENS


def _blank(url: re.Match[str]) -> str:
    # A longer one is counted whole, with the URLs in it.
    return " " if url.end() - url.start() <= LONGEST_URL else url[0]


def _token_characters(text: str) -> int:
    """Return at most how many characters there are in tokens."""
    pieces = text.encode().translate(_TOKENS).split()
    return sum(len(piece) + _PADDING for piece in pieces if len(piece) >= SHORTEST_TOKEN)
