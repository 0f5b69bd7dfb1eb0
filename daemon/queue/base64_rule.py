"""The base64 rule of the database (`image_jobs.has_base64`), for one text: find what it refuses, and break it.

The rule counts over a whole column; `sanitize.py` adds the texts up. Each pattern is linear: texts come from anywhere.
"""

import re
from collections.abc import Iterator

ALLOWED = 1_024
"""Characters of encoded tokens in one value of a column."""
LONGEST_URL = 2_048
SHORTEST_TOKEN = 60
KEPT = 24
"""Characters that remain of a token which is too much."""

_ESCAPED = dict.fromkeys((*range(32), 34, 92), " ")
"""Characters that jsonb writes as escape sequences: the rule reads a blank instead of each."""
_ASCII = re.IGNORECASE | re.ASCII
URL = re.compile(r'https?://[^ "<>]+', _ASCII)
"""Of any length: those of up to `LONGEST_URL` characters do not count."""
# Starts only where a run of either alphabet starts: at each character within a long run, it would be read again.
_RUN = re.compile(rf"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{{{SHORTEST_TOKEN},}}={{0,2}}")
_STANDARD = re.compile(rf"[A-Za-z0-9+/]{{{SHORTEST_TOKEN},}}={{0,2}}")
_URL_SAFE = re.compile(rf"[A-Za-z0-9_-]{{{SHORTEST_TOKEN},}}={{0,2}}")
_TOKEN = re.compile(f"{_STANDARD.pattern}|{_URL_SAFE.pattern}")
_SIGNS = re.compile(r"data:|;base64,|,", _ASCII)
_FILE = re.compile(r"[A-Za-z0-9+/=_-]{20,}")


def tokens(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each token that counts: outside of http(s) URLs of up to 2,048 characters."""
    if len(text) < SHORTEST_TOKEN or _RUN.search(text) is None:
        return
    blanked = text.translate(_ESCAPED)
    begin = 0
    for url in URL.finditer(blanked):
        yield from _within(blanked, begin, url.start())
        if url.end() - url.start() > LONGEST_URL:
            yield from _within(blanked, url.start(), url.end())
        begin = url.end()
    yield from _within(blanked, begin, len(blanked))


def count(text: str) -> int:
    """Return the number of characters that count."""
    return sum(end - start for start, end in tokens(text))


def has_data_url(text: str) -> bool:
    """Return whether a text has a `data:…;base64,` with no comma in between."""
    return next(_data_urls(text), None) is not None


def break_data_urls(text: str) -> str:
    """Return the text with a blank in each `;base64,` of a data URL, and without the file behind it."""
    parts: list[str] = []
    begin = 0
    for start, end in _data_urls(text):
        parts += text[begin : start + 1], " ", text[start + 1 : end]
        begin = end
        if file := _FILE.match(text, end):
            parts.append("…")
            begin = file.end()
    return "".join((*parts, text[begin:]))


def shorten_tokens(text: str, allowed: int) -> str:
    """Return the text with as many characters of tokens as are `allowed`; of each further token its start remains."""
    parts: list[str] = []
    begin = 0
    for start, end in tokens(text):
        allowed -= end - start
        if allowed < 0:
            parts += text[begin : start + KEPT], "…"
            begin = end
    return "".join((*parts, text[begin:]))


def _data_urls(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of the `;base64,` of each data URL."""
    if "64," not in text:
        return
    is_open = False
    for sign in _SIGNS.finditer(text):
        if sign[0].endswith(":"):
            is_open = True
            continue
        if is_open and len(sign[0]) > 1:
            yield sign.span()
        is_open = False


def _within(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the tokens between two places: the leftmost first, in the alphabet in which it is longer."""
    while run := _RUN.search(text, begin, end):
        begin = run.start()
        while token := _TOKEN.search(text, begin, run.end()):
            other = _URL_SAFE.match(text, token.start(), run.end())
            begin = max(token.end(), other.end() if other else 0)
            yield token.start(), begin
        begin = run.end()
