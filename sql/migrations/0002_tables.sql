-- Tables. Those of the specification may be there already: they are adopted, with their rows.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- runs: one row, one request for an image. The table is shared with other orchestrators:
-- rows of another kind are never touched, which is why every check begins with the kind.

do $$
declare
  v_writer text;
begin
  if to_regclass('public.runs') is null then
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
    refused_since timestamptz
    );
    -- Older Supabase projects grant everything on a new table to the API roles.
    revoke all on public.runs from public, anon, authenticated, service_role;
  else
    -- It was there before. Our checks and policies are evaluated with the rights of whoever comes.
    for v_writer in
      select distinct g.grantee from information_schema.role_table_grants g
      where g.table_schema = 'public' and g.table_name = 'runs'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') and g.grantee <> 'PUBLIC'
    loop
      execute format('grant execute on function private.has_base64(jsonb) to %I', v_writer);
    end loop;
    -- Without row level security its rows were open to whoever held grants; those that are not ours stay so.
    if not (select c.relrowsecurity from pg_class c where c.oid = 'public.runs'::regclass) then
      drop policy if exists "Rows of other kinds stay as open as they were" on public.runs;
      create policy "Rows of other kinds stay as open as they were" on public.runs
        using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
    end if;
  end if;
end
$$;
-- A table that was there before lacks these.
alter table public.runs
  add column if not exists metadata jsonb,
  add column if not exists progress integer,
  add column if not exists priority integer,
  add column if not exists due_at timestamptz,
  add column if not exists attempt integer,
  add column if not exists max_attempts integer,
  add column if not exists claim bigint,
  add column if not exists ticket bigint,
  add column if not exists claimed_by uuid,
  add column if not exists provider_job_id text,
  add column if not exists created_by uuid,
  add column if not exists created_at timestamptz,
  add column if not exists updated_at timestamptz,
  add column if not exists message text,
  add column if not exists preview_url text,
  add column if not exists lane text,
  add column if not exists rank bigint,
  add column if not exists submitted_at timestamptz,
  add column if not exists refused_since timestamptz;
alter table public.runs
  alter column id set default
    'job_' || floor(extract(epoch from clock_timestamp()) * 1000)::bigint
      || '_' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 12),
  alter column started_at set default now();

alter table public.runs
  drop constraint if exists runs_id_is_safe_in_a_path,
  drop constraint if exists runs_status_is_known,
  drop constraint if exists runs_finished_at_only_when_terminal,
  drop constraint if exists runs_held_only_while_running,
  drop constraint if exists runs_image_when_completed,
  drop constraint if exists runs_reason_when_failed,
  drop constraint if exists runs_progress_is_a_percentage,
  drop constraint if exists runs_payload_holds_no_base64,
  drop constraint if exists runs_metadata_holds_no_base64;
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

-- Who may see a workflow. An application with its own workflows table replaces private.can_access_workflow.

create table if not exists public.workflow_members (
  workflow_id uuid not null,
  user_id uuid not null,
  created_at timestamptz not null default now(),
  primary key (workflow_id, user_id)
);
comment on table public.workflow_members is 'Who may see and use a workflow. The first to use a new id becomes its member.';
create index if not exists workflow_members_of_a_user on public.workflow_members (user_id);

-- Every workflow id that a row has ever used, also after its rows are gone: an id can be founded only once.
create table if not exists private.workflows (
  id uuid primary key,
  first_used_at timestamptz not null default now()
);
comment on table private.workflows is 'Workflow ids that have been used; whoever uses a new one first becomes its member.';

-- Whether the signed-in user is a member. The one place that decides; it fails closed.
-- Volatile, because the very insert that founds a workflow is checked by it: a stable function would not yet see the
-- membership that the insert's own trigger has made.
create or replace function private.can_access_workflow(workflow_id uuid)
returns boolean language sql volatile security definer set search_path = ''
as $$
  select exists (
    select from public.workflow_members m
    where m.workflow_id = $1 and m.user_id = private.current_user_id()
  )
$$;

-- Whether the run belongs to a workflow that the signed-in user may see.
create or replace function private.can_access_run(p_run_id varchar)
returns boolean language sql volatile security definer set search_path = ''
as $$
  select exists (
    select from public.runs r
    where r.id = p_run_id and r.kind = 'image_gen' and private.can_access_workflow(r.subject_id)
  )
$$;

-- Whether the run is ours; events of other kinds stay as open as they were.
create or replace function private.is_image_run(p_run_id varchar)
returns boolean language sql stable security definer set search_path = ''
as $$
  select exists (select from public.runs r where r.id = p_run_id and r.kind = 'image_gen')
$$;

-- Marks a workflow id as used. If no row ever used it, the signed-in user becomes its member.
-- Atomic: of two users who come at once, the primary key lets one found it, and the other waits and gets nothing.
create or replace function private.use_workflow(p_workflow uuid)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_user uuid := private.current_user_id();
begin
  if p_workflow is null or exists (select from private.workflows w where w.id = p_workflow) then
    return;
  end if;
  insert into private.workflows (id) values (p_workflow) on conflict do nothing;
  if found and v_user is not null
    and not exists (select from public.runs r where r.subject_id = p_workflow)
    and not exists (select from public.workflow_nodes n where n.workflow_id = p_workflow)
  then
    insert into public.workflow_members (workflow_id, user_id) values (p_workflow, v_user) on conflict do nothing;
  end if;
end
$$;

-- run_events: the audit trail of every run, ordered by seq.

do $$
declare
  v_writer text;
begin
  if to_regclass('public.run_events') is null then
    create table public.run_events (
    id uuid primary key default gen_random_uuid(),
    run_id varchar references public.runs (id) on delete cascade,
    ts timestamptz default clock_timestamp(),
    kind varchar not null,
    payload jsonb,
    seq bigint,
    run_kind varchar
    );
    -- Older Supabase projects grant everything on a new table to the API roles.
    revoke all on public.run_events from public, anon, authenticated, service_role;
  else
    -- It was there before. Our checks and policies are evaluated with the rights of whoever comes.
    for v_writer in
      select distinct g.grantee from information_schema.role_table_grants g
      where g.table_schema = 'public' and g.table_name = 'run_events'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') and g.grantee <> 'PUBLIC'
    loop
      execute format('grant execute on function private.has_base64(jsonb), private.is_image_run(varchar) to %I', v_writer);
    end loop;
    -- Without row level security its rows were open to whoever held grants; those that are not ours stay so.
    if not (select c.relrowsecurity from pg_class c where c.oid = 'public.run_events'::regclass) then
      drop policy if exists "Events of other kinds stay as open as they were" on public.run_events;
      create policy "Events of other kinds stay as open as they were" on public.run_events
        using (not private.is_image_run(run_id)) with check (not private.is_image_run(run_id));
    end if;
  end if;
end
$$;
-- A table that was there before lacks these.
alter table public.run_events
  add column if not exists seq bigint,
  add column if not exists run_kind varchar;
alter table public.run_events
  alter column id set default gen_random_uuid(),
  alter column ts set default clock_timestamp();

alter table public.run_events
  drop constraint if exists run_events_kind_is_known,
  drop constraint if exists run_events_payload_holds_no_base64;
alter table public.run_events
  add constraint run_events_kind_is_known
    check (run_kind is distinct from 'image_gen' or kind in ('progress', 'log', 'error', 'webhook')) not valid,
  add constraint run_events_payload_holds_no_base64
    check (run_kind is distinct from 'image_gen' or not private.has_base64(payload)) not valid;

comment on table public.run_events is 'The audit trail of runs.';
comment on column public.run_events.seq is 'The order; timestamps may be equal.';
comment on column public.run_events.run_kind is 'The kind of the run, copied so that the checks leave other kinds alone.';

create index if not exists run_events_of_a_run on public.run_events (run_id, seq);

-- Numbers the event and copies the run's kind, whoever writes: the kind decides whether our checks apply, so nobody may
-- choose it. No default, which would ask every writer of other kinds for rights on the sequence.
create or replace function private.stamp_event()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if tg_op = 'INSERT' then
    new.seq := nextval('private.event_order');
  end if;
  select r.kind into new.run_kind from public.runs r where r.id = new.run_id;
  return new;
end
$$;

create or replace trigger stamp_event before insert or update on public.run_events
  for each row execute function private.stamp_event();

-- A table that was there before may refuse to delete a run that has events; ours all have.
create or replace function private.delete_events()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  delete from public.run_events e where e.run_id = old.id;
  return old;
end
$$;

create or replace trigger delete_events before delete on public.runs
  for each row when (old.kind = 'image_gen') execute function private.delete_events();

-- workflow_nodes: the canvas. The frontend owns its nodes; a few keys of node_data are ours.

do $$
declare
  v_writer text;
begin
  if to_regclass('public.workflow_nodes') is null then
    create table public.workflow_nodes (
    id varchar primary key,
    workflow_id uuid not null,
    node_type varchar not null,
    node_data jsonb not null,
    position jsonb,
    created_at timestamptz default now(),
    updated_at timestamptz default now(),
    version bigint,
    run_ticket bigint
    );
    -- Older Supabase projects grant everything on a new table to the API roles.
    revoke all on public.workflow_nodes from public, anon, authenticated, service_role;
  else
    -- It was there before. Our checks and policies are evaluated with the rights of whoever comes.
    for v_writer in
      select distinct g.grantee from information_schema.role_table_grants g
      where g.table_schema = 'public' and g.table_name = 'workflow_nodes'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') and g.grantee <> 'PUBLIC'
    loop
      execute format('grant execute on function private.has_base64(jsonb) to %I', v_writer);
    end loop;
  end if;
end
$$;
-- A table that was there before lacks these.
alter table public.workflow_nodes
  add column if not exists version bigint,
  add column if not exists run_ticket bigint;

alter table public.workflow_nodes
  drop constraint if exists workflow_nodes_node_data_holds_no_base64,
  drop constraint if exists workflow_nodes_position_holds_no_base64;
alter table public.workflow_nodes
  add constraint workflow_nodes_node_data_holds_no_base64 check (not private.has_base64(node_data)) not valid,
  add constraint workflow_nodes_position_holds_no_base64 check (not private.has_base64(position)) not valid;

comment on table public.workflow_nodes is 'Nodes of the canvas.';
comment on column public.workflow_nodes.node_data is
  'The frontend''s, but for status, runId, progress, message, previewUrl, imageUrl, thumbnailUrl, error, updatedAt.';
comment on column public.workflow_nodes.version is 'Grows with every change, over all nodes: merge by it.';
comment on column public.workflow_nodes.run_ticket is 'Ticket of the run that the node shows.';

create index if not exists idx_nodes_workflow on public.workflow_nodes (workflow_id);

-- Nodes that were locked when a run of theirs changed. The next turn shows them the run: a settlement never waits for
-- somebody who drags a node, or went home in the middle of a transaction.
-- Append-only, so that a turn which is just dealing with an older entry cannot swallow a newer one.
create table if not exists private.stale_nodes (
  id bigint generated always as identity primary key,
  node_id varchar not null
);
comment on table private.stale_nodes is 'Nodes that still have to be shown their run.';

-- Limits of providers and models, global over all daemons, and the lines in which runs wait for them.

create table if not exists public.provider_limits (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  per_minute integer check (per_minute >= 0),
  max_running integer check (max_running >= 0),
  paused boolean not null default false,
  blocked_until timestamptz,
  blocked_reason text,
  recent_at bigint[] not null default '{}',
  recent_starts integer[] not null default '{}',
  constraint provider_limits_one_row_each unique nulls not distinct (provider, model)
);
comment on table public.provider_limits is 'Change by SQL at any time. model null: all models. A null limit: unlimited.';
comment on column public.provider_limits.per_minute is 'Starts in any 60 seconds, over all daemons; exact.';
comment on column public.provider_limits.max_running is 'Runs in status running, parked ones included; exact.';
comment on column public.provider_limits.paused is 'Nothing new is started. What runs goes on.';
comment on column public.provider_limits.blocked_until is 'Set by the daemons when the provider says 429 or is out of credit.';
comment on column public.provider_limits.recent_at is 'The seconds (epoch) of the last minute in which runs started …';
comment on column public.provider_limits.recent_starts is '… and how many started in each.';

insert into public.provider_limits (provider, per_minute) values ('openai', 50), ('google', 60)
on conflict (provider, model) do nothing;

-- Names that may head a lane. Everything else waits in the lane '?', so that invented names cannot make lanes.
create table if not exists private.providers (
  name text primary key
);
comment on table private.providers is 'Providers that the daemons know.';
insert into private.providers (name) values ('openai'), ('google'), ('stability'), ('midjourney'), ('demo')
on conflict (name) do nothing;

-- One line per provider (or model with a limit of its own) and priority.
create table if not exists private.lanes (
  lane text not null,
  priority integer not null,
  floor bigint not null default 0,
  primary key (lane, priority)
);
comment on table private.lanes is 'The lines in which pending runs stand.';
-- There from the start: whoever opens a lane makes others who insert into it wait for his commit.
insert into private.lanes (lane, priority) select p.name, 0 from private.providers p union all select '?', 0
on conflict (lane, priority) do nothing;
comment on column private.lanes.floor is
  'Rank of the last run that was claimed. New runs rank from here; claims look from here, past dead index entries.';

-- The lane of a processor.
create or replace function private.lane_of(p_processor text)
returns text language sql stable set search_path = ''
as $$
  select case
    when exists (
      select from public.provider_limits l
      where l.provider = split_part(p_processor, ':', 1)
        and l.model = substr(p_processor, strpos(p_processor, ':') + 1)
    ) then p_processor
    else coalesce((select p.name from private.providers p where p.name = split_part(p_processor, ':', 1)), '?')
  end
$$;

-- The place of a new run: behind the last of its workflow, but never behind others who have fewer waiting.
-- (Start-time fair queueing with the lane's floor as virtual time.) A guess under concurrency, and good enough.
create or replace function private.place_in_line(p_workflow uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
as $$
declare
  v_floor bigint;
  v_last bigint;
begin
  select l.floor into v_floor from private.lanes l where l.lane = p_lane and l.priority = p_priority;
  if not found then
    insert into private.lanes (lane, priority) values (p_lane, p_priority) on conflict do nothing;
  end if;
  select r.rank into v_last
  from public.runs r
  where r.kind = 'image_gen' and r.subject_id = p_workflow and r.lane = p_lane and r.rank is not null
  order by r.rank desc limit 1;
  return greatest(coalesce(v_floor, 0), coalesce(v_last, -1) + 1);
end
$$;

-- A limit for a model gives that model a lane of its own, and takes it away again: its pending runs change lines.
-- Runs that somebody has locked, or is just inserting, are left behind; the claim finds and moves them.
create or replace function private.change_lanes()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  with misplaced as materialized (
    select r.id from public.runs r
    where r.kind = 'image_gen' and r.status = 'pending' and r.ticket is not null
      and split_part(r.processor, ':', 1) in (new.provider, old.provider)
      and r.lane is distinct from private.lane_of(r.processor)
    order by r.id
    for update skip locked
  )
  update public.runs r set lane = private.lane_of(r.processor)
  from misplaced where r.id = misplaced.id;
  return null;
end
$$;

create or replace trigger change_lanes after insert or delete or update of provider, model on public.provider_limits
  for each row execute function private.change_lanes();

-- Daemons: one row per process start. Liveness is one row per daemon, not per run.

create table if not exists private.daemons (
  id uuid primary key,
  name text not null,
  version text not null,
  slots integer not null,
  in_flight integer not null default 0,
  providers text[] not null,
  lease interval not null,
  started_at timestamptz not null,
  seen_at timestamptz not null,
  fresh_since timestamptz not null,
  session_lock boolean not null default false,
  draining boolean not null default false,
  ended_at timestamptz,
  ended text check (ended in ('stopped', 'taken over')),
  constraint daemons_ended_with_a_reason check ((ended_at is null) = (ended is null))
) with (fillfactor = 50);
comment on table private.daemons is 'Who is alive. One row per process start, never reused.';
comment on column private.daemons.fresh_since is 'Beats have come without a gap since then; only after one lease may it judge others.';
comment on column private.daemons.session_lock is 'Its LISTEN session holds an advisory lock: when that is free, it is gone.';

-- While busy daemons keep this ahead, inserts need no NOTIFY (which takes a global lock until commit).
create table if not exists private.wake (
  awake_until timestamptz not null
) with (fillfactor = 50);
comment on table private.wake is 'One row: until when some daemon looks by itself, often.';
create unique index if not exists wake_has_one_row on private.wake ((true));
insert into private.wake (awake_until) values ('-infinity') on conflict do nothing;

-- The models on offer, published by the daemons; the provider code is the one source.
create table if not exists private.models (
  provider text not null,
  model text not null,
  sizes text[] not null default '{}',
  ratios text[] not null default '{}',
  seed boolean not null default false,
  negative_prompt boolean not null default false,
  previous_image boolean not null default false,
  previews boolean not null default false,
  price numeric,
  typical_seconds numeric,
  retired date,
  successor text,
  as_of date,
  source text,
  primary key (provider, model)
);
comment on table private.models is 'What image_models shows.';

-- Workflow ids that rows have used before us belong to nobody until an operator says so.
insert into private.workflows (id)
select r.subject_id from public.runs r where r.subject_id is not null
union
select n.workflow_id from public.workflow_nodes n where n.workflow_id is not null
on conflict do nothing;
