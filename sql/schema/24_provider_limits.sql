-- Limits of providers and models, global over all daemons, and the lanes in which runs wait for them.

create table if not exists image_jobs.provider_limits (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  per_minute integer check (per_minute >= 0),
  max_running integer check (max_running >= 0),
  paused boolean not null default false,
  constraint provider_limits_one_row_each unique nulls not distinct (provider, model),
  -- Written otherwise it would limit nothing.
  constraint provider_limits_name_a_provider check (provider ~ '^[a-z0-9_.-]+$'),
  constraint provider_limits_name_a_model_without_provider
    check (model <> '' and model !~ '\s' and not starts_with(model, provider || ':'))
);
comment on table image_jobs.provider_limits is 'Change by SQL at any time. model null: all models. A null limit: unlimited.';
comment on column image_jobs.provider_limits.per_minute is 'Starts in any 60 seconds, over all daemons; exact.';
comment on column image_jobs.provider_limits.max_running is 'Runs in status running, parked ones included; exact.';
comment on column image_jobs.provider_limits.paused is 'Nothing new is started. What runs goes on.';

-- All that every claim writes stands in tables of its own, and is never updated: a row with the next version takes the place of the
-- last, and the newest is read first. While an old transaction keeps vacuum away, each update of a row would leave a version
-- that all readers of the row walk past, and a claim would cost more with every claim before it.

create table if not exists image_jobs.recent_starts (
  limit_id bigint not null,
  version bigint generated always as identity,
  at bigint[] not null,
  starts integer[] not null,
  primary key (limit_id, version)
);
comment on table image_jobs.recent_starts is 'The starts of the last minute that a limit counts; the newest version holds.';
comment on column image_jobs.recent_starts.at is 'The seconds (epoch) in which runs started …';
comment on column image_jobs.recent_starts.starts is '… and how many started in each.';

-- Returns the starts that a limit counts; null if there were none.
create or replace function image_jobs.starts_of(p_limit bigint)
returns image_jobs.recent_starts language plpgsql volatile set search_path = ''
as $$
declare
  v_starts image_jobs.recent_starts;
begin
  select s.* into v_starts from image_jobs.recent_starts s where s.limit_id = p_limit order by s.version desc limit 1;
  return v_starts;
end
$$;

-- A copy of provider_limits, which operators change as often as they like, for claims.
create table if not exists image_jobs.limits_in_force (
  provider text not null,
  version bigint generated always as identity,
  limits jsonb not null,
  models text[] not null,
  primary key (provider, version)
);
comment on table image_jobs.limits_in_force is 'The rows of provider_limits, by provider; the newest version holds. Kept by a trigger.';
comment on column image_jobs.limits_in_force.models is 'Models that have a row of their own.';

create or replace function image_jobs.carry_limits()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_provider text;
  v_last image_jobs.limits_in_force;
begin
  if tg_op = 'TRUNCATE' then
    delete from image_jobs.limits_in_force;
    return null;
  end if;
  for v_provider in
    select distinct p.name from unnest(array[old.provider, new.provider]) as p (name) where p.name is not null order by p.name
  loop
    perform pg_advisory_xact_lock(hashtextextended('image_jobs limits ' || v_provider, 0));
    select f.* into v_last from image_jobs.limits_in_force f where f.provider = v_provider order by f.version desc limit 1;
    -- Waits for claims that count by it.
    delete from image_jobs.limits_in_force f where f.provider = v_provider and f.version = v_last.version;
    insert into image_jobs.limits_in_force (provider, limits, models)
    select v_provider, coalesce(jsonb_agg(l.value order by (l.value -> 'id')::bigint), '[]'),
      coalesce(array_agg(l.value ->> 'model') filter (where l.value ->> 'model' is not null), '{}')
    from (
      select k.value from jsonb_array_elements(v_last.limits) k where old.id is null or (k.value -> 'id')::bigint <> old.id
      union all
      select to_jsonb(new) where new.provider = v_provider
    ) l;
  end loop;
  return null;
end
$$;

-- Before change_lanes, which reads them: triggers fire by name.
create or replace trigger carry_limits after insert or update or delete on image_jobs.provider_limits
  for each row execute function image_jobs.carry_limits();
create or replace trigger carry_no_limits after truncate on image_jobs.provider_limits
  for each statement execute function image_jobs.carry_limits();

-- Returns the limits of a provider and of its models.
create or replace function image_jobs.limits_of(p_provider text)
returns setof image_jobs.provider_limits language plpgsql volatile set search_path = ''
as $$
begin
  return query
  select l.* from jsonb_populate_recordset(null::image_jobs.provider_limits, (
    select f.limits from image_jobs.limits_in_force f where f.provider = p_provider order by f.version desc limit 1)) l;
end
$$;

-- Lock what limits these providers until the end of the transaction: none of it changes until then, and no other claim counts by
-- it. Provider by provider, the one with the oldest limit first, as an update of all limits goes through them. What stops or bounds
-- nothing is not locked.
create or replace function image_jobs.lock_limits(p_providers text[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_provider text;
  v_limits record;
begin
  for v_provider in
    select p.name from (select distinct n.name from unnest(p_providers) as n (name)) p
    order by (
      select (f.limits -> 0 -> 'id')::bigint from image_jobs.limits_in_force f
      where f.provider = p.name order by f.version desc limit 1)
  loop
    loop
      select f.version, f.limits into v_limits from image_jobs.limits_in_force f
      where f.provider = v_provider order by f.version desc limit 1;
      exit when not found or not v_limits.limits @? '$[*] ? (@.per_minute != null || @.max_running != null)';
      perform from image_jobs.limits_in_force f where f.provider = v_provider and f.version = v_limits.version for update;
      -- Else it was replaced while this waited.
      exit when found;
    end loop;
  end loop;
end
$$;

-- Providers that may have a lane. Runs of all others wait in the lane '?', so that invented names cannot make lanes.
create table if not exists image_jobs.providers (
  name text primary key
);
comment on table image_jobs.providers is 'Providers that the daemons know.';
insert into image_jobs.provider_limits (provider, per_minute) values ('openai', 50), ('google', 60);
insert into image_jobs.providers (name) values ('openai'), ('google'), ('stability'), ('midjourney'), ('demo')
on conflict (name) do nothing;

-- One row per lane (a provider, or a model with a limit of its own) and priority.
create table if not exists image_jobs.opened_lanes (
  lane text not null,
  priority integer not null,
  primary key (lane, priority)
);
comment on table image_jobs.opened_lanes is 'Queues of pending runs, one per lane and priority.';

create table if not exists image_jobs.watermarks (
  lane text not null,
  priority integer not null,
  version bigint generated always as identity,
  watermark bigint not null,
  passed_over bigint,
  primary key (lane, priority, version)
);
comment on table image_jobs.watermarks is 'How far the lanes have been claimed; the newest version holds.';

create or replace view image_jobs.lanes with (security_invoker = on) as
select o.lane, o.priority, coalesce(w.watermark, 0) as watermark, w.passed_over, w.version
from image_jobs.opened_lanes o
left join lateral (
  select m.watermark, m.passed_over, m.version from image_jobs.watermarks m
  where m.lane = o.lane and m.priority = o.priority
  order by m.version desc limit 1
) w on true;
comment on view image_jobs.lanes is 'Queues of pending runs, one per lane and priority, with their watermarks.';
-- There from the start: a transaction that opens a lane makes others that insert into it wait for its commit.
insert into image_jobs.opened_lanes (lane, priority) select p.name, 0 from image_jobs.providers p union all select '?', 0
on conflict (lane, priority) do nothing;
comment on column image_jobs.watermarks.watermark is
  'Rank of the last run that was claimed. New runs rank from here; claims scan from here, past dead index entries.';
comment on column image_jobs.watermarks.passed_over is
  'Below the watermark: from here on wait runs that claims have passed over, since their model was blocked. Claims scan from here.';

-- Lower bounds of the scans by due_at, past dead index entries: of put-off runs (queue ''), of each lane's parked ones, and of
-- stale nodes (queue 'stale nodes').
-- A hint, as the watermark is: full scans go without it.
create table if not exists image_jobs.due_marks (
  queue text not null,
  version bigint generated always as identity,
  due_at timestamptz not null,
  activity bigint,
  primary key (queue, version)
);
comment on column image_jobs.due_marks.activity is 'How many claims and stale nodes there had been: while there are no more, nothing is gained by moving it.';
comment on table image_jobs.due_marks is 'From when on something has fallen due that is not done; the newest version holds.';

-- Returns from when on a scan looks: somewhat before the mark, since who has made a run due may commit later than others. A mark
-- that lies ahead is of a clock that was wrong for a while.
create or replace function image_jobs.due_from(p_queue text, p_full_scan boolean)
returns timestamptz language plpgsql volatile set search_path = ''
as $$
begin
  return coalesce((
    select case when m.due_at <= image_jobs.now() then m.due_at - interval '10 s' end from image_jobs.due_marks m
    where m.queue = p_queue and not p_full_scan order by m.version desc limit 1), '-infinity');
end
$$;

-- Move a mark to the first run that a scan has found, or to now where it found none. Not for less than a second, or while
-- there is nothing to do a minute, since it is a write; and not at all while nothing happens.
create or replace function image_jobs.move_due_mark(p_queue text, p_first timestamptz)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_mark image_jobs.due_marks;
  v_activity bigint;
begin
  select m.* into v_mark from image_jobs.due_marks m where m.queue = p_queue order by m.version desc limit 1;
  if v_mark.due_at > image_jobs.now() then
    v_mark.activity := null;
  elsif found and coalesce(p_first - interval '1 s', image_jobs.now() - interval '1 min') <= v_mark.due_at then
    return;
  end if;
  v_activity := (select c.last_value from image_jobs.claims c) + (select s.last_value from image_jobs.stale_nodes_id_seq s);
  if v_mark.version is not null then
    if p_first is null and v_mark.activity = v_activity then
      return;
    end if;
    perform from image_jobs.due_marks m where m.queue = p_queue and m.version = v_mark.version for update skip locked;
    if not found then
      return;
    end if;
    delete from image_jobs.due_marks m where m.queue = p_queue and m.version = v_mark.version;
  end if;
  insert into image_jobs.due_marks (queue, due_at, activity) values (p_queue, coalesce(p_first, image_jobs.now()), v_activity);
end
$$;

-- Returns the lane of a processor.
create or replace function image_jobs.lane_of(p_processor text)
returns text language plpgsql stable set search_path = ''
as $$
begin
  return case
    when substr(p_processor, strpos(p_processor, ':') + 1) = any ((
      select f.models from image_jobs.limits_in_force f
      where f.provider = split_part(p_processor, ':', 1) order by f.version desc limit 1)::text[]) then p_processor
    else coalesce((select p.name from image_jobs.providers p where p.name = split_part(p_processor, ':', 1)), '?')
  end;
end
$$;

-- Returns the rank of a run that gets in line: behind the last of its user (coalesce(created_by, subject_id)), but never behind
-- other users who have fewer waiting. (Start-time fair queueing with the lane's watermark as virtual time.) A guess under
-- concurrency, and good enough.
create or replace function image_jobs.next_rank(p_user uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
declare
  v_watermark bigint;
  v_last bigint;
begin
  -- Not by the view: its joins cost every insert some 50 µs.
  select m.watermark into v_watermark from image_jobs.watermarks m
  where m.lane = p_lane and m.priority = p_priority order by m.version desc limit 1;
  if not found and not exists (select from image_jobs.opened_lanes o where o.lane = p_lane and o.priority = p_priority) then
    insert into image_jobs.opened_lanes (lane, priority) values (p_lane, p_priority) on conflict do nothing;
  end if;
  select r.rank into v_last
  from public.runs r
  where r.kind = 'image_gen' and coalesce(r.created_by, r.subject_id) = p_user and r.lane = p_lane and r.priority = p_priority
    and r.rank is not null
  order by r.rank desc limit 1;
  return greatest(coalesce(v_watermark, 0), coalesce(v_last, -1) + 1);
end
$$;

-- Returns how far the workflows of a user have been served in a lane: the workflow_rank of the run that was claimed last, in a
-- place below the watermark; null if that is none of the last few there. A hint: claims look from there.
create or replace function image_jobs.served_rank(p_user uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
begin
  return (
    select last.workflow_rank
    from (
      select r.workflow_rank, r.status from public.runs r
      where r.kind = 'image_gen' and coalesce(r.created_by, r.subject_id) = p_user and r.lane = p_lane and r.priority = p_priority
        and r.rank <= coalesce((
          select m.watermark from image_jobs.watermarks m
          where m.lane = p_lane and m.priority = p_priority order by m.version desc limit 1), 0)
      order by r.rank desc limit 20
    ) last
    where last.status <> 'pending' limit 1);
end
$$;

-- Returns the workflow_rank of a run that gets in line: behind the last of its workflow, but never behind other workflows of
-- its user that have fewer waiting. A claim gives the places of a user to the user's runs by workflow_rank.
create or replace function image_jobs.next_workflow_rank(p_user uuid, p_workflow uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
declare
  v_last bigint;
begin
  select r.workflow_rank into v_last
  from public.runs r
  where r.kind = 'image_gen' and coalesce(r.created_by, r.subject_id) = p_user and r.subject_id = p_workflow
    and r.lane = p_lane and r.priority = p_priority and r.workflow_rank is not null
  order by r.workflow_rank desc limit 1;
  return 1 + greatest(coalesce(v_last, -1), coalesce(image_jobs.served_rank(p_user, p_lane, p_priority), -1));
end
$$;

-- Move pending runs when a limit gives a model a lane of its own, or takes it away again.
-- Runs that are locked, or just being inserted, are left behind; the claim finds and moves them.
create or replace function image_jobs.change_lanes()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if tg_op = 'DELETE' then
    delete from image_jobs.recent_starts s where s.limit_id = old.id;
  elsif new.model is not null then
    -- Before the first run comes: an insert opens a lane before it has the locks of usage_limits, and a requeue after.
    insert into image_jobs.opened_lanes (lane, priority) values (new.provider || ':' || new.model, 0) on conflict do nothing;
  end if;
  with misplaced as materialized (
    select r.id from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.ticket is not null
      and split_part(coalesce(r.routed_to, r.processor), ':', 1) in (new.provider, old.provider)
      and r.lane is distinct from image_jobs.lane_of(coalesce(r.routed_to, r.processor))
    order by r.id
    for update skip locked
  )
  update public.runs r set lane = image_jobs.lane_of(coalesce(r.routed_to, r.processor))
  from misplaced where r.id = misplaced.id;
  return null;
end
$$;

create or replace trigger change_lanes after insert or delete or update of provider, model on image_jobs.provider_limits
  for each row execute function image_jobs.change_lanes();
