-- Another provider where one can do nothing: metadata.fallback.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

alter table public.runs add column if not exists via varchar;
comment on column public.runs.via is 'The step of metadata.fallback that the next attempt goes to, or the last went to. Null: processor.';

do $$
begin
  if not exists (
    select from pg_catalog.pg_attribute a
    where a.attrelid = 'private.run_change'::regclass and a.attname = 'old_processor' and not a.attisdropped) then
    alter type private.run_change add attribute old_processor varchar;
  end if;
end
$$;

-- pending → pending elsewhere: metadata.fallback, the providers that are tried when the one before can do nothing.
--
-- Where a run goes is runs.via, or processor while that is null. Steps are taken forwards only, each at most once.

-- The steps of metadata.fallback that a run may still take, in order. Whatever stands in old rows: never fails.
create or replace function private.steps_left(p_metadata jsonb, p_processor varchar, p_via varchar)
returns varchar[] language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_step varchar;
  v_seen varchar[] := array[p_processor];
  v_left varchar[] := '{}';
  v_reached boolean := p_via is null;
begin
  if jsonb_typeof(p_metadata -> 'fallback') is distinct from 'array' then
    return v_left;
  end if;
  for v_step in
    select e.value #>> '{}' from jsonb_array_elements(p_metadata -> 'fallback') with ordinality as e (value, place)
    where jsonb_typeof(e.value) = 'string' and e.value #>> '{}' ~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$'
    order by e.place
  loop
    if v_reached and not v_step = any (v_seen) then
      v_left := v_left || v_step;
    end if;
    v_reached := v_reached or v_step = p_via;
    v_seen := v_seen || v_step;
  end loop;
  return v_left;
end
$$;

-- Waiting runs that have a step left, by their line and the provider of that step. Runs without a fallback are not in it.
create index if not exists runs_may_go_elsewhere
  on public.runs (lane, split_part((private.steps_left(metadata, processor, via))[1], ':', 1), due_at)
  where kind = 'image_gen' and status = 'pending' and metadata ? 'fallback';

-- Why nothing will start soon at a provider, or at one model of it: {error, code}; null if it is open. Neither a short
-- rate limit nor a daemon that restarts within its lease closes anything, and a limit that is used up is only waited for.
create or replace function private.why_closed(p_processor text)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_provider text := split_part(p_processor, ':', 1);
  v_limit record;
begin
  for v_limit in
    select l.*, l.paused or l.per_minute = 0 or l.max_running = 0 as stopped from public.provider_limits l
    where l.provider = v_provider and (l.model is null or l.provider || ':' || l.model = p_processor)
  loop
    if v_limit.stopped then
      return jsonb_build_object('error', format('%s is paused.', concat_ws(':', v_provider, v_limit.model)), 'code', 'paused');
    end if;
    if v_limit.blocked_until > v_now + interval '10 s' then
      return jsonb_build_object('error', coalesce(v_limit.blocked_reason,
        format('%s is closed for a while.', concat_ws(':', v_provider, v_limit.model))), 'code', 'blocked');
    end if;
  end loop;
  if not exists (select from private.daemons d where v_provider = any (d.providers) and d.seen_at > v_now - d.lease) then
    return jsonb_build_object('error', format('No daemon serves %s.', v_provider), 'code', 'not_served');
  end if;
  return null;
end
$$;

-- The first of these steps that is open; null if none is.
create or replace function private.first_open(p_steps varchar[])
returns varchar language plpgsql volatile set search_path = ''
as $$
declare
  v_step varchar;
begin
  foreach v_step in array p_steps loop
    if private.why_closed(v_step) is null then
      return v_step;
    end if;
  end loop;
  return null;
end
$$;

-- For the person at the canvas. p_payload says in `error` what is wrong here.
create or replace function private.going_on(p_payload jsonb, p_step varchar)
returns text language sql immutable parallel safe set search_path = ''
as $$
  select format('%s Going on with %s.', coalesce(p_payload ->> 'error', 'There is no image yet.'), p_step)
$$;

-- Runs that wait for a provider that is closed go on to the first of their steps that is open. Where all are closed,
-- a run stays, and goes with the first one that opens. For thorough turns: at most 200 runs a line and provider at a time.
create or replace function private.pass_on()
returns void language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_lane text;
  v_closed jsonb;
  v_provider text;
begin
  perform set_config('image_jobs.hand', 'daemon', true);
  for v_lane in
    select distinct l.lane from private.lanes l where l.lane <> '?'
  loop
    continue when not exists (
      select from public.runs r
      where r.kind = 'image_gen' and r.status = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane);
    v_closed := private.why_closed(v_lane);
    continue when v_closed is null;
    for v_provider in select p.name from private.providers p order by p.name loop
      with stuck as materialized (
        select r.id, r.via, private.first_open(private.steps_left(r.metadata, r.processor, r.via)) as step
        from public.runs r
        where r.kind = 'image_gen' and r.status = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane
          and split_part((private.steps_left(r.metadata, r.processor, r.via))[1], ':', 1) = v_provider
          and r.due_at <= v_now
        order by r.due_at limit 200
      ),
      movable as materialized (
        select r.id, s.step from stuck s join public.runs r on r.id = s.id
        where s.step is not null and r.status = 'pending' and r.via is not distinct from s.via
        order by r.id
        for update of r skip locked
      )
      update public.runs r
      set via = m.step, lane = private.lane_of(m.step), attempt = 0, refused_since = null,
        rank = private.place_in_line(r.subject_id, private.lane_of(m.step), r.priority),
        payload = v_closed, message = private.going_on(v_closed, m.step)
      from movable m where r.id = m.id;
    end loop;
  end loop;
  perform set_config('image_jobs.hand', v_hand, true);
end
$$;

-- A limit for a model gives that model a lane of its own, and takes it away again: its pending runs change lines.
-- Runs that somebody has locked, or is just inserting, are left behind; the claim finds and moves them.
create or replace function private.change_lanes()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  with misplaced as materialized (
    select r.id from public.runs r
    where r.kind = 'image_gen' and r.status = 'pending' and r.ticket is not null
      and split_part(coalesce(r.via, r.processor), ':', 1) in (new.provider, old.provider)
      and r.lane is distinct from private.lane_of(coalesce(r.via, r.processor))
    order by r.id
    for update skip locked
  )
  update public.runs r set lane = private.lane_of(coalesce(r.via, r.processor))
  from misplaced where r.id = misplaced.id;
  return null;
end
$$;

-- Refuses a promptSpec that no provider could work with. Sentences are for the person who called insert().
create or replace function private.check_prompt(p_metadata jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_spec jsonb := p_metadata -> 'promptSpec';
  v_steps jsonb := p_metadata -> 'fallback';
  v_key text;
begin
  if jsonb_typeof(p_metadata) is distinct from 'object' then
    perform private.refuse('metadata must be an object with a promptSpec.', 'Set metadata to {"promptSpec": {"basePrompt": "…"}}.');
  end if;
  -- What Postgres can hold, the JSON reader of a daemon may not survive.
  if jsonb_path_exists(p_metadata, '$.**{65}') then
    perform private.refuse('metadata is nested more than 64 levels deep.', 'Store what is large elsewhere and give its URL.');
  end if;
  if jsonb_typeof(v_spec) is distinct from 'object' then
    perform private.refuse('metadata.promptSpec is missing.', 'Set metadata.promptSpec to {"basePrompt": "…"}.');
  end if;
  if jsonb_typeof(v_spec -> 'basePrompt') is distinct from 'string'
    or length(v_spec ->> 'basePrompt') not between 1 and 32000 then
    perform private.refuse('promptSpec.basePrompt must be a text of 1 to 32,000 characters.', 'Say what the picture should show.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'styleModifiers'), 'null') not in ('array', 'null')
    or jsonb_typeof(v_spec -> 'styleModifiers') = 'array'
      and jsonb_path_exists(v_spec, '$.styleModifiers[*] ? (@.type() != "string")') then
    perform private.refuse('promptSpec.styleModifiers must be a list of texts.', 'For example ["watercolour", "soft light"].');
  end if;
  if v_spec ->> 'size' !~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$' then
    perform private.refuse('promptSpec.size cannot be read.', 'Write it like 1024x1024, or leave it out.');
  end if;
  if v_spec ->> 'aspectRatio' !~ '^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$' then
    perform private.refuse('promptSpec.aspectRatio cannot be read.', 'Write it like 16:9, or leave it out.');
  end if;
  if v_spec ->> 'quality' not in ('standard', 'hd', 'low', 'medium', 'high', 'xhigh', 'max', 'auto') then
    perform private.refuse('promptSpec.quality is unknown.', 'Use standard or hd.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'seed'), 'null') <> 'null'
    and (jsonb_typeof(v_spec -> 'seed') <> 'number' or v_spec ->> 'seed' !~ '^[0-9]{1,18}$') then
    perform private.refuse('promptSpec.seed must be a whole number from 0 up.', 'Leave it out for a random one.');
  end if;
  foreach v_key in array array['size', 'aspectRatio', 'quality', 'negativePrompt', 'previousImage'] loop
    if coalesce(jsonb_typeof(v_spec -> v_key), 'null') not in ('string', 'null') then
      perform private.refuse(format('promptSpec.%s must be a text.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if coalesce(v_spec ->> 'previousImage', '') !~* '^(https?://[^\s]+)?$' then
    perform private.refuse('promptSpec.previousImage must be the URL of an image.', 'Upload the image first and give its https URL; never base64.');
  end if;
  foreach v_key in array array['nodeId', 'idempotencyKey', 'webhookUrl'] loop
    if coalesce(jsonb_typeof(p_metadata -> v_key), 'null') not in ('string', 'null')
      or octet_length(p_metadata ->> v_key) not between 1 and 2048 then
      perform private.refuse(format('metadata.%s must be a text of 1 to 2,048 bytes.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if (case jsonb_typeof(v_steps)
    when 'null' then false
    when 'array' then jsonb_array_length(v_steps) not between 1 and 5 or exists (
      select from jsonb_array_elements(v_steps) step
      where jsonb_typeof(step) <> 'string' or step #>> '{}' !~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$')
    else v_steps is not null end) then
    perform private.refuse('metadata.fallback must be a list of 1 to 5 texts like provider:model.',
      'For example ["google:gemini-3-pro-image"]; the view image_models lists what is on offer.');
  end if;
  if coalesce(jsonb_typeof(p_metadata -> 'fallbackOnRefusal'), 'null') not in ('boolean', 'null') then
    perform private.refuse('metadata.fallbackOnRefusal must be true or false.', 'Leave it out for false.');
  end if;
end
$$;

-- Makes a new row a pending run: checked, in line, with a claim and a ticket of its own.
-- Columns that are ours cannot be chosen by a client.
create or replace function private.accept_run()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_user uuid := private.current_user_id();
  v_operator boolean := private.is_operator();
begin
  -- The base64 checks refuse it by their own name, which says more than any sentence here.
  if private.has_base64(new.metadata) or private.has_base64(new.payload) then
    perform private.use_workflow(new.subject_id);
    return new;
  end if;
  -- Every later write of the row checks all of it again.
  if octet_length(new.metadata::text) > 1048576 then
    perform private.refuse('metadata is larger than 1 MiB.', 'Upload what is large and give its URL.');
  end if;
  new.status := coalesce(new.status, 'pending');
  if new.status <> 'pending' then
    perform private.refuse('A new run must be pending.', 'Leave status out, or set it to pending.');
  end if;
  if new.subject_id is null then
    perform private.refuse('subject_id is missing.', 'Set it to the workflow''s id (a uuid).');
  end if;
  if new.id is null or new.id !~ '^[A-Za-z0-9_-]{1,200}$' then
    perform private.refuse('id must be 1 to 200 characters of A-Z, a-z, 0-9, _ and -.', 'It becomes a path in storage. Leave it out to get one.');
  end if;
  if coalesce(new.processor, '') !~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$' then
    perform private.refuse('processor must name a provider and a model.', 'Write it like openai:gpt-image-2; the view image_models lists what is on offer.');
  end if;
  if not isfinite(new.due_at) then
    perform private.refuse('due_at must be a point in time.', 'Leave it out to start at once.');
  end if;
  perform private.check_prompt(new.metadata);
  if not v_operator then
    if new.payload is not null or new.progress is not null or new.attempt is not null or new.max_attempts is not null
      or new.claim is not null or new.ticket is not null or new.claimed_by is not null or new.provider_job_id is not null
      or new.finished_at is not null or new.message is not null or new.preview_url is not null or new.lane is not null
      or new.rank is not null or new.submitted_at is not null or new.refused_since is not null or new.webhook is not null
      or new.via is not null
      or coalesce(new.priority, 0) <> 0 or coalesce(new.created_by, v_user) is distinct from v_user then
      perform private.refuse(
        'This insert sets a column that belongs to the orchestrator.',
        'Insert id (optional), kind, subject_id, status, processor, metadata and due_at only.');
    end if;
  end if;
  perform private.use_workflow(new.subject_id);
  if not v_operator and not private.can_access_workflow(new.subject_id) then
    raise exception using errcode = '42501', message = 'You are not a member of this workflow.',
      hint = 'Ask its owner to add you to workflow_members, or use a new workflow id.';
  end if;

  new.created_by := coalesce(v_user, new.created_by);
  new.created_at := v_now;
  new.updated_at := v_now;
  new.started_at := v_now;
  new.finished_at := null;
  new.progress := 0;
  new.priority := coalesce(new.priority, 0);
  new.attempt := 0;
  new.max_attempts := greatest(coalesce(new.max_attempts, 3), 1);
  new.due_at := coalesce(new.due_at, v_now);
  new.claim := nextval('private.claims');
  new.ticket := nextval('private.tickets');
  new.claimed_by := null;
  new.provider_job_id := null;
  new.submitted_at := null;
  new.refused_since := null;
  new.webhook := null;
  new.via := null;
  new.lane := private.lane_of(new.processor);
  new.rank := private.place_in_line(new.subject_id, new.lane, new.priority);
  if new.due_at > v_now then
    new.rank := null;
  end if;
  return new;
end
$$;

-- For every column but the status.
create or replace function private.guard_run()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  new.updated_at := private.now();
  if current_setting('image_jobs.hand', true) = 'daemon' then
    return new;
  end if;
  if new.kind is distinct from old.kind then
    perform private.refuse('The kind of an image run never changes.', 'Insert a new run.');
  end if;
  if new.id <> old.id or new.processor is distinct from old.processor or new.subject_id is distinct from old.subject_id then
    perform private.refuse('id, processor and subject_id of a run never change.', 'Cancel this run and insert a new one.');
  end if;
  new.claim := old.claim;
  new.ticket := old.ticket;
  new.claimed_by := old.claimed_by;
  new.attempt := old.attempt;
  new.created_at := old.created_at;
  new.created_by := old.created_by;
  -- An order that an operator names has its time from now on: without it, nobody would ever give it up.
  new.submitted_at := case
    when new.provider_job_id is distinct from old.provider_job_id and new.provider_job_id is not null then private.now()
    else old.submitted_at end;
  new.refused_since := old.refused_since;
  -- Nobody waits for a webhook once somebody else says when to look, or that it is over.
  new.webhook := case when (new.status, new.due_at) is not distinct from (old.status, old.due_at) then old.webhook end;
  new.via := old.via;
  new.lane := old.lane;
  new.rank := old.rank;
  new.priority := coalesce(new.priority, old.priority, 0);
  new.max_attempts := greatest(coalesce(new.max_attempts, old.max_attempts, 3), 1);
  -- Without a time, nobody would ever look at it again.
  if new.due_at is null and old.due_at is not null and old.status in ('pending', 'running') then
    new.due_at := private.now();
  end if;
  if old.status = 'pending' and old.ticket is not null then
    new.lane := private.lane_of(coalesce(new.via, new.processor));
    if (new.due_at, new.priority, new.lane) is distinct from (old.due_at, old.priority, old.lane) then
      new.rank := private.place_in_line(new.subject_id, new.lane, new.priority);
      if new.due_at > private.now() then
        new.rank := null;
      end if;
    end if;
  end if;
  return new;
end
$$;

-- For a status that is set, even to the value it has: pending → pending means "run it now".
create or replace function private.guard_status()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
begin
  if current_setting('image_jobs.hand', true) = 'daemon' then
    return new;
  end if;

  if new.status = 'pending' then
    new.claim := nextval('private.claims');
    new.ticket := nextval('private.tickets');
    new.claimed_by := null;
    new.attempt := 0;
    new.progress := 0;
    new.payload := null;
    new.message := null;
    new.preview_url := null;
    new.finished_at := null;
    new.refused_since := null;
    new.created_at := coalesce(old.created_at, old.started_at, v_now);
    if new.due_at is null or new.due_at is not distinct from old.due_at then
      new.due_at := v_now;
    end if;
    -- A job that outlived our patience, or whose picture we could not fetch or store, is asked for again, not paid for again.
    if old.status = 'failed' and old.payload ->> 'code' ~ '^(polling_timeout$|download|storage)' then
      new.submitted_at := case when old.provider_job_id is null then null else v_now end;
      new.provider_job_id := old.provider_job_id;
    else
      new.submitted_at := null;
      new.provider_job_id := null;
    end if;
    -- From the first provider on, unless there is something to ask for at another.
    if new.provider_job_id is null then
      new.via := null;
    end if;
    new.lane := private.lane_of(coalesce(new.via, new.processor));
    new.rank := private.place_in_line(new.subject_id, new.lane, new.priority);
    if new.due_at > v_now then
      new.rank := null;
    end if;
    return new;
  end if;

  if new.status = 'cancelled' and old.status in ('pending', 'running') then
    new.claim := nextval('private.claims');
    new.claimed_by := null;
    new.due_at := null;
    new.rank := null;
    new.finished_at := v_now;
    new.message := null;
    return new;
  end if;

  if new.status = old.status and new.status <> 'cancelled' then
    return new;
  end if;
  perform private.refuse(
    format('A run that is %s cannot be set to %s by hand.', old.status, new.status),
    'Set status to pending to run it again, or use cancel_run, which leaves a finished run as it is.');
end
$$;

-- Everything that follows from changed runs, in the lock order: nodes, then events. Notifications go out at commit.
create or replace function private.follow_up(p_changes private.run_change[])
returns void language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
as $$
declare
  v_nodes varchar[];
  v_lost text;
begin
  -- A node of another workflow is nobody's to touch, whatever metadata.nodeId says.
  select array_agg(distinct n.id) into v_nodes
  from unnest(p_changes) c join public.workflow_nodes n on n.id = c.node_id and n.workflow_id = c.subject_id
  where (c.status, c.progress, c.message, c.ticket)
    is distinct from (c.old_status, c.old_progress, c.old_message, c.old_ticket);
  if v_nodes is not null then
    perform private.show_runs(v_nodes);
  end if;

  insert into public.run_events (run_id, kind, payload)
  select c.id, e.kind, jsonb_strip_nulls(jsonb_build_object(
    'event', e.event, 'message', e.message, 'progress', c.progress, 'data', e.data))
  from unnest(p_changes) with ordinality as c
  cross join lateral (
    select 1 as place, 'log' as kind, 'created' as event, 'Waiting in line.' as message,
      jsonb_build_object('processor', c.processor, 'dueAt', c.due_at) as data
    where c.old_status is null
    union all
    select 2, 'log', 'requeued', 'In line again.', jsonb_strip_nulls(jsonb_build_object(
      'before', c.old_status, 'attempts', c.old_attempt,
      'payload', case when not private.has_base64(c.old_payload) then c.old_payload end,
      'providerJobId', case when c.provider_job_id is null then c.old_provider_job_id end))
    where c.old_status is not null and c.ticket is distinct from c.old_ticket
    union all
    select 3, 'error', 'taken_over', case
        when c.status = 'running' then 'The daemon that was checking this run went silent; another goes on.'
        else 'The daemon that was making this image went silent. Whether the provider made and charged it is unknown.' end,
      jsonb_strip_nulls(jsonb_build_object('daemon', c.old_holder, 'processor', c.processor, 'possibleCost', case when c.status <> 'running' then (
        -- What the daemon said before it sent the request; the usual price if it did not get to say it; nothing if the
        -- image came, for then its cost is known.
        select case last.event when 'submitted' then (last.data ->> 'estimate')::numeric when 'claimed' then m.price end
        from (
          select e.payload ->> 'event' as event, e.payload -> 'data' as data from public.run_events e
          where e.run_id = c.id and e.payload ->> 'event' in ('claimed', 'submitted', 'generated')
          order by e.seq desc limit 1
        ) last
        left join private.models m
          on m.provider = split_part(c.processor, ':', 1) and m.model = substr(c.processor, strpos(c.processor, ':') + 1)) end))
    where c.old_status = 'running' and c.ticket = c.old_ticket and c.claim <> c.old_claim
      and c.old_holder is not null and c.holder is null and c.status <> 'cancelled'
    union all
    select 4, 'log', 'claimed', format('Attempt %s of %s.', c.attempt, c.max_attempts),
      jsonb_build_object('daemon', c.holder, 'attempt', c.attempt, 'processor', c.processor)
    where c.old_status = 'pending' and c.status = 'running' and c.holder is not null
    union all
    select 5, 'log', 'parked', coalesce(c.message, 'The provider took the order.'),
      jsonb_build_object('providerJobId', c.provider_job_id, 'checkAt', c.due_at)
    where c.status = 'running' and c.provider_job_id is distinct from c.old_provider_job_id and c.provider_job_id is not null
      and c.old_status in ('pending', 'running')
    union all
    select 6, case when c.payload ? 'code' then 'error' else 'log' end, 'retry', coalesce(c.payload ->> 'error', c.message, 'In line again.'),
      jsonb_strip_nulls(jsonb_build_object('code', c.payload ->> 'code', 'hint', c.payload ->> 'hint',
        'details', c.payload -> 'details',
        'attempt', c.old_attempt, 'dueAt', c.due_at))
    where c.old_status = 'running' and c.status = 'pending' and c.claim = c.old_claim and c.processor = c.old_processor
    union all
    select 6, 'error', 'fallback', coalesce(c.message, 'Another provider is tried.'), jsonb_strip_nulls(jsonb_build_object(
      'from', c.old_processor, 'to', c.processor, 'code', c.payload ->> 'code', 'hint', c.payload ->> 'hint',
      'details', c.payload -> 'details', 'attempts', c.payload -> 'attempts', 'providerJobId', c.old_provider_job_id))
    where c.processor <> c.old_processor and c.ticket = c.old_ticket
    union all
    select 7, 'log', 'completed', 'The image is ready.', c.payload
    where c.old_status is distinct from c.status and c.status = 'completed'
    union all
    select 8, 'error', 'failed', c.payload ->> 'error', c.payload - 'error'
    where c.old_status is distinct from c.status and c.status = 'failed'
    union all
    select 9, 'log', 'cancelled', 'Cancelled.', null
    where c.old_status is distinct from c.status and c.status = 'cancelled'
    union all
    select 10, 'progress', 'progress', coalesce(c.message, c.progress || ' %'), null
    where c.status = 'running' and c.old_status = 'running' and c.claim = c.old_claim and c.holder is not distinct from c.old_holder
      and (c.progress, c.message) is distinct from (c.old_progress, c.old_message)
  ) e
  order by c.ordinality, e.place;

  -- "You no longer hold this": to whoever held a claim that is not the run's any more. At most 8,000 bytes a message.
  for v_lost in
    select string_agg(lost.old_claim::text, ',') from (
      select c.old_claim, row_number() over () / 300 as part from unnest(p_changes) c
      where c.old_holder is not null and c.claim is distinct from c.old_claim
    ) lost group by lost.part
  loop
    perform pg_notify('image_jobs_drop', v_lost);
  end loop;

  -- "Look again": only for what can be claimed now, and only if nobody is looking anyway.
  if exists (
      select from unnest(p_changes) c
      where c.due_at <= private.now() and c.holder is null and c.status in ('pending', 'running')
        and (c.claim is distinct from c.old_claim or c.old_holder is null))
    and (select w.awake_until from private.wake w) <= private.now()
  then
    perform pg_notify('image_jobs_wake', '');
  end if;
end
$$;

create or replace function private.runs_inserted()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_changes private.run_change[];
begin
  select array_agg(row(n.id, n.subject_id, n.metadata ->> 'nodeId', n.ticket, null, null, n.status, null, n.claim, null,
    n.claimed_by, n.attempt, null, n.max_attempts, n.progress, null, n.message, null, n.preview_url, n.processor, n.due_at,
    n.provider_job_id, null, n.payload, null, null)::private.run_change)
  into v_changes
  from new_rows n where n.kind = 'image_gen';
  if v_changes is not null then
    perform private.follow_up(v_changes);
  end if;
  return null;
end
$$;

create or replace function private.runs_updated()
returns trigger language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = off set enable_hashjoin = on
as $$
declare
  v_changes private.run_change[];
begin
  select array_agg(row(n.id, n.subject_id, n.metadata ->> 'nodeId', n.ticket, o.ticket, o.status, n.status, o.claim, n.claim,
    o.claimed_by, n.claimed_by, n.attempt, o.attempt, n.max_attempts, n.progress, o.progress, n.message, o.message,
    n.preview_url, coalesce(n.via, n.processor), n.due_at, n.provider_job_id, o.provider_job_id, n.payload, o.payload,
    coalesce(o.via, o.processor))::private.run_change
    order by n.id)
  into v_changes
  from new_rows n join old_rows o on o.id = n.id
  where n.kind = 'image_gen' and (n.ticket is not null or n.status <> o.status)
    and (n.status, n.claim, n.claimed_by, n.progress, n.message, n.preview_url, n.provider_job_id, n.due_at, n.via,
      n.metadata ->> 'nodeId')
      is distinct from
      (o.status, o.claim, o.claimed_by, o.progress, o.message, o.preview_url, o.provider_job_id, o.due_at, o.via,
      o.metadata ->> 'nodeId');
  if v_changes is not null then
    perform private.follow_up(v_changes);
  end if;
  return null;
end
$$;

-- How many more runs a provider (or one model of it) may start now; null: as many as you like.
-- Exact only if the caller holds the locks of the rows: then no other start can be on its way.
create or replace function private.allowance(p_provider text, p_lane text)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_second bigint := floor(extract(epoch from v_now));
  v_limit record;
  v_left integer;
  v_least integer;
begin
  for v_limit in
    select l.* from public.provider_limits l
    where l.provider = p_provider
      and (l.model is null or l.provider || ':' || l.model = p_lane)
  loop
    if v_limit.paused or v_limit.blocked_until > v_now then
      return 0;
    end if;
    if v_limit.per_minute is not null then
      -- Whole seconds: a start counts for 60 to 61 seconds, so no minute ever sees more than its limit.
      select v_limit.per_minute - coalesce(sum(recent.starts), 0) into v_left
      from unnest(v_limit.recent_at, v_limit.recent_starts) as recent (at, starts)
      where recent.at >= v_second - 60;
      v_least := least(v_least, v_left);
    end if;
    if v_limit.max_running is not null then
      -- By processor, not by lane: what was started before its model had a limit stands in the provider's lane.
      -- Counted no further than the limit, whatever else is running.
      select v_limit.max_running - count(*) into v_left
      from (
        select from public.runs r
        where r.kind = 'image_gen' and r.status = 'running'
          and r.lane in (select distinct n.lane from private.lanes n where split_part(n.lane, ':', 1) = p_provider)
          and (v_limit.model is null or coalesce(r.via, r.processor) = p_provider || ':' || v_limit.model)
        limit v_limit.max_running
      ) counted;
      v_least := least(v_least, v_left);
    end if;
  end loop;
  return case when v_least is not null then greatest(v_least, 0) end;
end
$$;

-- What a daemon gets to know of a run it has claimed. made: what an earlier attempt wrote down of a picture it had made,
-- since the last requeue; that picture may lie in storage.
create or replace function private.claimed_run(r public.runs, p_due_at timestamptz)
returns jsonb language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', r.id, 'claim', r.claim, 'ticket', r.ticket, 'subject_id', r.subject_id,
    'processor', coalesce(r.via, r.processor), 'requested', r.processor,
    'metadata', case when jsonb_path_exists(r.metadata, '$.**{65}') then '{}' else coalesce(r.metadata, '{}') end,
    'attempt', r.attempt, 'max_attempts', r.max_attempts,
    'provider_job_id', r.provider_job_id, 'webhook', r.webhook,
    'submitted_ago', extract(epoch from private.now() - r.submitted_at),
    'waited', case when isfinite(p_due_at) then extract(epoch from private.now() - p_due_at) else 0 end,
    'made', case when r.attempt > 1 then (
      select e.payload -> 'data' from public.run_events e
      where e.run_id = r.id and e.payload ->> 'event' = 'generated' and e.payload -> 'data' -> 'ticket' = to_jsonb(r.ticket)
      order by e.seq desc limit 1) end)
$$;

-- Takes up to p_slots runs for a daemon: due checks of parked runs first, then pending runs; higher priorities first,
-- lanes evenly, workflows in turn within a lane. p_thorough looks at whole lanes instead of from their floors: at least
-- once a second of idleness, since a slow transaction may commit a lower rank.
-- Never takes more than the limits allow, however many daemons claim at once. Raises IJ001 if the daemon was fenced.
-- Locks: the daemon's row (against a take-over), then provider_limits, and only then runs (skipping locked ones).
create or replace function private.claim_runs(p_daemon uuid, p_slots integer, p_thorough boolean default false)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_daemon record;
  v_left integer := p_slots;
  v_providers text[];
  v_lanes private.lanes[];
  v_lane private.lanes;
  v_priority integer;
  v_provider text;
  v_peers integer;
  v_quota integer;
  v_claimed jsonb;
  v_rank bigint;
  v_count integer;
  v_last bigint;
  v_models boolean;
begin
  if p_slots <= 0 then
    return;
  end if;
  select d.* into v_daemon from private.daemons d where d.id = p_daemon and d.ended_at is null for key share;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
  perform set_config('image_jobs.hand', 'daemon', true);

  -- Providers this daemon serves. Those that nobody alive serves, or has served in the last ten minutes (a deploy),
  -- are anybody's: somebody has to say that the key is missing.
  select array_agg(p.name) into v_providers
  from (select name from private.providers union all select '?') p
  where p.name = any (v_daemon.providers)
    or not exists (
      select from private.daemons d
      where p.name = any (d.providers) and d.seen_at > v_now - interval '10 minutes');

  -- Lanes in which somebody waits and may go; then the locks of their limits, all at once and in order.
  with put_off as materialized (
    select r.lane, r.priority from public.runs r
    where r.kind = 'image_gen' and r.status = 'pending' and r.rank is null and r.due_at <= v_now
    order by r.due_at limit 200
  )
  select array_agg(l order by l.priority desc, random()) into v_lanes
  from private.lanes l
  where split_part(l.lane, ':', 1) = any (v_providers)
    and private.allowance(split_part(l.lane, ':', 1), l.lane) is distinct from 0
    and (
      exists (
        select from public.runs r
        where r.kind = 'image_gen' and r.status = 'pending' and r.rank is not null
          and r.lane = l.lane and r.priority = l.priority and r.rank >= case when p_thorough then 0 else l.floor end)
      or exists (select from put_off p where p.lane = l.lane and p.priority = l.priority));
  perform from public.provider_limits l
  where l.provider in (select split_part(o.lane, ':', 1) from unnest(v_lanes) o)
    and (l.per_minute is not null or l.max_running is not null)
  order by l.id
  for update;

  -- Whatever was put off and is due now goes to the front of its line.
  with due as materialized (
    select r.id, private.lane_of(coalesce(r.via, r.processor)) as lane from public.runs r
    where r.kind = 'image_gen' and r.status = 'pending' and r.rank is null and r.due_at <= v_now
    order by r.due_at limit 200
    for update skip locked
  )
  update public.runs r
  set lane = due.lane,
    rank = coalesce((select l.floor from private.lanes l where l.lane = due.lane and l.priority = r.priority),
      private.place_in_line(r.subject_id, due.lane, r.priority))
  from due where r.id = due.id;

  -- Parked runs whose check is due. Pausing and limits are about new starts; asking goes on.
  for v_lane in
    select distinct on (l.lane) l.* from private.lanes l where split_part(l.lane, ':', 1) = any (v_providers)
  loop
    exit when v_left <= 0;
    for v_claimed in
      with due as materialized (
        select r.id, r.due_at from public.runs r
        where r.kind = 'image_gen' and r.status = 'running' and r.lane = v_lane.lane
          and r.due_at <= v_now and r.claimed_by is null
        order by r.due_at limit v_left
        for update skip locked
      )
      update public.runs r set claim = nextval('private.claims'), claimed_by = p_daemon, due_at = null
      from due where r.id = due.id
      returning private.claimed_run(r, due.due_at)
    loop
      v_left := v_left - 1;
      return next v_claimed;
    end loop;
  end loop;

  for v_priority in select distinct o.priority from unnest(v_lanes) o order by o.priority desc loop
    -- First an even share for each lane, then what the others left.
    for v_pass in 1..2 loop
      select count(*) into v_peers from unnest(v_lanes) o where o.priority = v_priority;
      exit when v_pass = 2 and v_peers = 1;
      foreach v_lane in array v_lanes loop
        continue when v_lane.priority <> v_priority;
        exit when v_left <= 0;
        v_provider := split_part(v_lane.lane, ':', 1);
        v_quota := case v_pass when 1 then ceil(v_left::numeric / v_peers) else v_left end;
        v_quota := least(v_quota, private.allowance(v_provider, v_lane.lane));
        v_peers := v_peers - 1;
        continue when v_quota <= 0;

        -- A run that was inserted while its model got a limit may stand in the provider's lane: it changes lines.
        v_models := exists (
          select from public.provider_limits l where l.provider = v_lane.lane and l.model is not null);
        if v_models then
          with next as materialized (
            select r.id from public.runs r
            where r.kind = 'image_gen' and r.status = 'pending' and r.rank is not null
              and r.lane = v_lane.lane and r.priority = v_lane.priority
            order by r.rank, r.id limit v_quota
            for update skip locked
          )
          update public.runs r
          set lane = private.lane_of(coalesce(r.via, r.processor)),
            rank = private.place_in_line(r.subject_id, private.lane_of(coalesce(r.via, r.processor)), r.priority)
          from next where r.id = next.id and private.lane_of(coalesce(r.via, r.processor)) <> v_lane.lane;
        end if;

        v_count := 0;
        v_last := null;
        for v_claimed, v_rank in
          with next as materialized (
            select r.id, r.due_at from public.runs r
            where r.kind = 'image_gen' and r.status = 'pending' and r.rank is not null
              and r.lane = v_lane.lane and r.priority = v_lane.priority
              and r.rank >= case when p_thorough then 0 else v_lane.floor end
              and (not v_models or private.lane_of(coalesce(r.via, r.processor)) = r.lane)
            order by r.rank, r.id limit v_quota
            for update skip locked
          )
          update public.runs r
          set status = 'running', claim = nextval('private.claims'), claimed_by = p_daemon, attempt = r.attempt + 1,
            started_at = v_now, due_at = null, payload = null, message = null, preview_url = null
          from next where r.id = next.id
          returning private.claimed_run(r, next.due_at), r.rank
        loop
          v_count := v_count + 1;
          v_last := greatest(v_last, v_rank);
          return next v_claimed;
        end loop;

        continue when v_count = 0;
        v_left := v_left - v_count;
        perform private.count_starts(v_provider, v_lane.lane, v_count);
        -- The floor is a hint: if another daemon is moving it just now, that will do.
        perform from private.lanes l
        where l.lane = v_lane.lane and l.priority = v_lane.priority and l.floor < v_last for update skip locked;
        if found then
          update private.lanes l set floor = v_last where l.lane = v_lane.lane and l.priority = v_lane.priority;
        end if;
      end loop;
    end loop;
  end loop;
  perform set_config('image_jobs.hand', v_hand, true);
end
$$;

-- Settles runs. Each settlement is an object:
--   id, claim         the fence
--   outcome           completed | failed | retry | parked | released (what was ordered goes back to parked)
--   payload           the result, or {error, code, hint} (completed, failed, retry)
--   message           for the person at the canvas (retry, parked, released)
--   due_in            seconds until the next try or check (retry, parked)
--   elsewhere         true: another provider may do better; if metadata.fallback has a step left, the run is pending again
--                     and goes there, with all its attempts (failed, retry)
--   refund            true: the provider never accepted the request; the attempt comes back, for at most an hour (retry)
--   provider_job_id   of the order the provider has taken (parked)
--   progress          0-100 (parked)
--   webhook           true: a webhook of the order will come; due_in is how long it is waited for (parked)
--   ticket, processor of the run that the order was made for, and where: if the claim is gone, the order finds its run by
--                     them, or is cancelled (parked)
--   events            [{id, kind, payload}], written before the outcome's own event
--   if_lost           {kind, payload}: the event to write instead, if the claim is gone
-- Answers {id, claim, result} for each: settled; already (this claim was settled before: the acknowledgement was lost);
-- lost (somebody else's by now); busy (the row is
-- locked: send it again with the next turn, nothing waits for it).
-- A retry beyond max_attempts fails the run instead, with the payload's reason.
-- Plans are pinned: rows of runs by their ids, never by walking the table, and everything else hashed.
create or replace function private.settle_runs(p_daemon uuid, p_settlements jsonb)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_nestloop = off set enable_hashjoin = on
  set enable_mergejoin = off set jit = off
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_ids varchar[] := array(select s.value ->> 'id' from jsonb_array_elements(p_settlements) s);
  v_held bigint[];
  v_seen varchar[];
  v_events jsonb;
begin
  if jsonb_array_length(p_settlements) = 0 then
    return;
  end if;
  if exists (
    select from jsonb_array_elements(p_settlements) s
    where coalesce(s.value ->> 'outcome', '') not in ('completed', 'failed', 'retry', 'parked', 'released')
  ) then
    perform private.refuse('A settlement has an unknown outcome.', 'completed, failed, retry, parked or released.');
  end if;
  perform set_config('image_jobs.hand', 'daemon', true);

  -- The fence is the claim, also within this batch: it may hold an old and a new claim of the same run.
  with mine as materialized (
    select r.id, r.claim, r.status, r.claimed_by from public.runs r
    where r.id = any (v_ids)
    order by r.id
    for update skip locked
  )
  select array_agg(m.id),
    array_agg(m.claim) filter (where m.status = 'running' and m.claimed_by = p_daemon
      and m.claim = (s.value ->> 'claim')::bigint)
  into v_seen, v_held
  from mine m join jsonb_array_elements(p_settlements) s on s.value ->> 'id' = m.id;
  v_seen := coalesce(v_seen, '{}');
  v_held := coalesce(v_held, '{}');

  select jsonb_agg(e.value || jsonb_build_object('run_id', s.value ->> 'id') order by s.place, e.place) into v_events
  from jsonb_array_elements(p_settlements) with ordinality as s (value, place)
  cross join lateral jsonb_array_elements(s.value -> 'events') with ordinality as e (value, place)
  where (s.value ->> 'claim')::bigint = any (v_held);
  if v_events is not null then
    perform private.add_events(v_events);
  end if;

  update public.runs r
  set
    status = case fate
      when 'elsewhere' then 'pending'
      when 'retry' then case when refunded or r.attempt < r.max_attempts then 'pending' else 'failed' end
      when 'parked' then 'running' when 'released' then case when ordered then 'running' else 'pending' end
      else fate end,
    claimed_by = null,
    attempt = case when fate = 'elsewhere' then 0 else r.attempt end
      - case when (fate = 'retry' and refunded) or (fate = 'released' and not ordered) then 1 else 0 end,
    refused_since = case when fate = 'retry' and s.refund then coalesce(r.refused_since, v_now) end,
    payload = case
      when s.outcome not in ('parked', 'released') then s.payload
        || case when s.outcome = 'completed' then '{}' else jsonb_build_object('attempts', r.attempt) end end,
    message = case
      when fate = 'elsewhere' then private.going_on(s.payload, step)
      when fate in ('retry', 'parked', 'released') then s.message end,
    progress = case s.outcome when 'completed' then 100 when 'parked' then coalesce(s.progress, r.progress) else
      case when fate in ('retry', 'elsewhere') or (fate = 'released' and not ordered) then 0 else r.progress end end,
    preview_url = case when s.outcome = 'parked' then r.preview_url end,
    provider_job_id = case when fate in ('retry', 'elsewhere') then null else coalesce(s.provider_job_id, r.provider_job_id) end,
    submitted_at = case
      when fate in ('retry', 'elsewhere') then null
      when s.provider_job_id is distinct from r.provider_job_id and s.provider_job_id is not null then v_now
      else r.submitted_at end,
    due_at = case
      when fate = 'elsewhere' then v_now
      when fate = 'retry' and not refunded and r.attempt >= r.max_attempts then null
      when fate in ('retry', 'parked', 'released') then v_now + make_interval(secs => coalesce(s.due_in, 0)) end,
    webhook = case fate when 'parked' then case when s.webhook then 'awaited' end when 'released' then r.webhook end,
    -- Among those who wait there already, as a new run would: not in front of them.
    rank = case when fate = 'elsewhere' then private.place_in_line(r.subject_id, private.lane_of(step), r.priority) end,
    lane = case when fate = 'elsewhere' then private.lane_of(step) else r.lane end,
    via = coalesce(step, r.via),
    finished_at = case
      when fate in ('completed', 'failed') or (fate = 'retry' and not refunded and r.attempt >= r.max_attempts)
      then v_now end
  from public.runs o
  join jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, payload jsonb, message text, due_in double precision, refund boolean,
    elsewhere boolean, provider_job_id text, progress integer, webhook boolean
  ) on s.id = o.id and s.claim = o.claim
  cross join lateral (
    select coalesce(s.refund, false) and coalesce(o.refused_since, v_now) > v_now - interval '1 hour' as refunded,
      o.provider_job_id is not null as ordered,
      case when s.elsewhere and s.outcome in ('failed', 'retry')
        then (private.steps_left(o.metadata, o.processor, o.via))[1] end as step
  ) policy
  cross join lateral (select case when step is null then s.outcome else 'elsewhere' end as fate) way
  where r.id = o.id and r.id = any (v_seen) and o.id = any (v_seen) and o.claim = any (v_held);

  -- A claim that is gone: nobody uses what came of it, but it may have been paid for, and that is written down.
  -- Once, also if this answer is lost and the settlement comes again: the event's id follows from the claim. Not if the
  -- run has this very order: then an acknowledgement was lost, and its next check was claimed meanwhile.
  insert into public.run_events (id, run_id, kind, payload)
  select md5('lost claim ' || s.claim)::uuid, s.id, coalesce(s.if_lost ->> 'kind', 'log'), s.if_lost -> 'payload'
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, provider_job_id text, if_lost jsonb)
  join public.runs r on r.id = s.id and r.claim <> s.claim
  where s.if_lost -> 'payload' is not null and s.id = any (v_seen) and r.id = any (v_seen)
    and (s.provider_job_id is null or s.provider_job_id is distinct from r.provider_job_id)
  on conflict (id) do nothing;
  if cardinality(v_held) < cardinality(v_seen) then
    perform private.attach_order(
      split_part(coalesce(s.processor, r.via, r.processor), ':', 1), s.provider_job_id, s.id, s.ticket)
    from jsonb_to_recordset(p_settlements) as s (
      id varchar, claim bigint, outcome text, provider_job_id text, ticket bigint, processor text)
    join public.runs r on r.id = s.id and r.claim <> s.claim
    where s.outcome = 'parked' and s.provider_job_id is not null and s.ticket is not null
      and s.id = any (v_seen) and r.id = any (v_seen);
  end if;

  perform set_config('image_jobs.hand', v_hand, true);

  return query
  select jsonb_build_object('id', s.id, 'claim', s.claim, 'result', case
    when r.claim = s.claim and s.claim = any (v_held) then 'settled'
    when s.id = any (v_seen) and r.claim = s.claim then 'already'
    when s.id = any (v_seen) or r.id is null then 'lost'
    else 'busy' end)
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint)
  left join public.runs r on r.id = s.id and r.id = any (v_ids);
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

create or replace view public.queue_stats with (security_invoker = on) as
select
  p.provider,
  count(*) filter (where r.status = 'pending' and r.due_at <= private.now()) as pending,
  count(*) filter (where r.status = 'pending' and r.due_at > private.now()) as delayed,
  count(*) filter (where r.status = 'running' and r.claimed_by is not null) as running,
  count(*) filter (where r.status = 'running' and r.claimed_by is null) as parked,
  count(*) filter (where r.status = 'completed') as completed,
  count(*) filter (where r.status = 'failed') as failed,
  count(*) filter (where r.status = 'cancelled') as cancelled,
  private.now() - min(r.due_at) filter (where r.status = 'pending' and r.due_at <= private.now()) as oldest_wait,
  coalesce(bool_or(l.paused), false) as paused,
  max(l.blocked_until) filter (where l.blocked_until > private.now()) as blocked_until
from (
  select split_part(coalesce(q.via, q.processor), ':', 1) as provider from public.runs q where q.kind = 'image_gen' and q.ticket is not null
  union
  select b.provider from public.provider_limits b where b.paused or b.blocked_until > private.now()
) p
left join public.runs r
  on r.kind = 'image_gen' and r.ticket is not null and split_part(coalesce(r.via, r.processor), ':', 1) = p.provider
left join public.provider_limits l on l.provider = p.provider and l.model is null
group by p.provider;

create or replace view public.run_timings with (security_invoker = on) as
select
  split_part(coalesce(r.via, r.processor), ':', 1) as provider,
  stage.name as stage,
  count(*) as runs,
  percentile_cont(0.5) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p50,
  percentile_cont(0.95) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p95,
  percentile_cont(0.99) within group (order by (r.payload -> 'timings' ->> stage.name)::double precision) as p99
from public.runs r
cross join unnest(array['queuedMs', 'generateMs', 'storeMs', 'settleMs']) as stage (name)
where r.kind = 'image_gen' and r.status = 'completed' and r.payload -> 'timings' ->> stage.name is not null
group by split_part(coalesce(r.via, r.processor), ':', 1), stage.name;

create or replace view public.run_costs with (security_invoker = on) as
select
  split_part(worked.processor, ':', 1) as provider,
  substr(worked.processor, strpos(worked.processor, ':') + 1) as model,
  date_trunc('day', e.ts) as day,
  count(*) filter (where e.payload ->> 'event' in ('generated', 'late')) as images,
  sum((e.payload -> 'data' ->> 'cost')::numeric) as cost,
  sum((e.payload -> 'data' ->> 'possibleCost')::numeric) as possible_cost,
  count(*) filter (where e.payload ->> 'event' = 'generated' and e.payload -> 'data' ->> 'cost' is null) as unknown
from public.run_events e
join public.runs r on r.id = e.run_id
-- A run may have gone on to another provider since.
cross join lateral (select coalesce(e.payload -> 'data' ->> 'processor', r.via, r.processor) as processor) worked
where r.kind = 'image_gen' and e.payload ->> 'event' in ('generated', 'late', 'taken_over', 'unknown_outcome', 'charged')
group by 1, 2, 3;

-- StartImageJobRequest in, ImageJobRecord out. metadata is merged at the top level, the named fields win.
-- The same idempotency key (of the same user, in the same workflow) returns the first run.
create or replace function public.start_image_job(request jsonb)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_metadata jsonb;
  v_workflow uuid;
  v_id varchar;
begin
  if jsonb_typeof(request) is distinct from 'object' then
    perform private.refuse('The request must be an object.', 'Send {nodeId, workflowId, promptSpec, provider, model}.');
  end if;
  if coalesce(jsonb_typeof(request -> 'metadata'), 'null') not in ('object', 'null') then
    perform private.refuse('metadata must be an object.', 'Leave it out if there is none.');
  end if;
  if coalesce(request ->> 'nodeId', '') = '' then
    perform private.refuse('nodeId is missing.', 'Name the canvas node that shall show the image.');
  end if;
  if coalesce(request ->> 'provider', '') = '' or coalesce(request ->> 'model', '') = '' then
    perform private.refuse('provider and model are missing.', 'The view image_models lists what is on offer.');
  end if;
  if request ->> 'workflowId' !~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' or request ->> 'workflowId' is null then
    perform private.refuse('workflowId must be a uuid.', 'For example crypto.randomUUID().');
  end if;
  v_workflow := request ->> 'workflowId';
  v_metadata := coalesce(nullif(request -> 'metadata', 'null'), '{}')
    || coalesce((
      select jsonb_object_agg(named.key, named.value) from jsonb_each(request) named
      where named.key in ('nodeId', 'webhookUrl', 'idempotencyKey', 'mode', 'fallback', 'fallbackOnRefusal') and named.value <> 'null'
    ), '{}')
    || case when request ? 'promptSpec' then jsonb_build_object('promptSpec', request -> 'promptSpec') else '{}' end;

  insert into public.runs (kind, subject_id, status, processor, metadata)
  values ('image_gen', v_workflow, 'pending', (request ->> 'provider') || ':' || (request ->> 'model'), v_metadata)
  on conflict (created_by, subject_id, (metadata ->> 'idempotencyKey'))
    where kind = 'image_gen' and ticket is not null and metadata ->> 'idempotencyKey' is not null
    do nothing
  returning id into v_id;
  if v_id is null then
    select r.id into v_id from public.runs r
    where r.kind = 'image_gen' and r.subject_id = v_workflow and r.ticket is not null
      and r.created_by is not distinct from private.current_user_id()
      and r.metadata ->> 'idempotencyKey' = v_metadata ->> 'idempotencyKey';
  end if;
  return private.image_job_record(v_id);
end
$$;

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

revoke all on function private.why_closed(text), private.first_open(varchar[]), private.going_on(jsonb, varchar),
  private.pass_on(), private.may_have_asked(public.runs, text) from public, anon, authenticated, service_role;
revoke all on function private.steps_left(jsonb, varchar, varchar) from public, anon, authenticated, service_role;
-- The key of an index runs with the rights of whoever writes.
grant execute on function private.steps_left(jsonb, varchar, varchar) to authenticated, service_role;
