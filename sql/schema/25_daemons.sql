-- Daemons: one row per process start. Liveness is one row per daemon, not per run.

create table private.daemons (
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
  ended_at timestamptz,
  ended text check (ended in ('stopped', 'taken over')),
  constraint daemons_ended_with_a_reason check ((ended_at is null) = (ended is null))
) with (fillfactor = 50);
comment on table private.daemons is 'Who is alive. One row per process start, never reused.';
comment on column private.daemons.fresh_since is 'Beats have come without a gap since then; only after one lease may it judge others.';
comment on column private.daemons.session_lock is 'Its LISTEN session holds an advisory lock: when that is free, it is gone.';

-- While busy daemons keep this ahead, inserts need no NOTIFY (which takes a global lock until commit).
create table private.wake (
  awake_until timestamptz not null
) with (fillfactor = 50);
comment on table private.wake is 'One row: until when some daemon looks by itself, often.';
create unique index if not exists wake_has_one_row on private.wake ((true));
insert into private.wake (awake_until) values ('-infinity') on conflict do nothing;

-- The models on offer, published by the daemons; the provider code is the one source.
create table private.models (
  provider text not null,
  model text not null,
  sizes text[] not null default '{}',
  ratios text[] not null default '{}',
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
  qualities text[] not null default '{}',
  primary key (provider, model)
);
comment on table private.models is 'What image_models shows.';
comment on column private.models.qualities is 'What promptSpec.quality may be and make a difference; empty: there is one quality.';
