-- Orders that nobody wrote down: they were taken, and their ids never arrived here. The first webhook tells that there is one.
-- The daemons ask the provider whose it is, and its run goes on with it instead of ordering again.

-- Deliveries whose order no run has, a few seconds after they came (before that, its id may be on its way here): up to
-- p_limit orders of these providers, leased to the caller for a minute, which asks whose they are and calls attach_order.
-- The newest first: where others use the same account, most are theirs, and ours must not wait behind them.
create or replace function private.unmatched_deliveries(p_providers text[], p_limit integer)
returns setof jsonb language sql volatile set search_path = ''
as $$
  with open as materialized (
    select d.provider, d.delivery_id from private.webhook_deliveries d
    where d.closed_at is null and d.run_id is null and d.provider = any (p_providers) and d.provider_job_id is not null
      and d.received_at between private.now() - interval '1 hour' and private.now() - interval '3 s'
      and coalesce(d.ask_at, '-infinity') <= private.now()
      and not exists (select from public.runs r where r.kind = 'image_gen' and r.provider_job_id = d.provider_job_id)
    order by d.received_at desc limit p_limit
    for update skip locked
  ), leased as (
    update private.webhook_deliveries d set ask_at = private.now() + interval '1 min'
    from open where d.provider = open.provider and d.delivery_id = open.delivery_id
    returning d.provider, d.provider_job_id
  )
  select distinct jsonb_build_object('provider', l.provider, 'provider_job_id', l.provider_job_id) from leased l
$$;

-- Whether an order at this provider can have been made for a run: there, or on its way through its fallback.
create or replace function private.may_have_asked(r public.runs, p_provider text)
returns boolean language sql stable set search_path = ''
as $$
  select p_provider in (
    select split_part(step, ':', 1) from unnest(r.processor || private.steps_left(r.metadata, r.processor, null)) step)
$$;

-- Gives an order that nobody wrote down to the run that it was made for (p_run_id null: it is none of ours). Answers:
--   attached   the run waited for its next attempt; now it is parked with this order, and asked about at once
--   known      it has this order
--   held       an attempt is at work, perhaps the one that made the order: looked at again when that has ended. Where no
--              webhook of the order came, a note in the inbox sees to that
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

-- How long a webhook may still tell of an attempt that ended with an unknown outcome: the daemon that sent the order said
-- so. Null if none will: there was no order, or there are no secrets, without which no webhook is believed.
create or replace function private.webhook_wait(r public.runs)
returns interval language sql stable set search_path = ''
as $$
  select make_interval(secs => last.wait)
  from (
    select (e.payload #>> '{data,webhookWait}')::double precision as wait from public.run_events e
    where e.run_id = r.id and e.payload ->> 'event' in ('claimed', 'submitted')
    order by e.seq desc limit 1) last
  where r.provider_job_id is null
    and exists (select from private.webhook_secrets w where w.provider = split_part(coalesce(r.via, r.processor), ':', 1))
$$;

-- An attempt ends without knowing what came of it, and a webhook of its order is here already: the run goes on with that order,
-- and not to another provider.
create or replace function private.find_order()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_delivery record;
begin
  select d.provider_job_id, d.type into v_delivery from private.webhook_deliveries d
  where d.closed_at is null and d.run_id = new.id and d.ticket = new.ticket
    and d.received_at > private.now() - interval '1 hour'
    and d.provider in ('hmac', split_part(coalesce(old.via, old.processor), ':', 1))
  order by d.received_at limit 1;
  if found then
    new.status := 'running';
    if new.via is distinct from old.via then
      new.via := old.via;
      new.lane := old.lane;
      new.rank := null;
      new.attempt := old.attempt;
    end if;
    new.provider_job_id := v_delivery.provider_job_id;
    new.submitted_at := private.now();
    new.due_at := private.now();
    new.webhook := case when v_delivery.type is distinct from 'order taken' then 'came' end;
    new.finished_at := null;
    new.payload := null;
    new.message := 'An earlier attempt had ordered it; that order is used.';
    update private.webhook_deliveries d set closed_at = private.now() where d.run_id = new.id and d.provider_job_id = v_delivery.provider_job_id;
  end if;
  return new;
end
$$;

create or replace trigger find_order before update on public.runs
  for each row when (
    old.kind = 'image_gen' and old.claimed_by is not null and old.ticket = new.ticket
    and new.claimed_by is null and new.provider_job_id is null
    and (new.status = 'pending' or (new.status = 'failed' and new.payload ->> 'code' in ('outcome_unknown', 'timeout', 'storage_disk'))))
  execute function private.find_order();
