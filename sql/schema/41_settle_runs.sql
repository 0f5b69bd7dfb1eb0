-- running → completed, failed, pending again, or parked: the daemon writes back, fenced by the claim.

-- Adds events to runs: [{"run_id", "id", "kind", "payload": {"event", "message", …}}, …], in order.
-- One that comes again with its id, since an acknowledgement was lost, is left out.
create or replace function private.add_events(p_events jsonb)
returns void language sql volatile set search_path = ''
as $$
  insert into public.run_events (id, run_id, kind, payload)
  select coalesce((e.value ->> 'id')::uuid, gen_random_uuid()), e.value ->> 'run_id',
    coalesce(e.value ->> 'kind', 'log'), e.value -> 'payload'
  from jsonb_array_elements(p_events) with ordinality as e (value, place)
  order by e.place
  on conflict (id) do nothing
$$;

-- Settles runs. Each settlement is an object:
--   id, claim         the fence
--   outcome           completed | failed | retry | parked | released (what was ordered goes back to parked)
--   payload           the result, or {error, code, hint} (completed, failed, retry)
--   message           for the person at the canvas (retry, parked, released)
--   due_in            seconds until the next try or check (retry, parked)
--   elsewhere         true: another provider may do better; if metadata.fallback has a step left, the run is pending again
--                     and goes there, with all its attempts (failed, retry)
--   refund            true: the provider never accepted the request; the attempt comes back, for at most an hour (retry)
--   provider_job_id   of the order the provider has taken (parked)
--   progress          0-100 (parked)
--   webhook           true: a webhook of the order will come; due_in is how long it is waited for (parked)
--   ticket, processor of the run that the order was made for, and where: if the claim is gone, the order finds its run by
--                     them, or is cancelled (parked)
--   events            [{id, kind, payload}], written before the outcome's own event
--   if_lost           {kind, payload}: the event to write instead, if the claim is gone
-- Answers {id, claim, result} for each: settled; already (this claim was settled before: the acknowledgement was lost);
-- lost (somebody else's by now); busy (the row is
-- locked: send it again with the next turn, nothing waits for it).
-- A retry beyond max_attempts fails the run instead, with the payload's reason.
-- Plans are pinned: rows of runs by their ids, never by walking the table, and everything else hashed.
create or replace function private.settle_runs(p_daemon uuid, p_settlements jsonb)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_nestloop = off set enable_hashjoin = on
  set enable_mergejoin = off set jit = off
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_ids varchar[] := array(select s.value ->> 'id' from jsonb_array_elements(p_settlements) s);
  v_held bigint[];
  v_seen varchar[];
  v_events jsonb;
begin
  if jsonb_array_length(p_settlements) = 0 then
    return;
  end if;
  if exists (
    select from jsonb_array_elements(p_settlements) s
    where coalesce(s.value ->> 'outcome', '') not in ('completed', 'failed', 'retry', 'parked', 'released')
  ) then
    perform private.refuse('A settlement has an unknown outcome.', 'completed, failed, retry, parked or released.');
  end if;
  perform set_config('image_jobs.hand', 'daemon', true);

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
    perform private.add_events(v_events);
  end if;

  update public.runs r
  set
    status = case fate
      when 'elsewhere' then 'pending'
      when 'retry' then case when refunded or r.attempt < r.max_attempts then 'pending' else 'failed' end
      when 'parked' then 'running' when 'released' then case when ordered then 'running' else 'pending' end
      else fate end,
    claimed_by = null,
    attempt = case when fate = 'elsewhere' then 0 else r.attempt end
      - case when (fate = 'retry' and refunded) or (fate = 'released' and not ordered) then 1 else 0 end,
    refused_since = case when fate = 'retry' and s.refund then coalesce(r.refused_since, v_now) end,
    payload = case
      when s.outcome not in ('parked', 'released') then s.payload
        || case when s.outcome = 'completed' then '{}' else jsonb_build_object('attempts', r.attempt) end end,
    message = case
      when fate = 'elsewhere' then private.going_on(s.payload, step)
      when fate in ('retry', 'parked', 'released') then s.message end,
    progress = case s.outcome when 'completed' then 100 when 'parked' then coalesce(s.progress, r.progress) else
      case when fate in ('retry', 'elsewhere') or (fate = 'released' and not ordered) then 0 else r.progress end end,
    preview_url = case when s.outcome = 'parked' then r.preview_url end,
    provider_job_id = case when fate in ('retry', 'elsewhere') then null else coalesce(s.provider_job_id, r.provider_job_id) end,
    submitted_at = case
      when fate in ('retry', 'elsewhere') then null
      when s.provider_job_id is distinct from r.provider_job_id and s.provider_job_id is not null then v_now
      else r.submitted_at end,
    due_at = case
      when fate = 'elsewhere' then v_now
      when fate = 'retry' and not refunded and r.attempt >= r.max_attempts then null
      when fate in ('retry', 'parked', 'released') then v_now + make_interval(secs => coalesce(s.due_in, 0)) end,
    webhook = case fate when 'parked' then case when s.webhook then 'awaited' end when 'released' then r.webhook end,
    -- Among those who wait there already, as a new run would: not in front of them.
    rank = case when fate = 'elsewhere' then private.place_in_line(r.subject_id, private.lane_of(step), r.priority) end,
    lane = case when fate = 'elsewhere' then private.lane_of(step) else r.lane end,
    via = coalesce(step, r.via),
    finished_at = case
      when fate in ('completed', 'failed') or (fate = 'retry' and not refunded and r.attempt >= r.max_attempts)
      then v_now end
  from public.runs o
  join jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, payload jsonb, message text, due_in double precision, refund boolean,
    elsewhere boolean, provider_job_id text, progress integer, webhook boolean
  ) on s.id = o.id and s.claim = o.claim
  cross join lateral (
    select coalesce(s.refund, false) and coalesce(o.refused_since, v_now) > v_now - interval '1 hour' as refunded,
      o.provider_job_id is not null as ordered,
      case when s.elsewhere and s.outcome in ('failed', 'retry')
        then (private.steps_left(o.metadata, o.processor, o.via))[1] end as step
  ) policy
  cross join lateral (select case when step is null then s.outcome else 'elsewhere' end as fate) way
  where r.id = o.id and r.id = any (v_seen) and o.id = any (v_seen) and o.claim = any (v_held);

  -- A claim that is gone: nobody uses what came of it, but it may have been paid for, and that is written down.
  -- Once, also if this answer is lost and the settlement comes again: the event's id follows from the claim. Not if the
  -- run has this very order: then an acknowledgement was lost, and its next check was claimed meanwhile.
  insert into public.run_events (id, run_id, kind, payload)
  select md5('lost claim ' || s.claim)::uuid, s.id, coalesce(s.if_lost ->> 'kind', 'log'), s.if_lost -> 'payload'
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, provider_job_id text, if_lost jsonb)
  join public.runs r on r.id = s.id and r.claim <> s.claim
  where s.if_lost -> 'payload' is not null and s.id = any (v_seen) and r.id = any (v_seen)
    and (s.provider_job_id is null or s.provider_job_id is distinct from r.provider_job_id)
  on conflict (id) do nothing;
  if cardinality(v_held) < cardinality(v_seen) then
    perform private.attach_order(
      split_part(coalesce(s.processor, r.via, r.processor), ':', 1), s.provider_job_id, s.id, s.ticket)
    from jsonb_to_recordset(p_settlements) as s (
      id varchar, claim bigint, outcome text, provider_job_id text, ticket bigint, processor text)
    join public.runs r on r.id = s.id and r.claim <> s.claim
    where s.outcome = 'parked' and s.provider_job_id is not null and s.ticket is not null
      and s.id = any (v_seen) and r.id = any (v_seen);
  end if;

  perform set_config('image_jobs.hand', v_hand, true);

  return query
  select jsonb_build_object('id', s.id, 'claim', s.claim, 'result', case
    when r.claim = s.claim and s.claim = any (v_held) then 'settled'
    when s.id = any (v_seen) and r.claim = s.claim then 'already'
    when s.id = any (v_seen) or r.id is null then 'lost'
    else 'busy' end)
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint)
  left join public.runs r on r.id = s.id and r.id = any (v_ids);
end
$$;
