"""Sessions: their refresh tokens, each good for one use, and the access tokens that these are changed for."""

import secrets
import time
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg

from daemon.database import Connection
from daemon.dev.supabase.auth.errors import refused_refresh
from daemon.dev.supabase.keys import Keys

REUSE_INTERVAL = timedelta(seconds=10)
"""So long a refresh token may be used again: two tabs may refresh at once, or a response may be lost."""

_START = """
insert into auth.sessions (id, user_id, authentication_method, aal, created_at, updated_at)
values (gen_random_uuid(), $1, $2, 'aal1', now(), now()) returning id"""
_GRANT = """
insert into auth.refresh_tokens (token, user_id, session_id, parent, revoked, created_at, updated_at)
values ($1, $2::uuid::text, $3, $4, false, now(), now())"""
_FIND = """
select t.token, t.revoked, t.session_id, s.user_id, clock_timestamp() - t.updated_at < $2 as recent
from auth.refresh_tokens t join auth.sessions s on s.id = t.session_id where t.token = $1 for update"""


class Sessions:
    """Starts, renews and ends sessions.

    Args:
        pool: Connections as `supabase_auth_admin`.
        keys: Sign the access tokens.
        issuer: Named by them.
        lifetime: Of an access token.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys, issuer: str, lifetime: timedelta) -> None:
        self._pool = pool
        self._keys = keys
        self._issuer = issuer
        self._lifetime = lifetime

    async def start(self, connection: Connection, user: UUID, method: str) -> tuple[UUID, str]:
        """Sign a user in. Return the session and its refresh token.

        Args:
            connection: In a transaction.
            user: Its id.
            method: `anonymous` or `password`.
        """
        session: UUID = await connection.fetchval(_START, user, method)
        await connection.execute("update auth.users set last_sign_in_at = now() where id = $1", user)
        return session, await self._grant(connection, session, user, None)

    async def renew(self, connection: Connection, refresh_token: str) -> tuple[UUID, UUID, str]:
        """Change a refresh token for the next one. Return the session, its user and the token.

        A used token is changed once more if its successor was never used (a response was lost), or at once (two tabs);
        later it is a thief's or the user's, and nobody knows which: the session ends.

        Raises:
            AuthError: If the token is unknown, or was used already.
        """
        found = await connection.fetchrow(_FIND, refresh_token, REUSE_INTERVAL)
        if found is None:
            raise refused_refresh("refresh_token_not_found", "Refresh Token Not Found")
        session, user = found["session_id"], found["user_id"]
        if found["revoked"]:
            active = await connection.fetchrow(
                "select token, parent from auth.refresh_tokens where session_id = $1 and not revoked order by id desc limit 1",
                session,
            )
            if active is not None and active["parent"] == refresh_token:
                return session, user, active["token"]
            if not found["recent"]:
                raise ReusedToken(session)
        await connection.execute(
            "update auth.refresh_tokens set revoked = true, updated_at = now() where token = $1", refresh_token
        )
        await connection.execute("update auth.sessions set updated_at = now() where id = $1", session)
        return session, user, await self._grant(connection, session, user, refresh_token)

    async def revoke(self, session: UUID) -> None:
        """Revoke all refresh tokens of a session, also for reuse."""
        await self._pool.execute(
            "update auth.refresh_tokens set revoked = true, updated_at = '-infinity' where session_id = $1", session
        )

    async def is_open(self, session: UUID) -> bool:
        return bool(await self._pool.fetchval("select exists (select from auth.sessions where id = $1)", session))

    async def end(self, user: UUID, *, only: UUID | None = None, but: UUID | None = None) -> None:
        """End a user's sessions: all, only one, or all but one."""
        await self._pool.execute(
            "delete from auth.sessions where user_id = $1 and ($2::uuid is null or id = $2) and id is distinct from $3",
            user,
            only,
            but,
        )

    async def as_json(self, connection: Connection, session: UUID, token: str, user: dict[str, Any]) -> dict[str, Any]:
        """Format a session as the real server does, with a new access token.

        Args:
            connection: In a transaction.
            session: Its id.
            token: Its refresh token.
            user: As `Users.as_json` formats it.
        """
        row = await connection.fetchrow("select * from auth.sessions where id = $1", session)
        assert row is not None
        issued = int(time.time())
        expires = issued + int(self._lifetime.total_seconds())
        claims = {
            "iss": self._issuer,
            "sub": user["id"],
            "aud": user["aud"],
            "exp": expires,
            "iat": issued,
            **{name: user[name] for name in ("email", "phone", "app_metadata", "user_metadata", "role")},
            "aal": row["aal"],
            "amr": [{"method": row["authentication_method"], "timestamp": int(row["created_at"].timestamp())}],
            "session_id": str(session),
            "is_anonymous": user["is_anonymous"],
        }
        return {
            "access_token": self._keys.sign(claims),
            "token_type": "bearer",
            "expires_in": expires - issued,
            "expires_at": expires,
            "refresh_token": token,
            "user": user,
        }

    async def _grant(self, connection: Connection, session: UUID, user: UUID, parent: str | None) -> str:
        token = secrets.token_urlsafe(16)
        await connection.execute(_GRANT, token, user, session, parent)
        return token


class ReusedToken(Exception):
    """A refresh token that was used already, too long ago for a lost response."""

    def __init__(self, session: UUID) -> None:
        super().__init__(str(session))
        self.session = session
