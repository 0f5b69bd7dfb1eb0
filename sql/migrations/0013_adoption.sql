-- What is known of a picture that was stored and not settled stays in the database: its object may be seen by anyone.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- What a daemon gets to know of a run it has claimed. made: what an earlier attempt wrote down of a picture it had made,
-- since the last requeue; that picture may lie in storage.
create or replace function private.claimed_run(r public.runs, p_due_at timestamptz)
returns jsonb language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', r.id, 'claim', r.claim, 'ticket', r.ticket, 'subject_id', r.subject_id,
    'processor', coalesce(r.via, r.processor), 'requested', r.processor,
    'metadata', case when jsonb_path_exists(r.metadata, '$.**{65}') then '{}' else coalesce(r.metadata, '{}') end,
    'attempt', r.attempt, 'max_attempts', r.max_attempts,
    'provider_job_id', r.provider_job_id, 'webhook', r.webhook,
    'submitted_ago', extract(epoch from private.now() - r.submitted_at),
    'waited', case when isfinite(p_due_at) then extract(epoch from private.now() - p_due_at) else 0 end,
    'made', case when r.attempt > 1 then (
      select e.payload -> 'data' from public.run_events e
      where e.run_id = r.id and e.payload ->> 'event' = 'generated' and e.payload -> 'data' -> 'ticket' = to_jsonb(r.ticket)
      order by e.seq desc limit 1) end)
$$;
