-- Sharing: a member makes a link, and who opens it becomes a member, with the same rights. Only operators add a user by uuid.
--
-- Bounds: 100 members a workflow, 1,000 workflows a user (also when founding), 100 open links a workflow; operators'
-- own inserts are not counted. Locks: first the user's, then the workflow's. A workflow's lock is an update of its row, not
-- a select for update, so that a transaction whose snapshot is older fails (40001) rather than counts what is gone.

create table if not exists image_jobs.workflow_links (
  token_hash bytea primary key,
  workflow_id uuid not null,
  created_by uuid,
  expires_at timestamptz not null
);
comment on table image_jobs.workflow_links is
  'Links that make their opener a member of a workflow. The token itself is kept nowhere; created_by null: an operator''s.';
create index if not exists workflow_links_of_a_workflow on image_jobs.workflow_links (workflow_id);

-- The key of a link. A token has 244 random bits, so a plain hash of it cannot be searched.
create or replace function image_jobs.token_hash(p_token text)
returns bytea language sql immutable set search_path = ''
as $$
  select sha256(convert_to(coalesce(p_token, ''), 'UTF8'))
$$;

-- Lock a user's memberships until the transaction ends, and refuse one that would be too many.
create or replace function image_jobs.lock_memberships(p_user uuid)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  perform pg_advisory_xact_lock(hashtextextended('image_jobs.workflow_members ' || p_user, 0));
  if (select count(*) from public.workflow_members m where m.user_id = p_user) >= 1000 then
    perform image_jobs.refuse('You are a member of 1,000 workflows, and more are not possible.', 'Leave one of them with leave_workflow.');
  end if;
end
$$;

-- Lock a workflow's members and links until the transaction ends.
create or replace function image_jobs.lock_members(p_workflow uuid)
returns void language sql volatile set search_path = ''
as $$
  insert into image_jobs.workflows as w (id) values (p_workflow)
  on conflict (id) do update set first_used_at = w.first_used_at
$$;

-- Refuse whoever is no member of the workflow; a foreign one is as unknown as one that does not exist. Operators pass.
-- Where an application replaced my_workflows, our table does not say who may see: a link would promise too much.
create or replace function image_jobs.require_member(p_workflow uuid)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if image_jobs.is_operator() then
    return;
  end if;
  if image_jobs.current_user_id() is null then
    perform image_jobs.refuse_nameless();
  end if;
  if not image_jobs.can_access_workflow(p_workflow) then
    raise exception using errcode = 'PT404', message = 'There is no such workflow.',
      hint = 'Check the id, and that you are a member of it; a member can send you a link.';
  end if;
  if not exists (
    select from public.workflow_members m where m.workflow_id = p_workflow and m.user_id = image_jobs.current_user_id())
  then
    perform image_jobs.refuse_foreign_members();
  end if;
end
$$;

create or replace function image_jobs.refuse_foreign_members()
returns void language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.refuse('Links do not decide who may see this workflow: the application has a rule of its own.',
    'Add or remove the user where the application keeps its workflows.');
end
$$;

-- Make a link of a workflow, good for 7 days. A workflow id that no row has ever used becomes the caller's first.
create or replace function image_jobs.share_workflow(p_workflow uuid)
returns text language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_token text := translate(encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64'), '+/=', '-_');
  v_operator boolean := image_jobs.is_operator();
begin
  if p_workflow is null then
    perform image_jobs.refuse('workflow_id is missing.', 'Name the workflow that is to be shared.');
  end if;
  if not v_operator then
    perform image_jobs.found_workflow(p_workflow);
  end if;
  perform image_jobs.require_member(p_workflow);
  perform image_jobs.lock_members(p_workflow);
  delete from image_jobs.workflow_links l where l.workflow_id = p_workflow and l.expires_at <= image_jobs.now();
  if (select count(*) from image_jobs.workflow_links l where l.workflow_id = p_workflow) >= 100 then
    perform image_jobs.refuse('This workflow has 100 open links, and more are not possible.',
      'Send one that you have, or revoke them all with unshare_workflow; each ends after 7 days.');
  end if;
  insert into image_jobs.workflow_links (token_hash, workflow_id, created_by, expires_at)
  values (image_jobs.token_hash(v_token), p_workflow, case when not v_operator then image_jobs.current_user_id() end,
    image_jobs.now() + interval '7 days');
  return v_token;
end
$$;

-- Make the caller a member of the workflow of a link. Returns the workflow, also to one who is a member already.
-- A link of somebody who is no member any more lets nobody in.
create or replace function image_jobs.join_workflow(p_token text)
returns uuid language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_user uuid := image_jobs.current_user_id();
  v_hash bytea := image_jobs.token_hash(p_token);
  v_workflow uuid;
begin
  if v_user is null then
    perform image_jobs.refuse_nameless();
  end if;
  select l.workflow_id into v_workflow from image_jobs.workflow_links l where l.token_hash = v_hash;
  if exists (select from public.workflow_members m where m.workflow_id = v_workflow and m.user_id = v_user) then
    return v_workflow;
  end if;
  if v_workflow is not null then
    perform image_jobs.lock_memberships(v_user);
    perform image_jobs.lock_members(v_workflow);
  end if;
  -- Only now: it may have been revoked while this waited.
  if not exists (
    select from image_jobs.workflow_links l
    where l.token_hash = v_hash and l.expires_at > image_jobs.now()
      and (l.created_by is null or exists (
        select from public.workflow_members m where m.workflow_id = l.workflow_id and m.user_id = l.created_by)))
  then
    raise exception using errcode = 'PT404', message = 'This link does not open a workflow: it has expired, or was revoked.',
      hint = 'Ask a member for a new one.';
  end if;
  if (select count(*) from public.workflow_members m where m.workflow_id = v_workflow) >= 100 then
    perform image_jobs.refuse('This workflow has 100 members, and more are not possible.', 'One of them has to leave it first.');
  end if;
  insert into public.workflow_members (workflow_id, user_id) values (v_workflow, v_user) on conflict do nothing;
  if not image_jobs.can_access_workflow(v_workflow) then
    perform image_jobs.refuse_foreign_members();
  end if;
  return v_workflow;
end
$$;

-- End the caller's membership, and with it the links that the caller made. The last member stays.
create or replace function image_jobs.leave_workflow(p_workflow uuid)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_user uuid := image_jobs.current_user_id();
begin
  if v_user is null then
    perform image_jobs.refuse_nameless();
  end if;
  perform image_jobs.require_member(p_workflow);
  perform image_jobs.lock_members(p_workflow);
  if not exists (select from public.workflow_members m where m.workflow_id = p_workflow and m.user_id <> v_user) then
    perform image_jobs.refuse('You are the last member of this workflow, and the last one cannot leave.',
      'Have somebody join first (share_workflow), or stay and delete its nodes.');
  end if;
  delete from public.workflow_members m where m.workflow_id = p_workflow and m.user_id = v_user;
  delete from image_jobs.workflow_links l where l.workflow_id = p_workflow and l.created_by = v_user;
end
$$;

-- Revoke all links of a workflow, whoever made them. Members stay members.
create or replace function image_jobs.unshare_workflow(p_workflow uuid)
returns void language plpgsql volatile security definer set search_path = ''
as $$
begin
  if p_workflow is null then
    perform image_jobs.refuse('workflow_id is missing.', 'Name the workflow whose links are to be revoked.');
  end if;
  perform image_jobs.require_member(p_workflow);
  perform image_jobs.lock_members(p_workflow);
  delete from image_jobs.workflow_links l where l.workflow_id = p_workflow;
end
$$;

-- Returns whether the caller may use a workflow: as a member, or as the first, who becomes one. It founds nothing.
create or replace function image_jobs.can_open_workflow(p_workflow uuid)
returns boolean language sql volatile security definer set search_path = ''
as $$
  select image_jobs.can_access_workflow(p_workflow)
    or image_jobs.current_user_id() is not null and not exists (select from image_jobs.workflows w where w.id = p_workflow)
      -- As in found_workflow: rows that were there before us belong to nobody.
      and not exists (select from public.runs r where r.subject_id = p_workflow and r.kind = 'image_gen')
      and not exists (select from public.workflow_nodes n where n.workflow_id = p_workflow)
$$;

create or replace function public.can_open_workflow(workflow_id uuid)
returns boolean language sql volatile set search_path = ''
as $$ select image_jobs.can_open_workflow($1) $$;
comment on function public.can_open_workflow(uuid) is
  'Image Job Orchestrator: whether the caller may use a workflow: a member, or anybody who is signed in while no row has ever used its id.';

create or replace function public.share_workflow(workflow_id uuid)
returns text language sql volatile set search_path = ''
as $$ select image_jobs.share_workflow($1) $$;
comment on function public.share_workflow(uuid) is
  'Image Job Orchestrator: returns the token of a new link, good for 7 days; who opens it becomes a member, with all rights of one.';

create or replace function public.join_workflow(token text)
returns uuid language sql volatile set search_path = ''
as $$ select image_jobs.join_workflow($1) $$;
comment on function public.join_workflow(text) is 'Image Job Orchestrator: makes the caller a member of the workflow of a link; returns its id.';

create or replace function public.leave_workflow(workflow_id uuid)
returns void language sql volatile set search_path = ''
as $$ select image_jobs.leave_workflow($1) $$;
comment on function public.leave_workflow(uuid) is
  'Image Job Orchestrator: ends the caller''s membership, and the links that the caller made. The last member cannot leave.';

create or replace function public.unshare_workflow(workflow_id uuid)
returns void language sql volatile set search_path = ''
as $$ select image_jobs.unshare_workflow($1) $$;
comment on function public.unshare_workflow(uuid) is 'Image Job Orchestrator: revokes all links of a workflow. Members stay members.';
