"""What somebody at the canvas feels: from the commit of a change to its paint, and how smoothly 200 nodes change."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from playwright.async_api import Page, expect

from tests.bench.report import percentile, table
from tests.browser.window import chromium, database, opened, put
from tests.devs import running
from tests.postgres import free_port

Db = asyncpg.Connection

SAMPLES = 40

CHANGE = """
with hand as (select set_config('image_jobs.hand', 'projection', true))
update public.workflow_nodes
set node_data = node_data || jsonb_build_object('status', 'running', 'message', 'Painting', 'progress', $2::int)
from hand where workflow_id = $1
"""
PAINTED = """([percent, nodes]) => new Promise(resolve => {
  const look = () => {
    const all = document.querySelectorAll(`.image-node [aria-valuenow="${percent}"]`).length === nodes;
    if (all) requestAnimationFrame(() => setTimeout(() => resolve(performance.timeOrigin + performance.now())));
    else requestAnimationFrame(look);
  };
  look();
})"""
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
    """One that `nobody` can reach: as root Postgres is `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-bench-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def test_from_the_commit_to_the_paint(directory: Path):
    port = free_port()
    rows: list[list[str]] = []
    async with running(directory, port, "--data", "data"), database(directory / "data") as db, chromium() as browser:
        for nodes in (1, 12, 200):
            workflow = str(uuid4())
            await put(db, workflow, *(f"Node {number}" for number in range(nodes)))
            async with opened(browser, f"http://127.0.0.1:{port}/canvas#{workflow}") as window:
                await window.connected()
                await expect(window.nodes).to_have_count(nodes)
                await window.page.evaluate(FRAMES)
                taken = [await change(window.page, db, workflow, percent, nodes) for percent in range(1, 1 + SAMPLES)]
                frames = await window.page.evaluate("() => window.frames")
            cells = [*(percentile(taken, p) for p in (50, 95)), *(percentile(frames, p) for p in (50, 95, 99))]
            rows.append([str(nodes), *(f"{cell:.0f} ms" for cell in cells)])
    columns = ["nodes that change", "paint p50", "paint p95", "frame p50", "frame p95", "frame p99"]
    table("From a commit to its paint, and the time between frames meanwhile", columns, rows)


async def change(page: Page, db: Db, workflow: str, percent: int, nodes: int) -> float:
    """All nodes make progress in one statement; answers the milliseconds from its commit to the paint of the last."""
    painted = asyncio.create_task(page.evaluate(PAINTED, [percent, nodes]))
    await db.execute(CHANGE, workflow, percent)
    committed = time.time() * 1000
    return float(await painted) - committed
