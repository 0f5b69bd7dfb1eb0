-- The queue: what happens to a run from insert to settlement.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- insert → pending. Whoever inserts, the row is either good, or refused in one sentence.

-- Refuses a promptSpec that no provider could work with. Sentences are for the person who called insert().
create or replace function private.check_prompt(p_metadata jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_spec jsonb := p_metadata -> 'promptSpec';
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
      or new.rank is not null or new.submitted_at is not null or new.refused_since is not null
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
  new.lane := private.lane_of(new.processor);
  new.rank := private.place_in_line(new.subject_id, new.lane, new.priority);
  if new.due_at > v_now then
    new.rank := null;
  end if;
  return new;
end
$$;

create or replace trigger accept_run before insert on public.runs
  for each row when (new.kind = 'image_gen') execute function private.accept_run();

-- Updates from outside: what an operator's plain UPDATE may do, and what it sets off.
--
-- The daemon's functions say so while they write (image_jobs.hand = 'daemon', for the length of the function only).
-- Every other hand is an outside hand: columns that are ours stay as they are, and a status is a request:
-- 'pending' means "again, now", 'cancelled' means "stop". Both draw a new claim, so whoever held the run has lost it.

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
  new.submitted_at := old.submitted_at;
  new.refused_since := old.refused_since;
  new.lane := old.lane;
  new.rank := old.rank;
  new.priority := coalesce(new.priority, old.priority, 0);
  new.max_attempts := greatest(coalesce(new.max_attempts, old.max_attempts, 3), 1);
  -- Without a time, nobody would ever look at it again.
  if new.due_at is null and old.due_at is not null and old.status in ('pending', 'running') then
    new.due_at := private.now();
  end if;
  if old.status = 'pending' and old.ticket is not null then
    new.lane := private.lane_of(new.processor);
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
    new.lane := private.lane_of(new.processor);
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

-- Triggers fire in the order of their names: the columns first, then the status.
create or replace trigger guard_1_columns before update on public.runs
  for each row when (old.kind = 'image_gen' or new.kind = 'image_gen') execute function private.guard_run();
create or replace trigger guard_2_status before update of status on public.runs
  for each row when (old.kind = 'image_gen' and new.kind = 'image_gen') execute function private.guard_status();

-- Nodes: ours stay ours, theirs stay theirs.

-- The keys of node_data that we own.
create or replace function private.own_keys()
returns text[] language sql immutable parallel safe set search_path = ''
as $$
  select array['status', 'runId', 'progress', 'message', 'previewUrl', 'imageUrl', 'thumbnailUrl', 'error', 'updatedAt']
$$;

-- What a node shows of a run, on top of what it had. An old image stays until a new one replaces it.
create or replace function private.node_data(
  p_data jsonb, p_run_id varchar, p_status varchar, p_progress integer, p_message text, p_preview_url text, p_payload jsonb)
returns jsonb language sql volatile set search_path = ''
as $$
  select (p_data
      - array['status', 'runId', 'progress', 'message', 'previewUrl', 'error', 'updatedAt']
      - case when p_status = 'completed' then array['imageUrl', 'thumbnailUrl'] else '{}' end)
    || jsonb_strip_nulls(jsonb_build_object(
      'status', case p_status when 'failed' then 'error' else p_status end,
      'runId', p_run_id,
      'progress', case p_status when 'completed' then 100 else p_progress end,
      'message', case p_status when 'failed' then p_payload ->> 'hint' else p_message end,
      'previewUrl', case when p_status = 'running' then p_preview_url end,
      'error', case when p_status = 'failed' then p_payload ->> 'error' end,
      'updatedAt', to_char(private.now() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')))
    || case when p_status = 'completed' then jsonb_strip_nulls(jsonb_build_object(
      'imageUrl', p_payload ->> 'imageUrl', 'thumbnailUrl', p_payload ->> 'thumbnailUrl')) else '{}' end
$$;

-- Before a node is written. A frontend that writes the whole node_data (dragging a node) can neither change nor forge our
-- keys; a node that is new here shows its newest run.
create or replace function private.keep_node()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_own text[] := private.own_keys();
  v_run record;
begin
  -- Projection writes from a trigger of runs, or from a daemon's turn: a client who only says so is not believed.
  if current_setting('image_jobs.hand', true) = 'projection' and (pg_trigger_depth() > 1 or private.is_operator()) then
    new.version := nextval('private.node_versions');
    new.updated_at := private.now();
    return new;
  end if;
  if jsonb_typeof(new.node_data) is distinct from 'object' then
    perform private.refuse('node_data must be an object.', 'Set it to {} if there is nothing to say.');
  end if;
  new.run_ticket := null;
  if tg_op = 'UPDATE' then
    new.created_at := old.created_at;
    new.run_ticket := old.run_ticket;
    new.node_data := (new.node_data - v_own) || coalesce((
      select jsonb_object_agg(kept.key, kept.value) from jsonb_each(old.node_data) kept where kept.key = any (v_own)
    ), '{}');
    new.version := old.version;
    new.updated_at := old.updated_at;
    if new is not distinct from old then
      return new;
    end if;
  else
    new.created_at := private.now();
    new.node_data := new.node_data - v_own;
  end if;
  perform private.use_workflow(new.workflow_id);
  if tg_op = 'INSERT' or new.id <> old.id or new.workflow_id <> old.workflow_id then
    new.node_data := new.node_data - v_own;
    new.run_ticket := null;
    select r.* into v_run
    from public.runs r
    where r.kind = 'image_gen' and r.ticket is not null
      and r.metadata ->> 'nodeId' = new.id and r.subject_id = new.workflow_id
    order by r.ticket desc limit 1;
    if found then
      new.node_data := private.node_data(new.node_data, v_run.id, v_run.status, v_run.progress, v_run.message,
        v_run.preview_url, v_run.payload);
      new.run_ticket := v_run.ticket;
    end if;
    -- A run that is changing just now neither sees this node nor is seen here: the next turn looks once more. A lock
    -- on the run would do as well, and deadlock with operators who change many runs.
    if tg_op = 'UPDATE' or not exists (select from public.workflow_nodes n where n.id = new.id) then
      insert into private.stale_nodes (node_id) values (new.id);
    end if;
  end if;
  new.version := nextval('private.node_versions');
  new.updated_at := private.now();
  return new;
end
$$;

create or replace trigger keep_node before insert or update on public.workflow_nodes
  for each row execute function private.keep_node();

-- Projection: any change of runs, whoever made it, becomes events, node data and notifications.
--
-- Statement-level triggers with transition tables say what changed (private.run_change); private.follow_up does the rest.
-- The two are apart because they want opposite plans: pairing old and new rows must hash (a nested loop over transition
-- tables is quadratic), everything after it must walk indexes.
-- Each says so in full, since the settings of a caller reach into what it calls.

do $$
begin
  create type private.run_change as (
    id varchar,
    subject_id uuid,
    node_id text,
    ticket bigint,
    old_ticket bigint,
    old_status varchar,
    status varchar,
    old_claim bigint,
    claim bigint,
    old_holder uuid,
    holder uuid,
    attempt integer,
    old_attempt integer,
    max_attempts integer,
    progress integer,
    old_progress integer,
    message text,
    old_message text,
    preview_url text,
    processor varchar,
    due_at timestamptz,
    provider_job_id text,
    old_provider_job_id text,
    payload jsonb,
    old_payload jsonb
  );
exception when duplicate_object then
  null;
end
$$;

-- Shows nodes the newest of their runs. Nodes that somebody has locked are left for the next turn (private.stale_nodes);
-- a node whose own data breaks a rule of ours (older than the rule) must not keep its run from ending.
create or replace function private.show_runs(p_nodes varchar[])
returns void language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
  set lock_timeout = '50ms'
as $$
declare
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_locked varchar[];
  v_node varchar;
begin
  -- Postgres waits in spite of `skip locked` if a row's last writer commits just now and the next has written already.
  begin
    with locked as (
      select n.id from public.workflow_nodes n where n.id = any (p_nodes) order by n.id for update skip locked
    )
    select array_agg(id) into v_locked from locked;
  exception when lock_not_available then
    v_locked := null;
  end;
  insert into private.stale_nodes (node_id)
  select n.id from public.workflow_nodes n
  where n.id = any (p_nodes) and not n.id = any (coalesce(v_locked, '{}'));
  if v_locked is null then
    return;
  end if;

  perform set_config('image_jobs.hand', 'projection', true);
  begin
    perform private.write_nodes(v_locked);
  exception when check_violation then
    foreach v_node in array v_locked loop
      begin
        perform private.write_nodes(array[v_node]);
      exception when check_violation then
        insert into public.run_events (run_id, kind, payload)
        select r.id, 'error', jsonb_build_object('event', 'warning',
          'message', 'The node breaks the base64 rule, so it cannot show this run.', 'data', jsonb_build_object('nodeId', v_node))
        from public.workflow_nodes n
        join public.runs r on r.kind = 'image_gen' and r.ticket is not null
          and r.metadata ->> 'nodeId' = n.id and r.subject_id = n.workflow_id
        where n.id = v_node
        order by r.ticket desc limit 1;
      end;
    end loop;
  end;
  perform set_config('image_jobs.hand', v_hand, true);
end
$$;

-- Writes the newest run of each node into it, if it does not show that yet. The caller holds the nodes' locks.
create or replace function private.write_nodes(p_nodes varchar[])
returns void language sql volatile security definer set search_path = ''
as $$
  update public.workflow_nodes n
  set node_data = shown.node_data, run_ticket = r.ticket
  from unnest(p_nodes) as target (id)
  cross join lateral (
    select newest.*, w.node_data from public.workflow_nodes w
    join public.runs newest on newest.kind = 'image_gen' and newest.ticket is not null
      and newest.metadata ->> 'nodeId' = w.id and newest.subject_id = w.workflow_id
    where w.id = target.id
    order by newest.ticket desc limit 1
  ) r
  cross join lateral (
    select private.node_data(r.node_data, r.id, r.status, r.progress, r.message, r.preview_url, r.payload) as node_data
  ) shown
  where n.id = target.id
    and (n.run_ticket is distinct from r.ticket or n.node_data - 'updatedAt' <> shown.node_data - 'updatedAt')
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
      jsonb_strip_nulls(jsonb_build_object('daemon', c.old_holder, 'possibleCost', case when c.status <> 'running' then (
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
      jsonb_build_object('daemon', c.holder, 'attempt', c.attempt)
    where c.old_status = 'pending' and c.status = 'running'
    union all
    select 5, 'log', 'parked', coalesce(c.message, 'The provider took the order.'),
      jsonb_build_object('providerJobId', c.provider_job_id, 'checkAt', c.due_at)
    where c.status = 'running' and c.provider_job_id is distinct from c.old_provider_job_id and c.provider_job_id is not null
      and c.old_status = 'running'
    union all
    select 6, case when c.payload ? 'code' then 'error' else 'log' end, 'retry', coalesce(c.payload ->> 'error', c.message, 'In line again.'),
      jsonb_strip_nulls(jsonb_build_object('code', c.payload ->> 'code', 'hint', c.payload ->> 'hint',
        'details', c.payload -> 'details',
        'attempt', c.old_attempt, 'dueAt', c.due_at))
    where c.old_status = 'running' and c.status = 'pending' and c.claim = c.old_claim
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
    n.provider_job_id, null, n.payload, null)::private.run_change)
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
    n.preview_url, n.processor, n.due_at, n.provider_job_id, o.provider_job_id, n.payload, o.payload)::private.run_change
    order by n.id)
  into v_changes
  from new_rows n join old_rows o on o.id = n.id
  where n.kind = 'image_gen' and (n.ticket is not null or n.status <> o.status)
    and (n.status, n.claim, n.claimed_by, n.progress, n.message, n.preview_url, n.provider_job_id, n.due_at, n.metadata ->> 'nodeId')
      is distinct from
      (o.status, o.claim, o.claimed_by, o.progress, o.message, o.preview_url, o.provider_job_id, o.due_at, o.metadata ->> 'nodeId');
  if v_changes is not null then
    perform private.follow_up(v_changes);
  end if;
  return null;
end
$$;

-- A deleted run: its holder drops it, and its node shows the next newest run, or none.
create or replace function private.runs_deleted()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
begin
  for v_run in
    select o.id, o.claim, o.claimed_by, o.ticket, o.subject_id, o.metadata ->> 'nodeId' as node_id
    from old_rows o where o.kind = 'image_gen' order by o.metadata ->> 'nodeId', o.ticket
  loop
    if v_run.claimed_by is not null then
      perform pg_notify('image_jobs_drop', v_run.claim::text);
    end if;
    perform set_config('image_jobs.hand', 'projection', true);
    update public.workflow_nodes n set node_data = n.node_data - private.own_keys(), run_ticket = null
    where n.id = v_run.node_id and n.workflow_id = v_run.subject_id and n.run_ticket = v_run.ticket;
    if found then
      perform private.show_runs(array[v_run.node_id]::varchar[]);
    end if;
    perform set_config('image_jobs.hand', v_hand, true);
  end loop;
  return null;
end
$$;

create or replace trigger runs_inserted after insert on public.runs
  referencing new table as new_rows for each statement execute function private.runs_inserted();
create or replace trigger runs_updated after update on public.runs
  referencing old table as old_rows new table as new_rows for each statement execute function private.runs_updated();
create or replace trigger runs_deleted after delete on public.runs
  referencing old table as old_rows for each statement execute function private.runs_deleted();

-- pending → running, and parked → held: the daemon takes work.

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
          and (v_limit.model is null or r.processor = p_provider || ':' || v_limit.model)
        limit v_limit.max_running
      ) counted;
      v_least := least(v_least, v_left);
    end if;
  end loop;
  return case when v_least is not null then greatest(v_least, 0) end;
end
$$;

-- Writes down that runs have started, in each limit that counts them. The caller holds the rows' locks.
create or replace function private.count_starts(p_provider text, p_lane text, p_starts integer)
returns void language sql volatile set search_path = ''
as $$
  update public.provider_limits l
  set (recent_at, recent_starts) = (
    select array_agg(s.at order by s.at), array_agg(s.starts order by s.at)
    from (
      select r.at, sum(r.starts) as starts
      from (select * from unnest(l.recent_at, l.recent_starts) union all select second.now, p_starts) r (at, starts)
      where r.at >= second.now - 60
      group by r.at
    ) s)
  from (select floor(extract(epoch from private.now()))::bigint as now) second
  where l.provider = p_provider and (l.model is null or l.provider || ':' || l.model = p_lane)
    and l.per_minute is not null
$$;

-- What a daemon gets to know of a run it has claimed.
create or replace function private.claimed_run(r public.runs, p_due_at timestamptz)
returns jsonb language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', r.id, 'claim', r.claim, 'ticket', r.ticket, 'subject_id', r.subject_id, 'processor', r.processor,
    'metadata', case when jsonb_path_exists(r.metadata, '$.**{65}') then '{}' else coalesce(r.metadata, '{}') end,
    'attempt', r.attempt, 'max_attempts', r.max_attempts,
    'provider_job_id', r.provider_job_id,
    'submitted_ago', extract(epoch from private.now() - r.submitted_at),
    'waited', case when isfinite(p_due_at) then extract(epoch from private.now() - p_due_at) else 0 end)
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
    select r.id, private.lane_of(r.processor) as lane from public.runs r
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
          set lane = private.lane_of(r.processor),
            rank = private.place_in_line(r.subject_id, private.lane_of(r.processor), r.priority)
          from next where r.id = next.id and private.lane_of(r.processor) <> v_lane.lane;
        end if;

        v_count := 0;
        v_last := null;
        for v_claimed, v_rank in
          with next as materialized (
            select r.id, r.due_at from public.runs r
            where r.kind = 'image_gen' and r.status = 'pending' and r.rank is not null
              and r.lane = v_lane.lane and r.priority = v_lane.priority
              and r.rank >= case when p_thorough then 0 else v_lane.floor end
              and (not v_models or private.lane_of(r.processor) = r.lane)
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

-- running → completed, failed, pending again, or parked: the daemon writes back, fenced by the claim.

-- Adds events to runs: [{"run_id", "id", "kind", "payload": {"event", "message", …}}, …], in order.
-- One that comes again with its id, since an acknowledgement was lost, is left out.
create or replace function private.add_events(p_events jsonb)
returns void language sql volatile set search_path = ''
as $$
  insert into public.run_events (id, run_id, kind, payload)
  select coalesce((e.value ->> 'id')::uuid, gen_random_uuid()), e.value ->> 'run_id',
    coalesce(e.value ->> 'kind', 'log'), e.value -> 'payload'
  from jsonb_array_elements(p_events) with ordinality as e (value, place)
  order by e.place
  on conflict (id) do nothing
$$;

-- Settles runs. Each settlement is an object:
--   id, claim         the fence
--   outcome           completed | failed | retry | parked | released (what was ordered goes back to parked)
--   payload           the result, or {error, code, hint} (completed, failed, retry)
--   message           for the person at the canvas (retry, parked, released)
--   due_in            seconds until the next try or check (retry, parked)
--   refund            true: the provider never accepted the request; the attempt comes back, for at most an hour (retry)
--   provider_job_id   of the order the provider has taken (parked)
--   progress          0-100 (parked)
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
    status = case s.outcome
      when 'retry' then case when refunded or r.attempt < r.max_attempts then 'pending' else 'failed' end
      when 'parked' then 'running' when 'released' then case when ordered then 'running' else 'pending' end
      else s.outcome end,
    claimed_by = null,
    attempt = r.attempt
      - case when (s.outcome = 'retry' and refunded) or (s.outcome = 'released' and not ordered) then 1 else 0 end,
    refused_since = case when s.outcome = 'retry' and s.refund then coalesce(r.refused_since, v_now) end,
    payload = case
      when s.outcome not in ('parked', 'released') then s.payload
        || case when s.outcome = 'completed' then '{}' else jsonb_build_object('attempts', r.attempt) end end,
    message = case when s.outcome in ('retry', 'parked', 'released') then s.message end,
    progress = case s.outcome when 'completed' then 100 when 'parked' then coalesce(s.progress, r.progress) else
      case when s.outcome = 'retry' or (s.outcome = 'released' and not ordered) then 0 else r.progress end end,
    preview_url = case when s.outcome = 'parked' then r.preview_url end,
    provider_job_id = case when s.outcome in ('retry') then null else coalesce(s.provider_job_id, r.provider_job_id) end,
    submitted_at = case
      when s.outcome = 'retry' then null
      when s.provider_job_id is distinct from r.provider_job_id and s.provider_job_id is not null then v_now
      else r.submitted_at end,
    due_at = case
      when s.outcome = 'retry' and not refunded and r.attempt >= r.max_attempts then null
      when s.outcome in ('retry', 'parked', 'released') then v_now + make_interval(secs => coalesce(s.due_in, 0)) end,
    rank = null,
    finished_at = case
      when s.outcome in ('completed', 'failed') or (s.outcome = 'retry' and not refunded and r.attempt >= r.max_attempts)
      then v_now end
  from public.runs o
  join jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, payload jsonb, message text, due_in double precision, refund boolean,
    provider_job_id text, progress integer
  ) on s.id = o.id and s.claim = o.claim
  cross join lateral (
    select coalesce(s.refund, false) and coalesce(o.refused_since, v_now) > v_now - interval '1 hour' as refunded,
      o.provider_job_id is not null as ordered
  ) policy
  where r.id = o.id and r.id = any (v_seen) and o.id = any (v_seen) and o.claim = any (v_held);

  -- A claim that is gone: nobody uses what came of it, but it may have been paid for, and that is written down.
  -- Once, also if this answer is lost and the settlement comes again: the event's id follows from the claim.
  insert into public.run_events (id, run_id, kind, payload)
  select md5('lost claim ' || s.claim)::uuid, s.id, coalesce(s.if_lost ->> 'kind', 'log'), s.if_lost -> 'payload'
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, if_lost jsonb)
  join public.runs r on r.id = s.id and r.claim <> s.claim
  where s.if_lost -> 'payload' is not null and s.id = any (v_seen) and r.id = any (v_seen)
  on conflict (id) do nothing;

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

-- running → running: progress, previews and events of runs that are held.

-- Records progress. Each entry is {id, claim, progress, message, preview_url, events}; null leaves a column as it is.
-- Answers {id, claim, result} like settle_runs: recorded, lost or busy (send its events again, its progress is stale).
create or replace function private.record_progress(p_daemon uuid, p_entries jsonb)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_nestloop = off set enable_hashjoin = on
  set enable_mergejoin = off set jit = off
as $$
declare
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_ids varchar[] := array(select e.value ->> 'id' from jsonb_array_elements(p_entries) e);
  v_held bigint[];
  v_seen varchar[];
  v_events jsonb;
begin
  if jsonb_array_length(p_entries) = 0 then
    return;
  end if;
  perform set_config('image_jobs.hand', 'daemon', true);
  with mine as materialized (
    select r.id, r.claim, r.status, r.claimed_by from public.runs r
    where r.id = any (v_ids)
    order by r.id
    for update skip locked
  )
  select array_agg(m.id),
    array_agg(m.claim) filter (where m.status = 'running' and m.claimed_by = p_daemon
      and m.claim = (e.value ->> 'claim')::bigint)
  into v_seen, v_held
  from mine m join jsonb_array_elements(p_entries) e on e.value ->> 'id' = m.id;
  v_seen := coalesce(v_seen, '{}');
  v_held := coalesce(v_held, '{}');

  select jsonb_agg(x.value || jsonb_build_object('run_id', e.value ->> 'id') order by e.place, x.place) into v_events
  from jsonb_array_elements(p_entries) with ordinality as e (value, place)
  cross join lateral jsonb_array_elements(e.value -> 'events') with ordinality as x (value, place)
  where (e.value ->> 'claim')::bigint = any (v_held);
  if v_events is not null then
    perform private.add_events(v_events);
  end if;

  update public.runs r
  set progress = coalesce(greatest(r.progress, e.progress), r.progress),
    message = coalesce(e.message, r.message),
    preview_url = coalesce(e.preview_url, r.preview_url)
  from jsonb_to_recordset(p_entries) as e (id varchar, claim bigint, progress integer, message text, preview_url text)
  where r.id = any (v_seen) and r.id = e.id and r.claim = e.claim and r.claim = any (v_held)
    and (e.progress is not null or e.message is not null or e.preview_url is not null);
  perform set_config('image_jobs.hand', v_hand, true);

  return query
  select jsonb_build_object('id', e.id, 'claim', e.claim, 'result', case
    when r.claim = e.claim and e.claim = any (v_held) then 'recorded'
    when e.id = any (v_seen) or r.id is null then 'lost'
    else 'busy' end)
  from jsonb_to_recordset(p_entries) as e (id varchar, claim bigint)
  left join public.runs r on r.id = e.id and r.id = any (v_ids);
end
$$;

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

-- The life of a daemon: register, beat, judge the silent, leave.

-- Registers a daemon that has just started (or was fenced, and starts anew under a new id).
create or replace function private.register_daemon(
  p_id uuid, p_name text, p_version text, p_slots integer, p_lease interval, p_providers text[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into private.providers (name) select unnest(p_providers) on conflict do nothing;
  insert into private.lanes (lane, priority) select p, 0 from unnest(p_providers) p order by p on conflict do nothing;
  insert into private.daemons (id, name, version, slots, lease, providers, started_at, seen_at, fresh_since)
  values (p_id, p_name, p_version, p_slots, p_lease, p_providers, private.now(), private.now(), private.now())
  on conflict (id) do nothing;
  delete from private.daemons d where d.ended_at < private.now() - interval '7 days';
end
$$;

-- The advisory lock that a daemon's LISTEN session holds while it lives.
create or replace function private.session_lock_key(p_daemon uuid)
returns bigint language sql immutable parallel safe set search_path = ''
as $$
  select hashtextextended('image_jobs daemon ' || p_daemon::text, 0)
$$;

-- A sign of life. Raises IJ001 if the daemon was taken for dead meanwhile.
-- A gap of half a lease breaks its freshness: after an outage of the database nobody may judge at once.
create or replace function private.heartbeat(p_daemon uuid, p_in_flight integer, p_session_lock boolean, p_draining boolean)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
begin
  update private.daemons d
  set fresh_since = case when v_now - d.seen_at > d.lease / 2 then v_now else d.fresh_since end,
    seen_at = v_now, in_flight = p_in_flight, session_lock = p_session_lock, draining = p_draining
  where d.id = p_daemon and d.ended_at is null;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
end
$$;

-- Takes the runs of one daemon away from it. What was parked is checked on; a call that was in flight has an unknown
-- outcome, and is made again only as the run's next attempt, after a pause (what killed one daemon may kill the next).
-- Runs that somebody has locked are left for the next look of take_over.
create or replace function private.abandon_runs(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_hand text := coalesce(current_setting('image_jobs.hand', true), '');
  v_count integer;
begin
  perform set_config('image_jobs.hand', 'daemon', true);
  with theirs as materialized (
    select r.id from public.runs r where r.claimed_by = p_daemon order by r.id for update skip locked
  )
  update public.runs r
  set claim = nextval('private.claims'), claimed_by = null, rank = null, progress = case when r.provider_job_id is null then 0 else r.progress end,
    status = fate.status,
    due_at = case fate.status when 'running' then v_now when 'pending' then v_now + make_interval(secs => 2 ^ least(r.attempt, 8)) end,
    finished_at = case when fate.status = 'failed' then v_now end,
    message = case when fate.status = 'pending' then 'The daemon that was making this image went silent; another tries again.' end,
    payload = case when fate.status = 'failed' then jsonb_build_object(
      'error', 'Every daemon that tried to make this image went silent while it was at work.',
      'code', 'outcome_unknown', 'attempts', r.attempt,
      'hint', 'The provider may have charged for it. Look at the daemons'' logs, then requeue the run.') end
  from theirs
  join public.runs o on o.id = theirs.id
  cross join lateral (select case
    when o.provider_job_id is not null then 'running' when o.attempt < o.max_attempts then 'pending' else 'failed' end as status) fate
  where r.id = theirs.id;
  get diagnostics v_count = row_count;
  perform set_config('image_jobs.hand', v_hand, true);
  return v_count;
end
$$;

-- When the LISTEN session of a daemon began; null if it has none, or does not hold the daemon's lock.
create or replace function private.session_began(p_daemon uuid)
returns timestamptz language sql volatile set search_path = ''
as $$
  select a.backend_start
  from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid and a.datname = current_database()
  where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and l.database = a.datid
    and (l.classid::bigint << 32 | l.objid::bigint) = private.session_lock_key(p_daemon)
$$;

-- Takes over from daemons that have gone silent: no beat for their lease, or no beat for 6 s (a fifth of a long lease, so
-- that a beat was missed) and their session's lock is free. Locks go with a restart of the server too, so they count only
-- for a daemon whose own session was there before the last beat of the silent one, and still is.
-- Only a daemon whose own beats have come unbroken for one lease may judge. Answers how many runs were taken over.
create or replace function private.take_over(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_silent record;
  v_count integer := 0;
begin
  if not exists (
    select from private.daemons d
    where d.id = p_daemon and d.ended_at is null and d.seen_at - d.fresh_since >= d.lease and v_now - d.seen_at < d.lease / 2
  ) then
    return 0;
  end if;
  for v_silent in
    select d.id, d.seen_at, d.seen_at < v_now - d.lease as lapsed from private.daemons d
    where d.ended_at is null and d.id <> p_daemon
      and (d.seen_at < v_now - d.lease or (d.session_lock and d.seen_at < v_now - greatest(interval '6 s', d.lease / 5)))
    order by d.id
    for update skip locked
  loop
    continue when not v_silent.lapsed and not (
      coalesce(private.session_began(p_daemon) < v_silent.seen_at, false)
      and pg_try_advisory_xact_lock(private.session_lock_key(v_silent.id)));
    update private.daemons d set ended_at = v_now, ended = 'taken over' where d.id = v_silent.id;
    v_count := v_count + private.abandon_runs(v_silent.id);
  end loop;
  -- What was locked when its daemon ended.
  for v_silent in
    select distinct r.claimed_by as id from public.runs r
    where r.claimed_by is not null
      and not exists (select from private.daemons d where d.id = r.claimed_by and d.ended_at is null)
  loop
    v_count := v_count + private.abandon_runs(v_silent.id);
  end loop;
  return v_count;
end
$$;

-- Leaves in good order. What the daemon still holds by then is treated as a take-over would.
create or replace function private.leave(p_daemon uuid)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update private.daemons d set ended_at = private.now(), ended = 'stopped', in_flight = 0
  where d.id = p_daemon and d.ended_at is null;
  if found then
    perform private.abandon_runs(p_daemon);
  end if;
end
$$;

-- Closes a provider, or one model of it, for all daemons until p_for has passed: it said 429, or is out of credit.
create or replace function private.block_provider(p_provider text, p_model text, p_for interval, p_reason text)
returns void language sql volatile set search_path = ''
as $$
  insert into public.provider_limits as l (provider, model, blocked_until, blocked_reason)
  values (p_provider, p_model, private.now() + p_for, p_reason)
  on conflict (provider, model) do update
  set blocked_until = greatest(l.blocked_until, excluded.blocked_until), blocked_reason = excluded.blocked_reason
$$;

-- Publishes what a provider has on offer: the rows of image_models are replaced by these.
create or replace function private.publish_models(p_provider text, p_models jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  delete from private.models m
  where m.provider = p_provider and not exists (
    select from jsonb_to_recordset(p_models) as n (model text) where n.model = m.model);
  insert into private.models
  select n.* from jsonb_populate_recordset(null::private.models, p_models) n
  order by n.provider, n.model
  on conflict (provider, model) do update set
    sizes = excluded.sizes, ratios = excluded.ratios, seed = excluded.seed, negative_prompt = excluded.negative_prompt,
    previous_image = excluded.previous_image, previews = excluded.previews, price = excluded.price,
    typical_seconds = excluded.typical_seconds, retired = excluded.retired, successor = excluded.successor,
    as_of = excluded.as_of, source = excluded.source;
end
$$;
