"""The promises of `useWorkflow` when Realtime loses, repeats or delays messages; and how often the database sends them."""

import asyncio
import json
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from playwright.async_api import Route, expect

from tests.support.postgres import wait_until
from tests.support.window import put

pytestmark = pytest.mark.timeout(150)

UPDATE = """
with writer as (select set_config('image_jobs.writer', 'projection', true))
update workflow_nodes
set node_data = node_data || jsonb_build_object('status', 'running', 'message', 'Painting', 'progress', $2::int),
  version = nextval('image_jobs.node_versions')
from writer where workflow_id = $1
"""
UPDATE_ONE = f"{UPDATE} and id = $3"
COUNT_RENDERS = """() => {
  window.renders = [];
  new MutationObserver(changes => {
    const nodes = new Set(changes.map(each => each.target.closest?.(".image-node")?.dataset.id).filter(Boolean));
    if (nodes.size > 0) window.renders.push(nodes.size);
  }).observe(document.querySelector(".react-flow"), { subtree: true, attributes: true, childList: true });
}"""
"""How many nodes change in each render."""
RENDERED = """() => {
  const seen = window.seen ?? new Map(), all = [...document.querySelectorAll(".react-flow__node, .image-node")];
  window.seen = new Map(all.map(each => [each, each[Object.keys(each).find(key => key.startsWith("__reactProps"))]]));
  return all.filter(each => seen.get(each) !== window.seen.get(each)).length;
}"""
"""How many elements of nodes React has rendered since the last call, also those in which nothing has changed."""
SENT = """
select m.inserted_at at time zone 'utc' as at, (node #>> '{node_data,progress}')::int as progress, node #>> '{node_data,status}' as status
from realtime.messages m, jsonb_array_elements(m.payload -> 'nodes') node
where m.topic = 'workflow:' || $1::text order by m.inserted_at
"""


@pytest.fixture
async def silence(db: Any):
    """Disable the broadcast of changed nodes, as if every message were lost."""
    await db.execute("alter table workflow_nodes disable trigger image_jobs_nodes_updated")
    yield
    await db.execute("alter table workflow_nodes enable trigger image_jobs_nodes_updated")


async def test_lost_messages_are_refetched_on_focus(window, db, silence):
    await put(db, window.workflow, "A valley")
    await window.page.reload()
    await window.connected()
    await window.traffic.settled()  # what SUBSCRIBED had fetched is here
    await db.execute(UPDATE, window.workflow, 42)
    bar = window.page.get_by_role("progressbar")
    await expect(bar).to_have_count(0)
    await window.page.evaluate("dispatchEvent(new Event('focus'))")
    await expect(bar).to_have_attribute("aria-valuenow", "42")


async def test_a_silent_run_is_refetched(window, db, silence):
    await put(db, window.workflow, "A valley")
    await db.execute(UPDATE, window.workflow, 10)
    await window.page.reload()
    bar = window.page.get_by_role("progressbar")
    await expect(bar).to_have_attribute("aria-valuenow", "10")
    await window.connected()
    await window.traffic.settled()
    await db.execute(UPDATE, window.workflow, 42)
    await expect(bar).to_have_attribute("aria-valuenow", "42", timeout=30_000)


async def test_a_second_press_after_lost_news_pays_for_nothing(window, db, silence):
    """Neither the message nor the fetch after Generate arrives: the card says what the call itself has returned."""
    await put(db, window.workflow, "A valley", hang=True)
    await window.page.reload()
    await window.connected()
    await window.traffic.settled()

    async def refuse(route: Route) -> None:
        await (route.abort() if route.request.method == "GET" else route.fallback())

    window.expected = "net::ERR_FAILED"
    await window.page.route("**/rest/v1/workflow_nodes*", refuse)
    node = window.node("A valley")
    async with window.page.expect_response("**/rpc/start_image_job"):
        await node.get_by_role("button", name="Generate").click()
    await expect(node).to_have_attribute("data-status", "pending", timeout=20_000)
    await node.locator(".image-node-prompt").press("Control+Enter")
    await expect(node.get_by_role("button", name="Generate")).to_have_count(0)
    await window.page.unroute("**/rest/v1/workflow_nodes*", refuse)
    await window.page.evaluate("dispatchEvent(new Event('focus'))")
    await expect(node).to_have_attribute("data-status", "running", timeout=20_000)
    assert await db.fetchval("select count(*) from runs where subject_id = $1", window.workflow) == 1
    await node.get_by_role("button", name="Cancel").click()


async def test_two_windows_pay_once_and_lose_no_word(url: str, window, open_window, db):
    """Both press Generate before either sees the other's run; then one deletes what the other is typing at."""
    await put(db, window.workflow, "A valley")
    await window.page.reload()
    other = await open_window(f"{url}#{window.workflow}")
    await window.connected()
    await other.connected()
    held, may_go_on = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        held.set()
        await may_go_on.wait()
        await route.continue_()

    await window.page.route("**/rpc/start_image_job", hold)
    await window.node("A valley").get_by_role("button", name="Generate").click()
    await asyncio.wait_for(held.wait(), 20)
    await other.node("A valley").get_by_role("button", name="Generate").click()
    await other.has_image(other.node("A valley"))
    async with window.page.expect_response("**/rpc/start_image_job"):
        may_go_on.set()
    await window.has_image(window.node("A valley"))
    assert await db.fetchval("select count(*) from runs where subject_id = $1", window.workflow) == 1

    await window.node("A valley").locator(".image-node-prompt").fill("A valley at dusk, with a river")
    await expect(other.node("A valley at dusk")).to_be_visible(timeout=20_000)
    await other.node("A valley at dusk").locator("..").focus()
    await other.page.keyboard.press("Delete")
    await expect(window.toast).to_contain_text("was deleted in another window.", timeout=20_000)
    await window.button("Bring it back").click()
    for each in (window, other):
        await expect(each.node("A valley at dusk, with a river")).to_be_visible(timeout=20_000)
    await other.has_image(other.node("A valley at dusk"))


async def test_late_and_duplicate_messages_change_nothing(window, db):
    await put(db, window.workflow, "A valley")
    await window.page.reload()
    await window.connected()
    await db.execute(UPDATE, window.workflow, 42)
    bar = window.page.get_by_role("progressbar")
    await expect(bar).to_have_attribute("aria-valuenow", "42")
    old = await db.fetchval(
        "select payload from realtime.messages where topic = $1 order by inserted_at desc limit 1",
        f"workflow:{window.workflow}",
    )
    await db.execute(UPDATE, window.workflow, 77)
    await expect(bar).to_have_attribute("aria-valuenow", "77")

    await window.page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => window.seen.push(document.querySelector("[role=progressbar]")?.getAttribute("aria-valuenow")))
            .observe(document.body, { subtree: true, attributes: true, childList: true });
    }""")
    old = json.loads(old) if isinstance(old, str) else old
    old.pop("id", None)
    for _ in range(2):
        await db.execute("select realtime.send($1, 'nodes_changed', $2, true)", old, f"workflow:{window.workflow}")
    await put(db, window.workflow, "A later node", at=1)
    await expect(window.node("A later node")).to_be_visible()
    await expect(bar).to_have_attribute("aria-valuenow", "77")
    assert "42" not in await window.page.evaluate("window.seen")


async def test_a_burst_is_one_render_of_changed_nodes_alone(window, db):
    await put(db, window.workflow, *(f"Island number {number}" for number in range(12)))
    await window.page.reload()
    await window.connected()
    await db.execute(UPDATE, window.workflow, 1)
    await expect(window.page.get_by_role("progressbar")).to_have_count(12)
    await expect(window.page.locator(".image-node-model small:not(:empty)")).to_have_count(
        12
    )  # the models are here, too
    await window.page.evaluate(COUNT_RENDERS)
    rows = await db.fetch("select id from workflow_nodes where workflow_id = $1", window.workflow)

    # Twelve messages wait while the page is busy. A frame may come after the first of them, and between others.
    busy = asyncio.create_task(window.page.evaluate("for (const end = Date.now() + 1500; Date.now() < end; );"))
    async with db.transaction():
        for row in rows:
            await db.execute(UPDATE_ONE, window.workflow, 2, row["id"])
    await busy
    await expect(window.page.locator("[aria-valuenow='2']")).to_have_count(12)
    renders = await window.page.evaluate("window.renders")
    assert sum(renders) == 12
    assert len(renders) <= 4

    await window.page.evaluate("window.renders.length = 0")
    await window.page.evaluate(RENDERED)
    await db.execute(UPDATE_ONE, window.workflow, 3, rows[0]["id"])
    await expect(window.page.locator("[aria-valuenow='3']")).to_have_count(1)
    assert await window.page.evaluate("window.renders") == [1]
    # The node and its card. With hundreds of nodes, the others would cost a frame.
    assert await window.page.evaluate(RENDERED) == 2


async def test_progress_is_sent_once_a_second_and_the_end_at_once(window, db):
    await put(db, window.workflow, "A long road", slow=5)
    await window.page.reload()
    await window.connected()
    await window.button("Generate").first.click()
    await window.has_image(window.node("A long road"))
    sent = await db.fetch(SENT, window.workflow)
    changes = [
        row["at"]
        for before, row in pairwise(sent)
        if row["status"] == "running" and row["progress"] != before["progress"]
    ]
    assert len(changes) >= 3
    assert all(later - earlier > timedelta(seconds=0.8) for earlier, later in pairwise(changes[1:]))
    finished = await db.fetchval("select finished_at from runs where subject_id = $1", window.workflow)
    (end,) = [row["at"] for row in sent if row["status"] == "completed"]
    assert end - finished < timedelta(seconds=1)


async def test_all_runs_can_be_cancelled_at_once(window, db):
    await put(db, window.workflow, "A wait", "Another wait", hang=True)
    await window.page.reload()
    await window.button("Generate all").click()
    await window.counts(2, "in the making")
    await window.button("Cancel all").click()
    query = "select bool_and(status = 'cancelled') and count(*) = 2 from runs where subject_id = $1"
    await wait_until(lambda: db.fetchval(query, window.workflow))
    for prompt in ("A wait", "Another wait"):
        await expect(window.node(prompt).get_by_role("status")).to_have_text("Cancelled")
