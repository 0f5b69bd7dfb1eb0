"""Who may do what, word for word: everything of ours for every API role, compared with the catalogue.

Something new without an entry here fails, and so does a grant that nobody wrote down.
"""

from collections import defaultdict

import asyncpg
import pytest

from tests.postgres import MIGRATIONS, Cluster, connect

API_ROLES = ("anon", "authenticated", "service_role")

READ = {"SELECT"}
WRITE = {"SELECT", "INSERT", "UPDATE", "DELETE"}
ALL_THREE = dict.fromkeys(API_ROLES, READ)

RELATIONS: dict[str, dict[str, set[str]]] = {
    "private.cancellations": {},
    "private.claims": {},
    "private.daemons": {"service_role": READ},
    "private.event_order": {},
    "private.lanes": {},
    "private.models": ALL_THREE,
    "private.node_versions": {},
    "private.providers": {},
    "private.stale_nodes": {},
    "private.stale_nodes_id_seq": {},
    "private.tickets": {},
    "private.wake": {},
    "private.webhook_counters": {},
    "private.webhook_deliveries": {},
    "private.webhook_secrets": {},
    "private.workflows": {},
    "public.daemons": {"service_role": READ},
    "public.image_jobs": {"authenticated": READ, "service_role": READ},
    "public.image_models": ALL_THREE,
    "public.provider_limits": {"service_role": WRITE},
    "public.provider_limits_id_seq": {},
    "public.queue_stats": {"service_role": READ},
    "public.run_costs": {"service_role": READ},
    "public.run_events": {"authenticated": READ, "service_role": WRITE},
    "public.run_timings": {"service_role": READ},
    "public.runs": {"authenticated": {"SELECT", "INSERT"}, "service_role": WRITE},
    "public.storage_stats": {"service_role": READ},
    "public.storage_violations": {"service_role": READ},
    "public.workflow_members": {"authenticated": READ, "service_role": WRITE},
    "public.workflow_nodes": {"authenticated": WRITE, "service_role": WRITE},
}

NOBODY: set[str] = set()
SIGNED_IN = {"authenticated", "service_role"}
EVERYBODY = set(API_ROLES)

FUNCTIONS: dict[str, set[str]] = {
    "private.abandon_runs": NOBODY,
    "private.accept_run": NOBODY,
    "private.add_events": NOBODY,
    "private.allowance": NOBODY,
    "private.attach_order": NOBODY,
    "private.block_provider": NOBODY,
    "private.can_access_run": EVERYBODY,
    "private.can_access_workflow": EVERYBODY,
    "private.broadcast_nodes": NOBODY,
    "private.cancel_order": NOBODY,
    "private.cancel_run": SIGNED_IN,
    "private.change_lanes": NOBODY,
    "private.check_prompt": NOBODY,
    "private.claim_runs": NOBODY,
    "private.claimed_run": NOBODY,
    "private.count_starts": NOBODY,
    "private.current_user_id": SIGNED_IN,
    "private.count_webhook": NOBODY,
    "private.delete_events": NOBODY,
    "private.drop_order": NOBODY,
    "private.webhook_wait": NOBODY,
    "private.find_order": NOBODY,
    "private.finish_cancellation": NOBODY,
    "private.first_open": NOBODY,
    "private.follow_up": NOBODY,
    "private.going_on": NOBODY,
    "private.guard_run": NOBODY,
    "private.guard_status": NOBODY,
    "private.has_base64": EVERYBODY,
    "private.hear_deliveries": NOBODY,
    "private.heartbeat": NOBODY,
    "private.hmac_sha256": NOBODY,
    "private.image_job_record": SIGNED_IN,
    "private.is_image_run": EVERYBODY,
    "private.is_operator": NOBODY,
    "private.is_signed": NOBODY,
    "private.json_or_null": NOBODY,
    "private.keep_node": NOBODY,
    "private.lane_of": NOBODY,
    "private.leave": NOBODY,
    "private.make_bucket": NOBODY,
    "private.match_deliveries": NOBODY,
    "private.may_have_asked": NOBODY,
    "private.may_hear": {"authenticated"},
    "private.node_data": NOBODY,
    "private.node_message": NOBODY,
    "private.nodes_changed": NOBODY,
    "private.note_delivery": NOBODY,
    "private.note_order": NOBODY,
    "private.now": {"service_role"},
    "private.own_keys": NOBODY,
    "private.pass_on": NOBODY,
    "private.place_in_line": NOBODY,
    "private.publish_models": NOBODY,
    "private.receive_webhook": {"anon", "service_role"},
    "private.record_progress": NOBODY,
    "private.refresh_stale_nodes": NOBODY,
    "private.refuse": SIGNED_IN,
    "private.register_daemon": NOBODY,
    "private.release_unheld": NOBODY,
    "private.requeue_run": SIGNED_IN,
    "private.runs_deleted": NOBODY,
    "private.runs_inserted": NOBODY,
    "private.runs_updated": NOBODY,
    "private.session_began": NOBODY,
    "private.session_lock_key": NOBODY,
    "private.set_webhook_secrets": NOBODY,
    "private.settle_runs": NOBODY,
    "private.show_runs": NOBODY,
    "private.stamp_event": NOBODY,
    "private.steps_left": SIGNED_IN,
    "private.sweep_webhooks": NOBODY,
    "private.forget_delivery": NOBODY,
    "private.take_cancellations": NOBODY,
    "private.take_over": NOBODY,
    "private.turn": NOBODY,
    "private.unmatched_deliveries": NOBODY,
    "private.use_workflow": NOBODY,
    "private.verified_delivery": NOBODY,
    "private.wake_all": NOBODY,
    "private.webhook_key": NOBODY,
    "private.why_closed": NOBODY,
    "private.write_nodes": NOBODY,
    "public.cancel_run": SIGNED_IN,
    "public.qualities": EVERYBODY,
    "public.receive_webhook": {"service_role"},
    "public.requeue_run": SIGNED_IN,
    "public.start_image_job": SIGNED_IN,
    "public.webhook_hmac": {"anon"},
    "public.webhook_midjourney": {"anon"},
    "public.webhook_openai": {"anon"},
}

# What an older project grants on everything that is new in public.
OLDER_PROJECT = """
    alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
    alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
    alter default privileges in schema public grant all on sequences to anon, authenticated, service_role;
"""


@pytest.fixture(params=["new project", "older project"])
async def project(request: pytest.FixtureRequest, postgres: Cluster):
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        if request.param == "older project":
            await connection.execute(OLDER_PROJECT)
        for file in sorted(MIGRATIONS.glob("*.sql")):
            await connection.execute(file.read_text())
        yield connection
        await connection.close()


async def granted(db: "asyncpg.Connection[asyncpg.Record]", query: str) -> dict[str, dict[str, set[str]]]:
    """What each API role and PUBLIC hold: {object: {role: privileges}}. An object without grants is there, too."""
    found: dict[str, dict[str, set[str]]] = {}
    for name, role, privilege in await db.fetch(query):
        privileges = found.setdefault(name, defaultdict(set))
        if role is not None:
            privileges[role].add(privilege)
    return found


async def test_tables_views_and_sequences_are_granted_as_written_here(project):
    found = await granted(
        project,
        """
        select c.oid::regclass::text, grants.role, grants.privilege_type
        from pg_class c
        left join lateral (
            select coalesce(r.rolname, 'PUBLIC') as role, a.privilege_type
            from aclexplode(coalesce(c.relacl, acldefault(case c.relkind when 'S' then 's' else 'r' end::"char", c.relowner))) a
            left join pg_roles r on r.oid = a.grantee
            where a.grantee = 0 or r.rolname in ('anon', 'authenticated', 'service_role')
        ) grants on true
        where c.relnamespace in ('public'::regnamespace, 'private'::regnamespace) and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
        """,
    )
    assert {qualified(name): dict(roles) for name, roles in found.items()} == RELATIONS


async def test_no_column_is_granted_by_itself(project):
    assert not await project.fetch(
        """
        select attrelid::regclass, attname from pg_attribute
        where attacl is not null
          and attrelid in (select oid from pg_class where relnamespace in ('public'::regnamespace, 'private'::regnamespace))
        """
    )


async def test_functions_are_granted_as_written_here_and_never_to_public(project):
    found = await granted(
        project,
        """
        select p.pronamespace::regnamespace || '.' || p.proname, grants.role, grants.privilege_type
        from pg_proc p
        left join lateral (
            select coalesce(r.rolname, 'PUBLIC') as role, a.privilege_type
            from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
            left join pg_roles r on r.oid = a.grantee
            where a.grantee = 0 or r.rolname in ('anon', 'authenticated', 'service_role')
        ) grants on true
        where p.pronamespace in ('public'::regnamespace, 'private'::regnamespace)
        """,
    )
    assert {name: set(roles) for name, roles in found.items()} == FUNCTIONS


async def test_nobody_creates_anything_in_our_schemas(project):
    assert not await project.fetch(
        """
        select role, schema from unnest(array['anon', 'authenticated', 'service_role']) role
        cross join unnest(array['public', 'private']) schema where has_schema_privilege(role, schema, 'create')
        """
    )


async def test_every_function_has_an_empty_search_path(db):
    assert not await db.fetch(
        """
        select p.oid::regprocedure from pg_proc p
        where p.pronamespace in ('public'::regnamespace, 'private'::regnamespace)
          and not 'search_path=""' = any (coalesce(p.proconfig, '{}'))
        """
    )


async def test_no_function_that_clients_call_runs_as_its_owner(db):
    assert not await db.fetch(
        "select oid::regprocedure from pg_proc where pronamespace = 'public'::regnamespace and prosecdef"
    )


async def test_every_table_has_row_level_security(db):
    assert not await db.fetch(
        """
        select oid::regclass from pg_class
        where relnamespace in ('public'::regnamespace, 'private'::regnamespace) and relkind in ('r', 'p')
          and not relrowsecurity
        """
    )


async def test_every_view_reads_with_the_rights_of_whoever_asks(db):
    assert not await db.fetch(
        """
        select oid::regclass from pg_class
        where relnamespace in ('public'::regnamespace, 'private'::regnamespace) and relkind in ('v', 'm')
          and not coalesce(reloptions, '{}') && array['security_invoker=on', 'security_invoker=true']
        """
    )


async def test_every_foreign_key_has_an_index(db):
    assert not await db.fetch(
        """
        select k.conrelid::regclass, k.conname from pg_constraint k
        where k.contype = 'f' and k.connamespace in ('public'::regnamespace, 'private'::regnamespace)
          and not exists (
            select from pg_index i
            where i.indrelid = k.conrelid and (i.indkey::int2[])[0:cardinality(k.conkey) - 1] = k.conkey)
        """
    )


async def test_policies_name_their_roles_and_no_write_is_open_to_all(db):
    policies = await db.fetch(
        "select * from pg_policies where schemaname in ('public', 'private') order by tablename, policyname"
    )
    assert policies
    assert not [policy["policyname"] for policy in policies if "public" in policy["roles"]]
    assert not [
        policy["policyname"]
        for policy in policies
        if policy["cmd"] != "SELECT" and "true" in (policy["qual"], policy["with_check"])
    ]


async def test_one_permissive_policy_decides_for_each_table_role_and_command(db):
    assert not await db.fetch(
        """
        select tablename, role, cmd from pg_policies cross join unnest(roles) role
        where schemaname in ('public', 'private') and permissive = 'PERMISSIVE'
        group by tablename, role, cmd having count(*) > 1
        """
    )


def qualified(name: str) -> str:
    return name if "." in name else f"public.{name}"
