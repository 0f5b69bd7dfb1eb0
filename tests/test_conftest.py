"""The tests' own ground: three versions, a database each, nothing skipped in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.dev.postgres import version
from tests.postgres import ROOT, VERSIONS, bin_dir, wait_until


@pytest.mark.parametrize("name", VERSIONS)
def test_all_three_versions_are_installed(name):
    assert version(bin_dir(name)).startswith(f"{name.removeprefix('pg')}.")


@pytest.mark.every_postgres
async def test_the_version_is_the_one_in_the_name(db, request):
    major = await db.fetchval("select current_setting('server_version_num')::int / 10000")
    assert f"[pg{major}]" in request.node.name


@pytest.mark.parametrize("again", [False, True])
async def test_what_one_test_leaves_the_next_does_not_see(db, again):
    await db.execute("create table public.leftover (id int)")
    assert await db.fetchval("select count(*) from public.leftover") == 0


async def test_json_is_python_both_ways(db):
    assert await db.fetchval("select $1::jsonb || '{\"b\": null}'", {"a": [1]}) == {"a": [1], "b": None}


async def test_waiting_ends_with_the_first_true_answer():
    answers = iter([0, 0, 3])
    assert await wait_until(lambda: next(answers)) == 3


async def test_waiting_in_vain_tells_the_last_answer():
    async def never() -> list[int]:
        return []

    with pytest.raises(AssertionError, match=r"still answers \[\]"):
        await wait_until(never, timeout=0.05)


@pytest.mark.parametrize(("ci", "code"), [("true", pytest.ExitCode.TESTS_FAILED), ("", pytest.ExitCode.OK)])
def test_in_ci_a_skipped_test_fails_the_run(tmp_path: Path, ci, code):
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
