"""Every state of the canvas, in every look: axe finds nothing by its default rules, and no control is covered."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import Route, WebSocketRoute, expect

from tests.browser.test_sources import GIVE
from tests.support.looks import HALF, LOOKS, Look, faults
from tests.support.window import Window, put

pytestmark = [pytest.mark.timeout(480), pytest.mark.one_postgres]

Open = Any

DRAG_OVER = """() => {
  const data = new DataTransfer();
  data.items.add(new File([""], "a.png", { type: "image/png" }));
  document.querySelector(".pane").dispatchEvent(new DragEvent("dragover", { bubbles: true, cancelable: true, dataTransfer: data }));
}"""
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


class States:
    """A canvas, and what is wrong in each state in which it was looked at."""

    def __init__(self, window: Window) -> None:
        self.window, self.page = window, window.page
        self.found: dict[str, list[str]] = {}

    async def look(self, state: str, looks: tuple[Look, ...] = LOOKS) -> None:
        self.found[state] = await faults(self.window, f"canvas-{state.replace(' ', '-')}", looks)

    async def look_at_runs(self, db: Any) -> None:
        """A picture that fails, one that is ready, one that is made for ever and one that waits."""
        window = self.window
        await put(db, window.workflow, "A dragon", refuse="The painter does not paint dragons.")
        await put(db, window.workflow, "A castle", at=1)
        await put(db, window.workflow, "A mill", at=2, hang=True)
        await put(db, window.workflow, "A wait", at=3, throttle=120, times=1)
        await self.page.reload()
        await window.connected()
        for prompt in ("A dragon", "A castle", "A mill", "A wait"):
            await window.node(prompt).get_by_role("button", name="Generate").click()
        await window.has_image(window.node("A castle"))
        await expect(window.node("A dragon")).to_have_attribute("data-status", "error", timeout=20_000)
        await expect(window.node("A wait")).to_contain_text("Trying again in", timeout=20_000)
        await expect(window.node("A mill").get_by_role("progressbar")).to_be_visible(timeout=20_000)
        await self.look("failed done running waiting")

    async def look_at_selections(self) -> None:
        window, page = self.window, self.page
        await window.node("A mill").get_by_role("button", name="Cancel").dispatch_event("click")
        await expect(window.node("A mill")).to_have_attribute("data-status", "cancelled", timeout=20_000)
        await window.node("A castle").locator("..").focus()
        await page.keyboard.press("r")
        await expect(page.get_by_placeholder("What should change?")).to_be_focused()
        await page.keyboard.type("Now at night")
        await page.keyboard.press("Escape")
        await window.node("Now at night").get_by_role("button", name="Model and settings").dispatch_event("click")
        await self.look("cancelled selected settings")
        await page.keyboard.press("c")
        await expect(page.locator(".bar-count")).to_contain_text("Which one starts from it?")
        await self.look("connecting", HALF)
        await page.keyboard.press("Escape")
        await expect(page.locator(".bar-count")).to_be_empty()
        await page.keyboard.press("Control+a")
        await expect(page.locator(".bar-count")).to_have_text("5 selected")
        await self.look("five selected", HALF)
        await page.keyboard.press("Escape")

    async def look_at_uploads(self) -> None:
        page, may_go_on = self.page, asyncio.Event()

        async def hold(route: Route) -> None:
            await may_go_on.wait()
            await route.continue_()

        await page.evaluate(DRAG_OVER)
        await expect(page.locator(".pane")).to_have_attribute("data-over", "true")
        await self.look("drop")
        await page.route("**/object/image-sources/**", hold)
        await page.evaluate(GIVE, ["drop", "my harbour.png", "image/png", PIXEL])
        await expect(page.get_by_text("is being uploaded").first).to_be_visible()
        await self.look("upload", HALF)
        may_go_on.set()

    async def look_at_popovers(self) -> None:
        window, page = self.window, self.page
        await window.button("Untitled canvas: your canvases").click()
        await expect(page.locator(".canvases-open").first).to_be_visible()
        await self.look("canvases")
        await page.keyboard.press("Escape")
        await window.button("Share").click()
        await window.button("Copy link").click()
        await expect(page.get_by_label("Link", exact=True)).to_be_visible()
        await self.look("share")
        await page.keyboard.press("Escape")

    async def look_at_pictures(self) -> None:
        """At full size; then again, once there is an earlier one."""
        castle, box = self.window.node("A castle"), self.page.get_by_role("dialog")
        await castle.get_by_role("button", name="Show at full size").dispatch_event("click")
        await expect(box.locator(".facts")).to_contain_text("512")
        await self.look("lightbox", HALF)
        await self.page.keyboard.press("Escape")
        await castle.get_by_role("button", name="Regenerate").dispatch_event("click")
        await castle.get_by_role("button", name="Show at full size").dispatch_event("click")
        await expect(box.get_by_role("listitem")).to_have_count(2, timeout=40_000)
        await box.get_by_role("listitem").last.get_by_role("button").click()
        await expect(box.get_by_role("button", name="Use this one")).to_be_enabled(timeout=20_000)
        await self.look("history")
        await self.page.keyboard.press("Escape")


async def test_every_state_of_the_canvas_can_be_used(url: str, open_window: Open, db: Any) -> None:
    window: Window = await open_window(f"{url}#{uuid4()}", reduced_motion="reduce")
    sockets = list[WebSocketRoute]()
    await window.page.route_web_socket(
        "**/realtime/**", lambda socket: sockets.append(socket) or socket.connect_to_server()
    )
    states = States(window)
    await window.connected_or_new()
    await states.look("empty")
    await states.look_at_runs(db)
    await states.look_at_selections()
    await states.look_at_uploads()
    await states.look_at_popovers()
    await states.look_at_pictures()

    window.expected = "net::ERR_INTERNET_DISCONNECTED"
    await window.page.context.set_offline(True)  # which leaves open sockets alone
    await sockets[-1].close()
    await window.node("Now at night").get_by_label("Prompt").fill("Now at noon")
    await expect(window.page.locator(".connection")).to_have_attribute("data-state", "away", timeout=20_000)
    await states.look("offline")

    stranger: Window = await open_window(f"{url}?as={uuid4()}#{window.workflow}", reduced_motion="reduce")
    stranger.expected = "status of 403"
    await expect(stranger.page.get_by_role("heading", name="You have no access to this canvas.")).to_be_visible()
    states.found["no access"] = await faults(stranger, "canvas-no-access")
    assert states.found == {state: [] for state in states.found}
