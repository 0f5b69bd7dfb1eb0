-- Updates from outside: a plain UPDATE by an operator is checked and completed here.
--
-- The daemon's functions say so while they write (image_jobs.writer = 'daemon', for the length of the function only).
-- Every other writer is outside: columns that are ours stay as they are, and a status is a request:
-- 'pending' means "again, now", 'cancelled' means "stop". Both draw a new claim, so the daemon that held the run has lost it.

-- Guard every column but the status. Daemons' writes meet the deliveries of their provider jobs here: one trigger for all three,
-- since each that stands on the table costs a statement about rows of other kinds.
create or replace function image_jobs.guard_run()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if current_setting('image_jobs.touched', true) is distinct from 'runs' then
    perform set_config('image_jobs.touched', 'runs', true);
  end if;
  if old.claimed_by is not null and old.ticket = new.ticket and new.claimed_by is null and new.provider_job_id is null
    and (new.status = 'pending'
      or new.status = 'failed' and new.payload ->> 'code' in ('outcome_unknown', 'timeout', 'storage_disk'))
  then
    new := image_jobs.resume_provider_job(old, new);
  end if;
  new.updated_at := image_jobs.now();
  -- Of one that is older than the migration nothing is in line until a requeue draws its ticket: see guard_status.
  new.queue_state := case when old.ticket is not null and new.status in ('pending', 'running') then new.status end;
  if current_setting('image_jobs.writer', true) = 'daemon' then
    if old.claimed_by is not null and new.status = 'running' and new.claimed_by is null and new.provider_job_id is not null then
      new := image_jobs.consume_deliveries(new);
    end if;
    return new;
  end if;
  if new.kind is distinct from old.kind then
    perform image_jobs.refuse('The kind of an image run never changes.', 'Insert a new run.');
  end if;
  if new.id <> old.id or new.processor is distinct from old.processor or new.subject_id is distinct from old.subject_id then
    perform image_jobs.refuse('id, processor and subject_id of a run never change.', 'Cancel this run and insert a new one.');
  end if;
  new.claim := old.claim;
  new.ticket := old.ticket;
  new.claimed_by := old.claimed_by;
  new.attempt := old.attempt;
  new.created_at := old.created_at;
  new.created_by := old.created_by;
  -- Forgotten while the provider has it, a job would be made and paid a second time. A requeue is what asks for another.
  if old.status = 'running' and old.provider_job_id is not null then
    new.provider_job_id := old.provider_job_id;
  end if;
  -- A provider job that an operator names is timed from now on: without that it would never time out.
  new.submitted_at := case
    when new.provider_job_id is distinct from old.provider_job_id and new.provider_job_id is not null then image_jobs.now()
    else old.submitted_at end;
  new.refused_since := old.refused_since;
  -- A new due_at or status ends the wait for a webhook.
  new.webhook := case when (new.status, new.due_at) is not distinct from (old.status, old.due_at) then old.webhook end;
  new.routed_to := old.routed_to;
  new.call := old.call;
  new.unheld := old.unheld;
  new.queued_at := old.queued_at;
  new.requeued_by := old.requeued_by;
  -- The source that the prompt names by now was not checked: a user's run reads the one that was.
  new.source_workflow := old.source_workflow;
  new.lane := old.lane;
  new.rank := old.rank;
  new.workflow_rank := old.workflow_rank;
  new.priority := coalesce(new.priority, old.priority, 0);
  new.max_attempts := greatest(coalesce(new.max_attempts, old.max_attempts, 3), 1);
  -- Without a time it would never be claimed again.
  if new.due_at is null and old.due_at is not null and old.status in ('pending', 'running') then
    new.due_at := image_jobs.now();
  elsif new.due_at = 'infinity' and old.due_at is distinct from new.due_at then
    perform image_jobs.refuse('due_at must be a point in time.', 'Set it to now() to start at once, or set status to cancelled.');
  end if;
  if old.status = 'pending' and old.ticket is not null then
    new.lane := image_jobs.lane_of(coalesce(new.routed_to, new.processor));
    if (new.due_at, new.priority, new.lane) is distinct from (old.due_at, old.priority, old.lane) then
      new.rank := null;
      new.workflow_rank := null;
      if new.due_at <= image_jobs.now() then
        new.rank := image_jobs.next_rank(coalesce(new.created_by, new.subject_id), new.lane, new.priority);
        new.workflow_rank := image_jobs.next_workflow_rank(
          coalesce(new.created_by, new.subject_id), new.subject_id, new.lane, new.priority);
      end if;
    end if;
  end if;
  return new;
end
$$;

-- Guard a status that is set, even to the value it has: pending → pending means "run it now".
create or replace function image_jobs.guard_status()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  if current_setting('image_jobs.writer', true) = 'daemon' then
    return new;
  end if;

  if new.status = 'pending' then
    new.claim := nextval('image_jobs.claims');
    new.ticket := nextval('image_jobs.tickets');
    new.queue_state := 'pending';
    new.claimed_by := null;
    new.attempt := 0;
    new.progress := 0;
    new.payload := null;
    new.message := null;
    new.preview_url := null;
    new.finished_at := null;
    new.refused_since := null;
    new.unheld := null;
    new.queued_at := v_now;
    new.requeued_by := nullif(image_jobs.current_user_id(), new.created_by);
    new.created_at := coalesce(old.created_at, old.started_at, v_now);
    if new.due_at is null or new.due_at is not distinct from old.due_at then
      new.due_at := v_now;
    end if;
    -- A provider job that timed out, or whose picture could not be fetched or stored, is polled again, not paid for again.
    if old.status = 'failed' and old.payload ->> 'code' ~ '^(polling_timeout$|download|storage)' then
      new.submitted_at := case when old.provider_job_id is null then null else v_now end;
      new.provider_job_id := old.provider_job_id;
    else
      new.submitted_at := null;
      new.provider_job_id := null;
      new.call := null;
    end if;
    -- Back to the first provider, unless a job at another is resumed.
    if new.provider_job_id is null then
      new.routed_to := null;
    end if;
    new.lane := image_jobs.lane_of(coalesce(new.routed_to, new.processor));
    new.rank := null;
    new.workflow_rank := null;
    if new.due_at <= v_now then
      new.rank := image_jobs.next_rank(coalesce(new.created_by, new.subject_id), new.lane, new.priority);
      new.workflow_rank := image_jobs.next_workflow_rank(
        coalesce(new.created_by, new.subject_id), new.subject_id, new.lane, new.priority);
    end if;
    return new;
  end if;

  if new.status = 'cancelled' and old.status in ('pending', 'running') then
    new.claim := nextval('image_jobs.claims');
    new.claimed_by := null;
    new.call := null;
    new.due_at := null;
    new.rank := null;
    new.workflow_rank := null;
    new.finished_at := v_now;
    new.message := null;
    return new;
  end if;

  if new.status = old.status and new.status <> 'cancelled' then
    return new;
  end if;
  perform image_jobs.refuse(
    format('A run that is %s cannot be set to %s by hand.', old.status, new.status),
    'Set status to pending to run it again, or use cancel_run, which leaves a finished run as it is.');
end
$$;

-- Triggers fire in the order of their names: 2 undoes what an outside writer did to our columns, before 3 reads the status.
-- They stand on a table that others may share, so each has a name of ours: `create or replace` must not replace one of theirs.
create or replace trigger image_jobs_2_guard_columns before update on public.runs
  for each row when (old.kind = 'image_gen' or new.kind = 'image_gen') execute function image_jobs.guard_run();
create or replace trigger image_jobs_3_guard_status before update of status on public.runs
  for each row when (old.kind = 'image_gen') execute function image_jobs.guard_status();
