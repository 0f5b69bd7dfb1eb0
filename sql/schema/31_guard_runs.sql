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

-- Triggers fire in the order of their names: the columns first, then the status.
create or replace trigger guard_1_columns before update on public.runs
  for each row when (old.kind = 'image_gen' or new.kind = 'image_gen') execute function private.guard_run();
create or replace trigger guard_2_status before update of status on public.runs
  for each row when (old.kind = 'image_gen' and new.kind = 'image_gen') execute function private.guard_status();
