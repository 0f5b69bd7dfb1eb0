"""Permissions on a private topic: the policies on `realtime.messages`, evaluated in the caller's role."""

import json
from typing import NamedTuple

import asyncpg

from daemon.database import Connection
from daemon.dev.supabase.realtime.tokens import Claims

AS_CLAIMED = "select set_config('role', $1, true), set_config('request.jwt.claims', $2, true)"
_PROBE = "insert into realtime.messages (topic, extension) values ($1, 'broadcast') returning id"


class Permissions(NamedTuple):
    """The permissions of a caller on a topic."""

    receive: bool
    send: bool


async def permissions(pool: "asyncpg.Pool[asyncpg.Record]", claims: Claims, topic: str) -> Permissions:
    """Insert a message, try to read it and to insert another in the caller's role, and roll back.

    Args:
        pool: Connections of a role that may become every API role, and is not subject to the policies itself.
        claims: Of the caller.
        topic: Without `realtime:`.
    """
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            probe = await connection.fetchval(_PROBE, topic)
            await connection.execute(AS_CLAIMED, claims["role"], json.dumps(dict(claims)))
            await connection.execute("select set_config('realtime.topic', $1, true)", topic)
            seen = "select true from realtime.messages where id = $1"
            # A pool's connection is one but for its class.
            receive = await _allowed(connection, seen, probe)  # pyright: ignore[reportArgumentType]
            writes = "insert into realtime.messages (topic, extension) values ($1, 'broadcast')"
            send = await _allowed(connection, f"{writes} returning true", topic)  # pyright: ignore[reportArgumentType]
        finally:
            await transaction.rollback()
    return Permissions(receive, send)


async def _allowed(connection: Connection, statement: str, argument: object) -> bool:
    try:
        async with connection.transaction():
            return bool(await connection.fetchval(statement, argument))
    except asyncpg.InsufficientPrivilegeError:
        return False
