"""A project whose tables are full: a million runs, five million events, one user with half of all."""

import asyncio
from uuid import UUID

import asyncpg

Db = asyncpg.Connection

RUNS, EVENTS_OF_A_RUN, USERS, RECENT, OTHERS = 1_000_000, 5, 2_000, 20_000, 100_000

# Numbers grow with time. Odd ones are of one user, in one workflow; the first 200 even ones are the only ones of another; the
# rest are of 1,998 users, who have two workflows each. The last 20,000 runs are of the last 24 hours, the rest of the year before.
NUMBERED = f"""
create temp table numbered as
select n, case when n % 2 = 1 then 0 when n <= 200 then 1 else 2 + n / 2 % ({USERS} - 2) end as owner,
  case when n % 2 = 1 or n <= 200 then 0 else n / 5000 % 2 end as nth,
  now() - case when n > {RUNS - RECENT} then ({RUNS} - n) * interval '24 hours' / {RECENT}
    else interval '1 day' + ({RUNS - RECENT} - n) * interval '364 days' / {RUNS - RECENT} end as at
from generate_series(1, {RUNS}) n
"""
OWNER = "md5('user ' || owner)::uuid"
WORKFLOW = "md5('workflow ' || owner || ' ' || nth)::uuid"
STATUS = f"""
case when n > {RUNS - 500} then 'pending' when n > {RUNS - 600} then 'running'
  when n % 40 = 0 then 'failed' when n % 130 = 0 then 'cancelled' else 'completed' end"""
PROCESSOR = """
(array['openai:gpt-image-2', 'google:gemini-3-pro-image', 'stability:core', 'demo:painter'])[1 + n % 4]"""
SEED = {
    "workflow_members": f"insert into workflow_members select distinct {WORKFLOW}, {OWNER} from numbered",
    "workflows": "insert into image_jobs.workflows (id) select distinct workflow_id from workflow_members",
    "runs": f"""
        insert into runs (id, kind, subject_id, status, queue_state, processor, started_at, finished_at, payload, metadata, progress,
          priority, due_at, attempt, max_attempts, claim, ticket, created_by, created_at, updated_at, lane, rank, workflow_rank)
        select 'job_' || n, 'image_gen', workflow, status, case when status in ('pending', 'running') then status end, processor, at + interval '2 s',
          case when status in ('completed', 'failed', 'cancelled') then at + interval '20 s' end,
          case status when 'failed' then jsonb_build_object(
              'code', (array['refused', 'timeout', 'storage'])[1 + n % 3], 'error', 'The provider refuses this prompt.',
              'hint', 'Change the prompt.')
            when 'completed' then jsonb_build_object(
              'imageUrl', format('https://p.supabase.co/storage/v1/object/public/images/%s/job_%s.png?v=01234567', workflow, n),
              'imagePath', format('%s/job_%s.png', workflow, n), 'thumbnailPath', format('%s/job_%s-thumbnail.webp', workflow, n),
              'width', 1024, 'height', 1024, 'contentType', 'image/png', 'bytes', 1234567, 'model', 'gpt-image-2', 'cost', 0.04,
              'timings', jsonb_build_object(
                'queuedMs', n % 997, 'generateMs', 9000 + n % 7919, 'storeMs', 100 + n % 499, 'settleMs', n % 97)) end,
          jsonb_build_object('nodeId', 'node-' || n, 'promptSpec', jsonb_build_object(
            'basePrompt', 'a red fox in the snow, number ' || n, 'size', '1024x1024', 'quality', 'standard')),
          100, 0, case when status = 'pending' then at end, 1, 3, n, n, who, at, at + interval '20 s', split_part(processor, ':', 1),
          case when status = 'pending' then n end, case when status = 'pending' then n end
        from (select n, at, {STATUS} as status, {PROCESSOR} as processor, {OWNER} as who, {WORKFLOW} as workflow from numbered) s
        order by n""",
    "runs of other kinds": f"""
        insert into runs (id, kind, subject_id, status, processor, started_at, payload, created_at)
        select 'research_' || n, 'research', {WORKFLOW}, 'done', 'x:y', at, '{{"note": "some words"}}', at
        from numbered where n <= {OTHERS}""",
    "run_events": f"""
        insert into run_events (id, run_id, ts, kind, payload, seq, run_kind, workflow_id)
        select md5(n || ' ' || k)::uuid, 'job_' || n, at + k * interval '4 s', case k when 2 then 'progress' else 'log' end,
          case k when 4 then '{{"event": "stored", "message": "The image is stored.", "progress": 95, "data": {{"uploadTries": 1}}}}'
            else jsonb_build_object('event', (array['created', 'claimed', 'progress', '', 'completed'])[k],
              'message', 'Waiting in line for a daemon.', 'progress', 20 * k) end,
          {EVENTS_OF_A_RUN} * n + k, 'image_gen', {WORKFLOW}
        from numbered cross join generate_series(1, {EVENTS_OF_A_RUN}) k""",
    "events of other kinds": f"""
        insert into run_events (id, run_id, ts, kind, payload)
        select md5('research ' || n)::uuid, 'research_' || n, at, 'thought', '{{"note": "some words"}}'
        from numbered where n <= {OTHERS}""",
    "calls": f"""
        insert into image_jobs.calls (id, run_id, workflow_id, user_id, provider, model, requested_model, estimate, cost, state,
          opened_at, closed_at, ticket, sent_at, image, image_at)
        select n, 'job_' || n, {WORKFLOW}, {OWNER}, split_part({PROCESSOR}, ':', 1), split_part({PROCESSOR}, ':', 2),
          split_part({PROCESSOR}, ':', 2), 0.04, 0.04, 'charged', at, at + interval '15 s', n, at + interval '2 s', true, at + interval '14 s'
        from numbered where {STATUS} <> 'pending'""",
    "workflow_nodes": f"""
        insert into workflow_nodes (id, workflow_id, node_type, node_data, created_at, updated_at, version)
        select 'node-' || n, {WORKFLOW}, 'image', jsonb_build_object('label', 'a node', 'status', 'completed',
          'imageUrl', 'https://p.supabase.co/storage/v1/object/public/images/job.png', 'runId', 'job_' || n), at, at, n
        from numbered where n % 10 in (0, 1)""",
}
TABLES = ("runs", "run_events", "workflow_members", "workflow_nodes", "calls")
# Of one row in a hundred an old version is dead: too few for a vacuum.
DEAD = """
update runs set updated_at = updated_at where ticket % 100 = 0;
update run_events set ts = ts where seq % 100 = 0;
"""
SECONDARY = """
select i.indexrelid::regclass::text as name, pg_get_indexdef(i.indexrelid) as definition from pg_index i
where i.indrelid::regclass::text = any (array['runs', 'run_events', 'workflow_nodes', 'image_jobs.calls']) and not i.indisprimary
"""
CHECKS = """
select conrelid::regclass::text as relation, conname as name, pg_get_constraintdef(oid) as definition from pg_constraint
where contype = 'c' and conrelid::regclass::text = any (array['runs', 'run_events', 'workflow_nodes'])
"""


def user(number: int) -> str:
    """Return the SQL of a user's id: 0 has half of all, 1 has 100 old runs."""
    return f"md5('user {number}')::uuid"


async def workflow_of(db: Db, number: int) -> UUID:
    return await db.fetchval(f"select workflow_id from workflow_members where user_id = {user(number)} limit 1")


async def fill(sudo: Db) -> None:
    """Fill the tables past triggers, checks and indexes, and wait for autovacuum's statistics."""
    await sudo.execute("set session_replication_role = replica; set maintenance_work_mem = '512MB'; set jit = off")
    indexes, checks = await sudo.fetch(SECONDARY), await sudo.fetch(CHECKS)
    for index in indexes:
        await sudo.execute(f"drop index {index['name']}")
    for check in checks:
        await sudo.execute(f"alter table {check['relation']} drop constraint {check['name']}")
    await sudo.execute(NUMBERED)
    await sudo.execute("analyze numbered")
    for statement in SEED.values():
        await sudo.execute(statement)
    for index in indexes:
        await sudo.execute(index["definition"])
    for check in checks:
        await sudo.execute(f"alter table {check['relation']} add constraint {check['name']} {check['definition']}")
    await sudo.execute("drop table numbered")
    unseen = """
        select count(*) from pg_stat_user_tables
        where relname = any ($1) and schemaname in ('public', 'image_jobs') and (last_autoanalyze is null or last_autovacuum is null)"""
    while await sudo.fetchval(unseen, TABLES):  # noqa: ASYNC110 - of another process
        await asyncio.sleep(1)
    await sudo.execute(DEAD)
