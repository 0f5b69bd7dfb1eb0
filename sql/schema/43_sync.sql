-- A turn: one statement, one round trip. What has finished is settled and free slots are filled; whatever happens
-- meanwhile goes with the next turn. A daemon has one turn in flight, never two.

-- Gives back what the database thinks a daemon holds and it does not: claims whose reply was lost on the way.
-- p_held are the claims it holds. Their work never began, so the attempt comes back.
create or replace function private.release_unheld(p_daemon uuid, p_held bigint[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
begin
  perform set_config('image_jobs.hand', 'daemon', true);
  with unheld as materialized (
    select r.id from public.runs r
    where r.claimed_by = p_daemon and not r.claim = any (p_held)
    order by r.id
    for update skip locked
  )
  update public.runs r
  set status = case when r.provider_job_id is null then 'pending' else 'running' end,
    attempt = r.attempt - case when r.provider_job_id is null then 1 else 0 end,
    claimed_by = null, due_at = v_now, rank = null
  from unheld where r.id = unheld.id;
  perform set_config('image_jobs.hand', v_hand, true);
end
$$;

-- Shows nodes what they missed while somebody had them locked.
create or replace function private.refresh_stale_nodes()
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_nodes varchar[];
begin
  with taken as (
    delete from private.stale_nodes s
    where s.id in (select q.id from private.stale_nodes q order by q.id limit 1000 for update skip locked)
    returning s.node_id
  )
  select array_agg(distinct node_id) into v_nodes from taken;
  if v_nodes is not null then
    perform private.show_runs(v_nodes);
  end if;
end
$$;

-- One turn of a daemon.
--   p_slots        free slots to fill
--   p_thorough     see claim_runs
--   p_settlements  see settle_runs
--   p_progress     see record_progress
--   p_held         the claims it holds, now and then (after a reconnect, every few beats); null: not this time.
--                  Those it holds no longer are answered as lost: the notification may have missed it
--   p_awake        seconds for which this daemon will look by itself, so that inserts need no NOTIFY; null: it will not
-- Answers rows {part: lost | claimed | settled | recorded, run: …}. Claims come first: limits lead the lock order.
create or replace function private.turn(
  p_daemon uuid, p_slots integer, p_thorough boolean, p_settlements jsonb, p_progress jsonb, p_held bigint[],
  p_awake double precision)
returns table (part text, run jsonb) language plpgsql volatile set search_path = ''
as $$
begin
  if p_held is not null then
    perform private.release_unheld(p_daemon, p_held);
    return query
    select 'lost', jsonb_build_object('claim', held.claim)
    from unnest(p_held) as held (claim)
    where held.claim not in (select r.claim from public.runs r where r.claimed_by = p_daemon);
  end if;
  return query select 'claimed', c from private.claim_runs(p_daemon, p_slots, p_thorough) c;
  return query select 'recorded', r from private.record_progress(p_daemon, p_progress) r;
  return query select 'settled', s from private.settle_runs(p_daemon, p_settlements) s;
  if p_thorough then
    perform private.pass_on();
  end if;
  if exists (select from private.stale_nodes) then
    perform private.refresh_stale_nodes();
  end if;
  if p_awake is not null then
    perform from private.wake w where w.awake_until < private.now() + make_interval(secs => p_awake / 2) for update skip locked;
    if found then
      update private.wake w set awake_until = private.now() + make_interval(secs => p_awake);
    end if;
  end if;
end
$$;

-- Wakes all daemons. Called by one that stops looking by itself, once its awake_until has lapsed.
create or replace function private.wake_all()
returns void language sql volatile set search_path = ''
as $$
  select pg_notify('image_jobs_wake', '')
$$;
