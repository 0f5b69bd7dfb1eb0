-- The books: one row for each request to a provider that may be charged. Costs in payloads, events and views are read from
-- here and nowhere else.
--
-- A call is opened by the claim that starts a run and closed by whoever knows what became of it: open → charged, unknown or
-- free, and unknown → charged or free. Lock order: runs, then calls, then nodes and events.

-- No foreign key: a call outlives its run.
create table if not exists image_jobs.calls (
  id bigint primary key,
  run_id varchar not null,
  workflow_id uuid,
  user_id uuid,
  provider text not null,
  model text not null,
  requested_model text not null,
  provider_job_id text,
  estimate numeric,
  cost numeric,
  state text not null default 'open',
  opened_at timestamptz not null,
  closed_at timestamptz,
  ticket bigint not null,
  sent_at timestamptz,
  image boolean not null default false,
  image_at timestamptz,
  constraint calls_state_is_known check (state in ('open', 'charged', 'unknown', 'free')),
  constraint calls_cost_only_when_charged check (cost is null or state = 'charged'),
  constraint calls_closed_at_unless_open check ((closed_at is null) = (state = 'open'))
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);
comment on table image_jobs.calls is 'One row for each request to a provider that may be charged: what it was, and what it cost.';
comment on column image_jobs.calls.id is 'The claim under which the request left.';
comment on column image_jobs.calls.model is 'The model that draws: of a retired one the successor.';
comment on column image_jobs.calls.requested_model is 'The model of runs.processor.';
comment on column image_jobs.calls.estimate is 'USD; counts while the cost is not known.';
comment on column image_jobs.calls.cost is 'USD. Null of a charged call: the price is not known.';
comment on column image_jobs.calls.state is 'open; charged; free; unknown: it may have been charged, and whoever learns more says so.';
comment on column image_jobs.calls.ticket is 'The ticket of the run that the cost belongs to.';
comment on column image_jobs.calls.sent_at is 'When the request went out; null until the daemon has said so.';
comment on column image_jobs.calls.image is 'Whether an image came.';
comment on column image_jobs.calls.image_at is 'When the image was in a daemon''s hands; the latest time, if it was fetched twice.';
create index if not exists calls_of_a_user on image_jobs.calls (user_id, opened_at) where user_id is not null;
create index if not exists calls_of_a_workflow on image_jobs.calls (workflow_id, opened_at);
create index if not exists calls_by_time on image_jobs.calls (opened_at);
create index if not exists calls_of_a_run on image_jobs.calls (run_id);
create index if not exists calls_open on image_jobs.calls (id) where state = 'open';
create index if not exists calls_of_a_provider_job on image_jobs.calls (provider_job_id) where provider_job_id is not null;

-- Returns a claim such that whatever ended since a time has that or a newer one: claims are drawn in the sequence of time, and a
-- run ends within an hour of its last. Read from the calls, each of which is a claim with its time.
create or replace function image_jobs.claim_before(p_at timestamptz)
returns bigint language plpgsql volatile set search_path = ''
as $$
begin
  return coalesce((
    select c.id from image_jobs.calls c where c.opened_at < p_at - interval '1 hour' order by c.opened_at desc limit 1), 0);
end
$$;

-- Refuse a change of state that would falsify the books, and note when a call was closed.
create or replace function image_jobs.guard_call()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if not (old.state = 'open' or old.state = 'unknown' and new.state in ('charged', 'free')) then
    perform image_jobs.refuse(format('A call that is %s cannot become %s.', old.state, new.state),
      'An open call may become charged, unknown or free, and an unknown one charged or free.');
  end if;
  new.closed_at := image_jobs.now();
  return new;
end
$$;

create or replace trigger guard_call before update of state on image_jobs.calls
  for each row when (old.state is distinct from new.state) execute function image_jobs.guard_call();

-- Open the calls of runs that were claimed just now, where the claim begins a request. The caller holds the runs' locks.
-- A run that has a provider job is checked: its call is that of the claim which made the job (runs.call).
-- Equal requests are priced once.
create or replace function image_jobs.open_calls(p_runs varchar[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  insert into image_jobs.calls
    (id, run_id, workflow_id, user_id, provider, model, requested_model, provider_job_id, estimate, opened_at, ticket)
  select r.claim, r.id, r.subject_id, coalesce(r.requeued_by, r.created_by), split_part(priced.processor, ':', 1), priced.model,
    coalesce(substr(r.processor, strpos(r.processor, ':') + 1), ''), r.provider_job_id, priced.estimate, v_now, r.ticket
  from (
    select equal.processor, equal.runs, image_jobs.drawing_model(equal.processor) as model,
      image_jobs.estimate_cost(equal.processor, equal.spec) as estimate
    from (
      select coalesce(o.routed_to, o.processor, '') as processor, jsonb_build_object(
          'quality', o.metadata #> '{promptSpec,quality}', 'size', o.metadata #> '{promptSpec,size}',
          'aspectRatio', o.metadata #> '{promptSpec,aspectRatio}') as spec,
        array_agg(o) as runs
      from public.runs o
      where o.id = any (p_runs) and coalesce(o.call, o.claim) = o.claim
      group by 1, 2
    ) equal
    offset 0
  ) priced
  cross join lateral unnest(priced.runs) r
  on conflict (id) do nothing;
end
$$;

-- Returns the instant that a daemon means by so many seconds ago. A daemon counts by a clock that is never set, and this one
-- is the database's, so no two clocks are compared. Null for null; what is no time, or longer ago than any run, is now.
create or replace function image_jobs.seconds_ago(p_seconds double precision)
returns timestamptz language plpgsql volatile set search_path = ''
as $$
begin
  return case when p_seconds is not null then
    image_jobs.now() - make_interval(secs => case when p_seconds between 0 and 1e9 then p_seconds else 0 end) end;
end
$$;

-- Write down what became of calls: [{"id", "state", …}, …], see sql/README.md. What is exact replaces what is unknown, and
-- nothing replaces what is exact; so it may come twice, late, and in any order. The caller holds the locks of their runs.
create or replace function image_jobs.close_calls(p_calls jsonb)
returns void language plpgsql volatile set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
as $$
begin
  with said as materialized (
    select distinct on (k.id) k.*
    from jsonb_to_recordset(p_calls) as k (
      id bigint, state text, cost numeric, estimate numeric, model text, provider_job_id text,
      sent_ago double precision, image boolean, image_ago double precision)
    order by k.id, array_position(array['charged', 'free', 'unknown', 'open'], k.state)
  ),
  locked as materialized (
    select s.*, c.state as was,
      case when c.state = 'open' or c.state = 'unknown' and s.state in ('charged', 'free')
        then coalesce(s.state, c.state) else c.state end as becomes
    from said s join image_jobs.calls c on c.id = any (array[s.id])
    order by s.id
    for update of c
  ),
  written as (
    update image_jobs.calls c
    set state = l.becomes,
      cost = coalesce(c.cost, case when l.state = 'charged' and l.becomes = 'charged' then l.cost end),
      image = c.image or l.becomes = 'charged' and coalesce(l.image, false),
      estimate = case when l.was in ('open', 'unknown') then coalesce(l.estimate, c.estimate) else c.estimate end,
      model = case when l.was in ('open', 'unknown') then coalesce(l.model, c.model) else c.model end,
      provider_job_id = coalesce(c.provider_job_id, l.provider_job_id),
      sent_at = least(c.sent_at, image_jobs.seconds_ago(l.sent_ago)),
      image_at = coalesce(image_jobs.seconds_ago(l.image_ago), c.image_at)
    from locked l
    where c.id = any (array[l.id])
    returning c.provider, c.model, c.state, c.cost, c.estimate, l.was
  )
  -- As image_jobs.tally_calls does.
  insert into image_jobs.tallies (metric, provider, model, result, count, usd)
  select 'calls', w.provider, w.model, w.state, count(*),
    sum(case w.state when 'charged' then w.cost when 'unknown' then w.estimate end)
  from written w
  where w.state <> w.was
  group by w.provider, w.model, w.state;
end
$$;

-- Returns the calls of a settlement: those that it names, else what follows from its outcome. p_call: runs.call, where the
-- claim still holds.
create or replace function image_jobs.calls_of(p_settlement jsonb, p_call bigint)
returns jsonb language plpgsql immutable set search_path = ''
as $$
begin
  return case
    when jsonb_typeof(p_settlement -> 'calls') = 'array' then p_settlement -> 'calls'
    when p_settlement ->> 'outcome' = 'released' and p_call is not null then '[]'
    else jsonb_build_array(jsonb_build_object(
      'id', coalesce(p_call, (p_settlement ->> 'claim')::bigint),
      'state', case p_settlement ->> 'outcome'
        when 'completed' then 'charged' when 'parked' then 'open' when 'released' then 'free'
        else case when (p_settlement ->> 'refund')::boolean then 'free' else 'unknown' end end,
      'image', p_settlement ->> 'outcome' = 'completed',
      'cost', case when p_settlement ->> 'outcome' = 'completed' then p_settlement -> 'payload' -> 'cost' end,
      'provider_job_id', p_settlement -> 'provider_job_id')) end;
end
$$;

-- Close calls that their runs name no more: what became of them is unknown until the holder says it, or, of a provider job
-- that is being cancelled, the provider. The caller holds the locks of the runs.
create or replace function image_jobs.lose_calls(p_calls bigint[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_changed bigint[];
begin
  -- Of no call the planner takes each condition for met, and any index for a fit one.
  if cardinality(p_calls) = 0 then
    return;
  end if;
  with lost as (
    update image_jobs.calls c set state = 'unknown'
    where c.id = any (p_calls) and c.state = 'open'
      and not exists (select from image_jobs.cancellations x where x.call = c.id offset 0)
    returning c.id
  )
  select array_agg(l.id) into v_changed from lost l;
  if v_changed is not null then
    perform image_jobs.tally_calls(v_changed);
  end if;
end
$$;

-- Returns what a run's payload says of its costs under a ticket: `cost`, the sum of its charged calls, null if one of them is
-- unpriced; `possibleCost`, the estimates of unknown ones. Neither where there is no such call.
create or replace function image_jobs.costs_of(p_run varchar, p_ticket bigint)
returns jsonb language plpgsql stable set search_path = ''
as $$
begin
  return (
    select case when count(*) filter (where c.state = 'charged') = 0 then '{}'
      else jsonb_build_object('cost',
        case when bool_and(c.cost is not null) filter (where c.state = 'charged') then sum(c.cost) end) end
      || case when count(*) filter (where c.state = 'unknown') = 0 then '{}'
      else jsonb_build_object('possibleCost', sum(c.estimate) filter (where c.state = 'unknown')) end
    from image_jobs.calls c
    where c.run_id = p_run and c.ticket = p_ticket);
end
$$;

-- Returns the times of a completed run in milliseconds, {queuedMs, generateMs, storeMs, settleMs}: from insert or requeue until
-- the request of the call left that brought the picture, until that was in hand, until it was stored, until now. Each begins
-- where the one before ends, so they add up to all of it.
create or replace function image_jobs.timings_of(r public.runs, p_call bigint, p_stored_at timestamptz, p_now timestamptz)
returns jsonb language plpgsql stable set search_path = ''
as $$
declare
  v_call image_jobs.calls;
  v_queued_at timestamptz := coalesce(r.queued_at, r.created_at, r.started_at);
  v_sent_at timestamptz;
  v_image_at timestamptz;
  v_stored_at timestamptz;
  v_sent bigint;
  v_image bigint;
  v_stored bigint;
begin
  select c.* into v_call from image_jobs.calls c where c.id = p_call;
  -- Of a job whose submission nobody wrote down, the claim that made it, or the operator's word, is the nearest that is known.
  v_sent_at := coalesce(v_call.sent_at, least(v_call.opened_at, r.submitted_at), v_queued_at);
  v_sent_at := least(greatest(v_sent_at, v_queued_at), p_now);
  v_stored_at := least(greatest(coalesce(p_stored_at, p_now), v_sent_at), p_now);
  v_image_at := least(greatest(coalesce(v_call.image_at, v_stored_at), v_sent_at), v_stored_at);
  v_sent := round(1000 * extract(epoch from v_sent_at - v_queued_at));
  v_image := round(1000 * extract(epoch from v_image_at - v_queued_at));
  v_stored := round(1000 * extract(epoch from v_stored_at - v_queued_at));
  return jsonb_build_object('queuedMs', v_sent, 'generateMs', v_image - v_sent, 'storeMs', v_stored - v_image,
    'settleMs', round(1000 * extract(epoch from p_now - v_queued_at))::bigint - v_stored);
end
$$;

-- Returns the times of a failed run as far as it got, {"timings": {…}}: queuedMs, with a call that left generateMs, and with a
-- picture storeMs. The last of them ends now, so they add up to all of it, too.
create or replace function image_jobs.timings_of_failure(r public.runs, p_now timestamptz)
returns jsonb language plpgsql stable set search_path = ''
as $$
declare
  v_queued_at timestamptz := least(coalesce(r.queued_at, r.created_at, r.started_at), p_now);
  v_sent_at timestamptz;
  v_image_at timestamptz;
  v_sent bigint;
  v_image bigint;
  v_all bigint := round(1000 * extract(epoch from p_now - v_queued_at));
begin
  select least(greatest(c.sent_at, v_queued_at), p_now), case when c.image_at is not null then least(greatest(c.image_at, c.sent_at, v_queued_at), p_now) end
  into v_sent_at, v_image_at
  from image_jobs.calls c where c.id = coalesce(r.call, r.claim) and c.sent_at is not null;
  v_sent := coalesce(round(1000 * extract(epoch from v_sent_at - v_queued_at)), v_all);
  v_image := coalesce(round(1000 * extract(epoch from v_image_at - v_queued_at)), v_all);
  return jsonb_build_object('timings', jsonb_build_object('queuedMs', v_sent)
    || case when v_sent_at is null then '{}' else jsonb_build_object('generateMs', v_image - v_sent) end
    || case when v_image_at is null then '{}' else jsonb_build_object('storeMs', v_all - v_image) end);
end
$$;

-- Returns the cost of a run whose provider job another run has ordered, too, and pays for; nothing for any other run.
create or replace function image_jobs.shared_cost(r public.runs)
returns jsonb language plpgsql stable set search_path = ''
as $$
begin
  if r.call is not null and exists (select from image_jobs.calls c where c.id = r.call and c.run_id <> r.id) then
    return '{"cost": 0}';
  end if;
  return '{}';
end
$$;

-- Bring the costs in the payloads of completed and failed runs up to date, after calls of theirs were closed. The caller holds
-- their locks.
create or replace function image_jobs.refresh_costs(p_runs varchar[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  perform set_config('image_jobs.writer', 'daemon', true);
  update public.runs r
  set payload = r.payload - 'possibleCost' || k.costs
  from (
    select o.id, image_jobs.costs_of(o.id, o.ticket) as costs
    from unnest(p_runs) as p (id) join public.runs o on o.id = any (array[p.id])
    where (o.kind = 'image_gen') is true and o.status in ('completed', 'failed')
  ) k
  where r.id = any (array[k.id])
    and (r.payload -> 'cost', r.payload -> 'possibleCost') is distinct from (k.costs -> 'cost', k.costs -> 'possibleCost')
    and (k.costs <> '{}' or r.payload ? 'possibleCost');
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

-- Returns the call under which a provider job was made for a run, as far as can be told: the one that names the job, else the
-- latest that may have made one.
create or replace function image_jobs.call_of_job(p_run varchar, p_ticket bigint, p_provider text, p_provider_job_id text)
returns bigint language sql stable set search_path = ''
as $$
  select c.id from image_jobs.calls c
  where c.run_id = p_run and c.ticket = p_ticket and c.provider = p_provider
    and (c.provider_job_id = p_provider_job_id or c.provider_job_id is null and c.state in ('open', 'unknown'))
  order by c.provider_job_id is null, c.id desc
  limit 1
$$;

-- Returns which of these settlements are of a provider job that another call has made: {claim: call}. Such a job was found at
-- the provider, where an earlier attempt had made it, or the provider returned the same one to several runs (for a day: ids
-- may begin anew). The caller holds the locks of the runs; only one transaction at a time looks at a job.
create or replace function image_jobs.makers_of_jobs(p_settlements jsonb)
returns jsonb language plpgsql volatile set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
as $$
declare
  v_jobs jsonb;
begin
  select jsonb_agg(jsonb_build_object('run', s.id, 'claim', s.claim, 'job', s.provider_job_id, 'found', s.found,
    'ticket', coalesce(s.ticket, r.ticket), 'provider', split_part(coalesce(s.processor, r.routed_to, r.processor, ''), ':', 1)))
  into v_jobs
  from jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, ticket bigint, processor text, provider_job_id text, found boolean)
  left join public.runs r on r.id = any (array[s.id])
  where s.outcome = 'parked' and s.provider_job_id is not null
    and case when r.claim = s.claim then r.provider_job_id is null else s.ticket is not null end;
  if v_jobs is null then
    return null;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('image_jobs provider job ' || j.name, 0))
  from (
    select distinct j.value ->> 'provider' || ' ' || (j.value ->> 'job') as name from jsonb_array_elements(v_jobs) j order by 1
  ) j;
  return (
    select jsonb_object_agg(j.claim, maker.call)
    from (
      select t.*, min(t.claim) over (partition by t.provider, t.job) as first_claim
      from jsonb_to_recordset(v_jobs) as t (run varchar, claim bigint, ticket bigint, provider text, job text, found boolean)
    ) j
    cross join lateral (select coalesce(
      (select min(c.id)
        from (select k.* from image_jobs.calls k where k.provider_job_id = j.job offset 0) c
        where c.provider = j.provider and c.state <> 'free' and c.opened_at > image_jobs.now() - interval '1 day'),
      case when j.found then (
        select max(c.id)
        from (select k.* from image_jobs.calls k where k.run_id = j.run offset 0) c
        where c.ticket = j.ticket and c.id < j.claim and c.provider = j.provider
          and c.state = 'unknown' and c.provider_job_id is null) end,
      j.first_claim) as call) maker
    where maker.call <> j.claim);
end
$$;

-- Close as unknown the open calls that neither a run nor a cancellation names, of p_limit open ones behind p_after.
-- Returns the last one looked at; null at the end.
create or replace function image_jobs.sweep_calls(p_after bigint default 0, p_limit integer default 5000)
returns bigint language plpgsql volatile set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
as $$
declare
  v_open bigint[];
  v_lost bigint[];
  v_runs varchar[];
  v_changed bigint[];
begin
  select array_agg(o.id order by o.id) into v_open
  from (select c.id from image_jobs.calls c where c.state = 'open' and c.id > p_after order by c.id limit p_limit) o;
  if v_open is null then
    return null;
  end if;
  select array_agg(c.id), array_agg(distinct c.run_id) into v_lost, v_runs from image_jobs.calls c
  where c.id = any (v_open) and c.state = 'open'
    and not exists (select from public.runs r where r.id = c.run_id and c.id in (r.claim, r.call) offset 0)
    and not exists (select from image_jobs.cancellations x where x.call = c.id offset 0);
  if v_lost is not null then
    -- Of a run that is locked the next sweep sees to it.
    with locked as materialized (
      select r.id from public.runs r where r.id = any (v_runs) order by r.id for update skip locked
    )
    select array_agg(k.id) into v_runs from locked k;
    v_runs := coalesce(v_runs, '{}');
    with lost as materialized (
      select c.id from image_jobs.calls c
      where c.id = any (v_lost) and c.state = 'open'
        and (c.run_id = any (v_runs) or not exists (select from public.runs r where r.id = c.run_id offset 0))
        and not exists (select from public.runs r where r.id = c.run_id and c.id in (r.claim, r.call) offset 0)
      order by c.id
      for update skip locked
    ),
    written as (
      update image_jobs.calls c set state = 'unknown' from lost l where c.id = any (array[l.id]) returning c.id
    )
    select array_agg(w.id) into v_changed from written w;
    if v_changed is not null then
      perform image_jobs.tally_calls(v_changed);
    end if;
    perform image_jobs.refresh_costs(v_runs);
  end if;
  return v_open[cardinality(v_open)];
end
$$;
