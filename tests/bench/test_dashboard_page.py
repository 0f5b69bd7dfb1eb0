"""The page of the dashboard with 100,000 runs behind it: until it is painted, and its longest tasks."""

import json
from typing import Any

import pytest
from playwright.async_api import expect

from daemon.pages.dashboard import dashboard_app
from tests.bench.report import table
from tests.support.busy_project import fill
from tests.support.servers import served
from tests.support.window import chromium, opened

RUNS = 100_000
LOOKS = 5
"""Of each period, two seconds apart."""
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


@pytest.mark.timeout(600)
async def test_the_dashboard_is_painted_and_stays_quick(database: str) -> None:
    await fill(database, RUNS, "24 hours")
    rows: list[tuple[str, ...]] = []
    async with (
        dashboard_app(database, "token") as app,
        served(app) as url,
        chromium() as browser,
        opened(browser, f"{url}/dashboard#token") as window,
    ):
        await browser.start_tracing(page=window.page, categories=["toplevel"])
        await window.page.reload()
        figures = window.page.locator(".figures")  # to look for roles is a long task itself
        await expect(figures).to_be_visible(timeout=30_000)
        shown = await window.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => done(performance.now())))"
        )
        painted = await window.page.evaluate(PAINTED)
        rows += [("first paint", f"{painted:.0f}", "1000"), ("first figures", f"{shown:.0f}", "")]
        for value, label in (("1h", "1 hour"), ("24h", "24 hours"), ("7d", "7 days")):
            await window.page.locator(f"input[value='{value}']").check()
            await expect(figures).to_contain_text(f"in {label}", timeout=30_000)
            for _ in range(LOOKS):
                async with window.page.expect_response("**/api/board*", timeout=60_000):
                    pass
        tasks = tasks_of(json.loads(await browser.stop_tracing()))
        for name, field in (("longest task", "dur"), ("longest task, its own time", "tdur")):
            rows.append((name, f"{max(task.get(field, 0) for task in tasks) / 1000:.0f}", "100"))
    table(f"The dashboard's page, {RUNS:,} runs of a day: ms", ("", "measured", "at most"), rows)


def tasks_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tasks of the page's main thread: microseconds that passed (dur), and those that it had a processor (tdur)."""
    events = trace["traceEvents"]
    main = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    return [
        event
        for event in events
        if event["name"].endswith("RunTask") and (event["pid"], event["tid"]) in main and "dur" in event
    ]
