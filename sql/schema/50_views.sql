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

-- A computed column of image_models, `select=*,qualities`: with one more column of its own the view could not be replaced by
-- the migration that made it, and migrations may run twice.
create or replace function public.qualities(model public.image_models)
returns text[] language sql stable set search_path = ''
as $$
  select m.qualities from private.models m where (m.provider, m.model) = (model.provider, model.model)
$$;
comment on function public.qualities(public.image_models) is 'What promptSpec.quality may be and make a difference.';

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
  select split_part(coalesce(q.via, q.processor), ':', 1) as provider from public.runs q where q.kind = 'image_gen' and q.ticket is not null
  union
  select b.provider from public.provider_limits b where b.paused or b.blocked_until > private.now()
) p
left join public.runs r
  on r.kind = 'image_gen' and r.ticket is not null and split_part(coalesce(r.via, r.processor), ':', 1) = p.provider
left join public.provider_limits l on l.provider = p.provider and l.model is null
group by p.provider;
comment on view public.queue_stats is 'How many runs stand where, by provider; paused and blocked ones are here even without runs.';

create or replace view public.run_timings with (security_invoker = on) as
select
  split_part(coalesce(r.via, r.processor), ':', 1) as provider,
  stage.name as stage,
  count(*) as runs,
  percentile_cont(0.5) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p50,
  percentile_cont(0.95) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p95,
  percentile_cont(0.99) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p99
from public.runs r
cross join unnest(array['queuedMs', 'generateMs', 'storeMs', 'settleMs']) as stage (name)
where r.kind = 'image_gen' and r.status = 'completed' and r.payload -> 'timings' ->> stage.name is not null
group by split_part(coalesce(r.via, r.processor), ':', 1), stage.name;
comment on view public.run_timings is
  'Milliseconds of each stage of completed runs, by provider. settleMs is the wait for the daemon''s turn, not the write.';

create or replace view public.run_costs with (security_invoker = on) as
select
  split_part(worked.processor, ':', 1) as provider,
  substr(worked.processor, strpos(worked.processor, ':') + 1) as model,
  date_trunc('day', e.ts) as day,
  count(*) filter (where e.payload ->> 'event' in ('generated', 'late')) as images,
  sum((e.payload -> 'data' ->> 'cost')::numeric) as cost,
  sum((e.payload -> 'data' ->> 'possibleCost')::numeric) as possible_cost,
  count(*) filter (where e.payload ->> 'event' = 'generated' and e.payload -> 'data' ->> 'cost' is null) as unknown
from public.run_events e
join public.runs r on r.id = e.run_id
-- A run may have gone on to another provider since.
cross join lateral (select coalesce(e.payload -> 'data' ->> 'processor', r.via, r.processor) as processor) worked
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
