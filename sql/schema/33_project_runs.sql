-- Projection: any change of runs, by any writer, becomes events, node data and notifications.
--
-- Statement-level triggers with transition tables collect the changes (image_jobs.run_change); image_jobs.project_changes does the rest.
-- The two are apart because they want opposite plans: pairing old and new rows must hash (a nested loop over transition
-- tables is quadratic), everything after it must walk indexes.
-- Each sets its plan in full, since the settings of a caller reach into what it calls.

create type image_jobs.run_change as (
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
  old_processor varchar,
  call bigint,
  old_call bigint
);

-- Show nodes the newest of their runs. Locked nodes are left for the next sync (image_jobs.stale_nodes). A node that is
-- refused, by a trigger or a rule of the application or since its own data are older than a rule of ours, must not keep its
-- run from ending. p_failures: how often these nodes have been refused before.
create or replace function image_jobs.project_nodes(p_nodes varchar[], p_failures integer default 0)
returns void language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
  set lock_timeout = '50ms'
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_began timestamptz;
  v_locked varchar[];
  v_node varchar;
  v_sqlstate text;
  v_reason text;
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
  if cardinality(v_locked) is distinct from cardinality(p_nodes) then
    insert into image_jobs.stale_nodes (node_id)
    select n.id from public.workflow_nodes n
    where n.id = any (p_nodes) and not n.id = any (coalesce(v_locked, '{}'));
  end if;
  if v_locked is null then
    return;
  end if;

  perform set_config('image_jobs.writer', 'projection', true);
  v_began := clock_timestamp();
  begin
    perform image_jobs.write_nodes(v_locked);
    v_locked := '{}';
  exception when others or query_canceled or assert_failure then
    v_sqlstate := sqlstate;
    v_reason := sqlerrm;
  end;
  foreach v_node in array v_locked loop
    begin
      -- A statement that was cancelled because it took too long is not done over for each node.
      if cardinality(v_locked) = 1 or clock_timestamp() > v_began + interval '1 s' then
        perform image_jobs.postpone_node(v_node, p_failures, v_sqlstate, v_reason);
      else
        perform image_jobs.write_nodes(array[v_node]);
      end if;
    exception when others or query_canceled or assert_failure then
      perform image_jobs.postpone_node(v_node, p_failures, sqlstate, sqlerrm);
    end;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

-- Put a refused node off, for 1 s to 5 min, and warn on the run that it should show; once for each SQLSTATE.
create or replace function image_jobs.postpone_node(p_node varchar, p_failures integer, p_sqlstate text, p_reason text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if p_failures > 0 or not exists (
    select from image_jobs.stale_nodes s where s.node_id = p_node and s.failures > 0)
  then
    insert into image_jobs.stale_nodes (node_id, due_at, failures)
    values (p_node, image_jobs.now() + make_interval(secs => least(2 ^ least(p_failures, 9), 300)), p_failures + 1);
  end if;
  if p_reason like '%base64%' then
    insert into image_jobs.tallies (metric, provider, model, result, count) values ('base64', '', '', '', 1);
  end if;
  perform image_jobs.write_events(array[row(null, r.id, 'error', jsonb_build_object(
    'event', 'warning',
    'message', case when p_reason like '%base64%' then 'The node breaks the base64 rule, so it cannot show this run.'
      else 'The node cannot show this run: ' || left(p_reason, 500) end,
    'data', jsonb_build_object('nodeId', p_node, 'sqlstate', p_sqlstate)))::image_jobs.event])
  from public.workflow_nodes n
  cross join lateral (
    select newest.id from public.runs newest
    where newest.kind = 'image_gen' and newest.ticket is not null
      and newest.metadata ->> 'nodeId' = p_node and newest.subject_id = n.workflow_id
    order by newest.ticket desc limit 1
  ) r
  where n.id = p_node and not exists (
    select from public.run_events e
    where e.run_id = r.id and e.payload ->> 'event' = 'warning'
      and e.payload -> 'data' ->> 'nodeId' = p_node and e.payload -> 'data' ->> 'sqlstate' = p_sqlstate);
end
$$;

-- Write the newest run of each node into it, if it does not show that yet. A node with a pinned run shows that one until
-- there is a newer ticket. The caller holds the nodes' locks.
create or replace function image_jobs.write_nodes(p_nodes varchar[])
returns void language plpgsql volatile security definer set search_path = '' set enable_sort = off set jit = off
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  update public.workflow_nodes n
  set node_data = shown.node_data, run_ticket = r.ticket, pinned_run = null,
    version = nextval('image_jobs.node_versions'), updated_at = v_now
  from unnest(p_nodes) as target (id)
  join public.workflow_nodes w on w.id = any (array[target.id])
  cross join lateral (
    select newest.* from public.runs newest
    where newest.kind = 'image_gen' and newest.ticket is not null
      and newest.metadata ->> 'nodeId' = w.id and newest.subject_id = w.workflow_id
    order by newest.ticket desc limit 1
  ) r
  cross join lateral (
    select image_jobs.node_data(w.node_data, r.id, r.status, r.progress, r.message, r.preview_url, r.payload) as node_data
  ) shown
  where n.id = any (array[w.id])
    and (n.pinned_run is null or r.ticket > coalesce(n.run_ticket, 0))
    and (n.run_ticket is distinct from r.ticket or n.node_data - 'updatedAt' <> shown.node_data - 'updatedAt');
end
$$;

-- Tally the runs that ended otherwise than by the settlement of the daemon that held them, which counts and logs those itself. Of
-- the failed ones each, for the log; of cancelled ones, which may be many, how many.
create or replace function image_jobs.tally_endings(p_changes image_jobs.run_change[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into image_jobs.tallies (metric, provider, model, result, code, count, run_id, workflow_id, node_id, error)
  select 'runs', split_part(at.processor, ':', 1), substr(at.processor, strpos(at.processor, ':') + 1), c.status,
    e.payload ->> 'code', count(*), e.id, e.subject_id, e.node_id, e.payload ->> 'error'
  from unnest(p_changes) c
  -- One that is older than the migration may have none.
  cross join lateral (select coalesce(c.processor, '') as processor) at
  left join lateral (select c.id, c.subject_id, c.node_id, c.payload where c.status = 'failed') e on true
  where c.status in ('completed', 'failed', 'cancelled') and c.old_status is distinct from c.status
    and (c.old_holder is null or c.claim <> c.old_claim)
  group by 2, 3, c.status, e.id, e.subject_id, e.node_id, e.payload;
end
$$;

-- Project changed runs, in the lock order: calls, nodes, then events. Notifications go out at commit.
create or replace function image_jobs.project_changes(p_changes image_jobs.run_change[])
returns void language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
  set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_cancels boolean;
  v_calls bigint[];
  v_resumes boolean;
  v_failed varchar[];
  v_ended boolean;
  v_lost bigint[];
  v_waking boolean;
  v_nodes varchar[];
  v_nodeless varchar[];
  v_events image_jobs.event[];
begin
  -- Look once for all that is to be done: each statement costs a run that changes alone some 10 µs.
  select
    bool_or(c.old_provider_job_id is not null and c.old_status in ('pending', 'running')
      and (c.claim is distinct from c.old_claim or c.processor is distinct from c.old_processor)),
    array_agg(coalesce(c.old_call, c.old_claim)) filter (where c.claim <> c.old_claim
      and (c.old_holder is not null or c.old_call is not null) and c.call is distinct from coalesce(c.old_call, c.old_claim)),
    bool_or(c.ticket <> c.old_ticket and c.call is not null),
    array_agg(c.id) filter (where c.status = 'failed' and c.old_status <> 'failed'),
    bool_or(c.status in ('completed', 'failed', 'cancelled') and c.old_status is distinct from c.status
      and (c.old_holder is null or c.claim <> c.old_claim)),
    array_agg(c.old_claim) filter (where c.old_holder is not null and c.claim is distinct from c.old_claim),
    bool_or(c.due_at <= v_now and c.holder is null and c.status in ('pending', 'running')
      and (c.claim is distinct from c.old_claim or c.old_holder is null))
  into v_cancels, v_calls, v_resumes, v_failed, v_ended, v_lost, v_waking
  from unnest(p_changes) c;

  -- Cancel the provider job of a run that an outside writer took away from it. Taking over from a silent daemon keeps the job,
  -- and so does a requeue after polling_timeout; a daemon that submits anew knows from the provider that the first job failed.
  -- One that reroutes after polling_timeout does not know that, so the job is cancelled, too.
  if v_cancels then
    perform image_jobs.cancel_provider_job(split_part(c.old_processor, ':', 1), c.old_provider_job_id, c.id, c.old_call)
    from unnest(p_changes) c
    where c.old_provider_job_id is not null and c.old_status in ('pending', 'running')
      and (c.claim is distinct from c.old_claim
          and (c.status = 'cancelled' or c.provider_job_id is distinct from c.old_provider_job_id)
        or c.processor is distinct from c.old_processor and c.payload ->> 'code' = 'polling_timeout');
  end if;
  -- A held or parked run that was taken away lets go of its call, unless it keeps the provider job.
  if v_calls is not null then
    perform image_jobs.lose_calls(v_calls);
  end if;
  -- A requeue that resumes a provider job takes its cost along.
  if v_resumes then
    update image_jobs.calls k set ticket = c.ticket
    from unnest(p_changes) c where c.ticket <> c.old_ticket and k.id = any (array[c.call]);
  end if;
  -- The cost of a run that is given up; where its holder settles it, that is there already.
  if v_failed is not null then
    perform image_jobs.refresh_costs(v_failed);
  end if;

  -- A node of another workflow is never touched, whatever metadata.nodeId says.
  select array_agg(distinct n.id) filter (where n.id is not null), array_agg(c.id) filter (where n.id is null)
  into v_nodes, v_nodeless
  from unnest(p_changes) c
  left join public.workflow_nodes n on n.id = any (array[c.node_id]) and (n.workflow_id = c.subject_id) is true
  where (c.status, c.progress, c.message, c.ticket)
    is distinct from (c.old_status, c.old_progress, c.old_message, c.old_ticket);
  if v_nodes is not null then
    perform image_jobs.project_nodes(v_nodes);
  end if;

  select array_agg(row(null, c.id, e.kind, jsonb_strip_nulls(jsonb_build_object(
    'event', e.event, 'message', e.message, 'progress', c.progress, 'data', e.data)))::image_jobs.event
    order by c.ordinality, e.place)
  into v_events
  from unnest(p_changes) with ordinality as c
  cross join lateral (
    select 1 as place, 'log' as kind, 'created' as event, 'Waiting in line.' as message,
      jsonb_build_object('processor', c.processor, 'dueAt', c.due_at) as data
    where c.old_status is null
    union all
    select 2, 'log', 'requeued', 'In line again.', jsonb_strip_nulls(jsonb_build_object(
      'before', c.old_status, 'attempts', c.old_attempt,
      'payload', case when not image_jobs.has_base64(c.old_payload) then c.old_payload end,
      'providerJobId', case when c.provider_job_id is null then c.old_provider_job_id end))
    where c.old_status is not null and c.ticket is distinct from c.old_ticket
    union all
    select 3, 'error', 'taken_over', case
        when c.status = 'running' then 'The daemon that was checking this run went silent; another goes on.'
        else 'The daemon that was making this image went silent. Whether the provider made and charged it is unknown.' end,
      jsonb_strip_nulls(jsonb_build_object('daemon', c.old_holder, 'processor', c.processor, 'possibleCost', case when c.status <> 'running' then (
        -- None if the image came, for then its cost is known.
        select k.estimate from image_jobs.calls k where k.id = c.old_claim and k.state = 'unknown') end))
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
  ) e;
  if v_events is not null then
    perform image_jobs.write_events(v_events);
  end if;
  if v_nodeless is not null then
    perform image_jobs.broadcast_runs(v_nodeless);
  end if;
  if v_ended then
    perform image_jobs.tally_endings(p_changes);
  end if;

  -- "You no longer hold this": to the holder of a claim that is not the run's any more. At most 8,000 bytes a message.
  for v_first in 1..coalesce(cardinality(v_lost), 0) by 300 loop
    perform pg_notify('image_jobs_drop', array_to_string(v_lost[v_first:v_first + 299], ','));
  end loop;

  -- "Look again": only for what can be claimed now, and only if no daemon that serves its provider syncs by itself anyway.
  if v_waking and exists (
      select from unnest(p_changes) c
      where c.due_at <= v_now and c.holder is null and c.status in ('pending', 'running')
        and (c.claim is distinct from c.old_claim or c.old_holder is null)
        and not exists (
          select from image_jobs.wake w
          where w.provider = coalesce(
              (select p.name from image_jobs.providers p where p.name = split_part(c.processor, ':', 1)), '?')
            and w.awake_until > v_now and w.awake_until < v_now + interval '1 min'))
  then
    perform pg_notify('image_jobs_wake', '');
  end if;
end
$$;

create or replace function image_jobs.runs_inserted()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_slices refcursor;
  v_changes image_jobs.run_change[];
begin
  if not exists (select from new_rows n where n.kind = 'image_gen') then
    return null;
  end if;
  perform image_jobs.is_sound(
    n.id, n.status, n.finished_at, n.claimed_by, n.payload, n.progress, n.webhook, n.ticket, n.queue_state)
  from new_rows n where n.kind = 'image_gen';
  -- Limits lead the lock order. When the rows are there: a repeat of an idempotencyKey has added none, and is not refused.
  if not image_jobs.is_operator() then
    perform image_jobs.check_usage(
      array(select distinct n.created_by from new_rows n where n.kind = 'image_gen' and n.created_by is not null),
      array(select distinct n.subject_id from new_rows n where n.kind = 'image_gen'), 0, 0);
  end if;
  -- One slice at a time: a bulk insert would not fit into memory.
  open v_slices for
    select array_agg(row(n.id, n.subject_id, n.metadata ->> 'nodeId', n.ticket, null, null, n.status, null, n.claim, null,
      n.claimed_by, n.attempt, null, n.max_attempts, n.progress, null, n.message, null, n.preview_url, n.processor, n.due_at,
      n.provider_job_id, null, n.payload, null, null, n.call, null)::image_jobs.run_change order by n.ticket)
    from (select i.*, row_number() over (order by i.ticket) / 1000 as slice from new_rows i where i.kind = 'image_gen') n
    group by n.slice order by n.slice;
  loop
    fetch v_slices into v_changes;
    exit when not found;
    perform image_jobs.project_changes(v_changes);
  end loop;
  close v_slices;
  return null;
end
$$;

create or replace function image_jobs.runs_updated()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_slices refcursor;
  v_changes image_jobs.run_change[];
  v_nestloop text := current_setting('enable_nestloop');
  v_hashjoin text := current_setting('enable_hashjoin');
begin
  perform image_jobs.is_sound(
    n.id, n.status, n.finished_at, n.claimed_by, n.payload, n.progress, n.webhook, n.ticket, n.queue_state)
  from new_rows n where n.kind = 'image_gen';
  perform set_config('enable_nestloop', 'off', true), set_config('enable_hashjoin', 'on', true);
  -- One slice at a time, as above: a requeue of 80,000 runs was one array of 305 MB.
  open v_slices for
    select array_agg(c.change order by c.id)
    from (
      select n.id, row_number() over (order by n.id) / 1000 as slice,
        row(n.id, n.subject_id, n.metadata ->> 'nodeId', n.ticket, o.ticket, o.status, n.status, o.claim, n.claim,
          o.claimed_by, n.claimed_by, n.attempt, o.attempt, n.max_attempts, n.progress, o.progress, n.message, o.message,
          n.preview_url, coalesce(n.routed_to, n.processor), n.due_at, n.provider_job_id, o.provider_job_id, n.payload, o.payload,
          coalesce(o.routed_to, o.processor), n.call, o.call)::image_jobs.run_change as change
      from new_rows n join old_rows o on o.id = n.id
      where n.kind = 'image_gen' and (n.ticket is not null or n.status <> o.status)
        and (n.status, n.claim, n.claimed_by, n.progress, n.message, n.preview_url, n.provider_job_id, n.due_at, n.routed_to,
          n.metadata ->> 'nodeId')
          is distinct from
          (o.status, o.claim, o.claimed_by, o.progress, o.message, o.preview_url, o.provider_job_id, o.due_at, o.routed_to,
          o.metadata ->> 'nodeId')
    ) c
    group by c.slice order by c.slice;
  perform set_config('enable_nestloop', v_nestloop, true), set_config('enable_hashjoin', v_hashjoin, true);
  loop
    fetch v_slices into v_changes;
    exit when not found;
    perform image_jobs.project_changes(v_changes);
  end loop;
  close v_slices;
  return null;
end
$$;

-- Project deleted runs: the holder drops each, and a node that showed it, or its picture, shows the next newest run, or none.
create or replace function image_jobs.runs_deleted()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  if not exists (select from old_rows o where o.kind = 'image_gen') then
    return null;
  end if;
  perform image_jobs.cancel_provider_job(split_part(coalesce(o.routed_to, o.processor), ':', 1), o.provider_job_id, o.id, o.call)
  from old_rows o
  where o.kind = 'image_gen' and o.provider_job_id is not null and o.status in ('pending', 'running');
  perform image_jobs.lose_calls(array(
    select coalesce(o.call, o.claim) from old_rows o where o.kind = 'image_gen' and o.status in ('pending', 'running')));
  perform image_jobs.remove_files(
    array_agg(o.subject_id order by o.id), array_agg(o.id order by o.id), array_agg(o.claimed_by is not null order by o.id))
  from old_rows o where o.kind = 'image_gen';
  for v_run in
    select o.id, o.claim, o.claimed_by, o.ticket, o.subject_id, o.metadata ->> 'nodeId' as node_id
    from old_rows o where o.kind = 'image_gen' order by o.metadata ->> 'nodeId', o.ticket
  loop
    if v_run.claimed_by is not null then
      perform pg_notify('image_jobs_drop', v_run.claim::text);
    end if;
    perform set_config('image_jobs.writer', 'projection', true);
    update public.workflow_nodes n
    set node_data = (n.node_data - image_jobs.owned_keys()) || image_jobs.newest_picture(n.id, n.workflow_id),
      run_ticket = null, pinned_run = null, version = nextval('image_jobs.node_versions'), updated_at = image_jobs.now()
    where n.id = v_run.node_id and (n.workflow_id = v_run.subject_id) is true
      and (n.pinned_run = v_run.id or image_jobs.pictured_run(n.node_data ->> 'imageUrl') = v_run.id
        or n.pinned_run is null and n.run_ticket = v_run.ticket);
    if found then
      perform image_jobs.project_nodes(array[v_run.node_id]::varchar[]);
    end if;
    perform set_config('image_jobs.writer', v_writer, true);
  end loop;
  perform image_jobs.broadcast_deleted_runs((
    select jsonb_agg(jsonb_build_object('id', o.id, 'workflow', o.subject_id, 'node', o.metadata ->> 'nodeId'))
    from old_rows o where o.kind = 'image_gen'));
  return null;
end
$$;

-- Move a run to another node, since an operator has changed metadata.nodeId: the old one shows its newest other run, or none.
create or replace function image_jobs.run_moved()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  perform set_config('image_jobs.writer', 'projection', true);
  update public.workflow_nodes n
  set node_data = (n.node_data - image_jobs.owned_keys()) || image_jobs.newest_picture(n.id, n.workflow_id),
    run_ticket = null, pinned_run = null, version = nextval('image_jobs.node_versions'), updated_at = image_jobs.now()
  where n.id = old.metadata ->> 'nodeId' and (n.workflow_id = old.subject_id) is true
    and (n.pinned_run = old.id or image_jobs.pictured_run(n.node_data ->> 'imageUrl') = old.id
      or n.pinned_run is null and n.run_ticket = old.ticket);
  perform set_config('image_jobs.writer', v_writer, true);
  perform image_jobs.project_nodes(array(
    select n.id from public.workflow_nodes n
    where n.id in (old.metadata ->> 'nodeId', new.metadata ->> 'nodeId') and (n.workflow_id = new.subject_id) is true));
  return null;
end
$$;

-- A daemon's statements leave metadata alone, so this costs them nothing.
create or replace trigger image_jobs_run_moved after update of metadata on public.runs
  for each row when (new.kind = 'image_gen' and old.metadata ->> 'nodeId' is distinct from new.metadata ->> 'nodeId')
  execute function image_jobs.run_moved();

-- Returns true once a run of ours was updated or deleted in this transaction: triggers by the row have noted it. Else a statement
-- is about rows of other kinds, and is not looked at. (Clients, who may insert alone, could undo that note in a `returning`.)
create or replace function image_jobs.touched_runs()
returns boolean language plpgsql stable set search_path = ''
as $$
begin
  return current_setting('image_jobs.touched', true) = 'runs';
end
$$;

create or replace trigger image_jobs_runs_inserted after insert on public.runs
  referencing new table as new_rows for each statement execute function image_jobs.runs_inserted();
create or replace trigger image_jobs_runs_updated after update on public.runs
  referencing old table as old_rows new table as new_rows for each statement when (image_jobs.touched_runs())
  execute function image_jobs.runs_updated();
create or replace trigger image_jobs_runs_deleted after delete on public.runs
  referencing old table as old_rows for each statement when (image_jobs.touched_runs())
  execute function image_jobs.runs_deleted();
