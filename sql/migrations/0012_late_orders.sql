-- Word and orders that come late have events of their own: they are no images, and cost nothing by themselves.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- Gives open deliveries to their runs: those of one order, or all (null), which the daemons' sweeps do. A run that is
-- locked is left for the next sweep. A held run is left to the park that follows: only then it can be checked again.
create or replace function private.match_deliveries(p_provider_job_id text)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_matched integer := 0;
  v_delivery record;
begin
  perform set_config('image_jobs.hand', 'daemon', true);
  for v_delivery in
    select d.provider, d.delivery_id, d.type, d.run_id as known, d.provider_job_id,
      r.id as run_id, r.status, r.claimed_by, r.ticket, r.payload ->> 'code' as code
    from private.webhook_deliveries d
    join public.runs r on r.kind = 'image_gen' and r.ticket is not null and r.provider_job_id = d.provider_job_id
    where d.closed_at is null and d.received_at > v_now - interval '1 hour'
      and (p_provider_job_id is null or d.provider_job_id = p_provider_job_id)
      and d.provider in ('hmac', split_part(coalesce(r.via, r.processor), ':', 1))
    order by r.id
    for update of r skip locked
  loop
    if v_delivery.known is null then
      perform private.note_delivery(v_delivery.run_id, v_delivery.provider, v_delivery.delivery_id, v_delivery.type);
    end if;
    update private.webhook_deliveries d
    set run_id = v_delivery.run_id,
      closed_at = case when v_delivery.status <> 'running' or v_delivery.claimed_by is null then v_now end
    where d.provider = v_delivery.provider and d.delivery_id = v_delivery.delivery_id;
    if v_delivery.status = 'running' and v_delivery.claimed_by is null then
      update public.runs r set due_at = least(r.due_at, v_now), webhook = 'came'
      where r.id = v_delivery.run_id and (r.due_at > v_now or r.webhook = 'awaited');
    elsif v_delivery.status = 'failed' and v_delivery.code = 'polling_timeout' then
      -- Once, however often it is said.
      insert into public.run_events (id, run_id, kind, payload)
      select md5('late word ' || v_delivery.run_id || ' ' || v_delivery.ticket)::uuid, v_delivery.run_id, 'log',
        jsonb_build_object('event', 'late_word',
          'message', 'Word of the order came after it had been given up: its image may be there now.',
          'data', jsonb_build_object('providerJobId', v_delivery.provider_job_id,
            'hint', 'Requeue the run: it asks for the same order, and nothing is ordered anew.'))
      on conflict (id) do nothing;
    end if;
    v_matched := v_matched + 1;
  end loop;
  perform set_config('image_jobs.hand', v_hand, true);
  return v_matched;
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

-- Gives an order that nobody wrote down to the run that it was made for (p_run_id null: it is none of ours). Answers:
--   attached   the run waited for its next attempt; now it is parked with this order, and asked about at once
--   known      it has this order
--   held       an attempt is at work, perhaps the one that made the order: looked at again when that has ended. Where no
--              word of the order came, a note in the inbox sees to that
--   noted      the run has failed; an event says that there is an order
--   cancelled  the run has no use for it: cancelled, requeued, completed, gone on to another provider, or ordered again;
--              it is cancelled at the provider
--   unknown    there is no such run
create or replace function private.attach_order(p_provider text, p_provider_job_id text, p_run_id varchar, p_ticket bigint)
returns text language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_run record;
  v_delivery record;
  v_result text;
begin
  select r.* into v_run from public.runs r
  where r.id = p_run_id and r.kind = 'image_gen' and r.ticket is not null and private.may_have_asked(r, p_provider)
  for update skip locked;
  -- Somebody has it locked. An event would wait for that: its run must be there.
  if not found and exists (
    select from public.runs r
    where r.id = p_run_id and r.kind = 'image_gen' and r.ticket is not null and private.may_have_asked(r, p_provider))
  then
    return 'held';
  end if;
  v_result := case
    when v_run.id is null then 'unknown'
    when v_run.provider_job_id = p_provider_job_id then 'known'
    when v_run.ticket <> p_ticket or v_run.status in ('cancelled', 'completed') or v_run.provider_job_id is not null
      then 'cancelled'
    when v_run.status = 'failed' then 'noted'
    when split_part(coalesce(v_run.via, v_run.processor), ':', 1) <> p_provider then 'cancelled'
    when v_run.status = 'pending' then 'attached'
    else 'held' end;

  case v_result
    when 'attached' then
      perform set_config('image_jobs.hand', 'daemon', true);
      update public.runs r
      set status = 'running', claim = nextval('private.claims'), provider_job_id = p_provider_job_id, submitted_at = v_now,
        due_at = v_now, rank = null, attempt = greatest(r.attempt, 1), refused_since = null, payload = null,
        webhook = case when exists (
          select from private.webhook_deliveries d
          where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id
            and d.type is distinct from 'order taken') then 'came' end,
        message = 'An earlier attempt had ordered it; that order is used.'
      where r.id = p_run_id;
      perform set_config('image_jobs.hand', v_hand, true);
    when 'cancelled' then
      perform private.cancel_order(p_provider, p_provider_job_id, p_run_id);
    when 'noted' then
      perform private.note_order(p_run_id, 'log', 'late_order',
        'The provider has an order of this run whose id was never written down; it may be charged.', p_provider_job_id, '{}');
    when 'held' then
      insert into private.webhook_deliveries (provider, delivery_id, provider_job_id, run_id, type, received_at)
      select p_provider, 'order ' || p_provider_job_id, p_provider_job_id, p_run_id, 'order taken', v_now
      where not exists (
        select from private.webhook_deliveries d
        where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id)
      on conflict do nothing;
    else
  end case;

  for v_delivery in
    select d.delivery_id, d.type, d.run_id from private.webhook_deliveries d
    where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id
    for update
  loop
    if v_delivery.run_id is null and v_result <> 'unknown' then
      perform private.note_delivery(p_run_id, p_provider, v_delivery.delivery_id, v_delivery.type);
    end if;
    update private.webhook_deliveries d
    set run_id = case when v_result <> 'unknown' then p_run_id end,
      ticket = case when v_result <> 'unknown' then p_ticket end,
      closed_at = case when v_result in ('attached', 'cancelled', 'noted') then v_now end,
      ask_at = case v_result when 'unknown' then 'infinity' else v_now + interval '1 min' end
    where d.provider = p_provider and d.delivery_id = v_delivery.delivery_id;
  end loop;
  if v_result = 'known' then
    perform private.match_deliveries(p_provider_job_id);
  end if;
  return v_result;
end
$$;
