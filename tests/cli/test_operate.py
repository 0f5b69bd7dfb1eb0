"""migrate, run, check."""

import socket
from uuid import uuid4

from tests.support.commands import UNREACHABLE
from tests.support.postgres import MIGRATIONS


async def test_migrate_says_what_it_ran_and_made(image_jobs, postgres):
    names = [path.stem for path in sorted(MIGRATIONS.glob("*.sql"))]
    async with postgres.database(template=None) as dsn:
        done = await image_jobs("migrate", DATABASE_URL=dsn)
        assert done.code == 0
        made = [
            "the bucket images",
            "the bucket images-context",
            "the bucket images-kept",
            "the bucket image-sources",
            'the policy "Members see the pictures of their workflows" on storage.objects',
            'the policy "Members see the sources of their workflows" on storage.objects',
            'the policy "Members add sources to their workflows" on storage.objects',
            'the policy "Members delete the sources of their workflows" on storage.objects',
            'the policy "Members hear the nodes of their workflows" on realtime.messages',
            "workflow_nodes in the publication supabase_realtime",
        ]
        assert done.out.splitlines() == [f"applied {name}" for name in names] + [f"made {name}" for name in made]
        done = await image_jobs("migrate", DATABASE_URL=dsn)
        assert (done.code, done.out, done.err) == (0, "The database is up to date.\n", "")
        done = await image_jobs("migrate", "--json", DATABASE_URL=dsn)
        assert done.json == {"applied": [], "made": [], "lacking": []}


async def test_refused_steps_are_named_with_their_sql(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        await postgres.sudo("alter table realtime.messages owner to supabase_admin", dsn.rpartition("/")[2])
        done = await image_jobs("migrate", DATABASE_URL=dsn)
        assert done.code == 0
        assert "on realtime.messages could not be made: must be owner of table messages." in done.err
        assert "\ncreate policy " in done.err
        (lacking,) = (await image_jobs("migrate", "--json", DATABASE_URL=dsn)).json["lacking"]
        assert (lacking["state"], lacking["command"][:13]) == ("refused", "create policy")

        found = (await image_jobs("doctor", "--json", DATABASE_URL=dsn)).json
        (finding,) = [finding for finding in found if finding["name"] == "set-up"]
        assert finding["state"] == "problem"
        assert lacking["command"] in finding["cure"]


async def test_doctor_waits_for_realtime_without_a_problem(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        await postgres.sudo("drop table realtime.messages cascade", dsn.rpartition("/")[2])
        done = await image_jobs("migrate", DATABASE_URL=dsn)
        assert "Run image-jobs migrate again when it is there, or this:" in done.err
        found = (await image_jobs("doctor", "--json", DATABASE_URL=dsn)).json
        (finding,) = [finding for finding in found if finding["name"] == "set-up"]
        assert (finding["state"], "has not made realtime.messages" in finding["message"]) == ("info", True)


async def test_doctor_gives_the_sql_for_an_absent_publication(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        await postgres.sudo("drop publication supabase_realtime", dsn.rpartition("/")[2])
        await image_jobs("migrate", DATABASE_URL=dsn)
        found = (await image_jobs("doctor", "--json", DATABASE_URL=dsn)).json
        (finding,) = [finding for finding in found if finding["name"] == "set-up"]
        assert finding["state"] == "info"
        assert finding["cure"] == "Run: create publication supabase_realtime for table public.workflow_nodes;"


async def test_export_says_what_to_do_next(image_jobs, tmp_path):
    done = await image_jobs("migrate", "--export", "migrations")
    (written,) = (tmp_path / "migrations").iterdir()
    assert done.out.splitlines()[0] == f"wrote migrations/{written.name}"
    assert "supabase db push" in done.out
    assert "--include-all" in done.err
    done = await image_jobs("migrate", "--export", "migrations")
    assert (done.code, done.out, done.err) == (0, "migrations has them all.\n", "")
    assert (await image_jobs("migrate", "--export", "migrations", "--json")).json == {"written": []}


async def test_run_lists_all_missing_settings(image_jobs):
    done = await image_jobs("run")
    assert done.code == 2
    assert "DATABASE_URL and SUPABASE_URL and SUPABASE_SERVICE_ROLE_KEY are not set" in done.err


async def test_run_refuses_a_database_that_lacks_migrations(image_jobs, postgres):
    async with postgres.database(template=None) as dsn:
        done = await image_jobs("run", DATABASE_URL=dsn, **UNREACHABLE)
    assert done.code == 1
    assert "Run image-jobs migrate." in done.err


async def test_check_reports_the_daemon_of_this_host(image_jobs, database, db):
    done = await image_jobs("check", DATABASE_URL=database)
    assert done.code == 1
    assert f"No daemon has ever run on {socket.gethostname()}." in done.err

    daemon = uuid4()
    await db.execute(
        "select image_jobs.register_daemon($1, $2, '0', 1, '30 s', '{demo}')", daemon, socket.gethostname()
    )
    done = await image_jobs("check", DATABASE_URL=database)
    assert (done.code, done.err) == (0, "")

    await db.execute("update image_jobs.daemons set seen_at = seen_at - interval '1 minute'")
    done = await image_jobs("check", "--json", DATABASE_URL=database)
    assert done.code == 1
    assert done.json == {"host": socket.gethostname(), "alive": False, "states": ["silent"]}
    assert "image-jobs run" in done.err
