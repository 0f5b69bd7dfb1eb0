-- The dashboard: all that an operator looks at, in one call. `image-jobs status` is drawn from it.

-- Returns how runs go, in `period` until now and at the moment; sql/README.md lists the keys. Names of models are the callers': of
-- those that are not on offer only the hundred with the most runs are told apart. Providers that nobody knows are one, '?'.
-- Nothing is sorted that can be hashed: the planner expects as many steps as calls, and would sort these by their names.
create or replace function image_jobs.dashboard(period interval default '1 hour')
returns jsonb language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off set plan_cache_mode = force_custom_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := v_now - dashboard.period;
  v_today timestamptz := date_trunc('day', v_now, 'UTC');
  v_ended bigint := image_jobs.claim_before(v_from);
  v_day_ago bigint := image_jobs.claim_before(least(v_from, v_now - interval '1 day'));
  -- Of the series: the least of these of which the period has at most a hundred.
  v_step interval := (
    select min(step.width) from unnest(array[
      '15 s', '1 min', '5 min', '15 min', '1 hour', '3 hours', '12 hours']::interval[]) as step (width)
    where dashboard.period <= 100 * step.width);
  v_board jsonb;
begin
  if dashboard.period is null or dashboard.period <= interval '0' or dashboard.period > interval '31 days' then
    perform image_jobs.refuse('The period of a dashboard is more than nothing, and at most 31 days.', 'The last day: interval ''1 day''.');
  end if;
  with pending as materialized (
    select coalesce(r.routed_to, r.processor) as name, count(*) as waiting, 0 as delayed, min(r.due_at) as since
    from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is not null
    group by 1
    union all
    select coalesce(r.routed_to, r.processor), count(*) filter (where r.due_at <= v_now),
      count(*) filter (where r.due_at > v_now), min(r.due_at) filter (where r.due_at <= v_now)
    from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is null and r.due_at is not null
    group by 1
  ),
  running as materialized (
    select coalesce(r.routed_to, r.processor) as name, count(*) filter (where r.claimed_by is not null) as running,
      count(*) filter (where r.claimed_by is null) as parked
    from public.runs r where r.queue_state = 'running' and r.kind = 'image_gen'
    group by 1
  ),
  ended as materialized (
    select coalesce(r.routed_to, r.processor) as name, r.status, r.id, r.finished_at,
      case when r.status = 'completed' then (r.payload -> 'timings' ->> 'generateMs')::double precision end as generate_ms,
      case when r.status = 'failed' then r.payload ->> 'code' end as code
    from public.runs r
    where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
      and r.claim >= v_ended and r.finished_at > v_from
  ),
  settled as materialized (
    select e.name, count(*) filter (where e.status = 'completed') as completed, count(*) filter (where e.status = 'failed') as failed,
      count(*) filter (where e.status = 'cancelled') as cancelled
    from ended e group by 1
  ),
  spent as materialized (
    select c.provider, c.model, date_bin(v_step, c.opened_at, v_today) as step,
      sum(c.cost) filter (where c.opened_at > v_from) as usd,
      sum(c.estimate) filter (where c.state = 'unknown' and c.opened_at > v_from) as possible_usd,
      sum(c.cost) filter (where c.opened_at >= v_today) as usd_today,
      sum(c.estimate) filter (where c.state = 'unknown' and c.opened_at >= v_today) as possible_usd_today
    from image_jobs.calls c
    where c.opened_at >= least(v_from, v_today) and c.state in ('charged', 'unknown')
    group by 1, 2, 3
  ),
  calls as materialized (
    select s.provider, s.model, sum(s.usd) as usd, sum(s.possible_usd) as possible_usd,
      sum(s.usd_today) as usd_today, sum(s.possible_usd_today) as possible_usd_today
    from spent s group by 1, 2
  ),
  series as materialized (
    select step.at, coalesce(r.completed, 0) as completed, coalesce(r.failed, 0) as failed,
      r.percentiles, coalesce(c.usd, 0) as usd
    from generate_series(date_bin(v_step, v_from, v_today), v_now, v_step) as step (at)
    left join (
      select date_bin(v_step, e.finished_at, v_today) as at, count(*) filter (where e.status = 'completed') as completed,
        count(*) filter (where e.status = 'failed') as failed,
        percentile_cont(array[0.5, 0.95]) within group (order by e.generate_ms) as percentiles
      from ended e group by 1
    ) r on r.at = step.at
    left join (select s.step as at, sum(s.usd) as usd from spent s group by 1) c on c.at = step.at
  ),
  named as materialized (
    select counts.name,
      -- As in lanes: names of providers are the callers', too.
      coalesce((select p.name from image_jobs.providers p where p.name = split_part(counts.name, ':', 1)), '?') as provider,
      case when row_number() over (order by counts.runs desc) > 100 then '…' else image_jobs.drawing_model(counts.name) end as model
    from (
      select each.name, sum(each.runs) as runs
      from (
        select p.name, p.waiting + p.delayed as runs from pending p
        union all select r.name, r.running + r.parked from running r
        union all select s.name, s.completed + s.failed + s.cancelled from settled s
      ) each
      group by 1
    ) counts
  ),
  timed as materialized (
    select n.provider, n.model, percentile_cont(array[0.5, 0.95]) within group (order by e.generate_ms) as percentiles
    from ended e join named n on n.name = e.name where e.generate_ms is not null
    group by 1, 2
  ),
  living as materialized (
    select d.slots, d.providers, d.draining from image_jobs.daemons d
    where d.ended_at is null and d.seen_at >= v_now - d.lease
  ),
  status as materialized (
    select s.provider, s.model, s.state, s.since, s.until, s.sentence from image_jobs.provider_status() s
  ),
  models as materialized (
    select sums.*, coalesce(own.per_minute, common.per_minute) as per_minute, coalesce(own.max_running, common.max_running) as max_running
    from (
      select each.provider, each.model, sum(each.waiting) as waiting, sum(each.delayed) as delayed, min(each.since) as since,
        sum(each.running) as running, sum(each.parked) as parked, sum(each.completed) as completed, sum(each.failed) as failed,
        sum(each.cancelled) as cancelled, sum(each.usd) as usd, sum(each.possible_usd) as possible_usd
      from (
        select n.provider, n.model, p.waiting, p.delayed, p.since, null::bigint as running, null::bigint as parked,
          null::bigint as completed, null::bigint as failed, null::bigint as cancelled, null::numeric as usd, null::numeric as possible_usd
        from pending p join named n on n.name = p.name
        union all
        select n.provider, n.model, null, null, null, r.running, r.parked, null, null, null, null, null
        from running r join named n on n.name = r.name
        union all
        select n.provider, n.model, null, null, null, null, null, s.completed, s.failed, s.cancelled, null, null
        from settled s join named n on n.name = s.name
        union all
        select c.provider, c.model, null, null, null, null, null, null, null, null, c.usd, c.possible_usd from calls c
        where coalesce(c.usd, c.possible_usd) is not null
        union all
        -- A closing is told, also where nothing waits.
        select s.provider, s.model, null, null, null, null, null, null, null, null, null, null
        from status s where s.state not in ('open', 'unserved', 'storage')
      ) each
      group by 1, 2
    ) sums
    left join image_jobs.provider_limits common on common.provider = sums.provider and common.model is null
    left join image_jobs.provider_limits own on own.provider = sums.provider and own.model = sums.model
  ),
  providers as materialized (
    select m.provider, sum(m.waiting) as waiting, sum(m.delayed) as delayed, min(m.since) as since, sum(m.running) as running,
      sum(m.parked) as parked, sum(m.completed) as completed, sum(m.failed) as failed, sum(m.cancelled) as cancelled,
      sum(m.usd) as usd, sum(m.possible_usd) as possible_usd
    from models m group by 1
  ),
  told as materialized (
    select e.payload -> 'data' as data, coalesce(split_part(coalesce(r.routed_to, r.processor), ':', 1), '') as provider
    from public.run_events e join public.runs r on r.id = e.run_id
    where e.run_kind = 'image_gen' and e.kind = 'error' and e.payload ->> 'event' in ('incident', 'warning') and e.ts > v_from
  )
  select jsonb_build_object(
    'at', v_now,
    'from', v_from,
    'alerts', (
      select coalesce(jsonb_agg(to_jsonb(a) order by a.severity, a.since, a.name, a.subject), '[]') from image_jobs.alerts a),
    'totals', (
      select jsonb_build_object(
        'waiting', coalesce(sum(p.waiting), 0), 'delayed', coalesce(sum(p.delayed), 0),
        'oldest_wait', extract(epoch from v_now - min(p.since)),
        'running', coalesce(sum(p.running), 0), 'parked', coalesce(sum(p.parked), 0),
        'slots', (select coalesce(sum(l.slots), 0) from living l), 'daemons', (select count(*) from living),
        'completed', coalesce(sum(p.completed), 0), 'failed', coalesce(sum(p.failed), 0), 'cancelled', coalesce(sum(p.cancelled), 0),
        'usd', coalesce(sum(p.usd), 0), 'possible_usd', coalesce(sum(p.possible_usd), 0),
        'usd_today', (select coalesce(sum(c.usd_today), 0) from calls c),
        'possible_usd_today', (select coalesce(sum(c.possible_usd_today), 0) from calls c))
      from providers p),
    'step', extract(epoch from v_step),
    'series', (
      select jsonb_agg(jsonb_build_object('at', s.at, 'completed', s.completed, 'failed', s.failed,
        'generate_p50_ms', round(s.percentiles[1]), 'generate_p95_ms', round(s.percentiles[2]), 'usd', s.usd) order by s.at)
      from series s),
    'queue', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'provider', p.provider, 'pending', coalesce(p.waiting, 0), 'delayed', coalesce(p.delayed, 0),
        'running', coalesce(p.running, 0), 'parked', coalesce(p.parked, 0), 'completed', coalesce(p.completed, 0),
        'failed', coalesce(p.failed, 0), 'cancelled', coalesce(p.cancelled, 0),
        'oldest_wait', extract(epoch from v_now - p.since), 'usd', coalesce(p.usd, 0),
        'per_minute', l.per_minute, 'max_running', l.max_running, 'paused', coalesce(l.paused, false),
        'blocked_until', case when s.state = 'blocked' then s.until end,
        'state', coalesce(s.state, 'unserved'), 'since', s.since, 'until', s.until, 'sentence', s.sentence
      ) order by p.provider), '[]')
      from providers p
      left join image_jobs.provider_limits l on l.provider = p.provider and l.model is null
      left join status s on s.provider = p.provider and s.model is null),
    'models', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'provider', m.provider, 'model', m.model, 'waiting', coalesce(m.waiting, 0), 'delayed', coalesce(m.delayed, 0),
        'oldest_wait', extract(epoch from v_now - m.since), 'running', coalesce(m.running, 0), 'parked', coalesce(m.parked, 0),
        'per_minute', m.per_minute, 'max_running', m.max_running,
        'completed', coalesce(m.completed, 0), 'failed', coalesce(m.failed, 0), 'cancelled', coalesce(m.cancelled, 0),
        'failure_share', round(m.failed / nullif(m.completed + m.failed, 0), 4),
        'generate_p50_ms', round(t.percentiles[1]), 'generate_p95_ms', round(t.percentiles[2]),
        'usd', coalesce(m.usd, 0), 'possible_usd', coalesce(m.possible_usd, 0),
        'state', coalesce(s.state, 'unserved'), 'since', s.since, 'until', s.until, 'sentence', s.sentence
      ) order by m.provider, m.model), '[]')
      from models m
      left join timed t on t.provider = m.provider and t.model = m.model
      left join lateral (
        select own.* from status own
        where own.provider = m.provider and (own.model = m.model or own.model is null)
        order by own.model nulls last limit 1
      ) s on true
      where m.model is not null),
    'failures_by_code', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'code', f.code, 'count', f.count, 'last', f.last, 'providers', f.providers, 'example', f.example,
        'error', r.payload ->> 'error', 'hint', r.payload ->> 'hint') order by f.count desc, f.code), '[]')
      from (
        select e.code, count(*) as count, max(e.finished_at) as last, (array_agg(e.id order by e.finished_at desc))[1] as example,
          array_agg(distinct n.provider) as providers
        from ended e join named n on n.name = e.name where e.status = 'failed' group by 1 order by 2 desc limit 50
      ) f
      join public.runs r on r.id = f.example),
    'storage', (
      select jsonb_build_object('stored', uploads.stored, 'failed', uploads.failed,
        'success_rate', round(uploads.stored / nullif(uploads.stored + uploads.failed, 0), 4))
      from (
        select (select coalesce(sum(p.completed), 0) from providers p) as stored, count(*)::numeric as failed
        from ended e where e.code like 'storage\_%'
      ) uploads),
    'base64_refused', (select count(*) from told t where (t.data ->> 'base64')::boolean),
    'webhooks', (
      select coalesce(jsonb_agg(jsonb_build_object('provider', w.provider, 'accepted', w.accepted, 'duplicates', w.duplicates,
        'refused', w.refused, 'late', w.late) order by w.provider), '[]')
      from (
        select each.provider, sum(each.accepted) as accepted, sum(each.duplicates) as duplicates, sum(each.refused) as refused,
          sum(each.late) as late
        from (
          select c.provider, c.accepted, c.duplicates, c.refused, 0 as late from image_jobs.webhook_counters c
          where c.minute > v_from - interval '1 min'
          union all
          select t.provider, 0, 0, 0, 1 from told t where t.data ->> 'webhook' = 'late'
        ) each
        group by 1
      ) w),
    'cancellations', (
      select jsonb_build_object('waiting', count(*), 'tried', count(*) filter (where c.tries > 0),
        'oldest_wait', extract(epoch from v_now - min(c.requested_at)))
      from image_jobs.cancellations c),
    'daemons', (
      select coalesce(jsonb_agg(jsonb_build_object('id', d.id, 'name', d.name, 'state', d.state, 'version', d.version,
        'in_flight', d.in_flight, 'slots', d.slots, 'providers', d.providers, 'started_at', d.started_at, 'seen_at', d.seen_at,
        'last_beat', extract(epoch from v_now - d.seen_at)) order by d.started_at), '[]')
      from image_jobs.daemon_status d where d.state in ('alive', 'draining', 'silent')),
    'failures', (
      select coalesce(jsonb_agg(jsonb_build_object('id', f.id, 'workflow_id', f.subject_id, 'finished_at', f.finished_at,
        'processor', f.processor, 'attempt', f.attempt, 'code', f.payload ->> 'code', 'error', f.payload ->> 'error',
        'hint', f.payload ->> 'hint') order by f.finished_at desc), '[]')
      from (
        -- By claim, which the index has; that is nearly the sequence in which they ended.
        select r.* from public.runs r
        where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
          and r.claim >= v_day_ago and r.status = 'failed' and r.finished_at is not null
        order by r.claim desc limit 10
      ) f)
  ) into v_board;
  return v_board;
end
$$;
