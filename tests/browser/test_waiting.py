"""Why something waits, and what may still be made, as the person at the canvas reads it."""

import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.async_api import expect

from tests.support.window import Window, put

pytestmark = [pytest.mark.timeout(150), pytest.mark.one_postgres]

PAUSED = "Demo is paused. Images wait, and start by themselves when it goes on."


@pytest.fixture
async def db(db: Any) -> AsyncIterator[Any]:
    """Take back what a test has limited: dev is shared."""
    yield db
    await db.execute("delete from image_jobs.provider_limits where provider = 'demo'")
    await db.execute("delete from image_jobs.usage_limits where workflow_id is not null")


async def generate(window: Window, prompt: str) -> Any:
    """Press Generate on a node that is there; return it."""
    await window.page.reload()
    node = window.node(prompt)
    await node.get_by_role("button", name="Generate").click()
    return node


async def test_a_pause_is_read_at_the_canvas_until_it_ends(window: Window, db: Any) -> None:
    await put(db, window.workflow, "A barn owl")
    await db.execute("insert into image_jobs.provider_limits (provider, paused) values ('demo', true)")
    node = await generate(window, "A barn owl")
    note = node.locator(".image-node-note")
    await expect(note).to_have_text(PAUSED, timeout=20_000)
    await expect(node.get_by_role("status")).to_have_text(f"Held up: {PAUSED}")
    await window.keep_screenshot("paused")
    await db.execute("update image_jobs.provider_limits set paused = false where provider = 'demo'")
    await window.has_image(node)
    await expect(note).to_have_count(0)


async def test_a_pause_reaches_runs_that_wait_already(window: Window, db: Any) -> None:
    await put(db, window.workflow, "A barn owl")
    await db.execute("insert into image_jobs.provider_limits (provider, max_running) values ('demo', 0)")
    node = await generate(window, "A barn owl")
    await expect(node.locator(".image-node-note")).to_contain_text("Demo is paused.", timeout=20_000)
    await db.execute("update image_jobs.provider_limits set max_running = null where provider = 'demo'")
    await window.has_image(node)


async def test_the_end_of_a_providers_last_daemon_is_read(window: Window, db: Any) -> None:
    """The lease of a daemon that served it ends while a run waits for it; the daemon of dev broadcasts that."""
    await put(db, window.workflow, "A barn owl")
    await db.execute(
        "select image_jobs.register_daemon($1, 'silent', '0', 4, interval '6 s', array['stability'])", uuid4()
    )
    await db.execute(
        "update workflow_nodes set node_data = node_data || $2 where workflow_id = $1",
        UUID(window.workflow),
        {"provider": "stability", "model": "stable-image-core"},
    )
    node = await generate(window, "A barn owl")
    await expect(node).to_have_attribute("data-status", "pending", timeout=20_000)
    await expect(node.locator(".image-node-note")).to_contain_text("Stability is not served here", timeout=30_000)
    await node.get_by_role("button", name="Cancel").click()
    await expect(node).to_have_attribute("data-status", "cancelled", timeout=20_000)


async def test_a_budget_is_counted_and_its_end_is_told(window: Window, db: Any) -> None:
    await put(db, window.workflow, "A barn owl", "A tawny owl", "A snowy owl")
    await db.execute(
        "insert into image_jobs.usage_limits (applies_to, workflow_id, images_per_day) values ('workflow', $1, 2)",
        UUID(window.workflow),
    )
    node = await generate(window, "A barn owl")
    await window.has_image(node)
    budget = window.page.locator(".budget")
    await expect(budget).to_have_text(
        re.compile(r"^1 of 2 images today\. What this workflow has used, with what is in line\. It starts anew .+\.$"),
        timeout=20_000,
    )
    second = window.node("A tawny owl")
    await second.get_by_role("button", name="Generate").click()
    await window.has_image(second)
    await expect(budget).to_contain_text("2 of 2 images today", timeout=20_000)
    await expect(budget).to_have_attribute("data-spent", "true")
    window.expected = "429"
    await window.node("A snowy owl").get_by_role("button", name="Generate").click()
    await expect(window.toast).to_contain_text(
        "This workflow may make 2 images a day, and this would be more.", timeout=20_000
    )
    await expect(window.toast).to_contain_text(re.compile(r"It opens again at \d{4}-\d\d-\d\dT00:00:00Z\."))
    await window.keep_screenshot("budget")


async def test_a_budget_of_nothing_is_spent(window: Window, db: Any) -> None:
    await put(db, window.workflow, "A barn owl")
    await db.execute(
        "insert into image_jobs.usage_limits (applies_to, workflow_id, images_per_day) values ('workflow', $1, 0)",
        UUID(window.workflow),
    )
    await window.page.reload()
    budget = window.page.locator(".budget")
    await expect(budget).to_contain_text("0 of 0 images today", timeout=20_000)
    await expect(budget).to_have_attribute("data-spent", "true")
