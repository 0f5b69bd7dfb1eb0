"""Latency from the commit of a change to its paint on the canvas, and frame times while 200 nodes change."""

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
from tests.support.dev_process import running
from tests.support.postgres import free_port
from tests.support.window import chromium, database, opened, put

Db = asyncpg.Connection

SAMPLES = 40

CHANGE = """
with writer as (select set_config('image_jobs.writer', 'projection', true))
update public.workflow_nodes
set node_data = node_data || jsonb_build_object('status', 'running', 'message', 'Painting', 'progress', $2::int)
from writer where workflow_id = $1
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


async def test_from_the_commit_to_the_paint(directory: Path):
    port = free_port()
    rows: list[list[str]] = []
    async with running(directory, port, "--data", "data"), database(directory / "data") as db, chromium() as browser:
        for nodes in (1, 12, 200):
            workflow = str(uuid4())
            await put(db, workflow, *(f"Node {number}" for number in range(nodes)))
            async with opened(browser, f"http://127.0.0.1:{port}/canvas#{workflow}", script=RECEIVED) as window:
                await window.connected()
                await expect(window.nodes).to_have_count(nodes)
                await window.page.evaluate(FRAMES)
                taken = [await change(window.page, db, workflow, percent, nodes) for percent in range(1, 1 + SAMPLES)]
                frames = await window.page.evaluate("() => window.frames")
            received, painted = zip(*taken, strict=True)
            cells = [
                *(percentile(each, p) for each in (received, painted) for p in (50, 95)),
                *(percentile(frames, p) for p in (50, 95, 99)),
            ]
            rows.append([str(nodes), *(f"{cell:.0f} ms" for cell in cells)])
    columns = ["nodes", *(f"{what} p{p}" for what in ("received", "painted") for p in (50, 95))]
    columns += [f"frame p{p}" for p in (50, 95, 99)]
    table("From a commit to its message and its paint, and between frames meanwhile", columns, rows)


async def change(page: Page, db: Db, workflow: str, percent: int, nodes: int) -> tuple[float, float]:
    """Update all nodes in one statement. Return the milliseconds from its commit to the last message, and to the paint."""
    painted = asyncio.create_task(page.evaluate(PAINTED, [percent, nodes]))
    await db.execute(CHANGE, workflow, percent)
    committed = time.time() * 1000
    received, seen = await painted
    return float(received) - committed, float(seen) - committed
