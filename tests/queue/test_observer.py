"""The observer of a daemon without metrics logs what failed, and takes nothing from the daemons that count."""

import asyncio
from contextlib import suppress

from structlog.testing import capture_logs

from daemon.metrics import Metrics
from daemon.queue.client import Queue
from daemon.queue.observer import Observer
from tests.support.postgres import wait_until
from tests.support.protocol import Db

TALLIES = """
insert into image_jobs.tallies (metric, provider, model, result, count, run_id)
values ('runs', 'demo', 'painter', 'cancelled', 40, null), ('runs', 'demo', 'painter', 'failed', 1, 'job_1')
"""


async def test_a_daemon_without_a_port_only_logs(database: str, db: Db) -> None:
    await db.execute(TALLIES)
    with capture_logs() as lines:
        async with Queue(database) as queue:
            observing = asyncio.create_task(Observer(queue, Metrics(None)).run())
            await wait_until(lambda: lines, timeout=30)
            observing.cancel()
            with suppress(asyncio.CancelledError):
                await observing
    assert [(line["event"], line["run_id"]) for line in lines] == [("run.finished", "job_1")]
    assert await db.fetchval("select count(*) from image_jobs.tallies") == 2
