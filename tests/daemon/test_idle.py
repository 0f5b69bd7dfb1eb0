"""A daemon with nothing to do writes its beats, and nothing else."""

from datetime import datetime

from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.postgres import wait_until

BEATS = 3


async def test_an_idle_daemon_writes_nothing_but_beats(database: str) -> None:
    """Row locks count, too: each transaction that writes or locks has a number."""
    async with open_harness(DaemonHarness, database) as harness, harness.run_daemon(IMAGE_JOBS_LEASE="6") as process:
        await process.started()
        seen: dict[datetime, int] = {}

        async def only_beats() -> bool:
            beat: datetime = await harness.db.fetchval("select seen_at from image_jobs.daemons")
            number: int = await harness.db.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
            seen.setdefault(beat, number)
            numbers = list(seen.values())[-BEATS - 1 :]
            return len(numbers) > BEATS and numbers[-1] - numbers[0] == BEATS

        await wait_until(only_beats, timeout=60)

        async def updates(column: str) -> int:
            count: int = await harness.db.fetchval(
                f"select {column} from pg_stat_user_tables where relid = 'image_jobs.daemons'::regclass"
            )
            return count

        async def counted() -> bool:
            return await updates("n_tup_upd") >= BEATS

        await wait_until(counted, timeout=60)
        assert await updates("n_tup_upd - n_tup_hot_upd") == 0, "a beat writes no index"
