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

-- Views of operators look at a window: 24 hours, run_costs at 31 days. Its end is named, too, though nothing lies behind it: a
-- planner that does not know where a window begins takes it for a third of the table if it has no end, and would read all of that.

create or replace view image_jobs.queue_stats with (security_invoker = on) as
with clock as materialized (
  select image_jobs.now() as at
),
-- Each part is an index; names are split only when they are counted.
counted as (
  select coalesce(r.routed_to, r.processor) as name,
    case when r.due_at <= (select c.at from clock c) then 'pending' else 'delayed' end as state, count(*) as runs, min(r.due_at) as due_at
  from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is not null
  group by 1, 2
  union all
  select coalesce(r.routed_to, r.processor), case when r.due_at <= (select c.at from clock c) then 'pending' else 'delayed' end,
    count(*), min(r.due_at)
  from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is null
  group by 1, 2
  union all
  select coalesce(r.routed_to, r.processor), case when r.claimed_by is null then 'parked' else 'running' end, count(*), null
  from public.runs r where r.queue_state = 'running' and r.kind = 'image_gen'
  group by 1, 2
  union all
  select coalesce(r.routed_to, r.processor), r.status, count(*), null
  from public.runs r
  where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
    and r.claim between (select image_jobs.claim_before(c.at - interval '24 hours') from clock c) and 9223372036854775807
    and r.finished_at > (select c.at - interval '24 hours' from clock c)
  group by 1, 2
  union all
  select l.provider || ':', null, 0, null from image_jobs.provider_limits l where l.paused
  union all
  select b.provider || ':', null, 0, null from image_jobs.provider_blocks b
  where b.model is null and b.until > (select c.at from clock c)
)
-- Names of providers are the callers': those that nobody knows are one, '?', as in lanes.
select
  p.provider, p.pending, p.delayed, p.running, p.parked, p.completed, p.failed, p.cancelled, p.oldest_wait,
  coalesce(l.paused, false) as paused,
  (
    select b.until from image_jobs.provider_blocks b
    where b.provider = p.provider and b.model is null and b.until > (select c.at from clock c)) as blocked_until
from (
  select
    coalesce(k.name, '?') as provider,
    coalesce(sum(c.runs) filter (where c.state = 'pending'), 0)::bigint as pending,
    coalesce(sum(c.runs) filter (where c.state = 'delayed'), 0)::bigint as delayed,
    coalesce(sum(c.runs) filter (where c.state = 'running'), 0)::bigint as running,
    coalesce(sum(c.runs) filter (where c.state = 'parked'), 0)::bigint as parked,
    coalesce(sum(c.runs) filter (where c.state = 'completed'), 0)::bigint as completed,
    coalesce(sum(c.runs) filter (where c.state = 'failed'), 0)::bigint as failed,
    coalesce(sum(c.runs) filter (where c.state = 'cancelled'), 0)::bigint as cancelled,
    (select c.at from clock c) - min(c.due_at) filter (where c.state = 'pending') as oldest_wait
  from counted c
  left join (select p.name from image_jobs.providers p union select l.provider from image_jobs.provider_limits l) k
    on k.name = split_part(c.name, ':', 1)
  group by 1
) p
left join image_jobs.provider_limits l on l.provider = p.provider and l.model is null;
comment on view image_jobs.queue_stats is
  'Counts of runs by provider and state; what ended, in the last 24 hours. Paused and blocked providers are here even without runs; those that no daemon has served are one, ''?''.';

create or replace view image_jobs.run_timings with (security_invoker = on) as
select
  t.provider,
  t.model,
  stage.name as stage,
  stage.runs,
  stage.p[1] as p50,
  stage.p[2] as p95,
  stage.p[3] as p99
from (
  -- One look at each run; its timings are read once (offset 0).
  select r.provider, r.model,
    count(r.queued) as queued, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.queued) as p_queued,
    count(r.generate) as generate, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.generate) as p_generate,
    count(r.store) as store, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.store) as p_store,
    count(r.settle) as settle, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.settle) as p_settle
  from (
    select c.provider, c.model, (c.timings ->> 'queuedMs')::double precision as queued, (c.timings ->> 'generateMs')::double precision as generate,
      (c.timings ->> 'storeMs')::double precision as store, (c.timings ->> 'settleMs')::double precision as settle
    from (
      select split_part(coalesce(r.routed_to, r.processor), ':', 1) as provider,
        coalesce(r.payload ->> 'model', substr(r.processor, strpos(r.processor, ':') + 1)) as model, r.payload -> 'timings' as timings
      from public.runs r
      where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen' and r.status = 'completed'
        and r.claim between (select image_jobs.claim_before(image_jobs.now() - interval '24 hours')) and 9223372036854775807
        and r.finished_at > (select image_jobs.now() - interval '24 hours')
      offset 0
    ) c
    offset 0
  ) r
  group by r.provider, r.model
) t
cross join lateral (values
  ('queuedMs', t.queued, t.p_queued), ('generateMs', t.generate, t.p_generate),
  ('storeMs', t.store, t.p_store), ('settleMs', t.settle, t.p_settle)) as stage (name, runs, p)
where stage.runs > 0;
comment on view image_jobs.run_timings is
  'Milliseconds of each stage of the runs that were completed in the last 24 hours, by provider and the model that drew: in line, at the provider, to storage, from there to the node.';

create or replace view image_jobs.failures with (security_invoker = on) as
select f.code, f.count, f.last, f.example, r.payload ->> 'error' as sentence
from (
  select r.payload ->> 'code' as code, count(*) as count, max(r.finished_at) as last,
    (array_agg(r.id order by r.finished_at desc))[1] as example
  from public.runs r
  where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen' and r.status = 'failed'
    and r.claim between (select image_jobs.claim_before(image_jobs.now() - interval '24 hours')) and 9223372036854775807
    and r.finished_at > (select image_jobs.now() - interval '24 hours')
  group by 1
) f
join public.runs r on r.id = f.example;
comment on view image_jobs.failures is 'Runs that failed in the last 24 hours, by code: how many, and the newest as an example with its sentence.';

create or replace view image_jobs.throughput with (security_invoker = on) as
select
  date_bin('1 min', r.finished_at, '2000-01-01 00:00:00+00') as minute,
  count(*) filter (where r.status = 'completed') as done,
  count(*) filter (where r.status = 'failed') as failed,
  coalesce(sum(r.attempt - 1) filter (where r.attempt > 1), 0)::bigint as retried
from public.runs r
where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
  and r.claim between (select image_jobs.claim_before(image_jobs.now() - interval '24 hours')) and 9223372036854775807
  and r.finished_at > (select image_jobs.now() - interval '24 hours')
group by 1;
comment on view image_jobs.throughput is
  'Runs that ended in the last 24 hours, by minute. retried: how many more attempts than one these runs took.';

create or replace view image_jobs.run_costs with (security_invoker = on) as
select
  -- A day of UTC.
  date_bin('1 day', c.opened_at, '2000-01-01 00:00:00+00') as day,
  c.provider,
  c.model,
  count(*) as calls,
  count(*) filter (where c.image) as images,
  sum(c.cost) as cost,
  sum(c.estimate) filter (where c.state = 'unknown') as possible_cost,
  count(*) filter (where c.state = 'charged' and c.cost is null) as unpriced
from image_jobs.calls c
where c.state in ('charged', 'unknown')
  and c.opened_at between (select date_trunc('day', image_jobs.now(), 'UTC') - interval '30 days') and (select image_jobs.now() + interval '1 hour')
group by 1, 2, 3;
comment on view image_jobs.run_costs is
  'USD by day (UTC), provider and the model that drew, of the last 31 days. possible_cost: calls whose outcome is unknown. unpriced: charged calls without a known price.';

create or replace view image_jobs.storage_stats with (security_invoker = on) as
select
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) as tried,
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) - count(*) filter (where e.payload ->> 'event' = 'stored') as failed,
  round(count(*) filter (where e.payload ->> 'event' = 'stored')
    / nullif(sum((e.payload -> 'data' ->> 'uploadTries')::numeric), 0), 4) as success_rate
from public.run_events e
where e.run_kind = 'image_gen' and e.payload -> 'data' ? 'uploadTries'
  and e.ts between (select image_jobs.now() - interval '24 hours') and (select image_jobs.now() + interval '1 hour');
comment on view image_jobs.storage_stats is 'Uploads of images in the last 24 hours: tried, failed, success rate.';

-- Everything else was held against the rule when it was written.
create or replace view image_jobs.storage_violations with (security_invoker = on) as
select 'runs' as table_name, r.id::text as id, c.name as column_name
from public.runs r cross join lateral (values ('payload', r.payload), ('metadata', r.metadata)) c (name, value)
where r.kind = 'image_gen' and r.ticket is null and image_jobs.has_base64(c.value)
union all
select 'run_events', e.id::text, 'payload' from public.runs r join public.run_events e on e.run_id = r.id
where r.kind = 'image_gen' and r.ticket is null and e.run_kind is null and image_jobs.has_base64(e.payload)
union all
select 'workflow_nodes', n.id::text, c.name
from public.workflow_nodes n cross join lateral (values ('node_data', n.node_data), ('position', n.position)) c (name, value)
where n.version is null and image_jobs.has_base64(c.value);
comment on view image_jobs.storage_violations is
  'Rows that hold base64: must be empty. Only rows older than the rule can be here: runs that were never requeued, their events, nodes that were never changed.';

create or replace view image_jobs.daemon_status with (security_invoker = on) as
select d.id, d.name, d.version, d.slots, d.in_flight, d.providers, d.started_at, d.seen_at, d.session_lock, d.lease, case
    when d.ended is not null then d.ended
    when d.seen_at < image_jobs.now() - d.lease then 'silent'
    when d.draining then 'draining'
    else 'alive' end as state
from image_jobs.daemons d;
comment on view image_jobs.daemon_status is 'Every daemon that has run in the last days, and whether it lives.';
