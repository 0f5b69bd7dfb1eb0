"""The canvas while 50 nodes change: from the commit to the paint, the longest tasks, and the heap after an hour of changes."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from playwright.async_api import Browser, Page, expect

from tests.bench.report import percentile, table
from tests.support.dev_process import running
from tests.support.postgres import free_port
from tests.support.window import Window, chromium, database, opened, put

Db = asyncpg.Connection

SAMPLES = 40
CHANGING = 50
"""Nodes that change with each statement, however many there are."""
HOUR = 3_600
"""Statements: one a second for an hour."""

CHANGE = """
with writer as (select set_config('image_jobs.writer', 'projection', true))
update public.workflow_nodes
set version = nextval('image_jobs.node_versions'),
  node_data = node_data || jsonb_build_object('status', 'running', 'message', 'Painting', 'progress', $2::int)
from writer where id in (select id from public.workflow_nodes where workflow_id = $1 order by id limit $3)
"""
RECEIVED = """
window.received = 0;
window.WebSocket = class extends WebSocket {
  constructor(...all) {
    super(...all);
    this.addEventListener("message", ({ data }) => {
      const text = typeof data === "string" ? data : new TextDecoder().decode(data);
      if (text.includes("nodes_changed")) window.received = performance.timeOrigin + performance.now();
    });
  }
};
"""
"""The time of the last message in the page: latency before it is the server's and the socket's, after it the canvas's."""
PAINTED = """([percent, nodes]) => new Promise(resolve => {
  const changes = new MutationObserver(() => {
    if (document.querySelectorAll(`.image-node [aria-valuenow="${percent}"]`).length < nodes) return;
    changes.disconnect();
    const now = () => performance.timeOrigin + performance.now();
    requestAnimationFrame(() => setTimeout(() => resolve([window.received, now()])));
  });
  changes.observe(document.body, { subtree: true, childList: true, attributes: true });
})"""
"""A frame after the frame with the change has begun, the first has been painted: up to a frame (17 ms) is counted too much."""
TASKS = """() => {
  window.tasks = [];
  new PerformanceObserver(list => window.tasks.push(...list.getEntries().map(task => task.duration)))
    .observe({ type: "longtask" });
}"""
"""Tasks of over 50 ms: shorter ones are no entries."""
FRAMES = """() => {
  window.frames = [];
  let last;
  const frame = now => {
    if (last) window.frames.push(now - last);
    last = now;
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
}"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that the user `nobody` can reach: as root, Postgres runs as `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-bench-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@asynccontextmanager
async def canvas(browser: Browser, db: Db, port: int, nodes: int) -> AsyncGenerator[tuple[Window, str]]:
    """Open a new workflow with so many nodes; yield the window and the workflow."""
    workflow = str(uuid4())
    await put(db, workflow, *(f"Node {number}" for number in range(nodes)))
    async with opened(browser, f"http://127.0.0.1:{port}/canvas#{workflow}", script=RECEIVED) as window:
        await window.connected()
        await expect(window.nodes).to_have_count(nodes, timeout=60_000)
        yield window, workflow


async def test_from_the_commit_to_the_paint(directory: Path):
    port = free_port()
    rows: list[list[str]] = []
    async with running(directory, port, "--data", "data"), database(directory / "data") as db, chromium() as browser:
        for nodes in (1, 12, 200, 500):
            changing = min(nodes, CHANGING)
            async with canvas(browser, db, port, nodes) as (window, workflow):
                await window.page.evaluate(FRAMES)
                await window.page.evaluate(TASKS)
                taken = [
                    await change(window.page, db, workflow, percent, changing) for percent in range(1, 1 + SAMPLES)
                ]
                frames = await window.page.evaluate("() => window.frames")
                tasks = await window.page.evaluate("() => window.tasks")
            received, painted = zip(*taken, strict=True)
            cells = [
                *(percentile(each, p) for each in (received, painted) for p in (50, 95)),
                *(percentile(frames, p) for p in (50, 95, 99)),
                max(tasks, default=0),
            ]
            rows.append([str(nodes), *(f"{cell:.0f} ms" for cell in cells)])
    columns = ["nodes", *(f"{what} p{p}" for what in ("received", "painted") for p in (50, 95))]
    columns += [*(f"frame p{p}" for p in (50, 95, 99)), "longest task (0: none over 50)"]
    table(
        f"From a commit of {CHANGING} nodes to its message and its paint, and between frames meanwhile", columns, rows
    )


async def test_heap_over_an_hour_of_changes(directory: Path):
    port = free_port()
    rows: list[tuple[str, str, str]] = []
    async with (
        running(directory, port, "--data", "data"),
        database(directory / "data") as db,
        chromium() as browser,
        canvas(browser, db, port, 200) as (window, workflow),
    ):
        for second in range(HOUR + 1):
            if second % (HOUR // 4) == 0:
                rows.append((f"{second // 60} min", *await held(window.page)))
            await db.execute(CHANGE, workflow, second % 100, CHANGING)
    table(
        f"After so many minutes of a change of {CHANGING} nodes a second, replayed fast", ("", "heap", "elements"), rows
    )


async def held(page: Page) -> tuple[str, str]:
    """Collect garbage. Return the size of the heap, and the number of elements, attached or not."""
    devtools: Any = await page.context.new_cdp_session(page)
    await devtools.send("HeapProfiler.collectGarbage")
    heap = await devtools.send("Runtime.getHeapUsage")
    counters = await devtools.send("Memory.getDOMCounters")
    await devtools.detach()
    return f"{heap['usedSize'] / 2**20:.1f} MiB", str(counters["nodes"])


async def change(page: Page, db: Db, workflow: str, percent: int, nodes: int) -> tuple[float, float]:
    """Update so many nodes in one statement. Return the milliseconds from its commit to the last message, and to the paint."""
    painted = asyncio.create_task(page.evaluate(PAINTED, [percent, nodes]))
    await db.execute(CHANGE, workflow, percent, nodes)
    committed = time.time() * 1000
    received, seen = await painted
    return float(received) - committed, float(seen) - committed
