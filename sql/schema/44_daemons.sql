-- The life of a daemon: register, beat, judge the silent, leave.

-- Registers a daemon that has just started (or was fenced, and starts anew under a new id).
create or replace function private.register_daemon(
  p_id uuid, p_name text, p_version text, p_slots integer, p_lease interval, p_providers text[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into private.providers (name) select unnest(p_providers) on conflict do nothing;
  insert into private.lanes (lane, priority) select p, 0 from unnest(p_providers) p order by p on conflict do nothing;
  insert into private.daemons (id, name, version, slots, lease, providers, started_at, seen_at, fresh_since)
  values (p_id, p_name, p_version, p_slots, p_lease, p_providers, private.now(), private.now(), private.now())
  on conflict (id) do nothing;
  delete from private.daemons d where d.ended_at < private.now() - interval '7 days';
end
$$;

-- The advisory lock that a daemon's LISTEN session holds while it lives.
create or replace function private.session_lock_key(p_daemon uuid)
returns bigint language sql immutable parallel safe set search_path = ''
as $$
  select hashtextextended('image_jobs daemon ' || p_daemon::text, 0)
$$;

-- A sign of life. Raises IJ001 if the daemon was taken for dead meanwhile.
-- A gap of half a lease breaks its freshness: after an outage of the database nobody may judge at once.
create or replace function private.heartbeat(p_daemon uuid, p_in_flight integer, p_session_lock boolean, p_draining boolean)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
begin
  update private.daemons d
  set fresh_since = case when v_now - d.seen_at > d.lease / 2 then v_now else d.fresh_since end,
    seen_at = v_now, in_flight = p_in_flight, session_lock = p_session_lock, draining = p_draining
  where d.id = p_daemon and d.ended_at is null;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
end
$$;

-- Takes the runs of one daemon away from it. What was parked is checked on; a call that was in flight has an unknown
-- outcome, and is made again only as the run's next attempt, after a pause (what killed one daemon may kill the next): as
-- long as a webhook is waited for if it was an order, and one may come.
-- Runs that somebody has locked are left for the next look of take_over.
create or replace function private.abandon_runs(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_count integer;
begin
  perform set_config('image_jobs.hand', 'daemon', true);
  with theirs as materialized (
    select r.id from public.runs r where r.claimed_by = p_daemon order by r.id for update skip locked
  )
  update public.runs r
  set claim = nextval('private.claims'), claimed_by = null, rank = null, progress = case when r.provider_job_id is null then 0 else r.progress end,
    status = fate.status,
    due_at = case fate.status when 'running' then v_now when 'pending' then v_now + greatest(
      make_interval(secs => 2 ^ least(r.attempt, 8)), private.webhook_wait(r)) end,
    finished_at = case when fate.status = 'failed' then v_now end,
    message = case when fate.status = 'pending' then 'The daemon that was making this image went silent; another tries again.' end,
    payload = case when fate.status = 'failed' then jsonb_build_object(
      'error', 'Every daemon that tried to make this image went silent while it was at work.',
      'code', 'outcome_unknown', 'attempts', r.attempt,
      'hint', 'The provider may have charged for it. Look at the daemons'' logs, then requeue the run.') end
  from theirs
  join public.runs o on o.id = theirs.id
  cross join lateral (select case
    when o.provider_job_id is not null then 'running' when o.attempt < o.max_attempts then 'pending' else 'failed' end as status) fate
  where r.id = theirs.id;
  get diagnostics v_count = row_count;
  perform set_config('image_jobs.hand', v_hand, true);
  return v_count;
end
$$;

-- When the LISTEN session of a daemon began; null if it has none, or does not hold the daemon's lock.
create or replace function private.session_began(p_daemon uuid)
returns timestamptz language sql volatile set search_path = ''
as $$
  select a.backend_start
  from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid and a.datname = current_database()
  where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and l.database = a.datid
    and (l.classid::bigint << 32 | l.objid::bigint) = private.session_lock_key(p_daemon)
$$;

-- Takes over from daemons that have gone silent: no beat for their lease, or no beat for 6 s (a fifth of a long lease, so
-- that a beat was missed) and their session's lock is free. Locks go with a restart of the server too, so they count only
-- for a daemon whose own session was there before the last beat of the silent one, and still is.
-- Only a daemon whose own beats have come unbroken for one lease may judge. Answers how many runs were taken over.
create or replace function private.take_over(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_silent record;
  v_count integer := 0;
begin
  if not exists (
    select from private.daemons d
    where d.id = p_daemon and d.ended_at is null and d.seen_at - d.fresh_since >= d.lease and v_now - d.seen_at < d.lease / 2
  ) then
    return 0;
  end if;
  for v_silent in
    select d.id, d.seen_at, d.seen_at < v_now - d.lease as lapsed from private.daemons d
    where d.ended_at is null and d.id <> p_daemon
      and (d.seen_at < v_now - d.lease or (d.session_lock and d.seen_at < v_now - greatest(interval '6 s', d.lease / 5)))
    order by d.id
    for update skip locked
  loop
    continue when not v_silent.lapsed and not (
      coalesce(private.session_began(p_daemon) < v_silent.seen_at, false)
      and pg_try_advisory_xact_lock(private.session_lock_key(v_silent.id)));
    update private.daemons d set ended_at = v_now, ended = 'taken over' where d.id = v_silent.id;
    v_count := v_count + private.abandon_runs(v_silent.id);
  end loop;
  -- What was locked when its daemon ended.
  for v_silent in
    select distinct r.claimed_by as id from public.runs r
    where r.claimed_by is not null
      and not exists (select from private.daemons d where d.id = r.claimed_by and d.ended_at is null)
  loop
    v_count := v_count + private.abandon_runs(v_silent.id);
  end loop;
  return v_count;
end
$$;

-- Leaves in good order. What the daemon still holds by then is treated as a take-over would.
create or replace function private.leave(p_daemon uuid)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update private.daemons d set ended_at = private.now(), ended = 'stopped', in_flight = 0
  where d.id = p_daemon and d.ended_at is null;
  if found then
    perform private.abandon_runs(p_daemon);
  end if;
end
$$;

-- Closes a provider, or one model of it, for all daemons until p_for has passed: it said 429, or is out of credit.
create or replace function private.block_provider(p_provider text, p_model text, p_for interval, p_reason text)
returns void language sql volatile set search_path = ''
as $$
  insert into public.provider_limits as l (provider, model, blocked_until, blocked_reason)
  values (p_provider, p_model, private.now() + p_for, p_reason)
  on conflict (provider, model) do update
  set blocked_until = greatest(l.blocked_until, excluded.blocked_until), blocked_reason = excluded.blocked_reason
$$;

-- Publishes what a provider has on offer: the rows of image_models are replaced by these. A daemon from before there were
-- qualities does not name any.
create or replace function private.publish_models(p_provider text, p_models jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  delete from private.models m
  where m.provider = p_provider and not exists (
    select from jsonb_to_recordset(p_models) as n (model text) where n.model = m.model);
  insert into private.models
  select n.* from jsonb_populate_recordset(
    jsonb_populate_record(null::private.models, '{"qualities": []}'), p_models) n
  order by n.provider, n.model
  on conflict (provider, model) do update set
    sizes = excluded.sizes, ratios = excluded.ratios, seed = excluded.seed, negative_prompt = excluded.negative_prompt,
    previous_image = excluded.previous_image, previews = excluded.previews, price = excluded.price,
    typical_seconds = excluded.typical_seconds, retired = excluded.retired, successor = excluded.successor,
    as_of = excluded.as_of, source = excluded.source, qualities = excluded.qualities;
end
$$;
