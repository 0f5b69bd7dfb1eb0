-- Retention: terminal runs that are old enough, and the files of runs that are gone, whoever deleted them.

-- Files of runs that are gone. A row stays until a daemon has removed them.
create table if not exists image_jobs.file_removals (
  workflow_id uuid not null,
  run_id varchar not null,
  due_at timestamptz not null,
  tries integer not null default 0,
  primary key (workflow_id, run_id)
);
comment on table image_jobs.file_removals is 'Runs that are gone, and whose files in storage are to be removed. A row goes when that is done.';
comment on column image_jobs.file_removals.due_at is 'Not before then; while a daemon is at it, the end of its lease.';
create index if not exists file_removals_due on image_jobs.file_removals (due_at);

-- Uploads of forgotten users, and those in workflows that went with them. A row stays until none of it is left.
create table if not exists image_jobs.source_removals (
  belongs_to text not null check (belongs_to in ('user', 'workflow')),
  id uuid not null,
  due_at timestamptz not null,
  tries integer not null default 0,
  primary key (belongs_to, id)
);
comment on table image_jobs.source_removals is 'Users and workflows whose uploads in the bucket image-sources are to be removed.';

-- How far a walk has come: through runs, for retention; through a bucket, for files whose run is gone. A bucket stays here
-- when another one is used: files in it go with their runs, too.
create table if not exists image_jobs.walks (
  name text primary key,
  holds text not null check (holds in ('runs', 'images', 'conversations', 'kept')),
  position text not null default '',
  due_at timestamptz not null
);
comment on table image_jobs.walks is 'How far a walk through runs or a bucket has come; at its end it rests until due_at.';

-- Have the files of deleted runs removed. A daemon that held one may be storing: then they are looked for once it has stopped.
create or replace function image_jobs.remove_files(p_workflows uuid[], p_runs varchar[], p_held boolean[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into image_jobs.file_removals (workflow_id, run_id, due_at)
  select gone.workflow_id, gone.run_id, image_jobs.now() + case when gone.held then interval '5 min' else interval '0' end
  from unnest(p_workflows, p_runs, p_held) gone (workflow_id, run_id, held)
  where gone.workflow_id is not null
  on conflict do nothing;
  perform pg_notify('image_jobs_drop', '');
end
$$;

-- Keep the files of a run whose id is used again. Refused while a daemon removes them: it would remove the new run's.
create or replace function image_jobs.keep_files_of(p_workflow_id uuid, p_run_id varchar)
returns void language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_tries integer;
begin
  select f.tries into v_tries from image_jobs.file_removals f
  where f.workflow_id = p_workflow_id and f.run_id = p_run_id for update;
  if v_tries > 0 then
    perform image_jobs.refuse('The files of an earlier run with this id are still being removed.',
      'Leave id out to get a new one, or use this one once they are gone.');
  elsif v_tries = 0 then
    delete from image_jobs.file_removals f where f.workflow_id = p_workflow_id and f.run_id = p_run_id;
  end if;
end
$$;

-- Whether an object's name is a run's, as the daemon names them: its images, thumbnail and preview in the bucket, its
-- conversation beside it, and what is kept of it. Never by a prefix alone: run `a` has no part in `ab.png` or `a-1.png`.
create or replace function image_jobs.is_file_of(p_name text, p_workflow_id uuid, p_run_id varchar, p_kept boolean)
returns boolean language sql immutable set search_path = ''
as $$
  select starts_with(p_name, p_workflow_id || '/' || p_run_id)
    and substr(p_name, 38 + length(p_run_id)) ~ case when p_kept then '^-([0-9]+\.bin|copy\.[0-9a-z.]+)$' else '^\.[0-9a-z.]+$' end
$$;

-- Lease up to p_limit removals to the caller, for a minute: {workflow_id, run_id, files: {bucket: [name]}}. A run of that id
-- that is there again keeps what is there. In a bucket of images only what carries a daemon's metadata is a run's.
create or replace function image_jobs.take_file_removals(p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_sees_files constant boolean := image_jobs.sees_files();
  v_removal record;
  v_files jsonb;
begin
  for v_removal in
    update image_jobs.file_removals f set tries = f.tries + 1, due_at = v_now + interval '1 min'
    from (
      select d.workflow_id, d.run_id from image_jobs.file_removals d
      where d.due_at <= v_now order by d.due_at limit p_limit for update skip locked
    ) due
    where f.workflow_id = due.workflow_id and f.run_id = due.run_id
    returning f.workflow_id, f.run_id
  loop
    if exists (select from public.runs r where r.id = v_removal.run_id and (r.subject_id = v_removal.workflow_id and r.kind = 'image_gen') is true) then
      delete from image_jobs.file_removals f where f.workflow_id = v_removal.workflow_id and f.run_id = v_removal.run_id;
      continue;
    end if;
    v_files := '{}';
    if v_sees_files then
      -- The range serves Storage's index (bucket_id, name collate "C"): all names with the prefix, as ids hold no `~`.
      select coalesce(jsonb_object_agg(found.bucket_id, found.names), '{}') into v_files
      from (
        select o.bucket_id, jsonb_agg(o.name order by o.name) as names
        from image_jobs.walks w
        join storage.objects o on o.bucket_id = w.name
        where o.name collate "C" >= v_removal.workflow_id || '/' || v_removal.run_id
          and o.name collate "C" < v_removal.workflow_id || '/' || v_removal.run_id || '~'
          and image_jobs.is_file_of(o.name, v_removal.workflow_id, v_removal.run_id, w.holds = 'kept')
          and (w.holds <> 'images' or to_jsonb(o) #>> '{user_metadata,image_jobs}' = v_removal.run_id)
        group by o.bucket_id) found;
    end if;
    return next jsonb_build_object('workflow_id', v_removal.workflow_id, 'run_id', v_removal.run_id, 'files', v_files);
  end loop;
end
$$;

-- Returns whether there are files that can be looked for: none without Storage. Refuses a role from which they are hidden:
-- to it everything would look removed.
create or replace function image_jobs.sees_files()
returns boolean language plpgsql stable set search_path = ''
as $$
begin
  if to_regclass('storage.objects') is null then
    return false;
  end if;
  if pg_catalog.row_security_active('storage.objects') then
    raise exception using errcode = 'insufficient_privilege',
      message = format('The role %s cannot see what is stored, so the files of deleted runs stay.', current_user),
      hint = 'Let the daemon connect as postgres, or grant its role bypassrls.';
  end if;
  return true;
end
$$;

-- End a removal, or put it off: 10 s, doubled with each try, up to an hour.
create or replace function image_jobs.finish_file_removal(p_workflow_id uuid, p_run_id varchar, p_done boolean)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if p_done then
    delete from image_jobs.file_removals f where f.workflow_id = p_workflow_id and f.run_id = p_run_id;
  else
    update image_jobs.file_removals f set due_at = image_jobs.now() + least(interval '1 hour', interval '5 s' * 2 ^ least(f.tries, 10))
    where f.workflow_id = p_workflow_id and f.run_id = p_run_id;
  end if;
end
$$;

-- Lease removals of sources to the caller, for a minute, at most p_limit names each: {belongs_to, id, names}. None in a bucket
-- of that name that was there before us: what lies in it may be others'.
create or replace function image_jobs.take_source_removals(p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_removal record;
  v_names text[];
begin
  if not image_jobs.sees_files() then
    return;
  end if;
  for v_removal in
    update image_jobs.source_removals s set tries = s.tries + 1, due_at = image_jobs.now() + interval '1 min'
    from (
      select d.belongs_to, d.id from image_jobs.source_removals d
      where d.due_at <= image_jobs.now() order by d.due_at limit 20 for update skip locked
    ) due
    where s.belongs_to = due.belongs_to and s.id = due.id
    returning s.belongs_to, s.id
  loop
    v_names := case when exists (select from image_jobs.project p where 'image-sources' = any (p.own_buckets)) then
      case v_removal.belongs_to
        when 'workflow' then array(
          select o.name from storage.objects o
          where o.bucket_id = 'image-sources' and o.name collate "C" >= v_removal.id || '/' and o.name collate "C" < v_removal.id || '0'
          limit p_limit)
        else array(
          select o.name from storage.objects o
          where o.bucket_id = 'image-sources'
            and v_removal.id::text in (to_jsonb(o) ->> 'owner_id', to_jsonb(o) ->> 'owner')
          limit p_limit) end end;
    if coalesce(cardinality(v_names), 0) = 0 then
      delete from image_jobs.source_removals s where s.belongs_to = v_removal.belongs_to and s.id = v_removal.id;
      continue;
    end if;
    return next jsonb_build_object('belongs_to', v_removal.belongs_to, 'id', v_removal.id, 'names', v_names);
  end loop;
end
$$;

-- Look for more at once, or put a removal off as finish_file_removal does.
create or replace function image_jobs.finish_source_removal(p_belongs_to text, p_id uuid, p_done boolean)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update image_jobs.source_removals s set tries = case when p_done then 0 else s.tries end,
    due_at = image_jobs.now()
      + case when p_done then interval '0' else least(interval '1 hour', interval '5 s' * 2 ^ least(s.tries, 10)) end
  where s.belongs_to = p_belongs_to and s.id = p_id;
end
$$;

-- The id of the run to which the address of a picture of ours belongs, however it is spelled; null for any other.
create or replace function image_jobs.pictured_run(p_url text)
returns text language sql immutable set search_path = ''
as $$
  select substring(image_jobs.percent_decoded(left(substring(p_url from '^[^?#]*'), 2048)) from '/([A-Za-z0-9_-]{1,200})\.[0-9A-Za-z.]+$')
$$;

-- Delete what has ended before p_before among the p_limit runs whose ids follow p_after, 500 of them at most. Returns {pruned,
-- after, refused, reason}: `after` is null at the end; `refused` is how many an application's own rules keep, and one's reason.
-- Kept: runs that a node shows or has pinned, and those whose picture a node shows or a living run starts from. Rows that somebody has
-- locked are left for the next time.
create or replace function image_jobs.prune_runs(p_before timestamptz, p_after varchar, p_limit integer)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_walked varchar[];
  v_old varchar[];
  v_id varchar;
  v_after varchar;
  v_pruned integer := 0;
  v_refused integer := 0;
  v_reason text;
begin
  select array_agg(walked.id order by walked.id) into v_walked
  from (select r.id from public.runs r where r.id > p_after order by r.id limit p_limit) walked;
  v_after := case when cardinality(v_walked) = p_limit then v_walked[p_limit] end;
  with old as materialized (
    select r.id, r.subject_id, r.ticket from public.runs r
    where r.id = any (v_walked) and (r.kind = 'image_gen') is true and r.status in ('completed', 'failed', 'cancelled') and r.finished_at < p_before
    order by r.id limit 501
  ), shown as materialized (
    select n.run_ticket, n.pinned_run, image_jobs.pictured_run(n.node_data ->> 'imageUrl') as run_id
    from public.workflow_nodes n where n.workflow_id in (select old.subject_id from old)
  ), sources as materialized (
    select image_jobs.pictured_run(living.metadata #>> '{promptSpec,previousImage}') as run_id
    from public.runs living
    where living.kind = 'image_gen' and living.queue_state is not null
      and living.source_workflow = any (array(select old.subject_id from old))
  )
  select array_agg(old.id order by old.id) into v_old
  from old
  where not exists (select from shown where shown.run_ticket = old.ticket)
    and not exists (select from shown where shown.pinned_run = old.id)
    and not exists (select from shown where shown.run_id = old.id)
    and not exists (select from sources where sources.run_id = old.id);
  if cardinality(v_old) > 500 then
    v_old := v_old[:500];
    v_after := v_old[500];
  end if;
  begin
    delete from public.runs r
    using (select l.id from public.runs l where l.id = any (v_old) order by l.id for update skip locked) unlocked
    where r.id = any (array[unlocked.id]) and r.status in ('completed', 'failed', 'cancelled');
    get diagnostics v_pruned = row_count;
  exception when others then
    -- A foreign key or a trigger of the application keeps one: the others go.
    v_pruned := 0;
    foreach v_id in array v_old loop
      begin
        delete from public.runs r
        using (select l.id from public.runs l where l.id = v_id for update skip locked) unlocked
        where r.id = any (array[unlocked.id]) and r.status in ('completed', 'failed', 'cancelled');
        v_pruned := v_pruned + case when found then 1 else 0 end;
      exception when others then
        v_refused := v_refused + 1;
        v_reason := sqlerrm;
      end;
    end loop;
  end;
  return jsonb_build_object('pruned', v_pruned, 'after', v_after, 'refused', v_refused, 'reason', v_reason);
end
$$;

-- Request the removal of files whose run is gone, among the p_limit objects of a bucket whose names follow p_after. This
-- finds what no trigger saw: TRUNCATE, and a daemon that stored a file after its run was deleted. p_holds says what the
-- bucket is for: images, conversations, or what is kept. Among images only objects with a daemon's metadata count, for an
-- application may have files of its own there; the other two are ours alone. Returns {found, after}.
create or replace function image_jobs.find_lost_files(p_bucket text, p_holds text, p_after text, p_limit integer)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_name constant text := '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}/([A-Za-z0-9_-]{1,200})'
    || case p_holds when 'kept' then '-(?:[0-9]+\.bin|copy\.[0-9a-z.]+)$' else '\.[0-9a-z.]+$' end;
  v_walked integer;
  v_last text;
  v_found integer;
begin
  if not image_jobs.sees_files() then
    return '{"found": 0, "after": null}';
  end if;
  with walked as materialized (
    select o.name, to_jsonb(o) #>> '{user_metadata,image_jobs}' as run_id from storage.objects o
    where o.bucket_id = p_bucket and o.name collate "C" > p_after
    order by o.name collate "C" limit p_limit
  ), named as materialized (
    select distinct left(w.name, 36)::uuid as workflow_id, substring(w.name from v_name) as run_id
    from walked w
    where w.name ~ v_name and (p_holds <> 'images' or w.run_id = substring(w.name from v_name))
  ), requested as (
    insert into image_jobs.file_removals (workflow_id, run_id, due_at)
    select named.workflow_id, named.run_id, image_jobs.now() from named
    where not exists (select from public.runs r where r.id = named.run_id and r.subject_id = named.workflow_id)
    on conflict do nothing
    returning 1
  )
  select count(*), max(walked.name collate "C"), (select count(*) from requested) into v_walked, v_last, v_found from walked;
  return jsonb_build_object('found', v_found, 'after', case when v_walked = p_limit then v_last end);
end
$$;

-- Take the next step of each walk that is due: through the runs, where p_retention says how long they are kept, and through
-- the buckets, those of p_buckets (of images, of conversations, of what is kept) and those of before. One daemon at a time is
-- at a walk. What a step meets ends no other. Returns {pruned, found, more, reason}: `more` if a walk has not come to its end,
-- `reason` why something was not done.
create or replace function image_jobs.walk(p_buckets text[], p_retention interval, p_limit integer)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_walk record;
  v_step jsonb;
  v_pruned integer := 0;
  v_found integer := 0;
  v_more boolean := false;
  v_reason text;
begin
  insert into image_jobs.walks (name, holds, due_at)
  select wanted.name, wanted.holds, v_now
  from (
    select '' as name, 'runs' as holds
    union all
    select b.bucket, (array['images', 'conversations', 'kept'])[b.place] from unnest(p_buckets) with ordinality b (bucket, place)
  ) wanted
  where not exists (select from image_jobs.walks w where w.name = wanted.name)
  on conflict do nothing;
  for v_walk in
    select w.name, w.holds, w.position from image_jobs.walks w
    where w.due_at <= v_now and (w.holds <> 'runs' or p_retention is not null)
    order by w.name for update skip locked
  loop
    begin
      v_step := case v_walk.holds
        when 'runs' then image_jobs.prune_runs(v_now - p_retention, v_walk.position, p_limit)
        else image_jobs.find_lost_files(v_walk.name, v_walk.holds, v_walk.position, p_limit) end;
    exception when others then
      v_step := jsonb_build_object('reason', sqlerrm);
    end;
    update image_jobs.walks w set
      position = coalesce(v_step ->> 'after', ''),
      due_at = v_now + case when v_step ->> 'after' is not null then interval '0' else interval '1 day' end
    where w.name = v_walk.name;
    v_pruned := v_pruned + coalesce((v_step ->> 'pruned')::integer, 0);
    v_found := v_found + coalesce((v_step ->> 'found')::integer, 0);
    v_more := v_more or v_step ->> 'after' is not null;
    v_reason := coalesce(v_step ->> 'reason', v_reason);
  end loop;
  return jsonb_build_object('pruned', v_pruned, 'found', v_found, 'more', v_more, 'reason', v_reason);
end
$$;

-- Erase a user: the runs that are theirs, with events and files; what they have uploaded; their memberships; and the nodes of workflows that they
-- alone were members of, with whatever runs are left there. The books keep their sums, without the user. For operators.
create or replace function image_jobs.forget_user(p_user_id uuid)
returns jsonb language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_own uuid[];
  v_runs integer := 0;
  v_deleted integer;
  v_nodes integer;
  v_memberships integer;
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  if p_user_id is null then
    perform image_jobs.refuse('forget_user needs the id of a user.', 'It stands in auth.users.');
  end if;
  select coalesce(array_agg(m.workflow_id), '{}') into v_own
  from public.workflow_members m
  where m.user_id = p_user_id
    and not exists (select from public.workflow_members o where o.workflow_id = m.workflow_id and o.user_id <> p_user_id);
  -- All of them before the first is deleted: nodes are locked after runs.
  perform set_config('image_jobs.writer', 'daemon', true);
  perform from public.runs r
  where r.kind = 'image_gen' and (r.requeued_by = p_user_id or r.created_by = p_user_id or r.subject_id = any (v_own))
  order by r.id for update;
  update public.runs r set requeued_by = null where r.requeued_by = p_user_id and r.kind = 'image_gen';
  perform set_config('image_jobs.writer', v_writer, true);
  loop
    delete from public.runs r where r.id in (
      select o.id from public.runs o
      where o.kind = 'image_gen' and (o.created_by = p_user_id or o.subject_id = any (v_own)) limit 1000);
    get diagnostics v_deleted = row_count;
    exit when v_deleted = 0;
    v_runs := v_runs + v_deleted;
  end loop;
  insert into image_jobs.source_removals (belongs_to, id, due_at)
  select gone.belongs_to, gone.id, image_jobs.now()
  from (select 'user' as belongs_to, p_user_id as id union all select 'workflow', unnest(v_own)) gone
  on conflict (belongs_to, id) do update set due_at = excluded.due_at, tries = 0;
  perform pg_notify('image_jobs_drop', '');
  update image_jobs.calls c set user_id = null where c.user_id = p_user_id;
  delete from public.workflow_nodes n where n.workflow_id = any (v_own);
  get diagnostics v_nodes = row_count;
  delete from public.workflow_members m where m.user_id = p_user_id;
  get diagnostics v_memberships = row_count;
  delete from image_jobs.workflow_links l where l.created_by = p_user_id or l.workflow_id = any (v_own);
  delete from image_jobs.usage_limits l where l.user_id = p_user_id;
  return jsonb_build_object('runs', v_runs, 'nodes', v_nodes, 'memberships', v_memberships);
end
$$;
