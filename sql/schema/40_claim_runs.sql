-- pending → running, and parked → held: the daemon takes work.

-- How many more runs a provider (or one model of it) may start now; null: as many as you like.
-- Exact only if the caller holds the locks of the rows: then no other start can be on its way.
create or replace function private.allowance(p_provider text, p_lane text)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_second bigint := floor(extract(epoch from v_now));
  v_limit record;
  v_left integer;
  v_least integer;
begin
  for v_limit in
    select l.* from public.provider_limits l
    where l.provider = p_provider
      and (l.model is null or l.provider || ':' || l.model = p_lane)
  loop
    if v_limit.paused or v_limit.blocked_until > v_now then
      return 0;
    end if;
    if v_limit.per_minute is not null then
      -- Whole seconds: a start counts for 60 to 61 seconds, so no minute ever sees more than its limit.
      select v_limit.per_minute - coalesce(sum(recent.starts), 0) into v_left
      from unnest(v_limit.recent_at, v_limit.recent_starts) as recent (at, starts)
      where recent.at >= v_second - 60;
      v_least := least(v_least, v_left);
    end if;
    if v_limit.max_running is not null then
      -- By processor, not by lane: what was started before its model had a limit stands in the provider's lane.
      -- Counted no further than the limit, whatever else is running.
      select v_limit.max_running - count(*) into v_left
      from (
        select from public.runs r
        where r.kind = 'image_gen' and r.status = 'running'
          and r.lane in (select distinct n.lane from private.lanes n where split_part(n.lane, ':', 1) = p_provider)
          and (v_limit.model is null or coalesce(r.via, r.processor) = p_provider || ':' || v_limit.model)
        limit v_limit.max_running
      ) counted;
      v_least := least(v_least, v_left);
    end if;
  end loop;
  return case when v_least is not null then greatest(v_least, 0) end;
end
$$;

-- Writes down that runs have started, in each limit that counts them. The caller holds the rows' locks.
create or replace function private.count_starts(p_provider text, p_lane text, p_starts integer)
returns void language sql volatile set search_path = ''
as $$
  update public.provider_limits l
  set (recent_at, recent_starts) = (
    select array_agg(s.at order by s.at), array_agg(s.starts order by s.at)
    from (
      select r.at, sum(r.starts) as starts
      from (select * from unnest(l.recent_at, l.recent_starts) union all select second.now, p_starts) r (at, starts)
      where r.at >= second.now - 60
      group by r.at
    ) s)
  from (select floor(extract(epoch from private.now()))::bigint as now) second
  where l.provider = p_provider and (l.model is null or l.provider || ':' || l.model = p_lane)
    and l.per_minute is not null
$$;

-- What a daemon gets to know of a run it has claimed. made: what an earlier attempt wrote down of a picture it had made,
-- since the last requeue; that picture may lie in storage.
create or replace function private.claimed_run(r public.runs, p_due_at timestamptz)
returns jsonb language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', r.id, 'claim', r.claim, 'ticket', r.ticket, 'subject_id', r.subject_id,
    'processor', coalesce(r.via, r.processor), 'requested', r.processor,
    'metadata', case when jsonb_path_exists(r.metadata, '$.**{65}') then '{}' else coalesce(r.metadata, '{}') end,
    'attempt', r.attempt, 'max_attempts', r.max_attempts,
    'provider_job_id', r.provider_job_id, 'webhook', r.webhook,
    'submitted_ago', extract(epoch from private.now() - r.submitted_at),
    'waited', case when isfinite(p_due_at) then extract(epoch from private.now() - p_due_at) else 0 end,
    'made', case when r.attempt > 1 then (
      select e.payload -> 'data' from public.run_events e
      where e.run_id = r.id and e.payload ->> 'event' = 'generated' and e.payload -> 'data' -> 'ticket' = to_jsonb(r.ticket)
      order by e.seq desc limit 1) end)
$$;

-- Takes up to p_slots runs for a daemon: due checks of parked runs first, then pending runs; higher priorities first,
-- lanes evenly, workflows in turn within a lane. p_thorough looks at whole lanes instead of from their floors: at least
-- once a second of idleness, since a slow transaction may commit a lower rank.
-- Never takes more than the limits allow, however many daemons claim at once. Raises IJ001 if the daemon was fenced.
-- Locks: the daemon's row (against a take-over), then provider_limits, and only then runs (skipping locked ones).
create or replace function private.claim_runs(p_daemon uuid, p_slots integer, p_thorough boolean default false)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_daemon record;
  v_left integer := p_slots;
  v_providers text[];
  v_lanes private.lanes[];
  v_lane private.lanes;
  v_priority integer;
  v_provider text;
  v_peers integer;
  v_quota integer;
  v_claimed jsonb;
  v_rank bigint;
  v_count integer;
  v_last bigint;
  v_models boolean;
begin
  if p_slots <= 0 then
    return;
  end if;
  select d.* into v_daemon from private.daemons d where d.id = p_daemon and d.ended_at is null for key share;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
  perform set_config('image_jobs.hand', 'daemon', true);

  -- Providers this daemon serves. Those that nobody alive serves, or has served in the last ten minutes (a deploy),
  -- are anybody's: somebody has to say that the key is missing.
  select array_agg(p.name) into v_providers
  from (select name from private.providers union all select '?') p
  where p.name = any (v_daemon.providers)
    or not exists (
      select from private.daemons d
      where p.name = any (d.providers) and d.seen_at > v_now - interval '10 minutes');

  -- Lanes in which somebody waits and may go; then the locks of their limits, all at once and in order.
  with put_off as materialized (
    select r.lane, r.priority from public.runs r
    where r.kind = 'image_gen' and r.status = 'pending' and r.rank is null and r.due_at <= v_now
    order by r.due_at limit 200
  )
  select array_agg(l order by l.priority desc, random()) into v_lanes
  from private.lanes l
  where split_part(l.lane, ':', 1) = any (v_providers)
    and private.allowance(split_part(l.lane, ':', 1), l.lane) is distinct from 0
    and (
      exists (
        select from public.runs r
        where r.kind = 'image_gen' and r.status = 'pending' and r.rank is not null
          and r.lane = l.lane and r.priority = l.priority and r.rank >= case when p_thorough then 0 else l.floor end)
      or exists (select from put_off p where p.lane = l.lane and p.priority = l.priority));
  perform from public.provider_limits l
  where l.provider in (select split_part(o.lane, ':', 1) from unnest(v_lanes) o)
    and (l.per_minute is not null or l.max_running is not null)
  order by l.id
  for update;

  -- Whatever was put off and is due now goes to the front of its line.
  with due as materialized (
    select r.id, private.lane_of(coalesce(r.via, r.processor)) as lane from public.runs r
    where r.kind = 'image_gen' and r.status = 'pending' and r.rank is null and r.due_at <= v_now
    order by r.due_at limit 200
    for update skip locked
  )
  update public.runs r
  set lane = due.lane,
    rank = coalesce((select l.floor from private.lanes l where l.lane = due.lane and l.priority = r.priority),
      private.place_in_line(r.subject_id, due.lane, r.priority))
  from due where r.id = due.id;

  -- Parked runs whose check is due. Pausing and limits are about new starts; asking goes on.
  for v_lane in
    select distinct on (l.lane) l.* from private.lanes l where split_part(l.lane, ':', 1) = any (v_providers)
  loop
    exit when v_left <= 0;
    for v_claimed in
      with due as materialized (
        select r.id, r.due_at from public.runs r
        where r.kind = 'image_gen' and r.status = 'running' and r.lane = v_lane.lane
          and r.due_at <= v_now and r.claimed_by is null
        order by r.due_at limit v_left
        for update skip locked
      )
      update public.runs r set claim = nextval('private.claims'), claimed_by = p_daemon, due_at = null
      from due where r.id = due.id
      returning private.claimed_run(r, due.due_at)
    loop
      v_left := v_left - 1;
      return next v_claimed;
    end loop;
  end loop;

  for v_priority in select distinct o.priority from unnest(v_lanes) o order by o.priority desc loop
    -- First an even share for each lane, then what the others left.
    for v_pass in 1..2 loop
      select count(*) into v_peers from unnest(v_lanes) o where o.priority = v_priority;
      exit when v_pass = 2 and v_peers = 1;
      foreach v_lane in array v_lanes loop
        continue when v_lane.priority <> v_priority;
        exit when v_left <= 0;
        v_provider := split_part(v_lane.lane, ':', 1);
        v_quota := case v_pass when 1 then ceil(v_left::numeric / v_peers) else v_left end;
        v_quota := least(v_quota, private.allowance(v_provider, v_lane.lane));
        v_peers := v_peers - 1;
        continue when v_quota <= 0;

        -- A run that was inserted while its model got a limit may stand in the provider's lane: it changes lines.
        v_models := exists (
          select from public.provider_limits l where l.provider = v_lane.lane and l.model is not null);
        if v_models then
          with next as materialized (
            select r.id from public.runs r
            where r.kind = 'image_gen' and r.status = 'pending' and r.rank is not null
              and r.lane = v_lane.lane and r.priority = v_lane.priority
            order by r.rank, r.id limit v_quota
            for update skip locked
          )
          update public.runs r
          set lane = private.lane_of(coalesce(r.via, r.processor)),
            rank = private.place_in_line(r.subject_id, private.lane_of(coalesce(r.via, r.processor)), r.priority)
          from next where r.id = next.id and private.lane_of(coalesce(r.via, r.processor)) <> v_lane.lane;
        end if;

        v_count := 0;
        v_last := null;
        for v_claimed, v_rank in
          with next as materialized (
            select r.id, r.due_at from public.runs r
            where r.kind = 'image_gen' and r.status = 'pending' and r.rank is not null
              and r.lane = v_lane.lane and r.priority = v_lane.priority
              and r.rank >= case when p_thorough then 0 else v_lane.floor end
              and (not v_models or private.lane_of(coalesce(r.via, r.processor)) = r.lane)
            order by r.rank, r.id limit v_quota
            for update skip locked
          )
          update public.runs r
          set status = 'running', claim = nextval('private.claims'), claimed_by = p_daemon, attempt = r.attempt + 1,
            started_at = v_now, due_at = null, payload = null, message = null, preview_url = null
          from next where r.id = next.id
          returning private.claimed_run(r, next.due_at), r.rank
        loop
          v_count := v_count + 1;
          v_last := greatest(v_last, v_rank);
          return next v_claimed;
        end loop;

        continue when v_count = 0;
        v_left := v_left - v_count;
        perform private.count_starts(v_provider, v_lane.lane, v_count);
        -- The floor is a hint: if another daemon is moving it just now, that will do.
        perform from private.lanes l
        where l.lane = v_lane.lane and l.priority = v_lane.priority and l.floor < v_last for update skip locked;
        if found then
          update private.lanes l set floor = v_last where l.lane = v_lane.lane and l.priority = v_lane.priority;
        end if;
      end loop;
    end loop;
  end loop;
  perform set_config('image_jobs.hand', v_hand, true);
end
$$;
