"""Every regular expression of the code takes linear time: twice the text, twice the time.

They meet texts from anywhere, on the event loop: a legal prompt of 32,000 characters once cost a second.
"""

import re
import time
from itertools import pairwise
from pathlib import Path

import asyncpg
import pytest

from daemon.providers.midjourney import flags
from tests.support.patterns import Found, call_of, found_in, seconds, shapes_for

ROOT = Path(__file__).parents[1]
LENGTH = 2000
SLOW = 0.0005
"""Seconds for a text of that length: several times as long as a linear pattern takes."""
SLOW_IF_BOUNDED = 0.004
STEEP = 2.8
"""Times as long for twice the text: quadratic is four."""

SAMPLES: dict[str, tuple[str | bytes, ...]] = {
    "'|'.join((re.escape(form) for form in sorted(spellings, key=len, reverse=True))) or '(?!)'": (
        "|".join(re.escape(form) for form in ("s3cr3t-key:2@x", "c2VjcmV0", "secret", "%73ecret")),
    ),
    "f'\\\\s*(?P<value>{wanted})(?![^\\\\s,])'": tuple(
        rf"\s*(?P<value>{wanted})(?![^\s,])" for wanted in flags._ALLOWED.values()
    ),
}
"""Source of a pattern that a function makes of its arguments → such patterns."""

BOUNDED = {r"\bprocess\b.*\bimage\b": 500}
"""Pattern that takes the square of its text → the longest text it is given."""


def every_pattern() -> list[Found]:
    paths = sorted((ROOT / "daemon").rglob("*.py"))
    return [found for path in paths if path.parent.name != "canvas" for found in found_in(ROOT, path, SAMPLES)]


def steep(found: Found) -> str | None:
    """Return for which texts a pattern takes more than linear time; None if there are none."""
    bound = BOUNDED.get(found.pattern.pattern)
    for use in found.uses:
        usual = seconds(call_of(found, use, "a " * (LENGTH // 2)), 3)
        for shape in shapes_for(found.pattern):
            once = seconds(call_of(found, use, shape.text(bound or LENGTH)))
            if once < (SLOW_IF_BOUNDED if bound else max(SLOW, min(5 * usual, 6 * SLOW))):
                continue
            if bound is not None:
                return f"{use} {shape}: {once * 1000:.0f} ms for {bound} characters"
            # Twice, at two lengths: a slow moment of the machine is no curve.
            times = [
                seconds(call_of(found, use, shape.text(factor * LENGTH)), 3 if factor < 4 else 1)
                for factor in (1, 2, 4)
            ]
            if all(twice > STEEP * once for once, twice in pairwise(times)):
                return f"{use} {shape}: {', '.join(f'{it * 1000:.1f} ms' for it in times)}, doubling the text"
    return None


@pytest.mark.parametrize("found", every_pattern(), ids=str)
def test_patterns_are_linear(found: Found) -> None:
    assert steep(found) is None


@pytest.mark.parametrize("pattern", [r"://[^\s:]*:[^\s@]+@", r"(?P<a>.*)="])
def test_a_slow_pattern_is_found(pattern: str) -> None:
    assert steep(Found("a.py", 1, re.compile(pattern), ("search",))) is not None


SQL = re.compile(r"(?:(?<!')~\*?|\bregexp_\w+\([^']*)\s*'((?:[^']|'')+)'")
SQL_LENGTH = 8000
SQL_SLOW = 0.05


def sql_patterns() -> list[str]:
    schema = "".join(path.read_text("utf-8") for path in sorted((ROOT / "sql" / "schema").glob("*.sql")))
    return sorted({found[1].replace("''", "'") for found in SQL.finditer(schema)})


async def test_patterns_of_the_database_are_linear(db: asyncpg.Connection) -> None:
    patterns = sql_patterns()
    assert len(patterns) > 5

    async def shortest(pattern: str, text: str) -> float:
        """Return the seconds of a search for all that matches."""
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            await db.fetchval("select count(*) from regexp_matches($1, $2, 'gi')", text, pattern)
            best = min(best, time.perf_counter() - started)
            if best < SQL_SLOW:
                break
        return best

    steep: list[str] = []
    for pattern in patterns:
        for shape in shapes_for(re.compile(pattern), most=8):
            once = await shortest(pattern, shape.text(SQL_LENGTH))
            if once < SQL_SLOW:
                continue
            if await shortest(pattern, shape.text(2 * SQL_LENGTH)) > STEEP * once:
                steep.append(f"{pattern} {shape}")
                break
    assert steep == []
