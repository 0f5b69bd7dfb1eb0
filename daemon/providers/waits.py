"""Read how long a provider asks us to wait."""

import re
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

LONGEST_WAIT = timedelta(hours=1)
"""Cap on any wait that a provider names: after that another call is worth it."""
_NUMBER = re.compile(r"[0-9]{1,300}(?:\.[0-9]{0,300})?")


def retry_after(header: str | None) -> timedelta | None:
    """Read a `Retry-After` header, which is seconds or a date; None if it is absent or malformed."""
    if (wait := read_wait(header)) is not None:
        return wait
    try:
        return capped(parsedate_to_datetime(header or "") - datetime.now(UTC))
    except (ValueError, TypeError, OverflowError):
        return None


def read_wait(value: object, *, unit: timedelta = timedelta(seconds=1)) -> timedelta | None:
    """Read a number of `unit`s, also as a text (`37`, `2.5s`); None for anything else."""
    text = str(value).strip().removesuffix("s") if isinstance(value, str | int | float) else ""
    if not _NUMBER.fullmatch(text):
        return None
    return capped(unit * min(float(text), LONGEST_WAIT / unit))


def capped(wait: timedelta) -> timedelta:
    """Limit a wait to 0 … `LONGEST_WAIT`."""
    return min(max(wait, timedelta(0)), LONGEST_WAIT)
