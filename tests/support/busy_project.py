"""A project that an operator looks at: runs of a day, some that wait, run and fail, daemons, and what is closed."""

import asyncpg

from tests.support.postgres import connect

Db = asyncpg.Connection

HOSTILE = '<img src=x onerror="window.hurt = true"><script>window.hurt = true</script>'
"""Stands in sentences and names of users and providers: it is text, wherever it is shown."""

# Past triggers, as the superuser: a run of every 36th of a second of the period, ending now.
ENDED = """
insert into runs (id, kind, subject_id, status, processor, metadata, payload, progress, priority, attempt, max_attempts, claim, ticket,
  created_at, updated_at, started_at, finished_at, lane)
select 'job_' || n, 'image_gen', md5((n % 50)::text)::uuid, case when n % 17 = 0 then 'failed' when n % 61 = 0 then 'cancelled' else 'completed' end,
  (array['demo:painter', 'openai:gpt-image-2', 'openai:gpt-image-2', 'google:gemini-3-pro-image', 'openai:gpt-image-1-mini'])[1 + n % 5],
  '{"promptSpec": {"basePrompt": "a red fox"}}', case when n % 17 = 0
    then case n % 4
      when 0 then jsonb_build_object('code', 'content_policy', 'error', 'OpenAI refuses this prompt: it asks for a real person.', 'hint', 'Change the prompt; requeueing asks for the same.')
      when 1 then jsonb_build_object('code', 'timeout', 'error', 'Google did not answer within 600 seconds.', 'hint', 'Try again. The picture may have been paid for.')
      when 2 then jsonb_build_object('code', 'overloaded', 'error', 'The provider said: ' || $3, 'hint', $3)
      else jsonb_build_object('code', 'storage_unavailable', 'error', 'The image could not be stored: Storage is away.', 'hint', 'Requeue: the picture is not paid for again.')
      end
    else jsonb_build_object('imageUrl', 'https://example.supabase.co/x.png', 'timings', jsonb_build_object(
      'generateMs', (3000 + 9000 * abs(sin(n / 90.0)) + (n * 7919) % 4000)::integer)) end,
  100, 0, 1 + n % 3, 3, 1000000 - n, 1000000 - n, at, at, at, at, 'demo'
from generate_series(1, $1::integer) n
cross join lateral (select now() - $2::text::interval * power(n::float8 / $1, 1.3) as at) ended
"""
CALLS = """
insert into image_jobs.calls (id, run_id, provider, model, requested_model, estimate, cost, state, opened_at, closed_at, ticket, image)
select r.ticket, r.id, split_part(r.processor, ':', 1), split_part(r.processor, ':', 2), split_part(r.processor, ':', 2), 0.04,
  case when r.ticket % 40 > 0 then 0.01 * (1 + r.ticket % 7) end, case when r.ticket % 40 > 0 then 'charged' else 'unknown' end,
  r.finished_at, r.finished_at, r.ticket, true
from runs r where r.finished_at is not null and r.processor <> 'demo:painter'
"""
STATEMENTS = (
    # As operators, with triggers.
    """insert into runs (kind, subject_id, status, processor, metadata)
    select 'image_gen', md5((n % 9)::text)::uuid, 'pending', (array['openai:gpt-image-2', 'openai:gpt-image-2', 'google:gemini-3-pro-image'])[1 + n % 3],
      '{"promptSpec": {"basePrompt": "a red fox"}}' from generate_series(1, 60) n""",
    "update image_jobs.provider_limits set max_running = 8 where provider = 'openai'",
    "insert into image_jobs.provider_limits (provider, model, per_minute) values ('openai', 'gpt-image-2', 20)",
    "update image_jobs.provider_limits set paused = true where provider = 'google'",
    "select image_jobs.block_provider('openai', 'gpt-image-1-mini', interval '2 hours', 'Your credit is used up: add some at platform.openai.com.')",
    "select image_jobs.register_daemon(gen_random_uuid(), 'worker-1', '0.1.0', 16, '1 day', '{demo,openai,google}')",
    "select image_jobs.register_daemon(gen_random_uuid(), 'worker-2', '0.1.0', 16, '1 day', '{demo,openai,stability}')",
)


async def fill(dsn: str, runs: int = 2000, period: str = "1 hour") -> None:
    """Fill a database: runs that ended in a period, most of them lately, and what stands now."""
    sudo = await connect(dsn.replace("postgres@", "supabase_admin@"))
    await sudo.execute("set session_replication_role = replica")
    await sudo.execute(ENDED, runs, period, HOSTILE)
    await sudo.execute(CALLS)
    await sudo.execute("set session_replication_role = origin")
    await sudo.execute("select setval('image_jobs.claims', 2000000), setval('image_jobs.tickets', 2000000)")
    await sudo.execute("vacuum analyze runs")
    await sudo.close()
    db = await connect(dsn)
    for statement in STATEMENTS:
        await db.execute(statement)
    await db.close()
