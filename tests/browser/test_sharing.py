"""Sharing on the canvas: a link lets a second user in, who may leave; without one there is a way on."""

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from playwright.async_api import expect

from tests.support.postgres import signed_in
from tests.support.window import Window, put

pytestmark = pytest.mark.timeout(120)

Open = Callable[..., Any]
NO_ACCESS = "You have no access to this canvas."


async def copy_link(window: Window) -> str:
    """Press Share and Copy link. Returns the link."""
    await window.button("Share").click()
    await window.button("Copy link").click()
    await expect(window.page.get_by_label("Link")).to_be_visible()
    return await window.page.get_by_label("Link").input_value()


def opened_as(user: UUID, link: str) -> str:
    """Have dev's page give another user's session."""
    return link.replace("/canvas#", f"/canvas?as={user}#")


async def test_a_link_lets_a_second_user_in(url, open_window: Open, db):
    ann = await open_window(f"{url}#{uuid4()}", permissions=["clipboard-read", "clipboard-write"])
    await put(db, ann.workflow, "A shared fox")
    await ann.page.reload()
    await ann.connected()
    link = await copy_link(ann)
    await expect(ann.page.get_by_text("The link is copied.")).to_be_visible()
    assert await ann.page.evaluate("navigator.clipboard.readText()") == link
    assert link.startswith(f"{url}#{ann.workflow}?join=")
    await ann.keep_screenshot("share")
    await ann.page.keyboard.press("Escape")

    bob = await open_window(opened_as(uuid4(), link))
    await expect(bob.node("A shared fox")).to_be_visible()
    assert bob.workflow == ann.workflow
    await bob.connected()
    await bob.add("An owl by the other")
    await expect(ann.node("An owl by the other")).to_be_visible(timeout=10_000)

    bob.page.once("dialog", lambda dialog: dialog.accept())
    await bob.button("Share").click()
    await bob.button("Leave").click()
    await expect(bob.page.get_by_role("heading", name=NO_ACCESS)).to_be_visible()
    await expect(bob.nodes).to_have_count(0)


async def test_a_revoked_link_says_why_and_offers_a_new_canvas(url, window, open_window: Open, db):
    await put(db, window.workflow, "A shared fox")
    await window.page.reload()
    link = await copy_link(window)
    await window.button("Revoke all links").click()
    await expect(window.page.get_by_text("No link opens this canvas any more.")).to_be_visible()

    bob = await open_window(opened_as(uuid4(), link))
    await expect(bob.page.get_by_role("heading", name=NO_ACCESS)).to_be_visible()
    await expect(bob.page.get_by_text("it has expired, or was revoked. Ask a member for a new one.")).to_be_visible()
    assert bob.workflow == window.workflow
    await expect(bob.page.locator(".counts li, .header nav [aria-label=New]")).to_have_count(0)
    await expect(bob.page.locator(".header nav button:disabled")).to_have_count(0)
    bob.console_errors.clear()  # the browser's own line about the status 404
    await bob.keep_screenshot("no-access")
    await bob.button("New canvas").click()
    await expect(bob.page.get_by_role("heading", name="What should it show?")).to_be_visible()
    await expect(bob.page.locator(".connection")).to_have_text("New", timeout=20_000)
    await bob.add("An owl of one's own")
    await bob.connected()


async def test_a_member_opens_a_revoked_link_without_a_word(url, window, db):
    await put(db, window.workflow, "A shared fox")
    await window.page.reload()
    link = await copy_link(window)
    await window.button("Revoke all links").click()
    await window.page.goto("about:blank")
    await window.page.goto(link)
    await expect(window.node("A shared fox")).to_be_visible()
    window.console_errors.clear()


async def test_the_last_member_is_told_that_leaving_is_not_possible(window, db):
    await put(db, window.workflow, "A lonely fox")
    await window.page.reload()
    window.page.once("dialog", lambda dialog: dialog.accept())
    await window.button("Share").click()
    await window.button("Leave").click()
    await expect(window.page.get_by_text("the last one cannot leave")).to_be_visible()
    await expect(window.node("A lonely fox")).to_be_visible()
    window.console_errors.clear()  # the browser's own line about the status 400


async def test_no_access_shows_when_membership_ends_elsewhere(url, window, open_window: Open, db):
    await put(db, window.workflow, "A shared fox")
    bob = uuid4()
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", window.workflow, bob)
    other = await open_window(f"{url}?as={bob}#{window.workflow}")
    await expect(other.node("A shared fox")).to_be_visible()
    async with signed_in(db, bob):
        await db.execute("select leave_workflow($1)", UUID(window.workflow))
    await other.page.evaluate("window.dispatchEvent(new Event('focus'))")
    await expect(other.page.get_by_role("heading", name=NO_ACCESS)).to_be_visible()
