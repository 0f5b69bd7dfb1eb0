-- pending → pending elsewhere: metadata.fallback, the providers that are tried when the one before can do nothing.
--
-- Where a run goes is runs.via, or processor while that is null. Steps are taken forwards only, each at most once.

-- The steps of metadata.fallback that a run may still take, in order. Whatever stands in old rows: never fails.
create or replace function private.steps_left(p_metadata jsonb, p_processor varchar, p_via varchar)
returns varchar[] language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_step varchar;
  v_seen varchar[] := array[p_processor];
  v_left varchar[] := '{}';
  v_reached boolean := p_via is null;
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
    v_reached := v_reached or v_step = p_via;
    v_seen := v_seen || v_step;
  end loop;
  return v_left;
end
$$;

-- Waiting runs that have a step left, by their line and the provider of that step. Runs without a fallback are not in it.
create index if not exists runs_may_go_elsewhere
  on public.runs (lane, split_part((private.steps_left(metadata, processor, via))[1], ':', 1), due_at)
  where kind = 'image_gen' and status = 'pending' and metadata ? 'fallback';

-- Why nothing will start soon at a provider, or at one model of it: {error, code}; null if it is open. Neither a short
-- rate limit nor a daemon that restarts within its lease closes anything, and a limit that is used up is only waited for.
create or replace function private.why_closed(p_processor text)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_provider text := split_part(p_processor, ':', 1);
  v_limit record;
begin
  for v_limit in
    select l.*, l.paused or l.per_minute = 0 or l.max_running = 0 as stopped from public.provider_limits l
    where l.provider = v_provider and (l.model is null or l.provider || ':' || l.model = p_processor)
  loop
    if v_limit.stopped then
      return jsonb_build_object('error', format('%s is paused.', concat_ws(':', v_provider, v_limit.model)), 'code', 'paused');
    end if;
    if v_limit.blocked_until > v_now + interval '10 s' then
      return jsonb_build_object('error', coalesce(v_limit.blocked_reason,
        format('%s is closed for a while.', concat_ws(':', v_provider, v_limit.model))), 'code', 'blocked');
    end if;
  end loop;
  if not exists (select from private.daemons d where v_provider = any (d.providers) and d.seen_at > v_now - d.lease) then
    return jsonb_build_object('error', format('No daemon serves %s.', v_provider), 'code', 'not_served');
  end if;
  return null;
end
$$;

-- The first of these steps that is open; null if none is.
create or replace function private.first_open(p_steps varchar[])
returns varchar language plpgsql volatile set search_path = ''
as $$
declare
  v_step varchar;
begin
  foreach v_step in array p_steps loop
    if private.why_closed(v_step) is null then
      return v_step;
    end if;
  end loop;
  return null;
end
$$;

-- For the person at the canvas. p_payload says in `error` what is wrong here.
create or replace function private.going_on(p_payload jsonb, p_step varchar)
returns text language sql immutable parallel safe set search_path = ''
as $$
  select format('%s Going on with %s.', coalesce(p_payload ->> 'error', 'There is no image yet.'), p_step)
$$;

-- Runs that wait for a provider that is closed go on to the first of their steps that is open. Where all are closed,
-- a run stays, and goes with the first one that opens. For thorough turns: at most 200 runs a line and provider at a time.
create or replace function private.pass_on()
returns void language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_lane text;
  v_closed jsonb;
  v_provider text;
begin
  perform set_config('image_jobs.hand', 'daemon', true);
  for v_lane in
    select distinct l.lane from private.lanes l where l.lane <> '?'
  loop
    continue when not exists (
      select from public.runs r
      where r.kind = 'image_gen' and r.status = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane);
    v_closed := private.why_closed(v_lane);
    continue when v_closed is null;
    for v_provider in select p.name from private.providers p order by p.name loop
      with stuck as materialized (
        select r.id, r.via, private.first_open(private.steps_left(r.metadata, r.processor, r.via)) as step
        from public.runs r
        where r.kind = 'image_gen' and r.status = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane
          and split_part((private.steps_left(r.metadata, r.processor, r.via))[1], ':', 1) = v_provider
          and r.due_at <= v_now
        order by r.due_at limit 200
      ),
      movable as materialized (
        select r.id, s.step from stuck s join public.runs r on r.id = s.id
        where s.step is not null and r.status = 'pending' and r.via is not distinct from s.via
        order by r.id
        for update of r skip locked
      )
      update public.runs r
      set via = m.step, lane = private.lane_of(m.step), attempt = 0, refused_since = null,
        rank = private.place_in_line(r.subject_id, private.lane_of(m.step), r.priority),
        payload = v_closed, message = private.going_on(v_closed, m.step)
      from movable m where r.id = m.id;
    end loop;
  end loop;
  perform set_config('image_jobs.hand', v_hand, true);
end
$$;
