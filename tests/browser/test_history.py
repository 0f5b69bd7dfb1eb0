"""The earlier pictures of a node, what they cost and how long they took; and what the one button after a failure does."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.async_api import Locator, expect

from tests.support.dev_process import running
from tests.support.postgres import free_port, wait_until
from tests.support.window import Window, database, put

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
async def private_url(directory: Path) -> AsyncIterator[str]:
    """Start dev with a private bucket, and return the address of the canvas."""
    port = free_port()
    async with running(directory, port, "--data", "history", IMAGE_JOBS_PRIVATE="1"):
        yield f"http://127.0.0.1:{port}/canvas"


@pytest.fixture
async def private_db(private_url: str, directory: Path) -> AsyncIterator[Any]:
    async with database(directory / "history") as connection:
        yield connection


async def loaded(picture: Locator) -> str:
    """Wait until a picture is painted; return its path."""
    await wait_until(lambda: picture.evaluate("image => image.complete && image.naturalWidth > 0"), timeout=40)
    return str(await picture.get_attribute("src")).split("?")[0].rsplit("/", 1)[-1]


async def shows(node: Locator, run: str) -> None:
    """Wait until the node shows the picture of a run, and no other."""
    await expect(node.locator(f'.image-node-picture[src*="/{run}."][data-loaded=true]')).to_have_count(
        1, timeout=40_000
    )
    await expect(node.locator(".image-node-picture")).to_have_count(1, timeout=10_000)


async def draw(window: Window, db: Any, prompt: str) -> str:
    """Have the one node of the canvas drawn with this prompt, and wait until it is shown. Returns the run."""
    shown = "select node_data from workflow_nodes where workflow_id = $1"
    before = (await db.fetchval(shown, window.workflow)).get("runId")
    await window.page.locator(".image-node-prompt").fill(prompt)
    await window.page.keyboard.press("Control+Enter")

    async def is_drawn() -> bool:
        data = await db.fetchval(shown, window.workflow)
        return data.get("status") == "completed" and data["runId"] != before

    await wait_until(is_drawn, timeout=60)
    run: str = (await db.fetchval(shown, window.workflow))["runId"]
    # Not yet done here, a node takes no further one.
    await shows(window.page.locator(".image-node"), run)
    return run


async def test_an_earlier_picture_is_used_again(private_url: str, open_window: Any, private_db: Any) -> None:
    """In a private bucket: each picture and thumbnail is signed. After a prune the history is what is left."""
    db = private_db
    window: Window = await open_window(f"{private_url}#{uuid4()}")
    await put(db, window.workflow, "A pier")
    await window.page.reload()
    node = window.page.locator(".image-node")
    runs = [await draw(window, db, prompt) for prompt in ("A pier", "A pier at noon", "A pier at night")]
    await shows(node, runs[2])
    await window.page.keyboard.press("Escape")

    await window.button("Show at full size").first.dispatch_event("click")
    box = window.page.get_by_role("dialog")
    picture, past = box.locator("figure > img"), box.get_by_role("listitem")
    await expect(past).to_have_count(3, timeout=20_000)
    for number in range(3):
        assert (await loaded(past.nth(number).locator("img"))).startswith(runs[2 - number])
    assert (await loaded(picture)).startswith(runs[2])
    await expect(past.nth(0).get_by_role("button")).to_have_accessible_name(
        re.compile(r"A pier at night \(on the canvas\)$")
    )
    await expect(box.get_by_role("button", name="Use this one")).to_have_count(0)
    await expect(box.locator(".facts")).to_contain_text(re.compile(r"\d:\d\d.*·?painter.*512 . 512.*free"))
    await expect(box.locator(".times")).to_have_text(
        re.compile(r"^[\d.]+ s in all[\d.]+ s in line[\d.]+ s drawing[\d.]+ s storing[\d.]+ s saving$")
    )
    await past.nth(2).get_by_role("button").click()
    await expect(box.locator("figcaption p").first).to_have_text("A pier")
    assert (await loaded(picture)).startswith(runs[0])
    await window.page.keyboard.press("ArrowUp")
    await expect(box.locator("figcaption p").first).to_have_text("A pier at noon")
    await window.page.keyboard.press("ArrowDown")
    await window.keep_screenshot("history")
    await box.get_by_role("button", name="Use this one").click()
    await expect(past.nth(2).get_by_role("button")).to_have_accessible_name(re.compile(r"A pier \(on the canvas\)$"))
    await expect(box.get_by_role("button", name="Use this one")).to_have_count(0)
    await window.page.keyboard.press("Escape")
    await shows(node, runs[0])
    await window.page.keyboard.press("Control+z")
    await shows(node, runs[2])
    await window.page.keyboard.press("Control+y")
    await shows(node, runs[0])
    assert await db.fetchval("select count(*) from runs where subject_id = $1", window.workflow) == 3

    await db.execute("select image_jobs.prune_runs(image_jobs.now(), '', 1000)")
    await window.page.reload()
    await shows(node, runs[0])
    await window.button("Show at full size").first.dispatch_event("click")
    await expect(past).to_have_count(2, timeout=20_000)  # what is pinned, and what is newest
    await window.page.keyboard.press("Escape")

    # The pin goes with the node, and comes back with it.
    await node.locator("..").click(position={"x": 4, "y": 4})
    await window.page.keyboard.press("Delete")
    await expect(node).to_have_count(0)
    await window.button("Undo").click()

    async def is_pinned() -> bool:
        return (
            await db.fetchval("select pinned_run from workflow_nodes where workflow_id = $1", window.workflow)
            == runs[0]
        )

    await wait_until(is_pinned, timeout=20)
    await shows(node, runs[0])


async def test_one_button_sends_what_the_card_says(window: Window, db: Any) -> None:
    """Unchanged it is Retry, and the same run; changed it is Generate, and a new one. The failure names what it was for."""
    await put(db, window.workflow, "A dragon", refuse="The painter does not paint dragons.")
    await window.page.reload()
    node = window.node("A dragon")
    note, prompt = node.locator(".image-node-note"), window.page.locator(".image-node-prompt")

    async def failed(runs: int, tickets: int) -> None:
        async def is_so() -> bool:
            rows = await db.fetch("select status from runs where subject_id = $1", window.workflow)
            requeued = await db.fetchval(
                "select count(*) from run_events where workflow_id = $1 and payload ->> 'event' in ('created', 'requeued')",
                UUID(window.workflow),
            )
            return [row["status"] for row in rows] == ["failed"] * runs and requeued == tickets

        await wait_until(is_so, timeout=40)
        await expect(window.page.locator(".image-node")).to_have_attribute("data-status", "error", timeout=20_000)

    await node.get_by_role("button", name="Generate").click()
    await failed(1, 1)
    for reload in (False, True):  # what this window has asked for, and what it has to look up
        if reload:
            await window.page.reload()
        await expect(node.get_by_role("button", name="Retry")).to_be_visible(timeout=20_000)
        await expect(node.get_by_role("button", name="Generate")).to_have_count(0)
        await expect(note).not_to_contain_text("That was")
    await node.get_by_role("button", name="Retry").click()
    await failed(1, 2)

    node = window.page.locator(".image-node")
    await prompt.fill("A lizard")
    await expect(node.get_by_role("button", name="Generate")).to_be_visible()
    await expect(node.get_by_role("button", name="Retry")).to_have_count(0)
    await expect(node.locator(".image-node-note")).to_contain_text("That was for A dragon.")
    await window.keep_screenshot("failure-rephrased")
    await prompt.fill("A dragon")  # as it was
    await expect(node.get_by_role("button", name="Retry")).to_be_visible()
    await node.get_by_role("button", name="Model and settings").click()
    await node.get_by_label("Shape").select_option("ratio 16:9")
    await expect(node.locator(".image-node-note")).to_contain_text("That was with other settings, or another source.")
    await prompt.fill("A lizard")
    await node.get_by_role("button", name="Generate").click()
    await failed(2, 3)
    prompts = await db.fetch(
        "select metadata #>> '{promptSpec,basePrompt}' as prompt from runs where subject_id = $1 order by ticket",
        window.workflow,
    )
    assert [row["prompt"] for row in prompts] == ["A dragon", "A lizard"]
    await expect(node.get_by_role("button", name="Retry")).to_be_visible(timeout=20_000)
    await expect(node.locator(".image-node-note")).not_to_contain_text("That was")
