"""Prices before pictures are made, on each card and together; how long they take, while they are made."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.async_api import Request, expect

from daemon.providers import models
from tests.support.window import Window, put

pytestmark = pytest.mark.timeout(150)


@pytest.fixture
async def openai(db: Any) -> AsyncIterator[None]:
    """Offer the models of OpenAI, with their prices; nobody serves them. Dev is shared: take them back."""
    offered = [{"provider": "openai", "model": each.name, **asdict(each)} for each in models("openai")]
    await db.execute("select image_jobs.publish_models('openai', $1::text::jsonb)", json.dumps(offered, default=str))
    yield
    await db.execute("delete from image_jobs.models where provider = 'openai'")
    await db.execute("delete from image_jobs.prices where provider = 'openai'")
    await db.execute("delete from image_jobs.usage_limits where workflow_id is not null")


async def start_from_the_mill(window: Window, db: Any) -> None:
    """A source that has no picture is made first: it is in the price of a card, and in the sum of those that are selected."""
    pier, boat = window.node("A pier"), window.node("A boat")
    mill = await db.fetchval(
        "update workflow_nodes b set node_data = b.node_data || jsonb_build_object('source', m.id) from workflow_nodes m "
        "where b.workflow_id = $1 and m.workflow_id = $1 and b.node_data::text like '%A boat%' and m.node_data::text like '%A mill%' "
        "returning m.id",
        UUID(window.workflow),
    )
    facts = boat.locator(".image-node-model small")
    await expect(facts).to_have_text(re.compile(r"^\$0\.\d+ for 2 pictures"), timeout=20_000)
    await pier.locator("..").focus()
    await window.page.keyboard.press("Escape")  # nothing is selected
    for node in (pier, boat):  # without what the boat starts from, and what has to be made first
        await node.locator("..").focus()
        await window.page.keyboard.press("Shift+Enter")
    await expect(window.page.locator(f'[data-id="{mill}"] .image-node')).to_have_attribute("data-selected", "false")
    await expect(window.button("Generate 2 selected")).to_have_text(
        re.compile(r"^Generate 2 selected\$0\.\d+ \+ 1 unknown for 3(, over budget)?$")
    )
    await window.page.keyboard.press("Escape")


async def test_a_price_is_that_of_its_size_and_quality(window: Window, db: Any, openai: None) -> None:
    """A request for each kind of picture, none for a keystroke; the sum is compared with what is left of the budget."""
    asked: list[Any] = []

    def note(request: Request) -> None:
        if request.url.endswith("/rpc/estimate_cost"):
            asked.append(request.post_data_json)

    window.page.on("request", note)
    await put(db, window.workflow, "A pier", "A boat", "A mill")
    await db.execute(
        "update workflow_nodes set node_data = node_data || $2 where workflow_id = $1",
        UUID(window.workflow),
        {"provider": "openai", "model": "gpt-image-2"},
    )
    await db.execute(
        "update workflow_nodes set node_data = jsonb_set(node_data, '{promptSpec}', node_data -> 'promptSpec' "
        """|| '{"size": "3840x2160", "quality": "hd"}') where node_data #>> '{promptSpec,basePrompt}' = 'A pier'"""
    )
    await db.execute(
        "insert into image_jobs.usage_limits (applies_to, workflow_id, usd_per_day) values ('workflow', $1, 0.45)",
        UUID(window.workflow),
    )
    asked.clear()  # by the window as it was opened
    await window.page.reload()
    pier, boat = window.node("A pier"), window.node("A boat")
    await expect(pier.locator(".image-node-model small")).to_have_text(re.compile(r"^\$0\.40 · "), timeout=20_000)
    await expect(boat.locator(".image-node-model small")).to_have_text(re.compile(r"^\$0\.0\d\d · "))
    assert len(asked) == 2
    button = window.page.get_by_role("button", name="Generate all")
    await expect(button).to_have_text(re.compile(r"^Generate all3\$0\.\d\d, over budget$"))
    await expect(button).to_have_attribute(
        "title", re.compile(r"\$0\.45 is left today\. That is more than what is left")
    )
    await window.keep_screenshot("prices")

    await boat.locator(".image-node-prompt").press_sequentially(", at dusk")
    await window.traffic.settled()
    assert len(asked) == 2
    await pier.get_by_role("button", name="Model and settings").click()
    offers = pier.get_by_label("Model", exact=True)
    await expect(offers.locator("option:checked")).to_have_text(re.compile(r"^gpt-image-2 · \$0\.40"))
    await expect(offers.locator("option", has_text="$")).to_have_count(1)  # of the others it is not known
    await pier.get_by_label("Quality").select_option("standard")
    await expect(pier.locator(".image-node-model small")).to_have_text(
        re.compile(r"^\$0\.(?!40)\d+ · "), timeout=20_000
    )
    await offers.select_option("openai:gpt-image-2.6-flare")
    await expect(pier.locator(".image-node-model small")).to_have_text(re.compile("^price unknown"))
    await expect(button).to_have_text(re.compile(r"^Generate all3\$0\.\d+ \+ 1 unknown"))
    assert len(asked) == 4

    await start_from_the_mill(window, db)

    await window.page.set_viewport_size({"width": 390, "height": 844})
    budget = window.page.locator(".budget")
    await expect(budget).to_be_hidden()
    await window.button("Untitled canvas").click()
    await expect(window.page.get_by_text("$0.45 is left today.", exact=True)).to_be_visible()
    await window.page.keyboard.press("Escape")
    await db.execute("update image_jobs.usage_limits set usd_per_day = 0 where workflow_id = $1", UUID(window.workflow))
    await window.page.evaluate("dispatchEvent(new Event('focus'))")
    await expect(budget).to_be_in_viewport(ratio=1, timeout=20_000)
    await window.keep_screenshot("budget-390")


async def test_a_wait_says_why_how_long_and_until_when(url: str, open_window: Any, db: Any) -> None:
    """By the server's clock: the one of this computer is an hour ahead."""
    window: Window = await open_window(f"{url}#{uuid4()}")
    await put(db, window.workflow, "A wait without end", hang=True)
    await put(db, window.workflow, "A wait in line", at=1)
    await window.page.add_init_script("{ const now = Date.now; Date.now = () => now() + 3_600_000; }")
    await window.page.reload()
    await window.connected()
    node = window.node("A wait without end")
    facts = node.locator(".image-node-model small")
    await node.get_by_role("button", name="Generate").click()
    await expect(facts).to_have_text(re.compile(r"^\d+ s of about \d+ s$|^\d+ s, usually \d+ s$"), timeout=40_000)
    await db.execute(
        "update runs set started_at = started_at - interval '70 s', updated_at = updated_at where subject_id = $1",
        UUID(window.workflow),
    )
    await window.page.add_init_script("{ const now = Date.now; Date.now = () => now() - 3_600_000; }")  # right again
    await window.page.reload()
    await expect(facts).to_have_text(re.compile(r"^\d+ min \d+ s, usually \d+ s$"), timeout=40_000)
    await window.keep_screenshot("elapsed")

    until = await db.fetchval(
        "insert into image_jobs.provider_blocks (provider, until, reason) "
        "values ('demo', now() + interval '5 min', 'Demo asks for a pause.') returning until"
    )
    try:
        second = window.node("A wait in line")
        await second.get_by_role("button", name="Generate").click()
        minutes = until.astimezone().strftime("%M")
        await expect(second.locator(".image-node-note")).to_have_text(
            re.compile(rf"^Demo asks for a pause\. Until \d\d:{minutes}( [AP]M)?\.$"), timeout=20_000
        )
        await expect(second.locator(".image-node-model small")).to_have_text(re.compile(r"^(\d+ min )?\d+ s in line$"))
        await window.keep_screenshot("until")
    finally:
        await db.execute("delete from image_jobs.provider_blocks where provider = 'demo'")
    await window.has_image(second)
    await node.get_by_role("button", name="Cancel").click()
