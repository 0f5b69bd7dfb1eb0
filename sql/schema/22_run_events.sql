-- run_events: the audit trail of every run, ordered by seq.

create table public.run_events (
  id uuid primary key default gen_random_uuid(),
  run_id varchar references public.runs (id) on delete cascade,
  ts timestamptz default clock_timestamp(),
  kind varchar not null,
  payload jsonb,
  seq bigint,
  run_kind varchar,
  workflow_id uuid
);

alter table public.run_events
  add constraint run_events_kind_is_known
    check (run_kind is distinct from 'image_gen' or kind ~ '^(progress|log|error|webhook)$') not valid,
  add constraint run_events_payload_holds_no_base64
    check (run_kind is distinct from 'image_gen' or not image_jobs.has_base64(payload)) not valid;

comment on table public.run_events is 'The audit trail of runs.';
comment on column public.run_events.seq is 'The order; timestamps may be equal.';
comment on column public.run_events.run_kind is 'image_gen, where the run is: the checks leave events of other kinds alone.';
comment on column public.run_events.workflow_id is 'Of an image run its subject_id: who may see the event.';

create index if not exists run_events_of_a_run on public.run_events (run_id, seq);
create index if not exists run_events_of_a_workflow on public.run_events (workflow_id, seq desc) where workflow_id is not null;
-- Those of which alerts are made; there are few, whatever else happens.
create index if not exists run_events_of_alerts on public.run_events (ts)
  where run_kind = 'image_gen' and kind = 'error' and payload ->> 'event' in ('incident', 'warning');
-- For operators: one event of a run.
create index if not exists run_events_of_uploads on public.run_events (ts)
  where run_kind = 'image_gen' and payload -> 'data' ? 'uploadTries';

-- Number events of image runs and copy the kind and the workflow of those, which decide whether our checks apply and who may see
-- the event, so no writer may choose them: write_events does so itself, and this for every other writer. By the statement, since
-- a row of another kind is only looked at. The workflow of such a row counts nowhere, and is the application's.
create or replace function image_jobs.stamp_events()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_events uuid[];
begin
  -- No join, whose plan would have to be pinned: by settings, which a statement about events of other kinds would pay for.
  select array_agg(n.id) into v_events
  from new_rows n
  where n.run_kind is not null or (select r.kind from public.runs r where r.id = n.run_id and (r.kind = 'image_gen') is true) is not null;
  if v_events is not null then
    perform set_config('image_jobs.writer', 'events', true);
    update public.run_events e
    set run_kind = (select r.kind from public.runs r where r.id = e.run_id and (r.kind = 'image_gen') is true),
      workflow_id = coalesce(
        (select r.subject_id from public.runs r where r.id = e.run_id and (r.kind = 'image_gen') is true), e.workflow_id),
      seq = case when tg_op = 'INSERT' then nextval('image_jobs.event_numbers') else e.seq end
    where e.id = any (v_events);
    perform set_config('image_jobs.writer', v_writer, true);
  end if;
  return null;
end
$$;

-- Returns true while write_events writes. It runs as the schema's owner, who alone may draw a number: a client's own setting of
-- the variable is not enough. A function, since each statement reads the text of a trigger's condition anew; and given the
-- sequence, whose name a writer without rights on the schema may not look up.
create or replace function image_jobs.writes_numbered_events(p_numbers regclass)
returns boolean language plpgsql stable set search_path = ''
as $$
begin
  return coalesce(current_setting('image_jobs.writer', true), '') = 'events'
    and has_sequence_privilege(p_numbers, 'usage');
end
$$;

create or replace trigger image_jobs_events_inserted after insert on public.run_events
  referencing new table as new_rows for each statement
  when (not image_jobs.writes_numbered_events('image_jobs.event_numbers'))
  execute function image_jobs.stamp_events();
create or replace trigger image_jobs_events_updated after update on public.run_events
  referencing new table as new_rows for each statement
  when (not image_jobs.writes_numbered_events('image_jobs.event_numbers'))
  execute function image_jobs.stamp_events();

-- An event to be written. id: null for a new one.
create type image_jobs.event as (
  id uuid,
  run_id varchar,
  kind text,
  payload jsonb
);

-- Write events, in order. One that comes again with its id, since an acknowledgement was lost, is left out. An event that
-- the database refuses (by a trigger or a rule of the application) costs nothing but itself: a warning takes its place, or
-- nothing where that is refused, too.
create or replace function image_jobs.write_events(p_events image_jobs.event[])
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_event image_jobs.event;
begin
  begin
    perform set_config('image_jobs.writer', 'events', true);
    insert into public.run_events (id, run_id, kind, payload, seq, run_kind, workflow_id)
    select coalesce(e.id, gen_random_uuid()), e.run_id, e.kind, e.payload, nextval('image_jobs.event_numbers'), 'image_gen',
      (select r.subject_id from public.runs r where r.id = e.run_id)
    from (select * from unnest(p_events) with ordinality order by ordinality) e
    on conflict (id) do nothing;
    perform set_config('image_jobs.writer', v_writer, true);
    return;
  exception when others or query_canceled or assert_failure then
    null;
  end;
  foreach v_event in array p_events loop
    v_event.id := coalesce(v_event.id, gen_random_uuid());
    begin
      perform set_config('image_jobs.writer', 'events', true);
      insert into public.run_events (id, run_id, kind, payload, seq, run_kind, workflow_id)
      values (v_event.id, v_event.run_id, v_event.kind, v_event.payload, nextval('image_jobs.event_numbers'), 'image_gen',
        (select r.subject_id from public.runs r where r.id = v_event.run_id))
      on conflict (id) do nothing;
    exception when others or query_canceled or assert_failure then
      begin
        perform set_config('image_jobs.writer', 'events', true);
        insert into public.run_events (id, run_id, kind, payload, seq, run_kind, workflow_id)
        values (md5('refused ' || v_event.id)::uuid, v_event.run_id, 'error', jsonb_build_object(
          'event', 'warning', 'message', 'The database refuses an event of this run: ' || left(sqlerrm, 500),
          'data', jsonb_build_object('refused', v_event.payload ->> 'event', 'sqlstate', sqlstate)),
          nextval('image_jobs.event_numbers'), 'image_gen', (select r.subject_id from public.runs r where r.id = v_event.run_id))
        on conflict (id) do nothing;
      exception when others or query_canceled or assert_failure then
        raise log 'An event of run % is refused (%): %', v_event.run_id, sqlstate, sqlerrm;
      end;
    end;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

-- Delete the events of a deleted run. A table that was there before may refuse to delete a run that has events; ours all have.
create or replace function image_jobs.delete_events()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  perform set_config('image_jobs.touched', 'runs', true);
  delete from public.run_events e where e.run_id = old.id;
  return old;
end
$$;

create or replace trigger image_jobs_delete_events before delete on public.runs
  for each row when (old.kind = 'image_gen') execute function image_jobs.delete_events();
