"""The dashboard in a hurry: each question it asks, in every look; by keyboard alone; in any script; and without its server."""

from collections.abc import AsyncIterator

import asyncpg
import pytest
from playwright.async_api import Browser, Page, expect

from daemon.pages.dashboard import dashboard_app
from tests.support.busy_project import fill
from tests.support.looks import HALF, faults
from tests.support.postgres import connect
from tests.support.servers import served
from tests.support.window import Window, opened

pytestmark = pytest.mark.timeout(150)

Db = asyncpg.Connection

TOKEN = "the-token-of-this-start"
ARABIC = "رفض المزود هذا الطلب."

FOCUSED = """() => {
  const it = document.activeElement;
  return it === document.body ? null : it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent;
}"""
CONTROLS = """() => [...document.querySelectorAll("button, summary, input:checked")].map(
  it => it.getAttribute("aria-label") ?? it.labels?.[0]?.textContent ?? it.textContent)"""
"""All that Tab comes to, in the order of the page; of the periods the chosen one."""
MOVING = """() => [...document.querySelectorAll("*")].map(it => getComputedStyle(it)).filter(
  it => it.animationName !== "none" || it.transitionDuration !== "0s").length"""


@pytest.fixture
async def operator(database: str) -> AsyncIterator[Db]:
    """Connect to the database of a project where a lot has happened."""
    await fill(database, period="50 min")
    connection = await connect(database)
    yield connection
    await connection.close()


@pytest.fixture
async def window(browser: Browser, database: str, operator: Db) -> AsyncIterator[Window]:
    """Open its dashboard."""
    await operator.execute(
        "update runs set payload = payload || jsonb_build_object('error', $1::text) where payload ->> 'code' = 'timeout'",
        ARABIC,
    )
    async with (
        dashboard_app(database, TOKEN) as app,
        served(app) as url,
        opened(browser, f"{url}/dashboard#{TOKEN}", reduced_motion="reduce") as window,
    ):
        await expect(window.page.locator(".connection")).to_contain_text("Live")
        yield window


async def ask(page: Page, opener: str, choice: str | None) -> None:
    """Open a dialog, and choose what it is to ask; it has counted then."""
    await page.get_by_role("button", name=opener, exact=True).press("Enter")
    dialog = page.get_by_role("dialog")
    if choice:
        await dialog.get_by_role("button", name=choice).press("Enter")
    await expect(dialog.get_by_role("status")).not_to_have_text("Counting …")


async def test_each_question_can_be_read_and_left(window: Window) -> None:
    page, dialog, found = window.page, window.page.get_by_role("dialog"), dict[str, list[str]]()
    for name, opener, choice, sentence in (
        ("pause", "Manage openai", "Pause", "40 runs go on waiting"),
        ("open", "See to it: openai:gpt-image-1-mini", "Open", "0 runs that wait may start at once"),
        ("cancel", "Manage openai", "Cancel what waits", "40 runs end as cancelled, and can be requeued one by one."),
        ("cancel-nothing", "Manage openai", "Cancel what runs", "There is no such run."),
        ("cancel-retries", "Cancel retries after overloaded", None, "There is no such run."),
        ("requeue-run", "Requeue job_17", None, "1 run goes back in line"),
    ):
        await ask(page, opener, choice)
        await expect(dialog).to_contain_text(sentence)
        found[name] = await faults(window, f"dashboard-{name}", HALF)
        assert await page.evaluate(MOVING) == 0
        await page.keyboard.press("Escape")
        await expect(dialog).to_have_count(0)
        assert await page.evaluate(FOCUSED) == opener
    assert found == {name: [] for name in found}


async def test_all_is_reached_by_tab_and_has_a_name_of_its_own(window: Window) -> None:
    page = window.page
    await page.locator(".brand").click()  # Tab starts from there
    names: list[str] = []
    for _ in range(len(await page.evaluate(CONTROLS))):
        await page.keyboard.press("Tab")
        names.append(await page.evaluate(FOCUSED))
    assert names == await page.evaluate(CONTROLS)
    assert len(set(names)) == len(names)
    await page.locator("input:checked").focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("region", name="Now")).to_contain_text("in 24 hours")

    sentence = page.get_by_role("table", name="Failures by code").get_by_text(ARABIC)
    assert await sentence.evaluate("it => getComputedStyle(it).direction") == "rtl"


async def test_without_its_server_the_figures_stay(window: Window) -> None:
    window.expected = "net::ERR_FAILED"
    await window.page.route("**/api/**", lambda route: route.abort())
    outage = window.page.get_by_role("alert")
    await expect(outage).to_contain_text("The dashboard's server cannot be reached.")
    await expect(outage).to_contain_text("What stands below is of")
    await window.page.get_by_role("button", name="Manage openai", exact=True).press("Enter")
    await window.page.get_by_role("dialog").get_by_role("button", name="Pause").press("Enter")
    dialog = window.page.get_by_role("dialog")
    await expect(dialog.get_by_role("alert")).to_contain_text("cannot be reached")
    await expect(dialog.get_by_role("button")).to_have_text(["Leave it"])  # there is nothing to confirm
    assert await faults(window, "dashboard-unreachable", HALF) == []
