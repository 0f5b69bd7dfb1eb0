"""The commands, as processes: exit codes, one sentence and a cure, JSON that parses, and never a secret."""

import json
import os
import signal
import socket
import subprocess
import sys
from uuid import uuid4

import pytest

from tests.commands import ImageJobs
from tests.postgres import MIGRATIONS, ROOT, wait_until

COMMANDS = ("dev", "run", "migrate", "generate", "status", "events", "watch", "cancel", "requeue", "doctor", "check")
NEEDS_DATABASE = (
    ("run",),
    ("migrate",),
    ("generate", "a fox"),
    ("status",),
    ("events", "job_1"),
    ("cancel", "job_1"),
    ("requeue", "job_1"),
    ("check",),
)
REST = {"SUPABASE_URL": "http://127.0.0.1:1", "SUPABASE_SERVICE_ROLE_KEY": "a-key-that-is-secret"}
PASSWORD = "hunter22hunter"


@pytest.fixture
def image_jobs(tmp_path) -> ImageJobs:
    return ImageJobs(tmp_path)


async def insert(db, run_id: str) -> str:
    await db.execute(
        "insert into public.runs (id, kind, subject_id, status, processor, metadata) "
        "values ($1, 'image_gen', $2, 'pending', 'demo:painter', $3)",
        run_id,
        uuid4(),
        {"promptSpec": {"basePrompt": "a fox"}},
    )
    return run_id


async def fail(db, run_id: str, error: str) -> None:
    """Ends a run as a daemon would."""
    daemon = uuid4()
    await db.execute("select private.register_daemon($1, 'test', '0', 1, '30 s', '{demo}')", daemon)
    (claimed,) = await db.fetch("select run from private.turn($1, 1, true, '[]', '[]', null, null)", daemon)
    run = claimed["run"]
    settlement = {
        "id": run_id,
        "claim": run["claim"],
        "outcome": "failed",
        "events": [],
        "payload": {"error": error, "code": "test", "hint": "Try another prompt."},
    }
    await db.execute("select * from private.turn($1, 0, false, $2, '[]', null, null)", daemon, [settlement])


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
async def test_every_command_has_help_with_an_example(image_jobs, command):
    done = await image_jobs(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"image-jobs {command}" in done.out or '"image-jobs", "check"' in done.out
    assert "Example: " in done.out


async def test_help_lists_every_command_and_no_other(image_jobs):
    done = await image_jobs("--help")
    listed = done.out.split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in listed if line.strip()] == list(COMMANDS)


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


def test_neither_sdks_nor_dev_parts_are_imported_before_they_are_needed():
    code = "import sys, daemon.cli; print({name.split('.')[0] for name in sys.modules} & {'openai', 'supabase', 'uvicorn'})"
    code += "; print([name for name in sys.modules if name.startswith('daemon.dev')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["set()", "[]"]


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


# The environment


@pytest.mark.parametrize("arguments", NEEDS_DATABASE, ids=lambda arguments: arguments[0])
async def test_without_a_database_url_the_cure_is_named(image_jobs, arguments):
    done = await image_jobs(*arguments, **REST)
    assert done.code == 2
    assert done.err.startswith("image-jobs: DATABASE_URL is not set.\n")
    assert "a-key-that-is-secret" not in done.err


async def test_run_names_everything_that_is_not_set(image_jobs):
    done = await image_jobs("run")
    assert done.code == 2
    assert "DATABASE_URL and SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY are not set" in done.err


@pytest.mark.parametrize(
    ("dsn", "code", "says"),
    [
        (f"nonsense://postgres:{PASSWORD}@host/db", 2, "not the address of a Postgres database"),
        (f"postgresql://postgres:{PASSWORD}/#@host/db", 2, "not the address of a Postgres database"),
        (f"postgresql://postgres:{PASSWORD}@127.0.0.1:99999/db", 2, "not the address of a Postgres database"),
        (f"postgresql://postgres:{PASSWORD}@nowhere.invalid/db", 1, "no database at nowhere.invalid:5432"),
        (f"postgresql://postgres:{PASSWORD}@127.0.0.1:1/db", 1, "no database at 127.0.0.1:1 (connection refused)"),
    ],
)
async def test_a_wrong_database_url_is_one_sentence_without_the_password(image_jobs, dsn, code, says):
    for arguments in (("status",), ("run",)):
        done = await image_jobs(*arguments, DATABASE_URL=dsn, **REST)
        assert done.code == code, done.err
        assert says in done.err
        assert PASSWORD not in done.err + done.out
        assert len(done.err.splitlines()) <= 2


async def test_the_transaction_pooler_is_refused_in_words(image_jobs):
    done = await image_jobs("run", DATABASE_URL=f"postgresql://u:{PASSWORD}@127.0.0.1:6543/db", **REST)
    assert done.code == 2
    assert "5432" in done.err


async def test_an_unknown_user_or_database_is_a_matter_of_configuration(image_jobs, database):
    done = await image_jobs("status", DATABASE_URL=database.replace("postgres@", "nobody_we_know@"))
    assert done.code == 2
    assert "refuses the user or the password" in done.err
    done = await image_jobs("status", DATABASE_URL=database.rsplit("/", 1)[0] + "/no_such_database")
    assert done.code == 2
    assert 'Database "no_such_database" does not exist.' in done.err


async def test_a_value_that_cannot_be_read_is_named_and_not_repeated(image_jobs):
    done = await image_jobs("status", IMAGE_JOBS_CONCURRENCY=PASSWORD, IMAGE_JOBS_LEASE="soon")
    assert done.code == 2
    assert "IMAGE_JOBS_CONCURRENCY is wrong" in done.err
    assert "IMAGE_JOBS_LEASE is wrong" in done.err
    assert PASSWORD not in done.err


async def test_dotenv_is_read(image_jobs, database):
    (image_jobs.directory / ".env").write_text(f"DATABASE_URL={database}\n")
    done = await image_jobs("status", "--json")
    assert (done.code, done.err) == (0, "")


async def test_beside_dev_its_environment_is_taken_and_said(image_jobs, database):
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


# migrate


async def test_migrate_says_what_it_has_done_and_then_that_nothing_is_to_do(image_jobs, postgres):
    names = [path.stem for path in sorted(MIGRATIONS.glob("*.sql"))]
    async with postgres.database(template=None) as dsn:
        done = await image_jobs("migrate", DATABASE_URL=dsn)
        assert done.code == 0
        assert done.out.splitlines() == [f"applied {name}" for name in names]
        done = await image_jobs("migrate", DATABASE_URL=dsn)
        assert (done.code, done.out) == (0, "The database is up to date.\n")
        assert (await image_jobs("migrate", "--json", DATABASE_URL=dsn)).json == {"applied": []}


# generate


async def test_generate_waits_and_says_when_no_daemon_runs_and_ctrl_c_leaves_the_run_alone(image_jobs, database, db):
    process = await image_jobs.start("generate", "a fox", "--seed", "7", "--ratio", "16:9", DATABASE_URL=database)
    assert process.stderr is not None
    said = (await process.stderr.readline()).decode()
    assert "No daemon is running" in said
    process.send_signal(signal.SIGINT)
    done = await image_jobs.end(process)
    (run,) = await db.fetch("select * from public.runs")
    assert done.code == 1
    assert f"image-jobs cancel {run['id']}" in done.err
    assert (run["status"], run["processor"]) == ("pending", "demo:painter")
    assert run["metadata"]["promptSpec"] == {"basePrompt": "a fox", "seed": 7, "aspectRatio": "16:9"}


async def test_a_run_that_was_cancelled_meanwhile_is_exit_code_1(image_jobs, database, db):
    process = await image_jobs.start("generate", "a fox", "--json", DATABASE_URL=database)
    run_id = await wait_until(lambda: db.fetchval("select id from public.runs"))
    await db.execute("update public.runs set status = 'cancelled'")
    done = await image_jobs.end(process)
    assert done.code == 1
    assert f"{run_id} was cancelled." in done.err
    assert done.json == {"jobId": run_id, "status": "cancelled", "file": None}


async def test_a_run_that_fails_says_why_and_what_to_do(image_jobs, database, db):
    process = await image_jobs.start("generate", "a fox", DATABASE_URL=database)
    run_id = await wait_until(lambda: db.fetchval("select id from public.runs"))
    await fail(db, run_id, "The painter has run out of red.")
    done = await image_jobs.end(process)
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-2:] == ["image-jobs: The painter has run out of red.", "Try another prompt."]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--size", "big"), "promptSpec.size cannot be read."),
        (("--processor", "painter"), "processor must name a provider and a model."),
        (("--image", "data:image/png;base64,AAAA"), "base64"),
        (("--out", "no/such/dir/fox.png"), "There is no directory"),
    ],
)
async def test_what_the_database_refuses_is_a_mistake_in_the_command_line(image_jobs, database, db, arguments, says):
    done = await image_jobs("generate", "a fox", *arguments, DATABASE_URL=database)
    assert done.code == 2
    assert says in done.err
    assert await db.fetchval("select count(*) from public.runs") == 0


# events, cancel, requeue


async def test_events_tell_the_story_of_a_run(image_jobs, database, db):
    run_id = await insert(db, "job_a")
    await fail(db, run_id, "No red left.")
    done = await image_jobs("events", run_id, DATABASE_URL=database)
    assert done.code == 0
    assert [line.split()[1] for line in done.out.splitlines()] == ["created", "claimed", "failed"]
    assert "No red left." in done.out
    told = (await image_jobs("events", run_id, "--json", DATABASE_URL=database)).json
    assert [event["payload"]["event"] for event in told] == ["created", "claimed", "failed"]
    assert [event["seq"] for event in told] == sorted(event["seq"] for event in told)


async def test_cancel_and_requeue_change_a_run_and_say_so(image_jobs, database, db):
    run_id = await insert(db, "job_b")
    assert (await image_jobs("cancel", run_id, DATABASE_URL=database)).out == "job_b is cancelled.\n"
    done = await image_jobs("requeue", run_id, "--json", DATABASE_URL=database)
    assert (done.json["jobId"], done.json["status"]) == (run_id, "pending")
    assert await db.fetchval("select status from public.runs") == "pending"


async def test_cancelling_what_has_ended_says_how_it_ended(image_jobs, database, db):
    run_id = await insert(db, "job_c")
    await fail(db, run_id, "No red left.")
    done = await image_jobs("cancel", run_id, DATABASE_URL=database)
    assert (done.code, done.out) == (0, "job_c is failed.\n")


@pytest.mark.parametrize("command", ["events", "cancel", "requeue"])
async def test_an_unknown_run_is_exit_code_1(image_jobs, database, command):
    done = await image_jobs(command, "job_unknown", DATABASE_URL=database)
    assert (done.code, done.out) == (1, "")
    assert "There is no" in done.err


# status


async def test_status_counts_runs_and_shows_the_latest_failure_as_it_is_written(image_jobs, database, db):
    await fail(db, await insert(db, "job_d"), "[bold]No red left.[/bold]")
    await insert(db, "job_e")
    done = await image_jobs("status", DATABASE_URL=database)
    assert done.code == 0
    assert "[bold]No red left.[/bold]" in done.out
    assert "job_d" in done.out
    seen = (await image_jobs("status", "--json", DATABASE_URL=database)).json
    (queue,) = seen["queue"]
    assert (queue["provider"], queue["pending"], queue["failed"]) == ("demo", 1, 1)
    assert isinstance(queue["oldest_wait"], float)
    assert [failure["id"] for failure in seen["failures"]] == ["job_d"]
    assert [daemon["name"] for daemon in seen["daemons"]] == ["test"]


async def test_an_empty_database_has_a_status_too(image_jobs, database):
    done = await image_jobs("status", DATABASE_URL=database)
    assert done.code == 0
    assert "No runs yet." in done.out
    assert "image-jobs run" in done.out


async def test_watching_goes_on_until_ctrl_c(image_jobs, database, db):
    process = await image_jobs.start("status", "--watch", "--json", DATABASE_URL=database)
    assert process.stdout is not None
    assert json.loads(await process.stdout.readline())["queue"] == []
    await insert(db, "job_f")
    while not json.loads(await process.stdout.readline())["queue"]:
        pass
    process.send_signal(signal.SIGINT)
    assert (await image_jobs.end(process)).code == 0


# doctor and check


async def test_doctor_finds_what_is_missing_and_names_a_cure_for_each(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        done = await image_jobs("doctor", "--json", DATABASE_URL=dsn)
    assert done.code == 1
    found = {finding["name"]: finding for finding in done.json}
    assert {name for name, finding in found.items() if finding["state"] == "problem"} == {
        "migrations",
        "storage",
        "providers",
    }
    assert found["database"]["state"] == found["listen"]["state"] == "ok"
    assert all(finding["cure"] for finding in found.values() if finding["state"] == "problem")


async def test_doctor_goes_on_without_a_database(image_jobs):
    done = await image_jobs("doctor", DATABASE_URL=f"postgresql://u:{PASSWORD}@127.0.0.1:1/db", **REST)
    assert done.code == 1
    assert [line.split()[1] for line in done.out.splitlines() if line.startswith("problem")] == [
        "database",
        "storage",
        "providers",
    ]
    assert PASSWORD not in done.out + done.err
    assert "a-key-that-is-secret" not in done.out + done.err


async def test_check_is_about_the_daemon_of_this_host(image_jobs, database, db):
    done = await image_jobs("check", DATABASE_URL=database)
    assert done.code == 1
    assert f"No daemon has ever run on {socket.gethostname()}." in done.err

    daemon = uuid4()
    await db.execute("select private.register_daemon($1, $2, '0', 1, '30 s', '{demo}')", daemon, socket.gethostname())
    done = await image_jobs("check", DATABASE_URL=database)
    assert (done.code, done.err) == (0, "")

    await db.execute("update private.daemons set seen_at = seen_at - interval '1 minute'")
    done = await image_jobs("check", "--json", DATABASE_URL=database)
    assert done.code == 1
    assert done.json == {"host": socket.gethostname(), "alive": False, "states": ["silent"]}
    assert "image-jobs run" in done.err


# run


async def test_run_refuses_a_database_that_lacks_migrations(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        done = await image_jobs("run", DATABASE_URL=dsn, **REST)
    assert done.code == 1
    assert "Run image-jobs migrate." in done.err


async def test_generate_asks_for_what_a_living_daemon_offers(image_jobs, database, db):
    await db.execute("select private.register_daemon(gen_random_uuid(), 'x', '0', 1, '1 hour', array['openai'])")
    await db.execute(
        """insert into private.models (provider, model, price, retired) values
        ('openai', 'dear', 0.2, null), ('openai', 'cheap', 0.01, null), ('openai', 'gone', 0.001, '2020-01-01'),
        ('nobody', 'free', 0, null)"""
    )
    process = await image_jobs.start("generate", "a red fox", DATABASE_URL=database)
    try:
        await wait_until(lambda: db.fetchval("select processor = 'openai:cheap' from runs"))
    finally:
        process.send_signal(signal.SIGINT)
        await image_jobs.end(process)
