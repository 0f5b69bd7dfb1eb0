-- Provider jobs that no run waits for: their run was cancelled, deleted, or requeued such that they were dropped. They are
-- cancelled at their providers; a row here stays until a daemon has done that.

create table if not exists image_jobs.cancellations (
  provider text not null,
  provider_job_id text not null,
  run_id varchar not null,
  requested_at timestamptz not null,
  due_at timestamptz not null,
  tries integer not null default 0,
  call bigint,
  primary key (provider, provider_job_id)
);
comment on table image_jobs.cancellations is 'Provider jobs that are to be cancelled. A row goes when that is done, or given up.';
comment on column image_jobs.cancellations.due_at is 'Not before then; while a daemon is at it, the end of its lease.';
comment on column image_jobs.cancellations.call is 'The call under which the job was made: what the provider says about its charge is written there.';
create index if not exists cancellations_of_a_call on image_jobs.cancellations (call);
create index if not exists cancellations_due on image_jobs.cancellations (due_at);

-- Request that a job is cancelled at its provider, by any daemon that serves it. An empty list of dropped claims makes them
-- look at once. Some providers return the same job for the same request: one that another run waits for is left to that.
create or replace function image_jobs.cancel_provider_job(
  p_provider text, p_provider_job_id text, p_run_id varchar, p_call bigint default null)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.provider_job_id = p_provider_job_id and r.id <> p_run_id
      and r.status in ('pending', 'running') and split_part(coalesce(r.routed_to, r.processor), ':', 1) = p_provider)
  then
    return;
  end if;
  insert into image_jobs.cancellations (provider, provider_job_id, run_id, requested_at, due_at, call)
  values (p_provider, p_provider_job_id, p_run_id, image_jobs.now(), image_jobs.now(), p_call)
  on conflict do nothing;
  perform pg_notify('image_jobs_drop', '');
end
$$;

-- Record an event about a provider job on its run; once, and not at all if the run was deleted.
create or replace function image_jobs.record_provider_job(
  p_run_id varchar, p_kind text, p_event text, p_message text, p_provider_job_id text, p_data jsonb)
returns void language sql volatile set search_path = ''
as $$
  select image_jobs.write_events(array[row(
    md5(p_event || ' provider job ' || p_run_id || ' ' || p_provider_job_id)::uuid, r.id, p_kind, jsonb_build_object(
    'event', p_event, 'message', p_message,
    'data', jsonb_strip_nulls(jsonb_build_object('providerJobId', p_provider_job_id) || p_data)))::image_jobs.event])
  from public.runs r where r.id = p_run_id
$$;

-- Lease up to p_limit cancellations at these providers to the caller, for a minute. Returns {provider, provider_job_id,
-- run_id}. A cancellation that no daemon could do for a day (none serves the provider any more) is given up.
create or replace function image_jobs.take_cancellations(p_providers text[], p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_old record;
begin
  for v_old in
    select c.provider, c.provider_job_id from image_jobs.cancellations c
    where c.requested_at < v_now - interval '1 day' and c.due_at <= v_now
    order by c.due_at for update skip locked
  loop
    perform image_jobs.finish_cancellation(v_old.provider, v_old.provider_job_id, 'No daemon serves this provider.', true);
  end loop;
  return query
  with due as materialized (
    select c.provider, c.provider_job_id from image_jobs.cancellations c
    where c.provider = any (p_providers) and c.due_at <= v_now
    order by c.due_at limit p_limit
    for update skip locked
  )
  update image_jobs.cancellations c set tries = c.tries + 1, due_at = v_now + interval '1 min'
  from due where c.provider = any (array[due.provider]) and c.provider_job_id = any (array[due.provider_job_id])
  returning jsonb_build_object('provider', c.provider, 'provider_job_id', c.provider_job_id, 'run_id', c.run_id);
end
$$;

-- Finish a cancellation: done (p_reason null), or why not. It is tried five times, with exponential back-off, unless
-- the provider's response is final. Does nothing if another daemon was faster. p_charge is what the provider said about its
-- charge, {"state", "cost"}; null: nothing, and the call's outcome is unknown.
create or replace function image_jobs.finish_cancellation(
  p_provider text, p_provider_job_id text, p_reason text, p_final boolean, p_charge jsonb default null)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_cancellation record;
begin
  -- Runs come first in the lock order, and the event at the end needs its run.
  perform from public.runs r
  where r.id = (
    select c.run_id from image_jobs.cancellations c where c.provider = p_provider and c.provider_job_id = p_provider_job_id)
  for no key update;
  select c.* into v_cancellation from image_jobs.cancellations c
  where c.provider = p_provider and c.provider_job_id = p_provider_job_id for update;
  if not found then
    return;
  end if;
  if p_reason is not null and not p_final and v_cancellation.tries < 5 then
    update image_jobs.cancellations c set due_at = image_jobs.now() + make_interval(secs => 5 * 2 ^ c.tries)
    where c.provider = p_provider and c.provider_job_id = p_provider_job_id;
    return;
  end if;
  delete from image_jobs.cancellations c where c.provider = p_provider and c.provider_job_id = p_provider_job_id;
  perform image_jobs.close_calls(jsonb_build_array(
    '{"state": "unknown"}' || coalesce(p_charge, '{}') || jsonb_build_object('id', v_cancellation.call)));
  perform image_jobs.refresh_costs(array[v_cancellation.run_id]);
  if p_reason is null then
    perform image_jobs.record_provider_job(v_cancellation.run_id, 'log', 'provider_job_cancelled', 'The order was cancelled at the provider.',
      p_provider_job_id, jsonb_build_object('hint', 'What was made of it by then may be charged.'));
  else
    perform image_jobs.record_provider_job(v_cancellation.run_id, 'error', 'warning',
      'The order could not be cancelled at the provider; it may still be charged.',
      p_provider_job_id, jsonb_build_object('tries', v_cancellation.tries,
        'reason', case when not image_jobs.has_base64(to_jsonb(p_reason)) then left(p_reason, 500) end));
  end if;
end
$$;
