-- sync: one statement, one round trip. Finished runs are settled and free slots are filled; whatever happens meanwhile
-- goes with the next sync. A daemon has one sync in flight, never two.

-- Release runs that the database thinks a daemon holds and it does not: claims whose reply was lost on the way.
-- p_held are the claims it holds. Their work never began, so the attempt comes back, once; if it happens again, or the request
-- went out, they are not what they seem, and cost an attempt: else a run could be paid for again without end.
-- A sync that its daemon had given up may be done late, when later ones have claimed what its list does not name yet: of claims
-- that are newer than p_newest, the newest there was before the list was made, it says nothing. Null: it names them all.
create or replace function image_jobs.release_unheld(p_daemon uuid, p_held bigint[], p_newest bigint)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
begin
  select array_agg(unheld.id) into v_runs
  from (
    select r.id from public.runs r
    where r.claimed_by = p_daemon and not r.claim = any (p_held) and r.claim <= coalesce(p_newest, r.claim)
      and not r.id = any (v_aside)
    order by r.id
    for update skip locked
  ) unheld;
  if v_runs is not null then
    perform set_config('image_jobs.writer', 'daemon', true);
    perform image_jobs.change_runs('release_runs', v_runs);
    perform set_config('image_jobs.writer', v_writer, true);
  end if;
end
$$;

create or replace function image_jobs.release_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_calls jsonb;
  v_spent bigint[];
begin
  select jsonb_agg(jsonb_build_object('id', r.claim,
      'state', case when r.unheld or c.sent_at is not null or c.state <> 'open' then 'unknown' else 'free' end)),
    array_agg(r.claim) filter (where r.unheld or c.sent_at is not null or c.state <> 'open')
  into v_calls, v_spent
  from unnest(p_runs) as p (id)
  join public.runs r on r.id = any (array[p.id])
  left join image_jobs.calls c on c.id = any (array[r.claim])
  where r.provider_job_id is null;
  perform image_jobs.close_calls(v_calls);
  update public.runs r
  set status = fate.status,
    attempt = r.attempt - case when fate.status = 'pending' and not fate.spent then 1 else 0 end,
    unheld = case when fate.status = 'running' then r.unheld else true end,
    claimed_by = null, rank = null, due_at = case when fate.status <> 'failed' then v_now end,
    finished_at = case when fate.status = 'failed' then v_now end,
    payload = case when fate.status = 'failed' then jsonb_build_object(
      'error', 'The daemon lost sight of this run while it was at work.', 'code', 'outcome_unknown', 'attempts', r.attempt,
      'hint', 'The provider may have charged for it. Look at the daemons'' logs, then requeue the run.')
      || image_jobs.costs_of(r.id, r.ticket) || image_jobs.timings_of_failure(o, v_now) end
  from unnest(p_runs) as p (id)
  join public.runs o on o.id = any (array[p.id])
  cross join lateral (select coalesce(o.claim = any (v_spent), false) as spent) held
  cross join lateral (select held.spent, case
    when o.provider_job_id is not null then 'running'
    when held.spent and o.attempt >= o.max_attempts then 'failed' else 'pending' end as status) fate
  where r.id = any (array[o.id]);
  -- By the claim it looks like a settlement of the daemon, which knows nothing of it.
  insert into image_jobs.tallies (metric, provider, model, result, code, count, run_id, workflow_id, node_id, error)
  select 'runs', split_part(at.processor, ':', 1), substr(at.processor, strpos(at.processor, ':') + 1), r.status,
    r.payload ->> 'code', 1, r.id, r.subject_id, r.metadata ->> 'nodeId', r.payload ->> 'error'
  from unnest(p_runs) as p (id)
  join public.runs r on r.id = any (array[p.id])
  cross join lateral (select coalesce(r.routed_to, r.processor, '') as processor) at
  where r.status = 'failed';
  return null;
end
$$;

-- Show nodes the runs they missed while they were locked, or were refused.
create or replace function image_jobs.refresh_stale_nodes(p_from timestamptz default '-infinity')
returns void language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_due record;
begin
  for v_due in
    with taken as (
      -- An array, since `in` may be planned to select anew for each row.
      delete from image_jobs.stale_nodes s
      where s.id = any (array(
        select q.id from image_jobs.stale_nodes q where q.due_at between p_from and image_jobs.now()
        order by q.due_at, q.id limit 1000 for update skip locked))
      returning s.node_id, s.failures
    )
    select t.failures, array_agg(t.node_id) as nodes
    from (select node_id, max(failures) as failures from taken group by node_id) t
    group by t.failures
  loop
    perform image_jobs.project_nodes(v_due.nodes, v_due.failures);
  end loop;
end
$$;

-- Keep image_jobs.wake ahead for the providers of a daemon that will sync by itself for so many seconds.
create or replace function image_jobs.stay_awake(p_daemon uuid, p_awake double precision)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_provider text;
  v_until timestamptz;
begin
  for v_provider in
    select '?' union select unnest(c.providers) from image_jobs.claimants c where c.daemon = p_daemon order by 1
  loop
    select w.awake_until into v_until from image_jobs.wake w where w.provider = v_provider order by w.awake_until desc limit 1;
    continue when v_until >= v_now + make_interval(secs => p_awake / 2) and v_until < v_now + interval '1 min';
    perform from image_jobs.wake w where w.provider = v_provider and w.awake_until = v_until for update skip locked;
    if found then
      delete from image_jobs.wake w where w.provider = v_provider and w.awake_until = v_until;
      insert into image_jobs.wake (provider, awake_until) values (v_provider, v_now + make_interval(secs => p_awake))
      on conflict do nothing;
    end if;
  end loop;
end
$$;

-- One sync of a daemon.
--   p_slots        free slots to fill
--   p_full_scan    see claim_runs
--   p_settlements  see settle_runs
--   p_progress     see record_progress
--   p_held         the claims it holds, now and then (after a reconnect, every few beats); null: not this time.
--                  Those it holds no longer are returned as lost: the notification may have missed it
--   p_awake        seconds for which this daemon will sync by itself, so that inserts for its providers need no NOTIFY;
--                  null: it will not
--   p_unreachable  see claim_runs
--   p_newest       the last value of image_jobs.claims, read before p_held was put together: see release_unheld
-- Returns rows {part: lost | claimed | settled | recorded, run: …}. Claims come before settlements: limits lead the lock order.
create or replace function image_jobs.sync(
  p_daemon uuid, p_slots integer, p_full_scan boolean, p_settlements jsonb, p_progress jsonb, p_held bigint[],
  p_awake double precision, p_unreachable text[] default null, p_newest bigint default null)
returns table (part text, run jsonb) language plpgsql volatile set search_path = ''
as $$
declare
  v_stale timestamptz;
begin
  -- As a rule there is no streak, and no server error that could begin one.
  if p_settlements <> '[]' and (image_jobs.has_streaks()
    or exists (select from jsonb_array_elements(p_settlements) s where (s.value ->> 'http_status')::integer >= 500))
  then
    perform image_jobs.note_responses(p_daemon, p_settlements);
  end if;
  if p_held is not null then
    perform image_jobs.release_unheld(p_daemon, p_held, p_newest);
    return query
    select 'lost', jsonb_build_object('claim', held.claim)
    from unnest(p_held) as held (claim)
    where held.claim not in (select r.claim from public.runs r where r.claimed_by = p_daemon);
  end if;
  if p_slots > 0 then
    return query select 'claimed', c from image_jobs.claim_runs(p_daemon, p_slots, p_full_scan, p_unreachable) c;
  end if;
  if p_progress <> '[]' then
    return query select 'recorded', r from image_jobs.record_progress(p_daemon, p_progress) r;
  end if;
  if p_settlements <> '[]' then
    return query select 'settled', s from image_jobs.settle_runs(p_daemon, p_settlements) s;
  end if;
  if p_full_scan then
    perform image_jobs.reroute_runs();
  end if;
  v_stale := image_jobs.due_from('stale nodes', p_full_scan);
  if exists (select from image_jobs.stale_nodes s where s.due_at between v_stale and image_jobs.now()) then
    perform image_jobs.refresh_stale_nodes(v_stale);
  elsif v_stale < image_jobs.now() - interval '70 s' then
    perform image_jobs.move_due_mark('stale nodes', null);
  end if;
  if p_awake is not null then
    perform image_jobs.stay_awake(p_daemon, p_awake);
  end if;
end
$$;

-- Wake all daemons. Called by one that stops syncing by itself, once its awake_until has lapsed.
create or replace function image_jobs.wake_all()
returns void language sql volatile set search_path = ''
as $$
  select pg_notify('image_jobs_wake', '')
$$;
