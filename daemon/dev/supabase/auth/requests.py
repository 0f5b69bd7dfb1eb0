"""The parts of a request: the project's key, the caller's token, the body."""

import json
from collections.abc import Mapping
from typing import Any, cast

from starlette.requests import Request

from daemon.dev.supabase.auth.errors import bad_json, bad_token, no_key, no_token, wrong_key
from daemon.dev.supabase.keys import InvalidToken, Keys

_REASONS = {
    '"exp" claim timestamp check failed': "token has invalid claims: token is expired",
    "signature verification failed": "token signature is invalid: signature is invalid",
    "Invalid Compact JWS": "token is malformed: token contains an invalid number of segments",
}
"""Messages of other endpoints → those of this one."""


def require_key(request: Request, keys: Keys) -> None:
    """Require a key of the project, as the gateway does: a foreign page that the developer visits has none.

    Raises:
        ApiError: If there is none, or it is another project's.
    """
    key = request.headers.get("apikey") or request.query_params.get("apikey")
    if not key:
        raise no_key()
    try:
        keys.claims(key)
    except InvalidToken:
        raise wrong_key() from None


def claims_of(request: Request, keys: Keys) -> Mapping[str, Any]:
    """Return the claims of the caller's access token.

    Raises:
        AuthError: If there is none, or it is not valid.
    """
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not token:
        raise no_token()
    try:
        claims = keys.claims(token)
    except InvalidToken as error:
        reason = _REASONS.get(str(error), str(error))
        raise bad_token(f"invalid JWT: unable to parse or verify signature, {reason}") from None
    if not claims.get("sub"):
        raise bad_token("invalid claim: missing sub claim")
    return claims


async def json_body(request: Request) -> dict[str, Any]:
    """Parse the body, a JSON object.

    Raises:
        AuthError: If it is none.
    """
    try:
        body = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError) as error:
        raise bad_json(str(error)) from None
    if not isinstance(body, dict):
        raise bad_json("an object is expected")
    return cast("dict[str, Any]", body)


def text_in(body: Mapping[str, Any], name: str) -> str:
    """Read a text from a body; empty if it has none.

    Raises:
        AuthError: If it is no text.
    """
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise bad_json(f"{name} must be a string")
    return value


def object_in(body: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Read an object from a body; None if it has none.

    Raises:
        AuthError: If it is no object, or holds what no jsonb can hold.
    """
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, dict) or "\\u0000" in json.dumps(value):
        raise bad_json(f"{name} must be an object")
    return cast("dict[str, Any]", value)
