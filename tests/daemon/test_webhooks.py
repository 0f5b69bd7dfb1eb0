"""Webhook first, poll second: whole daemons, the database as the receiver, and a fake of a proxy that sends webhooks."""

import json
import signal
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.daemons import daemon
from tests.fakes.midjourney_api import KEY, MidjourneyAPI
from tests.fakes.openai_api import OpenAIAPI
from tests.fakes.server import Answer, Call
from tests.openai_studio import Studio, open_studio
from tests.postgres import wait_until
from tests.runs import insert_run, run_row

SECRET = "a webhook secret of these tests"
DRAWING = {"status": "IN_PROGRESS", "progress": "10%"}


@pytest.fixture
async def api() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        api.reset()  # it knows its address by now
        api.stages = [DRAWING]
        yield api


@pytest.fixture
def environment(api: MidjourneyAPI, request: pytest.FixtureRequest) -> dict[str, str]:
    """What is set, and what a test sets besides by `@pytest.mark.parametrize("environment", …, indirect=True)`."""
    return {
        "MIDJOURNEY_API_URL": api.url,
        "MIDJOURNEY_API_KEY": KEY,
        "WEBHOOK_SECRET": SECRET,
        "IMAGE_JOBS_LEASE": "2",
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
        **getattr(request, "param", {}),
    }


@pytest.fixture
async def studio(database: str, environment: dict[str, str]) -> AsyncIterator[Studio]:
    async with open_studio(database, OpenAIAPI(), **environment) as studio:
        yield studio
        rows = await studio.db.fetch(
            "select to_jsonb(r) as row from runs r union all select to_jsonb(e) from run_events e"
        )
        assert SECRET not in json.dumps([row["row"] for row in rows]) + "\n".join(studio.daemon.raw)


def soon(**settings: str) -> pytest.MarkDecorator:
    """With these settings."""
    return pytest.mark.parametrize("environment", [settings], indirect=True, ids=[""])


async def order(studio: Studio) -> str:
    """Inserts a run; answers its id."""
    return await insert_run(studio.db, processor="midjourney:v7", workflow=uuid4())


async def parked(studio: Studio, run: str) -> asyncpg.Record:
    """Waits until the run's order is written down and nobody holds it; answers the row."""

    async def waits() -> asyncpg.Record | None:
        row = await run_row(studio.db, run)
        return row if row["provider_job_id"] is not None and row["claimed_by"] is None else None

    return await wait_until(waits, timeout=20)


async def left(studio: Studio, run: str) -> float:
    """Seconds until the run's next check."""
    return await studio.db.fetchval("select extract(epoch from due_at - now())::float8 from runs where id = $1", run)


def questions(api: MidjourneyAPI) -> list[Call]:
    return [call for call in api.requests if call.path.endswith("/fetch")]


def cancels(api: MidjourneyAPI) -> list[str]:
    return [call.path for call in api.requests if call.path.endswith("/cancel")]


async def incidents(studio: Studio, run: str) -> list[str]:
    return [incident["message"] for incident in await studio.events(run, "incident")]


async def test_a_webhook_makes_the_check_due_at_once_and_one_question_is_enough(
    studio: Studio, api: MidjourneyAPI
) -> None:
    run = await order(studio)
    assert (await parked(studio, run))["webhook"] == "awaited"
    assert 30 < await left(studio, run) <= 60
    assert not questions(api)
    assert await api.happen("1000", **api.done()) == 200
    row = await studio.until(run, "completed")

    assert row["webhook"] is None
    assert len(questions(api)) == 1
    assert len(api.orders) == 1
    assert await incidents(studio, run) == []
    assert "webhook" in await studio.story(run)


async def test_a_webhook_that_is_not_the_last_is_followed_by_waiting_for_the_next(
    studio: Studio, api: MidjourneyAPI
) -> None:
    run = await order(studio)
    await parked(studio, run)
    await api.happen("1000", **DRAWING)

    async def awaited_again() -> bool:
        row = await run_row(studio.db, run)
        return row["progress"] == 10 and row["webhook"] == "awaited"

    await wait_until(awaited_again, timeout=20)
    assert 30 < await left(studio, run) <= 60
    assert len(questions(api)) == 1
    await api.happen("1000", **api.done())
    await studio.until(run, "completed")
    assert len(questions(api)) == 2
    assert await incidents(studio, run) == []


@soon(IMAGE_JOBS_WEBHOOK_WAIT="1")
async def test_if_no_webhook_comes_an_incident_says_so_and_it_is_polled(studio: Studio, api: MidjourneyAPI) -> None:
    api.deaf = True
    api.stages = [DRAWING, DRAWING, DRAWING, api.done()]
    run = await order(studio)
    row = await studio.until(run, "completed")

    assert len(questions(api)) == 4
    assert await incidents(studio, run) == ["No webhook came within 1 s; it is polled from now on."]
    assert row["provider_job_id"] == "1000"


@soon(IMAGE_JOBS_WEBHOOK_WAIT="1", IMAGE_JOBS_POLL_TIMEOUT="2")
async def test_what_never_ends_is_given_up_and_a_webhook_that_comes_later_lets_a_requeue_fetch_the_same_order(
    studio: Studio, api: MidjourneyAPI
) -> None:
    run = await order(studio)
    row = await studio.until(run, "failed")
    assert (row["payload"]["error"], row["payload"]["code"]) == ("Polling timeout exceeded", "polling_timeout")
    assert await incidents(studio, run) == [
        "No webhook came within 1 s; it is polled from now on.",
        "Polling timeout exceeded",
    ]
    assert await api.happen("1000", **api.done()) == 200
    (late,) = await studio.events(run, "late_webhook")
    assert "Requeue the run" in late["data"]["hint"]
    assert (await run_row(studio.db, run))["status"] == "failed"
    await studio.db.execute("update runs set status = 'pending' where id = $1", run)
    row = await studio.until(run, "completed")
    assert row["provider_job_id"] == "1000"
    assert len(api.orders) == 1
    assert cancels(api) == []


@soon(IMAGE_JOBS_WEBHOOK_WAIT="60", IMAGE_JOBS_POLL_TIMEOUT="1")
async def test_a_webhook_is_waited_for_no_longer_than_until_a_run_is_given_up(
    studio: Studio, api: MidjourneyAPI
) -> None:
    run = await order(studio)
    await studio.until(run, "failed")
    assert await incidents(studio, run) == [
        "No webhook came within 1 s; it is polled from now on.",
        "Polling timeout exceeded",
    ]


async def test_webhooks_twice_in_the_wrong_order_and_of_unknown_orders_do_no_harm(
    studio: Studio, api: MidjourneyAPI
) -> None:
    run = await order(studio)
    await parked(studio, run)
    task, hook = dict(api.tasks["1000"]), api.hooks["1000"]
    api.tasks["1000"].update(api.done())  # what it says when it is asked
    said: list[dict[str, Any]] = [api.done(), api.done(), DRAWING, {"status": "FAILURE"}, {"id": "9999"}]
    for each in said:
        assert await api.post(hook, {**task, **each}) == 200
    await studio.until(run, "completed")
    for each in said:
        assert await api.post(hook, {**task, **each}) == 200

    async def swept() -> bool:
        return not await studio.db.fetchval(
            "select exists (select from private.webhook_deliveries where closed_at is null and provider_job_id = '1000')"
        )

    await wait_until(swept, timeout=20)
    assert (await run_row(studio.db, run))["status"] == "completed"
    assert len(api.orders) == 1
    assert len(await studio.events(run, "completed")) == 1


async def test_a_webhook_goes_to_another_daemon_when_the_one_that_ordered_was_killed(
    studio: Studio, api: MidjourneyAPI, environment: dict[str, str]
) -> None:
    run = await order(studio)
    await parked(studio, run)
    studio.daemon.signal(signal.SIGKILL)
    await studio.daemon.ended()
    assert await api.happen("1000", **api.done()) == 200  # nobody but the database is there
    async with daemon(studio.project, **environment) as other:
        await other.started()
        await studio.until(run, "completed")
    assert len(api.orders) == 1
    assert len(questions(api)) == 1
    assert cancels(api) == []


async def test_a_run_that_is_cancelled_while_it_is_parked_has_its_order_cancelled(
    studio: Studio, api: MidjourneyAPI
) -> None:
    run = await order(studio)
    await parked(studio, run)
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: cancels(api) == ["/mj/task/1000/cancel"], timeout=2)
    await wait_until(lambda: studio.events(run, "order_cancelled"))
    assert (await run_row(studio.db, run))["status"] == "cancelled"
    assert await studio.db.fetchval("select count(*) from private.cancellations") == 0


async def test_a_run_that_is_cancelled_while_its_order_is_on_its_way_has_it_cancelled_once_it_is_taken(
    studio: Studio, api: MidjourneyAPI
) -> None:
    go = api.hold()
    run = await order(studio)
    await wait_until(lambda: api.orders, timeout=20)
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: studio.events(run, "cancelled"))
    go.set()
    await wait_until(lambda: cancels(api) == ["/mj/task/1000/cancel"])
    await wait_until(lambda: studio.events(run, "order_cancelled"))
    assert (await run_row(studio.db, run))["status"] == "cancelled"
    assert await studio.events(run, "unknown_outcome") == []


async def test_a_requeue_by_hand_cancels_the_order_and_makes_another(studio: Studio, api: MidjourneyAPI) -> None:
    run = await order(studio)
    await parked(studio, run)
    await studio.db.execute("update runs set status = 'pending' where id = $1", run)
    await wait_until(lambda: len(api.orders) == 2)
    await wait_until(lambda: cancels(api) == ["/mj/task/1000/cancel"])
    assert (await parked(studio, run))["provider_job_id"] == "1001"
    await api.happen("1001", **api.done())
    await studio.until(run, "completed")


async def test_a_provider_that_fails_to_cancel_is_asked_again(studio: Studio, api: MidjourneyAPI) -> None:
    run = await order(studio)
    await parked(studio, run)
    api.next(Answer(503))
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: cancels(api))

    async def put_off() -> bool:
        return await studio.db.fetchval(
            "select tries = 1 and due_at < now() + interval '11 s' from private.cancellations"
        )

    await wait_until(put_off)
    await studio.db.execute("update private.cancellations set due_at = now()")
    await wait_until(lambda: studio.events(run, "order_cancelled"), timeout=20)
    assert len(cancels(api)) == 2


async def test_a_cancellation_outlives_the_daemon_that_was_at_it(
    studio: Studio, api: MidjourneyAPI, environment: dict[str, str]
) -> None:
    run = await order(studio)
    await parked(studio, run)
    api.hold()
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: cancels(api))
    studio.daemon.signal(signal.SIGKILL)
    await studio.daemon.ended()
    await studio.db.execute("update private.cancellations set due_at = now()")  # its lease is over
    async with daemon(studio.project, **environment) as other:
        await other.started()
        await wait_until(lambda: studio.events(run, "order_cancelled"), timeout=20)
    assert len(cancels(api)) == 2


async def test_a_daemon_that_must_leave_writes_an_order_down_that_is_on_its_way(
    studio: Studio, api: MidjourneyAPI
) -> None:
    go = api.hold()
    run = await order(studio)
    await wait_until(lambda: api.orders, timeout=20)
    studio.daemon.signal(signal.SIGTERM)
    await wait_until(lambda: studio.daemon.logged("daemon.draining"))
    studio.daemon.signal(signal.SIGTERM)
    go.set()
    assert await studio.daemon.ended() == 0
    row = await run_row(studio.db, run)
    assert (row["status"], row["provider_job_id"], row["webhook"]) == ("running", "1000", "awaited")
    assert await studio.events(run, "unknown_outcome") == []


async def test_secrets_are_handed_over_at_start_and_those_of_others_stay(
    studio: Studio, environment: dict[str, str]
) -> None:
    await studio.db.execute(
        "insert into private.webhook_secrets values ('another', '\\x00112233445566778899aabbccddeeff')"
    )
    replaced = environment | {"WEBHOOK_SECRET_MIDJOURNEY": "the first of two secrets,the second of two secrets"}
    async with daemon(studio.project, **replaced) as other:
        await other.started()
        found = await studio.db.fetch("select provider, encode(key, 'escape') as key from private.webhook_secrets")
    secrets = [(row["provider"], row["key"]) for row in found if row["provider"] != "another"]
    assert sorted(secrets) == [
        ("hmac", SECRET),
        ("midjourney", "the first of two secrets"),
        ("midjourney", "the second of two secrets"),
        ("openai", SECRET),
    ]
    assert len(found) == 5


async def test_a_secret_that_no_key_can_be_made_of_is_refused_at_start_without_saying_it(
    studio: Studio, environment: dict[str, str]
) -> None:
    broken = "whsec_!this is no base64!"
    async with daemon(studio.project, **environment, WEBHOOK_SECRET_OPENAI=broken) as other:
        assert await other.ended() == 1
    said = "\n".join(other.raw)
    assert "WEBHOOK_SECRET_OPENAI" in said
    assert "Traceback" not in said
    assert broken[6:] not in said
