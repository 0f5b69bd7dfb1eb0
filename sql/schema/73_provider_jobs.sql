-- Orphans: provider jobs whose ids were never saved (the daemon died between submit and save). The first webhook shows that
-- there is one. The daemons ask the provider for which run it is, and the run goes on with it instead of submitting again.

-- Lease provider jobs that have deliveries and no run, a few seconds after these came (before that, the id may be on its way
-- here): up to p_limit of these providers, for a minute. The caller asks the provider whose they are and calls
-- attach_provider_job.
-- The newest first: where others use the same account, most are theirs, and ours must not wait behind them.
create or replace function image_jobs.unmatched_deliveries(p_providers text[], p_limit integer)
returns setof jsonb language sql volatile set search_path = ''
as $$
  with open as materialized (
    select d.provider, d.delivery_id from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.run_id is null and d.provider = any (p_providers) and d.provider_job_id is not null
      and d.received_at between image_jobs.now() - interval '1 hour' and image_jobs.now() - interval '3 s'
      and coalesce(d.ask_at, '-infinity') <= image_jobs.now()
      and not exists (select from public.runs r where r.kind = 'image_gen' and r.provider_job_id = d.provider_job_id)
    order by d.received_at desc limit p_limit
    for update skip locked
  ), leased as (
    update image_jobs.webhook_deliveries d set ask_at = image_jobs.now() + interval '1 min'
    from open where d.provider = open.provider and d.delivery_id = open.delivery_id
    returning d.provider, d.provider_job_id
  )
  select distinct jsonb_build_object('provider', l.provider, 'provider_job_id', l.provider_job_id) from leased l
$$;

-- Returns whether a job at this provider can have been made for a run: there, or on its way through its fallback.
create or replace function image_jobs.may_have_submitted(r public.runs, p_provider text)
returns boolean language sql stable set search_path = ''
as $$
  select p_provider in (
    select split_part(step, ':', 1) from unnest(r.processor || image_jobs.remaining_fallbacks(r.metadata, r.processor, null)) step)
$$;

-- Returns whether max_running of a provider and a model leaves room for one more. Locks the limits, as claims do, but waits
-- for no claim, since the caller holds a run: then there is no room for now.
create or replace function image_jobs.has_room(p_provider text, p_processor text)
returns boolean language plpgsql volatile set search_path = ''
as $$
declare
  v_version bigint := (
    select f.version from image_jobs.limits_in_force f where f.provider = p_provider order by f.version desc limit 1);
  v_limit record;
begin
  if not exists (
    select from image_jobs.limits_of(p_provider) l
    where (l.model is null or l.provider || ':' || l.model = p_processor) and l.max_running is not null)
  then
    return true;
  end if;
  perform from image_jobs.limits_in_force f where f.provider = p_provider and f.version = v_version for update skip locked;
  if not found then
    return false;
  end if;
  for v_limit in
    select l.* from image_jobs.limits_of(p_provider) l
    where (l.model is null or l.provider || ':' || l.model = p_processor) and l.max_running is not null
  loop
    if image_jobs.count_running(p_provider, v_limit.model, v_limit.max_running) >= v_limit.max_running then
      return false;
    end if;
  end loop;
  return true;
end
$$;

-- Attach an orphaned provider job to the run that it was made for (p_run_id null: it is none of ours). Returns:
--   attached   the run waited for its next attempt; now it is parked with this job, and polled at once. Where max_running
--              leaves no room for it, it waits on, and its next start polls this job
--   known      the run has this job
--   held       an attempt is at work, perhaps the one that made the job: looked at again when that has ended. Where no
--              webhook of the job came, a note in the inbox sees to that
--   noted      the run has failed; an event says that there is a provider job
--   cancelled  the run has no use for it: cancelled, requeued, completed, rerouted, or submitted again; the job is
--              cancelled at the provider
--   unknown    there is no such run
create or replace function image_jobs.attach_provider_job(p_provider text, p_provider_job_id text, p_run_id varchar, p_ticket bigint)
returns text language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_run record;
  v_delivery record;
  v_result text;
  v_claim bigint;
  v_call bigint;
begin
  select r.* into v_run from public.runs r
  where r.id = p_run_id and (r.kind = 'image_gen') is true and r.ticket is not null and image_jobs.may_have_submitted(r, p_provider)
  for update skip locked;
  -- The run is locked. An event would wait for that: its run must be there.
  if not found and exists (
    select from public.runs r
    where r.id = p_run_id and (r.kind = 'image_gen') is true and r.ticket is not null and image_jobs.may_have_submitted(r, p_provider))
  then
    return 'held';
  end if;
  v_result := case
    when v_run.id is null then 'unknown'
    when v_run.provider_job_id = p_provider_job_id then 'known'
    when v_run.ticket <> p_ticket or v_run.status in ('cancelled', 'completed') or v_run.provider_job_id is not null
      then 'cancelled'
    when v_run.status = 'failed' then 'noted'
    when split_part(coalesce(v_run.routed_to, v_run.processor), ':', 1) <> p_provider then 'cancelled'
    when v_run.status = 'pending' then 'attached'
    else 'held' end;
  v_call := image_jobs.call_of_job(p_run_id, p_ticket, p_provider, p_provider_job_id);
  perform image_jobs.close_calls(jsonb_build_array(jsonb_build_object('id', v_call, 'provider_job_id', p_provider_job_id)));

  case v_result
    when 'attached' then
      perform set_config('image_jobs.writer', 'daemon', true);
      v_claim := nextval('image_jobs.claims');
      if image_jobs.has_room(p_provider, coalesce(v_run.routed_to, v_run.processor)) then
        update public.runs r
        set status = 'running', claim = v_claim, call = coalesce(v_call, v_claim), provider_job_id = p_provider_job_id,
          submitted_at = v_now,
          due_at = v_now, rank = null, attempt = greatest(r.attempt, 1), refused_since = null, payload = null,
          webhook = case when exists (
            select from image_jobs.webhook_deliveries d
            where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id
              and d.type is distinct from 'provider job taken') then 'came' end,
          message = 'An earlier attempt had ordered it; that order is used.'
        where r.id = p_run_id;
        perform image_jobs.open_calls(array[p_run_id]);
      else
        -- The start to come counts an attempt, which is this job's.
        update public.runs r
        set call = v_call, provider_job_id = p_provider_job_id, submitted_at = v_now, attempt = greatest(r.attempt - 1, 0),
          message = 'An earlier attempt had ordered it; that order is used.'
        where r.id = p_run_id;
      end if;
      perform set_config('image_jobs.writer', v_writer, true);
    when 'cancelled' then
      perform image_jobs.cancel_provider_job(p_provider, p_provider_job_id, p_run_id, v_call);
    when 'noted' then
      perform image_jobs.record_provider_job(p_run_id, 'log', 'late_provider_job',
        'The provider has an order of this run whose id was never written down; it may be charged.', p_provider_job_id, '{}');
    when 'held' then
      insert into image_jobs.webhook_deliveries (provider, delivery_id, provider_job_id, run_id, type, received_at)
      select p_provider, 'provider job ' || p_provider_job_id, p_provider_job_id, p_run_id, 'provider job taken', v_now
      where not exists (
        select from image_jobs.webhook_deliveries d
        where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id)
      on conflict do nothing;
    else
  end case;

  for v_delivery in
    select d.delivery_id, d.type, d.run_id from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id
    for update
  loop
    if v_delivery.run_id is null and v_result <> 'unknown' then
      perform image_jobs.record_delivery(p_run_id, p_provider, v_delivery.delivery_id, v_delivery.type);
    end if;
    update image_jobs.webhook_deliveries d
    set run_id = case when v_result <> 'unknown' then p_run_id end,
      ticket = case when v_result <> 'unknown' then p_ticket end,
      closed_at = case when v_result in ('attached', 'cancelled', 'noted') then v_now end,
      ask_at = case v_result when 'unknown' then 'infinity' else v_now + interval '1 min' end
    where d.provider = p_provider and d.delivery_id = v_delivery.delivery_id;
  end loop;
  if v_result = 'known' then
    perform image_jobs.match_deliveries(p_provider_job_id);
  end if;
  return v_result;
end
$$;

-- Returns how long a webhook of an attempt with an unknown outcome may still come: the daemon recorded it when it
-- submitted. Null if none will: nothing was submitted, or there are no secrets, without which no webhook verifies.
create or replace function image_jobs.webhook_wait(r public.runs)
returns interval language sql stable set search_path = ''
as $$
  select make_interval(secs => last.wait)
  from (
    select (e.payload #>> '{data,webhookWait}')::double precision as wait from public.run_events e
    where e.run_id = r.id and e.payload ->> 'event' in ('claimed', 'submitted')
    order by e.seq desc limit 1) last
  where r.provider_job_id is null
    and exists (select from image_jobs.webhook_secrets w where w.provider = split_part(coalesce(r.routed_to, r.processor), ':', 1))
$$;

-- Resume the provider job of an attempt that ends with an unknown outcome, if a webhook of it is here already: the run goes
-- on with that job, and not to another provider. Called by the guard of runs (31_guard_runs.sql).
create or replace function image_jobs.resume_provider_job(p_old public.runs, p_new public.runs)
returns public.runs language plpgsql volatile set search_path = ''
as $$
declare
  v_delivery record;
begin
  select d.provider_job_id, d.type into v_delivery from image_jobs.webhook_deliveries d
  where d.closed_at is null and d.run_id = p_new.id and d.ticket = p_new.ticket
    and d.received_at > image_jobs.now() - interval '1 hour'
    and d.provider in ('hmac', split_part(coalesce(p_old.routed_to, p_old.processor), ':', 1))
  order by d.received_at limit 1;
  if found then
    p_new.status := 'running';
    if p_new.routed_to is distinct from p_old.routed_to then
      p_new.routed_to := p_old.routed_to;
      p_new.lane := p_old.lane;
      p_new.rank := null;
      p_new.attempt := p_old.attempt;
    end if;
    p_new.provider_job_id := v_delivery.provider_job_id;
    p_new.call := coalesce(image_jobs.call_of_job(
      p_old.id, p_old.ticket, split_part(coalesce(p_old.routed_to, p_old.processor), ':', 1), v_delivery.provider_job_id), p_old.claim);
    p_new.submitted_at := image_jobs.now();
    p_new.due_at := image_jobs.now();
    p_new.webhook := case when v_delivery.type is distinct from 'provider job taken' then 'came' end;
    p_new.finished_at := null;
    p_new.payload := null;
    p_new.message := 'An earlier attempt had ordered it; that order is used.';
    update image_jobs.webhook_deliveries d set closed_at = image_jobs.now() where d.run_id = p_new.id and d.provider_job_id = v_delivery.provider_job_id;
  end if;
  return p_new;
end
$$;
