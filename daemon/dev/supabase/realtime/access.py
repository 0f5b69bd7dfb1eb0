"""Who may hear and speak on a private topic: the policies on `realtime.messages` decide, asked as the one who joins."""

import json
from typing import NamedTuple

import asyncpg

from daemon.database import Connection
from daemon.dev.realtime.tokens import Claims

AS_CLAIMED = "select set_config('role', $1, true), set_config('request.jwt.claims', $2, true)"
_PROBE = "insert into realtime.messages (topic, extension) values ($1, 'broadcast') returning id"


class Permissions(NamedTuple):
    """What somebody may do on a topic."""

    hear: bool
    speak: bool


async def permissions(pool: "asyncpg.Pool[asyncpg.Record]", claims: Claims, topic: str) -> Permissions:
    """Puts a message on the topic, looks whether it can be seen, tries to write one, and undoes it all.

    Args:
        pool: Connections of a role that may become every API role, and is not subject to the policies itself.
        claims: Of whoever asks.
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
            hear = await _allowed(connection, seen, probe)  # pyright: ignore[reportArgumentType]
            writes = "insert into realtime.messages (topic, extension) values ($1, 'broadcast')"
            speak = await _allowed(connection, f"{writes} returning true", topic)  # pyright: ignore[reportArgumentType]
        finally:
            await transaction.rollback()
    return Permissions(hear, speak)


async def _allowed(connection: Connection, statement: str, argument: object) -> bool:
    try:
        async with connection.transaction():
            return bool(await connection.fetchval(statement, argument))
    except asyncpg.InsufficientPrivilegeError:
        return False
