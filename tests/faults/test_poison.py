"""Hostile rows: the run fails with a reason, and the daemon goes on."""

import asyncpg
import pytest

from tests.support.fault_harness import FaultHarness
from tests.support.postgres import wait_until

DEEP = '{"deep": ' + "[" * 3000 + "]" * 3000 + "}"


async def test_deeply_nested_metadata_is_refused(harness: FaultHarness) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="64 levels"):
        await harness.db.execute(
            """insert into runs (kind, subject_id, processor, metadata) values ('image_gen', gen_random_uuid(),
            'demo:painter', '{"promptSpec": {"basePrompt": "a"}}'::jsonb || $1::text::jsonb)""",
            DEEP,
        )


async def test_deeply_nested_metadata_in_a_row_fails_the_run_only(harness: FaultHarness) -> None:
    (deep,) = await harness.insert_runs(1, "demo:painter", demo={"noop": True})
    await harness.db.execute("update runs set metadata = metadata || $1::text::jsonb", DEEP)
    async with harness.run_daemon() as it:
        await it.started()

        async def code() -> str | None:
            return await harness.db.fetchval("select payload ->> 'code' from runs where status = 'failed'")

        assert await wait_until(code, timeout=20) == "invalid_request"
        await harness.db.execute("update runs set metadata = '{}' where id = $1", deep)
        other = await harness.insert_run("demo:painter", demo={"noop": True})
        await harness.wait_for_status(other, "completed")
        await harness.assert_all_end_once()


async def test_warnings_about_unknown_fields_are_capped(harness: FaultHarness) -> None:
    prompt = {"basePrompt": "a", "size": "64x64", **{f"field {number}": 1 for number in range(10_000)}}
    async with harness.run_daemon() as it:
        await it.started()
        run = await harness.insert_run("demo:painter", demo={"noop": True}, prompt=prompt)
        await harness.wait_for_status(run, "completed")
        await harness.assert_all_end_once()
    warnings = (await harness.event_names(run)).count("warning")
    assert warnings == 11
