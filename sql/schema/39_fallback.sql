-- pending → pending at another provider: metadata.fallback names the ones to try when the one before can do nothing.
--
-- A run goes to runs.routed_to, or processor while that is null. Steps are taken forwards only, each at most once.

-- Returns the steps of metadata.fallback that a run may still take, in order. Never fails, whatever old rows hold.
create or replace function image_jobs.remaining_fallbacks(p_metadata jsonb, p_processor varchar, p_routed_to varchar)
returns varchar[] language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_step varchar;
  v_seen varchar[] := array[p_processor];
  v_left varchar[] := '{}';
  v_reached boolean := p_routed_to is null;
begin
  if jsonb_typeof(p_metadata -> 'fallback') is distinct from 'array' then
    return v_left;
  end if;
  for v_step in
    select e.value #>> '{}' from jsonb_array_elements(p_metadata -> 'fallback') with ordinality as e (value, place)
    where jsonb_typeof(e.value) = 'string' and e.value #>> '{}' ~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$'
    order by e.place
  loop
    if v_reached and not v_step = any (v_seen) then
      v_left := v_left || v_step;
    end if;
    v_reached := v_reached or v_step = p_routed_to;
    v_seen := v_seen || v_step;
  end loop;
  return v_left;
end
$$;

-- Returns a number for where a run is and the steps it may still take: runs of one number can move, or none of them can.
create or replace function image_jobs.route_hash(p_metadata jsonb, p_processor varchar, p_routed_to varchar)
returns bigint language plpgsql immutable parallel safe set search_path = ''
as $$
begin
  return hash_array_extended(
    coalesce(p_routed_to, p_processor) || image_jobs.remaining_fallbacks(p_metadata, p_processor, p_routed_to), 0);
end
$$;

-- Waiting runs by that. Runs without a fallback are not in it.
create index if not exists runs_may_be_rerouted
  on public.runs (lane, (image_jobs.route_hash(metadata, processor, routed_to)), due_at)
  where queue_state = 'pending' and metadata ? 'fallback';

-- Returns why nothing will start soon at a provider, or at one model of it: {error, code}; null if it is open. Neither a block of
-- less than 30 s (LONGEST_RATE_LIMIT in daemon/worker/retries.py) nor a daemon that restarts within its lease closes anything,
-- and a limit that is used up is only waited for.
create or replace function image_jobs.closed_reason(p_processor text)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_provider text := split_part(p_processor, ':', 1);
  v_limit record;
  v_block record;
begin
  for v_limit in
    select l.*, l.paused or l.per_minute = 0 or l.max_running = 0 as stopped from image_jobs.limits_of(v_provider) l
    where l.model is null or l.provider || ':' || l.model = p_processor
  loop
    if v_limit.stopped then
      return jsonb_build_object('error', format('%s is paused.', concat_ws(':', v_provider, v_limit.model)), 'code', 'paused');
    end if;
  end loop;
  select b.model, b.reason into v_block from image_jobs.provider_blocks b
  where b.provider = v_provider and b.until >= v_now + interval '30 s'
    and (b.model is null or b.model = image_jobs.drawing_model(p_processor))
  order by b.until desc limit 1;
  if found then
    return jsonb_build_object('error', coalesce(v_block.reason,
      format('%s is closed for a while.', concat_ws(':', v_provider, v_block.model))), 'code', 'blocked');
  end if;
  if not exists (select from image_jobs.daemons d where v_provider = any (d.providers) and d.seen_at > v_now - d.lease) then
    return jsonb_build_object('error', format('No daemon serves %s.', v_provider), 'code', 'not_served');
  end if;
  return null;
end
$$;

-- Returns the first of these steps that is open; null if none is.
create or replace function image_jobs.first_open_fallback(p_steps varchar[])
returns varchar language plpgsql volatile set search_path = ''
as $$
declare
  v_step varchar;
begin
  foreach v_step in array p_steps loop
    if image_jobs.closed_reason(v_step) is null then
      return v_step;
    end if;
  end loop;
  return null;
end
$$;

-- Returns the message for the person at the canvas; p_payload.error is the reason.
create or replace function image_jobs.reroute_message(p_payload jsonb, p_step varchar)
returns text language sql immutable parallel safe set search_path = ''
as $$
  select format('%s Going on with %s.', coalesce(p_payload ->> 'error', 'There is no image yet.'), p_step)
$$;

-- Reroute runs that wait for a closed provider to the first of their steps that is open. Where all are closed, a run
-- stays, and goes with the first one that opens. Called by full scans: looks at 200 routes of a lane, from a random one on, so
-- that routes which lead nowhere, however many, keep no others waiting for ever; moves at most 200 runs of a route, and
-- of 2,000 no more.
create or replace function image_jobs.reroute_runs()
returns void language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set enable_sort = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_lane text;
  v_open boolean;
  v_start bigint;
  v_after bigint;
  v_wrapped boolean;
  v_route record;
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
  v_moved integer := 0;
begin
  perform set_config('image_jobs.writer', 'daemon', true);
  for v_lane in
    select distinct l.lane from image_jobs.lanes l where l.lane <> '?'
  loop
    v_open := image_jobs.closed_reason(v_lane) is null;
    -- An open lane has closed runs only where a model of it is blocked.
    continue when v_open and not exists (
      select from image_jobs.provider_blocks b where b.provider = v_lane and b.model is not null and b.until > v_now);
    v_start := ((random() - 0.5) * 18e18)::bigint;
    v_after := v_start;
    v_wrapped := false;
    for v_look in 1..200 loop
      select image_jobs.route_hash(r.metadata, r.processor, r.routed_to) as hash, coalesce(r.routed_to, r.processor) as name,
        image_jobs.remaining_fallbacks(r.metadata, r.processor, r.routed_to) as steps
      into v_route
      from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane
        and image_jobs.route_hash(r.metadata, r.processor, r.routed_to) > v_after
      order by image_jobs.route_hash(r.metadata, r.processor, r.routed_to) limit 1;
      if not found and not v_wrapped then
        v_wrapped := true;
        v_after := -9223372036854775808;
        continue;
      end if;
      exit when not found or v_wrapped and v_route.hash > v_start or v_moved >= 2000;
      v_after := v_route.hash;
      continue when (v_open and image_jobs.closed_reason(v_route.name) is null)
        or image_jobs.first_open_fallback(v_route.steps) is null;
      select array_agg(m.id) into v_runs
      from (
        select r.id from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane
          and image_jobs.route_hash(r.metadata, r.processor, r.routed_to) = v_route.hash
          and r.due_at <= v_now and not r.id = any (v_aside)
        order by r.due_at limit 200
        for update skip locked
      ) m;
      if v_runs is not null then
        perform image_jobs.change_runs('reroute_each', v_runs);
        v_moved := v_moved + cardinality(v_runs);
      end if;
    end loop;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

create or replace function image_jobs.reroute_each(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set routed_to = m.step, lane = image_jobs.lane_of(m.step), attempt = 0, refused_since = null,
    rank = image_jobs.next_rank(coalesce(r.created_by, r.subject_id), image_jobs.lane_of(m.step), r.priority),
    workflow_rank = image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, image_jobs.lane_of(m.step), r.priority),
    payload = m.closed, message = image_jobs.reroute_message(m.closed, m.step)
  from (
    select o.id, image_jobs.closed_reason(coalesce(o.routed_to, o.processor)) as closed,
      image_jobs.first_open_fallback(image_jobs.remaining_fallbacks(o.metadata, o.processor, o.routed_to)) as step
    from unnest(p_runs) as p (id) join public.runs o on o.id = any (array[p.id])
  ) m
  where r.id = any (array[m.id]) and m.step is not null and m.closed is not null;
  return null;
end
$$;
