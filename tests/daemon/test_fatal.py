"""A fatal error is one line of JSON without secrets; a broken provider or an odd row ends no daemon."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.postgres import ROOT, free_port
from tests.support.runs import insert_run, run_row

SECRET = "sk-broken-0123456789abcdefghij"


@pytest.fixture
async def harness(database: str) -> AsyncIterator[DaemonHarness]:
    async with open_harness(DaemonHarness, database) as it:
        yield it


def broken(directory: Path, module: str) -> dict[str, str]:
    """An environment in which a package cannot be imported, and says more than it should."""
    (directory / f"{module}.py").write_text(f"raise RuntimeError('no {module} with {SECRET}')\n")
    return {"PYTHONPATH": f"{directory}:{ROOT}"}


@pytest.mark.parametrize("module", ["openai", "google"])
async def test_a_broken_sdk_costs_its_provider_alone(harness: DaemonHarness, tmp_path: Path, module: str) -> None:
    keys = {"OPENAI_API_KEY": "sk-test", "GOOGLE_API_KEY": "AIza-test"}
    async with harness.run_daemon(**keys, **broken(tmp_path, module)) as it:
        await it.started()
        made = await insert_run(harness.db, prompt={"size": "64x64"}, demo={"noop": True})
        await harness.wait_for_status(made, "completed")
        model = {"openai": "gpt-image-2", "google": "gemini-3.1-flash-image"}[module]
        run = await insert_run(harness.db, processor=f"{module}:{model}")
        row = await harness.wait_for_status(run, "failed")
        assert row["payload"]["code"] != "internal"
        assert module in row["payload"]["error"]
        assert "is not set" not in row["payload"]["error"]
        assert row["payload"]["hint"]
        (line,) = it.logged("provider.broken")
        assert line["provider"] == module
        assert SECRET not in "\n".join(it.raw)


async def test_a_fatal_error_is_one_masked_line_of_json(harness: DaemonHarness, tmp_path: Path) -> None:
    async with harness.run_daemon(**broken(tmp_path, "storage3")) as it:
        assert await it.ended() == 1
    lines = [json.loads(line) for line in it.raw]  # not one that is no JSON
    assert lines[-1]["event"] == "daemon.failed"
    assert lines[-1]["level"] == "critical"
    assert "storage3" in str(lines[-1])
    assert SECRET not in "\n".join(it.raw)


async def test_a_mistake_of_the_operator_is_one_line_of_json(harness: DaemonHarness) -> None:
    await harness.db.execute("delete from image_jobs.migrations")
    async with harness.run_daemon() as it:
        assert await it.ended() == 1
    (line,) = [json.loads(line) for line in it.raw]
    assert line["event"] == "daemon.failed"
    assert line["hint"] == "Run image-jobs migrate."


async def test_a_refused_setting_of_the_session_ends_the_start(harness: DaemonHarness) -> None:
    for wrong in ("statement_timeout=abc", "options=-c%20no_such_setting%3D1"):
        async with harness.run_daemon(DATABASE_URL=f"{harness.project.dsn}?{wrong}") as it:
            assert await it.ended() in (1, 2)
        line = json.loads(it.raw[-1])
        assert (line["event"], line["hint"]) == (
            "daemon.failed",
            "Correct the parameters of DATABASE_URL, or PGOPTIONS.",
        )
        assert wrong.partition("=")[0] in str(line) or "no_such_setting" in str(line)


async def test_a_daemon_that_is_too_old_is_refused_in_a_sentence(harness: DaemonHarness) -> None:
    await harness.db.execute(
        "create or replace function image_jobs.oldest_daemon() returns text language sql immutable set search_path = '' "
        "as $$ select '99.1' $$"
    )
    async with harness.run_daemon() as it:
        assert await it.ended() == 1
    line = json.loads(it.raw[-1])
    assert (line["event"], line["hint"]) == (
        "daemon.failed",
        "Install version 99.1 or a newer one, and start it again.",
    )
    assert "too old for this database" in str(line)


async def test_a_row_without_processor_ends_no_daemon(harness: DaemonHarness) -> None:
    port = free_port()
    async with harness.run_daemon(IMAGE_JOBS_METRICS_PORT=str(port)) as it:
        await it.started()
        await harness.db.execute("insert into image_jobs.provider_limits (provider, paused) values ('demo', true)")
        run = await insert_run(harness.db, demo={"noop": True})
        # As a row that was there before the migrations.
        async with harness.db.transaction():
            await harness.db.execute("select set_config('image_jobs.writer', 'daemon', true)")
            await harness.db.execute(
                "update runs set processor = null, status = 'failed', finished_at = now(), due_at = null,"
                ' payload = \'{"error": "It was so."}\' where id = $1',
                run,
            )
        await harness.db.execute("update runs set status = 'pending' where id = $1", run)
        row = await harness.wait_for_status(run, "failed")
        assert row["payload"]["error"]
        await harness.db.execute("update image_jobs.provider_limits set paused = false where provider = 'demo'")
        other = await insert_run(harness.db, demo={"noop": True})
        await harness.wait_for_status(other, "completed")
        assert it.process.returncode is None
    assert (await run_row(harness.db, run))["processor"] is None
