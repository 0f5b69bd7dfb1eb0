"""Every state of the canvas, looked at by axe: its default rules, in both themes, at a desk and on a phone."""

from typing import Any
from uuid import uuid4

import pytest
from playwright.async_api import expect

from tests.support import axe
from tests.support.window import Window, put

pytestmark = [pytest.mark.timeout(240), pytest.mark.one_postgres]

Open = Any

SCREENS = ((390, 844), (1440, 900))
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


async def findings(window: Window) -> list[str]:
    """Return what axe finds in the page as it is, at each size in both themes. At the end it is as wide as a desk."""
    found: list[str] = []
    for width, height in SCREENS:
        await window.page.set_viewport_size({"width": width, "height": height})
        for scheme in ("dark", "light"):
            await window.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            await window.page.evaluate(PAINTED)
            found += [f"{width} {scheme} {each}" for each in await axe.findings(window.page)]
    return found


async def test_axe_finds_nothing_in_any_state_of_the_canvas(url: str, open_window: Open, db: Any) -> None:
    window: Window = await open_window(f"{url}#{uuid4()}", reduced_motion="reduce")
    page, states = window.page, dict[str, list[str]]()
    await window.connected_or_new()
    states["empty"] = await findings(window)

    await put(db, window.workflow, "A dragon", refuse="The painter does not paint dragons.")
    await put(db, window.workflow, "A castle", at=1)
    await put(db, window.workflow, "A mill", at=2, hang=True)
    await put(db, window.workflow, "A wait", at=3, throttle=120, times=1)
    await page.reload()
    await window.connected()
    for prompt in ("A dragon", "A castle", "A mill", "A wait"):
        await window.node(prompt).get_by_role("button", name="Generate").click()
    await window.has_image(window.node("A castle"))
    await expect(window.node("A dragon")).to_have_attribute("data-status", "error", timeout=20_000)
    await expect(window.node("A wait")).to_contain_text("Trying again in", timeout=20_000)
    await expect(window.node("A mill").get_by_role("progressbar")).to_be_visible(timeout=20_000)
    states["failed, done, running, waiting"] = await findings(window)

    await window.node("A castle").locator("..").focus()
    await page.keyboard.press("r")
    await expect(page.get_by_placeholder("What should change?")).to_be_focused()
    await page.keyboard.type("Now at night")
    await page.keyboard.press("Escape")
    await window.node("Now at night").get_by_role("button", name="Model and settings").dispatch_event("click")
    states["selected, an edge, settings"] = await findings(window)
    await page.keyboard.press("c")
    states["connecting"] = await findings(window)
    await page.keyboard.press("Escape")
    await window.button("Untitled canvas: your canvases").click()
    await expect(page.locator(".canvases-open").first).to_be_visible()
    states["canvases"] = await findings(window)
    await page.keyboard.press("Escape")
    await window.button("Share").click()
    await window.button("Copy link").click()
    await expect(page.get_by_label("Link", exact=True)).to_be_visible()
    states["share"] = await findings(window)
    await page.keyboard.press("Escape")
    await window.node("A castle").get_by_role("button", name="Show at full size").dispatch_event("click")
    await expect(page.get_by_role("dialog").locator(".facts")).to_contain_text("512")
    states["lightbox"] = await findings(window)

    stranger: Window = await open_window(f"{url}?as={uuid4()}#{window.workflow}", reduced_motion="reduce")
    stranger.expected = "status of 403"
    await expect(stranger.page.get_by_role("heading", name="You have no access to this canvas.")).to_be_visible()
    states["no access"] = await findings(stranger)
    assert states == {state: [] for state in states}
