"""doctor: what is in the way of image runs, without a trace in the database; daemons that are older than it."""

from importlib.metadata import version
from uuid import uuid4

import pytest

from daemon.cli.doctor.database import check_plugins
from daemon.cli.doctor.schema import check_limits, check_membership, check_schema, check_versions
from tests.sql.test_ledger import REPLACED
from tests.sql.test_models import publish
from tests.support.adoption import SPECIFICATION, everything, migrate
from tests.support.postgres import Cluster, connect
from tests.support.protocol import Db, insert_node, new_daemon, run_in
from tests.support.runs import WORKFLOW, insert_run

FORBID = """
    create function forbid() returns trigger language plpgsql as $$ begin raise exception 'No images here.'; end $$;
    create trigger no_images before update on runs for each row execute function forbid();
"""


@pytest.mark.every_postgres
async def test_an_image_run_is_tried_without_a_trace(db: Db, database: str) -> None:
    daemon = await new_daemon(db)
    await run_in(db, daemon, "completed")
    waiting = await insert_run(db)
    await insert_node(db, "n", WORKFLOW)
    before = await everything(db)
    heard: list[str] = []
    listener = await connect(database)
    for channel in ("image_jobs_wake", "image_jobs_drop"):
        await listener.add_listener(channel, lambda *notification: heard.append(notification[2]))
    (found,) = await check_schema(db, migrated=True)
    assert (found.state, found.message) == ("ok", "An image run was tried from insert to cancel, and undone.")
    assert await everything(db) == before
    await listener.execute("select")
    assert heard == []
    await listener.close()
    assert (await daemon.claim_one())["id"] == waiting


async def test_a_rule_that_came_later_is_found(db: Db) -> None:
    await db.execute(FORBID)
    (found,) = await check_schema(db, migrated=True)
    assert found.message == "An image run cannot be claimed: the trigger no_images says: No images here."
    assert (found.state, found.cure.startswith("Let it leave rows of kind image_gen alone")) == ("problem", True)
    await db.execute("drop trigger no_images on runs; alter table runs add check (status <> 'cancelled')")
    (found,) = await check_schema(db, migrated=True)
    assert found.message == "The check runs_status_check of public.runs refuses image runs that are cancelled."


async def test_locked_tables_are_looked_at_another_time(db: Db, database: str) -> None:
    other = await connect(database)
    async with other.transaction():
        await other.execute("lock table runs")
        (found,) = await check_schema(db, migrated=True)
    await other.close()
    assert (found.state, found.cure) == ("info", "Try again.")


async def test_a_run_that_cannot_be_tried_is_said(db: Db) -> None:
    await db.execute(
        "create table workflows (id uuid primary key); alter table runs add foreign key (subject_id) references workflows"
    )
    (found,) = await check_schema(db, migrated=True)
    assert found.message == "An image run was not tried: workflows has no row yet, and runs refers to it."


async def test_doctor_compares_a_database_before_it_is_migrated(image_jobs, postgres: Cluster) -> None:
    async with postgres.database(template=None) as dsn:
        db = await connect(dsn)
        await db.execute(SPECIFICATION.replace("status VARCHAR", "status VARCHAR(8)"))
        done = await image_jobs("doctor", "--json", DATABASE_URL=dsn)
        (found,) = [finding for finding in done.json if finding["name"] == "schema"]
        assert found["message"] == "public.runs.status is of type character varying(8), and has to take 9 characters."
        await db.execute(found["cure"].removeprefix("Run: "))
        await migrate(db)
        await db.close()


async def test_old_daemons_are_named(db: Db) -> None:
    for name, its in (("new", version("image-job-orchestrator")), ("old", "0.0.9")):
        await db.execute("select image_jobs.register_daemon($1, $2, $3, 1, '30 s', '{demo}')", uuid4(), name, its)
    (found,) = await check_versions(db)
    assert (found.state, found.message[:40]) == ("info", "The daemon old is of version 0.0.9, olde")
    await db.execute(
        "create or replace function image_jobs.oldest_daemon() returns text language sql immutable set search_path = '' "
        "as $$ select '0.1' $$"
    )
    (found,) = await check_versions(db)
    assert (found.state, found.message) == ("problem", "The daemon old (0.0.9) is too old for the schema.")


async def test_realtime_without_its_plugin_is_said_with_the_cure(db: Db, postgres: Cluster) -> None:
    (found,) = await check_plugins(db)
    assert found.message.startswith("output_plugin_libraries does not list wal2json")
    first, second = found.cure.removeprefix("As a superuser: ").split("; then ")
    try:
        await postgres.sudo(first)
        await postgres.sudo(second.rstrip(";"))
        again = await connect(postgres.server.dsn(await db.fetchval("select current_database()"), user="postgres"))
        assert await check_plugins(again) == []
        await again.close()
    finally:
        await postgres.sudo("alter system reset output_plugin_libraries")
        await postgres.sudo("select pg_reload_conf()")


async def test_a_replaced_rule_of_membership_is_said(db: Db) -> None:
    assert await check_membership(db) == []
    await db.execute(REPLACED)
    (found,) = await check_membership(db)
    assert (found.state, "replaced image_jobs.my_workflows()" in found.message) == ("info", True)


async def test_limits_of_nothing_on_offer_are_found(db: Db) -> None:
    await publish(db, "openai", {"model": "gpt-image-2"})
    assert await check_limits(db) == []
    await db.execute(
        """insert into image_jobs.provider_limits (provider, model) values
             ('openia', null), ('openai', 'gpt-image-2.5-flair'), ('openai', 'gpt-image-2-2026-11-01'), ('google', 'any');
           insert into image_jobs.provider_blocks (provider, until) values ('gogle', now() + interval '1 hour')"""
    )
    found = await check_limits(db)
    assert [(finding.state, finding.message.partition(" holds")[0].rpartition(" ")[2]) for finding in found] == [
        ("problem", "gogle"),
        ("problem", "openai:gpt-image-2.5-flair"),
        ("problem", "openia"),
    ]
