"""Look at a page as it stands, at each size and in both themes: for axe's findings, and for what cannot be seen or pressed."""

from typing import Literal, TypeAlias

from playwright.async_api import expect

from tests.support import axe
from tests.support.window import SCREENSHOTS, Window

Look: TypeAlias = tuple[tuple[int, int], Literal["dark", "light"]]
PHONE, DESK = (390, 844), (1440, 900)
LOOKS: tuple[Look, ...] = ((PHONE, "dark"), (PHONE, "light"), (DESK, "dark"), (DESK, "light"))
HALF = LOOKS[1:3]
"""Each size and each theme once: for what differs little from another state."""

PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
WIDE = "() => document.documentElement.scrollWidth > innerWidth"
COVERED = """() => {
  const top = [...document.querySelectorAll("dialog[open], :popover-open")].at(-1) ?? document.body;
  const middle = box => [box.x + box.width / 2, box.y + box.height / 2];
  const holds = (box, [x, y]) => box.left <= x && x <= box.right && box.top <= y && y <= box.bottom;
  return [...top.querySelectorAll("button, a[href], input, select, textarea, summary")].filter(it => {
    const point = middle(it.getBoundingClientRect());
    const pane = it.closest(".react-flow")?.getBoundingClientRect();
    if (!it.checkVisibility({ visibilityProperty: true }) || (pane && !holds(pane, point))) return false;
    const hit = document.elementFromPoint(...point);
    return hit !== null && !it.contains(hit) && !hit.contains(it);
  }).map(it => it.getAttribute("aria-label") ?? it.textContent);
}"""
"""The controls on the screen in whose middle something else lies. Below an open dialog none can be pressed."""


async def faults(window: Window, name: str, looks: tuple[Look, ...] = LOOKS) -> list[str]:
    """Return what is wrong with a page as it stands. Keeps screenshots of this name; the page is as wide as a desk at the end."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page, found = window.page, list[str]()
    for (width, height), scheme in looks:
        await page.set_viewport_size({"width": width, "height": height})
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        await expect(page.locator("html")).to_have_css("color-scheme", scheme, timeout=20_000)
        await page.evaluate(PAINTED)
        here = await axe.findings(page)
        here += [f"covered: {each}" for each in await page.evaluate(COVERED)]
        if await page.evaluate(WIDE):
            here.append("wider than the screen")
        found += [f"{width} {scheme} {each}" for each in here]
        await page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png")
    return found
