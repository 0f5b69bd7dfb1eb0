"""Long texts, far zoom, phones and the keyboard: everything can be read and used."""

import re
from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import expect

from tests.support.postgres import wait_until
from tests.support.window import put

pytestmark = pytest.mark.timeout(150)

Open = Any

PAGE = "Your request was rejected by the safety system, because of the words dragon, fire and village. " * 4
SENTENCE = "OpenAI cannot be reached. Going on with google:gemini-3.1-flash-lite-image."
UPDATE = """
with writer as (select set_config('image_jobs.writer', 'projection', true))
update workflow_nodes
set node_data = node_data || jsonb_build_object('status', $2::text, 'progress', 12, 'message', $3::text),
  version = nextval('image_jobs.node_versions')
from writer where workflow_id = $1
"""


async def test_a_long_error_is_cut_and_can_be_expanded(window, db):
    await put(db, window.workflow, "A dragon over the village", refuse=PAGE)
    await window.page.reload()
    node = window.node("A dragon over the village")
    await node.get_by_role("button", name="Generate").click()
    await expect(node).to_have_attribute("data-status", "error", timeout=20_000)
    text = node.locator(".image-node-note p").first
    cut = await text.evaluate("it => it.scrollHeight > it.clientHeight")
    assert cut
    assert await window.toast.evaluate("it => it.clientHeight") < 140
    await expect(node.get_by_role("button", name="Retry")).to_be_in_viewport()
    await window.keep_screenshot("long-error")
    await node.get_by_role("button", name="Show all").click()
    assert await text.evaluate("it => it.scrollHeight <= it.clientHeight")
    await node.get_by_role("button", name="Show less").click()


async def test_long_messages_are_shown_in_a_note(window, db):
    await put(db, window.workflow, "A field")
    await window.page.reload()
    await window.connected()
    node = window.node("A field")
    for status, shown in (("pending", f"Held up: {SENTENCE}"), ("running", "In the making · 12%")):
        await db.execute(UPDATE, window.workflow, status, SENTENCE)
        await expect(node.get_by_role("status")).to_have_text(shown)
        await expect(node.locator(".image-node-note")).to_have_text(SENTENCE)
        await window.keep_screenshot(f"fallback-{status}")
    await db.execute(UPDATE, window.workflow, "running", "Painting.")
    await expect(node.get_by_role("status")).to_have_text("Painting · 12%")
    await expect(node.locator(".image-node-note")).to_have_count(0)


async def test_a_long_prompt_is_cut_at_a_line_and_scrolls_on_focus(window, db):
    prompt = "A lighthouse on a cliff at dusk, seen from the sea, with gulls. " * 20
    await put(db, window.workflow, prompt.strip())
    await window.page.reload()
    field = window.page.get_by_label("Prompt")
    lines = await field.evaluate(
        "it => (it.clientHeight - parseFloat(getComputedStyle(it).paddingTop)) / parseFloat(getComputedStyle(it).lineHeight)"
    )
    assert abs(lines - 8) < 0.1
    await field.focus()
    await expect(field).to_have_css("overflow-y", "auto")


async def test_zoomed_out_states_show_and_a_new_node_is_zoomed_to(window, db):
    await put(db, window.workflow, *(f"Island number {number}" for number in range(80)))
    await window.page.reload()
    pane = window.page.locator(".pane")
    await expect(pane).to_have_attribute("data-far", "true")
    first = window.node("Island number 0")
    await expect(first.get_by_label("Prompt")).not_to_be_visible()
    await first.locator("..").dblclick()
    await expect(pane).to_have_attribute("data-far", "false")
    await expect(first.get_by_label("Prompt")).to_be_in_viewport()
    await window.page.keyboard.press("Escape")

    await window.page.reload()
    await expect(pane).to_have_attribute("data-far", "true")
    await window.page.keyboard.press("n")
    written = window.page.locator(".image-node-prompt:focus")
    await expect(written).to_be_in_viewport()
    await window.page.keyboard.type("A new island")
    await expect(window.node("A new island")).to_be_visible()


async def test_on_a_phone_all_controls_are_on_the_screen(url, open_window: Open, db):
    window = await open_window(f"{url}#{uuid4()}", viewport={"width": 390, "height": 844}, has_touch=True)
    await put(db, window.workflow, "A castle", "A cottage", "A mill")
    await window.page.reload()
    await window.button("Generate all").click()
    for name in ("Cancel all", "New", "Generate all", re.compile("Switch to")):
        await expect(window.page.get_by_role("button", name=name, exact=True).first).to_be_in_viewport(ratio=1)
    assert await window.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for prompt in ("A castle", "A cottage", "A mill"):
        await window.has_image(window.node(prompt))
    await window.keep_screenshot("phone")
    await window.button("Show at full size").nth(1).dispatch_event("click")
    box = window.page.get_by_role("dialog")
    await expect(box.locator(".facts")).to_contain_text("free")
    for what in (
        box.get_by_role("link", name="Download"),
        box.get_by_role("button", name="Close"),
        box.locator(".facts"),
    ):
        await expect(what).to_be_in_viewport(ratio=1)
    await window.keep_screenshot("phone-full-size")


async def test_everything_can_be_done_by_keyboard(window, db):
    await window.add("A castle")
    await window.page.keyboard.press("Control+Enter")
    node = window.node("A castle")
    image = await window.has_image(node)
    await window.page.keyboard.press("Escape")  # out of the prompt
    await window.page.keyboard.press("Escape")  # and of the selection
    await expect(node).to_have_attribute("data-selected", "false")

    await node.locator("..").focus()
    await window.page.keyboard.press("Enter")  # selects, as a click does
    await expect(node).to_have_attribute("data-selected", "true")
    await window.page.keyboard.press("Control+Enter")
    await wait_until(
        lambda: db.fetchval(
            "select count(*) = 2 from runs where subject_id = $1 and status = 'completed'", window.workflow
        ),
        timeout=40,
    )
    await window.has_image(node)
    await expect(node.locator(".image-node-picture")).not_to_have_attribute("src", image)

    await node.get_by_role("button", name="Show at full size").focus()
    await window.page.keyboard.press("Enter")
    await expect(window.page.get_by_role("dialog")).to_be_visible()
    await window.page.keyboard.press("Escape")
    await expect(window.page.get_by_role("dialog")).to_have_count(0)

    await node.get_by_role("button", name="Model and settings").focus()
    await window.page.keyboard.press("Space")
    await expect(node.get_by_label("Seed")).to_be_visible()
    await node.get_by_label("Seed").focus()
    await window.page.keyboard.press("Escape")
    await expect(node.get_by_label("Seed")).to_have_count(0)

    await node.locator("..").focus()
    await window.page.keyboard.press("Delete")
    await expect(node).to_have_count(0)
    await window.button("Undo").focus()
    await window.page.keyboard.press("Enter")
    await window.has_image(node)
