-- Every grant and every policy, on one page.
--
-- Since October 2026 Supabase grants nothing in public by itself; older projects grant everything. Both end here.
-- Clients (anon, authenticated) read what their workflows hold, insert runs, and own their nodes. They have no UPDATE and
-- no DELETE on runs and run_events: cancel_run and requeue_run are the way. Operators come as service_role or owner.

revoke all on all functions in schema private from public, anon, authenticated, service_role;
revoke all on all tables in schema private from public, anon, authenticated, service_role;
revoke all on all sequences in schema private from public, anon, authenticated, service_role;
revoke all on public.workflow_members, public.provider_limits, public.image_jobs, public.image_models, public.queue_stats,
  public.run_timings, public.run_costs, public.storage_stats, public.storage_violations, public.daemons
  from public, anon, authenticated, service_role;
revoke all on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar)
  from public, anon, authenticated, service_role;
revoke all on public.workflow_nodes from public, anon, authenticated, service_role;
revoke all on sequence public.provider_limits_id_seq from public, anon, authenticated, service_role;
-- On tables that were there before, rows of other kinds stay as open as they were; but row level security does not stop these.
revoke truncate, references, trigger on public.runs, public.run_events from public, anon, authenticated, service_role;

grant usage on schema private to anon, authenticated, service_role;

-- What the checks, the defaults and the policies of these tables call runs with the rights of whoever writes.
grant execute on function private.has_base64(jsonb) to anon, authenticated, service_role;
-- As are the keys of an index.
grant execute on function private.steps_left(jsonb, varchar, varchar) to authenticated, service_role;
grant execute on function private.can_access_workflow(uuid), private.can_access_run(varchar),
  private.is_image_run(varchar) to anon, authenticated, service_role;
-- What the client functions and the views call.
grant execute on function private.cancel_run(varchar), private.requeue_run(varchar), private.image_job_record(varchar),
  private.refuse(text, text), private.current_user_id() to authenticated, service_role;
grant execute on function private.now() to service_role;

grant select, insert on public.runs to authenticated;
grant select on public.run_events to authenticated;
grant select, insert, update, delete on public.workflow_nodes to authenticated;
grant select on public.workflow_members to authenticated;
grant select on public.image_jobs to authenticated;
grant select on private.models, public.image_models to anon, authenticated, service_role;
revoke all on function public.qualities(public.image_models) from public, anon, authenticated, service_role;
grant execute on function public.qualities(public.image_models) to anon, authenticated, service_role;
grant execute on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar)
  to authenticated, service_role;

grant select, insert, update, delete on public.runs, public.run_events, public.workflow_nodes, public.workflow_members,
  public.provider_limits to service_role;
grant select on public.image_jobs, public.queue_stats, public.run_timings, public.run_costs, public.storage_stats,
  public.storage_violations, public.daemons, private.daemons to service_role;

alter table public.runs enable row level security;
alter table public.run_events enable row level security;
alter table public.workflow_nodes enable row level security;
alter table public.workflow_members enable row level security;
alter table public.provider_limits enable row level security;
alter table private.workflows enable row level security;
alter table private.stale_nodes enable row level security;
alter table private.providers enable row level security;
alter table private.lanes enable row level security;
alter table private.daemons enable row level security;
alter table private.wake enable row level security;
alter table private.models enable row level security;

-- runs
drop policy if exists "Members see the runs of their workflows" on public.runs;
create policy "Members see the runs of their workflows" on public.runs for select to authenticated
  using (kind = 'image_gen' and private.can_access_workflow(subject_id));
drop policy if exists "Members insert runs into their workflows" on public.runs;
create policy "Members insert runs into their workflows" on public.runs for insert to authenticated
  with check (kind = 'image_gen' and private.can_access_workflow(subject_id));
-- On a table that was there before, other policies may be wider. These hold all the same, for our kind alone.
drop policy if exists "Nobody else sees image runs" on public.runs;
create policy "Nobody else sees image runs" on public.runs as restrictive for select to anon, authenticated
  using (kind is distinct from 'image_gen' or private.can_access_workflow(subject_id));
drop policy if exists "Nobody else inserts image runs" on public.runs;
create policy "Nobody else inserts image runs" on public.runs as restrictive for insert to anon, authenticated
  with check (kind is distinct from 'image_gen' or private.can_access_workflow(subject_id));
drop policy if exists "No client updates image runs" on public.runs;
create policy "No client updates image runs" on public.runs as restrictive for update to anon, authenticated
  using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
drop policy if exists "No client deletes image runs" on public.runs;
create policy "No client deletes image runs" on public.runs as restrictive for delete to anon, authenticated
  using (kind is distinct from 'image_gen');

-- run_events
drop policy if exists "Members see the events of their runs" on public.run_events;
create policy "Members see the events of their runs" on public.run_events for select to authenticated
  using (private.can_access_run(run_id));
drop policy if exists "Nobody else sees events of image runs" on public.run_events;
create policy "Nobody else sees events of image runs" on public.run_events as restrictive for select to anon, authenticated
  using (not private.is_image_run(run_id) or private.can_access_run(run_id));
drop policy if exists "No client inserts events of image runs" on public.run_events;
create policy "No client inserts events of image runs" on public.run_events as restrictive for insert to anon, authenticated
  with check (not private.is_image_run(run_id));
drop policy if exists "No client updates events of image runs" on public.run_events;
create policy "No client updates events of image runs" on public.run_events as restrictive for update to anon, authenticated
  using (not private.is_image_run(run_id)) with check (not private.is_image_run(run_id));
drop policy if exists "No client deletes events of image runs" on public.run_events;
create policy "No client deletes events of image runs" on public.run_events as restrictive for delete to anon, authenticated
  using (not private.is_image_run(run_id));

-- workflow_nodes
drop policy if exists "Members see the nodes of their workflows" on public.workflow_nodes;
create policy "Members see the nodes of their workflows" on public.workflow_nodes for select to authenticated
  using (private.can_access_workflow(workflow_id));
drop policy if exists "Members add nodes to their workflows" on public.workflow_nodes;
create policy "Members add nodes to their workflows" on public.workflow_nodes for insert to authenticated
  with check (private.can_access_workflow(workflow_id));
drop policy if exists "Members change the nodes of their workflows" on public.workflow_nodes;
create policy "Members change the nodes of their workflows" on public.workflow_nodes for update to authenticated
  using (private.can_access_workflow(workflow_id)) with check (private.can_access_workflow(workflow_id));
drop policy if exists "Members delete the nodes of their workflows" on public.workflow_nodes;
create policy "Members delete the nodes of their workflows" on public.workflow_nodes for delete to authenticated
  using (private.can_access_workflow(workflow_id));
drop policy if exists "Nobody else touches nodes" on public.workflow_nodes;
create policy "Nobody else touches nodes" on public.workflow_nodes as restrictive for all to anon, authenticated
  using (private.can_access_workflow(workflow_id)) with check (private.can_access_workflow(workflow_id));

-- workflow_members
drop policy if exists "Users see their own memberships" on public.workflow_members;
create policy "Users see their own memberships" on public.workflow_members for select to authenticated
  using (user_id = (select private.current_user_id()));

-- models
drop policy if exists "Everybody sees the models on offer" on private.models;
create policy "Everybody sees the models on offer" on private.models for select to anon, authenticated
  using (true);
