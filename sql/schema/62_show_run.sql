-- The history of a node: its completed runs are what retention leaves of them; show_run brings one back.

-- Show a completed run on its node again, until there is a newer one. Runs, tickets and calls stay as they are. For members
-- and operators.
create or replace function image_jobs.show_run(p_run_id varchar)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
  v_node varchar;
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  -- Locked, so that it is neither deleted nor requeued meanwhile; before the node, as the lock order has it.
  select r.* into v_run from public.runs r where r.id = p_run_id and (r.kind = 'image_gen') is true for share;
  if not found or not (image_jobs.is_operator() or image_jobs.can_access_workflow(v_run.subject_id)) then
    raise exception using errcode = 'PT404', message = 'There is no such run.', hint = 'Check the id, and that you are a member of its workflow.';
  end if;
  if v_run.status <> 'completed' then
    perform image_jobs.refuse(format('A run that is %s has no picture to show.', v_run.status),
      case when v_run.status in ('pending', 'running') then 'Wait until it is completed.' else 'Show one that is completed.' end);
  end if;
  select n.id into v_node from public.workflow_nodes n
  where n.id = v_run.metadata ->> 'nodeId' and (n.workflow_id = v_run.subject_id) is true for update;
  if not found then
    perform image_jobs.refuse('The run has no node that could show it.', 'Insert the node that its metadata.nodeId names.');
  end if;
  -- With the node locked: a run that is inserted from now on finds the pin, and clears it.
  if exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.ticket is not null and r.status in ('pending', 'running')
      and r.metadata ->> 'nodeId' = v_node and r.subject_id = v_run.subject_id)
  then
    perform image_jobs.refuse('The node has a run in line or under way.', 'Wait until it has ended, or cancel it first.');
  end if;
  perform set_config('image_jobs.writer', 'projection', true);
  update public.workflow_nodes n
  set pinned_run = p_run_id, node_data = image_jobs.node_data(n.node_data, v_run.id, v_run.status, v_run.progress, v_run.message,
    v_run.preview_url, v_run.payload), version = nextval('image_jobs.node_versions'), updated_at = image_jobs.now()
  where n.id = v_node and n.pinned_run is distinct from p_run_id;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

create or replace function public.show_run(run_id varchar)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.show_run(run_id);
  return image_jobs.image_job_record(run_id);
end
$$;
comment on function public.show_run(varchar) is
  'Image Job Orchestrator: shows a completed run on its node again, until there is a newer one; returns its ImageJobRecord.';
