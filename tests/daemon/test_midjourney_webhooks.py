"""Webhooks of midjourney-proxy from its hook to the image: the REST endpoint, the database, whole daemons."""

import signal
from collections.abc import AsyncIterator

import pytest

from tests.fakes.midjourney_api import KEY, MidjourneyAPI
from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.midjourney_harness import MIDJOURNEY, midjourney_environment, polls
from tests.support.postgres import wait_until
from tests.support.runs import run_row
from tests.support.webhooks import hex_hmac

SECRET = "a webhook secret of the tests"
THEIRS = "https://93.184.215.14/hook"
ONLY_WEBHOOKS = {
    "IMAGE_JOBS_WEBHOOK_WAIT": "600",
    "IMAGE_JOBS_POLL_INTERVAL": "600",
    "IMAGE_JOBS_POLL_TIMEOUT": "3600",
}
"""Every poll is because of a webhook."""


def signed(name: str, secret: str = SECRET) -> str:
    """The signed `state` of a submission of that name."""
    return f"{name}.{hex_hmac(name, secret)}"


@pytest.fixture
async def harness(database: str, midjourney_api: MidjourneyAPI) -> AsyncIterator[DaemonHarness]:
    """Without a daemon yet. At the end no secret, nor a signature of it, is where members or operators read."""
    environment = midjourney_environment(midjourney_api, WEBHOOK_SECRET_MIDJOURNEY=SECRET, **ONLY_WEBHOOKS)
    async with open_harness(DaemonHarness, database, environment=environment, processor=MIDJOURNEY) as harness:
        yield harness
        names = await harness.db.fetch("select id || ':' || ticket as name from runs")
        signatures = [signed(row["name"]).partition(".")[2] for row in names]
        rows = await harness.db.fetch(
            "select to_jsonb(r)::text as row from runs r union all select to_jsonb(e)::text from run_events e"
        )
        written = [str(row["row"]) for row in rows] + [line for each in harness.daemons for line in each.raw]
        for secret in (KEY, SECRET, *signatures):
            assert not [line for line in written if secret in line]


async def test_webhook_triggers_a_poll_and_shows_progress(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run()
        await harness.wait_until_parked(run)
        assert len(polls(midjourney_api)) == 0
        assert (
            await midjourney_api.happen(
                "1000", status="IN_PROGRESS", progress="46%", imageUrl=f"{midjourney_api.url}/forming.png"
            )
            == 200
        )
        row = await harness.wait_until_parked(run, progress=46)
        assert row["preview_url"]
        assert await midjourney_api.happen("1000", status="IN_PROGRESS", progress="71%") == 200
        await harness.wait_until_parked(run, progress=71)
        assert await midjourney_api.happen("1000", **midjourney_api.done()) == 200
        row = await harness.wait_for_status(run, "completed")

        assert len(row["payload"]["images"]) == 4
        receipts = await harness.db.fetch(
            "select payload from run_events where run_id = $1 and kind = 'webhook' order by seq", run
        )
        assert [receipt["payload"]["data"]["type"] for receipt in receipts] == ["IN_PROGRESS", "IN_PROGRESS", "SUCCESS"]
        assert await harness.events(run, "incident") == []
    assert (len(polls(midjourney_api)), len(midjourney_api.jobs)) == (3, 1)


async def test_forged_webhook_is_refused_without_a_poll(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run()
        name = f"{run}:{(await harness.wait_until_parked(run))['ticket']}"
        hook, task = midjourney_api.hooks["1000"], {**midjourney_api.tasks["1000"], **midjourney_api.done()}
        for state in (
            name,
            f"{name}.",
            signed(name, "another secret"),
            signed("job_2:1").partition(".")[2],
        ):
            assert await midjourney_api.post(hook, {**task, "state": state}) == 401
        other = await harness.insert_run()
        await harness.wait_until_parked(other)

        assert len(polls(midjourney_api)) == 0
        assert await harness.db.fetchval("select sum(refused) from image_jobs.webhook_counters") == 4
        await midjourney_api.happen("1000", **midjourney_api.done())
        await harness.wait_for_status(run, "completed")
        assert (await run_row(harness.db, other))["status"] == "running"


async def test_early_webhook_of_an_unsaved_provider_job_counts(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    midjourney_api.mute = True
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run()
        await wait_until(lambda: midjourney_api.hooks)
        await harness.wait_for_event(run, "submitted")
        process.signal(signal.SIGKILL)
        await process.ended()
    assert await midjourney_api.happen("1000", **midjourney_api.done()) == 200
    async with harness.run_daemon() as process:
        await process.started()
        await harness.wait_for_event(run, "taken_over")
        await harness.make_due(run)
        row = await harness.wait_for_status(run, "completed")

    assert len(row["payload"]["images"]) == 4
    assert (row["provider_job_id"], len(midjourney_api.jobs)) == ("1000", 1)


async def test_webhook_signed_with_the_old_secret_is_accepted(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    async with harness.run_daemon() as process:
        await process.started()
        run = await harness.insert_run()
        await harness.wait_until_parked(run)
        process.signal(signal.SIGTERM)
        await process.ended()
    async with harness.run_daemon(WEBHOOK_SECRET_MIDJOURNEY=f"the next webhook secret,{SECRET}") as process:
        await process.started()
        assert await midjourney_api.happen("1000", **midjourney_api.done()) == 200
        await harness.wait_for_status(run, "completed")


async def test_own_webhook_url_is_polled_and_gets_no_token(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    async with harness.run_daemon(IMAGE_JOBS_POLL_INTERVAL="0.2") as process:
        await process.started()
        midjourney_api.deaf = True  # nothing listens at that address
        run = await harness.insert_run(webhookUrl=THEIRS)
        await harness.wait_for_status(run, "completed")
        refused = await harness.insert_run(webhookUrl="https://10.0.0.1/hook")
        payload = (await harness.wait_for_status(refused, "failed"))["payload"]

        assert await harness.events(run, "incident") == []
        assert payload["code"] == "invalid_request"
        assert payload["error"] == "metadata.webhookUrl cannot be used: 10.0.0.1 is not a public address."
    (call,) = midjourney_api.jobs
    assert call.fields["notifyHook"] == THEIRS
    assert "." not in call.fields["state"]
