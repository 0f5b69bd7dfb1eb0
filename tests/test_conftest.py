"""The fixtures of all tests: three versions of Postgres, a database each, no skip without notice."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse

from daemon.dev.postgres import version
from tests.support.daemon_harness import fetch
from tests.support.postgres import ROOT, VERSIONS, bin_dir, wait_until
from tests.support.servers import served


@pytest.mark.parametrize("name", VERSIONS)
def test_all_three_versions_are_installed(name):
    assert version(bin_dir(name)).startswith(f"{name.removeprefix('pg')}.")


@pytest.mark.every_postgres
async def test_server_version_matches_the_test_name(db, request):
    major = await db.fetchval("select current_setting('server_version_num')::int / 10000")
    assert f"[pg{major}]" in request.node.name


@pytest.mark.parametrize("again", [False, True])
async def test_each_test_has_a_fresh_database(db, again):
    await db.execute("create table public.leftover (id int)")
    assert await db.fetchval("select count(*) from public.leftover") == 0


async def test_json_is_encoded_and_decoded(db):
    assert await db.fetchval("select $1::jsonb || '{\"b\": null}'", {"a": [1]}) == {"a": [1], "b": None}


async def test_wait_until_returns_the_first_true_value():
    values = iter([0, 0, 3])
    assert await wait_until(lambda: next(values)) == 3


async def test_wait_until_reports_the_last_value_on_timeout():
    async def never() -> list[int]:
        return []

    with pytest.raises(AssertionError, match=r"still returns \[\]"):
        await wait_until(never, timeout=0.05)


async def test_served_closes_when_the_test_fails():
    # As often as it takes for a socket to get the number of one before.
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with served(PlainTextResponse("here")) as url:
                assert (await fetch(url)).text == "here"
                raise ZeroDivisionError
        with pytest.raises(httpx.ConnectError):
            await fetch(url)


@pytest.mark.parametrize(("ci", "code"), [("true", pytest.ExitCode.TESTS_FAILED), ("", pytest.ExitCode.OK)])
def test_skipped_test_fails_the_run_in_ci(tmp_path: Path, ci, code):
    (tmp_path / "test_lazy.py").write_text("import pytest\n\n\ndef test_lazy():\n    pytest.skip('no time')\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-c",
        str(ROOT / "pyproject.toml"),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CI": ci}, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert ("1 skipped: with CI=true a skipped test is a failure." in done.stdout) == bool(ci)
