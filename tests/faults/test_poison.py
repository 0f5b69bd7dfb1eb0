"""Rows that are made to break a daemon: the run ends with a reason, and the daemon goes on."""

import asyncpg
import pytest

from tests.faults.world import World
from tests.postgres import wait_until
from tests.runs import event_names

DEEP = '{"deep": ' + "[" * 3000 + "]" * 3000 + "}"


async def test_metadata_that_is_nested_without_end_is_refused(world: World) -> None:
    with pytest.raises(asyncpg.InvalidParameterValueError, match="64 levels"):
        await world.db.execute(
            """insert into runs (kind, subject_id, processor, metadata) values ('image_gen', gen_random_uuid(),
            'demo:painter', '{"promptSpec": {"basePrompt": "a"}}'::jsonb || $1::text::jsonb)""",
            DEEP,
        )


async def test_what_came_into_a_row_by_another_way_fails_the_run_and_not_the_daemon(world: World) -> None:
    (deep,) = await world.order(processor="demo:painter", demo={"noop": True})
    await world.db.execute("update runs set metadata = metadata || $1::text::jsonb", DEEP)
    async with world.daemon() as it:
        await it.started()

        async def code() -> str | None:
            return await world.db.fetchval("select payload ->> 'code' from runs where status = 'failed'")

        assert await wait_until(code, timeout=20) == "invalid_request"
        await world.db.execute("update runs set metadata = '{}' where id = $1", deep)
        (other,) = await world.order(processor="demo:painter", demo={"noop": True})
        await world.until(other, "completed")
        await world.all_ended_once()


async def test_a_prompt_of_ten_thousand_unknown_fields_gets_a_dozen_warnings(world: World) -> None:
    prompt = {"basePrompt": "a", "size": "64x64", **{f"field {number}": 1 for number in range(10_000)}}
    async with world.daemon() as it:
        await it.started()
        (run,) = await world.order(processor="demo:painter", demo={"noop": True}, promptSpec=prompt)
        await world.until(run, "completed")
        await world.all_ended_once()
    warnings = (await event_names(world.db, run)).count("warning")
    assert warnings == 11
