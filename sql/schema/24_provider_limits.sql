-- Limits of providers and models, global over all daemons, and the lines in which runs wait for them.

create table public.provider_limits (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  per_minute integer check (per_minute >= 0),
  max_running integer check (max_running >= 0),
  paused boolean not null default false,
  blocked_until timestamptz,
  blocked_reason text,
  recent_at bigint[] not null default '{}',
  recent_starts integer[] not null default '{}',
  constraint provider_limits_one_row_each unique nulls not distinct (provider, model)
);
comment on table public.provider_limits is 'Change by SQL at any time. model null: all models. A null limit: unlimited.';
comment on column public.provider_limits.per_minute is 'Starts in any 60 seconds, over all daemons; exact.';
comment on column public.provider_limits.max_running is 'Runs in status running, parked ones included; exact.';
comment on column public.provider_limits.paused is 'Nothing new is started. What runs goes on.';
comment on column public.provider_limits.blocked_until is 'Set by the daemons when the provider says 429 or is out of credit.';
comment on column public.provider_limits.recent_at is 'The seconds (epoch) of the last minute in which runs started …';
comment on column public.provider_limits.recent_starts is '… and how many started in each.';

insert into public.provider_limits (provider, per_minute) values ('openai', 50), ('google', 60)
on conflict (provider, model) do nothing;

-- Names that may head a lane. Everything else waits in the lane '?', so that invented names cannot make lanes.
create table private.providers (
  name text primary key
);
comment on table private.providers is 'Providers that the daemons know.';
insert into private.providers (name) values ('openai'), ('google'), ('stability'), ('midjourney'), ('demo')
on conflict (name) do nothing;

-- One line per provider (or model with a limit of its own) and priority.
create table private.lanes (
  lane text not null,
  priority integer not null,
  floor bigint not null default 0,
  primary key (lane, priority)
);
comment on table private.lanes is 'The lines in which pending runs stand.';
-- There from the start: whoever opens a lane makes others who insert into it wait for his commit.
insert into private.lanes (lane, priority) select p.name, 0 from private.providers p union all select '?', 0
on conflict (lane, priority) do nothing;
comment on column private.lanes.floor is
  'Rank of the last run that was claimed. New runs rank from here; claims look from here, past dead index entries.';

-- The lane of a processor.
create or replace function private.lane_of(p_processor text)
returns text language sql stable set search_path = ''
as $$
  select case
    when exists (
      select from public.provider_limits l
      where l.provider = split_part(p_processor, ':', 1)
        and l.model = substr(p_processor, strpos(p_processor, ':') + 1)
    ) then p_processor
    else coalesce((select p.name from private.providers p where p.name = split_part(p_processor, ':', 1)), '?')
  end
$$;

-- The place of a new run: behind the last of its workflow, but never behind others who have fewer waiting.
-- (Start-time fair queueing with the lane's floor as virtual time.) A guess under concurrency, and good enough.
create or replace function private.place_in_line(p_workflow uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
as $$
declare
  v_floor bigint;
  v_last bigint;
begin
  select l.floor into v_floor from private.lanes l where l.lane = p_lane and l.priority = p_priority;
  if not found then
    insert into private.lanes (lane, priority) values (p_lane, p_priority) on conflict do nothing;
  end if;
  select r.rank into v_last
  from public.runs r
  where r.kind = 'image_gen' and r.subject_id = p_workflow and r.lane = p_lane and r.rank is not null
  order by r.rank desc limit 1;
  return greatest(coalesce(v_floor, 0), coalesce(v_last, -1) + 1);
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

create or replace trigger change_lanes after insert or delete or update of provider, model on public.provider_limits
  for each row execute function private.change_lanes();
