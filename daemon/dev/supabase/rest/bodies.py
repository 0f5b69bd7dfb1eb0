"""JSON bodies: parsed here for their keys; the database gets the text unchanged."""

import json
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from daemon.dev.supabase.rest.errors import bad_body


@dataclass(frozen=True, slots=True)
class Body:
    """A body: an object, or an array of objects with the same keys. Any other JSON counts as an empty array."""

    text: str
    keys: tuple[str, ...]
    is_array: bool

    @property
    def array(self) -> str:
        """The text as an array."""
        return self.text if self.is_array else f"[{self.text}]"


def read(content: bytes, *, same_keys: bool = True) -> Body:
    """Parse a body.

    Args:
        content: Of the request.
        same_keys: Whether objects of an array must have the same keys; not where `columns` names them.

    Raises:
        RestError: If it is not JSON, or the keys differ.
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
    """Refuse NaN and the infinities, which Python accepts and JSON does not have."""
    raise ValueError(constant)
