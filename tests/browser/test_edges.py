"""Edges ("use this image"): refining an image, also one that is not generated yet."""

from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import expect

from tests.support.postgres import wait_until
from tests.support.window import Window, put

pytestmark = pytest.mark.timeout(150)

Open = Any

OTHER = "00000000-0000-4000-8000-00000000000b"
SOURCE = """
update workflow_nodes night set node_data = night.node_data || jsonb_build_object('source', valley.id)
from workflow_nodes valley
where night.workflow_id = $1 and valley.workflow_id = $1
  and night.node_data #>> '{promptSpec,basePrompt}' = 'The valley at night'
  and valley.node_data #>> '{promptSpec,basePrompt}' = 'A valley'
"""
RUNS = "select count(*) from runs where subject_id = $1"


@pytest.fixture
async def edge(window: Window, db: Any) -> Window:
    """A valley that takes its time, and a node that refines its image."""
    await put(db, window.workflow, "A valley", "The valley at night", slow=4)
    await db.execute(SOURCE, window.workflow)
    await window.page.reload()
    await window.connected()
    await expect(window.page.locator(".react-flow__edge")).to_have_count(1)
    return window


async def has_pending_run(db: Any, workflow: str) -> bool:
    """Whether a row has a pendingRunId."""
    query = (
        "select exists (select from workflow_nodes where workflow_id = $1 and node_data ->> 'pendingRunId' is not null)"
    )
    return bool(await db.fetchval(query, workflow))


async def used(db: Any, workflow: str) -> tuple[str, str]:
    """Return the previousImage of the last run, and the valley's image."""
    return (
        await db.fetchval(
            "select metadata #>> '{promptSpec,previousImage}' from runs where subject_id = $1 order by ticket desc limit 1",
            workflow,
        ),
        await db.fetchval(
            "select node_data ->> 'imageUrl' from workflow_nodes "
            "where workflow_id = $1 and node_data #>> '{promptSpec,basePrompt}' = 'A valley'",
            workflow,
        ),
    )


async def test_an_edge_refines_an_image(window, db):
    await put(db, window.workflow, "A valley", "The valley at night")
    await window.page.reload()
    valley, night = window.node("A valley"), window.node("The valley at night")
    await window.drag(valley.locator(".react-flow__handle.source"), night.locator(".react-flow__handle.target"))
    await expect(window.page.locator(".react-flow__edge")).to_have_count(1)

    # The valley has no image yet: it is made first, and the other waits for it.
    await night.get_by_role("button", name="Generate").click()
    await expect(night.get_by_role("status")).to_have_text("Waits for its image")
    await window.has_image(valley)
    await window.has_image(night)
    await window.keep_screenshot("edge")
    before, valleys = await used(db, window.workflow)
    assert before == valleys

    await window.page.locator(".react-flow__edge").dispatch_event("click")
    await window.page.keyboard.press("Delete")
    await expect(window.page.locator(".react-flow__edge")).to_have_count(0)
    await expect(window.nodes).to_have_count(2)


async def test_dropping_an_edge_on_the_pane_creates_a_node(window, db):
    await put(db, window.workflow, "A valley")
    await window.page.reload()
    await window.drag(window.node("A valley").locator(".react-flow__handle.source"), (1200, 300))
    await expect(window.page.locator(".react-flow__edge")).to_have_count(1)
    await expect(window.page.get_by_placeholder("What should change?")).to_be_focused()


async def test_a_pending_run_survives_a_reload(edge, db):
    night = edge.node("The valley at night")
    await night.get_by_role("button", name="Generate").click()
    await wait_until(lambda: has_pending_run(db, edge.workflow))
    await edge.page.reload()
    await expect(night.get_by_role("status")).to_have_text("Waits for its image")
    await edge.keep_screenshot("waits-for-its-image")
    await edge.has_image(night)
    before, valleys = await used(db, edge.workflow)
    assert before == valleys
    assert await db.fetchval(RUNS, edge.workflow) == 2
    await wait_until(lambda: has_no_pending_run(db, edge.workflow))


async def has_no_pending_run(db: Any, workflow: str) -> bool:
    return not await has_pending_run(db, workflow)


async def test_a_pending_run_starts_when_a_window_opens_later(url, edge, open_window: Open, db):
    night = edge.node("The valley at night")
    await night.get_by_role("button", name="Generate").click()
    await wait_until(lambda: has_pending_run(db, edge.workflow))
    workflow = edge.workflow
    await edge.page.goto("about:blank")
    done = "select exists (select from runs where subject_id = $1 and status = 'completed')"
    await wait_until(lambda: db.fetchval(done, workflow), timeout=40)
    assert await has_pending_run(db, workflow)
    assert await db.fetchval(RUNS, workflow) == 1
    later = await open_window(f"{url}#{workflow}")
    await later.has_image(later.node("The valley at night"))
    assert await db.fetchval(RUNS, workflow) == 2


async def test_several_windows_start_a_pending_run_once(url, edge, open_window: Open, db):
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", edge.workflow, OTHER)
    windows = [edge, *[await open_window(f"{url}{someone}#{edge.workflow}") for someone in ("", f"?as={OTHER}")]]
    for each in windows:
        await each.connected()
        each.expected = "status of 409"  # of the inserts that come second, some after the test's last line
    await edge.node("The valley at night").get_by_role("button", name="Generate").click()
    for each in windows:
        night = each.node("The valley at night")
        await expect(night.get_by_role("status")).to_have_text("Waits for its image")
    for each in windows:
        await each.has_image(each.node("The valley at night"))
    assert await db.fetchval(RUNS, edge.workflow) == 2


async def test_generate_all_makes_a_shared_source_once(edge, db):
    await edge.button("Generate all").click()
    await edge.counts(2, "ready")
    assert await db.fetchval(RUNS, edge.workflow) == 2


async def test_cancelling_a_pending_run_keeps_its_source_running(edge, db):
    valley, night = edge.node("A valley"), edge.node("The valley at night")
    await night.get_by_role("button", name="Generate").click()
    await wait_until(lambda: has_pending_run(db, edge.workflow))
    await night.get_by_role("button", name="Cancel").click()
    await expect(night.get_by_role("button", name="Generate")).to_be_visible()
    await wait_until(lambda: has_no_pending_run(db, edge.workflow))
    await edge.has_image(valley)
    assert await db.fetchval(RUNS, edge.workflow) == 1


async def test_a_pending_run_is_dropped_when_its_source_fails(edge, db):
    demo = """jsonb_set(node_data, '{metadata,demo}', '{"refuse": "The painter does not paint valleys."}')"""
    await db.execute(
        f"update workflow_nodes set node_data = {demo} "
        "where workflow_id = $1 and node_data #>> '{promptSpec,basePrompt}' = 'A valley'",
        edge.workflow,
    )
    await edge.page.reload()
    valley, night = edge.node("A valley"), edge.node("The valley at night")
    await night.get_by_role("button", name="Generate").click()
    await expect(valley).to_have_attribute("data-status", "error", timeout=20_000)
    await expect(night.get_by_role("button", name="Generate")).to_be_visible()
    await wait_until(lambda: has_no_pending_run(db, edge.workflow))
    assert await db.fetchval(RUNS, edge.workflow) == 1


async def test_a_chain_of_three_runs_one_after_the_other(edge, db):
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data, position) "
        "select $2, workflow_id, node_type, jsonb_set(node_data || jsonb_build_object('source', id), "
        "'{promptSpec,basePrompt}', '\"The night in winter\"'), '{\"x\": 720, \"y\": 0}' from workflow_nodes "
        "where workflow_id = $1 and node_data ? 'source'",
        edge.workflow,
        str(uuid4()),
    )
    await edge.page.reload()
    winter = edge.node("The night in winter")
    await winter.get_by_role("button", name="Generate").click()
    await expect(winter.get_by_role("status")).to_have_text("Waits for its image")
    pending = "select count(node_data ->> 'pendingRunId') = 2 from workflow_nodes where workflow_id = $1"
    await wait_until(lambda: db.fetchval(pending, edge.workflow))
    await edge.page.reload()
    await edge.has_image(winter)
    await edge.counts(3, "ready")
    assert await db.fetchval(RUNS, edge.workflow) == 3
