"""The server is away for long: the canvas recovers by itself, with nothing lost or doubled."""

import asyncio
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import expect

from tests.support.dev_process import running
from tests.support.postgres import free_port, wait_until
from tests.support.window import Window, database, put

Open = Any

OUTAGE = float(os.environ.get("IMAGE_JOBS_TEST_OUTAGE", "35"))
"""Longer than all that might give up: a lost heartbeat, 25 to 30 s after the last one, and the longest pause, 30 s."""

BOAT, PLAIN, MILL = "A boat on its way", "A wide plain", "A mill by the water"
MILL_LATER = "A mill by the water, in the evening"
THOUGHT = "A thought from the time without a server"

# Counts writes that come by the API, and not by a trigger.
COUNT_WRITES = """
create table image_jobs.client_writes (node_id text, operation text);
create function image_jobs.note_client_write() returns trigger language plpgsql security definer as $$
begin
  if session_user = 'authenticator' and pg_trigger_depth() = 1 then
    insert into image_jobs.client_writes values (new.id, lower(tg_op));
  end if;
  return null;
end $$;
create trigger note_client_write after insert or update on workflow_nodes
  for each row execute function image_jobs.note_client_write();
"""
WRITES = """
select n.node_data #>> '{promptSpec,basePrompt}' as prompt, w.operation as what, count(*)
from image_jobs.client_writes w join workflow_nodes n on n.id = w.node_id group by 1, 2
"""
EVENTS = """
select r.metadata #>> '{promptSpec,basePrompt}' as prompt, e.payload ->> 'event' as what, count(*)
from run_events e join runs r on r.id = e.run_id where r.subject_id = $1 group by 1, 2
"""

ASKS = "!dispatchEvent(new Event('beforeunload', {cancelable: true}))"
"""Whether the browser asks before the page is left."""


@pytest.mark.timeout(300)
async def test_a_long_outage_loses_and_doubles_nothing(directory: Path, open_window: Open):
    data, port = directory / "outage", free_port()
    async with running(directory, port, "--data", data.name) as dev:
        window: Window = await open_window(f"http://127.0.0.1:{port}/canvas#{uuid4()}")
        async with database(data) as db:
            await db.execute(COUNT_WRITES)
            await put(db, window.workflow, BOAT, submit=8)
            await put(db, window.workflow, PLAIN, slow=8, at=1)
            await put(db, window.workflow, MILL, at=2)
        await window.page.reload()
        await window.connected()
        for prompt in (BOAT, PLAIN):
            await window.node(prompt).get_by_role("button", name="Generate").click()
        await expect(window.node(BOAT).get_by_role("status")).to_contain_text("The painter")  # it took the order
        await expect(window.node(PLAIN)).to_have_attribute("data-status", "running")
        window.outage = True
        dev.process.kill()
        await dev.ended()
    back_at = asyncio.get_running_loop().time() + OUTAGE
    await edit_offline(window)
    await asyncio.sleep(back_at - asyncio.get_running_loop().time())

    async with running(directory, port, "--data", data.name):
        await expect(window.page.locator(".connection")).to_have_text("Live", timeout=30_000)
        await window.has_image(window.node(BOAT))
        await window.has_image(window.node(PLAIN))
        await window.has_image(window.node(MILL_LATER))  # what was pressed while the server was away
        await expect(window.nodes).to_have_count(4)
        async with database(data) as db:
            await wait_until(lambda: all_written(db))
            assert await counted(db, WRITES) == {(MILL_LATER, "update"): 1, (THOUGHT, "insert"): 1, (BOAT, "update"): 1}
            events = await counted(db, EVENTS, window.workflow)
            runs = await db.fetchval("select array_agg(status) from runs where subject_id = $1", window.workflow)
            place = await db.fetchval("select position from workflow_nodes where node_data::text like $1", f"%{BOAT}%")
        assert runs == ["completed", "completed", "completed"]
        for what in ("created", "generated", "completed"):
            assert (events[BOAT, what], events[PLAIN, what], events[MILL_LATER, what]) == (1, 1, 1)
        assert events[BOAT, "submitted"] == 1
        assert place["y"] > 100
        await window.keep_screenshot("back")
        assert not await window.page.evaluate(ASKS)
        await window.page.reload()
        await expect(window.nodes).to_have_count(4)
        await expect(window.node(MILL_LATER)).to_be_visible()
        await window.has_image(window.node(BOAT))


async def edit_offline(window: Window) -> None:
    """Type, add and drag while the server is away; the header counts the unsent changes."""
    connection = window.page.locator(".connection")
    await expect(connection).to_have_text("Offline")
    prompt = window.node(MILL).get_by_label("Prompt")
    await prompt.fill(MILL_LATER)
    await window.page.keyboard.press("Escape")
    await expect(connection).to_have_text("Offline · 1 change kept, sent once it is back")
    await window.add(THOUGHT)
    await window.page.keyboard.press("Escape")
    await window.drag(window.node(BOAT).locator(".image-node-frame"), (420, 760), offline=True)
    await expect(connection).to_have_text("Offline · 3 changes kept, sent once it is back")
    await window.node(MILL_LATER).get_by_role("button", name="Generate").click()
    await expect(window.node(MILL_LATER).get_by_role("status")).to_have_text("Starts once the server is back")
    await expect(connection).to_have_text("Offline · 4 changes kept, sent once it is back")
    await window.keep_screenshot("away")
    assert await window.page.evaluate(ASKS)


async def counted(db: Any, query: str, *arguments: object) -> dict[tuple[str, str], int]:
    return {(row["prompt"], row["what"]): row["count"] for row in await db.fetch(query, *arguments)}


async def all_written(db: Any) -> bool:
    return bool(await db.fetchval("select count(distinct node_id) = 3 from image_jobs.client_writes"))
