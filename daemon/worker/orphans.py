"""Values as Postgres takes them: what a provider or a user says may be anything."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

DEEPEST = 64
"""Levels of nesting; what a provider says may be made to break readers."""


def clean(value: object, mask: Callable[[str], str], depth: int = 0) -> object:
    """A value for JSON without NUL, lone surrogates, numbers that are none, and endless nesting.

    Args:
        value: Anything; what JSON does not know becomes a text.
        mask: Takes secrets out of every text, also out of the names of fields.
        depth: How deep `value` lies already.
    """
    if depth > DEEPEST:
        return "…"
    match value:
        case str():
            return mask(value.replace("\x00", "").encode("utf-8", "replace").decode())
        case Mapping():
            items = cast("Mapping[object, object]", value).items()
            return {clean(str(key), mask): clean(item, mask, depth + 1) for key, item in items}
        case list() | tuple():
            return [clean(item, mask, depth + 1) for item in cast("Sequence[object]", value)]
        case None | bool() | int() | float():
            return None if isinstance(value, float) and not math.isfinite(value) else value
        case _:
            return clean(str(value), mask)
