-- Membership of workflows. An application with its own workflows table replaces image_jobs.my_workflows.

create table if not exists public.workflow_members (
  workflow_id uuid not null,
  user_id uuid not null,
  created_at timestamptz not null default now(),
  primary key (workflow_id, user_id)
);
comment on table public.workflow_members is 'Image Job Orchestrator: who may see and use a workflow. The first to use a new id becomes its member.';
create index if not exists workflow_members_of_a_user on public.workflow_members (user_id, workflow_id);

-- Every workflow id that a row has ever used, also after its rows are gone: an id can be founded only once.
create table if not exists image_jobs.workflows (
  id uuid primary key,
  first_used_at timestamptz not null default now()
);
comment on table image_jobs.workflows is 'Workflow ids that have been used; the first user of a new one becomes its member.';

-- Returns the ids of the workflows that the signed-in user may see and use. The one place that decides; it fails closed.
-- Volatile, because the very insert that founds a workflow is checked by it: a stable function would not yet see the
-- membership that the insert's own trigger has made.
create or replace function image_jobs.my_workflows()
returns setof uuid language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_user uuid := image_jobs.current_user_id();
begin
  return query select m.workflow_id from public.workflow_members m where m.user_id = v_user;
end
$$;

-- Returns whether the signed-in user is a member.
create or replace function image_jobs.can_access_workflow(workflow_id uuid)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  return exists (select from image_jobs.my_workflows() mine (id) where mine.id = $1);
end
$$;

-- Returns whether the signed-in user may write into a workflow; raises where that is because no uuid names the user, which
-- the database's own words about a policy would not say.
create or replace function image_jobs.may_write(p_workflow uuid)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  if image_jobs.can_access_workflow(p_workflow) then
    return true;
  end if;
  if image_jobs.current_user_id() is null then
    perform image_jobs.refuse_nameless();
  end if;
  return false;
end
$$;

-- Returns whether the run belongs to a workflow that the signed-in user may see.
create or replace function image_jobs.can_access_run(p_run_id varchar)
returns boolean language sql volatile security definer set search_path = ''
as $$
  select exists (
    select from public.runs r
    where r.id = p_run_id and (r.kind = 'image_gen') is true and image_jobs.can_access_workflow(r.subject_id)
  )
$$;

-- Returns whether the run is of our kind; events of other kinds stay as open as they were.
create or replace function image_jobs.is_image_run(p_run_id varchar)
returns boolean language sql stable security definer set search_path = ''
as $$
  select exists (select from public.runs r where r.id = p_run_id and (r.kind = 'image_gen') is true)
$$;

-- Mark a workflow id as used. If no row ever used it, the signed-in user becomes its member.
-- Atomic: of two users at once, the primary key lets one found it; the other waits and becomes no member.
create or replace function image_jobs.found_workflow(p_workflow uuid)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_user uuid := image_jobs.current_user_id();
begin
  if p_workflow is null or exists (select from image_jobs.workflows w where w.id = p_workflow) then
    return;
  end if;
  insert into image_jobs.workflows (id) values (p_workflow) on conflict do nothing;
  if found and v_user is not null
    -- Rows of other kinds found no workflow.
    and not exists (select from public.runs r where r.subject_id = p_workflow and r.kind = 'image_gen')
    and not exists (select from public.workflow_nodes n where n.workflow_id = p_workflow)
  then
    perform image_jobs.lock_memberships(v_user);
    insert into public.workflow_members (workflow_id, user_id) values (p_workflow, v_user) on conflict do nothing;
    perform set_config('image_jobs.founded',
      concat_ws(',', nullif(current_setting('image_jobs.founded', true), ''), p_workflow), true);
  end if;
end
$$;

-- Refuse to return a row of a workflow that its own statement founded, after policies had asked which ones are the user's: they
-- ask once a statement. Returns false for every other row.
create or replace function image_jobs.refuse_founded(p_workflow uuid)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  if p_workflow::text = any (string_to_array(current_setting('image_jobs.founded', true), ','))
    and image_jobs.can_access_workflow(p_workflow)
  then
    perform image_jobs.refuse('One statement returns rows of one new workflow only.',
      'Insert the rows of each new workflow by themselves, or leave out .select().');
  end if;
  return false;
end
$$;
