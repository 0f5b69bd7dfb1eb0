"""Tokens of connections and joins, and the Realtime server's messages for those that are not valid."""

import time
from collections.abc import Mapping
from typing import Any

import jwt

from daemon.dev.supabase.keys import InvalidToken, Keys

Claims = Mapping[str, Any]


class TokenRefused(Exception):
    """A token that is not valid.

    Args:
        code: The server's error code.
        message: In the reply to a join.
        short: In the response to a handshake, if that is different.
    """

    def __init__(self, code: str, message: str, short: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.short = short or message


def read(keys: Keys, token: str) -> Claims:
    """Return the claims of a token.

    Raises:
        TokenRefused: If it is not valid.
    """
    try:
        return keys.claims(token)
    except InvalidToken as error:
        if token.count(".") != 2:
            raise TokenRefused("MalformedJWT", "The token provided is not a valid JWT") from None
        if "exp" in str(error):
            raise TokenRefused("InvalidJWTToken", expired(_expiry(token)), "Token has expired") from None
        raise TokenRefused("JwtSignatureError", "Failed to validate JWT signature") from None


def expired(since: float) -> str:
    """Format the message for an expired token; `since` is in seconds since 1970."""
    return f"Token has expired {max(0, int(time.time() - since))} seconds ago"


def _expiry(token: str) -> float:
    return float(jwt.decode(token, options={"verify_signature": False})["exp"])
