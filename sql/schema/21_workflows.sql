-- Who may see a workflow. An application with its own workflows table replaces private.can_access_workflow.

create table public.workflow_members (
  workflow_id uuid not null,
  user_id uuid not null,
  created_at timestamptz not null default now(),
  primary key (workflow_id, user_id)
);
comment on table public.workflow_members is 'Who may see and use a workflow. The first to use a new id becomes its member.';
create index if not exists workflow_members_of_a_user on public.workflow_members (user_id);

-- Every workflow id that a row has ever used, also after its rows are gone: an id can be founded only once.
create table private.workflows (
  id uuid primary key,
  first_used_at timestamptz not null default now()
);
comment on table private.workflows is 'Workflow ids that have been used; whoever uses a new one first becomes its member.';

-- Whether the signed-in user is a member. The one place that decides; it fails closed.
-- Volatile, because the very insert that founds a workflow is checked by it: a stable function would not yet see the
-- membership that the insert's own trigger has made.
create or replace function private.can_access_workflow(workflow_id uuid)
returns boolean language sql volatile security definer set search_path = ''
as $$
  select exists (
    select from public.workflow_members m
    where m.workflow_id = $1 and m.user_id = private.current_user_id()
  )
$$;

-- Whether the run belongs to a workflow that the signed-in user may see.
create or replace function private.can_access_run(p_run_id varchar)
returns boolean language sql volatile security definer set search_path = ''
as $$
  select exists (
    select from public.runs r
    where r.id = p_run_id and r.kind = 'image_gen' and private.can_access_workflow(r.subject_id)
  )
$$;

-- Whether the run is ours; events of other kinds stay as open as they were.
create or replace function private.is_image_run(p_run_id varchar)
returns boolean language sql stable security definer set search_path = ''
as $$
  select exists (select from public.runs r where r.id = p_run_id and r.kind = 'image_gen')
$$;

-- Marks a workflow id as used. If no row ever used it, the signed-in user becomes its member.
-- Atomic: of two users who come at once, the primary key lets one found it, and the other waits and gets nothing.
create or replace function private.use_workflow(p_workflow uuid)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_user uuid := private.current_user_id();
begin
  if p_workflow is null or exists (select from private.workflows w where w.id = p_workflow) then
    return;
  end if;
  insert into private.workflows (id) values (p_workflow) on conflict do nothing;
  if found and v_user is not null
    and not exists (select from public.runs r where r.subject_id = p_workflow)
    and not exists (select from public.workflow_nodes n where n.workflow_id = p_workflow)
  then
    insert into public.workflow_members (workflow_id, user_id) values (p_workflow, v_user) on conflict do nothing;
  end if;
end
$$;
