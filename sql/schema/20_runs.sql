-- runs: one row, one request for an image. The table is shared with other orchestrators:
-- rows of another kind are never touched, which is why every check begins with the kind.

-- Returns true, or raises the rule that a run of ours breaks, by its name. Called by the triggers after each statement and not by a
-- check: a statement about rows of other kinds reads the text of each check anew, 12 µs for one that names ten columns.
create or replace function image_jobs.is_sound(
  p_id varchar, p_status varchar, p_finished_at timestamptz, p_claimed_by uuid, p_payload jsonb, p_progress integer, p_webhook text,
  p_ticket bigint, p_queue_state text)
returns boolean language plpgsql immutable set search_path = ''
as $$
declare
  -- Null: older than the migration.
  v_ours boolean := p_ticket is not null;
  v_rule text := case
    -- Not as {1,200}: a count in an expression makes it ten times as slow.
    when p_id ~ '[^A-Za-z0-9_-]' or length(p_id) not between 1 and 200 then 'runs_id_is_safe_in_a_path'
    when v_ours and p_status not in ('pending', 'running', 'completed', 'failed', 'cancelled') then 'runs_status_is_known'
    when v_ours and (p_finished_at is null) <> (p_status in ('pending', 'running')) then 'runs_finished_at_only_when_terminal'
    when p_claimed_by is not null and p_status <> 'running' then 'runs_held_only_while_running'
    when v_ours and p_status = 'completed' and p_payload ->> 'imageUrl' is null then 'runs_image_when_completed'
    when v_ours and p_status = 'failed' and p_payload ->> 'error' is null then 'runs_reason_when_failed'
    when p_progress not between 0 and 100 then 'runs_progress_is_a_percentage'
    when p_webhook not in ('awaited', 'came') then 'runs_webhook_is_awaited_or_came'
    when v_ours and p_queue_state is distinct from case when p_status in ('pending', 'running') then p_status end
      then 'runs_queue_state_is_the_status'
  end;
begin
  if v_rule is not null then
    raise exception using errcode = '23514', schema = 'public', table = 'runs', constraint = v_rule,
      message = format('The image run %s breaks the rule %s.', left(p_id, 200), v_rule);
  end if;
  return true;
end
$$;

create table public.runs (
  id varchar primary key
    default 'job_' || floor(extract(epoch from clock_timestamp()) * 1000)::bigint
      || '_' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 12),
  kind varchar not null,
  subject_id uuid not null,
  status varchar not null,
  processor varchar,
  started_at timestamptz default now(),
  finished_at timestamptz,
  payload jsonb,
  metadata jsonb,
  progress integer,
  priority integer,
  due_at timestamptz,
  attempt integer,
  max_attempts integer,
  claim bigint,
  ticket bigint,
  claimed_by uuid,
  provider_job_id text,
  created_by uuid,
  created_at timestamptz,
  updated_at timestamptz,
  message text,
  preview_url text,
  lane text,
  rank bigint,
  workflow_rank bigint,
  submitted_at timestamptz,
  refused_since timestamptz,
  webhook text,
  routed_to varchar,
  call bigint,
  unheld boolean,
  source_workflow uuid,
  queue_state text,
  queued_at timestamptz,
  requeued_by uuid
);

alter table public.runs
  add constraint runs_payload_holds_no_base64
    check (kind is distinct from 'image_gen' or not image_jobs.has_base64(payload)) not valid,
  add constraint runs_metadata_holds_no_base64
    check (kind is distinct from 'image_gen' or not image_jobs.has_base64(metadata)) not valid;

comment on table public.runs is 'One row, one request for an image (kind image_gen); other kinds belong to others.';
comment on column public.runs.subject_id is 'The workflow''s id.';
comment on column public.runs.processor is 'provider:model as asked for; never changes.';
comment on column public.runs.started_at is 'Latest start of work; until then the insert time.';
comment on column public.runs.payload is 'Ours: the result, or the reason.';
comment on column public.runs.metadata is 'The caller''s: nodeId, promptSpec and anything else.';
comment on column public.runs.due_at is 'The one clock: scheduled start, back-off, next check. Null while held or terminal.';
comment on column public.runs.claim is 'Fencing token: new at each claim and each outside change of status, never reused.';
comment on column public.runs.ticket is 'Generation, drawn at insert and requeue; a node''s highest owns it. Null: older than the migration.';
comment on column public.runs.claimed_by is 'The daemon that holds the run; null while running means parked at the provider.';
comment on column public.runs.message is 'What the run does or waits for, for the person at the canvas.';
comment on column public.runs.lane is 'Queue key: a provider, or provider:model where that model has a limit.';
comment on column public.runs.rank is 'Place in the lane, interleaving users. Null while it is not due.';
comment on column public.runs.workflow_rank is 'Place among the runs of its user in the lane, interleaving workflows.';
comment on column public.runs.submitted_at is 'When the provider accepted the job that provider_job_id names.';
comment on column public.runs.refused_since is 'Since when the provider has refused requests without charge; their attempts come back for a while.';
comment on column public.runs.webhook is
  'Of a parked run: awaited until its next check, or came, which made the check due. Null: it is polled.';
comment on column public.runs.routed_to is 'The step of metadata.fallback that the next attempt goes to, or the last went to. Null: processor.';
comment on column public.runs.call is 'Of a run with a provider job: the claim under which that was made, which is the id of its call.';
comment on column public.runs.unheld is 'A daemon has given it back as unheld since the last requeue: the next time costs an attempt.';
comment on column public.runs.queued_at is 'Insert, or the latest requeue: its times are counted from then.';
comment on column public.runs.requeued_by is
  'The member who requeued it last, if not its creator: what it uses since counts as that member''s.';
comment on column public.runs.source_workflow is
  'Of the picture that promptSpec.previousImage named at insert, where it lies in storage: one that the creator may see.';
comment on column public.runs.queue_state is
  'The status while that is pending or running, else null. What indexes name instead: other kinds change theirs beside them.';

create index if not exists idx_runs_subject on public.runs (subject_id, kind);
-- The newest of a workflow, for clients. The members' policy implies the condition; where rows of other kinds are open, clients
-- name the kind, else all that the workflow has is sorted: in the index, those cost their writers a third more. None stands in
-- the order of time alone: a query for the newest would walk it past everybody else's.
create index if not exists runs_of_a_workflow on public.runs (subject_id, created_at) where kind = 'image_gen';
-- Where statistics say "pages, but no rows" (analyzed while empty), all plans cost nothing, and any of them may be taken, however
-- much is inserted since. So what is looked up by a key can be looked up only: joins say `= any (array[key])`, by which nothing is
-- merged or hashed; conditions beside a key that are in another index say `(...) is true`, which no index reads; and where rows
-- are walked in the sequence of an index, enable_sort is off.
-- Of the partial ones each names first what is null in rows of other kinds, which are written without a look at the rest.
-- The claim walks this one and nothing else.
create index if not exists runs_ready on public.runs (lane, priority, rank, ticket)
  where queue_state = 'pending' and rank is not null;
-- And this one while a model of the lane is blocked.
create index if not exists runs_ready_by_name on public.runs (lane, priority, (coalesce(routed_to, processor)), rank, ticket)
  where queue_state = 'pending' and rank is not null;
create index if not exists runs_delayed on public.runs (due_at)
  where queue_state = 'pending' and rank is null;
-- Parked runs by the time of their next check; held ones have no due_at and stand at the end.
create index if not exists runs_running on public.runs (lane, due_at)
  where queue_state = 'running';
create index if not exists runs_held on public.runs (claimed_by) where claimed_by is not null;
-- Places of a user, and of one of the user's workflows; what operators insert for nobody counts by its workflow.
-- Only a query that names a user implies the last condition: without statistics others would take one of these for runs_ready.
create index if not exists runs_last_in_line on public.runs ((coalesce(created_by, subject_id)), lane, priority, rank)
  where rank is not null and coalesce(created_by, subject_id) is not null;
create index if not exists runs_last_of_workflow
  on public.runs ((coalesce(created_by, subject_id)), subject_id, lane, priority, workflow_rank)
  where kind = 'image_gen' and coalesce(created_by, subject_id) is not null;
create index if not exists runs_waiting_of_user
  on public.runs ((coalesce(created_by, subject_id)), (num_nulls(rank)), lane, priority, workflow_rank, ticket)
  where queue_state = 'pending' and coalesce(created_by, subject_id) is not null;
-- Which runs start from pictures of a workflow: those are not pruned.
create index if not exists runs_that_refine on public.runs (source_workflow)
  where queue_state is not null and source_workflow is not null;
-- Runs that count on who requeued them, beside those that the user has made.
create index if not exists runs_requeued_by on public.runs (requeued_by, queue_state)
  where requeued_by is not null;
create index if not exists runs_node on public.runs ((metadata ->> 'nodeId'), subject_id, ticket)
  where ticket is not null;
-- Ended runs, for operators: a run ends soon after its last claim. By columns of ours alone, so that others' updates stay HOT.
create index if not exists runs_ended_by_claim on public.runs (claim)
  where queue_state is null and ticket is not null;
-- And what is older than the migration, which may hold what is forbidden by now.
create index if not exists runs_from_before on public.runs (id)
  where ticket is null and kind = 'image_gen';
create unique index if not exists runs_idempotency
  on public.runs (created_by, subject_id, (metadata ->> 'idempotencyKey')) nulls not distinct
  where ticket is not null and kind = 'image_gen' and metadata ->> 'idempotencyKey' is not null;

alter table public.runs set (
  fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05
);
