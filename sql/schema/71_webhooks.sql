-- Webhooks: a provider posts to the project's own REST endpoint, and the database is the receiver.
--
-- A delivery never settles a run. It only makes the run's next check due now; the claim that follows asks the provider.
-- So what is duplicate, late, early, out of order or contradicting does no harm.

create table if not exists private.webhook_deliveries (
  provider text not null,
  delivery_id text not null,
  provider_job_id text,
  run_id varchar,
  type text,
  body text,
  received_at timestamptz not null,
  closed_at timestamptz,
  ticket bigint,
  ask_at timestamptz,
  primary key (provider, delivery_id)
);
comment on table private.webhook_deliveries is 'The inbox: verified deliveries, each once. Kept for a week.';
comment on column private.webhook_deliveries.provider_job_id is 'The order it speaks of.';
comment on column private.webhook_deliveries.run_id is 'The run it names, or whose order it speaks of, once known.';
comment on column private.webhook_deliveries.body is 'As it came, byte for byte; null if it has base64 in it.';
comment on column private.webhook_deliveries.closed_at is 'When it was of use, or of none. Open ones wait an hour for their run.';
comment on column private.webhook_deliveries.ticket is 'Of the run that the order was made for, where the provider had to be asked.';
comment on column private.webhook_deliveries.ask_at is
  'Not before then is the provider asked whose order it is, or the run looked at again. Null: not asked yet.';
create index if not exists webhook_deliveries_open on private.webhook_deliveries (provider_job_id) where closed_at is null;
create index if not exists webhook_deliveries_received on private.webhook_deliveries (received_at);

create table if not exists private.webhook_counters (
  provider text not null,
  minute timestamptz not null,
  accepted bigint not null default 0,
  duplicates bigint not null default 0,
  refused bigint not null default 0,
  slot bigint not null default 0,
  primary key (provider, minute, slot)
);
comment on table private.webhook_counters is 'All that is kept of a bad call: a row for each would let anyone fill the disk.';
comment on column private.webhook_counters.slot is '0 counts good calls, 1 to 8 bad ones: sum them up.';

-- Whose order a delivery speaks of.
create index if not exists runs_ordered on public.runs (provider_job_id)
  where kind = 'image_gen' and provider_job_id is not null;

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
      select md5('late webhook ' || v_delivery.run_id || ' ' || v_delivery.ticket)::uuid, v_delivery.run_id, 'log',
        jsonb_build_object('event', 'late_webhook',
          'message', 'A webhook of the order came after it had been given up: its image may be there now.',
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

-- The receipt on a run's trail, once. Nothing of the body: it may hold anything.
create or replace function private.note_delivery(p_run varchar, p_provider text, p_delivery text, p_type text)
returns void language sql volatile set search_path = ''
as $$
  insert into public.run_events (id, run_id, kind, payload)
  select md5('delivery ' || p_run || ' ' || p_provider || ' ' || p_delivery)::uuid, p_run, 'webhook', jsonb_strip_nulls(jsonb_build_object('event', 'webhook',
    'message', 'A webhook came from the provider.',
    'data', jsonb_build_object('provider', p_provider, 'type', p_type,
      'delivery', case when not private.has_base64(to_jsonb(p_delivery)) then p_delivery end)))
  on conflict (id) do nothing
$$;

-- A delivery may come before the order is written down, or while it is being checked: then the next check is due at once.
create or replace function private.hear_deliveries()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_delivery record;
begin
  for v_delivery in
    select d.provider, d.delivery_id, d.type, d.run_id from private.webhook_deliveries d
    where d.closed_at is null and d.provider_job_id = new.provider_job_id
      and d.received_at > private.now() - interval '1 hour'
      and d.provider in ('hmac', split_part(coalesce(new.via, new.processor), ':', 1))
    for update skip locked
  loop
    if v_delivery.run_id is null then
      perform private.note_delivery(new.id, v_delivery.provider, v_delivery.delivery_id, v_delivery.type);
    end if;
    update private.webhook_deliveries d set run_id = new.id, closed_at = private.now()
    where d.provider = v_delivery.provider and d.delivery_id = v_delivery.delivery_id;
    new.due_at := private.now();
    new.webhook := 'came';
  end loop;
  return new;
end
$$;

create or replace trigger hear_deliveries before update on public.runs
  for each row when (
    old.kind = 'image_gen' and old.claimed_by is not null
    and new.status = 'running' and new.claimed_by is null and new.provider_job_id is not null)
  execute function private.hear_deliveries();

-- Counts a call. With a minute's rows there is always something to conflict with, so these are few. Good calls never wait
-- for bad ones: a flood of those queues for rows of its own.
create or replace function private.count_webhook(p_provider text, p_accepted integer, p_duplicates integer, p_refused integer)
returns void language sql volatile set search_path = ''
as $$
  insert into private.webhook_counters as c (provider, minute, accepted, duplicates, refused, slot)
  values (p_provider, date_trunc('minute', private.now()), p_accepted, p_duplicates, p_refused,
    case when p_refused > 0 then 1 + pg_backend_pid() % 8 else 0 end)
  on conflict (provider, minute, slot) do update
  set accepted = c.accepted + excluded.accepted, duplicates = c.duplicates + excluded.duplicates,
    refused = c.refused + excluded.refused
$$;

-- Receives one delivery. Never raises, since that would roll the counter back: a refusal is the answer's status.
create or replace function private.receive_webhook(p_provider text, p_headers jsonb, p_body text)
returns jsonb language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_provider text := left(coalesce(p_provider, ''), 50);
  v_headers jsonb := '{}';
  v_json jsonb;
  v_id text;
  v_order text;
begin
  if octet_length(p_body) > 1048576 then
    perform private.count_webhook(v_provider, 0, 0, 1);
    perform set_config('response.status', '413', true);
    return jsonb_build_object('code', 'PT413', 'message', 'A delivery has at most 1 MiB.');
  end if;
  if exists (select from private.webhook_secrets w where w.provider = v_provider) then
    if jsonb_typeof(p_headers) = 'object' then
      select coalesce(jsonb_object_agg(lower(h.key), h.value), '{}') into v_headers from jsonb_each_text(p_headers) h;
    end if;
    v_json := private.json_or_null(p_body);
    v_id := private.verified_delivery(v_provider, v_headers, p_body, v_json);
  end if;
  if v_id is null then
    perform private.count_webhook(v_provider, 0, 0, 1);
    perform set_config('response.status', '401', true);
    return jsonb_build_object('code', 'PT401', 'message', 'The signature is missing, wrong or stale.');
  end if;

  -- An order by the provider's id for it; in the hex scheme job_id may name the run instead.
  v_order := nullif(coalesce(v_json #>> '{data,id}', v_json ->> 'id', case when v_provider = 'hmac' then (
    select r.provider_job_id from public.runs r where r.kind = 'image_gen' and r.id = v_json ->> 'job_id') end), '');
  insert into private.webhook_deliveries (provider, delivery_id, provider_job_id, type, body, received_at)
  values (v_provider, v_id, case when length(v_order) <= 500 then v_order end,
    case when not private.has_base64(v_json) then left(coalesce(v_json ->> 'type', v_json ->> 'status'), 100) end,
    case when not private.has_base64(to_jsonb(p_body)) then p_body end, private.now())
  on conflict do nothing;
  if not found then
    perform private.count_webhook(v_provider, 0, 1, 0);
    return jsonb_build_object('received', true, 'duplicate', true);
  end if;
  if length(v_order) <= 500 then
    perform private.match_deliveries(v_order);
  end if;
  perform private.count_webhook(v_provider, 1, 0, 0);
  return jsonb_build_object('received', true, 'duplicate', false);
end
$$;

-- What daemons do every few seconds: what crossed with its run is given to it, and what is old is forgotten.
create or replace function private.sweep_webhooks()
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_order record;
begin
  update private.webhook_deliveries d set closed_at = private.now()
  where d.closed_at is null and d.received_at <= private.now() - interval '1 hour';
  -- A provider tries for up to three days; what it sends again must still be known.
  delete from private.webhook_deliveries d where d.received_at < private.now() - interval '7 days';
  delete from private.webhook_counters c where c.minute < private.now() - interval '30 days';
  for v_order in
    select distinct d.provider, d.provider_job_id, d.run_id, d.ticket from private.webhook_deliveries d
    where d.closed_at is null and d.ticket is not null and d.ask_at <= private.now()
  loop
    perform private.attach_order(v_order.provider, v_order.provider_job_id, v_order.run_id, v_order.ticket);
  end loop;
  return private.match_deliveries(null);
end
$$;

-- Takes a delivery out of the inbox again, which doctor does with its own; whether it was there.
create or replace function private.forget_delivery(p_provider text, p_delivery text)
returns boolean language sql volatile set search_path = ''
as $$
  with gone as (
    delete from private.webhook_deliveries d where d.provider = p_provider and d.delivery_id = p_delivery returning 1
  )
  select exists (select from gone)
$$;

-- The doors. PostgREST hands a JSON object to a single unnamed json parameter byte for byte; jsonb would not keep it.
create or replace function public.webhook_openai(json)
returns jsonb language sql volatile set search_path = ''
as $$ select private.receive_webhook('openai', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;

create or replace function public.webhook_midjourney(json)
returns jsonb language sql volatile set search_path = ''
as $$ select private.receive_webhook('midjourney', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;

create or replace function public.webhook_hmac(json)
returns jsonb language sql volatile set search_path = ''
as $$ select private.receive_webhook('hmac', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;

-- For an Edge Function or a route of the application, which has the raw body.
create or replace function public.receive_webhook(provider text, headers jsonb, body text)
returns jsonb language sql volatile set search_path = ''
as $$ select private.receive_webhook(provider, headers, body) $$;
