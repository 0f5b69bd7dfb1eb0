-- Webhooks: a provider posts to the project's own REST endpoint, and the database is the receiver.
--
-- A delivery never settles a run. It only makes the run's next check due now; the check that follows polls the provider.
-- So a delivery that is duplicate, late, early, out of sequence or contradicting does no harm.

create table if not exists image_jobs.webhook_deliveries (
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
  state text,
  primary key (provider, delivery_id)
);
comment on table image_jobs.webhook_deliveries is 'The inbox: verified deliveries, each once. Kept for a week.';
comment on column image_jobs.webhook_deliveries.provider_job_id is 'The provider job it is about.';
comment on column image_jobs.webhook_deliveries.run_id is 'The run it names, or whose provider job it is about, once known.';
comment on column image_jobs.webhook_deliveries.body is
  'As received, byte for byte; null if it has base64 in it, or is of midjourney, which does not sign it, and larger than 16 KiB.';
comment on column image_jobs.webhook_deliveries.closed_at is 'When it was matched, or given up. Open ones wait an hour for their run.';
comment on column image_jobs.webhook_deliveries.ticket is 'Of the run that the provider job was made for, where the provider had to be asked.';
comment on column image_jobs.webhook_deliveries.ask_at is
  'Not before then is the provider asked whose job it is, or the run looked at again. Null: not asked yet.';
comment on column image_jobs.webhook_deliveries.state is 'Of midjourney: what the signature is of; not of the body.';
create index if not exists webhook_deliveries_of_a_state on image_jobs.webhook_deliveries (state, received_at) where state is not null;
create index if not exists webhook_deliveries_open on image_jobs.webhook_deliveries (provider_job_id) where closed_at is null;
create index if not exists webhook_deliveries_received on image_jobs.webhook_deliveries (received_at);

create table if not exists image_jobs.webhook_counters (
  provider text not null,
  minute timestamptz not null,
  accepted bigint not null default 0,
  duplicates bigint not null default 0,
  refused bigint not null default 0,
  slot bigint not null default 0,
  told bigint[] not null default '{0,0,0}',
  primary key (provider, minute, slot)
);
comment on table image_jobs.webhook_counters is 'All that is kept of a bad call: a row for each would let anyone fill the disk.';
comment on column image_jobs.webhook_counters.told is 'What of accepted, duplicates and refused the daemons'' metrics have counted.';
comment on column image_jobs.webhook_counters.slot is '0 counts good calls, 1 to 8 bad ones: sum them up.';

-- Finds the run whose provider job a delivery is about.
create index if not exists runs_provider_job on public.runs (provider_job_id)
  where provider_job_id is not null;

-- Match open deliveries to their runs: those of one provider job, or all (null), which the daemons' sweeps do. A locked
-- run is left for the next sweep. A held run is left to the park that follows: only then it can be checked again.
create or replace function image_jobs.match_deliveries(p_provider_job_id text)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_matched integer := 0;
  v_delivery record;
begin
  perform set_config('image_jobs.writer', 'daemon', true);
  for v_delivery in
    select d.provider, d.delivery_id, d.type, d.run_id as known, d.provider_job_id,
      r.id as run_id, r.status, r.claimed_by, r.ticket, r.payload ->> 'code' as code
    from image_jobs.webhook_deliveries d
    join public.runs r on r.kind = 'image_gen' and r.ticket is not null and r.provider_job_id = d.provider_job_id
    where d.closed_at is null and d.received_at > v_now - interval '1 hour'
      and (p_provider_job_id is null or d.provider_job_id = p_provider_job_id)
      and d.provider in ('hmac', split_part(coalesce(r.routed_to, r.processor), ':', 1))
      and not r.id = any (v_aside)
    order by r.id
    for update of r skip locked
  loop
    begin
      if v_delivery.known is null then
        perform image_jobs.record_delivery(v_delivery.run_id, v_delivery.provider, v_delivery.delivery_id, v_delivery.type);
      end if;
      update image_jobs.webhook_deliveries d
      set run_id = v_delivery.run_id,
        closed_at = case when v_delivery.status <> 'running' or v_delivery.claimed_by is null then v_now end
      where d.provider = v_delivery.provider and d.delivery_id = v_delivery.delivery_id;
      if v_delivery.status = 'running' and v_delivery.claimed_by is null then
        update public.runs r set due_at = least(r.due_at, v_now), webhook = 'came'
        where r.id = v_delivery.run_id and (r.due_at > v_now or r.webhook = 'awaited');
      elsif v_delivery.status = 'failed' and v_delivery.code = 'polling_timeout' then
        -- Once, however often it is delivered.
        perform image_jobs.write_events(array[row(
          md5('late webhook ' || v_delivery.run_id || ' ' || v_delivery.ticket)::uuid, v_delivery.run_id, 'log', jsonb_build_object('event', 'late_webhook',
            'message', 'A webhook of the order came after it had been given up: its image may be there now.',
            'data', jsonb_build_object('providerJobId', v_delivery.provider_job_id,
              'hint', 'Requeue the run: it asks for the same order, and nothing is ordered anew.')))::image_jobs.event]);
      end if;
      v_matched := v_matched + 1;
    exception when others or query_canceled or assert_failure then
      perform image_jobs.set_run_aside(v_delivery.run_id, sqlstate, sqlerrm);
    end;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
  return v_matched;
end
$$;

-- Record a receipt among a run's events, once. Nothing of the body: it may hold anything.
create or replace function image_jobs.record_delivery(p_run varchar, p_provider text, p_delivery text, p_type text)
returns void language sql volatile set search_path = ''
as $$
  select image_jobs.write_events(array[row(
    md5('delivery ' || p_run || ' ' || p_provider || ' ' || p_delivery)::uuid, p_run, 'webhook', jsonb_strip_nulls(jsonb_build_object('event', 'webhook',
    'message', 'A webhook came from the provider.',
    'data', jsonb_build_object('provider', p_provider, 'type', p_type,
      'delivery', case when not image_jobs.has_base64(to_jsonb(p_delivery)) then p_delivery end))))::image_jobs.event])
$$;

-- Make the next check due at once if a delivery came before the provider job was saved, or while it was being checked. Called by
-- the guard of runs (31_guard_runs.sql).
create or replace function image_jobs.consume_deliveries(p_run public.runs)
returns public.runs language plpgsql volatile set search_path = ''
as $$
declare
  v_delivery record;
begin
  for v_delivery in
    select d.provider, d.delivery_id, d.type, d.run_id from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.provider_job_id = p_run.provider_job_id
      and d.received_at > image_jobs.now() - interval '1 hour'
      and d.provider in ('hmac', split_part(coalesce(p_run.routed_to, p_run.processor), ':', 1))
    for update skip locked
  loop
    if v_delivery.run_id is null then
      perform image_jobs.record_delivery(p_run.id, v_delivery.provider, v_delivery.delivery_id, v_delivery.type);
    end if;
    update image_jobs.webhook_deliveries d set run_id = p_run.id, closed_at = image_jobs.now()
    where d.provider = v_delivery.provider and d.delivery_id = v_delivery.delivery_id;
    p_run.due_at := image_jobs.now();
    p_run.webhook := 'came';
  end loop;
  return p_run;
end
$$;

-- Count a call. With a minute's rows there is always something to conflict with, so these are few. Good calls never wait
-- for bad ones: a flood of those queues for rows of its own.
create or replace function image_jobs.count_webhook(p_provider text, p_accepted integer, p_duplicates integer, p_refused integer)
returns void language sql volatile set search_path = ''
as $$
  insert into image_jobs.webhook_counters as c (provider, minute, accepted, duplicates, refused, slot)
  values (p_provider, date_trunc('minute', image_jobs.now()), p_accepted, p_duplicates, p_refused,
    case when p_refused > 0 then 1 + pg_backend_pid() % 8 else 0 end)
  on conflict (provider, minute, slot) do update
  set accepted = c.accepted + excluded.accepted, duplicates = c.duplicates + excluded.duplicates,
    refused = c.refused + excluded.refused
$$;

-- Receive one delivery. Never raises, since that would roll the counter back: a refusal is the response's status.
create or replace function image_jobs.receive_webhook(p_provider text, p_headers jsonb, p_body text)
returns jsonb language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_provider text := left(coalesce(p_provider, ''), 50);
  v_has_secret boolean := exists (select from image_jobs.webhook_secrets w where w.provider = v_provider);
  -- An Edge Function passes on whatever it was called with: a counter for each name would let anyone fill the disk.
  v_counted text := case
    when v_has_secret or v_provider in ('openai', 'midjourney', 'hmac')
      or exists (select from image_jobs.models m where m.provider = v_provider) then v_provider
    else 'unknown' end;
  v_headers jsonb := '{}';
  v_json jsonb;
  v_id text;
  v_state text;
  v_replaces boolean := false;
  v_job text;
  v_named text;
  v_run record;
begin
  select null::varchar as id, null::text as provider_job_id, false as ended into v_run;
  if octet_length(p_body) > 1048576 then
    perform image_jobs.count_webhook(v_counted, 0, 0, 1);
    perform set_config('response.status', '413', true);
    return jsonb_build_object('code', 'PT413', 'message', 'A delivery has at most 1 MiB.');
  end if;
  if v_has_secret then
    if jsonb_typeof(p_headers) = 'object' then
      select coalesce(jsonb_object_agg(lower(h.key), h.value), '{}') into v_headers from jsonb_each_text(p_headers) h;
    end if;
    -- Anybody may have sent it, so what is read before it is verified must cost little.
    if v_provider = 'midjourney' then
      v_json := image_jobs.json_or_null(p_body, 16384);
    end if;
    v_id := image_jobs.verified_delivery(v_provider, v_headers, p_body, v_json);
    if v_id is not null then
      v_json := coalesce(v_json, image_jobs.json_or_null(p_body, 1048576));
    end if;
  end if;
  if v_id is null then
    perform image_jobs.count_webhook(v_counted, 0, 0, 1);
    perform set_config('response.status', '401', true);
    return jsonb_build_object('code', 'PT401', 'message', 'The signature is missing, wrong or stale.');
  end if;

  -- The provider's id of its job, also under job_id; in the hex scheme job_id may name the run instead.
  v_named := nullif(coalesce(v_json #>> '{data,job_id}', v_json ->> 'job_id'), '');
  if v_provider = 'hmac' and v_named is not null then
    select r.id, r.provider_job_id, r.status in ('completed', 'failed', 'cancelled') as ended into v_run
    from public.runs r where (r.kind = 'image_gen') is true and r.ticket is not null and r.id = v_named;
  end if;
  v_job := nullif(coalesce(v_json #>> '{data,id}', v_json ->> 'id', v_run.provider_job_id, v_named), '');
  -- Who has seen a state may send any body with it: it has twenty places, then each new body takes that of the oldest.
  if v_provider = 'midjourney' then
    v_state := split_part(v_json ->> 'state', '.', 1);
    if not exists (select from image_jobs.webhook_deliveries d where d.provider = v_provider and d.delivery_id = v_id)
      and (select count(*) from image_jobs.webhook_deliveries d where d.state = v_state) >= 20
    then
      select d.delivery_id, true into v_id, v_replaces
      from image_jobs.webhook_deliveries d where d.state = v_state order by d.received_at limit 1;
    end if;
  end if;
  insert into image_jobs.webhook_deliveries as d (provider, delivery_id, provider_job_id, type, body, received_at, state)
  values (v_provider, v_id, case when length(v_job) <= 500 then v_job end,
    case when not image_jobs.has_base64(v_json) then left(coalesce(v_json ->> 'type', v_json ->> 'status'), 100) end,
    case when not (v_provider = 'midjourney' and octet_length(p_body) > 16384 or image_jobs.has_base64(to_jsonb(p_body))) then p_body end,
    image_jobs.now(), v_state)
  on conflict (provider, delivery_id) do update
  set provider_job_id = excluded.provider_job_id, type = excluded.type, body = excluded.body,
    received_at = excluded.received_at, run_id = null, closed_at = null, ticket = null, ask_at = null
  where v_replaces;
  if not found then
    perform image_jobs.count_webhook(v_provider, 0, 1, 0);
    return jsonb_build_object('received', true, 'duplicate', true);
  end if;
  if length(v_job) <= 500 then
    perform image_jobs.match_deliveries(v_job);
  end if;
  -- A receipt of a run that has no provider job: all there is to do is to keep it. Not behind a daemon that holds the row's lock.
  if v_run.id is not null and v_run.provider_job_id is null then
    perform from public.runs r where r.id = v_run.id for key share skip locked;
    if found then
      perform image_jobs.record_delivery(v_run.id, v_provider, v_id,
        (select d.type from image_jobs.webhook_deliveries d where d.provider = v_provider and d.delivery_id = v_id));
      update image_jobs.webhook_deliveries d set run_id = v_run.id, closed_at = case when v_run.ended then image_jobs.now() end
      where d.provider = v_provider and d.delivery_id = v_id;
    end if;
  end if;
  perform image_jobs.count_webhook(v_provider, 1, 0, 0);
  return jsonb_build_object('received', true, 'duplicate', false);
end
$$;

-- Sweep the inbox, which daemons do every few seconds: match deliveries that crossed with their runs, delete old ones.
create or replace function image_jobs.sweep_webhooks()
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_job record;
begin
  update image_jobs.webhook_deliveries d set closed_at = image_jobs.now()
  where d.closed_at is null and d.received_at <= image_jobs.now() - interval '1 hour';
  -- A provider tries for up to three days; a delivery that it repeats must still be known.
  delete from image_jobs.webhook_deliveries d where d.received_at < image_jobs.now() - interval '7 days';
  delete from image_jobs.webhook_counters c where c.minute < image_jobs.now() - interval '30 days';
  for v_job in
    select distinct d.provider, d.provider_job_id, d.run_id, d.ticket from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.ticket is not null and d.ask_at <= image_jobs.now()
  loop
    perform image_jobs.attach_provider_job(v_job.provider, v_job.provider_job_id, v_job.run_id, v_job.ticket);
  end loop;
  return image_jobs.match_deliveries(null);
end
$$;

-- Delete a delivery from the inbox, which doctor does with its own. Returns whether it was there.
create or replace function image_jobs.delete_delivery(p_provider text, p_delivery text)
returns boolean language sql volatile set search_path = ''
as $$
  with deleted as (
    delete from image_jobs.webhook_deliveries d where d.provider = p_provider and d.delivery_id = p_delivery returning 1
  )
  select exists (select from deleted)
$$;

-- One function per provider. PostgREST hands a JSON object to a single unnamed json parameter byte for byte; jsonb would not keep it.
create or replace function public.webhook_openai(json)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook('openai', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;
comment on function public.webhook_openai(json) is 'Image Job Orchestrator: receives the webhooks of OpenAI.';

create or replace function public.webhook_midjourney(json)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook('midjourney', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;
comment on function public.webhook_midjourney(json) is 'Image Job Orchestrator: receives the webhooks of midjourney-proxy.';

create or replace function public.webhook_hmac(json)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook('hmac', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;
comment on function public.webhook_hmac(json) is 'Image Job Orchestrator: receives the webhooks of providers that sign the body with a shared secret.';

-- For an Edge Function or a route of the application, which has the raw body.
create or replace function public.receive_webhook(provider text, headers jsonb, body text)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook(provider, headers, body) $$;
comment on function public.receive_webhook(text, jsonb, text) is
  'Image Job Orchestrator: receives a webhook from an Edge Function or a server of the application.';
