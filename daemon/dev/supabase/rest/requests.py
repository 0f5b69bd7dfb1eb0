"""The parts of a request: the caller's claims, the headers Prefer and Accept, query parameters."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request

from daemon.dev.supabase.keys import InvalidToken, Keys
from daemon.dev.supabase.rest.errors import (
    RestError,
    bad_body,
    bad_query,
    bad_range,
    bad_schema,
    no_media_type,
    not_implemented,
)
from daemon.dev.supabase.rest.grammar import OPERATORS, Field, Filter, Ordering, Reader, Selected

_NOT_ROWS = ("text/csv", "application/geo+json", "application/vnd.pgrst.plan", "application/octet-stream", "text/plain")
_NOT_IMPLEMENTED = frozenset({"max-affected", "timezone", "tx", "missing"})
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{0,18})")


@dataclass(slots=True)
class Query:
    """The query parameters. `arguments` are those that a GET passes to a function."""

    select: list[Selected] = field(default_factory=lambda: [Selected(None)])
    filters: list[Filter] = field(default_factory=list[Filter])
    ordering: list[Ordering] = field(default_factory=list[Ordering])
    limit: int | None = None
    offset: int = 0
    columns: list[str] | None = None
    on_conflict: list[str] | None = None
    arguments: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Preferences:
    """The header Prefer; unknown preferences are ignored, as PostgREST does."""

    returning: Literal["minimal", "headers-only", "representation"] = "minimal"
    count: bool = False
    resolution: Literal["merge-duplicates", "ignore-duplicates"] | None = None
    applied: str = ""


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The header Accept."""

    single: bool
    strip_nulls: bool
    media_type: str


def caller(request: Request, keys: Keys) -> dict[str, Any]:
    """Return the claims of the caller: `anon` without a token, as with the gateway of the Supabase CLI.

    Raises:
        RestError: If there is a token and it is not valid.
    """
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    key = request.headers.get("apikey") or request.query_params.get("apikey")
    token = token if kind.lower() == "bearer" and token else key or keys.anon_key
    try:
        return dict(keys.claims(token))
    except InvalidToken as error:
        raise _refused(token, str(error)) from None


def parse_prefer(request: Request) -> Preferences:
    """Parse the header Prefer.

    Raises:
        RestError: For a preference that would change the response and is not implemented.
    """
    preferences: dict[str, str] = {}
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        name, _, value = preference.strip().partition("=")
        preferences[name] = value
    if refused := _NOT_IMPLEMENTED.intersection(preferences):
        raise not_implemented(f"the preference {min(refused)}")
    if preferences.get("count") == "planned":
        raise not_implemented("planned counts")
    known = {
        "return": ("minimal", "headers-only", "representation"),
        "count": ("exact", "estimated"),
        "resolution": ("merge-duplicates", "ignore-duplicates"),
    }
    preferences = {name: value for name, value in preferences.items() if value in known.get(name, ())}
    returning: Any = preferences.get("return", "minimal")
    resolution: Any = preferences.get("resolution")
    applied = ", ".join(f"{name}={value}" for name, value in preferences.items())
    return Preferences(returning, "count" in preferences, resolution, applied)


def parse_accept(request: Request) -> ResponseFormat:
    """Parse the header Accept.

    Raises:
        RestError: If PostgREST does not have the media type, or it is not implemented here.
    """
    accept = request.headers.get("accept") or "*/*"
    for choice in accept.split(","):
        media_type, *parameters = (part.strip() for part in choice.split(";"))
        strip_nulls = "nulls=stripped" in parameters
        match media_type:
            case "application/vnd.pgrst.object+json" | "application/vnd.pgrst.object":
                suffix = ";nulls=stripped" if strip_nulls else ""
                media_type = f"application/vnd.pgrst.object+json{suffix}; charset=utf-8"
                return ResponseFormat(single=True, strip_nulls=strip_nulls, media_type=media_type)
            case "application/vnd.pgrst.array+json":
                suffix = ";nulls=stripped" if strip_nulls else ""
                media_type = f"application/vnd.pgrst.array+json{suffix}; charset=utf-8" if suffix else _JSON
                return ResponseFormat(single=False, strip_nulls=strip_nulls, media_type=media_type)
            case "application/json" | "*/*" | "application/*":
                return ResponseFormat(single=False, strip_nulls=False, media_type=_JSON)
            case _ if media_type.startswith(_NOT_ROWS):
                raise not_implemented(f"answers as {media_type}")
            case _:
                continue
    raise no_media_type(accept)


def check_json(request: Request) -> None:
    """Require a content type of JSON.

    Raises:
        RestError: If it is another one.
    """
    kind = content_type(request)
    if kind in {"text/csv", "application/x-www-form-urlencoded"}:
        raise not_implemented(f"bodies of {kind}")
    if kind != "application/json":
        raise bad_body(f"Content-Type not acceptable: {kind}")


def content_type(request: Request) -> str:
    """Return the content type without parameters; JSON if there is none."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


def check_schema(request: Request) -> None:
    """Refuse other schemas than `public`."""
    header = "accept-profile" if request.method in {"GET", "HEAD"} else "content-profile"
    if (schema := request.headers.get(header, "public")) != "public":
        raise bad_schema(schema)


def parse_query(request: Request, *, call: bool = False) -> Query:
    """Parse the query parameters.

    Args:
        request: Its `apikey` is left out, as the gateway does.
        call: A parameter whose value is not a filter is an argument.

    Raises:
        RestError: If one of them cannot be parsed.
    """
    found = Query()
    for name, text in request.query_params.multi_items():
        match name:
            case "apikey":
                continue
            case "select":
                found.select = Reader(text, "select parameter").selected() if text else found.select
            case "order":
                found.ordering += Reader(text, "order").ordering() if text else []
            case "limit" | "offset":
                setattr(found, name, _number(name, text))
            case "columns" | "on_conflict":
                setattr(found, name, Reader(text, f"{name} parameter").names() if text else None)
            case "and" | "or" | "not.and" | "not.or":
                kind = "and" if name.endswith("and") else "or"
                group = Reader(text, "logic tree").group(kind, negated=name.startswith("not."))
                found.filters.append(group)
            case _ if call and text.removeprefix("not.").partition(".")[0].partition("(")[0] not in OPERATORS:
                found.arguments[name] = text
            case _:
                found.filters.append(Reader(text, "filter").condition(_key(name)))
    _take_range(request, found)
    return found


_JSON = "application/json; charset=utf-8"


def _key(name: str) -> Field:
    return Reader(name, "filter").key()


def _number(name: str, text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise bad_query(f"{name} parameter", text, f'unexpected "{text[:1]}" expecting an integer')
    if (number := int(text)) < 0:
        raise bad_range(f"{name.capitalize()} should be greater than or equal to zero.")
    return number


def _take_range(request: Request, found: Query) -> None:
    """Take limit and offset from the header Range, unless the query has them."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match and request.method in {"GET", "HEAD"} and found.limit is None and not found.offset:
        found.offset = int(match[1])
        if match[2]:
            if int(match[2]) < found.offset:
                raise bad_range(
                    "The lower boundary must be lower than or equal to the upper boundary in the Range header."
                )
            found.limit = int(match[2]) - found.offset + 1


def _refused(token: str, message: str) -> RestError:
    parts = token.count(".") + 1
    if parts != 3:
        return RestError(401, "PGRST301", f"Expected 3 parts in JWT; got {parts}")
    if "exp" in message:
        return RestError(401, "PGRST303", "JWT expired")
    if message == "Invalid role":
        return RestError(403, "22023", "role does not exist")
    return RestError(
        401, "PGRST301", "No suitable key or wrong key type", details="None of the keys was able to decode the JWT"
    )
