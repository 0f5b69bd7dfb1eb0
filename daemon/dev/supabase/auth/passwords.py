"""Passwords: the rules of a new project, and hashes by scrypt."""

import asyncio
import hashlib
import hmac
import secrets

from daemon.dev.supabase.auth.errors import invalid, weak_password

SHORTEST, LONGEST = 6, 72
_COST, _BLOCK, _PARALLEL = 1 << 14, 8, 1
"""Of scrypt: 16 MB and some 40 ms a hash."""


def check_strength(password: str) -> None:
    """Require a password that a new project accepts.

    Raises:
        AuthError: If it is too short or too long, in bytes.
    """
    length = len(password.encode())
    if length > LONGEST:
        raise invalid(f"Password cannot be longer than {LONGEST} characters")
    if length < SHORTEST:
        raise weak_password(f"Password should be at least {SHORTEST} characters.", ["length"])


async def hashed(password: str) -> str:
    """Return the hash of a password, with its salt."""
    salt = secrets.token_bytes(16)
    return f"$scrypt${salt.hex()}${(await _hash(password, salt)).hex()}"


async def fits(password: str, stored: str | None) -> bool:
    """Whether a password has this hash. An account without one has no password that fits."""
    match (stored or "").split("$"):
        case ["", "scrypt", salt, wanted]:
            return hmac.compare_digest(await _hash(password, bytes.fromhex(salt)), bytes.fromhex(wanted))
        case _:
            return False


async def _hash(password: str, salt: bytes) -> bytes:
    """Hash in a thread: others' requests need not wait."""
    return await asyncio.to_thread(
        hashlib.scrypt, password.encode(), salt=salt, n=_COST, r=_BLOCK, p=_PARALLEL, maxmem=64 << 20
    )
