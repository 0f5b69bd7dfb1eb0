-- Broadcast from the database: a run without a node goes out itself, on its workflow's topic, event runs_changed.
--
-- A run has no node if its metadata names none, or none of its workflow. As with nodes, progress comes once a second, since
-- the daemon writes it no more often, and ends at once.

-- Returns runs for messages: their records of the view image_jobs, progress, message, preview and paths in storage, and a version
-- that grows with each message. A record that is large comes without its metadata, marked as partial. Planned each time: a plan
-- that is kept from when the table was small took 2.1 ms a run, 500 at once, and more with each run in the table.
create or replace function image_jobs.run_messages(p_runs varchar[])
returns jsonb language plpgsql volatile set search_path = '' set plan_cache_mode = force_custom_plan
as $$
begin
  return (
    select jsonb_agg(jsonb_build_object('workflow', r.subject_id, 'item', case
      when octet_length(sent.item::text) <= 8192 then sent.item
      else sent.item - 'metadata' || jsonb_build_object('partial', true, 'error', left(sent.item ->> 'error', 2048),
        'message', left(sent.item ->> 'message', 2048)) end) order by r.id)
    from public.runs r
    cross join lateral (select v.* from public.image_jobs v where v."jobId" = r.id offset 0) j
    cross join lateral (
      select to_jsonb(j) || jsonb_build_object('progress', r.progress, 'message', r.message,
        'previewUrl', case when r.status = 'running' then r.preview_url end,
        'previewPath', case when r.status = 'running' then image_jobs.storage_path(r.preview_url) end,
        'imagePath', r.payload ->> 'imagePath', 'thumbnailPath', r.payload ->> 'thumbnailPath',
        'version', nextval('image_jobs.node_versions')) as item
    ) sent
    where r.id = any (p_runs));
end
$$;

-- Broadcast runs that have changed and have no node.
create or replace function image_jobs.broadcast_runs(p_runs varchar[])
returns void language plpgsql volatile security definer set search_path = ''
as $$
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is not null then
    perform image_jobs.broadcast('runs_changed', 'runs', image_jobs.run_messages(p_runs));
  end if;
end
$$;

-- Broadcast that runs without a node are deleted. p_runs: [{"id", "workflow", "node"}, …].
create or replace function image_jobs.broadcast_deleted_runs(p_runs jsonb)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_items jsonb;
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null then
    return;
  end if;
  select jsonb_agg(jsonb_build_object('workflow', d.workflow, 'item', jsonb_build_object(
    'jobId', d.id, 'workflowId', d.workflow, 'deleted', true, 'version', nextval('image_jobs.node_versions'))) order by d.id)
  into v_items
  from jsonb_to_recordset(p_runs) as d (id varchar, workflow uuid, node varchar)
  where not exists (select from public.workflow_nodes n where n.id = d.node and (n.workflow_id = d.workflow) is true offset 0);
  if v_items is not null then
    perform image_jobs.broadcast('runs_changed', 'runs', v_items);
  end if;
end
$$;
