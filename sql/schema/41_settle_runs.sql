-- running → completed, failed, pending again, or parked: the daemon writes back, fenced by the claim.

-- Add events to runs, in sequence: [{"run_id", "id", "kind", "payload"}, …].
-- One that comes again with its id, since an acknowledgement was lost, is left out.
create or replace function image_jobs.add_events(p_events jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.write_events(array_agg(row((e.value ->> 'id')::uuid, e.value ->> 'run_id',
    coalesce(e.value ->> 'kind', 'log'), e.value -> 'payload')::image_jobs.event order by e.place))
  from jsonb_array_elements(p_events) with ordinality as e (value, place);
end
$$;

-- Returns what became of a run by a settlement of this outcome, for metrics and logs: the daemon asks, the database decides.
-- Its state says it, so it is the same if the settlement comes twice. A reroute begins with attempt 0 and nothing refused.
create or replace function image_jobs.fate_of(r public.runs, p_outcome text)
returns jsonb language plpgsql stable set search_path = ''
as $$
begin
  return jsonb_strip_nulls(jsonb_build_object(
    'outcome', case
      when r.status in ('completed', 'failed', 'cancelled') then r.status
      when p_outcome = 'released' then 'released'
      when r.status = 'running' then 'parked'
      when r.attempt = 0 and r.refused_since is null then 'fallback'
      else 'retried' end,
    'code', r.payload -> 'code', 'error', r.payload -> 'error', 'timings', r.payload -> 'timings'));
end
$$;

-- Settle (acknowledge) runs, fenced by the claim. The keys of a settlement, and what each outcome reads, stand in
-- sql/README.md, "The daemon's JSON".
-- Returns {id, claim, result} for each: settled; already (this claim was settled before: the acknowledgement was lost);
-- lost (the run has another claim by now); busy (the row is locked: send it again with the next sync, nothing waits for it).
-- And of the settled, also where that is said for the second time, what became of the run: see image_jobs.fate_of.
-- A retry beyond max_attempts fails the run instead, with the payload's reason and the hint for that (over_hint).
-- Plans are pinned: rows of runs by their ids, never by walking the table, and everything else hashed.
create or replace function image_jobs.settle_runs(p_daemon uuid, p_settlements jsonb)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_nestloop = off set enable_hashjoin = on
  set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_ids varchar[] := array(select s.value ->> 'id' from jsonb_array_elements(p_settlements) s);
  v_held bigint[];
  v_seen varchar[];
  v_events jsonb;
  v_calls jsonb;
  v_makers jsonb;
begin
  if jsonb_array_length(p_settlements) = 0 then
    return;
  end if;
  if exists (
    select from jsonb_array_elements(p_settlements) s
    where coalesce(s.value ->> 'outcome', '') not in ('completed', 'failed', 'retry', 'parked', 'released')
  ) then
    perform image_jobs.refuse('A settlement has an unknown outcome.', 'completed, failed, retry, parked or released.');
  end if;
  perform set_config('image_jobs.writer', 'daemon', true);

  -- The fence is the claim, also within this batch: it may hold an old and a new claim of the same run.
  with mine as materialized (
    select r.id, r.claim, r.status, r.claimed_by from public.runs r
    where r.id = any (v_ids)
    order by r.id
    for update skip locked
  )
  select array_agg(m.id),
    array_agg(m.claim) filter (where m.status = 'running' and m.claimed_by = p_daemon
      and m.claim = (s.value ->> 'claim')::bigint)
  into v_seen, v_held
  from mine m join jsonb_array_elements(p_settlements) s on s.value ->> 'id' = m.id;
  v_seen := coalesce(v_seen, '{}');
  v_held := coalesce(v_held, '{}');

  select jsonb_agg(e.value || jsonb_build_object('run_id', s.value ->> 'id') order by s.place, e.place) into v_events
  from jsonb_array_elements(p_settlements) with ordinality as s (value, place)
  cross join lateral jsonb_array_elements(s.value -> 'events') with ordinality as e (value, place)
  where (s.value ->> 'claim')::bigint = any (v_held);
  if v_events is not null then
    perform image_jobs.add_events(v_events);
  end if;

  -- The books come first: the payload's costs are read from them. Exact also of a claim that is lost, or a run that is gone.
  -- A request that was answered with the job of another call made nothing.
  if exists (select from jsonb_array_elements(p_settlements) s where s.value ->> 'outcome' = 'parked') then
    v_makers := image_jobs.makers_of_jobs(p_settlements);
  end if;
  select jsonb_agg(k.value) into v_calls
  from jsonb_array_elements(p_settlements) as s (value)
  left join public.runs r on r.id = s.value ->> 'id' and r.id = any (v_ids)
  cross join lateral jsonb_array_elements(
    case when v_makers -> (s.value ->> 'claim') is not null
      then jsonb_build_array(
        jsonb_build_object('id', s.value -> 'claim', 'state', 'free'),
        jsonb_build_object('id', v_makers -> (s.value ->> 'claim'), 'provider_job_id', s.value -> 'provider_job_id'))
      else image_jobs.calls_of(s.value, case when r.claim = (s.value ->> 'claim')::bigint then r.call end) end) as k (value)
  where r.id is null or r.id = any (v_seen);
  if v_calls is not null then
    perform image_jobs.close_calls(v_calls);
  end if;

  update public.runs r
  set
    status = case fate
      when 'reroute' then 'pending'
      when 'retry' then case when over then 'failed' else 'pending' end
      when 'parked' then 'running' when 'released' then case when submitted then 'running' else 'pending' end
      else fate end,
    claimed_by = null,
    attempt = case when fate = 'reroute' then 0 else r.attempt end
      - case when (fate = 'retry' and refunded) or (fate = 'released' and not submitted) then 1 else 0 end,
    refused_since = case when fate = 'retry' and s.refund then coalesce(r.refused_since, v_now) end,
    payload = case
      when s.outcome not in ('parked', 'released') then s.payload
        || case when over and s.over_hint is not null then jsonb_build_object('hint', s.over_hint) else '{}' end
        || image_jobs.shared_cost(r) || image_jobs.costs_of(r.id, r.ticket)
        || case when s.outcome = 'completed' then jsonb_build_object('timings', image_jobs.timings_of(
            r, coalesce((jsonb_path_query_first(s.calls, '$[*] ? (@.image == true).id'))::bigint, r.call, r.claim),
            image_jobs.seconds_ago(s.stored_ago), v_now))
          else jsonb_build_object('attempts', r.attempt) end
        || case when fate = 'failed' or over then image_jobs.timings_of_failure(r, v_now) else '{}' end end,
    message = case
      when fate = 'reroute' then image_jobs.reroute_message(s.payload, step)
      when fate in ('retry', 'parked', 'released') and not over then s.message end,
    progress = case s.outcome when 'completed' then 100 when 'parked' then coalesce(s.progress, r.progress) else
      case when fate in ('retry', 'reroute') or (fate = 'released' and not submitted) then 0 else r.progress end end,
    preview_url = case when s.outcome = 'parked' then r.preview_url end,
    provider_job_id = case when fate in ('retry', 'reroute') then null else coalesce(s.provider_job_id, r.provider_job_id) end,
    call = case fate
      when 'parked' then coalesce(r.call, (v_makers ->> s.claim::text)::bigint, r.claim)
      when 'retry' then null when 'reroute' then null else r.call end,
    submitted_at = case
      when fate in ('retry', 'reroute') then null
      when s.provider_job_id is distinct from r.provider_job_id and s.provider_job_id is not null then v_now
      else r.submitted_at end,
    due_at = case
      when fate = 'reroute' then v_now
      when over then null
      when fate in ('retry', 'parked', 'released') then v_now + make_interval(secs => coalesce(s.due_in, 0)) end,
    webhook = case fate when 'parked' then case when s.webhook then 'awaited' end when 'released' then r.webhook end,
    -- Among the runs that wait there already, as a new run would: not in front of them.
    rank = case when fate = 'reroute'
      then image_jobs.next_rank(coalesce(r.created_by, r.subject_id), image_jobs.lane_of(step), r.priority) end,
    workflow_rank = case when fate = 'reroute' then image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, image_jobs.lane_of(step), r.priority) else r.workflow_rank end,
    lane = case when fate = 'reroute' then image_jobs.lane_of(step) else r.lane end,
    routed_to = coalesce(step, r.routed_to),
    finished_at = case
      when fate in ('completed', 'failed') or over then v_now end
  from public.runs o
  join jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, payload jsonb, message text, due_in double precision, refund boolean,
    refund_for double precision,
    over_hint text, fall_back boolean, provider_job_id text, progress integer, webhook boolean, stored_ago double precision, calls jsonb
  ) on s.id = o.id and s.claim = o.claim
  cross join lateral (
    select coalesce(s.refund, false)
        and coalesce(o.refused_since, v_now) > v_now - make_interval(secs => coalesce(s.refund_for, 3600)) as refunded,
      o.provider_job_id is not null as submitted,
      case when s.fall_back and s.outcome in ('failed', 'retry')
        then (image_jobs.remaining_fallbacks(o.metadata, o.processor, o.routed_to))[1] end as step
  ) policy
  cross join lateral (select case when step is null then s.outcome else 'reroute' end as fate) way
  cross join lateral (select fate = 'retry' and not refunded and o.attempt >= o.max_attempts as over) attempts
  where r.id = o.id and r.id = any (v_seen) and o.id = any (v_seen) and o.claim = any (v_held);

  -- A lost claim: its result is not used, but may have been paid for, so an event records it.
  -- Once, also if this reply is lost and the settlement comes again: the event's id follows from the claim. Not if the run
  -- has this very provider job: then an acknowledgement was lost, and its next check was claimed meanwhile.
  perform image_jobs.write_events(array_agg(row(
    md5('lost claim ' || s.claim)::uuid, s.id, coalesce(s.if_lost ->> 'kind', 'log'), s.if_lost -> 'payload')::image_jobs.event))
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, provider_job_id text, if_lost jsonb)
  join public.runs r on r.id = s.id and r.claim <> s.claim
  where s.if_lost -> 'payload' is not null and s.id = any (v_seen) and r.id = any (v_seen)
    and (s.provider_job_id is null or s.provider_job_id is distinct from r.provider_job_id)
  having count(*) > 0;
  if cardinality(v_held) < cardinality(v_seen) then
    perform image_jobs.refresh_costs(v_seen);
    perform image_jobs.attach_provider_job(
      split_part(coalesce(s.processor, r.routed_to, r.processor), ':', 1), s.provider_job_id, s.id, s.ticket)
    from jsonb_to_recordset(p_settlements) as s (
      id varchar, claim bigint, outcome text, provider_job_id text, ticket bigint, processor text)
    join public.runs r on r.id = s.id and r.claim <> s.claim
    where s.outcome = 'parked' and s.provider_job_id is not null and s.ticket is not null
      and s.id = any (v_seen) and r.id = any (v_seen);
  end if;

  perform set_config('image_jobs.writer', v_writer, true);

  return query
  select jsonb_build_object('id', s.id, 'claim', s.claim, 'result', case
    when r.claim = s.claim and s.claim = any (v_held) then 'settled'
    when s.id = any (v_seen) and r.claim = s.claim then 'already'
    when s.id = any (v_seen) or r.id is null then 'lost'
    else 'busy' end,
    'fate', case when s.id = any (v_seen) and r.claim = s.claim then image_jobs.fate_of(r, s.outcome) end)
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, outcome text)
  left join public.runs r on r.id = s.id and r.id = any (v_ids);
end
$$;
