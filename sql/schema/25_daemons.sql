-- Daemons: one row per process start. Liveness is one row per daemon, not per run.

create table if not exists image_jobs.daemons (
  id uuid primary key,
  name text not null,
  version text not null,
  slots integer not null,
  in_flight integer not null default 0,
  providers text[] not null,
  lease interval not null,
  started_at timestamptz not null,
  seen_at timestamptz not null,
  fresh_since timestamptz not null,
  session_lock boolean not null default false,
  draining boolean not null default false,
  unserved_grace interval not null default interval '2 minutes',
  storage_closed_at timestamptz,
  unreachable text[] not null default '{}',
  ended_at timestamptz,
  ended text check (ended in ('stopped', 'taken over')),
  constraint daemons_ended_with_a_reason check ((ended_at is null) = (ended is null))
) with (fillfactor = 50);
comment on table image_jobs.daemons is 'Liveness of daemons. One row per process start, never reused.';
comment on column image_jobs.daemons.fresh_since is 'Beats have come without a gap since then; only after one lease may it take over from others.';
comment on column image_jobs.daemons.session_lock is 'Its LISTEN session holds an advisory lock: when that is free, it is gone.';
comment on column image_jobs.daemons.unserved_grace is
  'How long after the last daemon that served a provider it fails the runs that wait for that (a deploy).';
comment on column image_jobs.daemons.storage_closed_at is 'Since when storage has taken no uploads of it, so that it claims nothing.';
comment on column image_jobs.daemons.unreachable is 'Providers that it cannot connect to, and claims nothing for.';

-- The part of daemons that claims read. A beat never writes here: a claim would walk past every beat that vacuum cannot remove.
create table if not exists image_jobs.claimants (
  daemon uuid primary key,
  providers text[] not null,
  unserved_grace interval not null
);
comment on table image_jobs.claimants is 'Daemons that may claim: registered, and neither stopped nor taken over. Kept by a trigger of daemons.';

create or replace function image_jobs.keep_claimant()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if tg_op <> 'INSERT' then
    delete from image_jobs.claimants c where c.daemon = old.id;
  end if;
  if tg_op <> 'DELETE' and new.ended_at is null then
    insert into image_jobs.claimants (daemon, providers, unserved_grace) values (new.id, new.providers, new.unserved_grace);
  end if;
  return null;
end
$$;

create or replace trigger keep_claimant after insert or delete or update of id, providers, unserved_grace, ended_at
  on image_jobs.daemons for each row execute function image_jobs.keep_claimant();

-- While busy daemons keep this ahead, inserts need no NOTIFY (which takes a global lock until commit).
-- Never updated, as image_jobs.watermarks is not: of a provider the latest holds, and what is over is looked at by nobody.
create table if not exists image_jobs.wake (
  provider text not null,
  awake_until timestamptz not null,
  primary key (provider, awake_until)
);
comment on table image_jobs.wake is 'Until when some daemon that serves a provider syncs by itself, often; ?: any daemon.';
insert into image_jobs.wake (provider, awake_until)
select p.name, '-infinity'::timestamptz from (select name from image_jobs.providers union all select '?') p
where not exists (select from image_jobs.wake w where w.provider = p.name);

-- The models on offer, published by the daemons; the provider code is the one source.
create table if not exists image_jobs.models (
  provider text not null,
  model text not null,
  sizes text[] not null default '{}',
  ratios text[] not null default '{}',
  qualities text[] not null default '{}',
  seed boolean not null default false,
  negative_prompt boolean not null default false,
  previous_image boolean not null default false,
  previews boolean not null default false,
  price numeric,
  typical_seconds numeric,
  retired date,
  successor text,
  as_of date,
  source text,
  primary key (provider, model)
);
comment on table image_jobs.models is 'What image_models shows.';
comment on column image_jobs.models.qualities is 'What promptSpec.quality may be and make a difference; empty: there is one quality.';

-- Returns the model that draws for a processor: that of its name, or the first successor of a retired one that is not retired.
-- Nothing draws for one without such a successor; then it is the name itself. As daemon/providers/catalogue.py resolves it.
create or replace function image_jobs.drawing_model(p_processor text)
returns text language plpgsql volatile set search_path = ''
as $$
declare
  v_today date := (image_jobs.now() at time zone 'utc')::date;
  v_provider text := split_part(p_processor, ':', 1);
  v_name text := substr(p_processor, strpos(p_processor, ':') + 1);
  v_model record;
  v_seen text[] := '{}';
begin
  -- A dated snapshot is listed under the name without its date.
  select m.model, m.retired, m.successor into v_model from image_jobs.models m
  where m.provider = v_provider and m.model in (
    v_name, case when v_name like '%-____-__-__' then regexp_replace(v_name, '-\d{4}-\d{2}-\d{2}$', '') end)
  order by m.model = v_name desc limit 1;
  if not found or v_model.retired is null or v_model.retired > v_today then
    return v_name;
  end if;
  while found and not v_model.model = any (v_seen) loop
    if v_model.retired is null or v_model.retired > v_today then
      return v_model.model;
    end if;
    v_seen := v_seen || v_model.model;
    select m.model, m.retired, m.successor into v_model from image_jobs.models m
    where m.provider = v_provider and m.model = v_model.successor;
  end loop;
  return v_name;
end
$$;
