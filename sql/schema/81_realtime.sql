-- Only members may listen to a workflow's topic, and only the database may send on it.

-- Returns whether the signed-in user may listen to a topic: those of the user's workflows, and that of all providers.
create or replace function image_jobs.can_subscribe(p_topic text)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  if p_topic = 'image_providers' then
    return true;
  end if;
  if p_topic !~ '^workflow:[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' then
    return false;
  end if;
  return image_jobs.can_access_workflow(substr(p_topic, 10)::uuid);
end
$$;

-- Returns what Supabase Realtime needs of us: the policy, and for frontends that subscribe to postgres_changes instead the
-- table in the publication. Columns as of check_set_up.
create or replace function image_jobs.realtime_steps()
returns table (step text, state text, note text, command text) language plpgsql stable set search_path = ''
as $$
declare
  -- A policy is made where none has its name: one that changes gets another name.
  v_policy constant text := 'Members hear the nodes of their workflows';
begin
  if exists (select from pg_catalog.pg_namespace n where n.nspname = 'realtime') then
    step := format('the policy "%s" on realtime.messages', v_policy);
    command := format('create policy %I on realtime.messages for select to authenticated '
      'using (extension = ''broadcast'' and image_jobs.can_subscribe((select realtime.topic())));', v_policy);
    -- Realtime makes both when the first client connects.
    if not exists (
        select from pg_catalog.pg_attribute a
        join pg_catalog.pg_class c on c.oid = a.attrelid
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where n.nspname = 'realtime' and c.relname = 'messages' and a.attname = 'extension' and not a.attisdropped)
      or not exists (
        select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
        where n.nspname = 'realtime' and p.proname = 'topic' and p.pronargs = 0)
    then
      state := 'later';
      note := 'Realtime has not made realtime.messages and realtime.topic() yet';
    elsif exists (
      select from pg_catalog.pg_policies p
      where p.schemaname = 'realtime' and p.tablename = 'messages' and p.policyname = v_policy)
    then
      state := 'there';
      note := null;
    else
      state := 'missing';
      note := 'members may not listen to their workflows';
    end if;
    return next;
  end if;

  step := 'workflow_nodes in the publication supabase_realtime';
  command := 'alter publication supabase_realtime add table public.workflow_nodes;';
  note := 'subscriptions to postgres_changes get nothing';
  if not exists (select from pg_catalog.pg_publication p where p.pubname = 'supabase_realtime') then
    state := 'absent';
    note := 'there is no such publication, so ' || note;
    command := 'create publication supabase_realtime for table public.workflow_nodes;';
  elsif exists (
    select from pg_catalog.pg_publication_tables t
    where t.pubname = 'supabase_realtime' and t.schemaname = 'public' and t.tablename = 'workflow_nodes')
  then
    state := 'there';
  else
    state := 'missing';
  end if;
  return next;
end
$$;
