"""The store of workflow.ts: told once where it is refused, edits of the newest state, and sessions that come and go."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import Browser, BrowserContext, Page, Route, expect

from daemon.providers import models
from tests.support.node import run_script
from tests.support.postgres import ROOT
from tests.support.window import Traffic, Window, put

pytestmark = pytest.mark.timeout(150)


class Requests:
    """Requests for the nodes, and joins of channels, of a page."""

    def __init__(self, page: Page) -> None:
        self.nodes = self.joins = 0
        self.traffic = Traffic(page)
        page.on("request", lambda request: self._note(request.url))
        page.on("websocket", lambda socket: socket.on("framesent", self._note_frame))

    def _note(self, url: str) -> None:
        self.nodes += "/rest/v1/workflow_nodes" in url

    def _note_frame(self, frame: Any) -> None:
        self.joins += "phx_join" in str(frame)


async def sign_out(visit: BrowserContext) -> None:
    """Give the canvas a session of nobody: the anon key for a token."""

    async def handle(route: Route) -> None:
        response = await route.fetch()
        session = await response.json()
        await route.fulfill(response=response, json={**session, "accessToken": session["anonKey"]})

    await visit.route("**/canvas/session*", handle)


@pytest.fixture
async def visit(browser: Browser):
    visit = await browser.new_context()
    yield visit
    await visit.close()


async def told_once(page: Page, requests: Requests, sentence: str) -> None:
    """Check that a sentence is shown once, and that in the ten minutes after it nothing is asked."""
    toast = page.locator(".toast")
    await expect(toast).to_have_count(1, timeout=20_000)
    await expect(toast).to_contain_text(sentence)
    await expect(page.locator(".connection")).not_to_have_text("Connecting", timeout=20_000)
    await requests.traffic.settled()
    before = requests.nodes
    for _ in range(5):
        await page.clock.run_for(120_000)
        await requests.traffic.settled()
    assert requests.nodes == before <= 2  # the second: the channel was joined meanwhile
    await expect(toast).to_have_count(0)  # it went, and did not come again


async def test_a_signed_out_user_is_told_once(url: str, visit: BrowserContext):
    await sign_out(visit)
    page = await visit.new_page()
    await page.clock.install()
    requests = Requests(page)
    await page.goto(f"{url}#{uuid4()}")
    await told_once(page, requests, "You are signed out.")
    assert requests.joins == 1


async def test_a_user_who_is_no_member_is_told_once(url: str, visit: BrowserContext, db: Any):
    workflow = str(uuid4())
    await put(db, workflow, "A valley")
    page = await visit.new_page()
    await page.clock.install()
    requests = Requests(page)
    await page.goto(f"{url}?as={uuid4()}#{workflow}")
    await told_once(page, requests, "You are not a member of this workflow.")
    assert requests.joins == 1


async def test_a_refusal_is_told_once_and_ends_on_focus(url: str, visit: BrowserContext, db: Any):
    workflow = str(uuid4())
    await put(db, workflow, "A valley")
    page = await visit.new_page()
    await page.clock.install()
    requests = Requests(page)
    await db.execute("revoke select on workflow_nodes from authenticated")
    try:
        await page.goto(f"{url}#{workflow}")
        await told_once(page, requests, "permission denied for table workflow_nodes")
    finally:
        await db.execute("grant select on workflow_nodes to authenticated")
    await page.evaluate("dispatchEvent(new Event('focus'))")
    await expect(page.get_by_role("article", name="A valley")).to_be_visible()


async def test_the_store_follows_the_session_of_its_user(url: str, directory: Any):
    environment = dict(line.split("=", 1) for line in (directory / "data/env").read_text().splitlines())
    results = await run_script(
        Path(__file__).with_name("store_session.mjs"),
        URL=url.removesuffix("/canvas"),
        KEY=environment["SUPABASE_ANON_KEY"],
        CANVAS=str(ROOT / "daemon/dev/canvas"),
    )
    assert results == [
        ["at first", [0, True, None]],
        ["signed out", [0, False, "You are signed out."], 1],
        ["signed in", [0, False, None]],
        ["edits", {"basePrompt": "A pier", "seed": 3}],
        ["share", "string"],
        ["the last member cannot leave", "You are the last member of this workflow, and the last one cannot leave.", 1],
        ["after signing out", [0, False, "You are signed out."]],
        ["another user", [0, False, None]],
        [
            "problems",
            [
                "You are signed out.",
                "You are the last member of this workflow, and the last one cannot leave.",
                "You are signed out.",
            ],
        ],
    ]


@pytest.fixture(scope="module")
async def outcomes(url: str, directory: Any) -> Any:
    """Bring about all faults of the script at once, and return what came of each."""
    environment = dict(line.split("=", 1) for line in (directory / "data/env").read_text().splitlines())
    return await run_script(
        Path(__file__).with_name("store_faults.mjs"),
        URL=url.removesuffix("/canvas"),
        KEY=environment["SUPABASE_ANON_KEY"],
        CANVAS=str(ROOT / "daemon/dev/canvas"),
    )


async def test_a_pending_run_over_the_limit_is_told_once(outcomes: Any):
    assert outcomes["a usage limit"] == [1, ["You have reached the limit."], None]


@pytest.mark.parametrize("status", [401, 403])
async def test_a_gateways_refusal_is_told_in_its_words(outcomes: Any, status: int):
    assert outcomes[f"a gateway's {status}"] == ["Invalid API key", ["Invalid API key"], True]


async def test_a_write_that_failed_is_sent_while_live(outcomes: Any):
    assert outcomes["writes that failed"] == [{"x": 5, "y": 5}, 5, []]


async def test_a_second_press_makes_no_second_run(outcomes: Any):
    """The message that a run is under way is lost; the end of a run is seen, too."""
    assert outcomes["a second press while no message comes"] == [1, "cancelled"]


async def test_a_channel_closed_by_others_is_joined_again(outcomes: Any):
    assert outcomes["a channel that was closed"] == [1, 1]


async def test_a_rejoin_asks_nothing_after_a_refusal(outcomes: Any):
    assert outcomes["a rejoin after a refusal"] == [0, ["permission denied"]]


async def test_a_refresh_before_subscribing_blocks_no_load(outcomes: Any):
    assert outcomes["a load before anybody subscribes"] is False


async def test_nothing_is_shown_that_arrives_after_leaving(outcomes: Any):
    assert outcomes["messages and loads after leaving"] == [0, 0]


async def test_a_first_load_shows_nothing_after_signing_out(outcomes: Any):
    assert outcomes["a first load that ends after signing out"] == 0


@pytest.mark.parametrize("end", ["signing out", "leaving"])
async def test_the_usage_of_a_user_is_shown_to_no_other(outcomes: Any, end: str):
    assert outcomes[f"usage after {end}"] == [0, 0]


async def test_runs_without_a_node_are_heard_by_the_store(outcomes: Any):
    assert outcomes["runs on the store's channel"] == [True, True]


async def test_the_reason_to_wait_follows_a_fallback(outcomes: Any):
    assert outcomes["the reason of a run that is led to another provider"] == [3, True]


async def test_no_edit_is_left_of_a_node_that_was_deleted(outcomes: Any):
    assert outcomes["edits of nodes that are gone"] == [[], []]


async def test_a_refetch_loses_no_words_of_deleted_nodes(outcomes: Any):
    told = ["The picture that you were changing was deleted in another window."] * 2
    words = outcomes["words that were not sent before their nodes were deleted"]
    assert words == [told, ["A boat at dusk", "A pier at dusk"]]


async def test_no_node_is_seen_before_the_models(outcomes: Any):
    """But the one that is added here: beside others it would have a model."""
    assert outcomes["a node that is seen before the models"] == [1, True]


async def test_two_changes_at_once_keep_each_other(window: Window, db: Any):
    """Quality and model are chosen before anything is rendered."""
    offered = [{"provider": "openai", "model": each.name, **asdict(each)} for each in models("openai")]
    await db.execute("select image_jobs.publish_models('openai', $1::text::jsonb)", json.dumps(offered, default=str))
    try:
        await window.page.reload()
        node = await window.add("A tower")
        await node.get_by_role("button", name="Model and settings").click()
        await node.get_by_label("Model", exact=True).select_option("openai:gpt-image-2.5-flare")
        await expect(node.get_by_label("Quality")).to_have_value("standard")
        await node.evaluate("""node => {
            for (const [name, value] of [["Quality", "hd"], ["Model", "openai:gpt-image-2"]]) {
                const label = [...node.querySelectorAll("label")].find(each => each.textContent === name);
                const field = node.querySelector(`[id="${label.htmlFor}"]`);
                field.value = value;
                field.dispatchEvent(new Event("change", { bubbles: true }));
            }
        }""")
        await expect(node.get_by_label("Model", exact=True)).to_have_value("openai:gpt-image-2")
        await expect(node.get_by_label("Quality")).to_have_value("hd")
    finally:
        await db.execute("delete from image_jobs.models where provider = 'openai'")
