"""Two daemons with an address for alerts, as operators run them: one of them posts, and neither logs the address."""

import pytest

from tests.fakes.slack_api import PATH, SlackAPI
from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.postgres import wait_until

pytestmark = pytest.mark.timeout(150)


async def test_one_of_two_daemons_posts_an_alert(database: str) -> None:
    async with SlackAPI() as slack, open_harness(DaemonHarness, database) as harness:
        address = {"IMAGE_JOBS_ALERT_URL": slack.address}
        async with harness.run_daemon(**address) as first, harness.run_daemon(**address) as second:
            await first.started()
            await second.started()
            await harness.db.execute(
                "select image_jobs.block_provider('openai', null, interval '1 hour', 'Pay your bill.')"
            )
            await wait_until(lambda: slack.posted, timeout=30)
            await harness.db.execute("delete from image_jobs.provider_blocks")
            away = "update image_jobs.alert_notices set away_since = away_since - interval '6 min' where away_since is not null"
            await wait_until(lambda: harness.db.fetchval(f"{away} returning true"), timeout=30)
            await wait_until(lambda: len(slack.posted) >= 2, timeout=30)
            # Before they end: what was posted is logged once its response has come.
            await wait_until(lambda: len(first.logged("alert.sent") + second.logged("alert.sent")) >= 2, timeout=30)
        assert [notice["state"] for notice in slack.posted] == ["open", "closed"]
        assert slack.posted[0]["text"].startswith("WARNING 127.0.0.1:")
        lines = [line for daemon in harness.daemons for line in daemon.raw]
        assert sum("alert.sent" in line for line in lines) == 2
        assert not any(PATH in line for line in lines)
