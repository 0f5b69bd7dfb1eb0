"""Several canvases with names, and what is left to whom one of them is closed."""

from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.async_api import expect

from tests.support.postgres import signed_in, wait_until
from tests.support.window import Window, put

pytestmark = [pytest.mark.timeout(150), pytest.mark.one_postgres]

Open = Any
NO_ACCESS = "You have no access to this canvas."


async def test_canvases_have_names_and_a_list(url: str, open_window: Open, db: Any) -> None:
    user = uuid4()
    window: Window = await open_window(f"{url}?as={user}#{uuid4()}", permissions=["clipboard-read", "clipboard-write"])
    page, first = window.page, window.workflow
    await window.connected_or_new()
    await page.get_by_label("Prompt").fill("A quiet harbour")
    await page.keyboard.press("Enter")
    await expect(window.node("A quiet harbour")).to_be_visible()
    await window.connected()

    await window.button("Untitled canvas").click()
    await page.get_by_label("Name of this canvas").fill("Harbours for Ann")
    await page.keyboard.press("Enter")
    await expect(window.button("Harbours for Ann: your canvases")).to_be_visible()
    await expect(page).to_have_title("Harbours for Ann · Image Jobs")
    await window.button("New canvas").click()
    await expect(page.get_by_role("heading", name="What should it show?")).to_be_visible()
    assert window.workflow != first
    await page.get_by_label("Prompt").fill("A mountain hut")
    await page.keyboard.press("Enter")
    await expect(window.node("A mountain hut")).to_be_visible()
    await window.connected()

    other: Window = await open_window(f"{url}?as={user}#{window.workflow}")  # another computer
    await other.button("Untitled canvas").click()
    names = other.page.locator(".canvases-open")
    await expect(names).to_have_text(["A mountain hut", "Harbours for Ann"], timeout=20_000)
    await other.keep_screenshot("canvases")
    await names.nth(1).click()
    await expect(other.node("A quiet harbour")).to_be_visible()
    assert other.workflow == first

    await other.button("Harbours for Ann: your canvases").click()
    await other.page.get_by_label("Name of this canvas").fill("نوارس الميناء")
    await other.page.keyboard.press("Enter")
    name = other.page.locator(".brand > span").first
    await expect(name).to_have_text("نوارس الميناء")
    await other.page.keyboard.press("Escape")
    await other.page.keyboard.press("Control+z")
    await expect(name).to_have_text("Harbours for Ann")
    await other.page.keyboard.press("Control+y")
    await expect(name).to_have_text("نوارس الميناء")
    named = (
        "select count(*) = 1 from workflow_nodes where node_data ->> 'title' = 'نوارس الميناء' and node_type = 'canvas'"
    )
    await wait_until(lambda: db.fetchval(named))
    await window.button("Untitled canvas").click()
    await expect(page.locator(".canvases-open").nth(1)).to_have_text("نوارس الميناء", timeout=20_000)
    await window.button("Copy a link to نوارس الميناء").click()
    await expect(page.get_by_text("The link is copied.")).to_be_visible()
    link = await page.evaluate("navigator.clipboard.readText()")
    bob: Window = await open_window(link.replace("/canvas#", f"/canvas?as={uuid4()}#"))
    await expect(bob.node("A quiet harbour")).to_be_visible()
    await expect(bob.button("نوارس الميناء: your canvases")).to_be_visible()
    await expect(bob.nodes).to_have_count(1)  # the name is no node


async def test_a_prompt_outlives_the_end_of_a_membership(url: str, window: Window, open_window: Open, db: Any) -> None:
    await put(db, window.workflow, "A shared fox")
    bob, text = uuid4(), "An owl that took me an hour to describe"
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", window.workflow, bob)
    other: Window = await open_window(f"{url}?as={bob}#{window.workflow}")
    other.expected = "status of 403"
    await expect(other.node("A shared fox")).to_be_visible()
    await other.connected()
    async with signed_in(db, bob):
        await db.execute("select leave_workflow($1)", UUID(window.workflow))
    await other.node("A shared fox").get_by_label("Prompt").fill(text)
    await other.page.evaluate("window.dispatchEvent(new Event('focus'))")
    await expect(other.page.get_by_role("heading", name=NO_ACCESS)).to_be_visible(timeout=20_000)
    await expect(other.page.get_by_text(text)).to_be_visible()
    await other.keep_screenshot("no-access-draft")
    await other.button("New canvas").click()
    await expect(other.page.get_by_label("Prompt")).to_have_value(text)
    await other.page.get_by_label("Prompt").press("Enter")
    await other.has_image(other.node(text))
    await wait_until(lambda: other.page.evaluate("sessionStorage.getItem('draft') === null"))
