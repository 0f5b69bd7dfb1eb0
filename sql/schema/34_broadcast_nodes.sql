-- Broadcast from the database: changed nodes go out on the private topic workflow:<uuid>, event nodes_changed.
--
-- One message per statement and workflow, cut below the payload limit. A client merges by version, and fetches what a
-- message left out. Broadcasting must never hurt the write it reports: it happens only where realtime.send exists, never
-- waits for a lock, and a failure is a warning.

-- Returns a node for a message: the whole row if it is small, else our keys of it, marked as partial.
create or replace function image_jobs.node_message(p_node public.workflow_nodes)
returns jsonb language plpgsql immutable set search_path = ''
as $$
begin
  if octet_length(p_node.node_data::text) <= 8192 then
    return to_jsonb(p_node) - 'run_ticket';
  end if;
  return jsonb_build_object('id', p_node.id, 'version', p_node.version, 'partial', true, 'node_data', (
    select coalesce(jsonb_object_agg(ours.key, ours.value), '{}')
    from jsonb_each(p_node.node_data) ours where ours.key = any (image_jobs.owned_keys())));
end
$$;

-- Send one message on the topic of a workflow.
create or replace function image_jobs.send_message(p_event text, p_workflow uuid, p_payload jsonb)
returns void language plpgsql volatile security definer set search_path = '' set lock_timeout = '100ms'
as $$
begin
  perform realtime.send(p_payload, p_event, 'workflow:' || p_workflow, true);
exception when others then
  raise warning '% was not broadcast: %', p_event, sqlerrm;
end
$$;

-- Send messages on the topics of workflows. p_items: [{"workflow": uuid, "item": …}, …]; p_list: the key of the items in the payload.
create or replace function image_jobs.broadcast(p_event text, p_list text, p_items jsonb)
returns void language plpgsql volatile security definer set search_path = ''
as $$
begin
  perform image_jobs.send_message(p_event, message.workflow::uuid, jsonb_build_object(p_list, message.items))
  from (
    select cut.workflow, jsonb_agg(cut.item order by cut.place) as items
    from (
      select n.value ->> 'workflow' as workflow, n.value -> 'item' as item, n.place,
        sum(octet_length(n.value::text)) over (partition by n.value ->> 'workflow' order by n.place) / 100000 as part
      from jsonb_array_elements(p_items) with ordinality as n (value, place)
    ) cut
    group by cut.workflow, cut.part
    order by cut.workflow, cut.part
  ) message;
end
$$;

-- Broadcast the nodes that a statement has inserted, changed or deleted. What is off costs the planner 10 billion, before
-- PostgreSQL 18, and whatever costs so much it has compiled: 1 to 2 s for a node that is dragged.
create or replace function image_jobs.nodes_changed()
returns trigger language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = off set enable_hashjoin = on set jit = off
as $$
declare
  v_nodes jsonb;
  v_stayed boolean := tg_op = 'INSERT';
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null then
    return null;
  end if;
  -- A projection changes each node that it writes, and moves and renames none; an application's trigger within it may.
  if tg_op = 'UPDATE' and pg_trigger_depth() > 1 and current_setting('image_jobs.writer', true) = 'projection' then
    v_stayed := not exists (
      select from old_rows o
      where not exists (select from new_rows n where n.id = o.id and n.workflow_id = o.workflow_id and n.version <> o.version));
  end if;
  if v_stayed then
    perform image_jobs.send_message('nodes_changed', message.workflow_id, jsonb_build_object('nodes', message.items))
    from (
      select cut.workflow_id, jsonb_agg(cut.item order by cut.version) as items
      from (
        select n.workflow_id, n.version, sent.item,
          sum(octet_length(sent.item::text)) over (partition by n.workflow_id order by n.version) / 100000 as part
        from new_rows n cross join lateral (select image_jobs.node_message(n) as item offset 0) sent
      ) cut
      group by cut.workflow_id, cut.part
      order by cut.workflow_id, cut.part
    ) message;
    return null;
  elsif tg_op = 'UPDATE' then
    -- A node that leaves a workflow is gone there.
    select jsonb_agg(jsonb_build_object('workflow', c.workflow_id, 'item', c.node) order by c.version) into v_nodes
    from (
      select n.workflow_id, image_jobs.node_message(n) as node, n.version
      from new_rows n left join old_rows o on o.id = n.id
      where n.version is distinct from o.version
      union all
      select o.workflow_id, jsonb_build_object('id', o.id, 'version', n.version, 'deleted', true), n.version
      from old_rows o join new_rows n on n.id = o.id
      where n.workflow_id <> o.workflow_id
      union all
      -- One that is renamed is gone under its old id.
      select gone.workflow_id, jsonb_build_object('id', gone.id, 'version', gone.next_version, 'deleted', true), gone.next_version
      from (
        select o.workflow_id, o.id, nextval('image_jobs.node_versions') as next_version from old_rows o
        where not exists (select from new_rows n where n.id = o.id)
      ) gone
    ) c;
  else
    select jsonb_agg(jsonb_build_object('workflow', o.workflow_id,
      'item', jsonb_build_object('id', o.id, 'version', nextval('image_jobs.node_versions'), 'deleted', true))) into v_nodes
    from old_rows o;
  end if;
  if v_nodes is not null then
    perform image_jobs.broadcast('nodes_changed', 'nodes', v_nodes);
  end if;
  return null;
end
$$;

create or replace trigger image_jobs_nodes_inserted after insert on public.workflow_nodes
  referencing new table as new_rows for each statement execute function image_jobs.nodes_changed();
create or replace trigger image_jobs_nodes_updated after update on public.workflow_nodes
  referencing old table as old_rows new table as new_rows for each statement execute function image_jobs.nodes_changed();
create or replace trigger image_jobs_nodes_deleted after delete on public.workflow_nodes
  referencing old table as old_rows for each statement execute function image_jobs.nodes_changed();
