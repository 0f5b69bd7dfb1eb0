"""Webhooks of a midjourney-proxy, all the way: its hook, the REST endpoint, the database, the daemon, the picture."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg
import pytest

from tests.daemons import Supabase, daemon, supabase
from tests.fakes.midjourney_api import KEY, MidjourneyAPI
from tests.fakes.openai_api import OpenAIAPI
from tests.openai_studio import Studio
from tests.postgres import connect, wait_until
from tests.runs import insert_run, run_row
from tests.webhooks import hex_hmac

SECRET = "a webhook secret of the tests"
THEIRS = "https://93.184.215.14/hook"
FOR_EVER = {"IMAGE_JOBS_WEBHOOK_WAIT": "600", "IMAGE_JOBS_POLL_INTERVAL": "600", "IMAGE_JOBS_POLL_TIMEOUT": "3600"}
"""Nothing is asked but because a webhook came."""


def signed(name: str, secret: str = SECRET) -> str:
    """The state of an order of that name."""
    return f"{name}.{hex_hmac(name, secret)}"


@pytest.fixture
async def api() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        api.reset()  # it knows its address by now
        yield api


@pytest.fixture
async def project(database: str) -> AsyncIterator[Supabase]:
    async with supabase(database) as project:
        yield project


@pytest.fixture
async def db(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """In the end no secret, nor what is made with it, is where members or operators read."""
    db = await connect(database)
    yield db
    rows = await db.fetch("select to_jsonb(r) as row from runs r union all select to_jsonb(e) from run_events e")
    written = json.dumps([row["row"] for row in rows])
    names = await db.fetch("select id || ':' || ticket as name from runs")
    for secret in (KEY, SECRET, *(signed(row["name"]).partition(".")[2] for row in names)):
        assert secret not in written
    await db.close()


@asynccontextmanager
async def studio(
    project: Supabase, db: "asyncpg.Connection[asyncpg.Record]", api: MidjourneyAPI, **environment: str
) -> AsyncIterator[Studio]:
    """A daemon that orders from the proxy, and that its webhooks come to."""
    environment = {
        "MIDJOURNEY_API_URL": api.url,
        "MIDJOURNEY_API_KEY": KEY,
        "WEBHOOK_SECRET_MIDJOURNEY": SECRET,
        "IMAGE_JOBS_LEASE": "2",
        **FOR_EVER,
        **environment,
    }
    async with daemon(project, **environment) as process:
        await process.started()
        yield Studio(project, db, OpenAIAPI(), process)
        assert SECRET not in "\n".join(process.raw)


async def order(db: "asyncpg.Connection[asyncpg.Record]", **metadata: str) -> str:
    """Inserts a run; answers its id."""
    return await insert_run(db, processor="midjourney:v7", workflow=uuid4(), **metadata)


async def parked(db: "asyncpg.Connection[asyncpg.Record]", run: str, progress: int = 0) -> asyncpg.Record:
    """Waits until the run holds no slot, and shows that progress; answers the row."""

    async def found() -> asyncpg.Record | None:
        row = await run_row(db, run)
        resting = row["status"] == "running" and row["claimed_by"] is None and row["provider_job_id"] is not None
        return row if resting and row["progress"] == progress else None

    return await wait_until(found, timeout=20)


def asked(api: MidjourneyAPI) -> int:
    """How often the proxy was asked about an order."""
    return sum(call.path.endswith("/fetch") for call in api.requests)


async def test_a_webhook_has_the_order_checked_at_once_and_shows_its_progress(
    project: Supabase, db: "asyncpg.Connection[asyncpg.Record]", api: MidjourneyAPI
) -> None:
    async with studio(project, db, api) as it:
        run = await order(db)
        await parked(db, run)
        assert asked(api) == 0
        assert await api.happen("1000", status="IN_PROGRESS", progress="46%", imageUrl=f"{api.url}/forming.png") == 200
        row = await parked(db, run, 46)
        assert row["preview_url"]
        assert await api.happen("1000", status="IN_PROGRESS", progress="71%") == 200
        await parked(db, run, 71)
        assert await api.happen("1000", **api.done()) == 200
        row = await it.until(run, "completed")

        assert len(row["payload"]["images"]) == 4
        receipts = await db.fetch(
            "select payload from run_events where run_id = $1 and kind = 'webhook' order by seq", run
        )
        assert [receipt["payload"]["data"]["type"] for receipt in receipts] == ["IN_PROGRESS", "IN_PROGRESS", "SUCCESS"]
        assert await it.events(run, "incident") == []
    assert (asked(api), len(api.orders)) == (3, 1)


async def test_a_forged_webhook_is_refused_and_nobody_is_asked_for_it(
    project: Supabase, db: "asyncpg.Connection[asyncpg.Record]", api: MidjourneyAPI
) -> None:
    async with studio(project, db, api) as it:
        run = await order(db)
        name = f"{run}:{(await parked(db, run))['ticket']}"
        hook, task = api.hooks["1000"], {**api.tasks["1000"], **api.done()}
        for state in (
            name,
            f"{name}.",
            signed(name, "another secret of somebody"),
            signed("job_2:1").partition(".")[2],
        ):
            assert await api.post(hook, {**task, "state": state}) == 401
        other = await order(db)
        await parked(db, other)

        assert asked(api) == 0
        assert await db.fetchval("select sum(refused) from private.webhook_counters") == 4
        await api.happen("1000", **api.done())
        await it.until(run, "completed")
        assert (await run_row(db, other))["status"] == "running"


async def test_an_order_that_a_killed_daemon_could_not_write_down_is_found_and_its_early_webhook_heard(
    project: Supabase, db: "asyncpg.Connection[asyncpg.Record]", api: MidjourneyAPI
) -> None:
    api.mute = True
    async with studio(project, db, api) as it:
        run = await order(db)
        await wait_until(lambda: api.hooks)
        await wait_until(lambda: it.events(run, "submitted"))
        it.daemon.signal(signal.SIGKILL)
        await it.daemon.ended()
    assert await api.happen("1000", **api.done()) == 200
    async with studio(project, db, api) as it:
        await wait_until(lambda: it.events(run, "taken_over"), timeout=20)
        await it.hurry(run)
        row = await it.until(run, "completed")

    assert len(row["payload"]["images"]) == 4
    assert (row["provider_job_id"], len(api.orders)) == ("1000", 1)


async def test_a_webhook_of_an_order_from_before_the_secret_was_replaced_is_still_good(
    project: Supabase, db: "asyncpg.Connection[asyncpg.Record]", api: MidjourneyAPI
) -> None:
    async with studio(project, db, api) as it:
        run = await order(db)
        await parked(db, run)
        it.daemon.signal(signal.SIGTERM)
        await it.daemon.ended()
    async with studio(project, db, api, WEBHOOK_SECRET_MIDJOURNEY=f"the next webhook secret,{SECRET}") as it:
        assert await api.happen("1000", **api.done()) == 200
        await it.until(run, "completed")


async def test_a_run_with_a_hook_of_its_own_is_polled_and_gets_no_token_of_ours(
    project: Supabase, db: "asyncpg.Connection[asyncpg.Record]", api: MidjourneyAPI
) -> None:
    async with studio(project, db, api, IMAGE_JOBS_POLL_INTERVAL="0.2") as it:
        api.deaf = True  # nobody listens at that address
        run = await order(db, webhookUrl=THEIRS)
        await it.until(run, "completed")
        refused = await order(db, webhookUrl="https://10.0.0.1/hook")
        payload = (await it.until(refused, "failed"))["payload"]

        assert await it.events(run, "incident") == []
        assert payload["code"] == "invalid_request"
        assert payload["error"] == "metadata.webhookUrl cannot be used: 10.0.0.1 is not a public address."
    (call,) = api.orders
    assert call.fields["notifyHook"] == THEIRS
    assert "." not in call.fields["state"]
