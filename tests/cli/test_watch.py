"""`image-jobs watch` as a process, in front of the stand-in: its output, errors, reconnects."""

import asyncio
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from daemon.dev.canvas import VISITOR, WORKFLOW
from tests.support import dev_process
from tests.support.commands import ImageJobs
from tests.support.postgres import Cluster, connect, free_port, wait_until
from tests.support.realtime_project import USER, Project, running

HERE = str(uuid4())
OUTAGE = float(os.environ.get("IMAGE_JOBS_TEST_OUTAGE", "35"))
"""Longer than realtime-py goes on by itself: five tries, with pauses of 1, 2, 4 and 8 s."""


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    async with running(postgres) as one:
        yield one


class Watching:
    """A running command, and its output so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out: list[str] = []
        self.err: list[str] = []

    async def read(self) -> None:
        async def read(stream: Any, lines: list[str]) -> None:
            while line := await stream.readline():
                lines.append(line.decode().rstrip("\n"))

        await asyncio.gather(read(self.process.stdout, self.out), read(self.process.stderr, self.err))

    async def says(self, pattern: str, timeout: float = 20) -> str:
        """Wait for a line, which may be there already."""

        def found() -> str | None:
            return next((line for line in self.out + self.err if re.search(pattern, line)), None)

        line = await wait_until(lambda: found() or self.process.returncode is not None, timeout=timeout)
        assert isinstance(line, str), self.err
        return line


@asynccontextmanager
async def watching(image_jobs: ImageJobs, *arguments: str, **environment: str) -> AsyncIterator[Watching]:
    """Run `watch` for as long as the context lasts, then end it by Ctrl-C."""
    process = await image_jobs.start("watch", *arguments, **environment)
    it = Watching(process)
    reading = asyncio.create_task(it.read())
    try:
        await it.says("Watching")
        yield it
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    finally:
        if process.returncode is None:
            process.kill()
        await reading
    assert not any("Traceback" in line for line in it.err), it.err


def operator(project: Project) -> dict[str, str]:
    return {"SUPABASE_URL": project.url, "SUPABASE_SERVICE_ROLE_KEY": project.keys.service_role_key}


def member(project: Project, token: str) -> dict[str, str]:
    return {"SUPABASE_URL": project.url, "SUPABASE_ANON_KEY": project.keys.anon_key, "IMAGE_JOBS_TOKEN": token}


async def put(db, node_id: str, workflow: str = HERE) -> None:
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image', '{}')",
        node_id,
        workflow,
    )


async def start(db, node_id: str, workflow: str = HERE) -> str:
    return await db.fetchval(
        "insert into runs (kind, subject_id, status, processor, metadata) "
        "values ('image_gen', $1, 'pending', 'demo:painter', $2) returning id",
        workflow,
        {"nodeId": node_id, "promptSpec": {"basePrompt": "A fox"}},
    )


async def test_watch_says_why_a_run_waits(project, image_jobs):
    await put(project.db, "a")
    await project.db.execute("insert into image_jobs.provider_limits (provider, paused) values ('demo', true)")
    async with watching(image_jobs, HERE, **operator(project)) as watch:
        await start(project.db, "a")
        await watch.says(r"  a  pending +Demo is paused\.")


async def test_a_line_for_each_node_and_one_for_each_change(project, image_jobs):
    await put(project.db, "a")
    async with watching(image_jobs, HERE, **operator(project)) as watch:
        await watch.says(r"^\d\d:\d\d:\d\d  a  new$")
        run = await start(project.db, "a")
        await watch.says("  a  pending")
        await project.db.execute("""update workflow_nodes set position = '{"x": 1, "y": 2}'""")
        await project.db.execute("update runs set status = 'cancelled' where id = $1", run)
        await watch.says("  a  cancelled")
        await put(project.db, "b")
        await watch.says("  b  new$")
        await put(project.db, "another", str(uuid4()))
        await project.db.execute("delete from workflow_nodes where id = 'a'")
        await watch.says("  a  deleted$")
    assert [line.split()[1:3] for line in watch.out] == [
        ["a", "new"],
        ["a", "pending"],
        ["a", "cancelled"],
        ["b", "new"],
        ["a", "deleted"],
    ]


async def test_json_has_a_line_for_each_change(project, image_jobs):
    async with watching(image_jobs, HERE, "--json", **operator(project)) as watch:
        await put(project.db, "a")
        run = await start(project.db, "a")
        await watch.says("pending")
    lines = [json.loads(line) for line in watch.out]
    assert [each.get("status") for each in lines] == [None, "pending"]
    assert lines[1] == {
        "node": "a",
        "version": lines[1]["version"],
        "deleted": False,
        "status": "pending",
        "progress": 0,
        "runId": run,
    }
    assert lines[1]["version"] > lines[0]["version"]


async def test_a_node_larger_than_a_message_is_followed(project, image_jobs):
    await put(project.db, "a")
    await project.db.execute(
        "update workflow_nodes set node_data = jsonb_build_object('notes', repeat('many words ', 2000))"
    )
    async with watching(image_jobs, HERE, **operator(project)) as watch:
        await start(project.db, "a")
        await watch.says("  a  pending")


async def test_nodes_of_several_pages_are_all_listed(project, image_jobs):
    await project.db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) "
        "select 'node ' || n, $1, 'image', '{}' from generate_series(1, 1001) n",
        HERE,
    )
    async with watching(image_jobs, HERE, "--json", **operator(project)) as watch:
        pass
    assert {json.loads(line)["node"] for line in watch.out} == {f"node {number}" for number in range(1, 1002)}


async def test_a_member_sees_what_the_workflow_shows(project, image_jobs):
    await put(project.db, "a")
    await project.db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", HERE, USER)
    async with watching(image_jobs, HERE, **member(project, project.token())) as watch:
        await watch.says("  a  new$")
        await start(project.db, "a")
        await watch.says("  a  pending")


async def test_a_non_member_is_refused_and_sees_nothing(project, image_jobs):
    await put(project.db, "a")
    done = await image_jobs("watch", HERE, **member(project, project.token(str(uuid4()))))
    assert (done.code, done.out) == (1, "")
    assert f"Workflow {HERE}: Unauthorized: You do not have permissions to read" in done.err
    assert "--token, or IMAGE_JOBS_TOKEN" in done.err


async def test_an_expired_token_is_not_retried(project, image_jobs):
    done = await image_jobs("watch", HERE, **member(project, project.token(exp=int(time.time()) - 60)))
    assert (done.code, done.out) == (1, "")
    assert "expired" in done.err
    assert "IMAGE_JOBS_TOKEN" in done.err


async def test_a_token_that_expires_meanwhile_ends_it(project, image_jobs):
    await project.db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", HERE, USER)
    token = project.token(exp=int(time.time()) + 4)
    done = await image_jobs("watch", HERE, **member(project, token))
    assert done.code == 1
    assert "Watching" in done.err
    assert "IMAGE_JOBS_TOKEN" in done.err


async def test_a_wrong_key_is_named(project, image_jobs):
    done = await image_jobs("watch", HERE, SUPABASE_URL=project.url, SUPABASE_SERVICE_ROLE_KEY="not-the-key")
    assert done.code == 1
    assert f"{project.url} answers 401 to the key." in done.err
    assert "Check SUPABASE_SERVICE_ROLE_KEY." in done.err
    assert "not-the-key" not in done.err


async def test_an_unreachable_server_is_reported(image_jobs):
    done = await image_jobs("watch", HERE, SUPABASE_URL="http://127.0.0.1:1", SUPABASE_SERVICE_ROLE_KEY="key")
    assert done.code == 1
    assert done.err == (
        "image-jobs: http://127.0.0.1:1 cannot be reached (ConnectionRefusedError).\n"
        "Check SUPABASE_URL, and that the server is running.\n"
    )


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({}, "SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY are not set."),
        ({"IMAGE_JOBS_TOKEN": "token"}, "SUPABASE_URL and SUPABASE_ANON_KEY are not set."),
        (
            {"SUPABASE_URL": "example.com", "SUPABASE_SERVICE_ROLE_KEY": "key"},
            "SUPABASE_URL is wrong (it begins with neither https:// nor http://).",
        ),
    ],
)
async def test_missing_settings_are_exit_code_2(image_jobs, environment, complaint):
    done = await image_jobs("watch", HERE, **environment)
    assert done.code == 2
    assert done.err.startswith(f"image-jobs: {complaint}\n")


async def test_lost_messages_are_refetched(project, image_jobs):
    await put(project.db, "a")
    await start(project.db, "a")
    async with watching(image_jobs, HERE, **operator(project)) as watch:
        await watch.says("  a  pending")
        await project.db.execute("alter table workflow_nodes disable trigger image_jobs_nodes_updated")
        await project.db.execute("update runs set status = 'cancelled'")
        await watch.says("  a  cancelled")


@pytest.fixture
def directory():
    """A directory that the user `nobody` can reach: as root, Postgres runs as `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-watch-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.timeout(240)
async def test_beside_dev_it_survives_a_long_outage(directory):
    image_jobs, port = ImageJobs(directory), free_port()
    async with dev_process.running(directory, port):
        process = await image_jobs.start("watch", str(WORKFLOW))
        watch = Watching(process)
        reading = asyncio.create_task(watch.read())
        await watch.says(f"  first  completed .*http://127.0.0.1:{port}/")
    await watch.says("The connection is lost")
    await asyncio.sleep(OUTAGE)
    assert process.returncode is None
    async with dev_process.running(directory, port):
        again = re.search(r"Connected again after (\d+) s", await watch.says("Connected again", timeout=40))
        assert again is not None
        assert int(again[1]) >= int(OUTAGE)
        environment = dict(line.split("=", 1) for line in (directory / ".image-jobs/env").read_text().splitlines())
        db = await connect(environment["DATABASE_URL"])
        assert await db.fetchval("select exists (select from workflow_members where user_id = $1)", VISITOR)
        await start(db, "first", str(WORKFLOW))
        await db.close()
        await watch.says("  first  running")
        await wait_until(lambda: sum("completed" in line for line in watch.out) == 2, timeout=30)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        await reading
    assert sum("The connection is lost" in line for line in watch.err) == 1
    assert not any("Traceback" in line for line in watch.err)
