-- Why runs wait: the state of each provider, and of each model that has one of its own.
--
-- It belongs to the lane and never to its runs: a pause of 100,000 runs writes no row of theirs. It follows from what is there
-- at the moment, so it is never late; `provider_states` only remembers since when, and what was told.

-- No row: open.
create table if not exists image_jobs.provider_states (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  state text not null,
  since timestamptz not null,
  until timestamptz,
  sentence text,
  constraint provider_states_one_row_each unique nulls not distinct (provider, model)
);
comment on table image_jobs.provider_states is 'Providers, and models, that are not open: since when, and what was broadcast of them.';

-- Returns the name of a provider for the person at the canvas.
create or replace function image_jobs.provider_name(p_provider text)
returns text language sql immutable set search_path = ''
as $$
  select case p_provider when 'openai' then 'OpenAI' else initcap(p_provider) end
$$;

-- Returns whether runs wait in a lane that could start but for its limits. From its watermark, which is a hint: a walk over dead
-- index entries would cost too much.
create or replace function image_jobs.has_waiting(p_lane text)
returns boolean language plpgsql volatile set search_path = ''
as $$
begin
  return exists (
    select from image_jobs.lanes l
    where l.lane = p_lane and exists (
      select from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = l.lane and r.priority = l.priority and r.rank >= least(l.watermark, l.passed_over)));
end
$$;

-- Returns how a limit is used up: until when, as far as that is known, and a sentence; no row where it leaves room.
create or replace function image_jobs.limit_reached(p_limit image_jobs.provider_limits)
returns table (until timestamptz, sentence text) language plpgsql volatile set search_path = ''
as $$
#variable_conflict use_column
declare
  v_second bigint := floor(extract(epoch from image_jobs.now()));
  v_what text := concat_ws(' ', image_jobs.provider_name(p_limit.provider), p_limit.model);
  v_starts bigint;
  v_first bigint;
begin
  if p_limit.per_minute is not null then
    select sum(s.starts), min(s.at) into v_starts, v_first
    from image_jobs.starts_of(p_limit.id) last
    cross join lateral unnest(last.at, last.starts) as s (at, starts) where s.at between v_second - 60 and v_second + 60;
    if v_starts >= p_limit.per_minute then
      return query select to_timestamp(v_first + 61), format(
        '%s may start %s image%s a minute here, and this minute''s are used up. What waits starts by itself.',
        v_what, p_limit.per_minute, case when p_limit.per_minute <> 1 then 's' else '' end);
      return;
    end if;
  end if;
  if p_limit.max_running is not null
    and image_jobs.count_running(p_limit.provider, p_limit.model, p_limit.max_running) >= p_limit.max_running
  then
    return query select null::timestamptz, format(
      '%s makes %s image%s at a time here. What waits starts by itself when one is ready.',
      v_what, p_limit.max_running, case when p_limit.max_running <> 1 then 's' else '' end);
  end if;
end
$$;

-- Returns the state of each provider (model null), and of each model that has a limit or a block of its own, also of retired ones
-- that draw with a blocked one: of several things in the way the one that is told.
--
-- check_in: seconds after which nobody may be there any more to tell that it has changed, as the last daemon's lease has ended by
-- then. Null: no daemon lives, and the first one tells.
create or replace function image_jobs.provider_status()
returns table (
  provider text, model text, state text, since timestamptz, until timestamptz, sentence text, check_in double precision)
language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
  v_now timestamptz := image_jobs.now();
  v_budget record;
begin
  select b.usd, b.opens_at into v_budget from image_jobs.budget_left() b;
  return query
  with living as materialized (
    select d.providers, d.seen_at + d.lease as until, d.storage_closed_at, d.unreachable
    from image_jobs.daemons d
    where d.ended_at is null and not d.draining and d.seen_at + d.lease > v_now
  ),
  last as materialized (select max(v.until) as until from living v),
  subjects as materialized (
    select p.name as provider, null::text as model, p.name as lane from image_jobs.providers p
    union
    select l.provider, l.model, l.provider || ':' || l.model from image_jobs.provider_limits l
    where l.model is not null and l.provider in (select p.name from image_jobs.providers p)
    union
    select b.provider, m.name, image_jobs.lane_of(b.provider || ':' || m.name)
    from image_jobs.provider_blocks b
    cross join lateral (
      select b.model as name
      union
      select o.model from image_jobs.models o
      where o.provider = b.provider and o.retired is not null
        and image_jobs.drawing_model(o.provider || ':' || o.model) = b.model
    ) m
    where b.model is not null and b.until > v_now and b.provider in (select p.name from image_jobs.providers p)
  )
  select s.provider, s.model, told.state,
    case when told.state <> 'open' then least(coalesce(told.since, noted.since, v_now), v_now) end,
    told.until, told.sentence,
    extract(epoch from last.until - v_now)::double precision
  from subjects s
  cross join last
  cross join lateral (select image_jobs.provider_name(s.provider) as name) named
  cross join lateral (
    select 1 as place, 'paused' as state, null::timestamptz as since, null::timestamptz as until,
      format('%s is paused. Images wait, and start by themselves when it goes on.', concat_ws(' ', named.name, l.model)) as sentence
    from image_jobs.provider_limits l
    where l.provider = s.provider and (l.model is null or l.model = s.model)
      and (l.paused or l.per_minute = 0 or l.max_running = 0)
    union all
    select 2, 'unserved', (
        select max(least(d.ended_at, d.seen_at + d.lease)) from image_jobs.daemons d where s.provider = any (d.providers)), null,
      case when last.until is null
        then 'No images are made at the moment. They wait, and start by themselves when it goes on.'
        else format('%s is not served here at the moment. Images wait a little, and start by themselves if that changes.', named.name) end
    where not exists (select from living v where s.provider = any (v.providers))
    union all
    select 3, 'budget', null, v_budget.opens_at,
      'The budget of all together is used up. Images wait, and start by themselves when there is one again.'
    where v_budget.usd <= 0
    union all
    select 4, 'storage', min(v.storage_closed_at), null,
      'Storage takes no images at the moment. New ones wait, and start by themselves when it does.'
    from living v where s.provider = any (v.providers)
    having bool_and(v.storage_closed_at is not null)
    union all
    -- An end that is none, or in a year of five digits, which JavaScript and Python cannot read: until it is opened.
    (select 5, 'blocked', null, case when b.until < '10000-01-01Z' then b.until end,
      coalesce(b.reason, format('%s is closed for a while. Images wait, and start by themselves.', concat_ws(' ', named.name, b.model)))
    from image_jobs.provider_blocks b
    where b.provider = s.provider and b.until > v_now
      and (b.model is null or b.model = image_jobs.drawing_model(s.provider || ':' || s.model))
    order by b.until desc limit 1)
    union all
    select 6, 'blocked', null, null,
      format('%s cannot be reached at the moment. Images wait, and start by themselves when it can.', named.name)
    from living v where s.provider = any (v.providers)
    having bool_and(s.provider = any (v.unreachable))
    union all
    (select 7, 'limited', null, reached.until, reached.sentence
    from image_jobs.provider_limits l
    cross join lateral image_jobs.limit_reached(l) reached
    where l.provider = s.provider and (l.model is null or l.model = s.model) and image_jobs.has_waiting(s.lane)
    order by reached.until nulls first limit 1)
    union all
    select 8, 'open', null, null, null
    order by 1 limit 1
  ) told
  left join image_jobs.provider_states noted
    on noted.provider = s.provider and noted.model is not distinct from s.model and noted.state = told.state;
end
$$;

create or replace view public.image_provider_status with (security_invoker = on) as
select s.provider, s.model, s.state, s.since, s.until, s.sentence, s.check_in from image_jobs.provider_status() s;
comment on view public.image_provider_status is
  'Image Job Orchestrator: why runs wait. A row for each provider (model null), and for each model that differs.';

-- Note what has changed, and broadcast it: one message for all. Whoever finds another at it leaves it to him, as he may wait for
-- nobody; the daemons come every second.
create or replace function image_jobs.note_provider_states()
returns void language plpgsql volatile security definer set search_path = '' set lock_timeout = '100ms'
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_changed jsonb;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('image_jobs provider states', 0)) then
    return;
  end if;
  if image_jobs.has_budget() then
    perform image_jobs.add_up_hours();
  end if;
  with status as materialized (
    select s.* from image_jobs.provider_status() s
  ),
  changed as materialized (
    select s.provider, s.model, s.state, s.since, s.until, s.sentence, s.check_in
    from status s
    left join image_jobs.provider_states n on n.provider = s.provider and n.model is not distinct from s.model
    where (s.state, s.sentence) is distinct from (coalesce(n.state, 'open'), n.sentence)
      -- That of a limit moves with every start.
      or s.state <> 'limited' and s.until is distinct from n.until
    union all
    select n.provider, n.model, 'open', null, null, null, null from image_jobs.provider_states n
    where not exists (select from status s where s.provider = n.provider and s.model is not distinct from n.model)
  ),
  opened as (
    delete from image_jobs.provider_states n using changed c
    where n.provider = c.provider and n.model is not distinct from c.model and c.state = 'open'
  ),
  closed as (
    insert into image_jobs.provider_states as n (provider, model, state, since, until, sentence)
    select c.provider, c.model, c.state, coalesce(c.since, v_now), c.until, c.sentence from changed c where c.state <> 'open'
    on conflict (provider, model) do update
      set state = excluded.state, since = excluded.since, until = excluded.until, sentence = excluded.sentence
  )
  select jsonb_agg(to_jsonb(c) order by c.provider, c.model) into v_changed from changed c;
  if v_changed is null or to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null then
    return;
  end if;
  begin
    execute 'select realtime.send($1, $2, $3, true)'
    using jsonb_build_object('providers', v_changed), 'providers_changed', 'image_providers';
  exception when others then
    raise warning 'providers_changed was not broadcast: %', sqlerrm;
  end;
end
$$;

-- Note what an operator, or a 429, has changed, with the statement that does it.
create or replace function image_jobs.limits_changed()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  perform image_jobs.note_provider_states();
  return null;
end
$$;

create or replace trigger limits_changed
  after insert or delete or update of provider, model, per_minute, max_running, paused on image_jobs.provider_limits
  for each statement execute function image_jobs.limits_changed();
create or replace trigger usage_limits_changed after insert or update or delete on image_jobs.usage_limits
  for each statement execute function image_jobs.limits_changed();
create or replace trigger blocks_changed after insert or update or delete on image_jobs.provider_blocks
  for each statement execute function image_jobs.limits_changed();

-- Say what keeps a daemon from claiming, and note what has changed by that, by time, or by a daemon that went silent. Every daemon
-- does so every second.
create or replace function image_jobs.report_daemon(p_daemon uuid, p_storage_closed boolean, p_unreachable text[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update image_jobs.daemons d
  set storage_closed_at = case when p_storage_closed then coalesce(d.storage_closed_at, image_jobs.now()) end,
    unreachable = p_unreachable
  where d.id = p_daemon and d.ended_at is null
    and ((d.storage_closed_at is not null) <> p_storage_closed or d.unreachable <> p_unreachable);
  perform image_jobs.note_provider_states();
end
$$;
