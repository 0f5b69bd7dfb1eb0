"""JSON bodies: what is in them is read here, but what goes to the database is the text as it came."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from daemon.dev.rest.answers import bad_body


@dataclass(frozen=True, slots=True)
class Body:
    """A body: an object, or an array of objects that all have the same keys. Everything else is an empty array."""

    text: str
    keys: tuple[str, ...]
    is_array: bool

    @property
    def array(self) -> str:
        """The same as an array."""
        return self.text if self.is_array else f"[{self.text}]"


def read(content: bytes, *, same_keys: bool = True) -> Body:
    """Reads a body.

    Args:
        content: What was sent.
        same_keys: Whether objects of an array must have the same keys; they need not where columns are named.

    Raises:
        RestError: If it is no JSON, or the keys differ.
    """
    try:
        text = content.decode()
        value: object = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise bad_body("Empty or invalid json") from None
    if isinstance(value, dict):
        return Body(text, tuple(cast("dict[str, Any]", value)), is_array=False)
    objects = [cast("dict[str, Any]", each) for each in _items(value) if isinstance(each, dict)]
    if not objects or len(objects) != len(_items(value)):
        return Body("[]", (), is_array=True)
    if same_keys and any(each.keys() != objects[0].keys() for each in objects):
        raise bad_body("All object keys must match")
    return Body(text, tuple(objects[0]), is_array=True)


def _items(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []


def _refuse(constant: str) -> NoReturn:
    """NaN and the infinities, which Python takes and JSON does not have."""
    raise ValueError(constant)
