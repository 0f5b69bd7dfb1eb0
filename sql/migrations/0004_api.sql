-- What clients and operators see and may do.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- Views: two for clients, the rest for operators.

create or replace view public.image_jobs with (security_invoker = on) as
select
  r.id as "jobId",
  r.metadata ->> 'nodeId' as "nodeId",
  r.subject_id as "workflowId",
  split_part(r.processor, ':', 1) as provider,
  substr(r.processor, strpos(r.processor, ':') + 1) as model,
  r.status,
  r.started_at as "startedAt",
  r.finished_at as "finishedAt",
  r.payload ->> 'imageUrl' as "imageUrl",
  r.metadata,
  case when r.status = 'failed' then r.payload ->> 'error' end as error
from public.runs r
where r.kind = 'image_gen';
comment on view public.image_jobs is 'Runs as ImageJobRecords.';

create or replace view public.image_models with (security_invoker = on) as
select m.provider, m.model, m.sizes, m.ratios, m.seed, m.negative_prompt, m.previous_image, m.previews, m.price,
  m.typical_seconds, m.retired, m.successor, m.as_of, m.source
from private.models m;
comment on view public.image_models is 'The models on offer, for menus. Prices in USD for one image of default size.';

create or replace view public.queue_stats with (security_invoker = on) as
select
  p.provider,
  count(*) filter (where r.status = 'pending' and r.due_at <= private.now()) as pending,
  count(*) filter (where r.status = 'pending' and r.due_at > private.now()) as delayed,
  count(*) filter (where r.status = 'running' and r.claimed_by is not null) as running,
  count(*) filter (where r.status = 'running' and r.claimed_by is null) as parked,
  count(*) filter (where r.status = 'completed') as completed,
  count(*) filter (where r.status = 'failed') as failed,
  count(*) filter (where r.status = 'cancelled') as cancelled,
  private.now() - min(r.due_at) filter (where r.status = 'pending' and r.due_at <= private.now()) as oldest_wait,
  coalesce(bool_or(l.paused), false) as paused,
  max(l.blocked_until) filter (where l.blocked_until > private.now()) as blocked_until
from (
  select split_part(q.processor, ':', 1) as provider from public.runs q where q.kind = 'image_gen' and q.ticket is not null
  union
  select b.provider from public.provider_limits b where b.paused or b.blocked_until > private.now()
) p
left join public.runs r
  on r.kind = 'image_gen' and r.ticket is not null and split_part(r.processor, ':', 1) = p.provider
left join public.provider_limits l on l.provider = p.provider and l.model is null
group by p.provider;
comment on view public.queue_stats is 'How many runs stand where, by provider; paused and blocked ones are here even without runs.';

create or replace view public.run_timings with (security_invoker = on) as
select
  split_part(r.processor, ':', 1) as provider,
  stage.name as stage,
  count(*) as runs,
  percentile_cont(0.5) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p50,
  percentile_cont(0.95) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p95,
  percentile_cont(0.99) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p99
from public.runs r
cross join unnest(array['queuedMs', 'generateMs', 'storeMs', 'settleMs']) as stage (name)
where r.kind = 'image_gen' and r.status = 'completed' and r.payload -> 'timings' ->> stage.name is not null
group by split_part(r.processor, ':', 1), stage.name;
comment on view public.run_timings is
  'Milliseconds of each stage of completed runs, by provider. settleMs is the wait for the daemon''s turn, not the write.';

create or replace view public.run_costs with (security_invoker = on) as
select
  split_part(r.processor, ':', 1) as provider,
  substr(r.processor, strpos(r.processor, ':') + 1) as model,
  date_trunc('day', e.ts) as day,
  count(*) filter (where e.payload ->> 'event' in ('generated', 'late')) as images,
  sum((e.payload -> 'data' ->> 'cost')::numeric) as cost,
  sum((e.payload -> 'data' ->> 'possibleCost')::numeric) as possible_cost,
  count(*) filter (where e.payload ->> 'event' = 'generated' and e.payload -> 'data' ->> 'cost' is null) as unknown
from public.run_events e
join public.runs r on r.id = e.run_id
where r.kind = 'image_gen' and e.payload ->> 'event' in ('generated', 'late', 'taken_over', 'unknown_outcome', 'charged')
group by 1, 2, 3;
comment on view public.run_costs is
  'USD by provider, model and day. possible_cost: calls whose outcome is unknown. unknown: images without a known price.';

create or replace view public.storage_stats with (security_invoker = on) as
select
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) as tried,
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) - count(*) filter (where e.payload ->> 'event' = 'stored') as failed,
  round(count(*) filter (where e.payload ->> 'event' = 'stored')
    / nullif(sum((e.payload -> 'data' ->> 'uploadTries')::numeric), 0), 4) as success_rate
from public.run_events e
where e.payload -> 'data' ? 'uploadTries';
comment on view public.storage_stats is 'Uploads of images: tried, failed, success rate.';

create or replace view public.storage_violations with (security_invoker = on) as
select 'runs' as table_name, r.id::text as id, c.name as column_name
from public.runs r cross join lateral (values ('payload', r.payload), ('metadata', r.metadata)) c (name, value)
where r.kind = 'image_gen' and private.has_base64(c.value)
union all
select 'run_events', e.id::text, 'payload' from public.run_events e join public.runs r on r.id = e.run_id
where r.kind = 'image_gen' and private.has_base64(e.payload)
union all
select 'workflow_nodes', n.id::text, c.name
from public.workflow_nodes n cross join lateral (values ('node_data', n.node_data), ('position', n.position)) c (name, value)
where private.has_base64(c.value);
comment on view public.storage_violations is 'Rows that hold base64: must be empty. Only rows older than the rule can be here.';

create or replace view public.daemons with (security_invoker = on) as
select d.id, d.name, d.version, d.slots, d.in_flight, d.providers, d.started_at, d.seen_at, d.session_lock, d.lease, case
    when d.ended is not null then d.ended
    when d.seen_at < private.now() - d.lease then 'silent'
    when d.draining then 'draining'
    else 'alive' end as state
from private.daemons d;
comment on view public.daemons is 'Every daemon that has run in the last days, and whether it lives.';

-- What clients call: start_image_job, cancel_run, requeue_run. The public ones run with the caller's rights and RLS;
-- those that must change runs go through a private function that checks membership first.

-- Stops a run that is pending or running; a finished one is left as it is. For members and operators.
create or replace function private.cancel_run(p_run_id varchar)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
begin
  select r.* into v_run from public.runs r where r.id = p_run_id and r.kind = 'image_gen' for update;
  if not found or not (private.is_operator() or private.can_access_workflow(v_run.subject_id)) then
    raise exception using errcode = 'PT404', message = 'There is no such run.', hint = 'Check the id, and that you are a member of its workflow.';
  end if;
  if v_run.status in ('pending', 'running') then
    update public.runs r set status = 'cancelled' where r.id = p_run_id;
  end if;
end
$$;

-- Puts a failed or cancelled run in line again. For members; operators may requeue any run.
create or replace function private.requeue_run(p_run_id varchar)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
  v_operator boolean := private.is_operator();
begin
  select r.* into v_run from public.runs r where r.id = p_run_id and r.kind = 'image_gen' for update;
  if not found or not (v_operator or private.can_access_workflow(v_run.subject_id)) then
    raise exception using errcode = 'PT404', message = 'There is no such run.', hint = 'Check the id, and that you are a member of its workflow.';
  end if;
  if not v_operator and v_run.status not in ('failed', 'cancelled') then
    perform private.refuse(format('A run that is %s cannot be requeued.', v_run.status),
      case v_run.status when 'completed' then 'Insert a new run to make another image.'
        else 'It is on its way; cancel it first to start anew.' end);
  end if;
  update public.runs r set status = 'pending' where r.id = p_run_id;
end
$$;

-- A run as an ImageJobRecord, if the caller may see it.
create or replace function private.image_job_record(p_run_id varchar)
returns jsonb language sql stable set search_path = ''
as $$
  select to_jsonb(j) from public.image_jobs j where j."jobId" = p_run_id
$$;

create or replace function public.cancel_run(run_id varchar)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  perform private.cancel_run(run_id);
  return private.image_job_record(run_id);
end
$$;
comment on function public.cancel_run(varchar) is 'Stops a run; answers its ImageJobRecord. A finished run is left as it is.';

create or replace function public.requeue_run(run_id varchar)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  perform private.requeue_run(run_id);
  return private.image_job_record(run_id);
end
$$;
comment on function public.requeue_run(varchar) is 'Puts a failed or cancelled run in line again; answers its ImageJobRecord.';

-- StartImageJobRequest in, ImageJobRecord out. metadata is merged at the top level, the named fields win.
-- The same idempotency key (of the same user, in the same workflow) returns the first run.
create or replace function public.start_image_job(request jsonb)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_metadata jsonb;
  v_workflow uuid;
  v_id varchar;
begin
  if jsonb_typeof(request) is distinct from 'object' then
    perform private.refuse('The request must be an object.', 'Send {nodeId, workflowId, promptSpec, provider, model}.');
  end if;
  if coalesce(jsonb_typeof(request -> 'metadata'), 'null') not in ('object', 'null') then
    perform private.refuse('metadata must be an object.', 'Leave it out if there is none.');
  end if;
  if coalesce(request ->> 'nodeId', '') = '' then
    perform private.refuse('nodeId is missing.', 'Name the canvas node that shall show the image.');
  end if;
  if coalesce(request ->> 'provider', '') = '' or coalesce(request ->> 'model', '') = '' then
    perform private.refuse('provider and model are missing.', 'The view image_models lists what is on offer.');
  end if;
  if request ->> 'workflowId' !~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' or request ->> 'workflowId' is null then
    perform private.refuse('workflowId must be a uuid.', 'For example crypto.randomUUID().');
  end if;
  v_workflow := request ->> 'workflowId';
  v_metadata := coalesce(nullif(request -> 'metadata', 'null'), '{}')
    || coalesce((
      select jsonb_object_agg(named.key, named.value) from jsonb_each(request) named
      where named.key in ('nodeId', 'webhookUrl', 'idempotencyKey', 'mode', 'fallback') and named.value <> 'null'
    ), '{}')
    || case when request ? 'promptSpec' then jsonb_build_object('promptSpec', request -> 'promptSpec') else '{}' end;

  insert into public.runs (kind, subject_id, status, processor, metadata)
  values ('image_gen', v_workflow, 'pending', (request ->> 'provider') || ':' || (request ->> 'model'), v_metadata)
  on conflict (created_by, subject_id, (metadata ->> 'idempotencyKey'))
    where kind = 'image_gen' and ticket is not null and metadata ->> 'idempotencyKey' is not null
    do nothing
  returning id into v_id;
  if v_id is null then
    select r.id into v_id from public.runs r
    where r.kind = 'image_gen' and r.subject_id = v_workflow and r.ticket is not null
      and r.created_by is not distinct from private.current_user_id()
      and r.metadata ->> 'idempotencyKey' = v_metadata ->> 'idempotencyKey';
  end if;
  return private.image_job_record(v_id);
end
$$;
comment on function public.start_image_job(jsonb) is 'StartImageJobRequest in, ImageJobRecord out.';

-- The bucket. Public to read by URL; nobody but the service role writes, as there is no policy for anybody else.

-- Makes a bucket if there is none of that name. Does nothing where there is no Supabase Storage.
create or replace function private.make_bucket(p_name text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if to_regclass('storage.buckets') is not null then
    insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types)
    values (p_name, p_name, true, 52428800,
      array['image/png', 'image/jpeg', 'image/webp', 'image/gif', 'image/avif'])
    on conflict (id) do nothing;
  end if;
end
$$;

select private.make_bucket('images');

-- Every grant and every policy, on one page.
--
-- Since October 2026 Supabase grants nothing in public by itself; older projects grant everything. Both end here.
-- Clients (anon, authenticated) read what their workflows hold, insert runs, and own their nodes. They have no UPDATE and
-- no DELETE on runs and run_events: cancel_run and requeue_run are the way. Operators come as service_role or owner.

revoke all on all functions in schema private from public, anon, authenticated, service_role;
revoke all on all tables in schema private from public, anon, authenticated, service_role;
revoke all on all sequences in schema private from public, anon, authenticated, service_role;
revoke all on public.workflow_members, public.provider_limits, public.image_jobs, public.image_models, public.queue_stats,
  public.run_timings, public.run_costs, public.storage_stats, public.storage_violations, public.daemons
  from public, anon, authenticated, service_role;
revoke all on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar)
  from public, anon, authenticated, service_role;
revoke all on public.workflow_nodes from public, anon, authenticated, service_role;
revoke all on sequence public.provider_limits_id_seq from public, anon, authenticated, service_role;
-- On tables that were there before, rows of other kinds stay as open as they were; but row level security does not stop these.
revoke truncate, references, trigger on public.runs, public.run_events from public, anon, authenticated, service_role;

grant usage on schema private to anon, authenticated, service_role;

-- What the checks, the defaults and the policies of these tables call runs with the rights of whoever writes.
grant execute on function private.has_base64(jsonb) to anon, authenticated, service_role;
grant execute on function private.can_access_workflow(uuid), private.can_access_run(varchar),
  private.is_image_run(varchar) to anon, authenticated, service_role;
-- What the client functions and the views call.
grant execute on function private.cancel_run(varchar), private.requeue_run(varchar), private.image_job_record(varchar),
  private.refuse(text, text), private.current_user_id() to authenticated, service_role;
grant execute on function private.now() to service_role;

grant select, insert on public.runs to authenticated;
grant select on public.run_events to authenticated;
grant select, insert, update, delete on public.workflow_nodes to authenticated;
grant select on public.workflow_members to authenticated;
grant select on public.image_jobs to authenticated;
grant select on private.models, public.image_models to anon, authenticated, service_role;
grant execute on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar)
  to authenticated, service_role;

grant select, insert, update, delete on public.runs, public.run_events, public.workflow_nodes, public.workflow_members,
  public.provider_limits to service_role;
grant select on public.image_jobs, public.queue_stats, public.run_timings, public.run_costs, public.storage_stats,
  public.storage_violations, public.daemons, private.daemons to service_role;

alter table public.runs enable row level security;
alter table public.run_events enable row level security;
alter table public.workflow_nodes enable row level security;
alter table public.workflow_members enable row level security;
alter table public.provider_limits enable row level security;
alter table private.workflows enable row level security;
alter table private.stale_nodes enable row level security;
alter table private.providers enable row level security;
alter table private.lanes enable row level security;
alter table private.daemons enable row level security;
alter table private.wake enable row level security;
alter table private.models enable row level security;

-- runs
drop policy if exists "Members see the runs of their workflows" on public.runs;
create policy "Members see the runs of their workflows" on public.runs for select to authenticated
  using (kind = 'image_gen' and private.can_access_workflow(subject_id));
drop policy if exists "Members insert runs into their workflows" on public.runs;
create policy "Members insert runs into their workflows" on public.runs for insert to authenticated
  with check (kind = 'image_gen' and private.can_access_workflow(subject_id));
-- On a table that was there before, other policies may be wider. These hold all the same, for our kind alone.
drop policy if exists "Nobody else sees image runs" on public.runs;
create policy "Nobody else sees image runs" on public.runs as restrictive for select to anon, authenticated
  using (kind is distinct from 'image_gen' or private.can_access_workflow(subject_id));
drop policy if exists "Nobody else inserts image runs" on public.runs;
create policy "Nobody else inserts image runs" on public.runs as restrictive for insert to anon, authenticated
  with check (kind is distinct from 'image_gen' or private.can_access_workflow(subject_id));
drop policy if exists "No client updates image runs" on public.runs;
create policy "No client updates image runs" on public.runs as restrictive for update to anon, authenticated
  using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
drop policy if exists "No client deletes image runs" on public.runs;
create policy "No client deletes image runs" on public.runs as restrictive for delete to anon, authenticated
  using (kind is distinct from 'image_gen');

-- run_events
drop policy if exists "Members see the events of their runs" on public.run_events;
create policy "Members see the events of their runs" on public.run_events for select to authenticated
  using (private.can_access_run(run_id));
drop policy if exists "Nobody else sees events of image runs" on public.run_events;
create policy "Nobody else sees events of image runs" on public.run_events as restrictive for select to anon, authenticated
  using (not private.is_image_run(run_id) or private.can_access_run(run_id));
drop policy if exists "No client inserts events of image runs" on public.run_events;
create policy "No client inserts events of image runs" on public.run_events as restrictive for insert to anon, authenticated
  with check (not private.is_image_run(run_id));
drop policy if exists "No client updates events of image runs" on public.run_events;
create policy "No client updates events of image runs" on public.run_events as restrictive for update to anon, authenticated
  using (not private.is_image_run(run_id)) with check (not private.is_image_run(run_id));
drop policy if exists "No client deletes events of image runs" on public.run_events;
create policy "No client deletes events of image runs" on public.run_events as restrictive for delete to anon, authenticated
  using (not private.is_image_run(run_id));

-- workflow_nodes
drop policy if exists "Members see the nodes of their workflows" on public.workflow_nodes;
create policy "Members see the nodes of their workflows" on public.workflow_nodes for select to authenticated
  using (private.can_access_workflow(workflow_id));
drop policy if exists "Members add nodes to their workflows" on public.workflow_nodes;
create policy "Members add nodes to their workflows" on public.workflow_nodes for insert to authenticated
  with check (private.can_access_workflow(workflow_id));
drop policy if exists "Members change the nodes of their workflows" on public.workflow_nodes;
create policy "Members change the nodes of their workflows" on public.workflow_nodes for update to authenticated
  using (private.can_access_workflow(workflow_id)) with check (private.can_access_workflow(workflow_id));
drop policy if exists "Members delete the nodes of their workflows" on public.workflow_nodes;
create policy "Members delete the nodes of their workflows" on public.workflow_nodes for delete to authenticated
  using (private.can_access_workflow(workflow_id));
drop policy if exists "Nobody else touches nodes" on public.workflow_nodes;
create policy "Nobody else touches nodes" on public.workflow_nodes as restrictive for all to anon, authenticated
  using (private.can_access_workflow(workflow_id)) with check (private.can_access_workflow(workflow_id));

-- workflow_members
drop policy if exists "Users see their own memberships" on public.workflow_members;
create policy "Users see their own memberships" on public.workflow_members for select to authenticated
  using (user_id = (select private.current_user_id()));

-- models
drop policy if exists "Everybody sees the models on offer" on private.models;
create policy "Everybody sees the models on offer" on private.models for select to anon, authenticated
  using (true);
