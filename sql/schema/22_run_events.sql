-- run_events: the audit trail of every run, ordered by seq.

create table public.run_events (
  id uuid primary key default gen_random_uuid(),
  run_id varchar references public.runs (id) on delete cascade,
  ts timestamptz default clock_timestamp(),
  kind varchar not null,
  payload jsonb,
  seq bigint,
  run_kind varchar
);

alter table public.run_events
  add constraint run_events_kind_is_known
    check (run_kind is distinct from 'image_gen' or kind in ('progress', 'log', 'error', 'webhook')) not valid,
  add constraint run_events_payload_holds_no_base64
    check (run_kind is distinct from 'image_gen' or not private.has_base64(payload)) not valid;

comment on table public.run_events is 'The audit trail of runs.';
comment on column public.run_events.seq is 'The order; timestamps may be equal.';
comment on column public.run_events.run_kind is 'The kind of the run, copied so that the checks leave other kinds alone.';

create index if not exists run_events_of_a_run on public.run_events (run_id, seq);

-- Numbers the event and copies the run's kind, whoever writes: the kind decides whether our checks apply, so nobody may
-- choose it. No default, which would ask every writer of other kinds for rights on the sequence.
create or replace function private.stamp_event()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if tg_op = 'INSERT' then
    new.seq := nextval('private.event_order');
  end if;
  select r.kind into new.run_kind from public.runs r where r.id = new.run_id;
  return new;
end
$$;

create or replace trigger stamp_event before insert or update on public.run_events
  for each row execute function private.stamp_event();

-- A table that was there before may refuse to delete a run that has events; ours all have.
create or replace function private.delete_events()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  delete from public.run_events e where e.run_id = old.id;
  return old;
end
$$;

create or replace trigger delete_events before delete on public.runs
  for each row when (old.kind = 'image_gen') execute function private.delete_events();
