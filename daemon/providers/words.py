"""Make a provider's words fit for users."""

import re

_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{60,}")
_PAGE = re.compile(
    r"<(?:!doctype|/?(?:html|head|body|title|center|h[1-6]|p|div|span|a|br|hr|pre|style|script|meta|link))\b.*",
    re.IGNORECASE | re.DOTALL,
)
_MOST_READ = 20_000
_ENDS = ".!?…。"
A_PAGE = "a page of a gateway"
"""The name of HTML in sentences: it is never quoted."""


def readable(reason: str, length: int = 500) -> str:
    """Sanitize a provider's message for users: short, in one line, without HTML and what looks like base64, with a full stop."""
    plain = _PAGE.sub(f"… ({A_PAGE})", reason[:_MOST_READ], count=1).removeprefix("… ")
    words = " ".join(_ENCODED.sub("…", plain).split())[:length]
    return f"{words}." if words and words[-1] not in _ENDS else words
