"""`image_provider_status`: why runs wait, without a write of theirs, and the broadcast of each change."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.sql.test_broadcast import messages
from tests.sql.test_models import publish
from tests.support.postgres import Cluster, connect, signed_in
from tests.support.protocol import Daemon, Db, move_clock, new_daemon
from tests.support.runs import insert_run, insert_runs

pytestmark = pytest.mark.one_postgres

USER = UUID("aaaaaaaa-0000-4000-8000-00000000000a")


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """Register a daemon that serves openai, without a limit."""
    await db.execute("delete from image_jobs.provider_limits")
    return await new_daemon(db, "openai")


@pytest.fixture
async def second(database: str) -> AsyncIterator[Db]:
    """Open another connection."""
    connection = await connect(database)
    yield connection
    await connection.close()


async def status(db: Db, model: str | None = None, provider: str = "openai") -> asyncpg.Record:
    """Fetch the state of a provider, or of a model of it."""
    row = await db.fetchrow(
        "select * from image_provider_status where provider = $1 and model is not distinct from $2", provider, model
    )
    assert row is not None
    return row


async def report(daemon: Daemon, *, storage_closed: bool = False, unreachable: list[str] | None = None) -> None:
    """Do what every daemon does each second."""
    await daemon.connection.execute(
        "select image_jobs.report_daemon($1, $2, $3)", daemon.id, storage_closed, unreachable or []
    )


async def told(cluster: Cluster, db: Db) -> list[list[dict[str, Any]]]:
    """Fetch what was broadcast of providers: the rows of each message."""
    return [
        row["payload"]["providers"]
        for row in await messages(cluster, db)
        if (row["topic"], row["event"], row["private"]) == ("image_providers", "providers_changed", True)
    ]


async def test_a_served_provider_is_open(db: Db, daemon: Daemon) -> None:
    row = await status(db)
    assert (row["state"], row["since"], row["until"], row["sentence"]) == ("open", None, None, None)
    assert 0 < row["check_in"] <= 30


async def test_a_pause_says_so_and_writes_no_run(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 20, processor="openai:small")
    rows = await db.fetchval("select array_agg(xmin::text order by id) from runs")
    await db.execute("insert into image_jobs.provider_limits (provider, paused) values ('openai', true)")
    row = await status(db)
    assert (row["state"], row["until"]) == ("paused", None)
    assert row["sentence"] == "OpenAI is paused. Images wait, and start by themselves when it goes on."
    assert row["since"] <= datetime.now(UTC)
    await report(daemon)
    assert await db.fetchval("select array_agg(xmin::text order by id) from runs") == rows
    await db.execute("update image_jobs.provider_limits set paused = false")
    assert (await status(db))["state"] == "open"


async def test_a_limit_of_nothing_is_a_pause(db: Db, daemon: Daemon) -> None:
    await db.execute("insert into image_jobs.provider_limits (provider, per_minute) values ('openai', 0)")
    assert (await status(db))["state"] == "paused"


async def test_a_block_says_until_when_and_why(db: Db, daemon: Daemon) -> None:
    await db.execute("select image_jobs.block_provider('openai', null, interval '40 s', 'Slow down.')")
    row = await status(db)
    assert (row["state"], row["sentence"]) == ("blocked", "Slow down.")
    assert timedelta(seconds=30) < row["until"] - datetime.now(UTC) <= timedelta(seconds=40)
    await move_clock(db, "41 s")
    await daemon.beat()
    assert (await status(db))["state"] == "open"


@pytest.mark.every_postgres
@pytest.mark.parametrize("until", ["infinity", "20000-01-01"])
async def test_a_block_without_end_holds_until_opened(db: Db, daemon: Daemon, until: str) -> None:
    await db.execute(
        f"insert into image_jobs.provider_blocks (provider, until, reason) values ('openai', '{until}', 'No money.')"
    )
    row = await status(db)
    assert (row["state"], row["until"], row["sentence"]) == ("blocked", None, "No money.")
    await move_clock(db, "2 min")
    await daemon.beat()
    alerts = await db.fetch("select name, sentence from image_jobs.alerts where name like 'provider%'")
    assert [tuple(alert) for alert in alerts] == [
        ("provider_blocked", "openai is closed to all daemons until it is opened: No money.")
    ]


async def test_a_blocked_model_closes_its_other_names_alone(db: Db, daemon: Daemon) -> None:
    retired = {"retired": "2026-01-01", "successor": "large"}
    await publish(db, "openai", {"model": "large"}, {"model": "small"}, {"model": "old", **retired})
    await db.execute("select image_jobs.block_provider('openai', 'large', interval '40 s', 'Slow down.')")
    states = await db.fetch("select model, state from image_provider_status where provider = 'openai' order by model")
    assert [tuple(row) for row in states] == [("large", "blocked"), ("old", "blocked"), (None, "open")]


async def test_a_used_up_minute_is_told_while_runs_wait(db: Db, daemon: Daemon) -> None:
    await db.execute("insert into image_jobs.provider_limits (provider, per_minute) values ('openai', 2)")
    await insert_runs(db, 2, processor="openai:small")
    assert len(await daemon.claim(10)) == 2
    assert (await status(db))["state"] == "open"
    await insert_run(db, processor="openai:small")
    row = await status(db)
    assert row["state"] == "limited"
    assert "2 images a minute" in row["sentence"]
    assert timedelta(seconds=40) < row["until"] - datetime.now(UTC) <= timedelta(seconds=62)
    await move_clock(db, "62 s")
    await daemon.beat()
    assert (await status(db))["state"] == "open"


async def test_a_limit_of_a_model_is_told_of_that_model(db: Db, daemon: Daemon) -> None:
    await db.execute(
        "insert into image_jobs.provider_limits (provider, model, max_running) values ('openai', 'small', 1)"
    )
    await insert_runs(db, 2, processor="openai:small")
    assert len(await daemon.claim(10)) == 1
    assert (await status(db))["state"] == "open"
    row = await status(db, "small")
    assert (row["state"], row["until"]) == ("limited", None)
    assert row["sentence"].startswith("OpenAI small makes 1 image at a time here.")


async def test_the_end_of_the_last_lease_is_unserved(db: Db, daemon: Daemon) -> None:
    other = await new_daemon(db, "google")
    await move_clock(db, "15 s")
    await other.beat()
    assert (await status(db))["state"] == "open"
    await move_clock(db, "31 s")
    row = await status(db)
    assert row["state"] == "unserved"
    assert row["sentence"].startswith("OpenAI is not served here at the moment.")
    seen, since = await db.fetchval("select seen_at from image_jobs.daemons where id = $1", daemon.id), row["since"]
    assert since == seen + timedelta(seconds=30)
    await daemon.beat()
    assert (await status(db))["state"] == "open"


async def test_nothing_is_served_without_a_daemon(db: Db, daemon: Daemon) -> None:
    await db.execute("select image_jobs.leave($1)", daemon.id)
    row = await status(db)
    assert (row["state"], row["check_in"]) == ("unserved", None)
    assert row["sentence"].startswith("No images are made at the moment.")


async def test_a_daemon_that_drains_serves_nothing(db: Db, daemon: Daemon) -> None:
    await db.execute("select image_jobs.heartbeat($1, 1, false, true)", daemon.id)
    assert (await status(db))["state"] == "unserved"


async def test_storage_is_told_where_no_daemon_can_store(db: Db, daemon: Daemon) -> None:
    other = await new_daemon(db, "openai")
    await report(daemon, storage_closed=True)
    assert (await status(db))["state"] == "open"
    await report(other, storage_closed=True)
    row = await status(db)
    closed_at = await db.fetchval("select min(storage_closed_at) from image_jobs.daemons")
    assert (row["state"], row["since"]) == ("storage", closed_at)
    await report(daemon)
    assert (await status(db))["state"] == "open"


async def test_a_provider_that_none_can_reach_is_blocked(db: Db, daemon: Daemon) -> None:
    await report(daemon, unreachable=["openai"])
    row = await status(db)
    assert (row["state"], row["until"]) == ("blocked", None)
    assert row["sentence"].startswith("OpenAI cannot be reached")
    await report(daemon)
    assert (await status(db))["state"] == "open"


async def test_since_stays_until_the_state_changes(db: Db, daemon: Daemon) -> None:
    await db.execute("insert into image_jobs.provider_limits (provider, paused) values ('openai', true)")
    since = (await status(db))["since"]
    await move_clock(db, "10 s")
    await report(daemon)
    assert (await status(db))["since"] == since


async def test_clients_read_it(db: Db, daemon: Daemon) -> None:
    async with signed_in(db, USER):
        assert (await status(db))["state"] == "open"
        assert await db.fetchval("select image_jobs.can_subscribe('image_providers')")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, role="anon"):
            await status(db)


async def test_each_change_is_broadcast_once(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    await report(daemon)
    before = len(await told(postgres, db))
    await db.execute("insert into image_jobs.provider_limits (provider, paused) values ('openai', true)")
    await report(daemon)
    await db.execute("update image_jobs.provider_limits set paused = false")
    await report(daemon)
    paused, opened = (await told(postgres, db))[before:]
    assert [(row["provider"], row["model"], row["state"]) for row in paused] == [("openai", None, "paused")]
    assert paused[0]["sentence"] == "OpenAI is paused. Images wait, and start by themselves when it goes on."
    assert [(row["provider"], row["state"], row["sentence"]) for row in opened] == [("openai", "open", None)]


async def test_a_change_by_time_is_broadcast_by_a_daemon(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    other = await new_daemon(db, "google")
    await db.execute("select image_jobs.block_provider('google', 'imagen', interval '20 s', 'Slow down.')")
    before = len(await told(postgres, db))
    await move_clock(db, "31 s")
    await other.beat()
    await report(other)
    (rows,) = (await told(postgres, db))[before:]
    assert [(row["provider"], row["model"], row["state"]) for row in rows] == [
        ("google", "imagen", "open"),
        ("openai", None, "unserved"),
    ]


async def test_the_last_daemon_says_that_it_leaves(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    before = len(await told(postgres, db))
    await db.execute("select image_jobs.leave($1)", daemon.id)
    (rows,) = (await told(postgres, db))[before:]
    assert ("openai", "unserved") in [(row["provider"], row["state"]) for row in rows]


async def test_noting_never_waits_for_another(db: Db, second: Db, daemon: Daemon) -> None:
    async with second.transaction():
        await second.execute("insert into image_jobs.provider_limits (provider, paused) values ('openai', true)")
        await report(daemon)
    await report(daemon)
    assert await db.fetchval("select state from image_jobs.provider_states where provider = 'openai'") == "paused"


async def test_the_grace_decides_how_long_a_run_waits(db: Db, daemon: Daemon) -> None:
    await insert_run(db, processor="openai:small")
    await db.execute("select image_jobs.leave($1)", daemon.id)
    await move_clock(db, "60 s")
    other = await new_daemon(db, "google")
    assert await other.claim(10) == []
    await move_clock(db, "121 s")
    await other.beat()
    assert len(await other.claim(10)) == 1
