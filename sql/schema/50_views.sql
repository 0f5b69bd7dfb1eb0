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
comment on view public.image_jobs is 'Image Job Orchestrator: runs as ImageJobRecords.';

create or replace view public.image_models with (security_invoker = on) as
select m.provider, m.model, m.sizes, m.ratios, m.qualities, m.seed, m.negative_prompt, m.previous_image, m.previews,
  m.price, m.typical_seconds, m.retired, m.successor, m.as_of, m.source
from image_jobs.models m;
comment on view public.image_models is 'Image Job Orchestrator: the models on offer, for menus. Prices in USD for one image of default size.';

create or replace view image_jobs.queue_stats with (security_invoker = on) as
select
  p.provider,
  count(*) filter (where r.status = 'pending' and r.due_at <= image_jobs.now()) as pending,
  count(*) filter (where r.status = 'pending' and r.due_at > image_jobs.now()) as delayed,
  count(*) filter (where r.status = 'running' and r.claimed_by is not null) as running,
  count(*) filter (where r.status = 'running' and r.claimed_by is null) as parked,
  count(*) filter (where r.status = 'completed') as completed,
  count(*) filter (where r.status = 'failed') as failed,
  count(*) filter (where r.status = 'cancelled') as cancelled,
  image_jobs.now() - min(r.due_at) filter (where r.status = 'pending' and r.due_at <= image_jobs.now()) as oldest_wait,
  coalesce(bool_or(l.paused), false) as paused,
  (
    select b.until from image_jobs.provider_blocks b
    where b.provider = p.provider and b.model is null and b.until > image_jobs.now()) as blocked_until
from (
  select split_part(coalesce(q.routed_to, q.processor), ':', 1) as provider from public.runs q where q.kind = 'image_gen' and q.ticket is not null
  union
  select l.provider from image_jobs.provider_limits l where l.paused
  union
  select b.provider from image_jobs.provider_blocks b where b.model is null and b.until > image_jobs.now()
) p
left join public.runs r
  on r.kind = 'image_gen' and r.ticket is not null and split_part(coalesce(r.routed_to, r.processor), ':', 1) = p.provider
left join image_jobs.provider_limits l on l.provider = p.provider and l.model is null
group by p.provider;
comment on view image_jobs.queue_stats is 'Counts of runs by provider and state; paused and blocked providers are here even without runs.';

create or replace view image_jobs.run_timings with (security_invoker = on) as
select
  split_part(coalesce(r.routed_to, r.processor), ':', 1) as provider,
  coalesce(r.payload ->> 'model', substr(r.processor, strpos(r.processor, ':') + 1)) as model,
  stage.name as stage,
  count(*) as runs,
  percentile_cont(0.5) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p50,
  percentile_cont(0.95) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p95,
  percentile_cont(0.99) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p99
from public.runs r
cross join unnest(array['queuedMs', 'generateMs', 'storeMs', 'settleMs']) as stage (name)
where r.kind = 'image_gen' and r.status = 'completed' and r.payload -> 'timings' ->> stage.name is not null
group by 1, 2, stage.name;
comment on view image_jobs.run_timings is
  'Milliseconds of each stage of completed runs, by provider and the model that drew: in line, at the provider, to storage, from there to the node.';

create or replace view image_jobs.run_costs with (security_invoker = on) as
select
  date_trunc('day', c.opened_at, 'UTC') as day,
  c.provider,
  c.model,
  count(*) as calls,
  count(*) filter (where c.image) as images,
  sum(c.cost) as cost,
  sum(c.estimate) filter (where c.state = 'unknown') as possible_cost,
  count(*) filter (where c.state = 'charged' and c.cost is null) as unpriced
from image_jobs.calls c
where c.state in ('charged', 'unknown')
group by 1, 2, 3;
comment on view image_jobs.run_costs is
  'USD by day (UTC), provider and the model that drew. possible_cost: calls whose outcome is unknown. unpriced: charged calls without a known price.';

create or replace view image_jobs.storage_stats with (security_invoker = on) as
select
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) as tried,
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) - count(*) filter (where e.payload ->> 'event' = 'stored') as failed,
  round(count(*) filter (where e.payload ->> 'event' = 'stored')
    / nullif(sum((e.payload -> 'data' ->> 'uploadTries')::numeric), 0), 4) as success_rate
from public.run_events e
where e.payload -> 'data' ? 'uploadTries';
comment on view image_jobs.storage_stats is 'Uploads of images: tried, failed, success rate.';

create or replace view image_jobs.storage_violations with (security_invoker = on) as
select 'runs' as table_name, r.id::text as id, c.name as column_name
from public.runs r cross join lateral (values ('payload', r.payload), ('metadata', r.metadata)) c (name, value)
where r.kind = 'image_gen' and image_jobs.has_base64(c.value)
union all
select 'run_events', e.id::text, 'payload' from public.run_events e join public.runs r on r.id = e.run_id
where r.kind = 'image_gen' and image_jobs.has_base64(e.payload)
union all
select 'workflow_nodes', n.id::text, c.name
from public.workflow_nodes n cross join lateral (values ('node_data', n.node_data), ('position', n.position)) c (name, value)
where image_jobs.has_base64(c.value);
comment on view image_jobs.storage_violations is 'Rows that hold base64: must be empty. Only rows older than the rule can be here.';

create or replace view image_jobs.daemon_status with (security_invoker = on) as
select d.id, d.name, d.version, d.slots, d.in_flight, d.providers, d.started_at, d.seen_at, d.session_lock, d.lease, case
    when d.ended is not null then d.ended
    when d.seen_at < image_jobs.now() - d.lease then 'silent'
    when d.draining then 'draining'
    else 'alive' end as state
from image_jobs.daemons d;
comment on view image_jobs.daemon_status is 'Every daemon that has run in the last days, and whether it lives.';
