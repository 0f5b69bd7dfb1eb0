"""doctor: a pooler's mode, and the arithmetic of connections: the daemons' against a pooler's, or the server's."""

from contextlib import AsyncExitStack

import asyncpg

from daemon.cli.doctor.database import changes_backend, check_connections, check_listen
from daemon.database import connected
from tests.support.postgres import connect
from tests.support.transaction_pooler import TransactionPooler

Db = asyncpg.Connection
POOLER = "postgresql://postgres.abc:x@aws-0-eu-west-1.pooler.supabase.com:5432/postgres"


async def test_session_pooler_is_enough_for_three_daemons(db: Db) -> None:
    assert (await check_connections(POOLER, db, 3)).state == "ok"
    found = await check_connections(POOLER, db, 4)
    assert found.state == "info"
    assert found.message == "4 daemons hold up to 20 connections; a new session pooler has 15."
    assert "20" in found.cure


async def test_connections_of_others_are_counted(database: str, db: Db) -> None:
    found = await check_connections(database, db, 0)
    assert found.state == "ok"
    assert found.message.startswith("A daemon holds up to 5 connections; others leave ")
    async with AsyncExitStack() as stack:
        for _ in range(5):
            stack.push_async_callback((await connect(database)).close)
        left = await check_connections(database, db, 0)
        assert int(left.message.split()[-1].rstrip(".")) <= int(found.message.split()[-1].rstrip(".")) - 5
    assert (await check_connections(database, db, 1000)).state == "problem"


async def test_a_pooler_in_transaction_mode_is_told_apart(database: str) -> None:
    async with TransactionPooler(database).listening() as pooled, connected(pooled) as connection:
        found = await check_listen(pooled, connection)
    assert found.state == "problem"
    assert found.message.startswith("A pooler in transaction mode stands at 127.0.0.1:")
    assert "5432" in found.cure


async def test_a_direct_connection_hears_notifications(database: str) -> None:
    async with connected(database) as connection:
        assert (await check_listen(database, connection)).state == "ok"
        assert not await changes_backend(database, connection)
