"""Buckets and objects: rows of the schema `storage`, read and written in the caller's role, under its policies."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import asyncpg

from daemon.dev.supabase.storage.errors import access_denied, duplicate, no_bucket, no_object

Row = Mapping[str, Any]
Claims = Mapping[str, Any]

SERVER: Claims = {"role": "service_role"}
"""The claims of the Storage server itself."""

_OBJECT = """name, bucket_id, owner_id, version, id, updated_at, created_at, last_accessed_at,
  metadata::text as metadata, user_metadata::text as user_metadata"""
_SORTABLE = ("name", "created_at", "updated_at", "last_accessed_at")


class Rows:
    """Reads and writes `storage.buckets` and `storage.objects`.

    Args:
        pool: Connections of a role that may become each of the API roles.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._pool = pool

    async def buckets(self, claims: Claims) -> list[Row]:
        async with self._as(claims) as connection:
            return _dicts(await connection.fetch("select * from storage.buckets order by created_at, id"))

    async def bucket(self, claims: Claims, bucket: str) -> Row:
        async with self._as(claims) as connection:
            found = await connection.fetchrow("select * from storage.buckets where id = $1", bucket)
        if found is None:
            raise no_bucket()
        return dict(found)

    async def create_bucket(
        self, claims: Claims, bucket: str, *, public: bool, limit: int | None, types: Sequence[str] | None
    ) -> None:
        async with self._as(claims, taken="BucketAlreadyExists") as connection:
            await connection.execute(
                """insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types, owner_id)
                values ($1, $1, $2, $3, $4, $5)""",
                bucket,
                public,
                limit,
                types,
                claims.get("sub"),
            )

    async def update_bucket(self, claims: Claims, bucket: str, changes: Mapping[str, Any]) -> None:
        """Update those of `public`, `file_size_limit` and `allowed_mime_types` that are in `changes`."""
        row = {**await self.bucket(claims, bucket), **changes}
        async with self._as(claims) as connection:
            await connection.execute(
                """update storage.buckets
                set public = $2, file_size_limit = $3, allowed_mime_types = $4, updated_at = now() where id = $1""",
                bucket,
                row["public"],
                row["file_size_limit"],
                row["allowed_mime_types"],
            )

    async def delete_bucket(self, claims: Claims, bucket: str) -> None:
        """Delete an empty bucket; the caller has checked that it is."""
        await self.bucket(claims, bucket)
        async with self._as(claims) as connection:
            await connection.execute("delete from storage.buckets where id = $1", bucket)

    async def has_objects(self, bucket: str) -> bool:
        async with self._as(SERVER) as connection:
            return bool(
                await connection.fetchval("select exists (select from storage.objects where bucket_id = $1)", bucket)
            )

    async def object(self, claims: Claims, bucket: str, key: str) -> Row:
        async with self._as(claims) as connection:
            found = await connection.fetchrow(
                f"select {_OBJECT} from storage.objects where bucket_id = $1 and name = $2",  # noqa: S608 - a constant
                bucket,
                key,
            )
        if found is None:
            raise no_object()
        return dict(found)

    async def found(self, claims: Claims, bucket: str, keys: Sequence[str]) -> set[str]:
        """Return those of the keys whose objects the caller may read."""
        async with self._as(claims) as connection:
            rows = await connection.fetch(
                "select name from storage.objects where bucket_id = $1 and name = any($2)", bucket, keys
            )
        return {row["name"] for row in rows}

    async def may_write(self, claims: Claims, bucket: str, key: str, *, upsert: bool) -> None:
        """Insert a row in the caller's role, and roll back. As on the real server, this is the only check of policies.

        Raises:
            StorageError: If the policies refuse it, or the key is taken.
        """
        on_conflict = "on conflict (bucket_id, name) do update set updated_at = now()" if upsert else ""
        async with self._as(claims, keep=False) as connection:
            await connection.execute(
                f"insert into storage.objects (bucket_id, name, owner_id) values ($1, $2, $3) {on_conflict}",  # noqa: S608 - one of two constants
                bucket,
                key,
                claims.get("sub"),
            )

    async def put(
        self, claims: Claims, bucket: str, key: str, *, version: str, metadata: Row, user_metadata: Row
    ) -> tuple[Row, str | None]:
        """Write the row of an object whose bytes are there. Return it, and the version that it replaces."""
        async with self._as(SERVER) as connection:
            replaced = await connection.fetchval(
                "select version from storage.objects where bucket_id = $1 and name = $2 for update", bucket, key
            )
            row = await connection.fetchrow(
                f"""insert into storage.objects (bucket_id, name, version, metadata, user_metadata, owner_id)
                values ($1, $2, $3, $4::text::jsonb, $5::text::jsonb, $6)
                on conflict (bucket_id, name) do update set version = excluded.version, metadata = excluded.metadata,
                  user_metadata = excluded.user_metadata, owner_id = excluded.owner_id, updated_at = now()
                returning {_OBJECT}""",  # noqa: S608 - a constant
                bucket,
                key,
                version,
                json.dumps(metadata),
                json.dumps(user_metadata),
                claims.get("sub"),
            )
        assert row is not None
        return dict(row), replaced

    async def move(self, claims: Claims, bucket: str, source: str, target: str) -> None:
        async with self._as(claims) as connection:
            moved = await connection.fetchval(
                """update storage.objects set name = $3, updated_at = now()
                where bucket_id = $1 and name = $2 returning id""",
                bucket,
                source,
                target,
            )
        if moved is None:
            raise no_object()

    async def remove(self, claims: Claims, bucket: str, keys: Sequence[str] | None) -> list[Row]:
        """Delete those of the objects that the caller may delete, and return their rows; None means all."""
        async with self._as(claims) as connection:
            return _dicts(
                await connection.fetch(
                    f"""delete from storage.objects where bucket_id = $1 and ($2::text[] is null or name = any($2))
                    returning {_OBJECT}""",  # noqa: S608 - a constant
                    bucket,
                    keys,
                )
            )

    async def folder(
        self,
        claims: Claims,
        bucket: str,
        prefix: str,
        *,
        limit: int,
        offset: int = 0,
        after: str = "",
        search: str = "",
        column: str = "name",
        descending: bool = False,
    ) -> list[Row]:
        """List one level of a folder: its objects, and the folders in it as rows without an id.

        `prefix` ends with a slash, or is empty. `entry` is what comes after it; entries up to `after` are left out.
        """
        assert column in _SORTABLE
        ordering = f"{column if column != 'name' else 'entry'} {'desc' if descending else 'asc'} nulls last, entry"
        async with self._as(claims) as connection:
            rows = await connection.fetch(
                f"""with inside as (
                  select substr(name, length($2) + 1) collate "C" as rest, o.*
                  from storage.objects o where bucket_id = $1 and starts_with(name, $2)
                ), entries as (
                  select rest as entry, {_OBJECT} from inside where strpos(rest, '/') = 0
                  union all
                  select distinct split_part(rest, '/', 1) collate "C", $2 || split_part(rest, '/', 1) || '/', bucket_id,
                    null, null, null::uuid, null::timestamptz, null::timestamptz, null::timestamptz, null, null
                  from inside where strpos(rest, '/') > 0
                )
                select * from entries where entry > $3 and starts_with(lower(entry), lower($4))
                order by {ordering} limit $5 offset $6""",  # noqa: S608 - constants and a column of a fixed list
                bucket,
                prefix,
                after,
                search,
                limit,
                offset,
            )
        return _dicts(rows)

    @asynccontextmanager
    async def _as(
        self, claims: Claims, *, keep: bool = True, taken: str = "KeyAlreadyExists"
    ) -> AsyncGenerator["asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"]:
        """Open a transaction with the caller's role and claims, as the real server does for every request."""
        async with self._pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                await connection.execute(
                    """select set_config('role', $1, true), set_config('request.jwt.claims', $2, true),
                      set_config('storage.allow_delete_query', 'true', true)""",
                    claims["role"],
                    json.dumps(dict(claims)),
                )
                yield connection
            except asyncpg.UniqueViolationError:
                await transaction.rollback()
                raise duplicate(taken) from None
            except asyncpg.InsufficientPrivilegeError:
                await transaction.rollback()
                raise access_denied() from None
            except BaseException:
                await transaction.rollback()
                raise
            if keep:
                await transaction.commit()
            else:
                await transaction.rollback()


def _dicts(records: "Sequence[asyncpg.Record]") -> list[Row]:
    return [dict(record) for record in records]


def format_bucket(row: Row, *, with_type: bool = False) -> dict[str, Any]:
    """Format a bucket for a response; lists have its type, single ones have not."""
    return {
        "id": row["id"],
        "name": row["name"],
        "owner": row["owner_id"] or "",
        "public": row["public"],
        **({"type": row["type"]} if with_type else {}),
        "file_size_limit": row["file_size_limit"],
        "allowed_mime_types": row["allowed_mime_types"],
        "created_at": format_time(row["created_at"]),
        "updated_at": format_time(row["updated_at"]),
    }


def format_object(row: Row) -> dict[str, Any]:
    """Format an object's whole row for a response."""
    return {
        "name": row["name"],
        "bucket_id": row["bucket_id"],
        "owner": row["owner_id"] or "",
        "owner_id": row["owner_id"] or "",
        "version": row["version"],
        **format_entry(row),
        "user_metadata": parse_json(row["user_metadata"]),
    }


def format_entry(row: Row) -> dict[str, Any]:
    """Format an object for a list; of a folder all values are null."""
    return {
        "id": None if row["id"] is None else str(row["id"]),
        "updated_at": format_time(row["updated_at"]),
        "created_at": format_time(row["created_at"]),
        "last_accessed_at": format_time(row["last_accessed_at"]),
        "metadata": parse_json(row["metadata"]),
    }


def format_time(time: datetime | None) -> str | None:
    """Format a time as JavaScript does."""
    return None if time is None else time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_json(text: str | None) -> Any:
    """Parse a jsonb column; all queries here select it as text, so that the pool's codecs make no difference."""
    return None if text is None else json.loads(text)
