"""Users and their identities, in the tables of the schema `auth`."""

import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg

from daemon.database import Connection
from daemon.dev.supabase.auth.errors import AuthError, failed, invalid

User: TypeAlias = asyncpg.Record
"""A row of `auth.users`."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_EMAIL = re.compile(rf"[a-z0-9.!#$%&'*+/=?^_`{{|}}~-]+@{_LABEL}(?:\.{_LABEL})*")
"""An address as HTML's input accepts it, in small letters."""
_LONGEST_EMAIL = 255

_CREATE = """
insert into auth.users (id, aud, role, email, encrypted_password, email_confirmed_at, raw_app_meta_data,
  raw_user_meta_data, is_anonymous, created_at, updated_at)
values (gen_random_uuid(), 'authenticated', 'authenticated', $1::text, $2, case when $1::text is not null then now() end, $3, $4,
  $1::text is null, now(), now())
returning id"""
_IDENTIFY = """
insert into auth.identities (provider_id, user_id, identity_data, provider, last_sign_in_at, created_at, updated_at)
values ($1::uuid::text, $1::uuid, $2, 'email', now(), now(), now())"""
_UPDATE = """
update auth.users set
  email = coalesce($2::text, email),
  email_confirmed_at = case when $2::text is null then email_confirmed_at else now() end,
  encrypted_password = coalesce($3::text, encrypted_password),
  raw_user_meta_data = $4,
  raw_app_meta_data = case when $2::text is null then raw_app_meta_data else $5 end,
  is_anonymous = is_anonymous and $2::text is null,
  updated_at = now()
where id = $1"""

_BY_EMAIL = {"provider": "email", "providers": ["email"]}


class Users:
    """Creates, finds and changes users.

    Args:
        pool: Connections as `supabase_auth_admin`.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    @asynccontextmanager
    async def transaction(self, message: str) -> AsyncGenerator[Connection]:
        """Open a transaction.

        Args:
            message: Of the error, if the database refuses: a trigger of the application may.

        Raises:
            AuthError: If it refuses.
        """
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                yield connection  # pyright: ignore[reportReturnType] - a pool's connection is one but for its class
        except asyncpg.PostgresError as error:
            raise failed(message) from error

    async def by_id(self, user: UUID) -> User | None:
        return await self._pool.fetchrow("select * from auth.users where id = $1", user)

    async def by_email(self, email: str) -> User | None:
        return await self._pool.fetchrow("select * from auth.users where email = $1", email)

    async def create(
        self, connection: Connection, email: str | None, password_hash: str | None, data: Mapping[str, Any]
    ) -> UUID:
        """Create a user, confirmed; anonymous without an address.

        Raises:
            AuthError: If the address is taken.
        """
        app_data = _BY_EMAIL if email else {}
        try:
            user = await connection.fetchval(_CREATE, email, password_hash, json.dumps(app_data), json.dumps(data))
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != "users_email_partial_key":
                raise
            raise AuthError(422, "user_already_exists", "User already registered") from None
        if email:
            await self._identify(connection, user, email, data)
        return user

    async def update(
        self, connection: Connection, user: User, email: str | None, password_hash: str | None, data: Mapping[str, Any]
    ) -> None:
        """Change a user. An address makes an anonymous one permanent.

        Args:
            connection: In a transaction.
            user: As it was.
            email: The new address, or None.
            password_hash: The new one, or None.
            data: Merged into the user's; a null deletes.

        Raises:
            AuthError: If the address is taken.
        """
        merged = {**json.loads(user["raw_user_meta_data"] or "{}"), **data}
        kept = json.dumps({name: value for name, value in merged.items() if value is not None})
        try:
            await connection.execute(_UPDATE, user["id"], email, password_hash, kept, json.dumps(_BY_EMAIL))
        except asyncpg.UniqueViolationError as error:
            if error.constraint_name != "users_email_partial_key":
                raise
            raise AuthError(422, "email_exists", EMAIL_TAKEN) from None
        if email:
            await self._identify(connection, user["id"], email, {})

    async def as_json(self, connection: "Connection | None", user: UUID) -> dict[str, Any]:
        """Format a user as the real server does.

        Args:
            connection: Of the transaction that has changed it, if one has.
            user: Its id.
        """
        if connection is None:
            async with self._pool.acquire() as pooled:
                # A pool's connection is one but for its class.
                return await self.as_json(pooled, user)  # pyright: ignore[reportArgumentType]
        row = await connection.fetchrow("select * from auth.users where id = $1", user)
        identities = await connection.fetch(
            "select * from auth.identities where user_id = $1 order by created_at", user
        )
        assert row is not None
        times = ("email_confirmed_at", "confirmed_at", "last_sign_in_at")
        return {
            "id": str(row["id"]),
            "aud": row["aud"],
            "role": row["role"],
            "email": row["email"] or "",
            "phone": row["phone"] or "",
            **{name: _time(row[name]) for name in times if row[name] is not None},
            "app_metadata": json.loads(row["raw_app_meta_data"] or "{}"),
            "user_metadata": json.loads(row["raw_user_meta_data"] or "{}"),
            "identities": [_identity(each) for each in identities],
            "created_at": _time(row["created_at"]),
            "updated_at": _time(row["updated_at"]),
            "is_anonymous": row["is_anonymous"],
        }

    async def _identify(self, connection: Connection, user: UUID, email: str, data: Mapping[str, Any]) -> None:
        """Add the identity of a confirmed address. The user's data repeats it."""
        base = {"sub": str(user), "email": email, "phone_verified": False}
        await connection.execute(_IDENTIFY, user, json.dumps({**data, **base, "email_verified": False}))
        await connection.execute(
            "update auth.users set raw_user_meta_data = raw_user_meta_data || $2 where id = $1",
            user,
            json.dumps({**base, "email_verified": True}),
        )


EMAIL_TAKEN = "A user with this email address has already been registered"


def checked_email(email: str) -> str:
    """Return an address in small letters.

    Raises:
        AuthError: If it is none.
    """
    found = email.strip().lower()
    if len(found) > _LONGEST_EMAIL:
        raise invalid("An email address is too long")
    if not _EMAIL.fullmatch(found):
        raise invalid("Unable to validate email address: invalid format")
    return found


def _identity(row: asyncpg.Record) -> dict[str, Any]:
    data = json.loads(row["identity_data"])
    return {
        "identity_id": str(row["id"]),
        "id": row["provider_id"],
        "user_id": str(row["user_id"]),
        "identity_data": data,
        "provider": row["provider"],
        "last_sign_in_at": _time(row["last_sign_in_at"]),
        "created_at": _time(row["created_at"]),
        "updated_at": _time(row["updated_at"]),
        "email": data.get("email", ""),
    }


def _time(value: datetime | None) -> str | None:
    return None if value is None else value.astimezone(UTC).isoformat().replace("+00:00", "Z")
