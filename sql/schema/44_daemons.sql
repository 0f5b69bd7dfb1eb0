-- The life of a daemon: register, beat, take over from the silent, leave.

-- Returns the version of the oldest daemon that may work with this schema. A release whose functions an older daemon could not
-- call any more says so here; until then the one before it goes on.
create or replace function image_jobs.oldest_daemon()
returns text language sql immutable set search_path = ''
as $$ select '0' $$;

-- Returns whether a daemon's version is older than that. A version without numbers is not judged.
create or replace function image_jobs.is_too_old(p_version text)
returns boolean language sql stable set search_path = ''
as $$
  select coalesce(string_to_array(substring(p_version from '^[0-9]+(?:\.[0-9]+)*'), '.')::numeric[]
    < string_to_array(image_jobs.oldest_daemon(), '.')::numeric[], false)
$$;

-- Register a daemon that has just started (or was fenced, and starts anew under a new id). Raises IJ002 if it is too old.
create or replace function image_jobs.register_daemon(
  p_id uuid, p_name text, p_version text, p_slots integer, p_lease interval, p_providers text[],
  p_unserved_grace interval default interval '2 minutes')
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if image_jobs.is_too_old(p_version) then
    raise exception using errcode = 'IJ002',
      message = format('This daemon is of version %s, too old for this database.', p_version),
      hint = format('Install version %s or a newer one, and start it again.', image_jobs.oldest_daemon());
  end if;
  insert into image_jobs.providers (name) select unnest(p_providers) on conflict do nothing;
  insert into image_jobs.wake (provider, awake_until) select p, '-infinity' from unnest(p_providers) p
  where not exists (select from image_jobs.wake w where w.provider = p) order by p on conflict do nothing;
  insert into image_jobs.opened_lanes (lane, priority) select p, 0 from unnest(p_providers) p order by p on conflict do nothing;
  insert into image_jobs.daemons (id, name, version, slots, lease, providers, unserved_grace, started_at, seen_at, fresh_since)
  values (p_id, p_name, p_version, p_slots, p_lease, p_providers, p_unserved_grace,
    image_jobs.now(), image_jobs.now(), image_jobs.now())
  on conflict (id) do nothing;
  delete from image_jobs.daemons d where d.ended_at < image_jobs.now() - interval '7 days';
  perform image_jobs.note_provider_states();
end
$$;

-- Returns the key of the advisory lock that a daemon's LISTEN session holds while it lives.
create or replace function image_jobs.session_lock_key(p_daemon uuid)
returns bigint language sql immutable parallel safe set search_path = ''
as $$
  select hashtextextended('image_jobs daemon ' || p_daemon::text, 0)
$$;

-- Record a beat. Raises IJ001 if the daemon was taken for dead meanwhile.
-- A gap of half a lease breaks its freshness: after an outage of the database no daemon may take over at once.
create or replace function image_jobs.heartbeat(p_daemon uuid, p_in_flight integer, p_session_lock boolean, p_draining boolean)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  update image_jobs.daemons d
  set fresh_since = case when v_now - d.seen_at > d.lease / 2 or d.fresh_since > v_now then v_now else d.fresh_since end,
    seen_at = v_now, in_flight = p_in_flight, session_lock = p_session_lock, draining = p_draining
  where d.id = p_daemon and d.ended_at is null;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
end
$$;

-- Take the runs of one daemon away from it. A parked run is checked; a call that was in flight has an unknown
-- outcome, and is made again only as the run's next attempt, after a pause (what killed one daemon may kill the next): as
-- long as a webhook is waited for if a provider job may have been made of which one may come.
-- Locked runs are left for the next take_over.
create or replace function image_jobs.abandon_runs(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
  v_abandoned jsonb[];
begin
  select array_agg(theirs.id) into v_runs
  from (
    select r.id from public.runs r
    where r.claimed_by = p_daemon and not r.id = any (v_aside)
    order by r.id for update skip locked
  ) theirs;
  if v_runs is null then
    return 0;
  end if;
  perform set_config('image_jobs.writer', 'daemon', true);
  v_abandoned := image_jobs.change_runs('abandon_each', v_runs);
  perform set_config('image_jobs.writer', v_writer, true);
  return coalesce(cardinality(v_abandoned), 0);
end
$$;

create or replace function image_jobs.abandon_each(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  update public.runs r
  set claim = nextval('image_jobs.claims'), claimed_by = null, rank = null, progress = case when r.provider_job_id is null then 0 else r.progress end,
    status = fate.status,
    due_at = case fate.status when 'running' then v_now when 'pending' then v_now + greatest(
      make_interval(secs => 2 ^ least(r.attempt, 8)), image_jobs.webhook_wait(r)) end,
    finished_at = case when fate.status = 'failed' then v_now end,
    message = case when fate.status = 'pending' then 'The daemon that was making this image went silent; another tries again.' end,
    payload = case when fate.status = 'failed' then jsonb_build_object(
      'error', 'Every daemon that tried to make this image went silent while it was at work.',
      'code', 'outcome_unknown', 'attempts', r.attempt,
      'hint', 'The provider may have charged for it. Look at the daemons'' logs, then requeue the run.')
      || image_jobs.timings_of_failure(o, v_now) end
  from unnest(p_runs) as p (id)
  join public.runs o on o.id = any (array[p.id])
  cross join lateral (select case
    when o.provider_job_id is not null then 'running' when o.attempt < o.max_attempts then 'pending' else 'failed' end as status) fate
  where r.id = any (array[o.id]);
  return array(select to_jsonb(p.id) from unnest(p_runs) as p (id));
end
$$;

-- Returns when the LISTEN session of a daemon began; null if it has none, or does not hold the daemon's lock.
create or replace function image_jobs.session_began(p_daemon uuid)
returns timestamptz language sql volatile set search_path = ''
as $$
  select a.backend_start
  from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid and a.datname = current_database()
  where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and l.database = a.datid
    and (l.classid::bigint << 32 | l.objid::bigint) = image_jobs.session_lock_key(p_daemon)
$$;

-- Take over (rescue) from daemons that have gone silent: no beat for their lease, or no beat for 6 s (a fifth of a long lease, so
-- that a beat was missed) and their session's lock is free. Locks go with a restart of the server too, so they count only
-- for a daemon whose own session was there before the last beat of the silent one, and still is.
-- Only a daemon whose own beats have come unbroken for one lease may do so. Returns how many runs were taken over.
create or replace function image_jobs.take_over(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_silent record;
  v_count integer := 0;
begin
  if not exists (
    select from image_jobs.daemons d
    where d.id = p_daemon and d.ended_at is null and d.seen_at - d.fresh_since >= d.lease and v_now - d.seen_at < d.lease / 2
  ) then
    return 0;
  end if;
  -- Seen by a clock that was ahead for a while: its lease begins now.
  update image_jobs.daemons d set seen_at = v_now
  where d.id = any (array(
    select o.id from image_jobs.daemons o
    where o.ended_at is null and o.id <> p_daemon and o.seen_at > v_now + o.lease order by o.id for update skip locked));
  for v_silent in
    select d.id, d.seen_at, d.seen_at < v_now - d.lease as lapsed from image_jobs.daemons d
    where d.ended_at is null and d.id <> p_daemon
      and (d.seen_at < v_now - d.lease or (d.session_lock and d.seen_at < v_now - greatest(interval '6 s', d.lease / 5)))
    order by d.id
    for update skip locked
  loop
    continue when not v_silent.lapsed and not (
      coalesce(image_jobs.session_began(p_daemon) < v_silent.seen_at, false)
      and pg_try_advisory_xact_lock(image_jobs.session_lock_key(v_silent.id)));
    -- It is claiming just now.
    perform from image_jobs.claimants c where c.daemon = v_silent.id for update skip locked;
    continue when not found;
    update image_jobs.daemons d set ended_at = v_now, ended = 'taken over' where d.id = v_silent.id;
    v_count := v_count + image_jobs.abandon_runs(v_silent.id);
  end loop;
  -- Runs that were locked when their daemon ended.
  for v_silent in
    select distinct r.claimed_by as id from public.runs r
    where r.claimed_by is not null
      and not exists (select from image_jobs.daemons d where d.id = r.claimed_by and d.ended_at is null)
  loop
    v_count := v_count + image_jobs.abandon_runs(v_silent.id);
  end loop;
  return v_count;
end
$$;

-- Leave in good order. Runs that the daemon still holds are treated as in a take-over.
create or replace function image_jobs.leave(p_daemon uuid)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update image_jobs.daemons d set ended_at = image_jobs.now(), ended = 'stopped', in_flight = 0
  where d.id = p_daemon and d.ended_at is null;
  if found then
    perform image_jobs.abandon_runs(p_daemon);
    perform image_jobs.note_provider_states();
  end if;
end
$$;

-- Publish the models of a provider: the rows of image_models are replaced by these. A daemon from before there were
-- qualities does not name any.
create or replace function image_jobs.publish_models(p_provider text, p_models jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  delete from image_jobs.models m
  where m.provider = p_provider and not exists (
    select from jsonb_to_recordset(p_models) as n (model text) where n.model = m.model);
  insert into image_jobs.models
  select n.* from jsonb_populate_recordset(
    jsonb_populate_record(null::image_jobs.models, '{"qualities": []}'), p_models) n
  order by n.provider, n.model
  on conflict (provider, model) do update set
    sizes = excluded.sizes, ratios = excluded.ratios, seed = excluded.seed, negative_prompt = excluded.negative_prompt,
    previous_image = excluded.previous_image, previews = excluded.previews, price = excluded.price,
    typical_seconds = excluded.typical_seconds, retired = excluded.retired, successor = excluded.successor,
    as_of = excluded.as_of, source = excluded.source, qualities = excluded.qualities;
  delete from image_jobs.prices p where p.provider = p_provider;
  insert into image_jobs.prices (provider, model, quality, width, height, price)
  select p_provider, m.value ->> 'model', p.quality, p.width, p.height, p.price
  from jsonb_array_elements(p_models) as m (value)
  cross join lateral jsonb_to_recordset(coalesce(m.value -> 'prices', '[]'))
    as p (quality text, width integer, height integer, price numeric)
  on conflict do nothing;
end
$$;
