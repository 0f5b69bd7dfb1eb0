-- pending → running, and parked → held: the daemon claims work.

-- Returns a claimed run for the daemon. generated: the data of the `generated` event of an earlier attempt since the last
-- requeue; its picture may lie in storage. contested: a claim that was taken away had a picture, which it may still be storing.
create or replace function image_jobs.claimed_run(r public.runs, p_due_at timestamptz)
returns jsonb language plpgsql stable set search_path = ''
as $$
declare
  v_generated jsonb;
  v_contested boolean := false;
begin
  if r.attempt > 1 then
    select e.payload -> 'data' into v_generated from public.run_events e
    where e.run_id = r.id and e.payload ->> 'event' = 'generated' and e.payload -> 'data' -> 'ticket' = to_jsonb(r.ticket)
    order by e.seq desc limit 1;
  end if;
  if exists (select from image_jobs.calls c where c.run_id = r.id and (c.id < r.claim) is true and c.image) then
    v_contested := coalesce((
      select e.payload ->> 'event' = 'generated' from public.run_events e
      where e.run_id = r.id and e.payload ->> 'event' in ('generated', 'completed')
      order by e.seq desc limit 1), false);
  end if;
  return jsonb_build_object(
    'id', r.id, 'claim', r.claim, 'ticket', r.ticket, 'subject_id', r.subject_id,
    'processor', coalesce(r.routed_to, r.processor), 'requested', r.processor,
    'metadata', case when jsonb_path_exists(r.metadata, '$.**{65}') then '{}' else coalesce(r.metadata, '{}') end,
    'attempt', r.attempt, 'max_attempts', r.max_attempts,
    'provider_job_id', r.provider_job_id, 'call', coalesce(r.call, r.claim), 'webhook', r.webhook,
    'created_by', r.created_by, 'source_workflow', r.source_workflow,
    'submitted_ago', extract(epoch from image_jobs.now() - r.submitted_at),
    'waited', case when isfinite(p_due_at) then extract(epoch from image_jobs.now() - p_due_at) else 0 end,
    'generated', v_generated, 'contested', v_contested);
end
$$;

-- Returns parked runs whose check is due, and their priorities: of each lane the p_limit that have waited longest, at least 50,
-- since one of a higher priority may be among them.
create or replace function image_jobs.due_checks(p_providers text[], p_limit integer, p_full_scan boolean)
returns table (id varchar, priority integer) language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_due record;
begin
  for v_due in
    select o.lane, found.ids, found.priorities, found.first, m.due_from
    from (select distinct l.lane from image_jobs.opened_lanes l where split_part(l.lane, ':', 1) = any (p_providers)) o
    left join lateral (
      select k.due_at - interval '10 s' as due_from from image_jobs.due_marks k
      where k.queue = o.lane and not p_full_scan order by k.version desc limit 1
    ) m on true
    cross join lateral (
      select array_agg(due.id) as ids, array_agg(due.priority) as priorities, min(due.due_at) as first
      from (
        -- Tables that were there before may have other types of texts and numbers.
        select r.id::varchar, r.priority::integer, r.due_at from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'running' and r.lane = o.lane
          and r.due_at >= coalesce(m.due_from, '-infinity') and r.due_at <= v_now
          and r.claimed_by is null and not r.id = any (v_aside)
        order by r.due_at limit greatest(p_limit, 50)
      ) due
    ) found
  loop
    -- One that is set aside stays behind the mark. And as a rule it is too early to move the mark.
    if v_aside = '{}' and coalesce(coalesce(v_due.first, v_now - interval '59 s') - interval '11 s' > v_due.due_from, true) then
      perform image_jobs.move_due_mark(v_due.lane, v_due.first);
    end if;
    return query select d.id, d.priority from unnest(v_due.ids, v_due.priorities) as d (id, priority);
  end loop;
end
$$;

-- Claim these parked runs, at most p_limit, those that have waited longest first. Pausing and limits are about new starts;
-- checks go on.
create or replace function image_jobs.claim_checks(p_daemon uuid, p_runs varchar[], p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_runs varchar[];
begin
  select array_agg(due.id) into v_runs
  from (
    select r.id from public.runs r
    where r.id = any (p_runs) and r.status = 'running' and r.due_at <= image_jobs.now() and r.claimed_by is null
    order by r.due_at limit p_limit
    for update skip locked
  ) due;
  if v_runs is not null then
    return query select unnest(image_jobs.change_runs('check_runs', v_runs, p_daemon));
  end if;
end
$$;

create or replace function image_jobs.check_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
declare
  v_claimed jsonb[];
begin
  with claimed as (
    update public.runs r
    set claim = o.next_claim, claimed_by = p_daemon, due_at = null, call = coalesce(o.call, o.next_claim)
    from (
      select q.id, q.due_at, q.call, nextval('image_jobs.claims') as next_claim
      from unnest(p_runs) as p (id) join public.runs q on q.id = any (array[p.id])
    ) o
    where r.id = any (array[o.id])
    returning image_jobs.claimed_run(r, o.due_at) as run
  )
  select array_agg(c.run) into v_claimed from claimed c;
  -- Of a provider job that no call is known for, an operator's for example.
  perform image_jobs.open_calls(p_runs);
  return v_claimed;
end
$$;

-- Start the first p_limit runs of one lane, passing over those of blocked models, counts them in the limits, and moves the
-- lane's watermark. With p_probe, one that has lost the fewest attempts. The caller holds the locks of the limits.
-- p_budget: USD; one starts while those before it leave some. Null: without limit.
create or replace function image_jobs.claim_starts(
  p_daemon uuid, p_lane image_jobs.lanes, p_limit integer, p_full_scan boolean, p_probe boolean, p_budget numeric)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_models boolean := image_jobs.move_to_model_lanes(p_lane, p_limit);
  v_names varchar[] := image_jobs.unblocked_names(p_lane);
  v_from bigint := case when p_full_scan then 0 else least(p_lane.watermark, p_lane.passed_over) end;
  v_passing boolean := p_probe or v_names is not null;
  v_first varchar[];
  v_runs varchar[];
  v_claimed jsonb[];
  v_last bigint;
  v_newest image_jobs.lanes;
  v_streak image_jobs.provider_streaks;
begin
  if not v_passing then
    select array_agg(next.id), max(next.rank) into v_runs, v_last
    from (
      select r.id, r.rank from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority and r.rank >= v_from
        and (not v_models or image_jobs.lane_of(coalesce(r.routed_to, r.processor)) = r.lane)
        and not r.id = any (v_aside)
      order by r.rank, r.ticket limit p_limit
      for update skip locked
    ) next;
  else
    -- A few more than wanted, since others may be claiming them.
    v_first := image_jobs.first_waiting(p_lane, v_names, v_from, v_aside, case when p_probe then 100 else p_limit + 20 end);
    select array_agg(next.id), max(next.rank) into v_runs, v_last
    from (
      select r.id, r.rank from public.runs r
      where (r.kind = 'image_gen' and r.queue_state = 'pending') is true and r.rank is not null and r.id = any (v_first)
        and (not v_models or image_jobs.lane_of(coalesce(r.routed_to, r.processor)) = r.lane)
      order by case when p_probe then r.attempt end, r.rank, r.ticket limit p_limit
      for update skip locked
    ) next;
  end if;
  if p_budget is not null then
    select array_agg(b.id), max(b.rank) into v_runs, v_last
    from (
      select r.id, r.rank, coalesce(sum(image_jobs.estimate_cost(coalesce(r.routed_to, r.processor), r.metadata -> 'promptSpec'))
        over (order by r.rank, r.ticket rows between unbounded preceding and 1 preceding), 0) as before
      from unnest(v_runs) as p (id) join public.runs r on r.id = any (array[p.id])
    ) b
    where b.before < p_budget;
  end if;
  if v_runs is null then
    return;
  end if;
  if not p_probe then
    v_runs := image_jobs.share_places(p_lane, v_runs, v_names, v_models, v_aside, p_full_scan);
  end if;
  v_claimed := image_jobs.change_runs('start_runs', v_runs, p_daemon);
  if v_claimed is null then
    return;
  end if;
  return query select unnest(v_claimed);
  perform image_jobs.record_starts(split_part(p_lane.lane, ':', 1), p_lane.lane, cardinality(v_claimed));
  if p_probe then
    v_streak := image_jobs.streak_of(split_part(p_lane.lane, ':', 1));
    v_streak.probe := (v_claimed[1] ->> 'claim')::bigint;
    v_streak.probed_at := image_jobs.now();
    perform image_jobs.write_streak(v_streak);
  end if;
  -- The watermark is a hint: if another daemon is moving it just now, that will do. But never without a note of the runs that
  -- it passes over.
  select l.* into v_newest from image_jobs.lanes l
  where l.lane = p_lane.lane and l.priority = p_lane.priority and (l.watermark < v_last or l.passed_over < v_last);
  if not found then
    return;
  end if;
  if v_newest.version is not null then
    perform from image_jobs.watermarks m
    where m.lane = p_lane.lane and m.priority = p_lane.priority and m.version = v_newest.version
    for update skip locked;
    if not found then
      return;
    end if;
    delete from image_jobs.watermarks m
    where m.lane = p_lane.lane and m.priority = p_lane.priority and m.version = v_newest.version;
  end if;
  insert into image_jobs.watermarks (lane, priority, watermark, passed_over)
  values (p_lane.lane, p_lane.priority, greatest(v_newest.watermark, v_last), case
    when v_passing then least(v_newest.passed_over, p_lane.watermark)
    when v_from > v_newest.passed_over then v_newest.passed_over
    when v_last < v_newest.watermark then v_last end);
end
$$;

create or replace function image_jobs.start_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_claimed jsonb[];
begin
  with claimed as (
    update public.runs r
    set status = 'running', claim = o.next_claim, claimed_by = p_daemon, attempt = r.attempt + 1,
      started_at = v_now, due_at = null, payload = null, message = null, preview_url = null,
      call = case when o.provider_job_id is not null then coalesce(o.call, o.next_claim) end
    from (
      select q.id, q.due_at, q.call, q.provider_job_id, nextval('image_jobs.claims') as next_claim
      from unnest(p_runs) as p (id) join public.runs q on q.id = any (array[p.id])
    ) o
    where r.id = any (array[o.id])
    returning image_jobs.claimed_run(r, o.due_at) as run
  )
  select array_agg(c.run) into v_claimed from claimed c;
  perform image_jobs.open_calls(p_runs);
  return v_claimed;
end
$$;

-- Claim up to p_slots runs for a daemon, higher priorities first: due checks of parked runs, in the sequence in which they fell
-- due, and pending runs share the slots where there are both; pending ones of lanes evenly, users interleaved within a lane, and their workflows within their places. p_full_scan reads whole lanes instead of from their watermarks: at
-- least once a second of idleness, since a slow transaction may commit a lower rank.
-- Nothing of the providers that this daemon cannot reach (p_unreachable).
-- Never claims more than the limits allow, however many daemons claim at once. Raises IJ001 if the daemon was fenced.
-- Looks first, and writes nothing where there is nothing to claim. Locks: the daemon's row of claimants (against a take-over), the budget of all together, then limits_in_force, the providers that have a
-- streak (skipping locked ones: another daemon is at it), and only then runs (skipping locked ones).
create or replace function image_jobs.claim_runs(
  p_daemon uuid, p_slots integer, p_full_scan boolean default false, p_unreachable text[] default null)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set enable_sort = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_now timestamptz := image_jobs.now();
  v_from timestamptz;
  v_daemon record;
  v_left integer := p_slots;
  v_providers text[];
  v_lanes image_jobs.lanes[];
  v_lane image_jobs.lanes;
  v_checks varchar[];
  v_priorities integer[];
  v_due varchar[];
  v_priority integer;
  v_peers integer;
  v_quota integer;
  v_count integer;
  v_provider text;
  v_probing text[];
  v_probe boolean;
  v_budget numeric;
begin
  if p_slots <= 0 then
    return;
  end if;
  select c.* into v_daemon from image_jobs.claimants c where c.daemon = p_daemon;
  v_providers := array(
    select p.name from unnest(image_jobs.claimable_providers(v_daemon.providers, v_daemon.unserved_grace, p_full_scan)) as p (name)
    where p.name <> all (coalesce(p_unreachable, '{}')));
  v_lanes := coalesce(image_jobs.open_lanes(v_providers, p_full_scan), '{}');
  select array_agg(d.id), array_agg(d.priority) into v_checks, v_priorities from image_jobs.due_checks(v_providers, p_slots, p_full_scan) d;
  -- A lock is a write, and an idle daemon looks every second.
  v_from := image_jobs.due_from('', p_full_scan);
  if v_daemon.daemon is not null and v_lanes = '{}' and v_checks is null and not exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
    order by r.due_at offset 0)
  then
    return;
  end if;
  perform from image_jobs.claimants c where c.daemon = p_daemon for key share;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
  perform set_config('image_jobs.writer', 'daemon', true);
  if v_lanes <> '{}' and image_jobs.has_budget() then
    -- One at a time: another would spend the same.
    perform pg_advisory_xact_lock(hashtextextended('image_jobs budget', 0));
    v_budget := (select b.usd from image_jobs.budget_left() b);
    if v_budget <= 0 then
      v_lanes := '{}';
    end if;
  end if;
  -- The locks of the limits, all at once and in order.
  perform image_jobs.lock_limits(array(select split_part(o.lane, ':', 1) from unnest(v_lanes) o));
  v_probing := array(
    select p.name from image_jobs.providers p
    where p.name in (select split_part(o.lane, ':', 1) from unnest(v_lanes) o) and (image_jobs.streak_of(p.name)).closings > 0
    for update skip locked);
  perform image_jobs.promote_due(p_full_scan);

  for v_priority in
    select o.priority from unnest(v_lanes) o union select c.priority from unnest(v_priorities) as c (priority) order by 1 desc
  loop
    v_due := array(
      select c.id from unnest(v_checks, v_priorities) as c (id, priority) where c.priority = v_priority);
    if cardinality(v_due) > 0 then
      -- Half of them, where runs wait to be started; of an odd one a coin decides.
      v_quota := v_left;
      if exists (select from unnest(v_lanes) o where o.priority = v_priority) then
        v_quota := floor(v_left / 2.0 + random());
      end if;
      return query select image_jobs.claim_checks(p_daemon, v_due, v_quota);
      get diagnostics v_count = row_count;
      v_left := v_left - v_count;
    end if;
    -- First an even share for each lane, then what the others left.
    for v_pass in 1..2 loop
      select count(*) into v_peers from unnest(v_lanes) o where o.priority = v_priority;
      exit when v_pass = 2 and v_peers = 1;
      foreach v_lane in array v_lanes loop
        continue when v_lane.priority <> v_priority;
        exit when v_left <= 0;
        v_provider := split_part(v_lane.lane, ':', 1);
        v_quota := case v_pass when 1 then ceil(v_left::numeric / v_peers) else v_left end;
        v_quota := least(v_quota, image_jobs.available_starts(v_provider, v_lane.lane));
        v_peers := v_peers - 1;
        v_probe := coalesce((image_jobs.streak_of(v_provider)).closings > 0, false);
        continue when v_quota <= 0 or v_budget <= 0 or v_probe and not v_provider = any (v_probing);
        return query select image_jobs.claim_starts(p_daemon, v_lane, v_quota, p_full_scan, v_probe, v_budget);
        get diagnostics v_count = row_count;
        v_left := v_left - v_count;
        if v_budget is not null and v_count > 0 then
          v_budget := (select b.usd from image_jobs.budget_left() b);
        end if;
      end loop;
    end loop;
    if v_left > 0 and cardinality(v_due) > 0 then
      return query select image_jobs.claim_checks(p_daemon, v_due, v_left);
      get diagnostics v_count = row_count;
      v_left := v_left - v_count;
    end if;
    exit when v_left <= 0;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;
