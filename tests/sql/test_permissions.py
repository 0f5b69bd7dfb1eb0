"""Privileges, word for word: everything of ours for every API role, compared with the catalogue.

A new object without an entry here fails, and so does a grant that is not written here.
"""

from collections import defaultdict

import asyncpg
import pytest

from tests.support.postgres import MIGRATIONS, Cluster, connect

pytestmark = pytest.mark.every_postgres

API_ROLES = ("anon", "authenticated", "service_role")

READ = {"SELECT"}
WRITE = {"SELECT", "INSERT", "UPDATE", "DELETE"}
ALL_THREE = dict.fromkeys(API_ROLES, READ)

RELATIONS: dict[str, dict[str, set[str]]] = {
    "image_jobs.alert_notices": {},
    "image_jobs.alerts": {"service_role": READ},
    "image_jobs.cancellations": {},
    "image_jobs.claims": {},
    "image_jobs.daemons": {"service_role": READ},
    "image_jobs.event_numbers": {},
    "image_jobs.file_removals": {},
    "image_jobs.source_removals": {},
    "image_jobs.walks": {},
    "image_jobs.lanes": {},
    "image_jobs.opened_lanes": {},
    "image_jobs.claimants": {},
    "image_jobs.due_marks": {},
    "image_jobs.due_marks_version_seq": {},
    "image_jobs.watermarks": {},
    "image_jobs.watermarks_version_seq": {},
    "image_jobs.recent_starts": {},
    "image_jobs.recent_starts_version_seq": {},
    "image_jobs.models": ALL_THREE,
    "image_jobs.calls": {"service_role": READ},
    "image_jobs.migrations": {"service_role": READ},
    "image_jobs.prices": {},
    "image_jobs.project": {},
    "image_jobs.node_versions": {},
    "image_jobs.providers": {"service_role": READ},
    "image_jobs.set_aside": {},
    "image_jobs.stale_nodes": {},
    "image_jobs.stale_nodes_id_seq": {},
    "image_jobs.tickets": {},
    "image_jobs.wake": {},
    "image_jobs.webhook_counters": {},
    "image_jobs.webhook_deliveries": {},
    "image_jobs.webhook_secrets": {},
    "image_jobs.workflows": {},
    "image_jobs.workflow_links": {},
    "image_jobs.daemon_status": {"service_role": READ},
    "public.image_jobs": {"authenticated": READ, "service_role": READ},
    "public.image_models": ALL_THREE,
    "public.image_provider_status": {"authenticated": READ, "service_role": READ},
    "public.image_usage": {"authenticated": READ, "service_role": READ},
    "image_jobs.used_hours": {},
    "image_jobs.provider_states": {},
    "image_jobs.tallies": {},
    "image_jobs.tallies_id_seq": {},
    "image_jobs.provider_states_id_seq": {},
    "image_jobs.provider_blocks": {"service_role": WRITE},
    "image_jobs.provider_blocks_id_seq": {},
    "image_jobs.provider_limits": {"service_role": WRITE},
    "image_jobs.provider_streaks": {},
    "image_jobs.provider_streaks_version_seq": {},
    "image_jobs.limits_in_force": {},
    "image_jobs.limits_in_force_version_seq": {},
    "image_jobs.provider_limits_id_seq": {},
    "image_jobs.usage_limits": {"service_role": WRITE},
    "image_jobs.usage_limits_id_seq": {},
    "image_jobs.queue_stats": {"service_role": READ},
    "image_jobs.failures": {"service_role": READ},
    "image_jobs.throughput": {"service_role": READ},
    "image_jobs.run_costs": {"service_role": READ},
    "public.run_events": {"authenticated": READ, "service_role": WRITE},
    "image_jobs.run_timings": {"service_role": READ},
    "public.runs": {"authenticated": {"SELECT", "INSERT"}, "service_role": WRITE},
    "image_jobs.storage_stats": {"service_role": READ},
    "image_jobs.storage_violations": {"service_role": READ},
    "public.workflow_members": {"authenticated": READ, "service_role": WRITE},
    "public.workflow_nodes": {"authenticated": WRITE, "service_role": WRITE},
}

NOBODY: set[str] = set()
SIGNED_IN = {"authenticated", "service_role"}
EVERYBODY = set(API_ROLES)

FUNCTIONS: dict[str, set[str]] = {
    "image_jobs.abandon_each": NOBODY,
    "image_jobs.carry_limits": NOBODY,
    "image_jobs.dearest_cost": NOBODY,
    "image_jobs.has_streaks": NOBODY,
    "image_jobs.limits_of": NOBODY,
    "image_jobs.lock_limits": NOBODY,
    "image_jobs.streak_of": NOBODY,
    "image_jobs.write_streak": NOBODY,
    "image_jobs.has_waiting": NOBODY,
    "image_jobs.limit_reached": NOBODY,
    "image_jobs.limits_changed": NOBODY,
    "image_jobs.note_provider_states": NOBODY,
    "image_jobs.provider_name": NOBODY,
    "image_jobs.provider_status": SIGNED_IN,
    "image_jobs.report_daemon": NOBODY,
    "image_jobs.claim_before": {"service_role"},
    "image_jobs.current_alerts": {"service_role"},
    "image_jobs.dashboard": {"service_role"},
    "image_jobs.finish_alert_notice": NOBODY,
    "image_jobs.note_alerts": NOBODY,
    "image_jobs.take_alert_notices": NOBODY,
    "image_jobs.call_of_job": NOBODY,
    "image_jobs.calls_of": NOBODY,
    "image_jobs.fate_of": NOBODY,
    "image_jobs.gauges": NOBODY,
    "image_jobs.take_tallies": NOBODY,
    "image_jobs.tally_calls": NOBODY,
    "image_jobs.tally_endings": NOBODY,
    "image_jobs.seconds_ago": NOBODY,
    "image_jobs.timings_of": NOBODY,
    "image_jobs.timings_of_failure": NOBODY,
    "image_jobs.close_calls": NOBODY,
    "image_jobs.costs_of": NOBODY,
    "image_jobs.makers_of_jobs": NOBODY,
    "image_jobs.shared_cost": NOBODY,
    "image_jobs.estimate_cost": SIGNED_IN,
    "image_jobs.guard_call": NOBODY,
    "image_jobs.find_lost_files": NOBODY,
    "image_jobs.finish_file_removal": NOBODY,
    "image_jobs.forget_user": {"service_role"},
    "image_jobs.is_file_of": NOBODY,
    "image_jobs.keep_files_of": NOBODY,
    "image_jobs.pictured_run": NOBODY,
    "image_jobs.sees_files": NOBODY,
    "image_jobs.percent_decoded": NOBODY,
    "image_jobs.prune_runs": NOBODY,
    "image_jobs.remove_files": NOBODY,
    "image_jobs.take_file_removals": NOBODY,
    "image_jobs.take_source_removals": NOBODY,
    "image_jobs.finish_source_removal": NOBODY,
    "image_jobs.walk": NOBODY,
    "image_jobs.lose_calls": NOBODY,
    "image_jobs.open_calls": NOBODY,
    "image_jobs.refresh_costs": NOBODY,
    "image_jobs.sweep_calls": NOBODY,
    "public.estimate_cost": SIGNED_IN,
    "image_jobs.change_runs": NOBODY,
    "image_jobs.check_runs": NOBODY,
    "image_jobs.move_runs": NOBODY,
    "image_jobs.postpone_node": NOBODY,
    "image_jobs.promote_runs": NOBODY,
    "image_jobs.release_runs": NOBODY,
    "image_jobs.reroute_each": NOBODY,
    "image_jobs.runs_set_aside": NOBODY,
    "image_jobs.set_run_aside": NOBODY,
    "image_jobs.start_runs": NOBODY,
    "image_jobs.starts_of": NOBODY,
    "image_jobs.due_from": NOBODY,
    "image_jobs.move_due_mark": NOBODY,
    "image_jobs.keep_claimant": NOBODY,
    "image_jobs.stay_awake": NOBODY,
    "image_jobs.write_events": NOBODY,
    "image_jobs.abandon_runs": NOBODY,
    "image_jobs.accept_run": NOBODY,
    "image_jobs.add_events": NOBODY,
    "image_jobs.available_starts": NOBODY,
    "image_jobs.attach_provider_job": NOBODY,
    "image_jobs.block_provider": NOBODY,
    "image_jobs.block_until": NOBODY,
    "image_jobs.can_access_run": EVERYBODY,
    "image_jobs.can_access_workflow": EVERYBODY,
    "image_jobs.my_workflows": EVERYBODY,
    "image_jobs.refuse_founded": EVERYBODY,
    "image_jobs.broadcast": NOBODY,
    "image_jobs.broadcast_deleted_runs": NOBODY,
    "image_jobs.broadcast_runs": NOBODY,
    "image_jobs.send_message": NOBODY,
    "image_jobs.cancel_provider_job": NOBODY,
    "image_jobs.cancel_run": SIGNED_IN,
    "image_jobs.change_lanes": NOBODY,
    "image_jobs.check_prompt": NOBODY,
    "image_jobs.pictured_workflow": NOBODY,
    "image_jobs.source_workflow": NOBODY,
    "image_jobs.storage_path": NOBODY,
    "image_jobs.claim_checks": NOBODY,
    "image_jobs.claim_runs": NOBODY,
    "image_jobs.claim_starts": NOBODY,
    "image_jobs.claimable_providers": NOBODY,
    "image_jobs.move_to_model_lanes": NOBODY,
    "image_jobs.open_lanes": NOBODY,
    "image_jobs.first_waiting": NOBODY,
    "image_jobs.note_responses": NOBODY,
    "image_jobs.unblocked_names": NOBODY,
    "image_jobs.promote_due": NOBODY,
    "image_jobs.claimed_run": NOBODY,
    "image_jobs.record_starts": NOBODY,
    "image_jobs.current_user_id": SIGNED_IN,
    "image_jobs.count_webhook": NOBODY,
    "image_jobs.delete_events": NOBODY,
    "image_jobs.drawing_model": NOBODY,
    "image_jobs.webhook_wait": NOBODY,
    "image_jobs.resume_provider_job": NOBODY,
    "image_jobs.finish_cancellation": NOBODY,
    "image_jobs.first_open_fallback": NOBODY,
    "image_jobs.project_changes": NOBODY,
    "image_jobs.reroute_message": NOBODY,
    "image_jobs.guard_run": NOBODY,
    "image_jobs.guard_status": NOBODY,
    "image_jobs.has_base64": {"PUBLIC"},
    "image_jobs.consume_deliveries": NOBODY,
    "image_jobs.heartbeat": NOBODY,
    "image_jobs.hmac_sha256": NOBODY,
    "image_jobs.image_job_record": SIGNED_IN,
    "image_jobs.is_image_run": EVERYBODY,
    "image_jobs.is_operator": NOBODY,
    "image_jobs.is_signed": NOBODY,
    "image_jobs.is_sound": NOBODY,
    "image_jobs.is_too_old": NOBODY,
    "image_jobs.oldest_daemon": NOBODY,
    "image_jobs.json_or_null": NOBODY,
    "image_jobs.keep_node": NOBODY,
    "image_jobs.lane_of": NOBODY,
    "image_jobs.leave": NOBODY,
    "image_jobs.check_set_up": NOBODY,
    "image_jobs.realtime_steps": NOBODY,
    "image_jobs.set_up": NOBODY,
    "image_jobs.storage_steps": NOBODY,
    "image_jobs.match_deliveries": NOBODY,
    "image_jobs.may_have_submitted": NOBODY,
    "image_jobs.may_write": EVERYBODY,
    "image_jobs.can_subscribe": {"authenticated"},
    "image_jobs.may_upload": {"authenticated"},
    "image_jobs.node_data": NOBODY,
    "image_jobs.node_message": NOBODY,
    "image_jobs.nodes_changed": NOBODY,
    "image_jobs.record_delivery": NOBODY,
    "image_jobs.record_provider_job": NOBODY,
    "image_jobs.now": {"service_role"},
    "image_jobs.owned_keys": NOBODY,
    "image_jobs.reroute_runs": NOBODY,
    "image_jobs.next_rank": NOBODY,
    "image_jobs.next_workflow_rank": NOBODY,
    "image_jobs.served_rank": NOBODY,
    "image_jobs.share_places": NOBODY,
    "image_jobs.swap_ranks": NOBODY,
    "image_jobs.count_running": NOBODY,
    "image_jobs.has_room": NOBODY,
    "image_jobs.due_checks": NOBODY,
    "image_jobs.route_hash": SIGNED_IN,
    "image_jobs.add_up_hours": NOBODY,
    "image_jobs.first_open_hour": NOBODY,
    "image_jobs.budget_left": NOBODY,
    "image_jobs.check_limit": NOBODY,
    "image_jobs.check_usage": NOBODY,
    "image_jobs.count_waiting": NOBODY,
    "image_jobs.has_budget": NOBODY,
    "image_jobs.images_together": NOBODY,
    "image_jobs.limits_of_user": NOBODY,
    "image_jobs.opens_again": NOBODY,
    "image_jobs.period_end": NOBODY,
    "image_jobs.period_start": NOBODY,
    "image_jobs.refuse_usage": NOBODY,
    "image_jobs.usage_of_caller": SIGNED_IN,
    "image_jobs.used_since": NOBODY,
    "image_jobs.used_together": NOBODY,
    "image_jobs.publish_models": NOBODY,
    "image_jobs.receive_webhook": {"anon", "service_role"},
    "image_jobs.record_progress": NOBODY,
    "image_jobs.refresh_stale_nodes": NOBODY,
    "image_jobs.refuse": SIGNED_IN,
    "image_jobs.refuse_nameless": NOBODY,
    "image_jobs.register_daemon": NOBODY,
    "image_jobs.release_unheld": NOBODY,
    "image_jobs.requeue_run": SIGNED_IN,
    "image_jobs.show_run": SIGNED_IN,
    "image_jobs.guard_pin": NOBODY,
    "image_jobs.newest_picture": NOBODY,
    "image_jobs.run_messages": NOBODY,
    "image_jobs.run_moved": NOBODY,
    "image_jobs.runs_deleted": NOBODY,
    "image_jobs.runs_inserted": NOBODY,
    "image_jobs.runs_updated": NOBODY,
    "image_jobs.session_began": NOBODY,
    "image_jobs.session_lock_key": NOBODY,
    "image_jobs.set_webhook_secrets": NOBODY,
    "image_jobs.settle_runs": NOBODY,
    "image_jobs.project_nodes": NOBODY,
    "image_jobs.stamp_events": NOBODY,
    "image_jobs.touched_runs": {"PUBLIC"},
    "image_jobs.writes_numbered_events": {"PUBLIC"},
    "image_jobs.remaining_fallbacks": SIGNED_IN,
    "image_jobs.sweep_webhooks": NOBODY,
    "image_jobs.delete_delivery": NOBODY,
    "image_jobs.take_cancellations": NOBODY,
    "image_jobs.take_over": NOBODY,
    "image_jobs.sync": NOBODY,
    "image_jobs.unmatched_deliveries": NOBODY,
    "image_jobs.found_workflow": NOBODY,
    "image_jobs.verified_delivery": NOBODY,
    "image_jobs.wake_all": NOBODY,
    "image_jobs.webhook_key": NOBODY,
    "image_jobs.closed_reason": NOBODY,
    "image_jobs.write_nodes": NOBODY,
    "image_jobs.can_open_workflow": SIGNED_IN,
    "image_jobs.join_workflow": SIGNED_IN,
    "image_jobs.leave_workflow": SIGNED_IN,
    "image_jobs.lock_members": NOBODY,
    "image_jobs.lock_memberships": NOBODY,
    "image_jobs.refuse_foreign_members": NOBODY,
    "image_jobs.require_member": NOBODY,
    "image_jobs.share_workflow": SIGNED_IN,
    "image_jobs.token_hash": NOBODY,
    "image_jobs.unshare_workflow": SIGNED_IN,
    "public.can_open_workflow": SIGNED_IN,
    "public.join_workflow": SIGNED_IN,
    "public.leave_workflow": SIGNED_IN,
    "public.share_workflow": SIGNED_IN,
    "public.unshare_workflow": SIGNED_IN,
    "public.cancel_run": SIGNED_IN,
    "public.receive_webhook": {"service_role"},
    "public.requeue_run": SIGNED_IN,
    "public.show_run": SIGNED_IN,
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


# Whatever an owner may have given away beforehand, in every schema, also to a role of the application's.
GENEROUS_OWNER = "".join(
    f"alter default privileges grant all on {kind} to public;"
    f"alter default privileges grant all on {kind} to anon, authenticated, service_role, dashboard_user with grant option;"
    for kind in ("tables", "functions", "sequences", "types", "schemas")
)
BEFORE = {"new project": "select", "older project": OLDER_PROJECT, "generous owner": GENEROUS_OWNER}


@pytest.fixture(scope="module", params=BEFORE)
async def project(request: pytest.FixtureRequest, postgres: Cluster):
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        await connection.execute(BEFORE[request.param])
        for file in sorted(MIGRATIONS.glob("*.sql")):
            await connection.execute(file.read_text())
        yield connection
        await connection.close()


async def granted(db: "asyncpg.Connection[asyncpg.Record]", query: str) -> dict[str, dict[str, set[str]]]:
    """Fetch the privileges of each API role and PUBLIC: {object: {role: privileges}}. An object without grants is there, too."""
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
        where c.relnamespace in ('public'::regnamespace, 'image_jobs'::regnamespace) and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
        """,
    )
    assert {qualified(name): dict(roles) for name, roles in found.items()} == RELATIONS


async def test_no_column_is_granted_by_itself(project):
    assert not await project.fetch(
        """
        select attrelid::regclass, attname from pg_attribute
        where attacl is not null
          and attrelid in (select oid from pg_class where relnamespace in ('public'::regnamespace, 'image_jobs'::regnamespace))
        """
    )


async def test_functions_are_granted_as_written_and_not_to_public(project):
    # But for the two that the checks look up whoever writes rows of other kinds.
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
        where p.pronamespace in ('public'::regnamespace, 'image_jobs'::regnamespace)
        """,
    )
    assert {name: set(roles) for name, roles in found.items()} == FUNCTIONS


async def test_api_roles_create_nothing_in_our_schemas(project):
    assert not await project.fetch(
        """
        select role, schema from unnest(array['anon', 'authenticated', 'service_role', 'dashboard_user']) role
        cross join unnest(array['public', 'image_jobs']) schema where has_schema_privilege(role, schema, 'create')
        """
    )


async def test_no_other_role_has_rights_on_what_is_ours(project):
    rules = {"has_base64", "is_image_run", "touched_runs", "writes_numbered_events"}
    granted_to_others = await project.fetch(
        """
        select c.relname as name from pg_class c cross join aclexplode(c.relacl) a
        where c.relnamespace in ('public'::regnamespace, 'image_jobs'::regnamespace) and a.grantee = 'dashboard_user'::regrole
        union all
        select p.proname from pg_proc p cross join aclexplode(p.proacl) a
        where p.pronamespace in ('public'::regnamespace, 'image_jobs'::regnamespace) and a.grantee = 'dashboard_user'::regrole
        union all
        select n.nspname from pg_namespace n cross join aclexplode(n.nspacl) a
        where n.nspname = 'image_jobs' and a.grantee = 'dashboard_user'::regrole
        """
    )
    assert {row["name"] for row in granted_to_others} <= rules


async def test_every_function_has_an_empty_search_path(db):
    assert not await db.fetch(
        """
        select p.oid::regprocedure from pg_proc p
        where p.pronamespace in ('public'::regnamespace, 'image_jobs'::regnamespace)
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
        where relnamespace in ('public'::regnamespace, 'image_jobs'::regnamespace) and relkind in ('r', 'p')
          and not relrowsecurity
        """
    )


async def test_every_view_reads_with_the_rights_of_its_reader(db):
    assert not await db.fetch(
        """
        select oid::regclass from pg_class
        where relnamespace in ('public'::regnamespace, 'image_jobs'::regnamespace) and relkind in ('v', 'm')
          and not coalesce(reloptions, '{}') && array['security_invoker=on', 'security_invoker=true']
        """
    )


async def test_every_foreign_key_has_an_index(db):
    assert not await db.fetch(
        """
        select k.conrelid::regclass, k.conname from pg_constraint k
        where k.contype = 'f' and k.connamespace in ('public'::regnamespace, 'image_jobs'::regnamespace)
          and not exists (
            select from pg_index i
            where i.indrelid = k.conrelid and (i.indkey::int2[])[0:cardinality(k.conkey) - 1] = k.conkey)
        """
    )


async def test_policies_name_their_roles_and_no_write_is_open_to_all(db):
    policies = await db.fetch(
        "select * from pg_policies where schemaname in ('public', 'image_jobs') order by tablename, policyname"
    )
    assert policies
    assert not [policy["policyname"] for policy in policies if "public" in policy["roles"]]
    assert not [
        policy["policyname"]
        for policy in policies
        if policy["cmd"] != "SELECT" and "true" in (policy["qual"], policy["with_check"])
    ]


async def test_each_table_role_and_command_has_one_permissive_policy(db):
    assert not await db.fetch(
        """
        select tablename, role, cmd from pg_policies cross join unnest(roles) role
        where schemaname in ('public', 'image_jobs') and permissive = 'PERMISSIVE'
        group by tablename, role, cmd having count(*) > 1
        """
    )


def qualified(name: str) -> str:
    return name if "." in name else f"public.{name}"
