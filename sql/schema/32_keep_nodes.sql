-- Nodes: which keys of node_data are ours, and what keeps them so.

-- Returns the keys of node_data that we own.
create or replace function image_jobs.owned_keys()
returns text[] language plpgsql immutable parallel safe set search_path = ''
as $$
begin
  return array['status', 'runId', 'progress', 'message', 'previewUrl', 'imageUrl', 'thumbnailUrl',
    'previewPath', 'imagePath', 'thumbnailPath', 'error', 'updatedAt'];
end
$$;

-- Returns the path in its bucket of an object of Storage, by its address as the daemon writes it; null for any other.
create or replace function image_jobs.storage_path(p_url text)
returns text language sql immutable set search_path = ''
as $$
  select substring(p_url from '/storage/v1/object/(?:public|authenticated)/[^/?#]+/([^?#]+)')
$$;

-- Returns the node_data that shows a run, on top of what the node had. An old image stays until a new one replaces it.
create or replace function image_jobs.node_data(
  p_data jsonb, p_run_id varchar, p_status varchar, p_progress integer, p_message text, p_preview_url text, p_payload jsonb)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  return (p_data
      - array['status', 'runId', 'progress', 'message', 'previewUrl', 'previewPath', 'error', 'updatedAt']
      - case when p_status = 'completed' then array['imageUrl', 'thumbnailUrl', 'imagePath', 'thumbnailPath'] else '{}' end)
    || jsonb_strip_nulls(jsonb_build_object(
      'status', case p_status when 'failed' then 'error' else p_status end,
      'runId', p_run_id,
      'progress', case p_status when 'completed' then 100 else p_progress end,
      'message', case p_status when 'failed' then p_payload ->> 'hint' else p_message end,
      'previewUrl', case when p_status = 'running' then p_preview_url end,
      'previewPath', case when p_status = 'running' then image_jobs.storage_path(p_preview_url) end,
      'error', case when p_status = 'failed' then p_payload ->> 'error' end,
      'updatedAt', to_char(image_jobs.now() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')))
    || case when p_status = 'completed' then jsonb_strip_nulls(jsonb_build_object(
      'imageUrl', p_payload ->> 'imageUrl', 'thumbnailUrl', p_payload ->> 'thumbnailUrl',
      'imagePath', p_payload ->> 'imagePath', 'thumbnailPath', p_payload ->> 'thumbnailPath')) else '{}' end;
end
$$;

-- Returns the keys that show the picture of the node's newest completed run; none if there is no such run.
create or replace function image_jobs.newest_picture(p_node varchar, p_workflow uuid)
returns jsonb language sql stable set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
  select coalesce((
    select jsonb_strip_nulls(jsonb_build_object(
      'imageUrl', r.payload -> 'imageUrl', 'thumbnailUrl', r.payload -> 'thumbnailUrl',
      'imagePath', r.payload -> 'imagePath', 'thumbnailPath', r.payload -> 'thumbnailPath'))
    from public.runs r
    where r.kind = 'image_gen' and r.ticket is not null and r.status = 'completed'
      and r.metadata ->> 'nodeId' = p_node and r.subject_id = p_workflow
    order by r.ticket desc limit 1), '{}')
$$;

-- Keep our keys when a node is written: a frontend that writes the whole node_data (dragging a node) can neither change nor
-- forge them. A node that is new here shows its newest run.
create or replace function image_jobs.keep_node()
returns trigger language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
declare
  v_own text[] := image_jobs.owned_keys();
  v_run record;
begin
  -- Before its content is looked at, here and by the checks; not where an old one is only moved.
  if (tg_op = 'INSERT' or new.node_data is distinct from old.node_data) and octet_length(new.node_data::text) > 1048576 then
    perform image_jobs.refuse('node_data is larger than 1 MiB.', 'Upload what is large and give its URL.');
  end if;
  -- Each write of a node checks both again, those of daemons, too: 24 MiB took a claim ten seconds. A file has a rule of its own.
  if (tg_op = 'INSERT' or new.position is distinct from old.position) and octet_length(new.position::text) > 8192
    and (octet_length(new.position::text) > 1048576 or not image_jobs.has_base64(new.position))
  then
    perform image_jobs.refuse('position is larger than 8 KiB.', 'Set it to {"x": 0, "y": 0}, and keep the rest in node_data.');
  end if;
  if (tg_op = 'INSERT' or new.node_type is distinct from old.node_type) and octet_length(new.node_type) > 1024 then
    perform image_jobs.refuse('node_type is longer than 1,024 bytes.', 'Name the type, and keep the rest in node_data.');
  end if;
  if jsonb_typeof(new.node_data) is distinct from 'object' then
    perform image_jobs.refuse('node_data must be an object.', 'Set it to {} if there is nothing to say.');
  end if;
  new.run_ticket := null;
  if tg_op = 'UPDATE' then
    new.created_at := old.created_at;
    new.run_ticket := old.run_ticket;
    new.node_data := (new.node_data - v_own) || coalesce((
      select jsonb_object_agg(kept.key, kept.value) from jsonb_each(old.node_data) kept where kept.key = any (v_own)
    ), '{}');
    new.version := old.version;
    new.updated_at := old.updated_at;
    if new is not distinct from old then
      return new;
    end if;
  else
    new.created_at := image_jobs.now();
    new.node_data := new.node_data - v_own;
  end if;
  perform image_jobs.found_workflow(new.workflow_id);
  if tg_op = 'INSERT' or new.id <> old.id or new.workflow_id <> old.workflow_id then
    new.node_data := new.node_data - v_own;
    new.run_ticket := null;
    new.pinned_run := null;
    select r.* into v_run
    from public.runs r
    where r.kind = 'image_gen' and r.ticket is not null
      and r.metadata ->> 'nodeId' = new.id and r.subject_id = new.workflow_id
    order by r.ticket desc limit 1;
    if found then
      -- One that was deleted and is put back has its picture again, also where its newest run has none.
      if v_run.status <> 'completed' then
        new.node_data := new.node_data || image_jobs.newest_picture(new.id, new.workflow_id);
      end if;
      new.node_data := image_jobs.node_data(new.node_data, v_run.id, v_run.status, v_run.progress, v_run.message,
        v_run.preview_url, v_run.payload);
      new.run_ticket := v_run.ticket;
    end if;
    -- A run that is changing just now neither sees this node nor is seen here: the next sync refreshes the node. A lock
    -- on the run would do as well, and deadlock with operators who change many runs.
    if tg_op = 'UPDATE' or not exists (select from public.workflow_nodes n where n.id = new.id) then
      insert into image_jobs.stale_nodes (node_id) values (new.id);
    end if;
  end if;
  new.version := nextval('image_jobs.node_versions');
  new.updated_at := image_jobs.now();
  return new;
end
$$;

-- Take back a pin that is not the work of show_run or of the projection, which run as the schema's owner: this function has
-- the rights of whoever writes. By its name it comes before image_jobs_keep_node.
create or replace function image_jobs.guard_pin()
returns trigger language plpgsql volatile set search_path = ''
as $$
begin
  if current_setting('image_jobs.writer', true) is distinct from 'projection'
    or not pg_has_role(current_user, (select n.nspowner from pg_catalog.pg_namespace n where n.nspname = 'image_jobs'), 'usage')
  then
    new.pinned_run := old.pinned_run;
  end if;
  return new;
end
$$;

create or replace trigger image_jobs_guard_pin before update on public.workflow_nodes
  for each row when (new.pinned_run is distinct from old.pinned_run) execute function image_jobs.guard_pin();
-- The projection and show_run write versions themselves. They run as the schema's owner, who alone may draw one: a client's own
-- setting of the variable is not enough. Without a new version it is the work of an application's trigger that they have fired.
create or replace trigger image_jobs_keep_node before update on public.workflow_nodes
  for each row when (coalesce(current_setting('image_jobs.writer', true), '') <> 'projection'
    or not has_sequence_privilege('image_jobs.node_versions'::regclass, 'usage')
    or new.version is not distinct from old.version)
  execute function image_jobs.keep_node();
create or replace trigger image_jobs_keep_new_node before insert on public.workflow_nodes
  for each row execute function image_jobs.keep_node();
