-- What a canvas hears.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- Broadcast from the database: changed nodes go out on the private topic workflow:<uuid>, event nodes_changed.
--
-- One message per statement and workflow, cut below the payload limit. A client merges by version, and asks for what a
-- message left out. Broadcasting must never hurt what it tells about: it happens only where realtime.send exists, never
-- waits for a lock, and what goes wrong is a warning.

-- A node in a message: the whole row if it is small, else what is ours of it, marked as partial.
create or replace function private.node_message(p_node public.workflow_nodes)
returns jsonb language sql immutable set search_path = ''
as $$
  select case
    when octet_length(p_node.node_data::text) <= 8192 then to_jsonb(p_node) - 'run_ticket'
    else jsonb_build_object('id', p_node.id, 'version', p_node.version, 'partial', true, 'node_data', (
      select coalesce(jsonb_object_agg(ours.key, ours.value), '{}')
      from jsonb_each(p_node.node_data) ours where ours.key = any (private.own_keys())))
  end
$$;

-- Sends messages about nodes. p_nodes: [{"workflow": uuid, "node": …}, …].
create or replace function private.broadcast_nodes(p_nodes jsonb)
returns void language plpgsql volatile security definer set search_path = '' set lock_timeout = '100ms'
as $$
declare
  v_message record;
begin
  for v_message in
    select cut.workflow, jsonb_agg(cut.node order by cut.place) as nodes
    from (
      select n.value ->> 'workflow' as workflow, n.value -> 'node' as node, n.place,
        sum(octet_length(n.value::text)) over (partition by n.value ->> 'workflow' order by n.place) / 100000 as part
      from jsonb_array_elements(p_nodes) with ordinality as n (value, place)
    ) cut
    group by cut.workflow, cut.part
    order by cut.workflow, cut.part
  loop
    begin
      execute 'select realtime.send($1, $2, $3, true)'
      using jsonb_build_object('nodes', v_message.nodes), 'nodes_changed', 'workflow:' || v_message.workflow;
    exception when others then
      raise warning 'nodes_changed was not broadcast: %', sqlerrm;
    end;
  end loop;
end
$$;

-- Tells about the nodes that a statement has inserted, changed or deleted.
create or replace function private.nodes_changed()
returns trigger language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = off set enable_hashjoin = on
as $$
declare
  v_nodes jsonb;
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null then
    return null;
  end if;
  if tg_op = 'INSERT' then
    select jsonb_agg(jsonb_build_object('workflow', n.workflow_id, 'node', private.node_message(n)) order by n.version) into v_nodes
    from new_rows n;
  elsif tg_op = 'UPDATE' then
    -- A node that leaves a workflow is gone there.
    select jsonb_agg(jsonb_build_object('workflow', c.workflow_id, 'node', c.node) order by c.version) into v_nodes
    from (
      select n.workflow_id, private.node_message(n) as node, n.version
      from new_rows n left join old_rows o on o.id = n.id
      where n.version is distinct from o.version
      union all
      select o.workflow_id, jsonb_build_object('id', o.id, 'version', n.version, 'deleted', true), n.version
      from old_rows o join new_rows n on n.id = o.id
      where n.workflow_id <> o.workflow_id
    ) c;
  else
    select jsonb_agg(jsonb_build_object('workflow', o.workflow_id,
      'node', jsonb_build_object('id', o.id, 'version', nextval('private.node_versions'), 'deleted', true))) into v_nodes
    from old_rows o;
  end if;
  if v_nodes is not null then
    perform private.broadcast_nodes(v_nodes);
  end if;
  return null;
end
$$;

create or replace trigger nodes_inserted after insert on public.workflow_nodes
  referencing new table as new_rows for each statement execute function private.nodes_changed();
create or replace trigger nodes_updated after update on public.workflow_nodes
  referencing old table as old_rows new table as new_rows for each statement execute function private.nodes_changed();
create or replace trigger nodes_deleted after delete on public.workflow_nodes
  referencing old table as old_rows for each statement execute function private.nodes_changed();

-- Who hears a workflow: its members, and nobody may speak on its topic but the database.
-- Does nothing where there is no Supabase Realtime.

-- Whether the signed-in user may listen to a topic.
create or replace function private.may_hear(p_topic text)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  if p_topic !~ '^workflow:[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' then
    return false;
  end if;
  return private.can_access_workflow(substr(p_topic, 10)::uuid);
end
$$;

revoke all on function private.may_hear(text), private.node_message(public.workflow_nodes),
  private.broadcast_nodes(jsonb), private.nodes_changed() from public, anon, authenticated, service_role;
grant execute on function private.may_hear(text) to authenticated;

do $$
begin
  if to_regclass('realtime.messages') is not null then
    drop policy if exists "Members hear the nodes of their workflows" on realtime.messages;
    create policy "Members hear the nodes of their workflows" on realtime.messages for select to authenticated
      using (extension = 'broadcast' and private.may_hear((select realtime.topic())));
  end if;
  -- For frontends that subscribe to postgres_changes instead.
  if exists (select from pg_publication where pubname = 'supabase_realtime' and not puballtables)
    and not exists (
      select from pg_publication_tables
      where pubname = 'supabase_realtime' and schemaname = 'public' and tablename = 'workflow_nodes')
  then
    alter publication supabase_realtime add table public.workflow_nodes;
  end if;
end
$$;
