-- Tallies: what became of calls, and of runs that ended without a daemon's settlement (cancelled, taken over for the last time,
-- refused by the database). One daemon takes each for its metrics, and one for its log: so all daemons together count everything
-- once. One without metrics logs, and leaves the counting to others.

-- Unlogged: a crash loses the last seconds, as it does of the counters themselves.
create unlogged table if not exists image_jobs.tallies (
  id bigint generated always as identity primary key,
  metric text not null,
  provider text not null,
  model text not null,
  result text not null,
  code text,
  count bigint not null,
  usd numeric,
  run_id varchar,
  workflow_id uuid,
  node_id text,
  error text,
  at timestamptz not null default image_jobs.now(),
  logged boolean not null default false
);
comment on table image_jobs.tallies is
  'What daemons have still to count and log. Empty again every few seconds; after five minutes where no daemon has metrics.';
create index if not exists tallies_to_log on image_jobs.tallies (id) where run_id is not null and not logged;

-- Tally calls whose state has just changed, and the USD: the cost of a charged one, the estimate of an unknown one. A call that was
-- unknown, and is charged later, counts as both.
create or replace function image_jobs.tally_calls(p_calls bigint[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into image_jobs.tallies (metric, provider, model, result, count, usd)
  select 'calls', c.provider, c.model, c.state, count(*),
    sum(case c.state when 'charged' then c.cost when 'unknown' then c.estimate end)
  from image_jobs.calls c
  where c.id = any (p_calls)
  group by c.provider, c.model, c.state;
end
$$;

-- Take what is to be counted: {metric, provider, model, result, code, count, usd, logged (a daemon has logged it), and of a run that
-- failed run_id, workflow_id, node_id, error}. metric: runs, calls, webhooks (result: accepted, duplicate, refused), base64.
-- p_counts false: only look at what is still to be logged.
create or replace function image_jobs.take_tallies(p_counts boolean)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_hashjoin = off set enable_mergejoin = off set enable_nestloop = on set enable_seqscan = off set jit = off
as $$
begin
  if not p_counts then
    return query
    update image_jobs.tallies t set logged = true
    where t.id = any (array(
      select q.id from image_jobs.tallies q where q.run_id is not null and not q.logged order by q.id limit 10000 for update skip locked))
    returning jsonb_strip_nulls(jsonb_build_object(
      'metric', t.metric, 'provider', t.provider, 'model', t.model, 'result', t.result, 'code', t.code, 'count', t.count,
      'run_id', t.run_id, 'workflow_id', t.workflow_id, 'node_id', t.node_id, 'error', t.error, 'logged', false));
    -- The oldest alone is looked at as a rule.
    if (select t.at from image_jobs.tallies t order by t.id limit 1) < image_jobs.now() - interval '5 min' then
      delete from image_jobs.tallies t
      where t.id = any (array(
        select q.id from image_jobs.tallies q where q.at < image_jobs.now() - interval '5 min'
        order by q.id limit 10000 for update skip locked));
    end if;
    return;
  end if;
  return query
  with taken as (
    delete from image_jobs.tallies t
    where t.id = any (array(select q.id from image_jobs.tallies q order by q.id limit 10000 for update skip locked))
    returning t.*
  )
  select jsonb_strip_nulls(jsonb_build_object(
    'metric', t.metric, 'provider', t.provider, 'model', t.model, 'result', t.result, 'code', t.code, 'count', sum(t.count),
    'usd', sum(t.usd), 'run_id', t.run_id, 'workflow_id', t.workflow_id, 'node_id', t.node_id, 'error', t.error, 'logged', t.logged))
  from taken t
  group by t.metric, t.provider, t.model, t.result, t.code, t.run_id, t.workflow_id, t.node_id, t.error, t.logged;

  -- The counters of webhooks are there already: the last minutes of each provider.
  return query
  with seen as (
    select c.provider, c.minute, c.slot, c.told from (
      select p.name from image_jobs.providers p union select unnest(array['openai', 'midjourney', 'hmac', 'unknown'])
    ) p (name)
    join image_jobs.webhook_counters c on c.provider = p.name and c.minute > image_jobs.now() - interval '10 min'
    where c.told <> array[c.accepted, c.duplicates, c.refused]
    for update of c skip locked
  ),
  told as (
    update image_jobs.webhook_counters c set told = array[c.accepted, c.duplicates, c.refused]
    from seen s
    where c.provider = s.provider and c.minute = s.minute and c.slot = s.slot
    returning c.provider, s.told as before, c.told as now
  )
  select jsonb_build_object('metric', 'webhooks', 'provider', t.provider, 'result', r.name, 'count', sum(t.now[r.n] - t.before[r.n]))
  from told t cross join unnest(array['accepted', 'duplicate', 'refused']) with ordinality as r (name, n)
  group by t.provider, r.name
  having sum(t.now[r.n] - t.before[r.n]) > 0;
end
$$;

-- Returns what gauges show: {gauge, provider, value, and of a closed one its reason}. waiting and oldest_waiting: of what is due;
-- closed: 1 for each reason for which nothing of a provider, or of a model of it, starts.
create or replace function image_jobs.gauges()
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
  return query
  select jsonb_build_object('gauge', g.name, 'provider', w.provider, 'value', g.value)
  from (
    -- Of its lane: invented providers share one.
    select split_part(r.lane, ':', 1) as provider, count(*) as waiting,
      extract(epoch from image_jobs.now() - min(r.due_at)) as oldest
    from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
    group by 1
  ) w
  cross join lateral (values ('waiting', w.waiting::numeric), ('oldest_waiting', w.oldest)) g (name, value);
  return query
  select distinct jsonb_build_object('gauge', 'closed', 'provider', s.provider, 'reason', s.state, 'value', 1)
  from image_jobs.provider_status() s where s.state <> 'open';
end
$$;
