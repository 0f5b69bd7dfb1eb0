-- Orders at providers: webhooks that are awaited, orders that are to be cancelled, orders that nobody wrote down.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

alter table public.runs add column if not exists webhook text;
alter table public.runs drop constraint if exists runs_webhook_is_awaited_or_came;
alter table public.runs add constraint runs_webhook_is_awaited_or_came
  check (kind is distinct from 'image_gen' or webhook in ('awaited', 'came')) not valid;
comment on column public.runs.webhook is
  'Of a parked run: awaited until its next check, or it came and made the check due. Null: it is polled.';

alter table private.webhook_deliveries add column if not exists ticket bigint, add column if not exists ask_at timestamptz;
comment on column private.webhook_deliveries.ticket is 'Of the run that the order was made for, where the provider had to be asked.';
comment on column private.webhook_deliveries.ask_at is
  'Not before then is the provider asked whose order it is, or the run looked at again. Null: not asked yet.';

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
  new.submitted_at := old.submitted_at;
  new.refused_since := old.refused_since;
  -- Nobody waits for word once somebody else says when to look, or that it is over.
  new.webhook := case when (new.status, new.due_at) is not distinct from (old.status, old.due_at) then old.webhook end;
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

-- What a daemon gets to know of a run it has claimed.
create or replace function private.claimed_run(r public.runs, p_due_at timestamptz)
returns jsonb language sql stable set search_path = ''
as $$
  select jsonb_build_object(
    'id', r.id, 'claim', r.claim, 'ticket', r.ticket, 'subject_id', r.subject_id, 'processor', r.processor,
    'metadata', case when jsonb_path_exists(r.metadata, '$.**{65}') then '{}' else coalesce(r.metadata, '{}') end,
    'attempt', r.attempt, 'max_attempts', r.max_attempts,
    'provider_job_id', r.provider_job_id, 'webhook', r.webhook,
    'submitted_ago', extract(epoch from private.now() - r.submitted_at),
    'waited', case when isfinite(p_due_at) then extract(epoch from private.now() - p_due_at) else 0 end)
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
--   webhook           true: the provider will send word of the order; due_in is how long that is waited for (parked)
--   ticket            of the run that the order was made for: if the claim is gone, the order finds its run by it, or is
--                     cancelled (parked)
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
    webhook = case s.outcome when 'parked' then case when s.webhook then 'awaited' end when 'released' then r.webhook end,
    rank = null,
    finished_at = case
      when s.outcome in ('completed', 'failed') or (s.outcome = 'retry' and not refunded and r.attempt >= r.max_attempts)
      then v_now end
  from public.runs o
  join jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, payload jsonb, message text, due_in double precision, refund boolean,
    provider_job_id text, progress integer, webhook boolean
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
  if cardinality(v_held) < cardinality(v_seen) then
    perform private.attach_order(split_part(r.processor, ':', 1), s.provider_job_id, s.id, s.ticket)
    from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, outcome text, provider_job_id text, ticket bigint)
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

-- Takes the runs of one daemon away from it. What was parked is checked on; a call that was in flight has an unknown
-- outcome, and is made again only as the run's next attempt, after a pause (what killed one daemon may kill the next): as
-- long as a webhook is waited for if it was an order, and one may come.
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
    due_at = case fate.status when 'running' then v_now when 'pending' then v_now + greatest(
      make_interval(secs => 2 ^ least(r.attempt, 8)), private.webhook_wait(r)) end,
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
      and d.provider in ('hmac', split_part(r.processor, ':', 1))
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
        jsonb_build_object('event', 'late',
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

-- Word may come before the order is written down, or while it is being checked: then the next check is due at once.
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
      and d.provider in ('hmac', split_part(new.processor, ':', 1))
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

-- Orders that nobody waits for, and orders that nobody wrote down.
--
-- An order whose run was cancelled, or requeued such that it was dropped, is cancelled at its provider: a row here stays
-- until a daemon has done that. An order that was taken, and whose id was never written down, tells by its first webhook
-- that it exists: the daemons ask the provider whose it is, and its run goes on with it instead of ordering again.

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
create or replace function private.cancel_order(p_provider text, p_provider_job_id text, p_run_id varchar)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into private.cancellations (provider, provider_job_id, run_id, requested_at, due_at)
  values (p_provider, p_provider_job_id, p_run_id, private.now(), private.now())
  on conflict do nothing;
  perform pg_notify('image_jobs_drop', '');
end
$$;

-- An outside hand took the run away from its order. Taking over from a silent daemon keeps the order, and so does a
-- requeue after polling_timeout; a daemon that orders anew has heard from the provider that the first order failed.
create or replace function private.drop_order()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  perform private.cancel_order(split_part(old.processor, ':', 1), old.provider_job_id, old.id);
  return null;
end
$$;

create or replace trigger drop_order after update on public.runs
  for each row when (
    old.kind = 'image_gen' and old.provider_job_id is not null and old.status in ('pending', 'running')
    and new.claim is distinct from old.claim
    and (new.status = 'cancelled' or new.provider_job_id is distinct from old.provider_job_id))
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

-- Gives an order that nobody wrote down to the run that it was made for (p_run_id null: it is none of ours). Answers:
--   attached   the run waited for its next attempt; now it is parked with this order, and asked about at once
--   known      it has this order
--   held       an attempt is at work, perhaps the one that made the order: looked at again when that has ended
--   noted      the run has failed; an event says that there is an order
--   cancelled  the run has no use for it: cancelled, requeued, completed, or ordered again; it is cancelled at the provider
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
  where r.id = p_run_id and r.kind = 'image_gen' and r.ticket is not null and split_part(r.processor, ':', 1) = p_provider
  for update skip locked;
  -- Somebody has it locked. An event would wait for that: its run must be there.
  if not found and exists (
    select from public.runs r
    where r.id = p_run_id and r.kind = 'image_gen' and r.ticket is not null and split_part(r.processor, ':', 1) = p_provider)
  then
    return 'held';
  end if;
  v_result := case
    when v_run.id is null then 'unknown'
    when v_run.provider_job_id = p_provider_job_id then 'known'
    when v_run.ticket <> p_ticket or v_run.status in ('cancelled', 'completed') or v_run.provider_job_id is not null
      then 'cancelled'
    when v_run.status = 'failed' then 'noted'
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
          where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id) then 'came' end,
        message = 'An earlier attempt had ordered it; that order is used.'
      where r.id = p_run_id;
      perform set_config('image_jobs.hand', v_hand, true);
    when 'cancelled' then
      perform private.cancel_order(p_provider, p_provider_job_id, p_run_id);
    when 'noted' then
      perform private.note_order(p_run_id, 'log', 'late',
        'The provider has an order of this run whose id was never written down; it may be charged.', p_provider_job_id, '{}');
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
    and exists (select from private.webhook_secrets w where w.provider = split_part(r.processor, ':', 1))
$$;

-- An attempt ends without knowing what came of it, and word of its order is here already: the run goes on with that order.
create or replace function private.find_order()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_order text;
begin
  select d.provider_job_id into v_order from private.webhook_deliveries d
  where d.closed_at is null and d.run_id = new.id and d.ticket = new.ticket
    and d.received_at > private.now() - interval '1 hour'
  order by d.received_at limit 1;
  if found then
    new.status := 'running';
    new.provider_job_id := v_order;
    new.submitted_at := private.now();
    new.due_at := private.now();
    new.webhook := 'came';
    new.finished_at := null;
    new.payload := null;
    new.message := 'An earlier attempt had ordered it; that order is used.';
    update private.webhook_deliveries d set closed_at = private.now() where d.run_id = new.id and d.provider_job_id = v_order;
  end if;
  return new;
end
$$;

create or replace trigger find_order before update on public.runs
  for each row when (
    old.kind = 'image_gen' and old.claimed_by is not null and old.ticket = new.ticket
    and new.claimed_by is null and new.provider_job_id is null
    and (new.status = 'pending' or (new.status = 'failed' and new.payload ->> 'code' = 'outcome_unknown')))
  execute function private.find_order();

-- Orders are between the database and its daemons.

revoke all on private.cancellations from public, anon, authenticated, service_role;
revoke all on function private.cancel_order(text, text, varchar), private.drop_order(),
  private.note_order(varchar, text, text, text, text, jsonb), private.take_cancellations(text[], integer),
  private.finish_cancellation(text, text, text, boolean), private.unmatched_deliveries(text[], integer),
  private.attach_order(text, text, varchar, bigint), private.webhook_wait(public.runs), private.find_order()
  from public, anon, authenticated, service_role;

alter table private.cancellations enable row level security;
