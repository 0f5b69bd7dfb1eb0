"""The parts of a request: the caller's claims, the key of an object, the body."""

import json
import re
from typing import Any, cast

from starlette.requests import Request

from daemon.dev.supabase.keys import InvalidToken, Keys
from daemon.dev.supabase.storage.errors import StorageError, access_denied, internal, invalid_key, invalid_request
from daemon.dev.supabase.storage.rows import Claims

_KEY = re.compile(r"[\w/!\-.*'() &$@=;:+,?]+", re.ASCII)
_LONGEST_NAME = 255


def caller(request: Request, keys: Keys) -> Claims:
    """Return the claims of the caller; as in the gateway, `apikey` stands in for `authorization`.

    Raises:
        StorageError: If there is no token, or it is not valid.
    """
    token = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("apikey")
    if not token:
        raise invalid_request("headers must have required property 'authorization'")
    try:
        return keys.claims(token)
    except InvalidToken as error:
        raise access_denied(str(error)) from None


def optional_caller(request: Request, keys: Keys) -> Claims | None:
    """Return the claims of the caller; None without a valid token."""
    try:
        return caller(request, keys)
    except StorageError:
        return None


def bucket_and_key(request: Request) -> tuple[str, str]:
    """Return bucket and key of the object in the path."""
    return request.path_params["bucket"], checked_key(request.path_params["key"])


def checked_key(key: str) -> str:
    """Return the key, if the real server accepts it. Names longer than a file's make its file backend fail."""
    if not _KEY.fullmatch(key):
        raise invalid_key(key)
    if max(len(name) for name in key.split("/")) > _LONGEST_NAME:
        raise internal()
    return key


async def json_body(request: Request) -> dict[str, Any]:
    """Parse the body, a JSON object."""
    try:
        body = json.loads(await request.body() or b"{}")
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise invalid_request("body must be object")
    return cast("dict[str, Any]", body)


def names_in(body: dict[str, Any], field: str) -> list[str]:
    """Read a list of keys from a body."""
    names = body.get(field)
    if not isinstance(names, list):
        raise invalid_request(f"body must have required property '{field}'")
    if not names:
        raise invalid_request(f"body/{field} must NOT have fewer than 1 items")
    return [str(name) for name in cast("list[object]", names)]
