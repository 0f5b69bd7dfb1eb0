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
