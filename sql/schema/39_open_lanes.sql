-- Lanes that may start now: the limits that leave room, the lanes in which runs wait, and their first runs.

-- Returns how many runs are running at a provider, or of one model of it, counted no further than p_limit, whatever else is.
-- By processor, not by lane: what was started before its model had a limit stands in the provider's lane.
create or replace function image_jobs.count_running(p_provider text, p_model text, p_limit integer)
returns integer language plpgsql volatile set search_path = ''
as $$
begin
  return (
    select count(*)
    from (
      select from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'running'
        and r.lane in (select distinct n.lane from image_jobs.lanes n where split_part(n.lane, ':', 1) = p_provider)
        and (p_model is null or coalesce(r.routed_to, r.processor) = p_provider || ':' || p_model)
      limit p_limit
    ) counted);
end
$$;

-- Returns how many more runs a provider (or one model of it) may start now; null: without limit.
-- Exact only if the caller holds the locks of the rows: then no other start can be on its way.
create or replace function image_jobs.available_starts(p_provider text, p_lane text)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_second bigint := floor(extract(epoch from v_now));
  v_streak image_jobs.provider_streaks := image_jobs.streak_of(p_provider);
  v_limit record;
  v_left integer;
  v_least integer;
begin
  if exists (
    select from image_jobs.provider_blocks b
    where b.provider = p_provider and b.until > v_now and (b.model is null or b.model = image_jobs.drawing_model(p_lane)))
  then
    return 0;
  end if;
  if v_streak.closings > 0 then
    v_least := case when v_streak.probed_at > v_now - interval '30 s' then 0 else 1 end;
  end if;
  for v_limit in
    select l.* from image_jobs.limits_of(p_provider) l where l.model is null or l.provider || ':' || l.model = p_lane
  loop
    if v_limit.paused then
      return 0;
    end if;
    if v_limit.per_minute is not null then
      -- Whole seconds: a start counts for 60 to 61 seconds, so no minute ever sees more than its limit.
      select v_limit.per_minute - coalesce(sum(recent.starts), 0) into v_left
      from image_jobs.starts_of(v_limit.id) last
      cross join lateral unnest(last.at, last.starts) as recent (at, starts)
      where recent.at between v_second - 60 and v_second + 60;
      v_least := least(v_least, v_left);
    end if;
    if v_limit.max_running is not null then
      v_least := least(
        v_least, v_limit.max_running - image_jobs.count_running(p_provider, v_limit.model, v_limit.max_running));
    end if;
  end loop;
  return case when v_least is not null then greatest(v_least, 0) end;
end
$$;

-- Count runs that have started, in each limit that applies to them. The caller holds the rows' locks.
create or replace function image_jobs.record_starts(p_provider text, p_lane text, p_starts integer)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_second bigint := floor(extract(epoch from image_jobs.now()));
  v_limit bigint;
  v_last image_jobs.recent_starts;
begin
  for v_limit in
    select l.id from image_jobs.limits_of(p_provider) l
    where (l.model is null or l.provider || ':' || l.model = p_lane) and l.per_minute is not null
  loop
    v_last := image_jobs.starts_of(v_limit);
    delete from image_jobs.recent_starts s where s.limit_id = v_limit and s.version = v_last.version;
    insert into image_jobs.recent_starts (limit_id, at, starts)
    select v_limit, array_agg(s.at order by s.at), array_agg(s.starts order by s.at)
    from (
      select r.at, sum(r.starts) as starts
      from (select * from unnest(v_last.at, v_last.starts) union all select v_second, p_starts) r (at, starts)
      where r.at between v_second - 60 and v_second + 60
      group by r.at
    ) s;
  end loop;
end
$$;

-- The plans of the functions below are pinned by claim_runs, which calls them: its settings reach into what it calls.
-- Each locks the runs it changes, without those that are set aside, and changes them by image_jobs.change_runs.

-- Returns the providers that a daemon claims for: those it serves, and those that no living daemon has served for its grace
-- (a deploy), since some daemon has to say that the key is missing.
create or replace function image_jobs.claimable_providers(p_served text[], p_grace interval, p_full_scan boolean)
returns text[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := image_jobs.due_from('', p_full_scan);
begin
  return p_served || array(
    select distinct split_part(l.lane, ':', 1)
    from image_jobs.lanes l
    where not split_part(l.lane, ':', 1) = any (p_served)
      and (l.lane = '?' or exists (select from image_jobs.providers p where p.name = split_part(l.lane, ':', 1)))
      and (
        exists (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
            and r.lane = l.lane and r.priority = l.priority
            and r.rank >= case when p_full_scan then 0 else least(l.watermark, l.passed_over) end
          order by r.rank, r.ticket offset 0)
        or exists (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'running' and r.lane = l.lane
            and r.due_at between image_jobs.due_from(l.lane, p_full_scan) and v_now and r.claimed_by is null
          order by r.due_at offset 0)
        or exists (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null
            and r.due_at between v_from and v_now and r.lane = l.lane
          order by r.due_at offset 0))
      -- The daemons, with all their beats, are looked at only where it matters.
      and not exists (
        select from image_jobs.daemons d
        where split_part(l.lane, ':', 1) = any (d.providers) and d.seen_at > v_now - p_grace));
end
$$;

-- Returns the lanes of these providers in which runs wait that may start now, higher priorities first, else at random.
create or replace function image_jobs.open_lanes(p_providers text[], p_full_scan boolean)
returns image_jobs.lanes[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := image_jobs.due_from('', p_full_scan);
  v_lanes image_jobs.lanes[];
  v_first timestamptz;
begin
  with put_off as materialized (
    select r.lane, r.priority, r.due_at from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
    order by r.due_at limit 200
  ),
  -- A run that was put off has opened no lane; it is to be claimed with the others of its priority.
  opened as (
    insert into image_jobs.opened_lanes as o (lane, priority)
    select distinct p.lane, p.priority from put_off p
    where not exists (select from image_jobs.opened_lanes l where l.lane = p.lane and l.priority = p.priority)
    on conflict do nothing
    returning row(o.lane, o.priority, 0, null, null)::image_jobs.lanes as lane
  )
  select array_agg(each.lane order by l.priority desc, random()), (select min(p.due_at) from put_off p) into v_lanes, v_first
  from (select l from image_jobs.lanes l union all select o.lane from opened o) as each (lane)
  cross join lateral (select (each.lane).*) l
  where split_part(l.lane, ':', 1) = any (p_providers)
    and image_jobs.available_starts(split_part(l.lane, ':', 1), l.lane) is distinct from 0
    and (
      exists (
        select from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
          and r.lane = l.lane and r.priority = l.priority
          and r.rank >= case when p_full_scan then 0 else least(l.watermark, l.passed_over) end
        order by r.rank, r.ticket offset 0)
      or exists (select from put_off p where p.lane = l.lane and p.priority = l.priority));
  perform image_jobs.move_due_mark('', v_first);
  return v_lanes;
end
$$;

-- Put runs that were put off and are due now in line, 200 at a time: those that have been at work (their claim has a call, or
-- they have lost an attempt) at the front of their lanes, where they were, all others behind the last of their user.
create or replace function image_jobs.promote_due(p_full_scan boolean)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := image_jobs.due_from('', p_full_scan);
  v_aside varchar[];
  v_runs varchar[];
begin
  if not exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
    order by r.due_at offset 0)
  then
    return;
  end if;
  v_aside := image_jobs.runs_set_aside();
  select array_agg(due.id) into v_runs
  from (
    select r.id from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
      and not r.id = any (v_aside)
    order by r.due_at limit 200
    for update skip locked
  ) due;
  if v_runs is not null then
    perform image_jobs.change_runs('promote_runs', v_runs);
  end if;
end
$$;

create or replace function image_jobs.promote_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set lane = due.lane,
    rank = coalesce(due.front, image_jobs.next_rank(coalesce(r.created_by, r.subject_id), due.lane, r.priority)),
    workflow_rank = coalesce(case when due.front is not null then r.workflow_rank end, image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, due.lane, r.priority))
  from (
    select o.id, l.lane, case when o.attempt > 0 or exists (select from image_jobs.calls c where c.id = o.claim) then (
      select least(n.watermark, n.passed_over) from image_jobs.lanes n where n.lane = l.lane and n.priority = o.priority) end as front
    from unnest(p_runs) as p (id) join public.runs o on o.id = any (array[p.id])
    cross join lateral (select image_jobs.lane_of(coalesce(o.routed_to, o.processor)) as lane) l
  ) due
  where r.id = any (array[due.id]);
  return null;
end
$$;

-- Move runs from a provider's lane into those of their models: one that was inserted while its model got a limit may stand
-- in the wrong lane. Returns whether models of this provider have limits.
create or replace function image_jobs.move_to_model_lanes(p_lane image_jobs.lanes, p_limit integer)
returns boolean language plpgsql volatile set search_path = ''
as $$
declare
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
begin
  if not exists (
    select from image_jobs.limits_of(p_lane.lane) l where l.model is not null)
  then
    return false;
  end if;
  select array_agg(next.id) into v_runs
  from (
    select r.id, coalesce(r.routed_to, r.processor) as processor from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
      and r.lane = p_lane.lane and r.priority = p_lane.priority and not r.id = any (v_aside)
    order by r.rank, r.ticket limit p_limit
    for update skip locked
  ) next
  where image_jobs.lane_of(next.processor) <> p_lane.lane;
  if v_runs is not null then
    perform image_jobs.change_runs('move_runs', v_runs);
  end if;
  return true;
end
$$;

create or replace function image_jobs.move_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set lane = image_jobs.lane_of(coalesce(r.routed_to, r.processor)),
    rank = image_jobs.next_rank(
      coalesce(r.created_by, r.subject_id), image_jobs.lane_of(coalesce(r.routed_to, r.processor)), r.priority),
    workflow_rank = image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, image_jobs.lane_of(coalesce(r.routed_to, r.processor)), r.priority)
  where r.id = any (p_runs);
  return null;
end
$$;

-- Returns the processors that runs in a provider's lane wait for and whose model is not blocked; null where none is blocked.
-- The models on offer, and at most 100 others: their names may be anything, and must not stand before those. Goes from one name to
-- the next in runs_ready_by_name, so that it costs nothing how many runs wait for each.
create or replace function image_jobs.unblocked_names(p_lane image_jobs.lanes)
returns varchar[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_blocked text[];
  v_name varchar := '';
  v_names varchar[];
  v_offered integer;
begin
  select array_agg(b.model) into v_blocked from image_jobs.provider_blocks b
  where b.provider = p_lane.lane and b.model is not null and b.until > v_now;
  if v_blocked is null then
    return null;
  end if;
  v_names := array(
    select n.name from image_jobs.models m
    cross join lateral (select p_lane.lane || ':' || m.model as name) n
    where m.provider = p_lane.lane and image_jobs.drawing_model(n.name) <> all (v_blocked));
  v_offered := cardinality(v_names);
  for v_look in 1..1000 loop
    v_name := (
      select coalesce(r.routed_to, r.processor) from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority and coalesce(r.routed_to, r.processor) > v_name
      order by coalesce(r.routed_to, r.processor) limit 1);
    exit when v_name is null or cardinality(v_names) = v_offered + 100;
    if v_name <> all (v_names) and image_jobs.drawing_model(v_name) <> all (v_blocked) then
      v_names := v_names || v_name;
    end if;
  end loop;
  return v_names;
end
$$;

-- Returns the runs of a lane that come first, from a rank on; with names, only those of them.
create or replace function image_jobs.first_waiting(
  p_lane image_jobs.lanes, p_names varchar[], p_from bigint, p_aside varchar[], p_limit integer)
returns varchar[] language plpgsql volatile set search_path = ''
as $$
begin
  if p_names is null then
    return array(
      select r.id from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority and r.rank >= p_from and not r.id = any (p_aside)
      order by r.rank, r.ticket limit p_limit);
  end if;
  return array(
    select first.id
    from unnest(p_names) as open (name)
    cross join lateral (
      select r.id, r.rank, r.ticket from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority
        and coalesce(r.routed_to, r.processor) = open.name and r.rank >= p_from and not r.id = any (p_aside)
      order by r.rank, r.ticket limit p_limit
    ) first
    order by first.rank, first.ticket limit p_limit);
end
$$;

-- Returns the runs that go in the places of these: of each user the first by workflow_rank, so that a user's second workflow
-- does not wait behind all runs of the first. Places are given back: a run that others of its user go before takes theirs.
-- Looks at a hundred waiting runs of a user more than it needs, for those of other models (p_names) may stand before them.
-- The caller holds the locks of these runs.
create or replace function image_jobs.share_places(
  p_lane image_jobs.lanes, p_runs varchar[], p_names varchar[], p_models boolean, p_aside varchar[], p_full_scan boolean)
returns varchar[] language plpgsql volatile set search_path = ''
as $$
declare
  v_before varchar[];
  v_runs varchar[];
  v_waiting varchar[];
begin
  select array_agg(b.id) into v_before
  from (
    select coalesce(r.created_by, r.subject_id) as owner, count(*) as places, max(r.workflow_rank) as last
    from unnest(p_runs) as p (id) join public.runs r on r.id = any (array[p.id])
    group by 1
  ) o
  cross join lateral (
    select w.id, w.processor from (
      select r.id, coalesce(r.routed_to, r.processor) as processor, r.workflow_rank, r.ticket from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) = o.owner
        and num_nulls(r.rank) = 0 and r.lane = p_lane.lane and r.priority = p_lane.priority
        and r.workflow_rank >= case when p_full_scan then 0
          else coalesce(image_jobs.served_rank(o.owner, p_lane.lane, p_lane.priority), 0) end
        and r.workflow_rank <= o.last
      order by r.workflow_rank, r.ticket limit o.places + case when p_names is null and not p_models then 0 else 100 end
    ) w
    where (p_names is null or w.processor = any (p_names))
      and (not p_models or image_jobs.lane_of(w.processor) = p_lane.lane) and not w.id = any (p_aside)
    order by w.workflow_rank, w.ticket limit o.places
  ) b
  where not b.id = any (p_runs);
  if v_before is null then
    return p_runs;
  end if;
  v_before := array(
    select r.id from public.runs r
    where r.id = any (v_before) and r.status = 'pending' and r.rank is not null
      and r.lane = p_lane.lane and r.priority = p_lane.priority
    for update skip locked);
  select array_agg(c.id) filter (where c.place <= c.places), array_agg(c.id) filter (where c.place > c.places and c.given)
  into v_runs, v_waiting
  from (
    select r.id, r.id = any (p_runs) as given,
      count(*) filter (where r.id = any (p_runs)) over (partition by coalesce(r.created_by, r.subject_id)) as places,
      row_number() over (partition by coalesce(r.created_by, r.subject_id) order by r.workflow_rank, r.ticket) as place
    from unnest(p_runs || v_before) as p (id) join public.runs r on r.id = any (array[p.id])
  ) c;
  if v_waiting is not null then
    perform image_jobs.change_runs('swap_ranks', v_waiting || array(
      select c.id from unnest(v_runs) as c (id) where not c.id = any (p_runs)));
  end if;
  return v_runs;
end
$$;

-- Swap the ranks of runs: the first of the array with the first of its second half, and so on. One alone keeps its rank.
create or replace function image_jobs.swap_ranks(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set rank = o.rank
  from unnest(p_runs) with ordinality as p (id, place)
  join public.runs o on o.id = any (array[p_runs[1 + (p.place - 1 + cardinality(p_runs) / 2) % cardinality(p_runs)]])
  where r.id = any (array[p.id]);
  return null;
end
$$;
