-- Limits of what users may use. Operators are never refused; but what they insert for a user counts as that user's.
--
-- Days and months are those of UTC. Of a period count its calls (their cost; the estimate while that is not known), and runs that
-- wait and have no call of their present ticket that could be charged. Of dollars of all together count calls only: claims ask
-- for those, and inserts would add up what waits of everybody, one at a time. What another member requeues is that member's from
-- then on: else each could spend the budgets of all others.
-- An image counts unless its call was free, or charged without one. Written out at each place: a function that has a search_path
-- is called for every row, which took a budget of 100,000 calls five seconds.

create table if not exists image_jobs.usage_limits (
  id bigint generated always as identity primary key,
  applies_to text not null
    check (applies_to in ('all together', 'each user', 'each anonymous user', 'user', 'workflow')),
  user_id uuid,
  workflow_id uuid,
  max_waiting integer check (max_waiting >= 0),
  images_per_day integer check (images_per_day >= 0),
  usd_per_day numeric,
  usd_per_month numeric,
  -- NaN is greater than any number: such a limit would limit nothing.
  constraint usage_limits_in_usd_are_amounts
    check (usd_per_day >= 0 and usd_per_day < 'infinity' and usd_per_month >= 0 and usd_per_month < 'infinity'),
  constraint usage_limits_name_what_they_apply_to
    check ((user_id is not null) = (applies_to = 'user') and (workflow_id is not null) = (applies_to = 'workflow')),
  constraint usage_limits_one_row_each unique nulls not distinct (applies_to, user_id, workflow_id)
);
comment on table image_jobs.usage_limits is
  'Change by SQL at any time. A null limit: unlimited. A row for one user holds instead of the one for each.';
comment on column image_jobs.usage_limits.max_waiting is 'Runs in status pending; exact.';
comment on column image_jobs.usage_limits.images_per_day is 'Calls that made an image, or may have, and runs in line; exact.';
comment on column image_jobs.usage_limits.usd_per_day is
  'What has no known price counts nothing. Of all together, claims ask too: then runs wait.';
comment on column image_jobs.usage_limits.usd_per_month is 'As usd_per_day.';
insert into image_jobs.usage_limits (applies_to, max_waiting) values ('each user', 500);

-- The use of all calls together, by hours that are over: to add up a month of calls takes too long for each claim. What is
-- final never changes; of the others their present state counts.
create table if not exists image_jobs.used_hours (
  hour timestamptz primary key,
  images bigint not null,
  usd numeric not null,
  unsettled bigint[] not null
);
comment on table image_jobs.used_hours is 'What the calls of an hour have used; unsettled: those that were not final when they were added up.';

-- Returns the beginning of the day or the month (UTC).
create or replace function image_jobs.period_start(p_period text)
returns timestamptz language sql volatile set search_path = ''
as $$
  select date_trunc(p_period, image_jobs.now(), 'UTC')
$$;

-- Returns the end of the day or the month (UTC).
create or replace function image_jobs.period_end(p_period text)
returns timestamptz language sql volatile set search_path = ''
as $$
  select ((image_jobs.period_start(p_period) at time zone 'UTC') + ('1 ' || p_period)::interval) at time zone 'UTC'
$$;

-- Returns the beginning of the first hour that is not over, or has not been for ten minutes: in those before it no transaction
-- began that is not done yet.
create or replace function image_jobs.first_open_hour()
returns timestamptz language sql volatile set search_path = ''
as $$
  select date_trunc('hour', image_jobs.now() - interval '10 minutes', 'UTC')
$$;

-- Add up the hours of this month that are over. One that a clock which was wrong for a while has added up too early is taken back.
create or replace function image_jobs.add_up_hours()
returns void language sql volatile set search_path = ''
as $$
  delete from image_jobs.used_hours d where d.hour >= (select image_jobs.first_open_hour());
  insert into image_jobs.used_hours (hour, images, usd, unsettled)
  select h.hour, count(*) filter (where c.state = 'charged' and c.image),
    coalesce(sum(coalesce(c.cost, c.estimate, 0)) filter (where c.state = 'charged'), 0),
    coalesce(array_agg(c.id) filter (where c.state in ('open', 'unknown')), '{}')
  from generate_series(
    greatest(image_jobs.period_start('month'), (select max(d.hour) + interval '1 hour' from image_jobs.used_hours d)),
    image_jobs.first_open_hour() - interval '1 hour', interval '1 hour') as h (hour)
  left join image_jobs.calls c on c.opened_at >= h.hour and c.opened_at < h.hour + interval '1 hour'
  group by h.hour
  on conflict (hour) do nothing
$$;

-- Returns what all calls since the beginning of a day or month have used.
create or replace function image_jobs.used_together(p_since timestamptz, out images bigint, out usd numeric)
language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
  v_open timestamptz := image_jobs.first_open_hour();
  v_from timestamptz := greatest(p_since, (
    select max(h.hour) + interval '1 hour' from image_jobs.used_hours h where h.hour >= p_since and h.hour < v_open));
begin
  select coalesce(sum(u.images), 0), coalesce(sum(u.usd), 0) into images, usd
  from (
    select h.images, h.usd from image_jobs.used_hours h where h.hour >= p_since and h.hour < v_open
    union all
    select case when c.state <> 'charged' or c.image then 1 else 0 end, coalesce(c.cost, c.estimate, 0)
    from image_jobs.used_hours h
    cross join lateral unnest(h.unsettled) as o (id)
    join image_jobs.calls c on c.id = o.id
    where h.hour >= p_since and h.hour < v_open and c.state <> 'free'
    union all
    select case when c.state <> 'charged' or c.image then 1 else 0 end, coalesce(c.cost, c.estimate, 0)
    from image_jobs.calls c
    where c.opened_at >= v_from and c.state <> 'free'
  ) u;
end
$$;

-- Returns the likely cost in USD of a run that may go to any of these processors: of the dearest. Its first one may be closed, or
-- have no known price, and where it goes from there no limit is asked again.
create or replace function image_jobs.dearest_cost(p_processors varchar[], p_spec jsonb)
returns numeric language plpgsql volatile set search_path = ''
as $$
begin
  return (select max(image_jobs.estimate_cost(p.name, p_spec)) from unnest(p_processors) as p (name));
end
$$;

-- Returns what a user, or a workflow, has used since the beginning of a day or month, with what waits. Equal requests are
-- priced once.
create or replace function image_jobs.used_since(
  p_user uuid, p_workflow uuid, p_since timestamptz, out images bigint, out usd numeric)
language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_custom_plan
as $$
begin
  select coalesce(sum(u.images), 0), coalesce(sum(u.usd), 0) into images, usd
  from (
    select case when c.state <> 'charged' or c.image then 1 else 0 end as images, coalesce(c.cost, c.estimate, 0) as usd
    from image_jobs.calls c
    where c.opened_at >= p_since and c.state <> 'free'
      and (p_user is null or c.user_id = p_user) and (p_workflow is null or c.workflow_id = p_workflow)
    union all
    select w.images, w.images * coalesce(image_jobs.dearest_cost(w.processors, w.spec), 0)
    from (
      select count(*) as images, coalesce(r.routed_to, r.processor) || case when r.metadata ? 'fallback'
          then image_jobs.remaining_fallbacks(r.metadata, r.processor, r.routed_to) else '{}'::varchar[] end as processors,
        jsonb_build_object(
        'quality', r.metadata #> '{promptSpec,quality}', 'size', r.metadata #> '{promptSpec,size}',
        'aspectRatio', r.metadata #> '{promptSpec,aspectRatio}') as spec
      from (
        select r.id, r.ticket, r.routed_to, r.processor, r.metadata from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) is not null
          and (p_user is null or coalesce(r.created_by, r.subject_id) = p_user and r.created_by is not null and r.requeued_by is null)
          and (p_workflow is null or r.subject_id = p_workflow)
        union all
        select r.id, r.ticket, r.routed_to, r.processor, r.metadata from public.runs r
        where p_user is not null and r.requeued_by = p_user and r.kind = 'image_gen' and r.queue_state = 'pending'
      ) r
      where not exists (
          select from image_jobs.calls c where c.run_id = r.id and c.ticket = r.ticket and c.state <> 'free')
      group by 2, 3
    ) w
  ) u;
end
$$;

-- Returns how many images all together have made on a day, with what waits; counted no further than p_limit.
create or replace function image_jobs.images_together(p_since timestamptz, p_limit bigint)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_custom_plan
as $$
declare
  v_made bigint := (select t.images from image_jobs.used_together(p_since) t);
begin
  return v_made + (
    select count(*)
    from (
      select from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) is not null
        and not exists (
          select from image_jobs.calls c where c.run_id = r.id and c.ticket = r.ticket and c.state <> 'free')
      limit greatest(p_limit - v_made, 0)
    ) counted);
end
$$;

-- Returns how many runs of a user, or in a workflow, or (both null) of all together wait; counted no further than p_limit.
create or replace function image_jobs.count_waiting(p_user uuid, p_workflow uuid, p_limit bigint)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_waiting bigint;
begin
  -- Each insert of a user asks this, so its plan is kept: to make one takes twice as long as to count.
  if p_user is not null then
    return (
      select count(*)
      from (
        select from public.runs r
        where r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) = p_user
          and (r.kind = 'image_gen') is true and r.created_by is not null and r.requeued_by is null
        union all
        select from public.runs r
        where r.requeued_by = p_user and r.queue_state = 'pending' and (r.kind = 'image_gen') is true
        limit p_limit
      ) counted);
  end if;
  -- And this is planned for each workflow: how many of its runs have ended decides the index.
  execute 'select count(*) from (
      select from public.runs r
      where r.kind = ''image_gen'' and r.queue_state = ''pending'' and ($1 is null or r.subject_id = $1)
      limit $2
    ) counted' into v_waiting using p_workflow, p_limit;
  return v_waiting;
end
$$;

-- Returns the limits of a user; null: none. Whether a user is anonymous, only their own token says.
create or replace function image_jobs.limits_of_user(p_user uuid)
returns image_jobs.usage_limits language plpgsql volatile set search_path = ''
as $$
begin
  return (
    select l from image_jobs.usage_limits l
    where l.user_id = p_user or l.applies_to = 'each user'
      or l.applies_to = 'each anonymous user' and p_user = image_jobs.current_user_id()
        and nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'is_anonymous' = 'true'
    order by case l.applies_to when 'user' then 1 when 'each anonymous user' then 2 else 3 end limit 1);
end
$$;

-- Refuse more than a limit allows: PT429, which PostgREST returns as 429. The hint says when there is more again.
create or replace function image_jobs.refuse_usage(p_message text, p_hint text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = 'PT429', message = p_message, hint = p_hint;
end
$$;

-- Refuse the caller if a limit of a user, a workflow, or (both null) of all together is passed; p_more runs, which cost p_usd, are
-- about to be added. The caller holds the lock of the limit.
create or replace function image_jobs.check_limit(
  p_limit image_jobs.usage_limits, p_user uuid, p_workflow uuid, p_more integer, p_usd numeric)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_whose text := case when p_user is not null then 'One user' when p_workflow is not null then 'This workflow' else 'All together' end;
  v_together boolean := num_nonnulls(p_user, p_workflow) = 0;
  v_used record;
  v_max numeric;
  v_period text;
  v_since timestamptz;
begin
  if p_limit.max_waiting is not null
    and image_jobs.count_waiting(p_user, p_workflow, p_limit.max_waiting + 1::bigint) + p_more > p_limit.max_waiting
  then
    perform image_jobs.refuse_usage(
      format('At most %s runs%s may wait at a time, and this would make more.', p_limit.max_waiting,
        case when p_user is not null then ' of one user' when p_workflow is not null then ' of this workflow' else '' end),
      -- No time to try again: a limit of 0, or a closed provider, would make it a promise that is not kept.
      'Cancel runs that wait, or wait until some have started.');
  end if;
  foreach v_period in array array['day', 'month'] loop
    v_max := case v_period when 'day' then p_limit.usd_per_day else p_limit.usd_per_month end;
    continue when v_max is null and (v_period = 'month' or p_limit.images_per_day is null);
    v_since := image_jobs.period_start(v_period);
    if v_together then
      select case when v_period = 'day' and p_limit.images_per_day is not null
        then image_jobs.images_together(v_since, p_limit.images_per_day + 1::bigint) end as images,
        case when v_max is not null then (select t.usd from image_jobs.used_together(v_since) t) end as usd into v_used;
    else
      select u.images, u.usd into v_used from image_jobs.used_since(p_user, p_workflow, v_since) u;
    end if;
    if v_period = 'day' and v_used.images + p_more > p_limit.images_per_day then
      perform image_jobs.refuse_usage(
        format('%s may make %s images a day, and this would be more.', v_whose, p_limit.images_per_day),
        image_jobs.opens_again('day', p_limit.images_per_day));
    elsif v_used.usd + coalesce(p_usd, 0) > v_max and not v_together or v_used.usd >= v_max and v_together then
      perform image_jobs.refuse_usage(
        format('%s may spend %s USD a %s, and this would be more.', v_whose, v_max, v_period),
        image_jobs.opens_again(v_period, v_max));
    end if;
  end loop;
end
$$;

-- Returns the hint that says when a limit of a period opens again; one of 0 never does.
create or replace function image_jobs.opens_again(p_period text, p_max numeric)
returns text language sql volatile set search_path = ''
as $$
  select case when p_max > 0
    then to_char(image_jobs.period_end(p_period) at time zone 'UTC', '"It opens again at "YYYY-MM-DD"T"HH24:MI:SS"Z."')
    else 'Ask an operator for a larger limit.' end
$$;

-- Refuse the caller if these users, or these workflows, use more than they may; p_more runs, which cost p_usd, are about to be
-- added. Locks what it counts until the end of the transaction, sorted: two statements never wait for each other's.
create or replace function image_jobs.check_usage(p_users uuid[], p_workflows uuid[], p_more integer, p_usd numeric)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_limits image_jobs.usage_limits[];
  v_limit image_jobs.usage_limits;
  v_users uuid[];
  v_key bigint;
begin
  select array_agg(w.l order by w.who), array_agg(w.who order by w.who) into v_limits, v_users
  from (
    select image_jobs.limits_of_user(u.id) as l, u.id as who from unnest(p_users) as u (id)
    union all
    select w, null from image_jobs.usage_limits w where w.workflow_id = any (p_workflows) or w.applies_to = 'all together'
  ) w
  where num_nonnulls((w.l).max_waiting, (w.l).images_per_day, (w.l).usd_per_day, (w.l).usd_per_month) > 0;
  for v_key in
    select distinct hashtextextended(concat_ws(' ', 'image_jobs usage', case when o.who is null then o.applies_to else 'user' end,
      coalesce(o.who, o.workflow_id)), 0)
    from unnest(v_limits) with ordinality as l
    cross join lateral (select v_users[l.ordinality] as who, l.applies_to, l.workflow_id) o
    -- Of dollars of all together counts nothing that an insert adds.
    where l.applies_to <> 'all together' or num_nonnulls(l.max_waiting, l.images_per_day) > 0
    order by 1
  loop
    perform pg_advisory_xact_lock(v_key);
  end loop;
  for v_place in 1..coalesce(cardinality(v_limits), 0) loop
    v_limit := v_limits[v_place];
    perform image_jobs.check_limit(v_limit, v_users[v_place], v_limit.workflow_id, p_more, p_usd);
  end loop;
end
$$;

-- Returns whether all together have a limit in dollars.
create or replace function image_jobs.has_budget()
returns boolean language plpgsql volatile set search_path = ''
as $$
begin
  return exists (
    select from image_jobs.usage_limits l
    where l.applies_to = 'all together' and num_nonnulls(l.usd_per_day, l.usd_per_month) > 0);
end
$$;

-- Returns how many USD all together may still spend on starts, and if none, when there are more; nulls without such a limit.
-- What waits is not counted: it is what asks.
create or replace function image_jobs.budget_left(out usd numeric, out opens_at timestamptz)
language plpgsql volatile set search_path = ''
as $$
declare
  v_limit image_jobs.usage_limits;
  v_period text;
  v_left numeric;
begin
  select l.* into v_limit from image_jobs.usage_limits l where l.applies_to = 'all together';
  foreach v_period in array array['day', 'month'] loop
    v_left := case v_period when 'day' then v_limit.usd_per_day else v_limit.usd_per_month end;
    continue when v_left is null;
    v_left := v_left - (select u.usd from image_jobs.used_together(image_jobs.period_start(v_period)) u);
    usd := least(usd, v_left);
    opens_at := case when v_left <= 0 then image_jobs.period_end(v_period) else opens_at end;
  end loop;
end
$$;

-- Returns what the caller has used and may use: of the caller, and of each of the caller's workflows that has limits.
create or replace function image_jobs.usage_of_caller()
returns table (
  scope text, period text, workflow_id uuid, used_images bigint, max_images integer, used_usd numeric, max_usd numeric,
  waiting bigint, max_waiting integer, resets_at timestamptz)
language plpgsql volatile security definer set search_path = ''
as $$
#variable_conflict use_column
declare
  v_user uuid := image_jobs.current_user_id();
begin
  if v_user is null then
    return;
  end if;
  return query
  select case when o.workflow_id is null then 'user' else 'workflow' end, p.period, o.workflow_id, u.images,
    case p.period when 'day' then o.images_per_day end, u.usd,
    case p.period when 'day' then o.usd_per_day else o.usd_per_month end,
    image_jobs.count_waiting(case when o.workflow_id is null then v_user end, o.workflow_id, 1000000), o.max_waiting,
    image_jobs.period_end(p.period)
  from (
    select l.max_waiting, l.images_per_day, l.usd_per_day, l.usd_per_month, null::uuid as workflow_id
    from (select) nothing left join image_jobs.limits_of_user(v_user) l on true
    union all
    select w.max_waiting, w.images_per_day, w.usd_per_day, w.usd_per_month, w.workflow_id from image_jobs.usage_limits w
    where w.workflow_id = any (array(select image_jobs.my_workflows()))
  ) o
  cross join lateral (select unnest(case when o.usd_per_month is null then array['day'] else array['day', 'month'] end) as period) p
  cross join lateral image_jobs.used_since(
    case when o.workflow_id is null then v_user end, o.workflow_id, image_jobs.period_start(p.period)) u;
end
$$;

create or replace view public.image_usage with (security_invoker = on) as
select u.scope, u.used_images, u.max_images, u.used_usd, u.max_usd, u.waiting, u.max_waiting, u.resets_at, u.period, u.workflow_id
from image_jobs.usage_of_caller() u;
comment on view public.image_usage is
  'Image Job Orchestrator: what the caller has used and may use, of the day, and of the month where that is limited. Null: unlimited.';
