-- runs: one row, one request for an image. The table is shared with other orchestrators:
-- rows of another kind are never touched, which is why every check begins with the kind.

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
  submitted_at timestamptz,
  refused_since timestamptz,
  webhook text,
  via varchar
);

alter table public.runs
  add constraint runs_id_is_safe_in_a_path
    check (kind is distinct from 'image_gen' or id ~ '^[A-Za-z0-9_-]{1,200}$') not valid,
  add constraint runs_status_is_known
    check (kind is distinct from 'image_gen' or ticket is null
      or status in ('pending', 'running', 'completed', 'failed', 'cancelled')) not valid,
  add constraint runs_finished_at_only_when_terminal
    check (kind is distinct from 'image_gen' or ticket is null
      or (finished_at is null) = (status in ('pending', 'running'))) not valid,
  add constraint runs_held_only_while_running
    check (kind is distinct from 'image_gen' or claimed_by is null or status = 'running') not valid,
  add constraint runs_image_when_completed
    check (kind is distinct from 'image_gen' or ticket is null or status <> 'completed'
      or payload ->> 'imageUrl' is not null) not valid,
  add constraint runs_reason_when_failed
    check (kind is distinct from 'image_gen' or ticket is null or status <> 'failed'
      or payload ->> 'error' is not null) not valid,
  add constraint runs_progress_is_a_percentage
    check (kind is distinct from 'image_gen' or progress between 0 and 100) not valid,
  add constraint runs_webhook_is_awaited_or_came
    check (kind is distinct from 'image_gen' or webhook in ('awaited', 'came')) not valid,
  add constraint runs_payload_holds_no_base64
    check (kind is distinct from 'image_gen' or not private.has_base64(payload)) not valid,
  add constraint runs_metadata_holds_no_base64
    check (kind is distinct from 'image_gen' or not private.has_base64(metadata)) not valid;

comment on table public.runs is 'One row, one request for an image (kind image_gen); other kinds belong to others.';
comment on column public.runs.subject_id is 'The workflow''s id.';
comment on column public.runs.processor is 'provider:model as asked for; never changes.';
comment on column public.runs.started_at is 'Latest start of work; until then the insert time.';
comment on column public.runs.payload is 'Ours: the result, or the reason.';
comment on column public.runs.metadata is 'The caller''s: nodeId, promptSpec and anything else.';
comment on column public.runs.due_at is 'The one clock: scheduled start, back-off, next check. Null while held or terminal.';
comment on column public.runs.claim is 'The one fence: new at each claim and each outside change of status, never reused.';
comment on column public.runs.ticket is 'Drawn at insert and requeue; a node''s highest owns it. Null: older than the migration.';
comment on column public.runs.claimed_by is 'The daemon that holds the run; null while running means parked at the provider.';
comment on column public.runs.message is 'What it is doing or waiting for, for the person at the canvas.';
comment on column public.runs.lane is 'The line it stands in: a provider, or provider:model where that model has a limit.';
comment on column public.runs.rank is 'Its place in the line, interleaving workflows. Null while it is not due.';
comment on column public.runs.submitted_at is 'When the provider took the order that provider_job_id names.';
comment on column public.runs.refused_since is 'Since when the provider has not even accepted it; its attempts come back for an hour.';
comment on column public.runs.webhook is
  'Of a parked run: awaited until its next check, or it came and made the check due. Null: it is polled.';
comment on column public.runs.via is 'The step of metadata.fallback that the next attempt goes to, or the last went to. Null: processor.';

create index if not exists idx_runs_subject on public.runs (subject_id, kind);
-- The claim walks this one and nothing else.
create index if not exists runs_ready on public.runs (lane, priority, rank, id)
  where kind = 'image_gen' and status = 'pending' and rank is not null;
create index if not exists runs_delayed on public.runs (due_at)
  where kind = 'image_gen' and status = 'pending' and rank is null;
-- Parked runs by the time of their next check; held ones have no due_at and stand at the end.
create index if not exists runs_running on public.runs (lane, due_at)
  where kind = 'image_gen' and status = 'running';
create index if not exists runs_held on public.runs (claimed_by) where claimed_by is not null;
create index if not exists runs_last_in_line on public.runs (subject_id, lane, rank) where kind = 'image_gen';
create index if not exists runs_node on public.runs ((metadata ->> 'nodeId'), subject_id, ticket)
  where kind = 'image_gen' and ticket is not null;
create unique index if not exists runs_idempotency
  on public.runs (created_by, subject_id, (metadata ->> 'idempotencyKey')) nulls not distinct
  where kind = 'image_gen' and ticket is not null and metadata ->> 'idempotencyKey' is not null;

alter table public.runs set (
  fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05
);
