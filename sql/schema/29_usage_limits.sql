-- What users may use. Operators are never refused; but what they insert for a user counts as that user's.

create table if not exists image_jobs.usage_limits (
  id bigint generated always as identity primary key,
  applies_to text not null
    check (applies_to in ('all together', 'each user', 'each anonymous user', 'user', 'workflow')),
  user_id uuid,
  workflow_id uuid,
  max_waiting integer check (max_waiting >= 0),
  constraint usage_limits_name_what_they_apply_to
    check ((user_id is not null) = (applies_to = 'user') and (workflow_id is not null) = (applies_to = 'workflow')),
  constraint usage_limits_one_row_each unique nulls not distinct (applies_to, user_id, workflow_id)
);
comment on table image_jobs.usage_limits is
  'Change by SQL at any time. A null limit: unlimited. A row for one user holds instead of the one for each.';
comment on column image_jobs.usage_limits.max_waiting is 'Runs in status pending; exact.';
insert into image_jobs.usage_limits (applies_to, max_waiting) values ('each user', 500);

-- Returns how many runs of a user may wait; null: without limit. Whether a user is anonymous, only their own token says.
create or replace function image_jobs.max_waiting_of(p_user uuid)
returns integer language sql volatile set search_path = ''
as $$
  select l.max_waiting from image_jobs.usage_limits l
  where l.user_id = p_user or l.applies_to = 'each user'
    or l.applies_to = 'each anonymous user' and p_user = image_jobs.current_user_id()
      and nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'is_anonymous' = 'true'
  order by case l.applies_to when 'user' then 1 when 'each anonymous user' then 2 else 3 end limit 1
$$;

-- Refuse more runs than a limit allows: PT429, which PostgREST returns as 429.
create or replace function image_jobs.refuse_waiting(p_whose text, p_max integer)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = 'PT429',
    message = format('At most %s runs%s may wait at a time, and this would make more.', p_max, p_whose),
    -- No time to try again: a limit of 0, or a closed provider, would make it a promise that is not kept.
    hint = 'Cancel runs that wait, or wait until some have started.';
end
$$;

-- Refuse the caller if more runs of these users, or in these workflows, wait than may; p_more: how many are about to be added.
-- Locks what it counts until the end of the transaction, sorted: two statements never wait for each other's.
create or replace function image_jobs.check_waiting(p_users uuid[], p_workflows uuid[], p_more integer)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_limits jsonb[];
  v_limit jsonb;
  v_key bigint;
  v_count bigint;
begin
  select array_agg(to_jsonb(l)) into v_limits
  from (
    select 'user' as applies_to, u.id, image_jobs.max_waiting_of(u.id) as max_waiting from unnest(p_users) as u (id)
    union
    select w.applies_to, w.workflow_id, w.max_waiting from image_jobs.usage_limits w
    where w.workflow_id = any (p_workflows) or w.applies_to = 'all together'
  ) l
  where l.max_waiting is not null;
  for v_key in
    select distinct hashtextextended(concat_ws(' ', 'image_jobs waiting', l ->> 'applies_to', l ->> 'id'), 0)
    from unnest(v_limits) as l order by 1
  loop
    perform pg_advisory_xact_lock(v_key);
  end loop;
  foreach v_limit in array coalesce(v_limits, '{}') loop
    -- Counted no further than needed, whatever else waits.
    case v_limit ->> 'applies_to'
      when 'user' then
        select count(*) into v_count
        from (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'pending'
            and coalesce(r.created_by, r.subject_id) = (v_limit ->> 'id')::uuid and r.created_by is not null
          limit (v_limit ->> 'max_waiting')::bigint + 1
        ) counted;
      when 'workflow' then
        select count(*) into v_count
        from (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'pending' and r.subject_id = (v_limit ->> 'id')::uuid
          limit (v_limit ->> 'max_waiting')::bigint + 1
        ) counted;
      else
        select count(*) into v_count
        from (
          select from public.runs r where r.kind = 'image_gen' and r.queue_state = 'pending'
          limit (v_limit ->> 'max_waiting')::bigint + 1
        ) counted;
    end case;
    if v_count + p_more > (v_limit ->> 'max_waiting')::bigint then
      perform image_jobs.refuse_waiting(
        case v_limit ->> 'applies_to' when 'user' then ' of one user' when 'workflow' then ' of this workflow' else '' end,
        (v_limit ->> 'max_waiting')::integer);
    end if;
  end loop;
end
$$;
