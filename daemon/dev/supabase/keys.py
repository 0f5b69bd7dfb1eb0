"""The keys of the stand-in: JWTs, signed with a secret in the data directory."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

ALGORITHM = "HS256"
ROLES = ("anon", "authenticated", "service_role")
_ISSUED, _EXPIRES = 1_767_225_600, 2_082_758_400  # 2026 to 2036: the same keys at every start


class InvalidToken(Exception):
    """A token that is malformed, expired, or signed with another secret. The message is that of Supabase's servers."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The two API keys, and the secret that signs tokens."""

    jwt_secret: str
    anon_key: str
    service_role_key: str

    def claims(self, token: str) -> Mapping[str, Any]:
        """Return the claims of a key or a token; there is always a `role`, one of `ROLES`.

        Raises:
            InvalidToken: With Supabase's message.
        """
        for key, role in ((self.anon_key, "anon"), (self.service_role_key, "service_role")):
            if secrets.compare_digest(key.encode(), token.encode()):
                return {"role": role}
        claims = {"role": "anon", **self.read(token)}
        if claims["role"] not in ROLES:
            raise InvalidToken("Invalid role")
        return claims

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Return a token with these claims."""
        return jwt.encode(dict(claims), self.jwt_secret, ALGORITHM, headers={"typ": None})

    def read(self, token: str) -> Mapping[str, Any]:
        """Return the claims of a token that `sign` has made.

        Raises:
            InvalidToken: If the signature is another one, or the token has expired.
        """
        try:
            return jwt.decode(token, self.jwt_secret, [ALGORITHM], options={"verify_aud": False, "verify_iat": False})
        except jwt.ExpiredSignatureError:
            raise InvalidToken('"exp" claim timestamp check failed') from None
        except jwt.InvalidTokenError:
            # Supabase's servers take anything with three parts for a token.
            parts = token.count(".") + 1
            raise InvalidToken("signature verification failed" if parts == 3 else "Invalid Compact JWS") from None


def make_keys(jwt_secret: str) -> Keys:
    """Derive the keys from a secret of at least 32 characters: always the same keys."""
    anon, service_role = (
        jwt.encode({"iss": "image-jobs", "role": role, "iat": _ISSUED, "exp": _EXPIRES}, jwt_secret, ALGORITHM)
        for role in ("anon", "service_role")
    )
    return Keys(jwt_secret, anon, service_role)


def load_keys(directory: Path) -> Keys:
    """Return the keys of a data directory. The first call creates its secret, readable by its owner alone."""
    file = directory / "jwt-secret"
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secrets.token_hex(32))
    return make_keys(file.read_text())
