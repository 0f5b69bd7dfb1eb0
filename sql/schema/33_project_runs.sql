-- Projection: any change of runs, whoever made it, becomes events, node data and notifications.
--
-- Statement-level triggers with transition tables say what changed (private.run_change); private.follow_up does the rest.
-- The two are apart because they want opposite plans: pairing old and new rows must hash (a nested loop over transition
-- tables is quadratic), everything after it must walk indexes.
-- Each says so in full, since the settings of a caller reach into what it calls.

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
  old_payload jsonb,
  old_processor varchar
);

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
