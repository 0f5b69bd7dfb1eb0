"""The commands as processes: help, usage, settings, exit codes, no secrets in the output."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.commands import PASSWORD, UNREACHABLE
from tests.support.postgres import ROOT

COMMANDS = (
    *("dev", "run", "migrate", "generate", "status", "dashboard", "list", "events"),
    *("watch", "cancel", "requeue", "prune", "doctor", "check", "completion"),
)


NEEDS_DATABASE = (
    ("run",),
    ("migrate",),
    ("generate", "a fox"),
    ("status",),
    ("list",),
    ("events", "job_1"),
    ("cancel", "job_1"),
    ("requeue", "job_1"),
    ("prune", "--older-than", "90d"),
    ("check",),
)


@pytest.mark.parametrize("command", COMMANDS)
async def test_every_command_has_help_with_an_example(image_jobs, command):
    done = await image_jobs(command, "-h")
    assert (done.code, done.err) == (0, "")
    assert "-h, --help" in done.out
    assert f"image-jobs {command}" in done.out or '"image-jobs", "check"' in done.out
    assert "Example: " in done.out


async def test_help_lists_every_command_and_no_other(image_jobs):
    done = await image_jobs("--help")
    listed = done.out.split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in listed if line.strip()] == list(COMMANDS)
    assert "..." not in "".join(listed)
    assert done.out == (await image_jobs("-h")).out


@pytest.mark.parametrize(
    "arguments",
    [("paint",), ("generate",), ("status", "--fast"), ("dev", "--port", "high"), ("generate", "x", "--seed", "-1")],
)
async def test_wrong_usage_is_exit_code_2(image_jobs, arguments):
    done = await image_jobs(*arguments)
    assert done.code == 2
    assert "--help" in done.err


async def test_the_version_is_the_packages(image_jobs):
    done = await image_jobs("--version")
    assert done.out.strip() == "0.1.0"


HEAVY = frozenset(
    ("openai", "google", "supabase", "storage3", "realtime", "PIL", "httpx", "httpx2", "structlog", "rich", "uvicorn")
)
"""Packages that take long to import. Loaded only where they are used."""


def loaded(code: str, *arguments: str) -> set[str]:
    """Return which of the heavy packages, and whether anything of `daemon.dev`, are loaded after a program has run."""
    program = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, sep=chr(10), file=sys.stderr)); {code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    names = done.stderr.split()
    assert "daemon.settings" in names
    return {name for name in names if name in HEAVY or name.startswith("daemon.dev")}


def test_help_imports_no_heavy_package():
    assert loaded("from daemon.cli import main; main()", "--help") == set()


def test_providers_without_a_key_import_no_sdk():
    code = "from daemon import providers, service; from daemon.settings import Settings; settings = Settings();"
    code += (
        "assert [providers.create(name, settings) for name in providers.PROVIDERS] == [None] * len(providers.PROVIDERS)"
    )
    assert loaded(code).isdisjoint({"openai", "google", "PIL", "supabase"})


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "daemon.dev"])
def test_dev_without_its_extra_says_what_to_install(missing, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['image-jobs', 'dev']\n"
    code += "from daemon.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert missing in done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", NEEDS_DATABASE, ids=lambda arguments: arguments[0])
async def test_a_missing_database_url_is_reported(image_jobs, arguments):
    done = await image_jobs(*arguments, **UNREACHABLE)
    assert done.code == 2
    said = json.loads(done.err)["error"] if arguments == ("run",) else done.err.removeprefix("image-jobs: ")
    assert said.startswith("DATABASE_URL is not set.")
    assert "a-key-that-is-secret" not in done.err


@pytest.mark.parametrize(
    ("dsn", "code", "says"),
    [
        (f"nonsense://postgres:{PASSWORD}@host/db", 2, "it begins with neither postgresql:// nor postgres://"),
        (f"postgresql://postgres:{PASSWORD}/#@host/db#", 2, "there is a # in it"),
        (f"postgresql://postgres:{PASSWORD}@127.0.0.1:99999/db", 2, "its port is no number from 1 to 65535"),
        (f"postgresql://postgres:{PASSWORD}@nowhere.invalid/db", 1, "no database at nowhere.invalid:5432"),
        (f"postgresql://postgres:{PASSWORD}@127.0.0.1:1/db", 1, "no database at 127.0.0.1:1 (connection refused)"),
    ],
)
async def test_a_wrong_database_url_is_reported_without_password(image_jobs, dsn, code, says):
    # A daemon waits for a database that is away: tests/faults/test_leaving.py.
    for arguments in (("status",), ("run",)) if code == 2 else (("status",),):
        done = await image_jobs(*arguments, DATABASE_URL=dsn, **UNREACHABLE)
        assert done.code == code, done.err
        assert says in done.err
        assert PASSWORD not in done.err + done.out
        assert len(done.err.splitlines()) <= 2


async def test_the_transaction_pooler_is_refused(image_jobs):
    done = await image_jobs("run", DATABASE_URL=f"postgresql://u:{PASSWORD}@127.0.0.1:6543/db", **UNREACHABLE)
    assert done.code == 2
    assert "5432" in done.err


async def test_an_unknown_user_or_database_is_exit_code_2(image_jobs, database):
    done = await image_jobs("status", DATABASE_URL=database.replace("postgres@", "nobody_we_know@"))
    assert done.code == 2
    assert "refuses the user or the password" in done.err
    done = await image_jobs("status", DATABASE_URL=database.rsplit("/", 1)[0] + "/no_such_database")
    assert done.code == 2
    assert 'Database "no_such_database" does not exist.' in done.err


async def test_an_invalid_setting_is_named_without_its_value(image_jobs):
    done = await image_jobs("status", IMAGE_JOBS_CONCURRENCY=PASSWORD, IMAGE_JOBS_LEASE="soon")
    assert done.code == 2
    assert "IMAGE_JOBS_CONCURRENCY is wrong" in done.err
    assert "IMAGE_JOBS_LEASE is wrong" in done.err
    assert PASSWORD not in done.err


async def test_dotenv_is_read(image_jobs, database):
    (image_jobs.directory / ".env").write_text(f"DATABASE_URL={database}\n")
    done = await image_jobs("status", "--json")
    assert (done.code, done.err) == (0, "")


async def test_the_environment_of_dev_is_used(image_jobs, database):
    (image_jobs.directory / ".image-jobs").mkdir()
    (image_jobs.directory / ".image-jobs/env").write_text(f"DATABASE_URL={database}\nSUPABASE_URL=http://127.0.0.1:1\n")
    done = await image_jobs("status", "--json", DATABASE_URL="")
    assert done.code == 0
    assert done.err == "Using .image-jobs/env, written by image-jobs dev.\n"
    done = await image_jobs("status", "--json", DATABASE_URL="postgresql://postgres@127.0.0.1:1/db")
    assert "127.0.0.1:1" in done.err


async def test_a_database_without_our_tables_needs_migrate(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        for arguments in (("status",), ("events", "job_1"), ("cancel", "job_1"), ("generate", "x"), ("check",)):
            done = await image_jobs(*arguments, DATABASE_URL=dsn)
            assert done.code == 1
            assert done.err.endswith("Run image-jobs migrate.\n"), done.err
