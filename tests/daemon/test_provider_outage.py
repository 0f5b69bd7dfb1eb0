"""A provider that is down for all, or that one daemon cannot reach: runs wait, and lose nothing."""

import socket
from io import BytesIO

from PIL import Image

from tests.fakes.openai_api import OpenAIAPI, status
from tests.support.daemon_harness import DaemonHarness
from tests.support.openai_harness import openai_harness
from tests.support.postgres import wait_until

RUNS = 24
SLOTS = 4
FAILED_PROBES = 4


def small_picture() -> bytes:
    """Return a picture that costs no time."""
    file = BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "PNG")
    return file.getvalue()


async def shorten_block(harness: DaemonHarness) -> None:
    """Let no block last longer than a quarter of a second; how long they last by themselves, test_streaks.py says."""
    await harness.db.execute("update image_jobs.provider_blocks set until = least(until, now() + interval '0.25 s')")


async def statuses(harness: DaemonHarness) -> set[tuple[str, int]]:
    return {(row[0], row[1]) for row in await harness.db.fetch("select distinct status, attempt from runs")}


async def test_an_outage_costs_no_run_an_attempt(database: str) -> None:
    """Two daemons, and an API that answers 503 at once until several probes have failed."""
    async with (
        OpenAIAPI(outage=status(503, "server_error"), picture=small_picture()) as api,
        openai_harness(database, api, IMAGE_JOBS_CONCURRENCY=str(SLOTS)) as openai,
        openai.run_daemon() as second,
    ):
        await second.started()
        await openai.reset_limits()
        await openai.insert_runs(RUNS)

        async def probed() -> bool:
            await shorten_block(openai)
            return await openai.db.fetchval("select max(closings) > $1 from image_jobs.provider_streaks", FAILED_PROBES)

        await wait_until(probed, timeout=30)
        assert len(api.requests) <= 4 * SLOTS + 2 * FAILED_PROBES
        assert await statuses(openai) <= {("pending", 0), ("running", 1)}
        api.outage = None

        async def completed() -> bool:
            await shorten_block(openai)
            return await statuses(openai) == {("completed", 1)}

        await wait_until(completed, timeout=60)


async def test_a_daemon_without_network_leaves_runs_to_another(database: str) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        settings = {"OPENAI_BASE_URL": nowhere, "IMAGE_JOBS_CONCURRENCY": str(SLOTS)}
        async with OpenAIAPI(picture=small_picture()) as api, openai_harness(database, api, **settings) as openai:
            await openai.reset_limits()
            await openai.insert_runs(RUNS)
            await wait_until(lambda: openai.daemon.logged("provider.unreachable"))
            assert await openai.blocked() == {}
            async with openai.run_daemon(OPENAI_BASE_URL=api.url) as second:
                await second.started()

                async def completed() -> bool:
                    return await statuses(openai) == {("completed", 1)}

                await wait_until(completed, timeout=60)
            closings = len(openai.daemon.logged("provider.unreachable"))
            tried = await openai.db.fetchval("select count(*) from run_events where payload ->> 'event' = 'retry'")
            assert tried <= SLOTS * (closings + 1), "a handful before each pause, which grow"
