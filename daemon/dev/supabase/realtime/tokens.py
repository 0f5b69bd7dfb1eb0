"""Who connects and who joins, and how the Realtime server words its refusals."""

import time
from collections.abc import Mapping
from typing import Any

import jwt

from daemon.dev.keys import InvalidToken, Keys

Claims = Mapping[str, Any]


class TokenRefused(Exception):
    """A token that is none of ours.

    Args:
        code: The server's word for it.
        message: What a join is told.
        short: What a handshake is told, if that is different.
    """

    def __init__(self, code: str, message: str, short: str = "") -> None:
        super().__init__(f"{code}: {message}")
        self.short = short or message


def read(keys: Keys, token: str) -> Claims:
    """The claims of a token.

    Raises:
        TokenRefused: If it is none of ours.
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
    """How it is said that a token is too old; `since` is seconds since 1970."""
    return f"Token has expired {max(0, int(time.time() - since))} seconds ago"


def _expiry(token: str) -> float:
    return float(jwt.decode(token, options={"verify_signature": False})["exp"])
