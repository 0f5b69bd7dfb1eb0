-- Compare what is there with what is needed, before anything is changed: what has names of ours, and is not ours.
-- 02 compares the tables that are adopted, 03 what rows they take, 04 what triggers make of them; the end of 04 refuses, with
-- a sentence and a cure for each difference, in one error. Nothing of others is ever replaced, granted or revoked.
--
-- These four change nothing. `image-jobs doctor` runs them on a database in use, before and after it was migrated.
-- They hand on what they find in the setting image_jobs.differences, of this transaction.

do $compare$
declare
  v_marker constant text := 'Image Job Orchestrator: ';
  -- The one list of our names in public: a test keeps it complete. Triggers of ours begin with image_jobs_.
  v_relations constant text[] := array['workflow_members', 'image_jobs', 'image_models', 'image_provider_status', 'image_usage'];
  v_adopted constant text[] := array['runs', 'run_events', 'workflow_nodes'];
  v_functions constant text[] := array[
    'start_image_job', 'cancel_run', 'requeue_run', 'show_run', 'estimate_cost',
    'share_workflow', 'join_workflow', 'leave_workflow', 'unshare_workflow', 'can_open_workflow',
    'webhook_openai', 'webhook_midjourney', 'webhook_hmac', 'receive_webhook'];
  v_indexes constant jsonb := '{
    "runs": ["idx_runs_subject", "runs_of_a_workflow", "runs_ready", "runs_ready_by_name", "runs_delayed", "runs_running", "runs_held",
      "runs_last_in_line", "runs_last_of_workflow", "runs_waiting_of_user", "runs_that_refine", "runs_requeued_by", "runs_node", "runs_idempotency",
      "runs_may_be_rerouted", "runs_provider_job", "runs_ended_by_claim", "runs_from_before"],
    "run_events": ["run_events_of_a_run", "run_events_of_a_workflow", "run_events_of_alerts", "run_events_of_uploads"],
    "workflow_nodes": ["idx_nodes_workflow"],
    "workflow_members": ["workflow_members_of_a_user"]}';
  v_constraints constant text[] := array[
    'runs_payload_holds_no_base64', 'runs_metadata_holds_no_base64', 'run_events_kind_is_known', 'run_events_payload_holds_no_base64',
    'workflow_nodes_node_data_holds_no_base64', 'workflow_nodes_position_holds_no_base64'];
  v_policies constant text[] := array[
    'Rows of other kinds stay as open as they were', 'Events of other kinds stay as open as they were',
    'Members see the runs of their workflows', 'Members insert runs into their workflows',
    'Nobody else sees image runs', 'Nobody else inserts image runs',
    'No client updates image runs', 'No client deletes image runs',
    'Members see the events of their runs', 'Members see events that are older than their workflow_id',
    'Nobody else sees events of image runs',
    'No client inserts events of image runs', 'No client updates events of image runs',
    'No client deletes events of image runs',
    'Members see the nodes of their workflows', 'Members add nodes to their workflows',
    'Members change the nodes of their workflows', 'Members delete the nodes of their workflows',
    'Nobody else touches nodes', 'Members hear the nodes of their workflows',
    'Members see the pictures of their workflows', 'Members see the sources of their workflows',
    'Members add sources to their workflows', 'Members delete the sources of their workflows'];

  v_schema oid := to_regnamespace('image_jobs');
  v_owner oid;
  -- A comment alone proves nothing: the schema is ours if it also holds what only we make, and belongs to us.
  v_ours boolean := false;
  v_tables oid[];
  v_found jsonb := '[]';
begin
  -- Of this transaction: names are compared as they are written without quotes, here and in the three that follow.
  perform set_config('quote_all_identifiers', 'off', true);
  select n.nspowner into v_owner from pg_namespace n where n.oid = v_schema;
  if v_schema is not null then
    v_ours := starts_with(coalesce(obj_description(v_schema, 'pg_namespace'), ''), v_marker)
      and (
        select count(*) = 4 from pg_class c
        where c.relnamespace = v_schema and c.relowner = v_owner
          and (c.relname, c.relkind) in (('migrations', 'r'), ('claims', 'S'), ('tickets', 'S'), ('daemons', 'r')));
    if not v_ours then
      v_found := v_found || jsonb_build_array(jsonb_build_array(
        'There is a schema image_jobs already, and it is not the Image Job Orchestrator''s.',
        'Rename it: alter schema image_jobs rename to …;'));
    elsif not pg_has_role(v_owner, 'usage') then
      v_found := v_found || jsonb_build_array(jsonb_build_array(
        format('The schema image_jobs belongs to %s, and %s may not change it.', v_owner::regrole, current_user),
        format('Connect as %s.', v_owner::regrole)));
    end if;
  elsif not has_database_privilege(current_database(), 'create') then
    v_found := v_found || jsonb_build_array(jsonb_build_array(
      format('The user %s may not make a schema in this database.', current_user),
      format('Let its owner run: grant create on database %I to %I;', current_database(), current_user)));
  end if;
  if not has_schema_privilege('public', 'create') then
    v_found := v_found || jsonb_build_array(jsonb_build_array(
      format('The user %s may not make tables in the schema public.', current_user),
      format('Let its owner run: grant create on schema public to %I;', current_user)));
  end if;

  select array_agg(c.oid) into v_tables
  from pg_class c where c.relnamespace = 'public'::regnamespace and c.relname = any (v_adopted);

  -- An object that has a comment is ours where the schema is, the marker stands in it, and it belongs to the schema's owner. One
  -- that can have none is ours where the schema is.
  v_found := v_found || (
    select coalesce(jsonb_agg(jsonb_build_array(format('%s has the name of something that the Image Job Orchestrator makes.', f.name), f.cure)
      order by f.name), '[]')
    from (
      select format('public.%I', c.relname) as name, coalesce(
          v_ours and starts_with(coalesce(obj_description(c.oid, 'pg_class'), ''), v_marker) and c.relowner = v_owner, false) as ours,
        format('Rename it: alter %s public.%I rename to …;', case c.relkind
          when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence' when 'i' then 'index' when 'I' then 'index'
          when 'c' then 'type' when 'f' then 'foreign table' else 'table' end, c.relname) as cure
      from pg_class c
      where c.relnamespace = 'public'::regnamespace and c.relname = any (v_relations)
      union all
      select format('public.%I', t.typname), false,
        format('Rename it: alter %s public.%I rename to …;', case t.typtype when 'd' then 'domain' else 'type' end, t.typname)
      from pg_type t
      where t.typnamespace = 'public'::regnamespace and t.typrelid = 0 and t.typname = any (v_relations || v_adopted)
      union all
      -- Of any signature: a call that meant theirs could become ambiguous, or reach ours.
      select format('public.%I(%s)', p.proname, oidvectortypes(p.proargtypes)), coalesce(
          v_ours and starts_with(coalesce(obj_description(p.oid, 'pg_proc'), ''), v_marker) and p.proowner = v_owner, false),
        format('Rename it: alter %s public.%I(%s) rename to …;', case p.prokind
          when 'p' then 'procedure' when 'a' then 'aggregate' else 'function' end, p.proname, oidvectortypes(p.proargtypes))
      from pg_proc p
      where p.pronamespace = 'public'::regnamespace and p.proname = any (v_functions)
      union all
      select format('public.%I', c.relname),
        -- The specification's tables have these two.
        coalesce(i.indrelid = to_regclass('public.' || o.table_name), false)
          and (v_ours or c.relname in ('idx_runs_subject', 'idx_nodes_workflow')),
        format('Rename it: alter %s public.%I rename to …;', case c.relkind
          when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence' when 'i' then 'index' when 'I' then 'index'
          when 'c' then 'type' when 'f' then 'foreign table' else 'table' end, c.relname)
      from jsonb_each(v_indexes) as o (table_name, names)
      cross join jsonb_array_elements_text(o.names) as n (name)
      join pg_class c on c.relnamespace = 'public'::regnamespace and c.relname = n.name
      left join pg_index i on i.indexrelid = c.oid
      union all
      select format('constraint %I on %s', k.conname, k.conrelid::regclass), v_ours,
        format('Rename it: alter table %s rename constraint %I to …;', k.conrelid::regclass, k.conname)
      from pg_constraint k
      where k.conrelid = any (v_tables) and k.conname = any (v_constraints)
      union all
      select format('trigger %I on %s', t.tgname, t.tgrelid::regclass),
        v_ours and exists (select from pg_proc p where p.oid = t.tgfoid and p.pronamespace = v_schema),
        format('Rename it: alter trigger %I on %s rename to …;', t.tgname, t.tgrelid::regclass)
      from pg_trigger t
      where t.tgrelid = any (v_tables) and not t.tgisinternal and starts_with(t.tgname, 'image_jobs_')
      union all
      select format('policy %I on %s', p.polname, p.polrelid::regclass), v_ours,
        format('Rename it: alter policy %I on %s rename to …;', p.polname, p.polrelid::regclass)
      from pg_policy p
      where p.polrelid = any (v_tables || to_regclass('realtime.messages')::oid || to_regclass('storage.objects')::oid) and p.polname = any (v_policies)
    ) f
    where not f.ours);

  perform set_config('image_jobs.differences', v_found::text, true);
  -- Grants to others on these stay; on what is made now, default privileges of the owner's do not.
  perform set_config('image_jobs.adopted', coalesce((
    select string_agg(c.relname, ',') from pg_class c where c.oid = any (v_tables)), ''), true);
end
$compare$;
