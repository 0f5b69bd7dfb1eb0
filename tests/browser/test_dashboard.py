"""The page for whoever runs image-jobs: an operator sees, understands, acts; and it says when it cannot know."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest
from playwright.async_api import Browser, Locator, Page, Route, expect

from daemon.pages.dashboard import dashboard_app
from tests.support.busy_project import HOSTILE, fill
from tests.support.looks import faults
from tests.support.postgres import Cluster, connect
from tests.support.servers import served
from tests.support.window import opened

pytestmark = pytest.mark.timeout(150)

Db = asyncpg.Connection

TOKEN = "the-token-of-this-start"


@pytest.fixture
async def address(database: str) -> AsyncIterator[str]:
    """A dashboard of a project where a lot has happened."""
    await fill(database, period="50 min")
    async with dashboard_app(database, TOKEN) as app, served(app) as url:
        yield f"{url}/dashboard#{TOKEN}"


@pytest.fixture
async def operator(database: str) -> AsyncIterator[Db]:
    """Connect to the database behind the dashboard."""
    connection = await connect(database)
    yield connection
    await connection.close()


def row(page: Page, name: str) -> Locator:
    """A row of a table, by its first cell."""
    return page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=name, exact=True))


def holding(held: asyncio.Event) -> Callable[[Route], Awaitable[None]]:
    """Return a handler that lets requests go once the event is set."""

    async def hold(route: Route) -> None:
        await held.wait()
        await route.continue_()

    return hold


async def press(button: Locator) -> None:
    """Press a button as somebody without a mouse does."""
    await button.focus()
    await button.press("Enter")


async def test_an_operator_sees_what_is_wrong_and_how_it_goes(browser: Browser, address: str):
    async with opened(browser, address) as window:
        page = window.page
        await expect(page.locator(".connection")).to_contain_text("Live")
        assert TOKEN not in page.url
        alerts = page.get_by_role("region", name="Alerts").get_by_role("listitem")
        await expect(alerts.first).to_contain_text("could not be stored in the last 15 minutes")
        await expect(alerts.first).to_contain_text("Requeue failed runs: their pictures are not paid for again.")
        now = page.get_by_role("region", name="Now")
        await expect(now).to_contain_text("In line60oldest")
        await expect(now).to_contain_text("0 of 32 slots")
        await expect(row(page, "google")).to_contain_text("PausedGoogle is paused.")
        await expect(row(page, "gpt-image-1-mini")).to_contain_text("Your credit is used up")
        await expect(row(page, "gpt-image-2")).to_contain_text("20 a minute, 8 at a time")
        await expect(page.get_by_role("table", name="Daemons")).to_contain_text("worker-1")
        throughput = page.get_by_role(
            "img", name=re.compile(r"^Throughput\. [\d,]+ runs done and \d+ failed in 1 hour")
        )
        await expect(throughput).to_be_visible()

        # What users and providers have written is text.
        codes = page.get_by_role("table", name="Failures by code")
        await expect(codes).to_contain_text(f"The provider said: {HOSTILE}")
        assert await page.evaluate("[window.hurt, document.querySelectorAll('main img, main script').length]") == [
            None,
            0,
        ]

        await page.get_by_text("Figures of throughput").click()
        steps = page.get_by_role("table", name="Throughput").get_by_role("row")
        assert await steps.count() > 30
        assert await page.locator(".scroll").count() == 1  # those that nobody opens are not made anew every two seconds
        assert await faults(window, "dashboard-busy") == []
        await page.get_by_role("radio", name="15 min").check()
        await expect(now).to_contain_text("in 15 min")


async def test_an_operator_does_what_the_recipes_do_by_keyboard(browser: Browser, address: str, operator: Db):
    async with opened(browser, address, reduced_motion="reduce") as window:
        page, said, dialog = window.page, window.page.locator(".report"), window.page.get_by_role("dialog")

        failed = await operator.fetchval("select count(*) from runs where payload ->> 'code' = 'timeout'")
        await press(page.get_by_role("button", name="Requeue these: timeout"))
        await expect(dialog).to_contain_text(f"{failed} runs go back in line")
        assert await faults(window, "dashboard-requeue") == []
        await press(dialog.get_by_role("button", name="Leave it"))
        assert await operator.fetchval("select count(*) from runs where status = 'pending'") == 60
        await press(page.get_by_role("button", name="Requeue these: timeout"))
        await press(dialog.get_by_role("button", name=f"Requeue {failed} runs"))
        await expect(said).to_have_text(f"{failed} runs are in line again.")
        await expect(dialog).to_have_count(0)
        assert await operator.fetchval("select count(*) from runs where status = 'pending'") == 60 + failed

        await press(page.get_by_role("button", name="Manage google", exact=True))
        assert await faults(window, "dashboard-lane") == []
        await press(dialog.get_by_role("button", name="Open"))
        await expect(dialog).to_contain_text("Pauses and blocks of its models end, too.")
        await press(dialog.get_by_role("button", name="Open for"))
        await expect(said).to_have_text("google is open.")
        await expect(row(page, "google").locator(".badge")).to_have_text("Open")

        await press(page.get_by_role("button", name="Manage openai:gpt-image-2", exact=True))
        await press(dialog.get_by_role("button", name="Change the limit"))
        await expect(dialog.get_by_label("Starts a minute")).to_have_value("20")
        assert await faults(window, "dashboard-limit") == []
        await dialog.get_by_label("Starts a minute").fill("5")
        await dialog.get_by_label("At a time").press("Enter")
        await expect(row(page, "gpt-image-2")).to_contain_text("5 a minute, 8 at a time")

        await press(page.get_by_role("button", name="Manage openai", exact=True))
        await press(dialog.get_by_role("button", name="Pause"))
        await press(dialog.get_by_role("button", name="Pause, "))
        await expect(said).to_have_text("openai is paused.")
        await expect(row(page, "openai")).to_contain_text("PausedOpenAI is paused.")

        waiting = await operator.fetchval(
            "select count(*) from runs where status = 'pending' and processor like 'openai:%'"
        )
        await press(page.get_by_role("button", name="Manage openai", exact=True))
        await press(dialog.get_by_role("button", name="Cancel what waits"))
        held = asyncio.Event()
        await page.route("**/api/act", holding(held))
        await press(dialog.get_by_role("button", name=f"Cancel {waiting} runs"))
        await expect(dialog.get_by_role("progressbar")).to_be_visible()
        assert await faults(window, "dashboard-progress") == []
        await operator.execute(
            "update runs set status = 'cancelled' where id = (select id from runs where status = 'pending' and processor like 'openai:%' limit 1)"
        )
        held.set()
        await expect(said).to_have_text(f"{waiting - 1} runs were cancelled. 1 had moved on by then.")
        assert await page.evaluate("document.activeElement.getAttribute('aria-label')") == "Manage openai"

        await operator.execute(
            "create function no() returns trigger language plpgsql as $$ begin raise exception 'not on sundays'; end $$;"
            "create trigger no before update on runs for each row execute function no();"
        )
        await press(page.get_by_role("button", name="Requeue these: content_policy"))
        window.expected = "503"  # Chromium's own line about the response
        await press(dialog.get_by_role("button", name="Requeue"))
        await expect(dialog.get_by_role("alert")).to_contain_text("Not on sundays.")
        assert await faults(window, "dashboard-refused") == []


async def test_figures_that_are_old_stay_and_say_so(browser: Browser, address: str, database: str, postgres: Cluster):
    name = database.rpartition("/")[2]
    async with opened(browser, address) as window:
        await expect(window.page.locator(".connection")).to_contain_text("Live")
        window.expected = "503"
        await postgres.sudo(f"alter database {name} allow_connections false")
        await postgres.sudo(f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")
        outage = window.page.get_by_role("alert")
        await expect(outage).to_contain_text("accepts no connection")
        await expect(outage).to_contain_text("What stands below is of")
        await expect(window.page.locator(".connection")).to_contain_text("Old figures")
        await expect(window.page.get_by_role("region", name="Now")).to_contain_text("In line60")
        assert await faults(window, "dashboard-old") == []
        await postgres.sudo(f"alter database {name} allow_connections true")
        await expect(window.page.locator(".connection")).to_contain_text("Live")
        await expect(outage).to_have_count(0)


async def test_it_looks_only_while_seen_and_once_at_a_time(browser: Browser, database: str):
    async with (
        dashboard_app(database, TOKEN) as app,
        served(app) as url,
        opened(browser, "about:blank", header=False, script=COUNT) as window,
    ):
        page, held = window.page, asyncio.Event()

        async def looks() -> int:
            return await page.evaluate("window.looks")

        await page.route("**/api/board*", holding(held))
        await page.clock.install()
        await page.goto(f"{url}/dashboard#{TOKEN}")
        await expect(page.locator(".connection")).to_contain_text("Connecting")
        await page.clock.run_for(60_000)
        assert await looks() == 1
        held.set()
        await expect(page.locator(".connection")).to_contain_text("Live")
        await window.traffic.settled()
        await page.clock.run_for(
            300_000
        )  # far more than twice as long as the first look took; the clock goes on beside it
        assert await looks() > 1
        await window.traffic.settled()
        await page.evaluate(HIDE, True)
        seen = await looks()
        await page.clock.run_for(600_000)
        assert await looks() == seen
        await page.evaluate(HIDE, False)
        assert await looks() == seen + 1


COUNT = """
window.looks = 0;
const fetched = window.fetch;
window.fetch = (...all) => {
  window.looks += String(all[0]).includes("/board");
  return fetched(...all);
};
"""
HIDE = """hidden => {
  Object.defineProperty(document, "hidden", { configurable: true, value: hidden });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


async def test_each_obstacle_is_a_sentence(browser: Browser, database: str):
    stranger = database.replace("postgres@", "stranger:wrong@")
    nowhere = "postgresql://postgres@127.0.0.1:1/postgres"
    for name, dsn, token, sentence, status in (
        ("empty", database, TOKEN, "no daemon is running yet: start one with image-jobs run.", None),
        (
            "wrong",
            database,
            "wrong",
            "does not have the token of the running dashboard: open the address that was printed.",
            "401",
        ),
        ("no-token", database, "", "does not have the token of the running dashboard", "401"),
        ("nowhere", nowhere, TOKEN, "There is no database at 127.0.0.1:1", "503"),
        ("stranger", stranger, TOKEN, "Correct them in DATABASE_URL.", "503"),
    ):
        async with (
            dashboard_app(dsn, TOKEN) as app,
            served(app) as url,
            opened(browser, "about:blank", header=False) as window,
        ):
            window.expected = status
            await window.page.goto(f"{url}/dashboard#{token}")
            await expect(window.page.get_by_role("main")).to_contain_text(sentence)
            await expect(window.page.locator(".connection")).to_contain_text("No figures" if status else "Live")
            assert await faults(window, f"dashboard-{name}") == []
