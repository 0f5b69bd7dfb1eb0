-- Orders that nobody waits for: their run was cancelled, deleted, or requeued such that they were dropped. They are cancelled
-- at their providers; a row here stays until a daemon has done that.

create table if not exists private.cancellations (
  provider text not null,
  provider_job_id text not null,
  run_id varchar not null,
  requested_at timestamptz not null,
  due_at timestamptz not null,
  tries integer not null default 0,
  primary key (provider, provider_job_id)
);
comment on table private.cancellations is 'Orders that are to be cancelled at their providers. A row goes when that is done, or given up.';
comment on column private.cancellations.due_at is 'Not before then; while a daemon is at it, the end of its lease.';
create index if not exists cancellations_due on private.cancellations (due_at);

-- Has an order cancelled at its provider, by any daemon that serves it. They look at once: an empty list of dropped claims.
-- Some providers answer the same request with the same order: one that another run waits for is left to that.
create or replace function private.cancel_order(p_provider text, p_provider_job_id text, p_run_id varchar)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.provider_job_id = p_provider_job_id and r.id <> p_run_id
      and r.status in ('pending', 'running') and split_part(coalesce(r.via, r.processor), ':', 1) = p_provider)
  then
    return;
  end if;
  insert into private.cancellations (provider, provider_job_id, run_id, requested_at, due_at)
  values (p_provider, p_provider_job_id, p_run_id, private.now(), private.now())
  on conflict do nothing;
  perform pg_notify('image_jobs_drop', '');
end
$$;

-- An outside hand took the run away from its order, or deleted it. Taking over from a silent daemon keeps the order, and so does a
-- requeue after polling_timeout; a daemon that orders anew has heard from the provider that the first order failed. One that
-- orders elsewhere has heard nothing, if the time was up.
create or replace function private.drop_order()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  perform private.cancel_order(split_part(coalesce(old.via, old.processor), ':', 1), old.provider_job_id, old.id);
  return null;
end
$$;

create or replace trigger drop_order after update on public.runs
  for each row when (
    old.kind = 'image_gen' and old.provider_job_id is not null and old.status in ('pending', 'running')
    and (new.claim is distinct from old.claim
        and (new.status = 'cancelled' or new.provider_job_id is distinct from old.provider_job_id)
      or new.via is distinct from old.via and new.payload ->> 'code' = 'polling_timeout'))
  execute function private.drop_order();
create or replace trigger drop_order_of_deleted after delete on public.runs
  for each row when (
    old.kind = 'image_gen' and old.provider_job_id is not null and old.status in ('pending', 'running'))
  execute function private.drop_order();

-- What became of an order, on its run's trail; once, and not at all if the run was deleted.
create or replace function private.note_order(
  p_run_id varchar, p_kind text, p_event text, p_message text, p_provider_job_id text, p_data jsonb)
returns void language sql volatile set search_path = ''
as $$
  insert into public.run_events (id, run_id, kind, payload)
  select md5(p_event || ' order ' || p_run_id || ' ' || p_provider_job_id)::uuid, r.id, p_kind, jsonb_build_object(
    'event', p_event, 'message', p_message,
    'data', jsonb_strip_nulls(jsonb_build_object('providerJobId', p_provider_job_id) || p_data))
  from public.runs r where r.id = p_run_id
  on conflict (id) do nothing
$$;

-- Leases up to p_limit cancellations at these providers to the caller, for a minute. Answers {provider, provider_job_id,
-- run_id}. What nobody could do for a day (no daemon serves the provider any more) is given up.
create or replace function private.take_cancellations(p_providers text[], p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_old record;
begin
  for v_old in
    select c.provider, c.provider_job_id from private.cancellations c
    where c.requested_at < v_now - interval '1 day' and c.due_at <= v_now
    order by c.due_at for update skip locked
  loop
    perform private.finish_cancellation(v_old.provider, v_old.provider_job_id, 'No daemon serves this provider.', true);
  end loop;
  return query
  with due as materialized (
    select c.provider, c.provider_job_id from private.cancellations c
    where c.provider = any (p_providers) and c.due_at <= v_now
    order by c.due_at limit p_limit
    for update skip locked
  )
  update private.cancellations c set tries = c.tries + 1, due_at = v_now + interval '1 min'
  from due where c.provider = due.provider and c.provider_job_id = due.provider_job_id
  returning jsonb_build_object('provider', c.provider, 'provider_job_id', c.provider_job_id, 'run_id', c.run_id);
end
$$;

-- What came of a cancellation: done (p_reason null), or why not. It is tried five times, with exponential back-off, unless
-- the provider's answer is final. Does nothing if somebody else was faster.
create or replace function private.finish_cancellation(
  p_provider text, p_provider_job_id text, p_reason text, p_final boolean)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_order record;
begin
  -- Runs come first in the lock order, and the event at the end needs its run.
  perform from public.runs r
  where r.id = (
    select c.run_id from private.cancellations c where c.provider = p_provider and c.provider_job_id = p_provider_job_id)
  for key share;
  select c.* into v_order from private.cancellations c
  where c.provider = p_provider and c.provider_job_id = p_provider_job_id for update;
  if not found then
    return;
  end if;
  if p_reason is not null and not p_final and v_order.tries < 5 then
    update private.cancellations c set due_at = private.now() + make_interval(secs => 5 * 2 ^ c.tries)
    where c.provider = p_provider and c.provider_job_id = p_provider_job_id;
    return;
  end if;
  delete from private.cancellations c where c.provider = p_provider and c.provider_job_id = p_provider_job_id;
  if p_reason is null then
    perform private.note_order(v_order.run_id, 'log', 'order_cancelled', 'The order was cancelled at the provider.',
      p_provider_job_id, jsonb_build_object('hint', 'What was made of it by then may be charged.'));
  else
    perform private.note_order(v_order.run_id, 'error', 'warning',
      'The order could not be cancelled at the provider; it may still be charged.',
      p_provider_job_id, jsonb_build_object('tries', v_order.tries,
        'reason', case when not private.has_base64(to_jsonb(p_reason)) then left(p_reason, 500) end));
  end if;
end
$$;
