"""A browser window with the canvas: what the tests do with it and read from it."""

import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from time import monotonic
from typing import Any

import asyncpg
from PIL import Image
from playwright.async_api import Browser, ConsoleMessage, Locator, Page, Request, async_playwright, expect

from tests.support.postgres import ROOT, connect, wait_until

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
SCREENSHOTS = ROOT / ".cache/screenshots"
REFUSED = r"net::ERR_(CONNECTION_REFUSED|CONNECTION_RESET|CONNECTION_CLOSED|EMPTY_RESPONSE)"
"""The error that Chromium itself logs for an unreachable server."""
VISITOR = "00000000-0000-4000-8000-000000000002"


class Traffic:
    """The requests of a page that are under way."""

    def __init__(self, page: Page) -> None:
        self._under_way = set[Request]()
        self._changed_at = monotonic()
        page.on("request", lambda request: self._change(self._under_way.add, request))
        page.on("requestfinished", lambda request: self._change(self._under_way.discard, request))
        page.on("requestfailed", lambda request: self._change(self._under_way.discard, request))

    def _change(self, change: Callable[[Request], None], request: Request) -> None:
        change(request)
        self._changed_at = monotonic()

    async def settled(self) -> None:
        """Wait for half a second without any. Playwright's `networkidle` comes once a page, and never again."""
        await wait_until(lambda: not self._under_way and monotonic() - self._changed_at > 0.5)


class Window:
    """One window.

    Attributes:
        console_errors: Errors and warnings of its console.
        traffic: Its requests under way.
        outage: Ignore errors of failed connections, which the browser logs by itself.
        expected: Ignore errors with this text, whenever they come.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.console_errors: list[str] = []
        self.outage = False
        self.expected: str | None = None
        self.traffic = Traffic(page)
        page.on("console", self._listen)
        page.on("pageerror", lambda error: self.console_errors.append(str(error)))

    @property
    def workflow(self) -> str:
        return self.page.url.split("#")[1]

    @property
    def nodes(self) -> Locator:
        return self.page.locator(".image-node")

    @property
    def toast(self) -> Locator:
        return self.page.locator(".toast")

    def node(self, prompt: str) -> Locator:
        """The node with this prompt."""
        return self.page.get_by_role("article", name=prompt)

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name)

    async def connected(self) -> None:
        await expect(self.page.locator(".connection")).to_have_text("Live", timeout=20_000)

    async def connected_or_new(self) -> None:
        """Wait until the canvas may be used: the first node of a new one makes its member."""
        await expect(self.page.locator(".bar")).to_be_visible(timeout=20_000)

    async def counts(self, number: int, what: str) -> None:
        """Wait until the header shows this count."""
        words = re.compile(rf"^{number} {what}$")
        await expect(self.page.locator(".counts li", has_text=words)).to_be_visible(timeout=40_000)

    async def add(self, prompt: str) -> Locator:
        """Add a node by keyboard; the focus is then in its prompt."""
        before = await self.nodes.count()
        if before == 0:
            await self.page.locator(".first input").press("Escape")
            await self.page.locator(".first input").blur()
        await self.page.keyboard.press("n")
        await expect(self.nodes).to_have_count(before + 1)
        await expect(self.page.locator(".image-node-prompt:focus")).to_have_count(1)
        await self.page.keyboard.type(prompt)
        return self.node(prompt)

    async def drag(self, what: Locator, to: Locator | tuple[float, float], *, offline: bool = False) -> None:
        """Drag an element by its middle to another, or to a point."""
        if not offline:
            await self.connected()
        await what.hover()
        await self.page.mouse.down()
        if isinstance(to, Locator):
            box = await to.bounding_box()
            assert box is not None
            to = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        await self.page.mouse.move(*to, steps=10)
        await self.page.mouse.up()

    async def has_image(self, node: Locator) -> str:
        """Wait until the node's image is ready and painted; return its address."""
        await expect(node).to_have_attribute("data-status", "completed", timeout=40_000)
        await expect(node.locator(".image-node-picture")).to_have_count(1, timeout=10_000)
        await expect(node.locator(".image-node-picture")).to_have_attribute("data-loaded", "true", timeout=40_000)
        return str(await node.locator(".image-node-picture").get_attribute("src"))

    async def keep_screenshot(self, name: str) -> None:
        """Take screenshots in light and in dark, for people to look at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for scheme in ("dark", "light"):
            await self.page.emulate_media(color_scheme=scheme)
            await expect(self.page.locator("html")).to_have_css("color-scheme", scheme)
            await self.page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}.png", animations="disabled")

    def _listen(self, message: ConsoleMessage) -> None:
        refused = self.outage and re.search(REFUSED, message.text)
        expected = self.expected is not None and self.expected in message.text
        if message.type in ("error", "warning") and not (refused or expected):
            self.console_errors.append(message.text)


@asynccontextmanager
async def chromium(*flags: str) -> AsyncIterator[Browser]:
    """The browser, headless."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        yield browser
        await browser.close()


@asynccontextmanager
async def opened(
    browser: Browser, address: str, *, script: str = "", header: bool = True, **options: Any
) -> AsyncIterator[Window]:
    """Open a window with its own storage, like another user's browser.

    Args:
        script: Runs in each page before all others.
        header: Wait for the page's header.
    """
    session = await browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    try:
        await session.add_init_script(script)
        window = Window(await session.new_page())
        await window.page.goto(address)
        if header:
            await expect(window.page.locator(".header")).to_be_visible()
        yield window
        assert window.console_errors == [], window.console_errors
    finally:
        await session.close()


@asynccontextmanager
async def database(data: Path) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Connect to the database of a running dev, by its data directory."""
    environment = dict(line.split("=", 1) for line in (data / "env").read_text().splitlines())
    connection = await connect(environment["DATABASE_URL"])
    yield connection
    await connection.close()


async def put(
    db: "asyncpg.Connection[asyncpg.Record]", workflow: str, *prompts: str, at: int = 0, **demo: object
) -> None:
    """Insert nodes side by side into a workflow, and make the visitor its member.

    Args:
        at: The number of nodes that are there already.
        demo: Instructions for the painter.
    """
    async with db.transaction():
        for place, prompt in enumerate(prompts, at):
            await db.execute(
                "insert into public.workflow_nodes (id, workflow_id, node_type, node_data, position) "
                "values (gen_random_uuid()::text, $1, 'image', $2, $3)",
                workflow,
                {
                    "provider": "demo",
                    "model": "painter",
                    "metadata": {"demo": demo},
                    "promptSpec": {"basePrompt": prompt, "size": "512x512", "seed": place},
                },
                {"x": place % 6 * 340, "y": place // 6 * 440},
            )
        await db.execute(
            "insert into public.workflow_members (workflow_id, user_id) values ($1, $2) on conflict do nothing",
            workflow,
            VISITOR,
        )


def difference(shown: bytes, stored: bytes) -> float:
    """Return the mean difference of two pictures over all pixels and channels: 0 is equal, 255 is black and white."""
    seen = Image.open(BytesIO(shown)).convert("RGB")
    kept = Image.open(BytesIO(stored)).convert("RGB").resize(seen.size)
    pairs = zip(seen.tobytes(), kept.tobytes(), strict=True)
    return sum(abs(one - other) for one, other in pairs) / len(seen.tobytes())
