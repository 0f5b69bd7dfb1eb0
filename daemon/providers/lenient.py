"""Read JSON that others wrote: a value that is missing, of another type or absurd is None, and nothing raises."""

import json
import math
import re
from collections.abc import Callable, Container, Iterator
from typing import Annotated, Any, ClassVar, Self, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict

MOST_COUNTED = 100_000_000
"""A larger count of tokens is no count: it would be more than a thousand dollars for a picture."""
MOST_DOCUMENTS = 1000
"""Documents of a body that are read at once; of a picture there are a few."""
SPOOLED = "\ue000"
"""The first character of what stands for a text that lies in a spool."""
_DEEPEST = 5
_MOST_FIELDS = 40
_SHORT = 60
_NOT_BLANK = re.compile(r"\S")
_CUT = re.compile(r"[{\[]\s*[\"{\[]")
_NEXT = re.compile(r"[{\[]")
# No whole texts: what such a pattern takes for one that breaks off grows faster than the text.
_TOKEN = re.compile(r'\\.|["{}\[\],:]', re.DOTALL)
_LONGEST_CUT = 1_000_000


class NotJson(ValueError):
    """A text is no JSON."""


def parse_json(text: bytes) -> object:
    """Parse JSON forgivingly: any bytes for UTF-8, a mark of the byte sequence, control characters in texts, NaN, any number.

    Raises:
        NotJson: If it is none, or nested too deeply.
    """
    try:
        return _whole(json.loads(text.decode("utf-8-sig", "replace"), strict=False, parse_int=_integer))
    except (ValueError, RecursionError) as error:
        raise NotJson from error


def parse_documents(text: bytes) -> tuple[list[object], bool]:
    """Parse the JSON with which a text begins, and all objects and arrays behind it; whatever else follows is passed over.

    Returns:
        The documents, and whether one more begins that is not complete.

    Raises:
        NotJson: If it begins with none that is complete.
    """
    decoder = json.JSONDecoder(strict=False, parse_int=_integer)
    decoded = text.decode("utf-8-sig", "replace")
    found: list[object] = []
    begins = _NOT_BLANK.search(decoded)
    while begins is not None and len(found) < MOST_DOCUMENTS:
        try:
            value, end = decoder.raw_decode(decoded, begins.start())
            found.append(_whole(value))
        except (ValueError, RecursionError) as error:
            if not found:
                raise NotJson from error
            return found, _CUT.match(decoded, begins.start()) is not None
        begins = _NEXT.search(decoded, end)
    if not found:
        raise NotJson
    return found, begins is not None


def parse_cut(text: bytes) -> object:
    """Parse what is complete of an object or array that breaks off.

    Raises:
        NotJson: If it is none, or too long.
    """
    if len(text) > _LONGEST_CUT:
        raise NotJson
    decoded = text.decode("utf-8-sig", "replace")
    closing: list[str] = []
    end = depth = 0
    last = ""
    within = False
    for token in _TOKEN.finditer(decoded):
        kind = token[0][0]
        if kind == '"':
            within = not within
        if within or kind == "\\":
            continue
        if kind in "{[":
            closing.append("}" if kind == "{" else "]")
        elif kind in "}]" and closing:
            closing.pop()
        is_value = last == ":" or (kind != '"' and kind in "}]") or (kind == '"' and closing[-1:] == ["]"])
        if kind == "," or (is_value and kind not in "{["):
            end, depth = token.end() - (kind == ","), len(closing)
        last = kind
    return parse_json((decoded[:end] + "".join(reversed(closing[:depth]))).encode())


def _integer(digits: str) -> float:
    """Read digits; Python refuses to read more than 4,300 of them."""
    return int(digits) if len(digits) < 20 else float(digits)


def _whole(value: object) -> Any:
    """Replace halves of surrogate pairs, which no UTF-8 can write."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case dict():
            return {_whole(key): _whole(item) for key, item in cast("dict[str, object]", value).items()}
        case list():
            return [_whole(item) for item in cast("list[object]", value)]
        case _:
            return value


class Lenient(BaseModel):
    """Reads a JSON object of which only some fields matter. Its fields are of the types below, which never raise."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @classmethod
    def read(cls, value: object) -> Self:
        """Read anything; for what is no object, all fields are absent."""
        return cls.model_validate(value if isinstance(value, dict) else {})


def texts_in(
    document: object, *, skip: Container[str] = (), leave: Callable[[object], bool] = lambda _: False
) -> Iterator[tuple[str, str]]:
    """Yield each text of a document, with the name of the field that it is in, or that its list is in.

    Args:
        document: The JSON.
        skip: Names of fields that are passed over, with all in them.
        leave: Whether an object is passed over.
    """
    left: list[tuple[str, object]] = [("", document)]
    while left:
        name, value = left.pop()
        match value:
            case str():
                yield name, value
            case dict() if not leave(cast("object", value)):
                fields = [(key, item) for key, item in cast("dict[str, object]", value).items() if key not in skip]
                left += reversed(fields)
            case list():
                left += [(name, item) for item in reversed(cast("list[object]", value))]
            case _:
                pass


def as_count(value: object) -> int | None:
    """Read a count, also as a text; None for one that is negative, no number, or too large to be true."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < _SHORT:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if 0 <= value <= MOST_COUNTED else None


def as_text(value: object) -> str | None:
    """Read a text that is not empty, and not so long that it lies in a spool; None for anything else."""
    return value if isinstance(value, str) and value and not value.startswith(SPOOLED) else None


def as_encoded(value: object) -> str | None:
    """Read a text that may be a picture, and so may lie in a spool."""
    return value if isinstance(value, str) and value.strip() else None


def as_name(value: object) -> str | None:
    """Read a name or an id, which some servers write as a number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return as_text(value)


def as_objects(value: object) -> list[Any]:
    """Read the objects of a list; a single object stands for a list of one."""
    listed = cast("list[object]", value) if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, dict)]


def as_texts(value: object) -> list[str]:
    """Read the texts of a list."""
    listed = cast("list[object]", value) if isinstance(value, list) else []
    return [text for item in listed if (text := as_text(item))]


def _as_object(value: object) -> object:
    return cast("object", value) if isinstance(value, dict) else None


T = TypeVar("T")
Text = Annotated[str | None, BeforeValidator(as_text)]
Name = Annotated[str | None, BeforeValidator(as_name)]
Encoded = Annotated[str | None, BeforeValidator(as_encoded)]
Count = Annotated[int | None, BeforeValidator(as_count)]
Object = Annotated[T | None, BeforeValidator(_as_object)]
Objects = Annotated[list[T], BeforeValidator(as_objects)]


def counted(usage: object) -> dict[str, Any] | None:
    """Return what a response counted, for the audit trail: counts and short names, however they are nested.

    Returns:
        None if nothing was counted: then nothing is charged for a response without a picture.
    """
    kept: Any = _counts(usage, 0)
    return kept if isinstance(usage, dict) and _any_count(kept) else None


def _counts(value: object, depth: int) -> Any:
    if depth > _DEEPEST:
        return None
    match value:
        case dict():
            items = list(cast("dict[str, object]", value).items())[:_MOST_FIELDS]
            read = {name: _counts(item, depth + 1) for name, item in items if len(name) <= _SHORT}
            return {name: item for name, item in read.items() if item is not None}
        case list():
            read = [_counts(item, depth + 1) for item in cast("list[object]", value)[:_MOST_FIELDS]]
            return [item for item in read if item is not None]
        case str() if not value.strip().isdecimal():
            return value if len(value) < _SHORT else None
        case _:
            return as_count(value)


def _any_count(value: object) -> bool:
    match value:
        case dict():
            return any(_any_count(item) for item in cast("dict[str, object]", value).values())
        case list():
            return any(_any_count(item) for item in cast("list[object]", value))
        case _:
            return isinstance(value, int) and value > 0
