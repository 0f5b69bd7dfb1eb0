-- Everything: `sql/schema`, in one file that runs on a new database, and on one that has tables of these names.
-- By whatever tool it is run, it is one statement: where it is refused, nothing of it has happened, also under a psql
-- that goes on after an error. Its version, or a later one, in the ledger image_jobs.migrations: it changes nothing.

do $migration_0001$
declare
  v_version constant text := '0001';
  -- Of what is run, so that no tool has to be told; comments and white space do not count. daemon/migrate.py does the same.
  v_hash constant text := encode(sha256(convert_to(regexp_replace(
    substring(current_query() from 'do \$migration_0001\$(.*)\$migration_0001\$'), '--[^\n]*|[ \t\r\n]+', '', 'g'), 'UTF8')), 'hex');
  v_lock_timeout constant text := current_setting('lock_timeout');
  v_other boolean;
begin
  -- Of two at once the second waits here, and then finds it done.
  perform pg_advisory_xact_lock(hashtextextended('image_jobs.migrations', 0));
  -- A schema of others of this name is refused below, whatever its comment says.
  if starts_with(coalesce(obj_description(to_regnamespace('image_jobs'), 'pg_namespace'), ''), 'Image Job Orchestrator: ')
    and to_regclass('image_jobs.claims') is not null
  then
    if to_regclass('image_jobs.migrations') is not null then
      select m.hash <> v_hash into v_other from image_jobs.migrations m where m.version = v_version;
    else
      v_other := true; -- it is from before the ledger
    end if;
    if v_other then
      raise exception using errcode = 'object_not_in_prerequisite_state',
        message = 'This database was made by another 0001 than this version''s 0001_initial.',
        hint = 'There is no release yet, so no way from one to the other: start with image-jobs dev --fresh, or migrate a new database.';
    elsif exists (select from image_jobs.migrations m where m.version >= v_version) then
      return;
    end if;
  end if;

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

-- Compare the tables that are adopted with what is needed of them: what they are, their columns, keys and rules.
-- Whatever would merely work is taken as it is: text for varchar, more columns, timestamps without a zone, indexes, policies.

do $compare$
declare
  -- Each column, and what it has to take. size: characters at least. needed: a table without it is another's, whatever its name;
  -- a column that is not needed is added. nullable: it is null for good reason in some state.
  v_columns constant text := $columns$
    runs           id              text        30 needed
    runs           kind            text         9 needed
    runs           subject_id      uuid         0 needed
    runs           status          text         9 needed
    runs           processor       text        48 -
    runs           started_at      timestamp    0 -
    runs           finished_at     timestamp    0 nullable
    runs           payload         jsonb        0 nullable
    runs           metadata        jsonb        0 -
    runs           progress        integer      0 -
    runs           priority        integer      0 -
    runs           due_at          timestamptz  0 nullable
    runs           attempt         integer      0 -
    runs           max_attempts    integer      0 -
    runs           claim           bigint       0 -
    runs           ticket          bigint       0 -
    runs           claimed_by      uuid         0 nullable
    runs           provider_job_id text       255 nullable
    runs           created_by      uuid         0 nullable
    runs           created_at      timestamp    0 -
    runs           updated_at      timestamp    0 -
    runs           message         text      1000 nullable
    runs           preview_url     text      2048 nullable
    runs           lane            text       255 -
    runs           rank            bigint       0 nullable
    runs           workflow_rank   bigint       0 nullable
    runs           submitted_at    timestamptz  0 nullable
    runs           refused_since   timestamptz  0 nullable
    runs           webhook         text         7 nullable
    runs           routed_to       text       255 nullable
    runs           call            bigint       0 nullable
    runs           unheld          boolean      0 nullable
    runs           source_workflow uuid         0 nullable
    runs           queue_state     text         7 nullable
    runs           queued_at       timestamptz  0 nullable
    runs           requeued_by     uuid         0 nullable
    run_events     id              uuid         0 needed
    run_events     run_id          text        30 needed
    run_events     ts              timestamp    0 -
    run_events     kind            text         8 needed
    run_events     payload         jsonb        0 -
    run_events     seq             bigint       0 -
    run_events     run_kind        text         9 nullable
    run_events     workflow_id     uuid         0 nullable
    workflow_nodes id              text         1 needed
    workflow_nodes workflow_id     uuid         0 needed
    workflow_nodes node_type       text         1 -
    workflow_nodes node_data       jsonb        0 needed
    workflow_nodes position        jsonb        0 -
    workflow_nodes created_at      timestamp    0 -
    workflow_nodes updated_at      timestamp    0 -
    workflow_nodes version         bigint       0 -
    workflow_nodes run_ticket      bigint       0 nullable
    workflow_nodes pinned_run      text         0 nullable
  $columns$;
  v_bypass boolean := (select r.rolsuper or r.rolbypassrls from pg_roles r where r.rolname = current_user);
  v_found jsonb := coalesce(nullif(current_setting('image_jobs.differences', true), ''), '[]');
begin
  v_found := v_found || (
    with t as (
      select c.*, format('public.%I', c.relname) as name,
        format('Or rename the table (alter table public.%I rename to …): another is made then.', c.relname) as rename
      from pg_class c
      where c.relnamespace = 'public'::regnamespace and c.relname in ('runs', 'run_events', 'workflow_nodes')
    ),
    column_types as (
      select w.table_name, w.column_name, w.family, w.size, w.trait, a.attnum, a.attnotnull, a.attgenerated, a.attidentity, a.atthasdef,
        t.name, t.rename, format_type(a.atttypid, a.atttypmod) as declared, base.typname, base.typmod, base.typnamespace,
        a.attcollation, base.strict_domain,
        case w.family when 'timestamp' then 'timestamptz' else w.family end as wanted
      from regexp_split_to_table(btrim(v_columns, E' \n'), E'\n') as line
      cross join lateral (
        select p.part[1] as table_name, p.part[2] as column_name, p.part[3] as family, p.part[4]::int as size, p.part[5] as trait
        from regexp_split_to_array(btrim(line), ' +') as p (part)
      ) w
      join t on t.relname = w.table_name and t.relkind = 'r'
      left join pg_attribute a on a.attrelid = t.oid and a.attname = w.column_name and not a.attisdropped and a.attnum > 0
      left join lateral (
        with recursive of (id, typmod) as (
          select a.atttypid, a.atttypmod
          union all
          select d.typbasetype, d.typtypmod from of join pg_type d on d.oid = of.id and d.typtype = 'd'
        )
        select b.typname, of.typmod, b.typnamespace,
          (select d.oid::regtype from of over_it join pg_type d on d.oid = over_it.id where d.typnotnull limit 1) as strict_domain
        from of join pg_type b on b.oid = of.id and b.typtype <> 'd'
      ) base on a.attnum is not null
    ),
    judged as (
      select k.*, coalesce(k.typnamespace = 'pg_catalog'::regnamespace and k.typname::text = any (case k.family
        when 'text' then array['text', 'varchar'] when 'timestamp' then array['timestamptz', 'timestamp']
        when 'integer' then array['int4', 'int2'] when 'bigint' then array['int8'] when 'boolean' then array['bool']
        else array[k.family] end), false) as fits
      from column_types k
    )
    select coalesce(jsonb_agg(jsonb_build_array(d.sentence, d.cure) order by d.rank, d.sentence), '[]')
    from (
      -- Its kind.
      select 1 as rank, format('%s is %s, and has to be an ordinary table.', t.name, case t.relkind
          when 'v' then 'a view' when 'm' then 'a materialized view' when 'p' then 'partitioned' when 'f' then 'a foreign table'
          when 'S' then 'a sequence' when 'c' then 'a composite type' else 'an index' end) as sentence,
        format('Rename it (alter %s %s rename to …): a table is made then.', case t.relkind
          when 'v' then 'view' when 'm' then 'materialized view' when 'f' then 'foreign table' when 'S' then 'sequence'
          when 'c' then 'type' when 'p' then 'table' else 'index' end, t.name) as cure
      from t where t.relkind <> 'r'
      union all
      select 2, format('%s belongs to %s, and %s may not change it.', t.name, t.relowner::regrole, current_user),
        format('Let its owner run: alter table %s owner to %I;', t.name, current_user)
      from t where t.relkind = 'r' and not pg_has_role(t.relowner, 'usage')
      union all
      select 2, format('%s is part of a hierarchy of tables, by inheritance or as a partition.', t.name), 'Make it a table of its own. ' || t.rename
      from t where t.relkind = 'r' and (t.relispartition or exists (
        select from pg_inherits i where t.oid in (i.inhparent, i.inhrelid)))
      union all
      select 2, format('%s is unlogged: a crash of the server empties it.', t.name), format('Run: alter table %s set logged;', t.name)
      from t where t.relkind = 'r' and t.relpersistence = 'u'
      union all
      select 2, format('%s is a typed table, which can get no columns.', t.name), format('Run: alter table %s not of;', t.name)
      from t where t.relkind = 'r' and t.reloftype <> 0
      union all
      select 2, format('%s forces row level security on its owner, and %s cannot bypass it.', t.name, current_user),
        format('Run: alter table %s no force row level security;', t.name)
      from t where t.relkind = 'r' and t.relforcerowsecurity and not v_bypass
      union all
      select 2, format('The rule %I rewrites what is written to %s.', r.rulename, t.name),
        format('Make it a trigger that leaves rows of kind image_gen alone, then: drop rule %I on %s;', r.rulename, t.name)
      from t join pg_rewrite r on r.ev_class = t.oid where t.relkind = 'r'
      union all
      -- Keys.
      -- Who writes a row that may be there already has to know at once.
      select 3, format('Nothing makes the ids of %s unique%s.', t.name, ' before the end of a transaction: ' || late.key || ' is deferrable'),
        case when late.key is null then format('Run: alter table %s add primary key (id);', t.name)
          else format('Run: alter table %s drop constraint %s, add %s (id);', t.name, late.key, late.what) end
      from t
      left join lateral (
        select quote_ident(k.conname) as key, case k.contype when 'p' then 'primary key' else 'unique' end as what
        from pg_constraint k join pg_attribute a on a.attrelid = t.oid and a.attnum = k.conkey[1]
        where k.conrelid = t.oid and k.contype in ('p', 'u') and k.condeferrable and cardinality(k.conkey) = 1 and a.attname = 'id'
        order by k.contype limit 1
      ) late on true
      where t.relkind = 'r'
        and exists (select from pg_attribute a where a.attrelid = t.oid and a.attname = 'id' and not a.attisdropped)
        and not exists (
          select from pg_index i join pg_attribute a on a.attrelid = t.oid and a.attnum = i.indkey[0]
          where i.indrelid = t.oid and i.indisunique and i.indimmediate and i.indisvalid and i.indpred is null
            and i.indnkeyatts = 1 and a.attname = 'id')
      union all
      select 3, format('%s has no primary key, so Realtime could not publish its changes.', t.name),
        format('Run: alter table %s add primary key (id);', t.name)
      from t
      where t.relkind = 'r' and t.relname = 'workflow_nodes' and t.relreplident in ('d', 'n')
        and not exists (select from pg_index i where i.indrelid = t.oid and i.indisprimary)
        and exists (select from pg_index i where i.indrelid = t.oid and i.indisunique)
      union all
      select 3, format('%s has no replica identity, so none of its rows could be changed once Realtime publishes them.', t.name),
        format('Run: alter table %s replica identity default;', t.name)
      from t where t.relkind = 'r' and t.relname = 'workflow_nodes' and t.relreplident = 'n'
      union all
      -- Columns.
      select 4, format('%s has no column %s%s.', k.name, k.column_name, coalesce((
          select format(', though it has %I', like_it.attname) from pg_attribute like_it
          where like_it.attrelid = k.name::regclass and like_it.attnum > 0 and not like_it.attisdropped
            and lower(replace(like_it.attname, '_', '')) = replace(k.column_name, '_', '') limit 1), '')),
        case when exists (
          select from pg_attribute like_it where like_it.attrelid = k.name::regclass and like_it.attnum > 0 and not like_it.attisdropped
            and lower(replace(like_it.attname, '_', '')) = replace(k.column_name, '_', ''))
          then format('Rename that to %I. ', k.column_name) || k.rename
          else format('Add it (%I %s). ', k.column_name, k.wanted) || k.rename end
      from judged k where k.attnum is null and k.trait = 'needed'
      union all
      select 5, format('%s.%I is of type %s, and has to be %s.', k.name, k.column_name, k.declared, k.wanted),
        format('Run: alter table %s alter column %I type %s using %I::%s; (and alike for what refers to it). ',
          k.name, k.column_name, k.wanted, k.column_name, k.wanted) || k.rename
      from judged k where k.attnum is not null and not k.fits
      union all
      select 5, format('%s.%I is of type %s, and has to take %s characters.', k.name, k.column_name, k.declared, k.size),
        format('Run: alter table %s alter column %I type text;', k.name, k.column_name)
      from judged k where k.fits and k.typname = 'varchar' and k.typmod between 4 and k.size + 3
      union all
      select 5, format('%s.%I compares texts by a nondeterministic collation.', k.name, k.column_name),
        format('Run: alter table %s alter column %I type text collate "C";', k.name, k.column_name)
      from judged k join pg_collation c on c.oid = k.attcollation where k.fits and not c.collisdeterministic
      union all
      select 5, format('%s.%I is generated from other columns, and has to take what is written.', k.name, k.column_name),
        format('Run: alter table %s alter column %I drop expression; or rename the column.', k.name, k.column_name)
      from judged k where k.attgenerated <> ''
      union all
      select 5, format('%s.%I numbers itself, and has to take what is written.', k.name, k.column_name),
        format('Run: alter table %s alter column %I drop identity, alter column %I drop not null;', k.name, k.column_name, k.column_name)
      from judged k where k.attidentity <> ''
      union all
      select 6, format('%s.%I is NOT NULL, and is null in some states of an image run.', k.name, k.column_name),
        format('Run: alter table %s alter column %I drop not null;', k.name, k.column_name)
      from judged k where k.attnotnull and k.trait = 'nullable'
      union all
      select 6, format('%s.%I is of the domain %s, which is NOT NULL, and is null in some states of an image run.',
          k.name, k.column_name, k.strict_domain),
        format('Run: alter domain %s drop not null;', k.strict_domain)
      from judged k where k.strict_domain is not null and k.trait = 'nullable'
      union all
      -- Theirs. Nodes are inserted by the application alone; a trigger of theirs may fill in the column, which the probe shows.
      select 6, format('%s.%I is NOT NULL without a default, so no run of ours can be inserted.', t.name, a.attname),
        format('Give it a default (alter table %s alter column %I set default …), or: alter table %s alter column %I drop not null;',
          t.name, a.attname, t.name, a.attname)
      from t join pg_attribute a on a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped
      join pg_type y on y.oid = a.atttypid
      where t.relkind = 'r' and t.relname <> 'workflow_nodes' and (a.attnotnull or y.typnotnull) and not a.atthasdef
        and y.typdefault is null and a.attidentity = ''
        and not exists (
          select from judged k where k.table_name = t.relname
            and (k.column_name = a.attname or k.attnum is null and replace(k.column_name, '_', '') = lower(replace(a.attname, '_', ''))))
        and not exists (
          select from pg_trigger g where g.tgrelid = t.oid and not g.tgisinternal and not starts_with(g.tgname, 'image_jobs_')
            and g.tgtype & 1 = 1 and g.tgtype & 2 = 2 and g.tgtype & 4 = 4)
    ) d);
  perform set_config('image_jobs.differences', v_found::text, true);
end
$compare$;

-- Compare the rules of adopted tables with the rows that they will get: checks, unique indexes and foreign keys of the
-- application, each tried on a row in every state that is made up here. What cannot be judged so, the probe at the end of
-- the migration tries.

do $compare$
declare
  v_found jsonb := coalesce(nullif(current_setting('image_jobs.differences', true), ''), '[]');
  v_table record;
  v_rule record;
  v_rows text;
  v_refused text[];
  v_states text[];
begin
  for v_table in
    select c.oid, c.relname, format('public.%I', c.relname) as name from pg_class c
    where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and c.relname in ('runs', 'run_events')
    order by c.relname desc
  loop
    v_states := case v_table.relname when 'runs' then array['pending', 'running', 'completed', 'failed', 'cancelled']
      else array['log', 'progress', 'error', 'webhook'] end;
    -- Two rows of one workflow for each state, and each processor that may do. Columns of theirs have their defaults.
    select format('select %s, "~state", "~n", "~processor" from unnest(%L::text[]) as "~s" ("~state") '
        'cross join generate_series(1, 2) as "~g" ("~n") cross join unnest(array[''openai:gpt-image-2'', '
        '''google:gemini-3-pro-image'', ''stability:core'', ''midjourney:v7'', ''demo:painter'']) as "~p" ("~processor")',
        string_agg(format('(%s)::%s as %I', coalesce(
          case v_table.relname || '.' || a.attname
            when 'runs.kind' then '''image_gen'''
            when 'runs.subject_id' then '''00000000-0000-4000-8000-000000000000'''
            when 'runs.status' then '"~state"'
            when 'runs.processor' then '"~processor"'
            when 'runs.started_at' then 'now() + "~n" * interval ''1 ms'''
            when 'runs.finished_at' then 'case when "~state" in (''completed'', ''failed'', ''cancelled'') then now() + "~n" * interval ''1 ms'' end'
            when 'runs.payload' then 'case "~state" when ''completed'' then ''{"imageUrl": "https://example.com/a.png", "cost": 0.04}'' '
              'when ''failed'' then ''{"error": "No.", "code": "refused", "hint": "Ask again."}'' end'
            when 'runs.metadata' then '''{"nodeId": "node", "promptSpec": {"basePrompt": "a red fox"}}'''
            when 'runs.progress' then 'case "~state" when ''pending'' then 0 when ''completed'' then 100 else 50 end'
            when 'runs.priority' then '0'
            when 'runs.attempt' then 'case "~state" when ''pending'' then 0 else 1 end'
            when 'runs.max_attempts' then '3'
            when 'runs.claim' then '"~n"'
            when 'runs.ticket' then '"~n"'
            when 'runs.created_at' then 'now()'
            when 'runs.updated_at' then 'now()'
            when 'runs.lane' then 'split_part("~processor", '':'', 1)'
            when 'runs.queue_state' then 'case when "~state" in (''pending'', ''running'') then "~state" end'
            when 'run_events.id' then 'gen_random_uuid()'
            when 'run_events.run_id' then '''job_1732770000000_0a1b2c3d4e5f'''
            when 'run_events.kind' then '"~state"'
            when 'run_events.payload' then '''{"event": "created", "message": "Waiting in line.", "progress": 0, "data": {}}'''
            when 'run_events.seq' then '"~n"'
            when 'run_events.run_kind' then '''image_gen'''
            when 'run_events.workflow_id' then '''00000000-0000-4000-8000-000000000000'''
          end,
          -- A number of a sequence is not drawn for this.
          case when a.attidentity <> '' or pg_get_expr(d.adbin, d.adrelid) like '%nextval(%' then '"~n"'
            when a.attgenerated = '' then pg_get_expr(d.adbin, d.adrelid) end,
          case v_table.relname || '.' || a.attname
            when 'runs.id' then '''job_1732770000000_0a1b2c3d4e5'' || "~n"'
            when 'run_events.ts' then 'clock_timestamp()' end,
          'null'), format_type(a.atttypid, a.atttypmod), a.attname), ', ' order by a.attnum), v_states)
    into v_rows
    from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where a.attrelid = v_table.oid and a.attnum > 0 and not a.attisdropped;

    for v_rule in
      select k.conname, pg_get_expr(k.conbin, k.conrelid) as expression from pg_constraint k
      where k.conrelid = v_table.oid and k.contype = 'c' and coalesce((to_jsonb(k) ->> 'conenforced')::boolean, true)
        and pg_get_expr(k.conbin, k.conrelid) !~ 'image_jobs\.has_base64'
      order by k.conname
    loop
      begin
        execute format('select array_agg("~state" order by array_position(%L::text[], "~state")) from ('
          'select "~state", bool_or(coalesce((%s), true)) as "~ok" from (%s) as %I group by "~state") as "~r" where not "~ok"',
          v_states, v_rule.expression, v_rows, v_table.relname) into v_refused;
      exception when others then
        v_refused := null;  -- What is wrong with the columns is in the list already, or the probe will show it.
      end;
      if v_refused is not null then
        v_found := v_found || jsonb_build_array(jsonb_build_array(
          format('The check %I of %s refuses image %s that are %s.', v_rule.conname, v_table.name,
            case v_table.relname when 'runs' then 'runs' else 'runs'' events' end,
            case when v_refused = v_states then 'as they have to be' else array_to_string(v_refused, ', ') end),
          format('Let it leave them alone: alter table %s drop constraint %I, add constraint %I check (%s or %s) not valid;',
            v_table.name, v_rule.conname, v_rule.conname,
            case v_table.relname when 'runs' then 'kind = ''image_gen''' else 'kind in (''log'', ''progress'', ''error'', ''webhook'')' end,
            v_rule.expression)));
      end if;
    end loop;

    for v_rule in
      select c.relname as index_name, coalesce(pg_get_expr(i.indpred, i.indrelid), 'true') as predicate, i.indnullsnotdistinct,
        (select string_agg(format('(%s)', pg_get_indexdef(i.indexrelid, place, false)), ', ' order by place)
          from generate_series(1, i.indnkeyatts) place) as keys,
        (select string_agg(pg_get_indexdef(i.indexrelid, place, false), ', ' order by place)
          from generate_series(1, i.indnkeyatts) place) as columns
      from pg_index i join pg_class c on c.oid = i.indexrelid
      where i.indrelid = v_table.oid and i.indisunique and c.relname <> 'runs_idempotency'
      order by c.relname
    loop
      begin
        execute format('select array_agg("~state" order by array_position(%L::text[], "~state")) from ('
          'select "~state" from (%s) as %I where "~processor" = ''demo:painter'' and (%s) and (%L or row(%s) is not null) '
          'group by "~state", row(%s)::text having count(*) > 1) as "~r"',
          v_states, v_rows, v_table.relname, v_rule.predicate, v_rule.indnullsnotdistinct, v_rule.keys, v_rule.keys) into v_refused;
      exception when others then
        v_refused := null;
      end;
      if v_refused is not null then
        v_found := v_found || jsonb_build_array(jsonb_build_array(
          format('The unique index %I of %s allows one row for each (%s), and a workflow has many.', v_rule.index_name,
            v_table.name, v_rule.columns),
          format('Let it leave them alone: drop it, and create it again with a condition, for example where %s.',
            case v_table.relname when 'runs' then 'kind <> ''image_gen''' else 'kind not in (''log'', ''progress'', ''error'', ''webhook'')' end)));
      end if;
    end loop;

    for v_rule in
      select k.conname, k.confrelid::regclass as target, a.attname, r.attname as target_column, cardinality(k.conkey) as width
      from pg_constraint k
      join pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
      join pg_attribute r on r.attrelid = k.confrelid and r.attnum = k.confkey[1]
      where k.conrelid = v_table.oid and k.contype = 'f' and coalesce((to_jsonb(k) ->> 'conenforced')::boolean, true)
        and (a.attname in ('kind', 'status', 'processor') or a.attname = 'run_id' and v_table.relname = 'run_events')
      order by k.conname
    loop
      continue when v_rule.width > 1;
      v_refused := null;
      if v_rule.attname = 'run_id' then
        if v_rule.target <> 'public.runs'::regclass then
          v_found := v_found || jsonb_build_array(jsonb_build_array(
            format('The foreign key %I of %s wants runs to stand in %s.', v_rule.conname, v_table.name, v_rule.target),
            format('Run: alter table %s drop constraint %I;', v_table.name, v_rule.conname)));
        end if;
        continue;
      end if;
      begin
        execute format('select array_agg(w.word) from unnest(%L::text[]) as w (word) where not exists (select from %s t where t.%I::text ~ %s)',
          case v_rule.attname when 'status' then v_states when 'processor' then array['provider:model']
            else case v_table.relname when 'runs' then array['image_gen'] else v_states end end,
          v_rule.target, v_rule.target_column,
          case v_rule.attname when 'processor' then '''^[a-z0-9_-]{1,50}:[^\s:]''' else '(''^'' || w.word || ''$'')' end) into v_refused;
      exception when others then
        v_refused := null;
      end;
      if v_refused is not null then
        v_found := v_found || jsonb_build_array(jsonb_build_array(
          format('The foreign key %I of %s looks in %s, which has no %s.', v_rule.conname, v_table.name, v_rule.target,
            array_to_string(v_refused, ', ')),
          format('Add what is missing there (insert into %s), or: alter table %s drop constraint %I;', v_rule.target,
            v_table.name, v_rule.conname)));
      end if;
    end loop;
  end loop;

  perform set_config('image_jobs.differences', v_found::text, true);
end
$compare$;

-- Compare what triggers of the application make of image runs with what is written: a run in every state, and its events,
-- are tried on the tables as they are, and undone. (Where ours stand already, the probe does it.) Then refuse, if anything
-- was found, with all of it.

do $compare$
declare
  v_found jsonb := coalesce(nullif(current_setting('image_jobs.differences', true), ''), '[]');
  v_undone constant text := 'IJ091';
  v_id constant text := 'job_' || replace(gen_random_uuid()::text, '-', '');
  v_workflow constant uuid := gen_random_uuid();
  v_step record;
  v_row jsonb;
  v_trace text;
  v_message text;
  v_wrong text;
  v_culprits text;
  v_lines text;
begin
  if exists (
    select from pg_trigger t where t.tgrelid in (to_regclass('public.runs'), to_regclass('public.run_events'))
      and not t.tgisinternal and t.tgenabled <> 'D')
    and not exists (select from pg_trigger t where t.tgrelid = to_regclass('public.runs') and t.tgname = 'image_jobs_accept_run')
  then
    begin
      for v_step in
        select * from (values
          (1, 'runs', 'pending', false, 'insert into public.runs (id, kind, subject_id, status) values ($1, ''image_gen'', $2, $3)', ''),
          (2, 'runs', 'running', false, 'update public.runs set status = $3 where id = $1', ''),
          (3, 'runs', 'completed', true, 'update public.runs set status = $3, payload = ''{"imageUrl": "https://example.com/a.png"}'' where id = $1', 'imageUrl'),
          (4, 'runs', 'failed', true, 'update public.runs set status = $3, payload = ''{"error": "No."}'' where id = $1', 'error'),
          (5, 'runs', 'cancelled', true, 'update public.runs set status = $3 where id = $1', ''),
          (6, 'run_events', 'log', true, 'insert into public.run_events (id, run_id, kind, payload) values (gen_random_uuid(), $1, $3, ''{"event": "created"}'')', 'event'),
          (7, 'run_events', 'error', true, 'insert into public.run_events (id, run_id, kind, payload) values (gen_random_uuid(), $1, $3, ''{"event": "created"}'')', 'event')
        ) as step (n, table_name, state, undone, command, key) order by n
      loop
        v_wrong := null;
        v_trace := null;
        begin
          execute v_step.command using v_id, v_workflow, v_step.state;
          execute case v_step.table_name when 'runs' then 'select to_jsonb(r) from public.runs r where r.id = $1'
            else 'select to_jsonb(e) from public.run_events e where e.run_id = $1' end into v_row using v_id;
          v_wrong := case when v_row is null then 'the row'
            when v_step.table_name = 'runs' and v_row ->> 'kind' is distinct from 'image_gen' then 'kind'
            when v_step.table_name = 'runs' and v_row ->> 'subject_id' is distinct from v_workflow::text then 'subject_id'
            when v_row ->> case v_step.table_name when 'runs' then 'status' else 'kind' end is distinct from v_step.state
              then case v_step.table_name when 'runs' then 'status' else 'kind' end
            when v_step.key <> '' and not coalesce(v_row -> 'payload' ? v_step.key, false) then 'payload' end;
          if v_step.undone then
            raise exception using errcode = v_undone;
          end if;
        exception
          when sqlstate 'IJ091' then
            null;
          when others then
            get stacked diagnostics v_trace = pg_exception_context, v_message = message_text;
        end;
        -- Without a trigger's function in it, the error is of a rule that was judged already, or the probe's.
        select string_agg(distinct format('%I', t.tgname), ', ') into v_culprits
        from pg_trigger t join pg_proc p on p.oid = t.tgfoid
        where t.tgrelid = to_regclass('public.' || v_step.table_name) and not t.tgisinternal and t.tgenabled <> 'D'
          and case when v_wrong is not null then t.tgtype & 2 = 2 and t.tgtype & case when v_step.state in ('pending', 'log', 'error') then 4 else 16 end <> 0
            else position(p.proname || '(' in v_trace) > 0 end;
        if v_culprits is not null then
          v_found := v_found || jsonb_build_array(jsonb_build_array(
            case when v_wrong is not null then format('A trigger on public.%s changes %s of image %s that are %s (%s).', v_step.table_name,
                v_wrong, case v_step.table_name when 'runs' then 'runs' else 'runs'' events' end, v_step.state, v_culprits)
              else format('The trigger %s on public.%s refuses image %s that are %s: %s', v_culprits, v_step.table_name,
                case v_step.table_name when 'runs' then 'runs' else 'runs'' events' end, v_step.state, v_message) end,
            format('Let it leave them alone: create it again with when (%s).', case v_step.table_name
              when 'runs' then 'new.kind is distinct from ''image_gen''' else 'new.kind not in (''log'', ''progress'', ''error'', ''webhook'')' end)));
        end if;
        -- Without its row, or with another status, there is nothing to try the next steps on.
        exit when not v_step.undone and (v_wrong is not null or v_trace is not null) or v_culprits is not null and v_step.table_name = 'run_events';
      end loop;
      raise exception using errcode = v_undone;
    exception when sqlstate 'IJ091' then
      null;
    end;
  end if;

  perform set_config('image_jobs.differences', '', true);
  if v_found <> '[]' then
    select string_agg(format(E'- %s\n  %s', f.value ->> 0, f.value ->> 1), E'\n' order by f.place) into v_lines
    from jsonb_array_elements(v_found) with ordinality as f (value, place);
    raise exception using errcode = 'object_not_in_prerequisite_state',
      message = case jsonb_array_length(v_found) when 1 then v_found -> 0 ->> 0
        else format('%s things in this database are in the way of the Image Job Orchestrator.', jsonb_array_length(v_found)) end,
      detail = v_lines,
      hint = 'Nothing was changed. Do what the lines above say, then migrate again.';
  end if;
end
$compare$;


-- From here on as in sql/schema, but for tables that were there before.

-- Whoever waits for a lock on a table holds up all who come later.
if v_lock_timeout = '0' then
  set local lock_timeout = '5s';
end if;

-- The schema image_jobs: what the daemon calls and what clients must not see. PostgREST never exposes it.
-- Here: the clock, the sequences, and the caller's identity.

-- A plain Postgres gets the roles that a Supabase database has.
do $$
declare
  v_role text;
begin
  foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
    if not exists (select from pg_roles where rolname = v_role) then
      execute format('create role %I nologin noinherit %s', v_role, case v_role when 'service_role' then 'bypassrls' else '' end);
    end if;
  end loop;
end
$$;

create schema if not exists image_jobs;
comment on schema image_jobs is 'Image Job Orchestrator: the daemon''s side. Not exposed to the API.';

-- The ledger: each file of migrations/ writes its own row. That of the Supabase CLI is never touched.
create table if not exists image_jobs.migrations (
  version text primary key,
  name text not null,
  hash text,
  applied_at timestamptz not null default now()
);
comment on table image_jobs.migrations is 'The migrations that have run here, by whatever tool.';
comment on column image_jobs.migrations.hash is 'SHA-256 of the file''s block, without comments and white space.';

-- One sequence for all claims (the fencing tokens): a number is never used twice, so an old holder never passes for the new one.
create sequence if not exists image_jobs.claims;
-- The newest ticket of a node's runs owns the node. Equal timestamps and commit order decide nothing.
create sequence if not exists image_jobs.tickets;
-- Versions of nodes only grow, over all nodes: a client merges by them.
create sequence if not exists image_jobs.node_versions;
-- Number events: the audit trail is read by them.
create sequence if not exists image_jobs.event_numbers;

-- Functions that return a value are plpgsql, also where they are one expression: with a search_path of its own none is inlined
-- (and without one Supabase's advisors warn of it), and then plpgsql takes a third of the time.

-- The one clock. Tests move it by the session's setting image_jobs.clock_offset; nothing ever sleeps.
create or replace function image_jobs.now()
returns timestamptz language plpgsql volatile parallel safe set search_path = ''
as $$
begin
  return case when current_setting('image_jobs.clock_offset', true) <> ''
    then clock_timestamp() + current_setting('image_jobs.clock_offset')::interval
    else clock_timestamp() end;
end
$$;

-- Returns the signed-in user, from the JWT that PostgREST has verified; null for anon, for servers, and for an id that is no uuid.
create or replace function image_jobs.current_user_id()
returns uuid language plpgsql stable set search_path = ''
as $$
declare
  v_claims text := nullif(current_setting('request.jwt.claims', true), '');
  v_sub text;
begin
  v_sub := coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''), v_claims::jsonb ->> 'sub');
  return v_sub::uuid;
exception when invalid_text_representation then
  return null;
end
$$;

-- Returns whether the session acts for an operator (owner, superuser, service_role) and not for an end user.
-- Reads the role that was set, because inside a security definer function, as this one is, current_user is the owner.
create or replace function image_jobs.is_operator()
returns boolean language plpgsql stable security definer set search_path = ''
as $$
declare
  v_role name := case current_setting('role') when 'none' then session_user else current_setting('role') end;
begin
  -- Superusers have every role.
  if pg_has_role(v_role, current_user, 'usage') then
    return true;
  end if;
  return exists (select from pg_catalog.pg_roles r where r.rolname = v_role and r.rolbypassrls);
end
$$;

-- Refuse a user whom no uuid names: there is nobody who could become a member of a workflow.
create or replace function image_jobs.refuse_nameless()
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = '42501', message = 'Your token names no user: its claim sub is not a uuid.',
    hint = 'Sign in with Supabase Auth, or have the token carry a uuid as sub; ids of Clerk or Firebase are none.';
end
$$;

-- Refuse bad input: 22023, which PostgREST returns as 400, with a sentence and a cure.
create or replace function image_jobs.refuse(p_message text, p_hint text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = '22023', message = p_message, hint = p_hint;
end
$$;

-- Never base64 in the database: the rule behind every check constraint whose name contains `base64`.

-- Returns true if a column's value holds an embedded file. That is:
--   any `data:…;base64,` in any case; or
--   more than 1,024 characters in total of tokens of at least 60 characters in either base64 alphabet, keys included,
--   where http(s) URLs of up to 2,048 characters are not counted.
-- Works on the text of the value with its escape sequences blanked, which is every key and every string in one piece.
create or replace function image_jobs.has_base64(p_value jsonb)
returns boolean language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_text text := p_value::text;
  v_total bigint;
begin
  -- All that most values cost.
  if v_text is null or length(v_text) <= 1024 and v_text not like '%64,%' then
    return false;
  end if;
  if v_text ~* 'data:[^,]*;base64,' then
    -- Within one string: a key and its value do not make a file between them.
    v_text := regexp_replace(v_text, '\\(u[0-9a-f]{4}|.)', ' ', 'g');
    if v_text ~* 'data:[^,"]*;base64,' then
      return true;
    end if;
  end if;
  -- The second condition costs a twentieth of what follows: 1 MiB of short URLs took 0.4 s.
  if length(v_text) <= 1024 or v_text !~ '[A-Za-z0-9+/_-]{60}' then
    return false;
  end if;
  -- chr(1) cannot stand in the text of a jsonb value, so it can fence the URLs: every second piece is one.
  -- (Blanks are the only white space left in it. \s would ask the collation about others.)
  v_text := regexp_replace(v_text, '\\(u[0-9a-f]{4}|.)', ' ', 'g');
  v_text := regexp_replace(v_text, 'https?://[^ "<>]+', chr(1) || '\&' || chr(1), 'gi');
  select coalesce(sum(length(token[1])), 0) into v_total
  from string_to_table(v_text, chr(1)) with ordinality as piece (content, place)
  cross join lateral regexp_matches(piece.content, '([A-Za-z0-9+/]{60,}={0,2}|[A-Za-z0-9_-]{60,}={0,2})', 'g') as token
  where piece.place % 2 = 1 or length(piece.content) > 2048;
  return v_total > 1024;
end
$$;
comment on function image_jobs.has_base64(jsonb) is 'Whether a jsonb value embeds a file as base64.';

-- All at once, and events first, as whoever writes an event does: else each would wait for the other.
if to_regclass('public.run_events') is not null and to_regclass('public.runs') is not null then
  lock table public.run_events in access exclusive mode;
  lock table public.runs in access exclusive mode;
end if;

-- runs: one row, one request for an image. The table is shared with other orchestrators:
-- rows of another kind are never touched, which is why every check begins with the kind.

-- Returns true, or raises the rule that a run of ours breaks, by its name. Called by the triggers after each statement and not by a
-- check: a statement about rows of other kinds reads the text of each check anew, 12 µs for one that names ten columns.
create or replace function image_jobs.is_sound(
  p_id varchar, p_status varchar, p_finished_at timestamptz, p_claimed_by uuid, p_payload jsonb, p_progress integer, p_webhook text,
  p_ticket bigint, p_queue_state text)
returns boolean language plpgsql immutable set search_path = ''
as $$
declare
  -- Null: older than the migration.
  v_ours boolean := p_ticket is not null;
  v_rule text := case
    -- Not as {1,200}: a count in an expression makes it ten times as slow.
    when p_id ~ '[^A-Za-z0-9_-]' or length(p_id) not between 1 and 200 then 'runs_id_is_safe_in_a_path'
    when v_ours and p_status not in ('pending', 'running', 'completed', 'failed', 'cancelled') then 'runs_status_is_known'
    when v_ours and (p_finished_at is null) <> (p_status in ('pending', 'running')) then 'runs_finished_at_only_when_terminal'
    when p_claimed_by is not null and p_status <> 'running' then 'runs_held_only_while_running'
    when v_ours and p_status = 'completed' and p_payload ->> 'imageUrl' is null then 'runs_image_when_completed'
    when v_ours and p_status = 'failed' and p_payload ->> 'error' is null then 'runs_reason_when_failed'
    when p_progress not between 0 and 100 then 'runs_progress_is_a_percentage'
    when p_webhook not in ('awaited', 'came') then 'runs_webhook_is_awaited_or_came'
    when v_ours and p_queue_state is distinct from case when p_status in ('pending', 'running') then p_status end
      then 'runs_queue_state_is_the_status'
  end;
begin
  if v_rule is not null then
    raise exception using errcode = '23514', schema = 'public', table = 'runs', constraint = v_rule,
      message = format('The image run %s breaks the rule %s.', left(p_id, 200), v_rule);
  end if;
  return true;
end
$$;

do $$
declare
  v_writer text;
begin
  if to_regclass('public.runs') is null then
    create table public.runs (
      id varchar primary key
        default 'job_' || floor(extract(epoch from clock_timestamp()) * 1000)::bigint
          || '_' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 12),
      kind varchar not null,
      subject_id uuid not null,
      status varchar not null,
      processor varchar,
      started_at timestamptz default now(),
      finished_at timestamptz,
      payload jsonb,
      metadata jsonb,
      progress integer,
      priority integer,
      due_at timestamptz,
      attempt integer,
      max_attempts integer,
      claim bigint,
      ticket bigint,
      claimed_by uuid,
      provider_job_id text,
      created_by uuid,
      created_at timestamptz,
      updated_at timestamptz,
      message text,
      preview_url text,
      lane text,
      rank bigint,
      workflow_rank bigint,
      submitted_at timestamptz,
      refused_since timestamptz,
      webhook text,
      routed_to varchar,
      call bigint,
      unheld boolean,
      source_workflow uuid,
      queue_state text,
      queued_at timestamptz,
      requeued_by uuid
    );
    -- Older Supabase projects grant everything on a new table to the API roles.
    revoke all on public.runs from public, anon, authenticated, service_role;
  else
    -- It was there before. Our checks and policies are evaluated with the rights of whoever comes.
    for v_writer in
      select g.grantee from information_schema.role_table_grants g
      where g.table_schema = 'public' and g.table_name = 'runs'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') and g.grantee <> 'PUBLIC'
      union
      select g.grantee from information_schema.column_privileges g
      where g.table_schema = 'public' and g.table_name = 'runs'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE') and g.grantee <> 'PUBLIC'
    loop
      execute format('grant execute on function image_jobs.has_base64(jsonb) to %I', v_writer);
    end loop;
    -- Without row level security its rows were open to whoever held grants; those that are not ours stay so.
    if not (select c.relrowsecurity from pg_class c where c.oid = 'public.runs'::regclass) then
      drop policy if exists "Rows of other kinds stay as open as they were" on public.runs;
      create policy "Rows of other kinds stay as open as they were" on public.runs
        using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
    end if;
  end if;
end
$$;
-- A table that was there before lacks these.
alter table public.runs
  add column if not exists processor varchar,
  add column if not exists started_at timestamptz,
  add column if not exists finished_at timestamptz,
  add column if not exists payload jsonb,
  add column if not exists metadata jsonb,
  add column if not exists progress integer,
  add column if not exists priority integer,
  add column if not exists due_at timestamptz,
  add column if not exists attempt integer,
  add column if not exists max_attempts integer,
  add column if not exists claim bigint,
  add column if not exists ticket bigint,
  add column if not exists claimed_by uuid,
  add column if not exists provider_job_id text,
  add column if not exists created_by uuid,
  add column if not exists created_at timestamptz,
  add column if not exists updated_at timestamptz,
  add column if not exists message text,
  add column if not exists preview_url text,
  add column if not exists lane text,
  add column if not exists rank bigint,
  add column if not exists workflow_rank bigint,
  add column if not exists submitted_at timestamptz,
  add column if not exists refused_since timestamptz,
  add column if not exists webhook text,
  add column if not exists routed_to varchar,
  add column if not exists call bigint,
  add column if not exists unheld boolean,
  add column if not exists source_workflow uuid,
  add column if not exists queue_state text,
  add column if not exists queued_at timestamptz,
  add column if not exists requeued_by uuid;
-- A default of its own stays.
do $$
begin
  if not (select a.atthasdef from pg_attribute a where a.attrelid = 'public.runs'::regclass and a.attname = 'id') then
    alter table public.runs alter column id set default 'job_' || floor(extract(epoch from clock_timestamp()) * 1000)::bigint
      || '_' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 12);
  end if;
  if not (select a.atthasdef from pg_attribute a where a.attrelid = 'public.runs'::regclass and a.attname = 'started_at') then
    alter table public.runs alter column started_at set default now();
  end if;
end
$$;

alter table public.runs
  drop constraint if exists runs_payload_holds_no_base64,
  drop constraint if exists runs_metadata_holds_no_base64;
alter table public.runs
  add constraint runs_payload_holds_no_base64
    check (kind is distinct from 'image_gen' or not image_jobs.has_base64(payload)) not valid,
  add constraint runs_metadata_holds_no_base64
    check (kind is distinct from 'image_gen' or not image_jobs.has_base64(metadata)) not valid;

-- What was there before keeps its own comments.
do $$
begin
  if obj_description('public.runs'::regclass, 'pg_class') is null then
    comment on table public.runs is 'One row, one request for an image (kind image_gen); other kinds belong to others.';
  end if;
  if col_description('public.runs'::regclass, (
    select a.attnum from pg_attribute a where a.attrelid = 'public.runs'::regclass and a.attname = 'subject_id')) is null
  then
    comment on column public.runs.subject_id is 'The workflow''s id.';
  end if;
  if col_description('public.runs'::regclass, (
    select a.attnum from pg_attribute a where a.attrelid = 'public.runs'::regclass and a.attname = 'processor')) is null
  then
    comment on column public.runs.processor is 'provider:model as asked for; never changes.';
  end if;
  if col_description('public.runs'::regclass, (
    select a.attnum from pg_attribute a where a.attrelid = 'public.runs'::regclass and a.attname = 'started_at')) is null
  then
    comment on column public.runs.started_at is 'Latest start of work; until then the insert time.';
  end if;
  if col_description('public.runs'::regclass, (
    select a.attnum from pg_attribute a where a.attrelid = 'public.runs'::regclass and a.attname = 'payload')) is null
  then
    comment on column public.runs.payload is 'Ours: the result, or the reason.';
  end if;
end
$$;
comment on column public.runs.metadata is 'The caller''s: nodeId, promptSpec and anything else.';
comment on column public.runs.due_at is 'The one clock: scheduled start, back-off, next check. Null while held or terminal.';
comment on column public.runs.claim is 'Fencing token: new at each claim and each outside change of status, never reused.';
comment on column public.runs.ticket is 'Generation, drawn at insert and requeue; a node''s highest owns it. Null: older than the migration.';
comment on column public.runs.claimed_by is 'The daemon that holds the run; null while running means parked at the provider.';
comment on column public.runs.message is 'What the run does or waits for, for the person at the canvas.';
comment on column public.runs.lane is 'Queue key: a provider, or provider:model where that model has a limit.';
comment on column public.runs.rank is 'Place in the lane, interleaving users. Null while it is not due.';
comment on column public.runs.workflow_rank is 'Place among the runs of its user in the lane, interleaving workflows.';
comment on column public.runs.submitted_at is 'When the provider accepted the job that provider_job_id names.';
comment on column public.runs.refused_since is 'Since when the provider has refused requests without charge; their attempts come back for a while.';
comment on column public.runs.webhook is
  'Of a parked run: awaited until its next check, or came, which made the check due. Null: it is polled.';
comment on column public.runs.routed_to is 'The step of metadata.fallback that the next attempt goes to, or the last went to. Null: processor.';
comment on column public.runs.call is 'Of a run with a provider job: the claim under which that was made, which is the id of its call.';
comment on column public.runs.unheld is 'A daemon has given it back as unheld since the last requeue: the next time costs an attempt.';
comment on column public.runs.queued_at is 'Insert, or the latest requeue: its times are counted from then.';
comment on column public.runs.requeued_by is
  'The member who requeued it last, if not its creator: what it uses since counts as that member''s.';
comment on column public.runs.source_workflow is
  'Of the picture that promptSpec.previousImage named at insert, where it lies in storage: one that the creator may see.';
comment on column public.runs.queue_state is
  'The status while that is pending or running, else null. What indexes name instead: other kinds change theirs beside them.';

-- On large tables `image-jobs migrate` makes these itself, afterwards and concurrently (daemon/indexes.py).
if current_setting('image_jobs.indexes', true) is distinct from 'later' then
create index if not exists idx_runs_subject on public.runs (subject_id, kind);
-- The newest of a workflow, for clients. The members' policy implies the condition; where rows of other kinds are open, clients
-- name the kind, else all that the workflow has is sorted: in the index, those cost their writers a third more. None stands in
-- the order of time alone: a query for the newest would walk it past everybody else's.
create index if not exists runs_of_a_workflow on public.runs (subject_id, created_at) where kind = 'image_gen';
-- Where statistics say "pages, but no rows" (analyzed while empty), all plans cost nothing, and any of them may be taken, however
-- much is inserted since. So what is looked up by a key can be looked up only: joins say `= any (array[key])`, by which nothing is
-- merged or hashed; conditions beside a key that are in another index say `(...) is true`, which no index reads; and where rows
-- are walked in the sequence of an index, enable_sort is off.
-- Of the partial ones each names first what is null in rows of other kinds, which are written without a look at the rest.
-- The claim walks this one and nothing else.
create index if not exists runs_ready on public.runs (lane, priority, rank, ticket)
  where queue_state = 'pending' and rank is not null;
-- And this one while a model of the lane is blocked.
create index if not exists runs_ready_by_name on public.runs (lane, priority, (coalesce(routed_to, processor)), rank, ticket)
  where queue_state = 'pending' and rank is not null;
create index if not exists runs_delayed on public.runs (due_at)
  where queue_state = 'pending' and rank is null;
-- Parked runs by the time of their next check; held ones have no due_at and stand at the end.
create index if not exists runs_running on public.runs (lane, due_at)
  where queue_state = 'running';
create index if not exists runs_held on public.runs (claimed_by) where claimed_by is not null;
-- Places of a user, and of one of the user's workflows; what operators insert for nobody counts by its workflow.
-- Only a query that names a user implies the last condition: without statistics others would take one of these for runs_ready.
create index if not exists runs_last_in_line on public.runs ((coalesce(created_by, subject_id)), lane, priority, rank)
  where rank is not null and coalesce(created_by, subject_id) is not null;
create index if not exists runs_last_of_workflow
  on public.runs ((coalesce(created_by, subject_id)), subject_id, lane, priority, workflow_rank)
  where kind = 'image_gen' and coalesce(created_by, subject_id) is not null;
create index if not exists runs_waiting_of_user
  on public.runs ((coalesce(created_by, subject_id)), (num_nulls(rank)), lane, priority, workflow_rank, ticket)
  where queue_state = 'pending' and coalesce(created_by, subject_id) is not null;
-- Which runs start from pictures of a workflow: those are not pruned.
create index if not exists runs_that_refine on public.runs (source_workflow)
  where queue_state is not null and source_workflow is not null;
-- Runs that count on who requeued them, beside those that the user has made.
create index if not exists runs_requeued_by on public.runs (requeued_by, queue_state)
  where requeued_by is not null;
create index if not exists runs_node on public.runs ((metadata ->> 'nodeId'), subject_id, ticket)
  where ticket is not null;
-- Ended runs, for operators: a run ends soon after its last claim. By columns of ours alone, so that others' updates stay HOT.
create index if not exists runs_ended_by_claim on public.runs (claim)
  where queue_state is null and ticket is not null;
-- And what is older than the migration, which may hold what is forbidden by now.
create index if not exists runs_from_before on public.runs (id)
  where ticket is null and kind = 'image_gen';
create unique index if not exists runs_idempotency
  on public.runs (created_by, subject_id, (metadata ->> 'idempotencyKey')) nulls not distinct
  where ticket is not null and kind = 'image_gen' and metadata ->> 'idempotencyKey' is not null;
end if;

alter table public.runs set (
  fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05
);

-- Membership of workflows. An application with its own workflows table replaces image_jobs.my_workflows.

create table if not exists public.workflow_members (
  workflow_id uuid not null,
  user_id uuid not null,
  created_at timestamptz not null default now(),
  primary key (workflow_id, user_id)
);
comment on table public.workflow_members is 'Image Job Orchestrator: who may see and use a workflow. The first to use a new id becomes its member.';
create index if not exists workflow_members_of_a_user on public.workflow_members (user_id, workflow_id);

-- Every workflow id that a row has ever used, also after its rows are gone: an id can be founded only once.
create table if not exists image_jobs.workflows (
  id uuid primary key,
  first_used_at timestamptz not null default now()
);
comment on table image_jobs.workflows is 'Workflow ids that have been used; the first user of a new one becomes its member.';

-- Returns the ids of the workflows that the signed-in user may see and use. The one place that decides; it fails closed.
-- Volatile, because the very insert that founds a workflow is checked by it: a stable function would not yet see the
-- membership that the insert's own trigger has made.
-- Once: an application may have replaced it.
do $$
begin
  if to_regprocedure('image_jobs.my_workflows()') is null then
    create function image_jobs.my_workflows()
    returns setof uuid language plpgsql volatile security definer set search_path = ''
    as $function$
declare
  v_user uuid := image_jobs.current_user_id();
begin
  return query select m.workflow_id from public.workflow_members m where m.user_id = v_user;
end
$function$;
  end if;
end
$$;

-- Returns whether the signed-in user is a member.
create or replace function image_jobs.can_access_workflow(workflow_id uuid)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  return exists (select from image_jobs.my_workflows() mine (id) where mine.id = $1);
end
$$;

-- Returns whether the signed-in user may write into a workflow; raises where that is because no uuid names the user, which
-- the database's own words about a policy would not say.
create or replace function image_jobs.may_write(p_workflow uuid)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  if image_jobs.can_access_workflow(p_workflow) then
    return true;
  end if;
  if image_jobs.current_user_id() is null then
    perform image_jobs.refuse_nameless();
  end if;
  return false;
end
$$;

-- Returns whether the run belongs to a workflow that the signed-in user may see.
create or replace function image_jobs.can_access_run(p_run_id varchar)
returns boolean language sql volatile security definer set search_path = ''
as $$
  select exists (
    select from public.runs r
    where r.id = p_run_id and (r.kind = 'image_gen') is true and image_jobs.can_access_workflow(r.subject_id)
  )
$$;

-- Returns whether the run is of our kind; events of other kinds stay as open as they were.
create or replace function image_jobs.is_image_run(p_run_id varchar)
returns boolean language sql stable security definer set search_path = ''
as $$
  select exists (select from public.runs r where r.id = p_run_id and (r.kind = 'image_gen') is true)
$$;

-- Mark a workflow id as used. If no row ever used it, the signed-in user becomes its member.
-- Atomic: of two users at once, the primary key lets one found it; the other waits and becomes no member.
create or replace function image_jobs.found_workflow(p_workflow uuid)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_user uuid := image_jobs.current_user_id();
begin
  if p_workflow is null or exists (select from image_jobs.workflows w where w.id = p_workflow) then
    return;
  end if;
  insert into image_jobs.workflows (id) values (p_workflow) on conflict do nothing;
  if found and v_user is not null
    -- Rows of other kinds found no workflow.
    and not exists (select from public.runs r where r.subject_id = p_workflow and r.kind = 'image_gen')
    and not exists (select from public.workflow_nodes n where n.workflow_id = p_workflow)
  then
    perform image_jobs.lock_memberships(v_user);
    insert into public.workflow_members (workflow_id, user_id) values (p_workflow, v_user) on conflict do nothing;
    perform set_config('image_jobs.founded',
      concat_ws(',', nullif(current_setting('image_jobs.founded', true), ''), p_workflow), true);
  end if;
end
$$;

-- Refuse to return a row of a workflow that its own statement founded, after policies had asked which ones are the user's: they
-- ask once a statement. Returns false for every other row.
create or replace function image_jobs.refuse_founded(p_workflow uuid)
returns boolean language plpgsql volatile security definer set search_path = ''
as $$
begin
  if p_workflow::text = any (string_to_array(current_setting('image_jobs.founded', true), ','))
    and image_jobs.can_access_workflow(p_workflow)
  then
    perform image_jobs.refuse('One statement returns rows of one new workflow only.',
      'Insert the rows of each new workflow by themselves, or leave out .select().');
  end if;
  return false;
end
$$;

-- run_events: the audit trail of every run, ordered by seq.

do $$
declare
  v_writer text;
begin
  if to_regclass('public.run_events') is null then
    create table public.run_events (
      id uuid primary key default gen_random_uuid(),
      run_id varchar references public.runs (id) on delete cascade,
      ts timestamptz default clock_timestamp(),
      kind varchar not null,
      payload jsonb,
      seq bigint,
      run_kind varchar,
      workflow_id uuid
    );
    -- Older Supabase projects grant everything on a new table to the API roles.
    revoke all on public.run_events from public, anon, authenticated, service_role;
  else
    -- It was there before. Our checks and policies are evaluated with the rights of whoever comes.
    for v_writer in
      select g.grantee from information_schema.role_table_grants g
      where g.table_schema = 'public' and g.table_name = 'run_events'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') and g.grantee <> 'PUBLIC'
      union
      select g.grantee from information_schema.column_privileges g
      where g.table_schema = 'public' and g.table_name = 'run_events'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE') and g.grantee <> 'PUBLIC'
    loop
      execute format('grant execute on function image_jobs.has_base64(jsonb), image_jobs.is_image_run(varchar) to %I', v_writer);
    end loop;
    -- Without row level security its rows were open to whoever held grants; those that are not ours stay so.
    if not (select c.relrowsecurity from pg_class c where c.oid = 'public.run_events'::regclass) then
      drop policy if exists "Events of other kinds stay as open as they were" on public.run_events;
      create policy "Events of other kinds stay as open as they were" on public.run_events
        using (not image_jobs.is_image_run(run_id)) with check (not image_jobs.is_image_run(run_id));
    end if;
  end if;
end
$$;
-- A table that was there before lacks these.
alter table public.run_events
  add column if not exists ts timestamptz,
  add column if not exists payload jsonb,
  add column if not exists seq bigint,
  add column if not exists run_kind varchar,
  add column if not exists workflow_id uuid;
-- Old events are not written to, which a rule of the application may forbid. A table of ours has none, where the policy would be
-- in the way of the index.
do $$
begin
  if 'run_events' = any (string_to_array(current_setting('image_jobs.adopted'), ',')) then
    drop policy if exists "Members see events that are older than their workflow_id" on public.run_events;
    create policy "Members see events that are older than their workflow_id" on public.run_events for select to authenticated
      using (run_kind is null and image_jobs.can_access_run(run_id));
  end if;
end
$$;
-- A default of its own stays.
do $$
begin
  if not (select a.atthasdef from pg_attribute a where a.attrelid = 'public.run_events'::regclass and a.attname = 'id') then
    alter table public.run_events alter column id set default gen_random_uuid();
  end if;
  if not (select a.atthasdef from pg_attribute a where a.attrelid = 'public.run_events'::regclass and a.attname = 'ts') then
    alter table public.run_events alter column ts set default clock_timestamp();
  end if;
end
$$;

alter table public.run_events
  drop constraint if exists run_events_kind_is_known,
  drop constraint if exists run_events_payload_holds_no_base64;
alter table public.run_events
  add constraint run_events_kind_is_known
    check (run_kind is distinct from 'image_gen' or kind ~ '^(progress|log|error|webhook)$') not valid,
  add constraint run_events_payload_holds_no_base64
    check (run_kind is distinct from 'image_gen' or not image_jobs.has_base64(payload)) not valid;

-- What was there before keeps its own comments.
do $$
begin
  if obj_description('public.run_events'::regclass, 'pg_class') is null then
    comment on table public.run_events is 'The audit trail of runs.';
  end if;
end
$$;
comment on column public.run_events.seq is 'The order; timestamps may be equal.';
comment on column public.run_events.run_kind is 'image_gen, where the run is: the checks leave events of other kinds alone.';
comment on column public.run_events.workflow_id is 'Of an image run its subject_id: who may see the event.';

-- On large tables `image-jobs migrate` makes these itself, afterwards and concurrently (daemon/indexes.py).
if current_setting('image_jobs.indexes', true) is distinct from 'later' then
create index if not exists run_events_of_a_run on public.run_events (run_id, seq);
create index if not exists run_events_of_a_workflow on public.run_events (workflow_id, seq desc) where workflow_id is not null;
-- Those of which alerts are made; there are few, whatever else happens.
create index if not exists run_events_of_alerts on public.run_events (ts)
  where run_kind = 'image_gen' and kind = 'error' and payload ->> 'event' in ('incident', 'warning');
-- For operators: one event of a run.
create index if not exists run_events_of_uploads on public.run_events (ts)
  where run_kind = 'image_gen' and payload -> 'data' ? 'uploadTries';
end if;

-- Number events of image runs and copy the kind and the workflow of those, which decide whether our checks apply and who may see
-- the event, so no writer may choose them: write_events does so itself, and this for every other writer. By the statement, since
-- a row of another kind is only looked at. The workflow of such a row counts nowhere, and is the application's.
create or replace function image_jobs.stamp_events()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_events uuid[];
begin
  -- No join, whose plan would have to be pinned: by settings, which a statement about events of other kinds would pay for.
  select array_agg(n.id) into v_events
  from new_rows n
  where n.run_kind is not null or (select r.kind from public.runs r where r.id = n.run_id and (r.kind = 'image_gen') is true) is not null;
  if v_events is not null then
    perform set_config('image_jobs.writer', 'events', true);
    update public.run_events e
    set run_kind = (select r.kind from public.runs r where r.id = e.run_id and (r.kind = 'image_gen') is true),
      workflow_id = coalesce(
        (select r.subject_id from public.runs r where r.id = e.run_id and (r.kind = 'image_gen') is true), e.workflow_id),
      seq = case when tg_op = 'INSERT' then nextval('image_jobs.event_numbers') else e.seq end
    where e.id = any (v_events);
    perform set_config('image_jobs.writer', v_writer, true);
  end if;
  return null;
end
$$;

-- Returns true while write_events writes. It runs as the schema's owner, who alone may draw a number: a client's own setting of
-- the variable is not enough. A function, since each statement reads the text of a trigger's condition anew; and given the
-- sequence, whose name a writer without rights on the schema may not look up.
create or replace function image_jobs.writes_numbered_events(p_numbers regclass)
returns boolean language plpgsql stable set search_path = ''
as $$
begin
  return coalesce(current_setting('image_jobs.writer', true), '') = 'events'
    and has_sequence_privilege(p_numbers, 'usage');
end
$$;

create or replace trigger image_jobs_events_inserted after insert on public.run_events
  referencing new table as new_rows for each statement
  when (not image_jobs.writes_numbered_events('image_jobs.event_numbers'))
  execute function image_jobs.stamp_events();
create or replace trigger image_jobs_events_updated after update on public.run_events
  referencing new table as new_rows for each statement
  when (not image_jobs.writes_numbered_events('image_jobs.event_numbers'))
  execute function image_jobs.stamp_events();

-- An event to be written. id: null for a new one.
do $$
begin
  if to_regtype('image_jobs.event') is null then
    create type image_jobs.event as (
      id uuid,
      run_id varchar,
      kind text,
      payload jsonb
    );
  end if;
end
$$;

-- Write events, in order. One that comes again with its id, since an acknowledgement was lost, is left out. An event that
-- the database refuses (by a trigger or a rule of the application) costs nothing but itself: a warning takes its place, or
-- nothing where that is refused, too.
create or replace function image_jobs.write_events(p_events image_jobs.event[])
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_event image_jobs.event;
begin
  begin
    perform set_config('image_jobs.writer', 'events', true);
    insert into public.run_events (id, run_id, kind, payload, seq, run_kind, workflow_id)
    select coalesce(e.id, gen_random_uuid()), e.run_id, e.kind, e.payload, nextval('image_jobs.event_numbers'), 'image_gen',
      (select r.subject_id from public.runs r where r.id = e.run_id)
    from (select * from unnest(p_events) with ordinality order by ordinality) e
    on conflict (id) do nothing;
    perform set_config('image_jobs.writer', v_writer, true);
    return;
  exception when others or query_canceled or assert_failure then
    null;
  end;
  foreach v_event in array p_events loop
    v_event.id := coalesce(v_event.id, gen_random_uuid());
    begin
      perform set_config('image_jobs.writer', 'events', true);
      insert into public.run_events (id, run_id, kind, payload, seq, run_kind, workflow_id)
      values (v_event.id, v_event.run_id, v_event.kind, v_event.payload, nextval('image_jobs.event_numbers'), 'image_gen',
        (select r.subject_id from public.runs r where r.id = v_event.run_id))
      on conflict (id) do nothing;
    exception when others or query_canceled or assert_failure then
      begin
        perform set_config('image_jobs.writer', 'events', true);
        insert into public.run_events (id, run_id, kind, payload, seq, run_kind, workflow_id)
        values (md5('refused ' || v_event.id)::uuid, v_event.run_id, 'error', jsonb_build_object(
          'event', 'warning', 'message', 'The database refuses an event of this run: ' || left(sqlerrm, 500),
          'data', jsonb_build_object('refused', v_event.payload ->> 'event', 'sqlstate', sqlstate)),
          nextval('image_jobs.event_numbers'), 'image_gen', (select r.subject_id from public.runs r where r.id = v_event.run_id))
        on conflict (id) do nothing;
      exception when others or query_canceled or assert_failure then
        raise log 'An event of run % is refused (%): %', v_event.run_id, sqlstate, sqlerrm;
      end;
    end;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

-- Delete the events of a deleted run. A table that was there before may refuse to delete a run that has events; ours all have.
create or replace function image_jobs.delete_events()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  perform set_config('image_jobs.touched', 'runs', true);
  delete from public.run_events e where e.run_id = old.id;
  return old;
end
$$;

create or replace trigger image_jobs_delete_events before delete on public.runs
  for each row when (old.kind = 'image_gen') execute function image_jobs.delete_events();

-- workflow_nodes: the canvas. The frontend owns its nodes; a few keys of node_data are ours.

do $$
declare
  v_writer text;
begin
  if to_regclass('public.workflow_nodes') is null then
    create table public.workflow_nodes (
      id varchar primary key,
      workflow_id uuid not null,
      node_type varchar not null,
      node_data jsonb not null,
      position jsonb,
      created_at timestamptz default now(),
      updated_at timestamptz default now(),
      version bigint,
      run_ticket bigint,
      pinned_run varchar
    );
    -- Older Supabase projects grant everything on a new table to the API roles.
    revoke all on public.workflow_nodes from public, anon, authenticated, service_role;
  else
    -- It was there before. Our checks and policies are evaluated with the rights of whoever comes.
    for v_writer in
      select g.grantee from information_schema.role_table_grants g
      where g.table_schema = 'public' and g.table_name = 'workflow_nodes'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE', 'DELETE') and g.grantee <> 'PUBLIC'
      union
      select g.grantee from information_schema.column_privileges g
      where g.table_schema = 'public' and g.table_name = 'workflow_nodes'
        and g.privilege_type in ('SELECT', 'INSERT', 'UPDATE') and g.grantee <> 'PUBLIC'
    loop
      execute format('grant execute on function image_jobs.has_base64(jsonb) to %I', v_writer);
    end loop;
  end if;
end
$$;
-- A table that was there before lacks these.
alter table public.workflow_nodes
  add column if not exists node_type varchar,
  add column if not exists position jsonb,
  add column if not exists created_at timestamptz,
  add column if not exists updated_at timestamptz,
  add column if not exists version bigint,
  add column if not exists run_ticket bigint,
  add column if not exists pinned_run varchar;

alter table public.workflow_nodes
  drop constraint if exists workflow_nodes_node_data_holds_no_base64,
  drop constraint if exists workflow_nodes_position_holds_no_base64;
alter table public.workflow_nodes
  add constraint workflow_nodes_node_data_holds_no_base64 check (not image_jobs.has_base64(node_data)) not valid,
  add constraint workflow_nodes_position_holds_no_base64 check (not image_jobs.has_base64(position)) not valid;

-- What was there before keeps its own comments.
do $$
begin
  if obj_description('public.workflow_nodes'::regclass, 'pg_class') is null then
    comment on table public.workflow_nodes is 'Nodes of the canvas.';
  end if;
  if col_description('public.workflow_nodes'::regclass, (
    select a.attnum from pg_attribute a where a.attrelid = 'public.workflow_nodes'::regclass and a.attname = 'node_data')) is null
  then
    comment on column public.workflow_nodes.node_data is 'The frontend''s, but for status, runId, progress, message, previewUrl, imageUrl, thumbnailUrl, previewPath, imagePath, thumbnailPath, error, updatedAt.';
  end if;
end
$$;
comment on column public.workflow_nodes.version is 'Grows with every change, over all nodes: merge by it.';
comment on column public.workflow_nodes.run_ticket is 'Ticket of the newest run that the node has taken note of: the one that it shows, unless one is pinned.';
comment on column public.workflow_nodes.pinned_run is 'An older run that the node shows (show_run), until there is a newer one. Ours.';

-- On large tables `image-jobs migrate` makes these itself, afterwards and concurrently (daemon/indexes.py).
if current_setting('image_jobs.indexes', true) is distinct from 'later' then
create index if not exists idx_nodes_workflow on public.workflow_nodes (workflow_id);
end if;

-- Room for the next version beside the last: then a projection writes no index, and half the WAL.
alter table public.workflow_nodes set (fillfactor = 70);

-- Nodes that were locked when a run of theirs changed. The next sync shows them the run: a settlement never waits for a
-- client that drags a node, or left a transaction open.
-- Append-only, so that a sync which is just dealing with an older entry cannot swallow a newer one.
create table if not exists image_jobs.stale_nodes (
  id bigint generated always as identity primary key,
  node_id varchar not null,
  due_at timestamptz not null default image_jobs.now(),
  failures integer not null default 0
);
comment on table image_jobs.stale_nodes is 'Nodes that still have to be shown their run.';
comment on column image_jobs.stale_nodes.failures is
  'How often the node was refused, by a trigger or a rule of the application: it is tried again after growing pauses.';

create index if not exists stale_nodes_due on image_jobs.stale_nodes (due_at);

-- Limits of providers and models, global over all daemons, and the lanes in which runs wait for them.

create table if not exists image_jobs.provider_limits (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  per_minute integer check (per_minute >= 0),
  max_running integer check (max_running >= 0),
  paused boolean not null default false,
  constraint provider_limits_one_row_each unique nulls not distinct (provider, model),
  -- Written otherwise it would limit nothing.
  constraint provider_limits_name_a_provider check (provider ~ '^[a-z0-9_.-]+$'),
  constraint provider_limits_name_a_model_without_provider
    check (model <> '' and model !~ '\s' and not starts_with(model, provider || ':'))
);
comment on table image_jobs.provider_limits is 'Change by SQL at any time. model null: all models. A null limit: unlimited.';
comment on column image_jobs.provider_limits.per_minute is 'Starts in any 60 seconds, over all daemons; exact.';
comment on column image_jobs.provider_limits.max_running is 'Runs in status running, parked ones included; exact.';
comment on column image_jobs.provider_limits.paused is 'Nothing new is started. What runs goes on.';

-- All that every claim writes stands in tables of its own, and is never updated: a row with the next version takes the place of the
-- last, and the newest is read first. While an old transaction keeps vacuum away, each update of a row would leave a version
-- that all readers of the row walk past, and a claim would cost more with every claim before it.

create table if not exists image_jobs.recent_starts (
  limit_id bigint not null,
  version bigint generated always as identity,
  at bigint[] not null,
  starts integer[] not null,
  primary key (limit_id, version)
);
comment on table image_jobs.recent_starts is 'The starts of the last minute that a limit counts; the newest version holds.';
comment on column image_jobs.recent_starts.at is 'The seconds (epoch) in which runs started …';
comment on column image_jobs.recent_starts.starts is '… and how many started in each.';

-- Returns the starts that a limit counts; null if there were none.
create or replace function image_jobs.starts_of(p_limit bigint)
returns image_jobs.recent_starts language plpgsql volatile set search_path = ''
as $$
declare
  v_starts image_jobs.recent_starts;
begin
  select s.* into v_starts from image_jobs.recent_starts s where s.limit_id = p_limit order by s.version desc limit 1;
  return v_starts;
end
$$;

-- A copy of provider_limits, which operators change as often as they like, for claims.
create table if not exists image_jobs.limits_in_force (
  provider text not null,
  version bigint generated always as identity,
  limits jsonb not null,
  models text[] not null,
  primary key (provider, version)
);
comment on table image_jobs.limits_in_force is 'The rows of provider_limits, by provider; the newest version holds. Kept by a trigger.';
comment on column image_jobs.limits_in_force.models is 'Models that have a row of their own.';

create or replace function image_jobs.carry_limits()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_provider text;
  v_last image_jobs.limits_in_force;
begin
  if tg_op = 'TRUNCATE' then
    delete from image_jobs.limits_in_force;
    return null;
  end if;
  for v_provider in
    select distinct p.name from unnest(array[old.provider, new.provider]) as p (name) where p.name is not null order by p.name
  loop
    perform pg_advisory_xact_lock(hashtextextended('image_jobs limits ' || v_provider, 0));
    select f.* into v_last from image_jobs.limits_in_force f where f.provider = v_provider order by f.version desc limit 1;
    -- Waits for claims that count by it.
    delete from image_jobs.limits_in_force f where f.provider = v_provider and f.version = v_last.version;
    insert into image_jobs.limits_in_force (provider, limits, models)
    select v_provider, coalesce(jsonb_agg(l.value order by (l.value -> 'id')::bigint), '[]'),
      coalesce(array_agg(l.value ->> 'model') filter (where l.value ->> 'model' is not null), '{}')
    from (
      select k.value from jsonb_array_elements(v_last.limits) k where old.id is null or (k.value -> 'id')::bigint <> old.id
      union all
      select to_jsonb(new) where new.provider = v_provider
    ) l;
  end loop;
  return null;
end
$$;

-- Before change_lanes, which reads them: triggers fire by name.
create or replace trigger carry_limits after insert or update or delete on image_jobs.provider_limits
  for each row execute function image_jobs.carry_limits();
create or replace trigger carry_no_limits after truncate on image_jobs.provider_limits
  for each statement execute function image_jobs.carry_limits();

-- Returns the limits of a provider and of its models.
create or replace function image_jobs.limits_of(p_provider text)
returns setof image_jobs.provider_limits language plpgsql volatile set search_path = ''
as $$
begin
  return query
  select l.* from jsonb_populate_recordset(null::image_jobs.provider_limits, (
    select f.limits from image_jobs.limits_in_force f where f.provider = p_provider order by f.version desc limit 1)) l;
end
$$;

-- Lock what limits these providers until the end of the transaction: none of it changes until then, and no other claim counts by
-- it. Provider by provider, the one with the oldest limit first, as an update of all limits goes through them. What stops or bounds
-- nothing is not locked.
create or replace function image_jobs.lock_limits(p_providers text[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_provider text;
  v_limits record;
begin
  for v_provider in
    select p.name from (select distinct n.name from unnest(p_providers) as n (name)) p
    order by (
      select (f.limits -> 0 -> 'id')::bigint from image_jobs.limits_in_force f
      where f.provider = p.name order by f.version desc limit 1)
  loop
    loop
      select f.version, f.limits into v_limits from image_jobs.limits_in_force f
      where f.provider = v_provider order by f.version desc limit 1;
      exit when not found or not v_limits.limits @? '$[*] ? (@.per_minute != null || @.max_running != null)';
      perform from image_jobs.limits_in_force f where f.provider = v_provider and f.version = v_limits.version for update;
      -- Else it was replaced while this waited.
      exit when found;
    end loop;
  end loop;
end
$$;

-- Providers that may have a lane. Runs of all others wait in the lane '?', so that invented names cannot make lanes.
create table if not exists image_jobs.providers (
  name text primary key
);
comment on table image_jobs.providers is 'Providers that the daemons know.';
-- Once: a limit that an operator has deleted does not come back.
insert into image_jobs.provider_limits (provider, per_minute)
select l.provider, l.per_minute from (values ('openai', 50), ('google', 60)) l (provider, per_minute)
where not exists (select from image_jobs.providers);
insert into image_jobs.providers (name) values ('openai'), ('google'), ('stability'), ('midjourney'), ('demo')
on conflict (name) do nothing;

-- One row per lane (a provider, or a model with a limit of its own) and priority.
create table if not exists image_jobs.opened_lanes (
  lane text not null,
  priority integer not null,
  primary key (lane, priority)
);
comment on table image_jobs.opened_lanes is 'Queues of pending runs, one per lane and priority.';

create table if not exists image_jobs.watermarks (
  lane text not null,
  priority integer not null,
  version bigint generated always as identity,
  watermark bigint not null,
  passed_over bigint,
  primary key (lane, priority, version)
);
comment on table image_jobs.watermarks is 'How far the lanes have been claimed; the newest version holds.';

create or replace view image_jobs.lanes with (security_invoker = on) as
select o.lane, o.priority, coalesce(w.watermark, 0) as watermark, w.passed_over, w.version
from image_jobs.opened_lanes o
left join lateral (
  select m.watermark, m.passed_over, m.version from image_jobs.watermarks m
  where m.lane = o.lane and m.priority = o.priority
  order by m.version desc limit 1
) w on true;
comment on view image_jobs.lanes is 'Queues of pending runs, one per lane and priority, with their watermarks.';
-- There from the start: a transaction that opens a lane makes others that insert into it wait for its commit.
insert into image_jobs.opened_lanes (lane, priority) select p.name, 0 from image_jobs.providers p union all select '?', 0
on conflict (lane, priority) do nothing;
comment on column image_jobs.watermarks.watermark is
  'Rank of the last run that was claimed. New runs rank from here; claims scan from here, past dead index entries.';
comment on column image_jobs.watermarks.passed_over is
  'Below the watermark: from here on wait runs that claims have passed over, since their model was blocked. Claims scan from here.';

-- Lower bounds of the scans by due_at, past dead index entries: of put-off runs (queue ''), of each lane's parked ones, and of
-- stale nodes (queue 'stale nodes').
-- A hint, as the watermark is: full scans go without it.
create table if not exists image_jobs.due_marks (
  queue text not null,
  version bigint generated always as identity,
  due_at timestamptz not null,
  activity bigint,
  primary key (queue, version)
);
comment on column image_jobs.due_marks.activity is 'How many claims and stale nodes there had been: while there are no more, nothing is gained by moving it.';
comment on table image_jobs.due_marks is 'From when on something has fallen due that is not done; the newest version holds.';

-- Returns from when on a scan looks: somewhat before the mark, since who has made a run due may commit later than others. A mark
-- that lies ahead is of a clock that was wrong for a while.
create or replace function image_jobs.due_from(p_queue text, p_full_scan boolean)
returns timestamptz language plpgsql volatile set search_path = ''
as $$
begin
  return coalesce((
    select case when m.due_at <= image_jobs.now() then m.due_at - interval '10 s' end from image_jobs.due_marks m
    where m.queue = p_queue and not p_full_scan order by m.version desc limit 1), '-infinity');
end
$$;

-- Move a mark to the first run that a scan has found, or to now where it found none. Not for less than a second, or while
-- there is nothing to do a minute, since it is a write; and not at all while nothing happens.
create or replace function image_jobs.move_due_mark(p_queue text, p_first timestamptz)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_mark image_jobs.due_marks;
  v_activity bigint;
begin
  select m.* into v_mark from image_jobs.due_marks m where m.queue = p_queue order by m.version desc limit 1;
  if v_mark.due_at > image_jobs.now() then
    v_mark.activity := null;
  elsif found and coalesce(p_first - interval '1 s', image_jobs.now() - interval '1 min') <= v_mark.due_at then
    return;
  end if;
  v_activity := (select c.last_value from image_jobs.claims c) + (select s.last_value from image_jobs.stale_nodes_id_seq s);
  if v_mark.version is not null then
    if p_first is null and v_mark.activity = v_activity then
      return;
    end if;
    perform from image_jobs.due_marks m where m.queue = p_queue and m.version = v_mark.version for update skip locked;
    if not found then
      return;
    end if;
    delete from image_jobs.due_marks m where m.queue = p_queue and m.version = v_mark.version;
  end if;
  insert into image_jobs.due_marks (queue, due_at, activity) values (p_queue, coalesce(p_first, image_jobs.now()), v_activity);
end
$$;

-- Returns the lane of a processor.
create or replace function image_jobs.lane_of(p_processor text)
returns text language plpgsql stable set search_path = ''
as $$
begin
  return case
    when substr(p_processor, strpos(p_processor, ':') + 1) = any ((
      select f.models from image_jobs.limits_in_force f
      where f.provider = split_part(p_processor, ':', 1) order by f.version desc limit 1)::text[]) then p_processor
    else coalesce((select p.name from image_jobs.providers p where p.name = split_part(p_processor, ':', 1)), '?')
  end;
end
$$;

-- Returns the rank of a run that gets in line: behind the last of its user (coalesce(created_by, subject_id)), but never behind
-- other users who have fewer waiting. (Start-time fair queueing with the lane's watermark as virtual time.) A guess under
-- concurrency, and good enough.
create or replace function image_jobs.next_rank(p_user uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
declare
  v_watermark bigint;
  v_last bigint;
begin
  -- Not by the view: its joins cost every insert some 50 µs.
  select m.watermark into v_watermark from image_jobs.watermarks m
  where m.lane = p_lane and m.priority = p_priority order by m.version desc limit 1;
  if not found and not exists (select from image_jobs.opened_lanes o where o.lane = p_lane and o.priority = p_priority) then
    insert into image_jobs.opened_lanes (lane, priority) values (p_lane, p_priority) on conflict do nothing;
  end if;
  select r.rank into v_last
  from public.runs r
  where r.kind = 'image_gen' and coalesce(r.created_by, r.subject_id) = p_user and r.lane = p_lane and r.priority = p_priority
    and r.rank is not null
  order by r.rank desc limit 1;
  return greatest(coalesce(v_watermark, 0), coalesce(v_last, -1) + 1);
end
$$;

-- Returns how far the workflows of a user have been served in a lane: the workflow_rank of the run that was claimed last, in a
-- place below the watermark; null if that is none of the last few there. A hint: claims look from there.
create or replace function image_jobs.served_rank(p_user uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
begin
  return (
    select last.workflow_rank
    from (
      select r.workflow_rank, r.status from public.runs r
      where r.kind = 'image_gen' and coalesce(r.created_by, r.subject_id) = p_user and r.lane = p_lane and r.priority = p_priority
        and r.rank <= coalesce((
          select m.watermark from image_jobs.watermarks m
          where m.lane = p_lane and m.priority = p_priority order by m.version desc limit 1), 0)
      order by r.rank desc limit 20
    ) last
    where last.status <> 'pending' limit 1);
end
$$;

-- Returns the workflow_rank of a run that gets in line: behind the last of its workflow, but never behind other workflows of
-- its user that have fewer waiting. A claim gives the places of a user to the user's runs by workflow_rank.
create or replace function image_jobs.next_workflow_rank(p_user uuid, p_workflow uuid, p_lane text, p_priority integer)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off
as $$
declare
  v_last bigint;
begin
  select r.workflow_rank into v_last
  from public.runs r
  where r.kind = 'image_gen' and coalesce(r.created_by, r.subject_id) = p_user and r.subject_id = p_workflow
    and r.lane = p_lane and r.priority = p_priority and r.workflow_rank is not null
  order by r.workflow_rank desc limit 1;
  return 1 + greatest(coalesce(v_last, -1), coalesce(image_jobs.served_rank(p_user, p_lane, p_priority), -1));
end
$$;

-- Move pending runs when a limit gives a model a lane of its own, or takes it away again.
-- Runs that are locked, or just being inserted, are left behind; the claim finds and moves them.
create or replace function image_jobs.change_lanes()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if tg_op = 'DELETE' then
    delete from image_jobs.recent_starts s where s.limit_id = old.id;
  elsif new.model is not null then
    -- Before the first run comes: an insert opens a lane before it has the locks of usage_limits, and a requeue after.
    insert into image_jobs.opened_lanes (lane, priority) values (new.provider || ':' || new.model, 0) on conflict do nothing;
  end if;
  with misplaced as materialized (
    select r.id from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.ticket is not null
      and split_part(coalesce(r.routed_to, r.processor), ':', 1) in (new.provider, old.provider)
      and r.lane is distinct from image_jobs.lane_of(coalesce(r.routed_to, r.processor))
    order by r.id
    for update skip locked
  )
  update public.runs r set lane = image_jobs.lane_of(coalesce(r.routed_to, r.processor))
  from misplaced where r.id = misplaced.id;
  return null;
end
$$;

create or replace trigger change_lanes after insert or delete or update of provider, model on image_jobs.provider_limits
  for each row execute function image_jobs.change_lanes();

-- Daemons: one row per process start. Liveness is one row per daemon, not per run.

create table if not exists image_jobs.daemons (
  id uuid primary key,
  name text not null,
  version text not null,
  slots integer not null,
  in_flight integer not null default 0,
  providers text[] not null,
  lease interval not null,
  started_at timestamptz not null,
  seen_at timestamptz not null,
  fresh_since timestamptz not null,
  session_lock boolean not null default false,
  draining boolean not null default false,
  unserved_grace interval not null default interval '2 minutes',
  storage_closed_at timestamptz,
  unreachable text[] not null default '{}',
  ended_at timestamptz,
  ended text check (ended in ('stopped', 'taken over')),
  constraint daemons_ended_with_a_reason check ((ended_at is null) = (ended is null))
) with (fillfactor = 50);
comment on table image_jobs.daemons is 'Liveness of daemons. One row per process start, never reused.';
comment on column image_jobs.daemons.fresh_since is 'Beats have come without a gap since then; only after one lease may it take over from others.';
comment on column image_jobs.daemons.session_lock is 'Its LISTEN session holds an advisory lock: when that is free, it is gone.';
comment on column image_jobs.daemons.unserved_grace is
  'How long after the last daemon that served a provider it fails the runs that wait for that (a deploy).';
comment on column image_jobs.daemons.storage_closed_at is 'Since when storage has taken no uploads of it, so that it claims nothing.';
comment on column image_jobs.daemons.unreachable is 'Providers that it cannot connect to, and claims nothing for.';

-- The part of daemons that claims read. A beat never writes here: a claim would walk past every beat that vacuum cannot remove.
create table if not exists image_jobs.claimants (
  daemon uuid primary key,
  providers text[] not null,
  unserved_grace interval not null
);
comment on table image_jobs.claimants is 'Daemons that may claim: registered, and neither stopped nor taken over. Kept by a trigger of daemons.';

create or replace function image_jobs.keep_claimant()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if tg_op <> 'INSERT' then
    delete from image_jobs.claimants c where c.daemon = old.id;
  end if;
  if tg_op <> 'DELETE' and new.ended_at is null then
    insert into image_jobs.claimants (daemon, providers, unserved_grace) values (new.id, new.providers, new.unserved_grace);
  end if;
  return null;
end
$$;

create or replace trigger keep_claimant after insert or delete or update of id, providers, unserved_grace, ended_at
  on image_jobs.daemons for each row execute function image_jobs.keep_claimant();

-- While busy daemons keep this ahead, inserts need no NOTIFY (which takes a global lock until commit).
-- Never updated, as image_jobs.watermarks is not: of a provider the latest holds, and what is over is looked at by nobody.
create table if not exists image_jobs.wake (
  provider text not null,
  awake_until timestamptz not null,
  primary key (provider, awake_until)
);
comment on table image_jobs.wake is 'Until when some daemon that serves a provider syncs by itself, often; ?: any daemon.';
insert into image_jobs.wake (provider, awake_until)
select p.name, '-infinity'::timestamptz from (select name from image_jobs.providers union all select '?') p
where not exists (select from image_jobs.wake w where w.provider = p.name);

-- The models on offer, published by the daemons; the provider code is the one source.
create table if not exists image_jobs.models (
  provider text not null,
  model text not null,
  sizes text[] not null default '{}',
  ratios text[] not null default '{}',
  qualities text[] not null default '{}',
  seed boolean not null default false,
  negative_prompt boolean not null default false,
  previous_image boolean not null default false,
  previews boolean not null default false,
  price numeric,
  typical_seconds numeric,
  retired date,
  successor text,
  as_of date,
  source text,
  primary key (provider, model)
);
comment on table image_jobs.models is 'What image_models shows.';
comment on column image_jobs.models.qualities is 'What promptSpec.quality may be and make a difference; empty: there is one quality.';

-- Returns the model that draws for a processor: that of its name, or the first successor of a retired one that is not retired.
-- Nothing draws for one without such a successor; then it is the name itself. As daemon/providers/catalogue.py resolves it.
create or replace function image_jobs.drawing_model(p_processor text)
returns text language plpgsql volatile set search_path = ''
as $$
declare
  v_today date := (image_jobs.now() at time zone 'utc')::date;
  v_provider text := split_part(p_processor, ':', 1);
  v_name text := substr(p_processor, strpos(p_processor, ':') + 1);
  v_model record;
  v_seen text[] := '{}';
begin
  -- A dated snapshot is listed under the name without its date.
  select m.model, m.retired, m.successor into v_model from image_jobs.models m
  where m.provider = v_provider and m.model in (
    v_name, case when v_name like '%-____-__-__' then regexp_replace(v_name, '-\d{4}-\d{2}-\d{2}$', '') end)
  order by m.model = v_name desc limit 1;
  if not found or v_model.retired is null or v_model.retired > v_today then
    return v_name;
  end if;
  while found and not v_model.model = any (v_seen) loop
    if v_model.retired is null or v_model.retired > v_today then
      return v_model.model;
    end if;
    v_seen := v_seen || v_model.model;
    select m.model, m.retired, m.successor into v_model from image_jobs.models m
    where m.provider = v_provider and m.model = v_model.successor;
  end loop;
  return v_name;
end
$$;

-- Runs that the database refuses to change, by a trigger or a rule of the application: they are left alone for a while, so
-- that every other run goes on.

create table if not exists image_jobs.set_aside (
  run_id varchar primary key,
  until timestamptz not null,
  failures integer not null default 1,
  sqlstate text not null,
  reason text not null
);
-- Reads what is not over, as of image_jobs.wake.
create index if not exists set_aside_until on image_jobs.set_aside (until);
comment on table image_jobs.set_aside is 'Runs whose row could not be changed; they are left alone until then, for 1 s to 5 min.';

-- Returns the runs that are to be left alone now; no row as a rule.
create or replace function image_jobs.runs_set_aside()
returns varchar[] language plpgsql volatile set search_path = '' set enable_seqscan = off set enable_bitmapscan = off
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  return array(select s.run_id from image_jobs.set_aside s where s.until > v_now);
end
$$;

-- Set a run aside whose row could not be changed, and warn, once for each SQLSTATE. The third time, a run that waits to be
-- started fails with the reason, if that at least is allowed.
create or replace function image_jobs.set_run_aside(p_run varchar, p_sqlstate text, p_reason text)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_reason text := left(p_reason, 500);
  v_failures integer;
begin
  delete from image_jobs.set_aside s where s.until < v_now - interval '10 min';
  insert into image_jobs.set_aside as s (run_id, until, sqlstate, reason)
  values (p_run, v_now + interval '1 s', p_sqlstate, v_reason)
  on conflict (run_id) do update
  set failures = s.failures + 1, until = v_now + make_interval(secs => least(2 ^ least(s.failures, 9), 300)),
    sqlstate = excluded.sqlstate, reason = excluded.reason
  returning failures into v_failures;
  perform image_jobs.write_events(array[row(md5('set aside ' || p_run || ' ' || p_sqlstate)::uuid, p_run, 'error',
    jsonb_build_object('event', 'warning', 'message', 'The database refuses to change this run: ' || v_reason,
      'data', jsonb_build_object('sqlstate', p_sqlstate)))::image_jobs.event]);
  if v_failures >= 3 then
    begin
      perform set_config('image_jobs.writer', 'daemon', true);
      update public.runs r
      set status = 'failed', claim = nextval('image_jobs.claims'), due_at = null, rank = null, finished_at = v_now,
        payload = jsonb_build_object(
          'error', 'The database refuses to start this run: ' || v_reason, 'code', 'refused_by_database', 'attempts', r.attempt,
          'hint', 'A trigger or a rule of the application is in the way. Mend it, then requeue the run.')
          || image_jobs.timings_of_failure(r, v_now)
      where r.id = p_run and r.status = 'pending' and r.claimed_by is null;
    exception when others or query_canceled or assert_failure then
      null;
    end;
    perform set_config('image_jobs.writer', v_writer, true);
  end if;
end
$$;

-- Change runs by a function of this schema that takes their ids and a daemon: all at once, and where the database refuses
-- that, one by one, so that only those suffer that are refused. The caller holds the rows' locks.
-- Returns the results of the function, which are jsonb[] as well.
create or replace function image_jobs.change_runs(p_change text, p_runs varchar[], p_daemon uuid default null)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
declare
  v_began timestamptz := clock_timestamp();
  v_change text := format('select image_jobs.%I($1, $2)', p_change);
  v_results jsonb[];
  v_result jsonb[];
  v_run varchar;
begin
  begin
    execute v_change into v_results using p_runs, p_daemon;
    return v_results;
  exception when others or query_canceled or assert_failure then
    -- No run is to blame for a deadlock: the daemon comes again. (By its message: a trigger may raise 40P01 or 40001, too, and
    -- would stop every run behind its own.) A statement that was cancelled because it took too long is not done over for
    -- each run.
    if sqlstate = '40P01' and sqlerrm = 'deadlock detected'
      or sqlstate = '57014' and clock_timestamp() > v_began + interval '1 s'
    then
      raise;
    end if;
    if cardinality(p_runs) = 1 then
      perform image_jobs.set_run_aside(p_runs[1], sqlstate, sqlerrm);
      return null;
    end if;
  end;
  foreach v_run in array p_runs loop
    begin
      execute v_change into v_result using array[v_run], p_daemon;
      v_results := v_results || v_result;
    exception when others or query_canceled or assert_failure then
      perform image_jobs.set_run_aside(v_run, sqlstate, sqlerrm);
    end;
  end loop;
  return v_results;
end
$$;

-- Providers, or models of theirs, that are closed for all daemons until a time: a 429 said so, the credit is used up, or a
-- streak of server errors did it (29_provider_streaks.sql).
--
-- A block moves no runs. Those of a blocked model stay in their lane, and claims pass over them (image_jobs.unblocked_names).

create table if not exists image_jobs.provider_blocks (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  until timestamptz not null,
  reason text,
  constraint provider_blocks_one_row_each unique nulls not distinct (provider, model),
  constraint provider_blocks_name_a_provider check (provider ~ '^[a-z0-9_.-]+$')
);
-- Claims read from now on, however many there were before.
create index if not exists provider_blocks_until on image_jobs.provider_blocks (provider, until);
comment on table image_jobs.provider_blocks is 'Set by the daemons; delete a row to open. model null: the whole provider.';
comment on column image_jobs.provider_blocks.model is
  'The model that draws: runs that name a retired one wait, too, where this is its successor.';
comment on column image_jobs.provider_blocks.reason is 'A sentence for the person at the canvas.';

-- Close a provider, or the model that draws, for all daemons until a time; what is closed for longer stays so.
-- Waits for no lock but that of its row, which claims never take.
create or replace function image_jobs.block_until(p_provider text, p_model text, p_until timestamptz, p_reason text)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  -- Each of many calls that were under way says so.
  if exists (
    select from image_jobs.provider_blocks b
    where b.provider = p_provider and b.model is not distinct from p_model and b.until >= greatest(p_until, v_now))
  then
    return;
  end if;
  insert into image_jobs.provider_blocks as b (provider, model, until, reason)
  values (p_provider, p_model, p_until, p_reason)
  on conflict (provider, model) do update set
    until = greatest(b.until, excluded.until),
    reason = case when b.until > excluded.until then b.reason else excluded.reason end;
  delete from image_jobs.provider_blocks b
  where b.id = any (array(
    select o.id from image_jobs.provider_blocks o where o.until < v_now - interval '1 hour' for update skip locked));
end
$$;

-- Close a provider, or the model that draws, until p_for has passed: it returned 429, or is out of credit.
create or replace function image_jobs.block_provider(p_provider text, p_model text, p_for interval, p_reason text)
returns void language sql volatile set search_path = ''
as $$
  select image_jobs.block_until(p_provider, p_model, image_jobs.now() + p_for, p_reason)
$$;

-- Streaks of server errors: three answers of 5xx in a row, to calls of any daemons, close a provider for all of them for
-- 4 s. Then it is half open: one call goes first. Any success ends the streak; another 5xx closes it again, for twice as long,
-- up to a minute.
--
-- Answers come with settlements (`http_status`). A sync notes them before it holds any lock, and claims do not wait for the
-- locks of streaks (rows of image_jobs.providers): so nobody waits for them while others wait for him.

-- Never updated, as image_jobs.watermarks is not.
create table if not exists image_jobs.provider_streaks (
  provider text not null,
  version bigint generated always as identity,
  failed bigint[] not null default '{}',
  closings integer not null default 0,
  closed_at timestamptz,
  closed_until timestamptz,
  probe bigint,
  probed_at timestamptz,
  primary key (provider, version)
);
comment on table image_jobs.provider_streaks is
  'Whether providers answer with server errors; the newest version holds. No row: as after a success, which leaves one that says nothing.';
comment on column image_jobs.provider_streaks.failed is
  'Claims whose calls had server errors since the last success, until it is closed. One whose run is locked settles again.';
comment on column image_jobs.provider_streaks.closings is 'How often it was closed since the last success. From 1 on and not blocked: half open.';
comment on column image_jobs.provider_streaks.closed_at is 'When it was closed last. Calls that began before say nothing new.';
comment on column image_jobs.provider_streaks.closed_until is 'Until when, as provider_blocks has it unless something else has closed it for longer.';
comment on column image_jobs.provider_streaks.probe is 'The claim of the call that went first …';
comment on column image_jobs.provider_streaks.probed_at is '… and when; half a minute later another may go.';

-- Returns the streak of a provider; null if there was none.
create or replace function image_jobs.streak_of(p_provider text)
returns image_jobs.provider_streaks language plpgsql volatile set search_path = ''
as $$
declare
  v_streak image_jobs.provider_streaks;
begin
  select s.* into v_streak from image_jobs.provider_streaks s where s.provider = p_provider order by s.version desc limit 1;
  return v_streak;
end
$$;

-- Returns whether some provider has a streak.
create or replace function image_jobs.has_streaks()
returns boolean language plpgsql volatile set search_path = '' set enable_seqscan = off set enable_bitmapscan = off
as $$
begin
  return exists (
    select from image_jobs.providers p
    cross join lateral (
      select t.closings, t.failed from image_jobs.provider_streaks t where t.provider = p.name order by t.version desc limit 1
    ) s
    where s.closings > 0 or s.failed <> '{}');
end
$$;

-- Put a streak in the place of the one that it was made from. The caller holds the lock of its provider.
create or replace function image_jobs.write_streak(p_streak image_jobs.provider_streaks)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  delete from image_jobs.provider_streaks s where s.provider = p_streak.provider and s.version = p_streak.version;
  insert into image_jobs.provider_streaks (provider, failed, closings, closed_at, closed_until, probe, probed_at)
  values (p_streak.provider, coalesce(p_streak.failed, '{}'), coalesce(p_streak.closings, 0), p_streak.closed_at,
    p_streak.closed_until, p_streak.probe, p_streak.probed_at);
end
$$;

-- Note how providers have answered the calls of these settlements. Those whose claim is not this daemon's any more do not count.
create or replace function image_jobs.note_responses(p_daemon uuid, p_settlements jsonb)
returns void language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_noted record;
  v_streak image_jobs.provider_streaks;
  v_failed bigint[];
begin
  for v_noted in
    select split_part(coalesce(r.routed_to, r.processor), ':', 1) as provider,
      coalesce(bool_or(s.http_status < 500), false) as well,
      array_agg(s.claim) filter (where s.http_status >= 500) as failed,
      array_agg(r.started_at) filter (where s.http_status >= 500) as began,
      array_agg(s.claim) filter (where s.http_status is null) as unanswered
    from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, http_status integer)
    join public.runs r on r.id = any (array[s.id]) and r.claim = s.claim and (r.claimed_by = p_daemon) is true
    group by 1 order by 1
  loop
    v_streak := image_jobs.streak_of(v_noted.provider);
    continue when v_noted.failed is null and not coalesce(v_streak.closings > 0 or v_streak.failed <> '{}', false);
    perform from image_jobs.providers p where p.name = v_noted.provider for update;
    v_streak := image_jobs.streak_of(v_noted.provider);
    if v_noted.well then
      continue when not coalesce(v_streak.closings > 0 or v_streak.failed <> '{}', false);
      delete from image_jobs.provider_blocks b
      where b.provider = v_noted.provider and b.model is null and b.until = v_streak.closed_until;
      perform image_jobs.write_streak(row(v_streak.provider, v_streak.version, '{}', 0, null, null, null, null));
      continue;
    end if;
    if v_streak.probe = any (v_noted.unanswered) then
      v_streak.probed_at := null;
      perform image_jobs.write_streak(v_streak);
      v_streak := image_jobs.streak_of(v_noted.provider);
    end if;
    v_failed := array(
      select call.claim from unnest(v_noted.failed, v_noted.began) as call (claim, began)
      where call.began >= coalesce(v_streak.closed_at, '-infinity') and call.claim <> all (coalesce(v_streak.failed, '{}')));
    v_streak.provider := v_noted.provider;
    continue when v_failed = '{}' or exists (
      select from image_jobs.provider_blocks b where b.provider = v_noted.provider and b.model is null and b.until > v_now);
    if coalesce(v_streak.closings, 0) = 0 and cardinality(coalesce(v_streak.failed, '{}') || v_failed) < 3 then
      v_streak.failed := coalesce(v_streak.failed, '{}') || v_failed;
      perform image_jobs.write_streak(v_streak);
      continue;
    end if;
    v_streak.failed := '{}';
    v_streak.closings := coalesce(v_streak.closings, 0) + 1;
    v_streak.closed_at := v_now;
    v_streak.closed_until := v_now + make_interval(secs => least(4 * 2 ^ least(v_streak.closings - 1, 9), 60));
    v_streak.probe := null;
    v_streak.probed_at := null;
    perform image_jobs.write_streak(v_streak);
    -- Every signed-in user reads it. The provider's words, which may be about one of them, stand in the events of the run.
    perform image_jobs.block_until(v_noted.provider, null, v_streak.closed_until,
      format('%s has a problem at the moment.', image_jobs.provider_name(v_noted.provider)));
  end loop;
end
$$;

-- The likely cost of an image: prices by model, quality and size, published by the daemons with their models.

create table if not exists image_jobs.prices (
  provider text not null,
  model text not null,
  quality text not null,
  width integer not null,
  height integer not null,
  price numeric,
  primary key (provider, model, quality, width, height),
  constraint prices_of_a_size_an_edge_or_any check (width > 0 and height >= 0 or width = 0 and height = 0)
);
comment on table image_jobs.prices is 'USD for one image where quality or size make a difference; else models.price counts.';
comment on column image_jobs.prices.width is '0: of any size.';
comment on column image_jobs.prices.height is '0: of any size whose longest edge is at most the width.';
comment on column image_jobs.prices.price is 'Null: not known.';

-- Returns the likely cost of one image in USD; null where it is not known. Never fails, whatever it is given.
-- Of the published sizes the one nearest in shape, then in pixels, counts: a provider does not draw every size. Of
-- published edges the shortest that is long enough counts.
create or replace function image_jobs.estimate_cost(p_processor text, p_prompt jsonb)
returns numeric language plpgsql stable security definer set search_path = ''
as $$
declare
  v_provider text := split_part(coalesce(p_processor, ''), ':', 1);
  v_model text := image_jobs.drawing_model(coalesce(p_processor, ''));
  v_name text;
  v_quality text := coalesce(p_prompt ->> 'quality', 'standard');
  v_size text[] := coalesce(
    regexp_match(p_prompt ->> 'size', '^([1-9][0-9]{0,4})x([1-9][0-9]{0,4})$'),
    regexp_match(p_prompt ->> 'aspectRatio', '^([1-9][0-9]{0,3}):([1-9][0-9]{0,3})$'), '{1,1}');
  v_ratio double precision := ln(v_size[1]::double precision / v_size[2]::double precision);
  v_pixels double precision := ln(case when p_prompt ->> 'size' ~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$'
    then v_size[1]::double precision * v_size[2]::double precision else 1048576 end);
  v_longest integer := case when p_prompt ->> 'size' ~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$'
    then greatest(v_size[1]::integer, v_size[2]::integer) else 0 end;
  v_price record;
begin
  foreach v_name in array array[
    v_model, case when v_model like '%-____-__-__' then regexp_replace(v_model, '-\d{4}-\d{2}-\d{2}$', '') end]
  loop
    select p.price into v_price from image_jobs.prices p
    where p.provider = v_provider and p.model = v_name and p.quality = v_quality
      and (p.height > 0 or p.width = 0 or p.width >= v_longest)
    order by
      case when p.height > 0 then round(abs(ln(p.width::double precision / p.height) - v_ratio)::numeric, 2) else 0 end,
      case when p.height > 0 then abs(ln(p.width::double precision * p.height) - v_pixels) else p.width end
    limit 1;
    if found then
      return v_price.price;
    end if;
    select m.price into v_price from image_jobs.models m where m.provider = v_provider and m.model = v_name;
    if found then
      return v_price.price;
    end if;
  end loop;
  return null;
end
$$;

create or replace function public.estimate_cost(processor text, prompt_spec jsonb)
returns numeric language sql stable set search_path = ''
as $$
  select image_jobs.estimate_cost(processor, prompt_spec)
$$;
comment on function public.estimate_cost(text, jsonb) is
  'Image Job Orchestrator: the likely cost of one image in USD; null where it is not known.';

-- Tallies: what became of calls, and of runs that ended without a daemon's settlement (cancelled, taken over for the last time,
-- refused by the database). One daemon takes each for its metrics, and one for its log: so all daemons together count everything
-- once. One without metrics logs, and leaves the counting to others.

-- Unlogged: a crash loses the last seconds, as it does of the counters themselves.
create unlogged table if not exists image_jobs.tallies (
  id bigint generated always as identity primary key,
  metric text not null,
  provider text not null,
  model text not null,
  result text not null,
  code text,
  count bigint not null,
  usd numeric,
  run_id varchar,
  workflow_id uuid,
  node_id text,
  error text,
  at timestamptz not null default image_jobs.now(),
  logged boolean not null default false
);
comment on table image_jobs.tallies is
  'What daemons have still to count and log. Empty again every few seconds; after five minutes where no daemon has metrics.';
create index if not exists tallies_to_log on image_jobs.tallies (id) where run_id is not null and not logged;

-- Tally calls whose state has just changed, and the USD: the cost of a charged one, the estimate of an unknown one. A call that was
-- unknown, and is charged later, counts as both.
create or replace function image_jobs.tally_calls(p_calls bigint[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into image_jobs.tallies (metric, provider, model, result, count, usd)
  select 'calls', c.provider, c.model, c.state, count(*),
    sum(case c.state when 'charged' then c.cost when 'unknown' then c.estimate end)
  from image_jobs.calls c
  where c.id = any (p_calls)
  group by c.provider, c.model, c.state;
end
$$;

-- Take what is to be counted: {metric, provider, model, result, code, count, usd, logged (a daemon has logged it), and of a run that
-- failed run_id, workflow_id, node_id, error}. metric: runs, calls, webhooks (result: accepted, duplicate, refused), base64.
-- p_counts false: only look at what is still to be logged.
create or replace function image_jobs.take_tallies(p_counts boolean)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_hashjoin = off set enable_mergejoin = off set enable_nestloop = on set enable_seqscan = off set jit = off
as $$
begin
  if not p_counts then
    return query
    update image_jobs.tallies t set logged = true
    where t.id = any (array(
      select q.id from image_jobs.tallies q where q.run_id is not null and not q.logged order by q.id limit 10000 for update skip locked))
    returning jsonb_strip_nulls(jsonb_build_object(
      'metric', t.metric, 'provider', t.provider, 'model', t.model, 'result', t.result, 'code', t.code, 'count', t.count,
      'run_id', t.run_id, 'workflow_id', t.workflow_id, 'node_id', t.node_id, 'error', t.error, 'logged', false));
    -- The oldest alone is looked at as a rule.
    if (select t.at from image_jobs.tallies t order by t.id limit 1) < image_jobs.now() - interval '5 min' then
      delete from image_jobs.tallies t
      where t.id = any (array(
        select q.id from image_jobs.tallies q where q.at < image_jobs.now() - interval '5 min'
        order by q.id limit 10000 for update skip locked));
    end if;
    return;
  end if;
  return query
  with taken as (
    delete from image_jobs.tallies t
    where t.id = any (array(select q.id from image_jobs.tallies q order by q.id limit 10000 for update skip locked))
    returning t.*
  )
  select jsonb_strip_nulls(jsonb_build_object(
    'metric', t.metric, 'provider', t.provider, 'model', t.model, 'result', t.result, 'code', t.code, 'count', sum(t.count),
    'usd', sum(t.usd), 'run_id', t.run_id, 'workflow_id', t.workflow_id, 'node_id', t.node_id, 'error', t.error, 'logged', t.logged))
  from taken t
  group by t.metric, t.provider, t.model, t.result, t.code, t.run_id, t.workflow_id, t.node_id, t.error, t.logged;

  -- The counters of webhooks are there already: the last minutes of each provider.
  return query
  with seen as (
    select c.provider, c.minute, c.slot, c.told from (
      select p.name from image_jobs.providers p union select unnest(array['openai', 'midjourney', 'hmac', 'unknown'])
    ) p (name)
    join image_jobs.webhook_counters c on c.provider = p.name and c.minute > image_jobs.now() - interval '10 min'
    where c.told <> array[c.accepted, c.duplicates, c.refused]
    for update of c skip locked
  ),
  told as (
    update image_jobs.webhook_counters c set told = array[c.accepted, c.duplicates, c.refused]
    from seen s
    where c.provider = s.provider and c.minute = s.minute and c.slot = s.slot
    returning c.provider, s.told as before, c.told as now
  )
  select jsonb_build_object('metric', 'webhooks', 'provider', t.provider, 'result', r.name, 'count', sum(t.now[r.n] - t.before[r.n]))
  from told t cross join unnest(array['accepted', 'duplicate', 'refused']) with ordinality as r (name, n)
  group by t.provider, r.name
  having sum(t.now[r.n] - t.before[r.n]) > 0;
end
$$;

-- Returns what gauges show: {gauge, provider, value, and of a closed one its reason}. waiting and oldest_waiting: of what is due;
-- closed: 1 for each reason for which nothing of a provider, or of a model of it, starts.
create or replace function image_jobs.gauges()
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
begin
  return query
  select jsonb_build_object('gauge', g.name, 'provider', w.provider, 'value', g.value)
  from (
    -- Of its lane: invented providers share one.
    select split_part(r.lane, ':', 1) as provider, count(*) as waiting,
      extract(epoch from image_jobs.now() - min(r.due_at)) as oldest
    from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
    group by 1
  ) w
  cross join lateral (values ('waiting', w.waiting::numeric), ('oldest_waiting', w.oldest)) g (name, value);
  return query
  select distinct jsonb_build_object('gauge', 'closed', 'provider', s.provider, 'reason', s.state, 'value', 1)
  from image_jobs.provider_status() s where s.state <> 'open';
end
$$;

-- The books: one row for each request to a provider that may be charged. Costs in payloads, events and views are read from
-- here and nowhere else.
--
-- A call is opened by the claim that starts a run and closed by whoever knows what became of it: open → charged, unknown or
-- free, and unknown → charged or free. Lock order: runs, then calls, then nodes and events.

-- No foreign key: a call outlives its run.
create table if not exists image_jobs.calls (
  id bigint primary key,
  run_id varchar not null,
  workflow_id uuid,
  user_id uuid,
  provider text not null,
  model text not null,
  requested_model text not null,
  provider_job_id text,
  estimate numeric,
  cost numeric,
  state text not null default 'open',
  opened_at timestamptz not null,
  closed_at timestamptz,
  ticket bigint not null,
  sent_at timestamptz,
  image boolean not null default false,
  image_at timestamptz,
  constraint calls_state_is_known check (state in ('open', 'charged', 'unknown', 'free')),
  constraint calls_cost_only_when_charged check (cost is null or state = 'charged'),
  constraint calls_closed_at_unless_open check ((closed_at is null) = (state = 'open'))
) with (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);
comment on table image_jobs.calls is 'One row for each request to a provider that may be charged: what it was, and what it cost.';
comment on column image_jobs.calls.id is 'The claim under which the request left.';
comment on column image_jobs.calls.model is 'The model that draws: of a retired one the successor.';
comment on column image_jobs.calls.requested_model is 'The model of runs.processor.';
comment on column image_jobs.calls.estimate is 'USD; counts while the cost is not known.';
comment on column image_jobs.calls.cost is 'USD. Null of a charged call: the price is not known.';
comment on column image_jobs.calls.state is 'open; charged; free; unknown: it may have been charged, and whoever learns more says so.';
comment on column image_jobs.calls.ticket is 'The ticket of the run that the cost belongs to.';
comment on column image_jobs.calls.sent_at is 'When the request went out; null until the daemon has said so.';
comment on column image_jobs.calls.image is 'Whether an image came.';
comment on column image_jobs.calls.image_at is 'When the image was in a daemon''s hands; the latest time, if it was fetched twice.';
create index if not exists calls_of_a_user on image_jobs.calls (user_id, opened_at) where user_id is not null;
create index if not exists calls_of_a_workflow on image_jobs.calls (workflow_id, opened_at);
create index if not exists calls_by_time on image_jobs.calls (opened_at);
create index if not exists calls_of_a_run on image_jobs.calls (run_id);
create index if not exists calls_open on image_jobs.calls (id) where state = 'open';
create index if not exists calls_of_a_provider_job on image_jobs.calls (provider_job_id) where provider_job_id is not null;

-- Returns a claim such that whatever ended since a time has that or a newer one: claims are drawn in the sequence of time, and a
-- run ends within an hour of its last. Read from the calls, each of which is a claim with its time.
create or replace function image_jobs.claim_before(p_at timestamptz)
returns bigint language plpgsql volatile set search_path = ''
as $$
begin
  return coalesce((
    select c.id from image_jobs.calls c where c.opened_at < p_at - interval '1 hour' order by c.opened_at desc limit 1), 0);
end
$$;

-- Refuse a change of state that would falsify the books, and note when a call was closed.
create or replace function image_jobs.guard_call()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if not (old.state = 'open' or old.state = 'unknown' and new.state in ('charged', 'free')) then
    perform image_jobs.refuse(format('A call that is %s cannot become %s.', old.state, new.state),
      'An open call may become charged, unknown or free, and an unknown one charged or free.');
  end if;
  new.closed_at := image_jobs.now();
  return new;
end
$$;

create or replace trigger guard_call before update of state on image_jobs.calls
  for each row when (old.state is distinct from new.state) execute function image_jobs.guard_call();

-- Open the calls of runs that were claimed just now, where the claim begins a request. The caller holds the runs' locks.
-- A run that has a provider job is checked: its call is that of the claim which made the job (runs.call).
-- Equal requests are priced once.
create or replace function image_jobs.open_calls(p_runs varchar[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  insert into image_jobs.calls
    (id, run_id, workflow_id, user_id, provider, model, requested_model, provider_job_id, estimate, opened_at, ticket)
  select r.claim, r.id, r.subject_id, coalesce(r.requeued_by, r.created_by), split_part(priced.processor, ':', 1), priced.model,
    coalesce(substr(r.processor, strpos(r.processor, ':') + 1), ''), r.provider_job_id, priced.estimate, v_now, r.ticket
  from (
    select equal.processor, equal.runs, image_jobs.drawing_model(equal.processor) as model,
      image_jobs.estimate_cost(equal.processor, equal.spec) as estimate
    from (
      select coalesce(o.routed_to, o.processor, '') as processor, jsonb_build_object(
          'quality', o.metadata #> '{promptSpec,quality}', 'size', o.metadata #> '{promptSpec,size}',
          'aspectRatio', o.metadata #> '{promptSpec,aspectRatio}') as spec,
        array_agg(o) as runs
      from public.runs o
      where o.id = any (p_runs) and coalesce(o.call, o.claim) = o.claim
      group by 1, 2
    ) equal
    offset 0
  ) priced
  cross join lateral unnest(priced.runs) r
  on conflict (id) do nothing;
end
$$;

-- Returns the instant that a daemon means by so many seconds ago. A daemon counts by a clock that is never set, and this one
-- is the database's, so no two clocks are compared. Null for null; what is no time, or longer ago than any run, is now.
create or replace function image_jobs.seconds_ago(p_seconds double precision)
returns timestamptz language plpgsql volatile set search_path = ''
as $$
begin
  return case when p_seconds is not null then
    image_jobs.now() - make_interval(secs => case when p_seconds between 0 and 1e9 then p_seconds else 0 end) end;
end
$$;

-- Write down what became of calls: [{"id", "state", …}, …], see sql/README.md. What is exact replaces what is unknown, and
-- nothing replaces what is exact; so it may come twice, late, and in any order. The caller holds the locks of their runs.
create or replace function image_jobs.close_calls(p_calls jsonb)
returns void language plpgsql volatile set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
as $$
begin
  with said as materialized (
    select distinct on (k.id) k.*
    from jsonb_to_recordset(p_calls) as k (
      id bigint, state text, cost numeric, estimate numeric, model text, provider_job_id text,
      sent_ago double precision, image boolean, image_ago double precision)
    order by k.id, array_position(array['charged', 'free', 'unknown', 'open'], k.state)
  ),
  locked as materialized (
    select s.*, c.state as was,
      case when c.state = 'open' or c.state = 'unknown' and s.state in ('charged', 'free')
        then coalesce(s.state, c.state) else c.state end as becomes
    from said s join image_jobs.calls c on c.id = any (array[s.id])
    order by s.id
    for update of c
  ),
  written as (
    update image_jobs.calls c
    set state = l.becomes,
      cost = coalesce(c.cost, case when l.state = 'charged' and l.becomes = 'charged' then l.cost end),
      image = c.image or l.becomes = 'charged' and coalesce(l.image, false),
      estimate = case when l.was in ('open', 'unknown') then coalesce(l.estimate, c.estimate) else c.estimate end,
      model = case when l.was in ('open', 'unknown') then coalesce(l.model, c.model) else c.model end,
      provider_job_id = coalesce(c.provider_job_id, l.provider_job_id),
      sent_at = least(c.sent_at, image_jobs.seconds_ago(l.sent_ago)),
      image_at = coalesce(image_jobs.seconds_ago(l.image_ago), c.image_at)
    from locked l
    where c.id = any (array[l.id])
    returning c.provider, c.model, c.state, c.cost, c.estimate, l.was
  )
  -- As image_jobs.tally_calls does.
  insert into image_jobs.tallies (metric, provider, model, result, count, usd)
  select 'calls', w.provider, w.model, w.state, count(*),
    sum(case w.state when 'charged' then w.cost when 'unknown' then w.estimate end)
  from written w
  where w.state <> w.was
  group by w.provider, w.model, w.state;
end
$$;

-- Returns the calls of a settlement: those that it names, else what follows from its outcome. p_call: runs.call, where the
-- claim still holds.
create or replace function image_jobs.calls_of(p_settlement jsonb, p_call bigint)
returns jsonb language plpgsql immutable set search_path = ''
as $$
begin
  return case
    when jsonb_typeof(p_settlement -> 'calls') = 'array' then p_settlement -> 'calls'
    when p_settlement ->> 'outcome' = 'released' and p_call is not null then '[]'
    else jsonb_build_array(jsonb_build_object(
      'id', coalesce(p_call, (p_settlement ->> 'claim')::bigint),
      'state', case p_settlement ->> 'outcome'
        when 'completed' then 'charged' when 'parked' then 'open' when 'released' then 'free'
        else case when (p_settlement ->> 'refund')::boolean then 'free' else 'unknown' end end,
      'image', p_settlement ->> 'outcome' = 'completed',
      'cost', case when p_settlement ->> 'outcome' = 'completed' then p_settlement -> 'payload' -> 'cost' end,
      'provider_job_id', p_settlement -> 'provider_job_id')) end;
end
$$;

-- Close calls that their runs name no more: what became of them is unknown until the holder says it, or, of a provider job
-- that is being cancelled, the provider. The caller holds the locks of the runs.
create or replace function image_jobs.lose_calls(p_calls bigint[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_changed bigint[];
begin
  -- Of no call the planner takes each condition for met, and any index for a fit one.
  if cardinality(p_calls) = 0 then
    return;
  end if;
  with lost as (
    update image_jobs.calls c set state = 'unknown'
    where c.id = any (p_calls) and c.state = 'open'
      and not exists (select from image_jobs.cancellations x where x.call = c.id offset 0)
    returning c.id
  )
  select array_agg(l.id) into v_changed from lost l;
  if v_changed is not null then
    perform image_jobs.tally_calls(v_changed);
  end if;
end
$$;

-- Returns what a run's payload says of its costs under a ticket: `cost`, the sum of its charged calls, null if one of them is
-- unpriced; `possibleCost`, the estimates of unknown ones. Neither where there is no such call.
create or replace function image_jobs.costs_of(p_run varchar, p_ticket bigint)
returns jsonb language plpgsql stable set search_path = ''
as $$
begin
  return (
    select case when count(*) filter (where c.state = 'charged') = 0 then '{}'
      else jsonb_build_object('cost',
        case when bool_and(c.cost is not null) filter (where c.state = 'charged') then sum(c.cost) end) end
      || case when count(*) filter (where c.state = 'unknown') = 0 then '{}'
      else jsonb_build_object('possibleCost', sum(c.estimate) filter (where c.state = 'unknown')) end
    from image_jobs.calls c
    where c.run_id = p_run and c.ticket = p_ticket);
end
$$;

-- Returns the times of a completed run in milliseconds, {queuedMs, generateMs, storeMs, settleMs}: from insert or requeue until
-- the request of the call left that brought the picture, until that was in hand, until it was stored, until now. Each begins
-- where the one before ends, so they add up to all of it.
create or replace function image_jobs.timings_of(r public.runs, p_call bigint, p_stored_at timestamptz, p_now timestamptz)
returns jsonb language plpgsql stable set search_path = ''
as $$
declare
  v_call image_jobs.calls;
  v_queued_at timestamptz := coalesce(r.queued_at, r.created_at, r.started_at);
  v_sent_at timestamptz;
  v_image_at timestamptz;
  v_stored_at timestamptz;
  v_sent bigint;
  v_image bigint;
  v_stored bigint;
begin
  select c.* into v_call from image_jobs.calls c where c.id = p_call;
  -- Of a job whose submission nobody wrote down, the claim that made it, or the operator's word, is the nearest that is known.
  v_sent_at := coalesce(v_call.sent_at, least(v_call.opened_at, r.submitted_at), v_queued_at);
  v_sent_at := least(greatest(v_sent_at, v_queued_at), p_now);
  v_stored_at := least(greatest(coalesce(p_stored_at, p_now), v_sent_at), p_now);
  v_image_at := least(greatest(coalesce(v_call.image_at, v_stored_at), v_sent_at), v_stored_at);
  v_sent := round(1000 * extract(epoch from v_sent_at - v_queued_at));
  v_image := round(1000 * extract(epoch from v_image_at - v_queued_at));
  v_stored := round(1000 * extract(epoch from v_stored_at - v_queued_at));
  return jsonb_build_object('queuedMs', v_sent, 'generateMs', v_image - v_sent, 'storeMs', v_stored - v_image,
    'settleMs', round(1000 * extract(epoch from p_now - v_queued_at))::bigint - v_stored);
end
$$;

-- Returns the times of a failed run as far as it got, {"timings": {…}}: queuedMs, with a call that left generateMs, and with a
-- picture storeMs. The last of them ends now, so they add up to all of it, too.
create or replace function image_jobs.timings_of_failure(r public.runs, p_now timestamptz)
returns jsonb language plpgsql stable set search_path = ''
as $$
declare
  v_queued_at timestamptz := least(coalesce(r.queued_at, r.created_at, r.started_at), p_now);
  v_sent_at timestamptz;
  v_image_at timestamptz;
  v_sent bigint;
  v_image bigint;
  v_all bigint := round(1000 * extract(epoch from p_now - v_queued_at));
begin
  select least(greatest(c.sent_at, v_queued_at), p_now), case when c.image_at is not null then least(greatest(c.image_at, c.sent_at, v_queued_at), p_now) end
  into v_sent_at, v_image_at
  from image_jobs.calls c where c.id = coalesce(r.call, r.claim) and c.sent_at is not null;
  v_sent := coalesce(round(1000 * extract(epoch from v_sent_at - v_queued_at)), v_all);
  v_image := coalesce(round(1000 * extract(epoch from v_image_at - v_queued_at)), v_all);
  return jsonb_build_object('timings', jsonb_build_object('queuedMs', v_sent)
    || case when v_sent_at is null then '{}' else jsonb_build_object('generateMs', v_image - v_sent) end
    || case when v_image_at is null then '{}' else jsonb_build_object('storeMs', v_all - v_image) end);
end
$$;

-- Returns the cost of a run whose provider job another run has ordered, too, and pays for; nothing for any other run.
create or replace function image_jobs.shared_cost(r public.runs)
returns jsonb language plpgsql stable set search_path = ''
as $$
begin
  if r.call is not null and exists (select from image_jobs.calls c where c.id = r.call and c.run_id <> r.id) then
    return '{"cost": 0}';
  end if;
  return '{}';
end
$$;

-- Bring the costs in the payloads of completed and failed runs up to date, after calls of theirs were closed. The caller holds
-- their locks.
create or replace function image_jobs.refresh_costs(p_runs varchar[])
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  perform set_config('image_jobs.writer', 'daemon', true);
  update public.runs r
  set payload = r.payload - 'possibleCost' || k.costs
  from (
    select o.id, image_jobs.costs_of(o.id, o.ticket) as costs
    from unnest(p_runs) as p (id) join public.runs o on o.id = any (array[p.id])
    where (o.kind = 'image_gen') is true and o.status in ('completed', 'failed')
  ) k
  where r.id = any (array[k.id])
    and (r.payload -> 'cost', r.payload -> 'possibleCost') is distinct from (k.costs -> 'cost', k.costs -> 'possibleCost')
    and (k.costs <> '{}' or r.payload ? 'possibleCost');
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

-- Returns the call under which a provider job was made for a run, as far as can be told: the one that names the job, else the
-- latest that may have made one.
create or replace function image_jobs.call_of_job(p_run varchar, p_ticket bigint, p_provider text, p_provider_job_id text)
returns bigint language sql stable set search_path = ''
as $$
  select c.id from image_jobs.calls c
  where c.run_id = p_run and c.ticket = p_ticket and c.provider = p_provider
    and (c.provider_job_id = p_provider_job_id or c.provider_job_id is null and c.state in ('open', 'unknown'))
  order by c.provider_job_id is null, c.id desc
  limit 1
$$;

-- Returns which of these settlements are of a provider job that another call has made: {claim: call}. Such a job was found at
-- the provider, where an earlier attempt had made it, or the provider returned the same one to several runs (for a day: ids
-- may begin anew). The caller holds the locks of the runs; only one transaction at a time looks at a job.
create or replace function image_jobs.makers_of_jobs(p_settlements jsonb)
returns jsonb language plpgsql volatile set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
as $$
declare
  v_jobs jsonb;
begin
  select jsonb_agg(jsonb_build_object('run', s.id, 'claim', s.claim, 'job', s.provider_job_id, 'found', s.found,
    'ticket', coalesce(s.ticket, r.ticket), 'provider', split_part(coalesce(s.processor, r.routed_to, r.processor, ''), ':', 1)))
  into v_jobs
  from jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, ticket bigint, processor text, provider_job_id text, found boolean)
  left join public.runs r on r.id = any (array[s.id])
  where s.outcome = 'parked' and s.provider_job_id is not null
    and case when r.claim = s.claim then r.provider_job_id is null else s.ticket is not null end;
  if v_jobs is null then
    return null;
  end if;
  perform pg_advisory_xact_lock(hashtextextended('image_jobs provider job ' || j.name, 0))
  from (
    select distinct j.value ->> 'provider' || ' ' || (j.value ->> 'job') as name from jsonb_array_elements(v_jobs) j order by 1
  ) j;
  return (
    select jsonb_object_agg(j.claim, maker.call)
    from (
      select t.*, min(t.claim) over (partition by t.provider, t.job) as first_claim
      from jsonb_to_recordset(v_jobs) as t (run varchar, claim bigint, ticket bigint, provider text, job text, found boolean)
    ) j
    cross join lateral (select coalesce(
      (select min(c.id)
        from (select k.* from image_jobs.calls k where k.provider_job_id = j.job offset 0) c
        where c.provider = j.provider and c.state <> 'free' and c.opened_at > image_jobs.now() - interval '1 day'),
      case when j.found then (
        select max(c.id)
        from (select k.* from image_jobs.calls k where k.run_id = j.run offset 0) c
        where c.ticket = j.ticket and c.id < j.claim and c.provider = j.provider
          and c.state = 'unknown' and c.provider_job_id is null) end,
      j.first_claim) as call) maker
    where maker.call <> j.claim);
end
$$;

-- Close as unknown the open calls that neither a run nor a cancellation names, of p_limit open ones behind p_after.
-- Returns the last one looked at; null at the end.
create or replace function image_jobs.sweep_calls(p_after bigint default 0, p_limit integer default 5000)
returns bigint language plpgsql volatile set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
as $$
declare
  v_open bigint[];
  v_lost bigint[];
  v_runs varchar[];
  v_changed bigint[];
begin
  select array_agg(o.id order by o.id) into v_open
  from (select c.id from image_jobs.calls c where c.state = 'open' and c.id > p_after order by c.id limit p_limit) o;
  if v_open is null then
    return null;
  end if;
  select array_agg(c.id), array_agg(distinct c.run_id) into v_lost, v_runs from image_jobs.calls c
  where c.id = any (v_open) and c.state = 'open'
    and not exists (select from public.runs r where r.id = c.run_id and c.id in (r.claim, r.call) offset 0)
    and not exists (select from image_jobs.cancellations x where x.call = c.id offset 0);
  if v_lost is not null then
    -- Of a run that is locked the next sweep sees to it.
    with locked as materialized (
      select r.id from public.runs r where r.id = any (v_runs) order by r.id for update skip locked
    )
    select array_agg(k.id) into v_runs from locked k;
    v_runs := coalesce(v_runs, '{}');
    with lost as materialized (
      select c.id from image_jobs.calls c
      where c.id = any (v_lost) and c.state = 'open'
        and (c.run_id = any (v_runs) or not exists (select from public.runs r where r.id = c.run_id offset 0))
        and not exists (select from public.runs r where r.id = c.run_id and c.id in (r.claim, r.call) offset 0)
      order by c.id
      for update skip locked
    ),
    written as (
      update image_jobs.calls c set state = 'unknown' from lost l where c.id = any (array[l.id]) returning c.id
    )
    select array_agg(w.id) into v_changed from written w;
    if v_changed is not null then
      perform image_jobs.tally_calls(v_changed);
    end if;
    perform image_jobs.refresh_costs(v_runs);
  end if;
  return v_open[cardinality(v_open)];
end
$$;

-- Limits of what users may use. Operators are never refused; but what they insert for a user counts as that user's.
--
-- Days and months are those of UTC. Of a period count its calls (their cost; the estimate while that is not known), and runs that
-- wait and have no call of their present ticket that could be charged. Of dollars of all together count calls only: claims ask
-- for those, and inserts would add up what waits of everybody, one at a time. What another member requeues is that member's from
-- then on: else each could spend the budgets of all others.
-- An image counts unless its call was free, or charged without one. Written out at each place: a function that has a search_path
-- is called for every row, which took a budget of 100,000 calls five seconds.

do $$
begin
  -- Once: a limit that an operator has deleted does not come back.
  if to_regclass('image_jobs.usage_limits') is null then
    create table image_jobs.usage_limits (
      id bigint generated always as identity primary key,
      applies_to text not null
        check (applies_to in ('all together', 'each user', 'each anonymous user', 'user', 'workflow')),
      user_id uuid,
      workflow_id uuid,
      max_waiting integer check (max_waiting >= 0),
      images_per_day integer check (images_per_day >= 0),
      usd_per_day numeric,
      usd_per_month numeric,
      -- NaN is greater than any number: such a limit would limit nothing.
      constraint usage_limits_in_usd_are_amounts
        check (usd_per_day >= 0 and usd_per_day < 'infinity' and usd_per_month >= 0 and usd_per_month < 'infinity'),
      constraint usage_limits_name_what_they_apply_to
        check ((user_id is not null) = (applies_to = 'user') and (workflow_id is not null) = (applies_to = 'workflow')),
      constraint usage_limits_one_row_each unique nulls not distinct (applies_to, user_id, workflow_id)
    );
    insert into image_jobs.usage_limits (applies_to, max_waiting) values ('each user', 500);
  end if;
end
$$;
comment on table image_jobs.usage_limits is
  'Change by SQL at any time. A null limit: unlimited. A row for one user holds instead of the one for each.';
comment on column image_jobs.usage_limits.max_waiting is 'Runs in status pending; exact.';
comment on column image_jobs.usage_limits.images_per_day is 'Calls that made an image, or may have, and runs in line; exact.';
comment on column image_jobs.usage_limits.usd_per_day is
  'What has no known price counts nothing. Of all together, claims ask too: then runs wait.';
comment on column image_jobs.usage_limits.usd_per_month is 'As usd_per_day.';

-- The use of all calls together, by hours that are over: to add up a month of calls takes too long for each claim. What is
-- final never changes; of the others their present state counts.
create table if not exists image_jobs.used_hours (
  hour timestamptz primary key,
  images bigint not null,
  usd numeric not null,
  unsettled bigint[] not null
);
comment on table image_jobs.used_hours is 'What the calls of an hour have used; unsettled: those that were not final when they were added up.';

-- Returns the beginning of the day or the month (UTC).
create or replace function image_jobs.period_start(p_period text)
returns timestamptz language sql volatile set search_path = ''
as $$
  select date_trunc(p_period, image_jobs.now(), 'UTC')
$$;

-- Returns the end of the day or the month (UTC).
create or replace function image_jobs.period_end(p_period text)
returns timestamptz language sql volatile set search_path = ''
as $$
  select ((image_jobs.period_start(p_period) at time zone 'UTC') + ('1 ' || p_period)::interval) at time zone 'UTC'
$$;

-- Returns the beginning of the first hour that is not over, or has not been for ten minutes: in those before it no transaction
-- began that is not done yet.
create or replace function image_jobs.first_open_hour()
returns timestamptz language sql volatile set search_path = ''
as $$
  select date_trunc('hour', image_jobs.now() - interval '10 minutes', 'UTC')
$$;

-- Add up the hours of this month that are over. One that a clock which was wrong for a while has added up too early is taken back.
create or replace function image_jobs.add_up_hours()
returns void language sql volatile set search_path = ''
as $$
  delete from image_jobs.used_hours d where d.hour >= (select image_jobs.first_open_hour());
  insert into image_jobs.used_hours (hour, images, usd, unsettled)
  select h.hour, count(*) filter (where c.state = 'charged' and c.image),
    coalesce(sum(coalesce(c.cost, c.estimate, 0)) filter (where c.state = 'charged'), 0),
    coalesce(array_agg(c.id) filter (where c.state in ('open', 'unknown')), '{}')
  from generate_series(
    greatest(image_jobs.period_start('month'), (select max(d.hour) + interval '1 hour' from image_jobs.used_hours d)),
    image_jobs.first_open_hour() - interval '1 hour', interval '1 hour') as h (hour)
  left join image_jobs.calls c on c.opened_at >= h.hour and c.opened_at < h.hour + interval '1 hour'
  group by h.hour
  on conflict (hour) do nothing
$$;

-- Returns what all calls since the beginning of a day or month have used.
create or replace function image_jobs.used_together(p_since timestamptz, out images bigint, out usd numeric)
language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
declare
  v_open timestamptz := image_jobs.first_open_hour();
  v_from timestamptz := greatest(p_since, (
    select max(h.hour) + interval '1 hour' from image_jobs.used_hours h where h.hour >= p_since and h.hour < v_open));
begin
  select coalesce(sum(u.images), 0), coalesce(sum(u.usd), 0) into images, usd
  from (
    select h.images, h.usd from image_jobs.used_hours h where h.hour >= p_since and h.hour < v_open
    union all
    select case when c.state <> 'charged' or c.image then 1 else 0 end, coalesce(c.cost, c.estimate, 0)
    from image_jobs.used_hours h
    cross join lateral unnest(h.unsettled) as o (id)
    join image_jobs.calls c on c.id = o.id
    where h.hour >= p_since and h.hour < v_open and c.state <> 'free'
    union all
    select case when c.state <> 'charged' or c.image then 1 else 0 end, coalesce(c.cost, c.estimate, 0)
    from image_jobs.calls c
    where c.opened_at >= v_from and c.state <> 'free'
  ) u;
end
$$;

-- Returns the likely cost in USD of a run that may go to any of these processors: of the dearest. Its first one may be closed, or
-- have no known price, and where it goes from there no limit is asked again.
create or replace function image_jobs.dearest_cost(p_processors varchar[], p_spec jsonb)
returns numeric language plpgsql volatile set search_path = ''
as $$
begin
  return (select max(image_jobs.estimate_cost(p.name, p_spec)) from unnest(p_processors) as p (name));
end
$$;

-- Returns what a user, or a workflow, has used since the beginning of a day or month, with what waits. Equal requests are
-- priced once.
create or replace function image_jobs.used_since(
  p_user uuid, p_workflow uuid, p_since timestamptz, out images bigint, out usd numeric)
language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_custom_plan
as $$
begin
  select coalesce(sum(u.images), 0), coalesce(sum(u.usd), 0) into images, usd
  from (
    select case when c.state <> 'charged' or c.image then 1 else 0 end as images, coalesce(c.cost, c.estimate, 0) as usd
    from image_jobs.calls c
    where c.opened_at >= p_since and c.state <> 'free'
      and (p_user is null or c.user_id = p_user) and (p_workflow is null or c.workflow_id = p_workflow)
    union all
    select w.images, w.images * coalesce(image_jobs.dearest_cost(w.processors, w.spec), 0)
    from (
      select count(*) as images, coalesce(r.routed_to, r.processor) || case when r.metadata ? 'fallback'
          then image_jobs.remaining_fallbacks(r.metadata, r.processor, r.routed_to) else '{}'::varchar[] end as processors,
        jsonb_build_object(
        'quality', r.metadata #> '{promptSpec,quality}', 'size', r.metadata #> '{promptSpec,size}',
        'aspectRatio', r.metadata #> '{promptSpec,aspectRatio}') as spec
      from (
        select r.id, r.ticket, r.routed_to, r.processor, r.metadata from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) is not null
          and (p_user is null or coalesce(r.created_by, r.subject_id) = p_user and r.created_by is not null and r.requeued_by is null)
          and (p_workflow is null or r.subject_id = p_workflow)
        union all
        select r.id, r.ticket, r.routed_to, r.processor, r.metadata from public.runs r
        where p_user is not null and r.requeued_by = p_user and r.kind = 'image_gen' and r.queue_state = 'pending'
      ) r
      where not exists (
          select from image_jobs.calls c where c.run_id = r.id and c.ticket = r.ticket and c.state <> 'free')
      group by 2, 3
    ) w
  ) u;
end
$$;

-- Returns how many images all together have made on a day, with what waits; counted no further than p_limit.
create or replace function image_jobs.images_together(p_since timestamptz, p_limit bigint)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off set plan_cache_mode = force_custom_plan
as $$
declare
  v_made bigint := (select t.images from image_jobs.used_together(p_since) t);
begin
  return v_made + (
    select count(*)
    from (
      select from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) is not null
        and not exists (
          select from image_jobs.calls c where c.run_id = r.id and c.ticket = r.ticket and c.state <> 'free')
      limit greatest(p_limit - v_made, 0)
    ) counted);
end
$$;

-- Returns how many runs of a user, or in a workflow, or (both null) of all together wait; counted no further than p_limit.
create or replace function image_jobs.count_waiting(p_user uuid, p_workflow uuid, p_limit bigint)
returns bigint language plpgsql volatile set search_path = ''
  set enable_seqscan = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_waiting bigint;
begin
  -- Each insert of a user asks this, so its plan is kept: to make one takes twice as long as to count.
  if p_user is not null then
    return (
      select count(*)
      from (
        select from public.runs r
        where r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) = p_user
          and (r.kind = 'image_gen') is true and r.created_by is not null and r.requeued_by is null
        union all
        select from public.runs r
        where r.requeued_by = p_user and r.queue_state = 'pending' and (r.kind = 'image_gen') is true
        limit p_limit
      ) counted);
  end if;
  -- And this is planned for each workflow: how many of its runs have ended decides the index.
  execute 'select count(*) from (
      select from public.runs r
      where r.kind = ''image_gen'' and r.queue_state = ''pending'' and ($1 is null or r.subject_id = $1)
      limit $2
    ) counted' into v_waiting using p_workflow, p_limit;
  return v_waiting;
end
$$;

-- Returns the limits of a user; null: none. Whether a user is anonymous, only their own token says.
create or replace function image_jobs.limits_of_user(p_user uuid)
returns image_jobs.usage_limits language plpgsql volatile set search_path = ''
as $$
begin
  return (
    select l from image_jobs.usage_limits l
    where l.user_id = p_user or l.applies_to = 'each user'
      or l.applies_to = 'each anonymous user' and p_user = image_jobs.current_user_id()
        and nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'is_anonymous' = 'true'
    order by case l.applies_to when 'user' then 1 when 'each anonymous user' then 2 else 3 end limit 1);
end
$$;

-- Refuse more than a limit allows: PT429, which PostgREST returns as 429. The hint says when there is more again.
create or replace function image_jobs.refuse_usage(p_message text, p_hint text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = 'PT429', message = p_message, hint = p_hint;
end
$$;

-- Refuse the caller if a limit of a user, a workflow, or (both null) of all together is passed; p_more runs, which cost p_usd, are
-- about to be added. The caller holds the lock of the limit.
create or replace function image_jobs.check_limit(
  p_limit image_jobs.usage_limits, p_user uuid, p_workflow uuid, p_more integer, p_usd numeric)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_whose text := case when p_user is not null then 'One user' when p_workflow is not null then 'This workflow' else 'All together' end;
  v_together boolean := num_nonnulls(p_user, p_workflow) = 0;
  v_used record;
  v_max numeric;
  v_period text;
  v_since timestamptz;
begin
  if p_limit.max_waiting is not null
    and image_jobs.count_waiting(p_user, p_workflow, p_limit.max_waiting + 1::bigint) + p_more > p_limit.max_waiting
  then
    perform image_jobs.refuse_usage(
      format('At most %s runs%s may wait at a time, and this would make more.', p_limit.max_waiting,
        case when p_user is not null then ' of one user' when p_workflow is not null then ' of this workflow' else '' end),
      -- No time to try again: a limit of 0, or a closed provider, would make it a promise that is not kept.
      'Cancel runs that wait, or wait until some have started.');
  end if;
  foreach v_period in array array['day', 'month'] loop
    v_max := case v_period when 'day' then p_limit.usd_per_day else p_limit.usd_per_month end;
    continue when v_max is null and (v_period = 'month' or p_limit.images_per_day is null);
    v_since := image_jobs.period_start(v_period);
    if v_together then
      select case when v_period = 'day' and p_limit.images_per_day is not null
        then image_jobs.images_together(v_since, p_limit.images_per_day + 1::bigint) end as images,
        case when v_max is not null then (select t.usd from image_jobs.used_together(v_since) t) end as usd into v_used;
    else
      select u.images, u.usd into v_used from image_jobs.used_since(p_user, p_workflow, v_since) u;
    end if;
    if v_period = 'day' and v_used.images + p_more > p_limit.images_per_day then
      perform image_jobs.refuse_usage(
        format('%s may make %s images a day, and this would be more.', v_whose, p_limit.images_per_day),
        image_jobs.opens_again('day', p_limit.images_per_day));
    elsif v_used.usd + coalesce(p_usd, 0) > v_max and not v_together or v_used.usd >= v_max and v_together then
      perform image_jobs.refuse_usage(
        format('%s may spend %s USD a %s, and this would be more.', v_whose, v_max, v_period),
        image_jobs.opens_again(v_period, v_max));
    end if;
  end loop;
end
$$;

-- Returns the hint that says when a limit of a period opens again; one of 0 never does.
create or replace function image_jobs.opens_again(p_period text, p_max numeric)
returns text language sql volatile set search_path = ''
as $$
  select case when p_max > 0
    then to_char(image_jobs.period_end(p_period) at time zone 'UTC', '"It opens again at "YYYY-MM-DD"T"HH24:MI:SS"Z."')
    else 'Ask an operator for a larger limit.' end
$$;

-- Refuse the caller if these users, or these workflows, use more than they may; p_more runs, which cost p_usd, are about to be
-- added. Locks what it counts until the end of the transaction, sorted: two statements never wait for each other's.
create or replace function image_jobs.check_usage(p_users uuid[], p_workflows uuid[], p_more integer, p_usd numeric)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_limits image_jobs.usage_limits[];
  v_limit image_jobs.usage_limits;
  v_users uuid[];
  v_key bigint;
begin
  select array_agg(w.l order by w.who), array_agg(w.who order by w.who) into v_limits, v_users
  from (
    select image_jobs.limits_of_user(u.id) as l, u.id as who from unnest(p_users) as u (id)
    union all
    select w, null from image_jobs.usage_limits w where w.workflow_id = any (p_workflows) or w.applies_to = 'all together'
  ) w
  where num_nonnulls((w.l).max_waiting, (w.l).images_per_day, (w.l).usd_per_day, (w.l).usd_per_month) > 0;
  for v_key in
    select distinct hashtextextended(concat_ws(' ', 'image_jobs usage', case when o.who is null then o.applies_to else 'user' end,
      coalesce(o.who, o.workflow_id)), 0)
    from unnest(v_limits) with ordinality as l
    cross join lateral (select v_users[l.ordinality] as who, l.applies_to, l.workflow_id) o
    -- Of dollars of all together counts nothing that an insert adds.
    where l.applies_to <> 'all together' or num_nonnulls(l.max_waiting, l.images_per_day) > 0
    order by 1
  loop
    perform pg_advisory_xact_lock(v_key);
  end loop;
  for v_place in 1..coalesce(cardinality(v_limits), 0) loop
    v_limit := v_limits[v_place];
    perform image_jobs.check_limit(v_limit, v_users[v_place], v_limit.workflow_id, p_more, p_usd);
  end loop;
end
$$;

-- Returns whether all together have a limit in dollars.
create or replace function image_jobs.has_budget()
returns boolean language plpgsql volatile set search_path = ''
as $$
begin
  return exists (
    select from image_jobs.usage_limits l
    where l.applies_to = 'all together' and num_nonnulls(l.usd_per_day, l.usd_per_month) > 0);
end
$$;

-- Returns how many USD all together may still spend on starts, and if none, when there are more; nulls without such a limit.
-- What waits is not counted: it is what asks.
create or replace function image_jobs.budget_left(out usd numeric, out opens_at timestamptz)
language plpgsql volatile set search_path = ''
as $$
declare
  v_limit image_jobs.usage_limits;
  v_period text;
  v_left numeric;
begin
  select l.* into v_limit from image_jobs.usage_limits l where l.applies_to = 'all together';
  foreach v_period in array array['day', 'month'] loop
    v_left := case v_period when 'day' then v_limit.usd_per_day else v_limit.usd_per_month end;
    continue when v_left is null;
    v_left := v_left - (select u.usd from image_jobs.used_together(image_jobs.period_start(v_period)) u);
    usd := least(usd, v_left);
    opens_at := case when v_left <= 0 then image_jobs.period_end(v_period) else opens_at end;
  end loop;
end
$$;

-- Returns what the caller has used and may use: of the caller, and of each of the caller's workflows that has limits.
create or replace function image_jobs.usage_of_caller()
returns table (
  scope text, period text, workflow_id uuid, used_images bigint, max_images integer, used_usd numeric, max_usd numeric,
  waiting bigint, max_waiting integer, resets_at timestamptz)
language plpgsql volatile security definer set search_path = ''
as $$
#variable_conflict use_column
declare
  v_user uuid := image_jobs.current_user_id();
begin
  if v_user is null then
    return;
  end if;
  return query
  select case when o.workflow_id is null then 'user' else 'workflow' end, p.period, o.workflow_id, u.images,
    case p.period when 'day' then o.images_per_day end, u.usd,
    case p.period when 'day' then o.usd_per_day else o.usd_per_month end,
    image_jobs.count_waiting(case when o.workflow_id is null then v_user end, o.workflow_id, 1000000), o.max_waiting,
    image_jobs.period_end(p.period)
  from (
    select l.max_waiting, l.images_per_day, l.usd_per_day, l.usd_per_month, null::uuid as workflow_id
    from (select) nothing left join image_jobs.limits_of_user(v_user) l on true
    union all
    select w.max_waiting, w.images_per_day, w.usd_per_day, w.usd_per_month, w.workflow_id from image_jobs.usage_limits w
    where w.workflow_id = any (array(select image_jobs.my_workflows()))
  ) o
  cross join lateral (select unnest(case when o.usd_per_month is null then array['day'] else array['day', 'month'] end) as period) p
  cross join lateral image_jobs.used_since(
    case when o.workflow_id is null then v_user end, o.workflow_id, image_jobs.period_start(p.period)) u;
end
$$;

create or replace view public.image_usage with (security_invoker = on) as
select u.scope, u.used_images, u.max_images, u.used_usd, u.max_usd, u.waiting, u.max_waiting, u.resets_at, u.period, u.workflow_id
from image_jobs.usage_of_caller() u;
comment on view public.image_usage is
  'Image Job Orchestrator: what the caller has used and may use, of the day, and of the month where that is limited. Null: unlimited.';

-- insert → pending. A row is either good, or refused in one sentence.

-- Refuse a promptSpec that no provider could work with. Sentences are for the person who called insert().
create or replace function image_jobs.check_prompt(p_metadata jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_spec jsonb := p_metadata -> 'promptSpec';
  v_steps jsonb := p_metadata -> 'fallback';
  v_key text;
begin
  if jsonb_typeof(p_metadata) is distinct from 'object' then
    perform image_jobs.refuse('metadata must be an object with a promptSpec.', 'Set metadata to {"promptSpec": {"basePrompt": "…"}}.');
  end if;
  -- The JSON reader of a daemon may not survive all that Postgres can hold.
  if jsonb_path_exists(p_metadata, '$.**{65}') then
    perform image_jobs.refuse('metadata is nested more than 64 levels deep.', 'Store what is large elsewhere and give its URL.');
  end if;
  if jsonb_typeof(v_spec) is distinct from 'object' then
    perform image_jobs.refuse('metadata.promptSpec is missing.', 'Set metadata.promptSpec to {"basePrompt": "…"}.');
  end if;
  if jsonb_typeof(v_spec -> 'basePrompt') is distinct from 'string'
    or length(v_spec ->> 'basePrompt') not between 1 and 32000 then
    perform image_jobs.refuse('promptSpec.basePrompt must be a text of 1 to 32,000 characters.', 'Say what the picture should show.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'styleModifiers'), 'null') not in ('array', 'null')
    or jsonb_typeof(v_spec -> 'styleModifiers') = 'array'
      and jsonb_path_exists(v_spec, '$.styleModifiers[*] ? (@.type() != "string")') then
    perform image_jobs.refuse('promptSpec.styleModifiers must be a list of texts.', 'For example ["watercolour", "soft light"].');
  end if;
  if v_spec ->> 'size' !~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$' then
    perform image_jobs.refuse('promptSpec.size cannot be read.', 'Write it like 1024x1024, or leave it out.');
  end if;
  if v_spec ->> 'aspectRatio' !~ '^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$' then
    perform image_jobs.refuse('promptSpec.aspectRatio cannot be read.', 'Write it like 16:9, or leave it out.');
  end if;
  if v_spec ->> 'quality' not in ('standard', 'hd', 'low', 'medium', 'high', 'xhigh', 'max', 'auto') then
    perform image_jobs.refuse('promptSpec.quality is unknown.', 'Use standard or hd.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'seed'), 'null') <> 'null'
    and (jsonb_typeof(v_spec -> 'seed') <> 'number' or v_spec ->> 'seed' !~ '^[0-9]{1,18}$') then
    perform image_jobs.refuse('promptSpec.seed must be a whole number from 0 up.', 'Leave it out for a random one.');
  end if;
  foreach v_key in array array['size', 'aspectRatio', 'quality', 'negativePrompt', 'previousImage'] loop
    if coalesce(jsonb_typeof(v_spec -> v_key), 'null') not in ('string', 'null') then
      perform image_jobs.refuse(format('promptSpec.%s must be a text.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if coalesce(v_spec ->> 'previousImage', '') !~* '^(https?://[^\s]+)?$' then
    perform image_jobs.refuse('promptSpec.previousImage must be the URL of an image.', 'Upload the image first and give its https URL; never base64.');
  end if;
  foreach v_key in array array['nodeId', 'idempotencyKey', 'webhookUrl'] loop
    if coalesce(jsonb_typeof(p_metadata -> v_key), 'null') not in ('string', 'null')
      or octet_length(p_metadata ->> v_key) not between 1 and 2048 then
      perform image_jobs.refuse(format('metadata.%s must be a text of 1 to 2,048 bytes.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if (case jsonb_typeof(v_steps)
    when 'null' then false
    when 'array' then jsonb_array_length(v_steps) not between 1 and 5 or exists (
      select from jsonb_array_elements(v_steps) step
      where jsonb_typeof(step) <> 'string' or step #>> '{}' !~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$')
    else v_steps is not null end) then
    perform image_jobs.refuse('metadata.fallback must be a list of 1 to 5 texts like provider:model.',
      'For example ["google:gemini-3-pro-image"]; the view image_models lists what is on offer.');
  end if;
  if coalesce(jsonb_typeof(p_metadata -> 'fallbackOnRefusal'), 'null') not in ('boolean', 'null') then
    perform image_jobs.refuse('metadata.fallbackOnRefusal must be true or false.', 'Leave it out for false.');
  end if;
end
$$;

-- Returns a text with its percent-encoded ASCII characters as they are.
create or replace function image_jobs.percent_decoded(p_text text)
returns text language sql immutable set search_path = ''
as $$
  select string_agg(
    case when m.piece[1] ~ '^%([2-6][0-9A-Fa-f]|7[0-9A-Ea-e])$' then chr(get_byte(decode(substr(m.piece[1], 2), 'hex'), 0))
      else m.piece[1] end, '' order by m.place)
  from regexp_matches(p_text, '%[0-9A-Fa-f]{2}|[^%]+|%', 'g') with ordinality as m (piece, place)
$$;

-- Returns the workflow whose picture in storage a URL names; null if it names none. On any host: which one is ours, the daemon
-- knows. Reads whatever a server might take for such a path (percent-encoded, with dots, doubled slashes or capitals), so that
-- a right is asked for rather once too often: the daemon reads plain paths only, and compares the folder as text.
create or replace function image_jobs.pictured_workflow(p_url text)
returns uuid language plpgsql immutable set search_path = ''
as $$
declare
  -- No address of ours is longer before its file's name.
  v_path text := left(substring(p_url from '^[Hh][Tt][Tt][Pp][Ss]?://[^/?#]*(/[^?#]*)'), 2048);
  v_segments text[] := '{}';
  v_segment text;
  v_folder text;
begin
  if v_path is null then
    return null;
  end if;
  v_path := image_jobs.percent_decoded(v_path);
  foreach v_segment in array string_to_array(v_path, '/') loop
    if v_segment = '..' then
      v_segments := v_segments[:cardinality(v_segments) - 1];
    elsif v_segment not in ('', '.') then
      v_segments := v_segments || v_segment;
    end if;
  end loop;
  v_folder := lower(substring('/' || array_to_string(v_segments, '/')
    from '(?i)/storage/v1/object/(?:public|authenticated|sign)/[^/]+/([^/]+)/'));
  return case when v_folder ~ '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' then v_folder::uuid end;
end
$$;

-- Returns the workflow of the picture to refine, for the daemon, which reads storage with the service key; null where there is
-- none, or where no row has ever used that id, as of a folder of the application's. Refuses a workflow that the caller may not see.
create or replace function image_jobs.source_workflow(p_metadata jsonb, p_operator boolean)
returns uuid language plpgsql volatile set search_path = ''
as $$
declare
  v_workflow uuid := image_jobs.pictured_workflow(p_metadata #>> '{promptSpec,previousImage}');
begin
  if v_workflow is null or p_operator or image_jobs.can_access_workflow(v_workflow) then
    return v_workflow;
  end if;
  if exists (select from image_jobs.workflows w where w.id = v_workflow) then
    perform image_jobs.refuse('promptSpec.previousImage is of a workflow that you are no member of.',
      'Use an image of a workflow of yours, or ask that one''s owner to add you to workflow_members.');
  end if;
  return null;
end
$$;

-- Make a new row a pending run: checked, in its lane, with a claim and a ticket of its own.
-- Columns that are ours cannot be chosen by a client.
create or replace function image_jobs.accept_run()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_user uuid := image_jobs.current_user_id();
  v_operator boolean := image_jobs.is_operator();
begin
  -- Size before content: what is refused costs no more than its bytes. And every later write of the row checks all of it again.
  if octet_length(new.metadata::text) > 1048576 then
    perform image_jobs.refuse('metadata is larger than 1 MiB.', 'Upload what is large and give its URL.');
  end if;
  -- The base64 checks refuse it by their own name, which says more than any sentence here.
  if image_jobs.has_base64(new.metadata) or image_jobs.has_base64(new.payload) then
    perform image_jobs.found_workflow(new.subject_id);
    return new;
  end if;
  new.status := coalesce(new.status, 'pending');
  if new.status <> 'pending' then
    perform image_jobs.refuse('A new run must be pending.', 'Leave status out, or set it to pending.');
  end if;
  if new.subject_id is null then
    perform image_jobs.refuse('subject_id is missing.', 'Set it to the workflow''s id (a uuid).');
  end if;
  if new.id is null or new.id ~ '[^A-Za-z0-9_-]' or length(new.id) not between 1 and 200 then
    perform image_jobs.refuse('id must be 1 to 200 characters of A-Z, a-z, 0-9, _ and -.', 'It becomes a path in storage. Leave it out to get one.');
  end if;
  -- Counted apart, since a count in an expression makes it ten times as slow.
  if coalesce(new.processor, '') !~ '^[a-z0-9_-]+:[^\s:][^\s]*$'
    or strpos(new.processor, ':') > 51 or length(new.processor) - strpos(new.processor, ':') > 200 then
    perform image_jobs.refuse('processor must name a provider and a model.', 'Write it like openai:gpt-image-2; the view image_models lists what is on offer.');
  end if;
  if not isfinite(new.due_at) then
    perform image_jobs.refuse('due_at must be a point in time.', 'Leave it out to start at once.');
  end if;
  perform image_jobs.check_prompt(new.metadata);
  if not v_operator then
    -- A column that was there before may have a default.
    if coalesce(new.payload, '{}') <> '{}' or coalesce(new.progress, 0) <> 0 or coalesce(new.attempt, 0) <> 0
      or coalesce(new.max_attempts, 3) <> 3
      or new.claim is not null or new.ticket is not null or new.claimed_by is not null or new.provider_job_id is not null
      or new.finished_at is not null or new.message is not null or new.preview_url is not null or new.lane is not null
      or new.rank is not null or new.workflow_rank is not null or new.submitted_at is not null or new.refused_since is not null or new.webhook is not null
      or new.routed_to is not null or new.call is not null or new.unheld is not null or new.source_workflow is not null
      or new.queue_state is not null or new.queued_at is not null or new.requeued_by is not null
      or coalesce(new.priority, 0) <> 0 or coalesce(new.created_by, v_user) is distinct from v_user then
      perform image_jobs.refuse(
        'This insert sets a column that belongs to the orchestrator.',
        'Insert id (optional), kind, subject_id, status, processor, metadata and due_at only.');
    end if;
  end if;
  perform image_jobs.found_workflow(new.subject_id);
  if not v_operator and v_user is null then
    perform image_jobs.refuse_nameless();
  end if;
  if not v_operator and not image_jobs.can_access_workflow(new.subject_id) then
    raise exception using errcode = '42501', message = 'You are not a member of this workflow.',
      hint = 'Ask a member for a link (share_workflow), or use a new workflow id.';
  end if;
  perform image_jobs.keep_files_of(new.subject_id, new.id);

  new.source_workflow := image_jobs.source_workflow(new.metadata, v_operator);
  new.queue_state := 'pending';
  new.created_by := coalesce(v_user, new.created_by);
  new.created_at := v_now;
  new.updated_at := v_now;
  new.started_at := v_now;
  new.queued_at := v_now;
  new.requeued_by := null;
  new.finished_at := null;
  new.payload := nullif(new.payload, '{}');
  new.progress := 0;
  new.priority := coalesce(new.priority, 0);
  new.attempt := 0;
  new.max_attempts := greatest(coalesce(new.max_attempts, 3), 1);
  -- A past one of a client's would look like a wait of years.
  new.due_at := case when v_operator then coalesce(new.due_at, v_now) else greatest(new.due_at, v_now) end;
  new.claim := nextval('image_jobs.claims');
  new.ticket := nextval('image_jobs.tickets');
  new.claimed_by := null;
  new.provider_job_id := null;
  new.submitted_at := null;
  new.refused_since := null;
  new.webhook := null;
  new.routed_to := null;
  new.call := null;
  new.unheld := null;
  new.lane := image_jobs.lane_of(new.processor);
  new.rank := null;
  new.workflow_rank := null;
  -- A run that is put off takes its place in line when it is due.
  if new.due_at <= v_now then
    new.rank := image_jobs.next_rank(coalesce(new.created_by, new.subject_id), new.lane, new.priority);
    new.workflow_rank := image_jobs.next_workflow_rank(
      coalesce(new.created_by, new.subject_id), new.subject_id, new.lane, new.priority);
  end if;
  return new;
end
$$;

create or replace trigger image_jobs_accept_run before insert on public.runs
  for each row when (new.kind = 'image_gen') execute function image_jobs.accept_run();

-- Updates from outside: a plain UPDATE by an operator is checked and completed here.
--
-- The daemon's functions say so while they write (image_jobs.writer = 'daemon', for the length of the function only).
-- Every other writer is outside: columns that are ours stay as they are, and a status is a request:
-- 'pending' means "again, now", 'cancelled' means "stop". Both draw a new claim, so the daemon that held the run has lost it.

-- Guard every column but the status. Daemons' writes meet the deliveries of their provider jobs here: one trigger for all three,
-- since each that stands on the table costs a statement about rows of other kinds.
create or replace function image_jobs.guard_run()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  if current_setting('image_jobs.touched', true) is distinct from 'runs' then
    perform set_config('image_jobs.touched', 'runs', true);
  end if;
  if old.claimed_by is not null and old.ticket = new.ticket and new.claimed_by is null and new.provider_job_id is null
    and (new.status = 'pending'
      or new.status = 'failed' and new.payload ->> 'code' in ('outcome_unknown', 'timeout', 'storage_disk'))
  then
    new := image_jobs.resume_provider_job(old, new);
  end if;
  new.updated_at := image_jobs.now();
  -- Of one that is older than the migration nothing is in line until a requeue draws its ticket: see guard_status.
  new.queue_state := case when old.ticket is not null and new.status in ('pending', 'running') then new.status end;
  if current_setting('image_jobs.writer', true) = 'daemon' then
    if old.claimed_by is not null and new.status = 'running' and new.claimed_by is null and new.provider_job_id is not null then
      new := image_jobs.consume_deliveries(new);
    end if;
    return new;
  end if;
  if new.kind is distinct from old.kind then
    perform image_jobs.refuse('The kind of an image run never changes.', 'Insert a new run.');
  end if;
  if new.id <> old.id or new.processor is distinct from old.processor or new.subject_id is distinct from old.subject_id then
    perform image_jobs.refuse('id, processor and subject_id of a run never change.', 'Cancel this run and insert a new one.');
  end if;
  new.claim := old.claim;
  new.ticket := old.ticket;
  new.claimed_by := old.claimed_by;
  new.attempt := old.attempt;
  new.created_at := old.created_at;
  new.created_by := old.created_by;
  -- Forgotten while the provider has it, a job would be made and paid a second time. A requeue is what asks for another.
  if old.status = 'running' and old.provider_job_id is not null then
    new.provider_job_id := old.provider_job_id;
  end if;
  -- A provider job that an operator names is timed from now on: without that it would never time out.
  new.submitted_at := case
    when new.provider_job_id is distinct from old.provider_job_id and new.provider_job_id is not null then image_jobs.now()
    else old.submitted_at end;
  new.refused_since := old.refused_since;
  -- A new due_at or status ends the wait for a webhook.
  new.webhook := case when (new.status, new.due_at) is not distinct from (old.status, old.due_at) then old.webhook end;
  new.routed_to := old.routed_to;
  new.call := old.call;
  new.unheld := old.unheld;
  new.queued_at := old.queued_at;
  new.requeued_by := old.requeued_by;
  -- The source that the prompt names by now was not checked: a user's run reads the one that was.
  new.source_workflow := old.source_workflow;
  new.lane := old.lane;
  new.rank := old.rank;
  new.workflow_rank := old.workflow_rank;
  new.priority := coalesce(new.priority, old.priority, 0);
  new.max_attempts := greatest(coalesce(new.max_attempts, old.max_attempts, 3), 1);
  -- Without a time it would never be claimed again.
  if new.due_at is null and old.due_at is not null and old.status in ('pending', 'running') then
    new.due_at := image_jobs.now();
  elsif new.due_at = 'infinity' and old.due_at is distinct from new.due_at then
    perform image_jobs.refuse('due_at must be a point in time.', 'Set it to now() to start at once, or set status to cancelled.');
  end if;
  if old.status = 'pending' and old.ticket is not null then
    new.lane := image_jobs.lane_of(coalesce(new.routed_to, new.processor));
    if (new.due_at, new.priority, new.lane) is distinct from (old.due_at, old.priority, old.lane) then
      new.rank := null;
      new.workflow_rank := null;
      if new.due_at <= image_jobs.now() then
        new.rank := image_jobs.next_rank(coalesce(new.created_by, new.subject_id), new.lane, new.priority);
        new.workflow_rank := image_jobs.next_workflow_rank(
          coalesce(new.created_by, new.subject_id), new.subject_id, new.lane, new.priority);
      end if;
    end if;
  end if;
  return new;
end
$$;

-- Guard a status that is set, even to the value it has: pending → pending means "run it now".
create or replace function image_jobs.guard_status()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  if current_setting('image_jobs.writer', true) = 'daemon' then
    return new;
  end if;

  if new.status = 'pending' then
    new.claim := nextval('image_jobs.claims');
    new.ticket := nextval('image_jobs.tickets');
    new.queue_state := 'pending';
    new.claimed_by := null;
    new.attempt := 0;
    new.progress := 0;
    new.payload := null;
    new.message := null;
    new.preview_url := null;
    new.finished_at := null;
    new.refused_since := null;
    new.unheld := null;
    new.queued_at := v_now;
    new.requeued_by := nullif(image_jobs.current_user_id(), new.created_by);
    new.created_at := coalesce(old.created_at, old.started_at, v_now);
    if new.due_at is null or new.due_at is not distinct from old.due_at then
      new.due_at := v_now;
    end if;
    -- A provider job that timed out, or whose picture could not be fetched or stored, is polled again, not paid for again.
    if old.status = 'failed' and old.payload ->> 'code' ~ '^(polling_timeout$|download|storage)' then
      new.submitted_at := case when old.provider_job_id is null then null else v_now end;
      new.provider_job_id := old.provider_job_id;
    else
      new.submitted_at := null;
      new.provider_job_id := null;
      new.call := null;
    end if;
    -- Back to the first provider, unless a job at another is resumed.
    if new.provider_job_id is null then
      new.routed_to := null;
    end if;
    new.lane := image_jobs.lane_of(coalesce(new.routed_to, new.processor));
    new.rank := null;
    new.workflow_rank := null;
    if new.due_at <= v_now then
      new.rank := image_jobs.next_rank(coalesce(new.created_by, new.subject_id), new.lane, new.priority);
      new.workflow_rank := image_jobs.next_workflow_rank(
        coalesce(new.created_by, new.subject_id), new.subject_id, new.lane, new.priority);
    end if;
    return new;
  end if;

  if new.status = 'cancelled' and old.status in ('pending', 'running') then
    new.claim := nextval('image_jobs.claims');
    new.claimed_by := null;
    new.call := null;
    new.due_at := null;
    new.rank := null;
    new.workflow_rank := null;
    new.finished_at := v_now;
    new.message := null;
    return new;
  end if;

  if new.status = old.status and new.status <> 'cancelled' then
    return new;
  end if;
  perform image_jobs.refuse(
    format('A run that is %s cannot be set to %s by hand.', old.status, new.status),
    'Set status to pending to run it again, or use cancel_run, which leaves a finished run as it is.');
end
$$;

-- Triggers fire in the order of their names: 2 undoes what an outside writer did to our columns, before 3 reads the status.
-- They stand on a table that others may share, so each has a name of ours: `create or replace` must not replace one of theirs.
create or replace trigger image_jobs_2_guard_columns before update on public.runs
  for each row when (old.kind = 'image_gen' or new.kind = 'image_gen') execute function image_jobs.guard_run();
create or replace trigger image_jobs_3_guard_status before update of status on public.runs
  for each row when (old.kind = 'image_gen') execute function image_jobs.guard_status();

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

-- Projection: any change of runs, by any writer, becomes events, node data and notifications.
--
-- Statement-level triggers with transition tables collect the changes (image_jobs.run_change); image_jobs.project_changes does the rest.
-- The two are apart because they want opposite plans: pairing old and new rows must hash (a nested loop over transition
-- tables is quadratic), everything after it must walk indexes.
-- Each sets its plan in full, since the settings of a caller reach into what it calls.

do $$
begin
  if to_regtype('image_jobs.run_change') is null then
    create type image_jobs.run_change as (
      id varchar,
      subject_id uuid,
      node_id text,
      ticket bigint,
      old_ticket bigint,
      old_status varchar,
      status varchar,
      old_claim bigint,
      claim bigint,
      old_holder uuid,
      holder uuid,
      attempt integer,
      old_attempt integer,
      max_attempts integer,
      progress integer,
      old_progress integer,
      message text,
      old_message text,
      preview_url text,
      processor varchar,
      due_at timestamptz,
      provider_job_id text,
      old_provider_job_id text,
      payload jsonb,
      old_payload jsonb,
      old_processor varchar,
      call bigint,
      old_call bigint
    );
  end if;
end
$$;

-- Show nodes the newest of their runs. Locked nodes are left for the next sync (image_jobs.stale_nodes). A node that is
-- refused, by a trigger or a rule of the application or since its own data are older than a rule of ours, must not keep its
-- run from ending. p_failures: how often these nodes have been refused before.
create or replace function image_jobs.project_nodes(p_nodes varchar[], p_failures integer default 0)
returns void language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
  set lock_timeout = '50ms'
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_began timestamptz;
  v_locked varchar[];
  v_node varchar;
  v_sqlstate text;
  v_reason text;
begin
  -- Postgres waits in spite of `skip locked` if a row's last writer commits just now and the next has written already.
  begin
    with locked as (
      select n.id from public.workflow_nodes n where n.id = any (p_nodes) order by n.id for update skip locked
    )
    select array_agg(id) into v_locked from locked;
  exception when lock_not_available then
    v_locked := null;
  end;
  if cardinality(v_locked) is distinct from cardinality(p_nodes) then
    insert into image_jobs.stale_nodes (node_id)
    select n.id from public.workflow_nodes n
    where n.id = any (p_nodes) and not n.id = any (coalesce(v_locked, '{}'));
  end if;
  if v_locked is null then
    return;
  end if;

  perform set_config('image_jobs.writer', 'projection', true);
  v_began := clock_timestamp();
  begin
    perform image_jobs.write_nodes(v_locked);
    v_locked := '{}';
  exception when others or query_canceled or assert_failure then
    v_sqlstate := sqlstate;
    v_reason := sqlerrm;
  end;
  foreach v_node in array v_locked loop
    begin
      -- A statement that was cancelled because it took too long is not done over for each node.
      if cardinality(v_locked) = 1 or clock_timestamp() > v_began + interval '1 s' then
        perform image_jobs.postpone_node(v_node, p_failures, v_sqlstate, v_reason);
      else
        perform image_jobs.write_nodes(array[v_node]);
      end if;
    exception when others or query_canceled or assert_failure then
      perform image_jobs.postpone_node(v_node, p_failures, sqlstate, sqlerrm);
    end;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

-- Put a refused node off, for 1 s to 5 min, and warn on the run that it should show; once for each SQLSTATE.
create or replace function image_jobs.postpone_node(p_node varchar, p_failures integer, p_sqlstate text, p_reason text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if p_failures > 0 or not exists (
    select from image_jobs.stale_nodes s where s.node_id = p_node and s.failures > 0)
  then
    insert into image_jobs.stale_nodes (node_id, due_at, failures)
    values (p_node, image_jobs.now() + make_interval(secs => least(2 ^ least(p_failures, 9), 300)), p_failures + 1);
  end if;
  if p_reason like '%base64%' then
    insert into image_jobs.tallies (metric, provider, model, result, count) values ('base64', '', '', '', 1);
  end if;
  perform image_jobs.write_events(array[row(null, r.id, 'error', jsonb_build_object(
    'event', 'warning',
    'message', case when p_reason like '%base64%' then 'The node breaks the base64 rule, so it cannot show this run.'
      else 'The node cannot show this run: ' || left(p_reason, 500) end,
    'data', jsonb_build_object('nodeId', p_node, 'sqlstate', p_sqlstate)))::image_jobs.event])
  from public.workflow_nodes n
  cross join lateral (
    select newest.id from public.runs newest
    where newest.kind = 'image_gen' and newest.ticket is not null
      and newest.metadata ->> 'nodeId' = p_node and newest.subject_id = n.workflow_id
    order by newest.ticket desc limit 1
  ) r
  where n.id = p_node and not exists (
    select from public.run_events e
    where e.run_id = r.id and e.payload ->> 'event' = 'warning'
      and e.payload -> 'data' ->> 'nodeId' = p_node and e.payload -> 'data' ->> 'sqlstate' = p_sqlstate);
end
$$;

-- Write the newest run of each node into it, if it does not show that yet. A node with a pinned run shows that one until
-- there is a newer ticket. The caller holds the nodes' locks.
create or replace function image_jobs.write_nodes(p_nodes varchar[])
returns void language plpgsql volatile security definer set search_path = '' set enable_sort = off set jit = off
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  update public.workflow_nodes n
  set node_data = shown.node_data, run_ticket = r.ticket, pinned_run = null,
    version = nextval('image_jobs.node_versions'), updated_at = v_now
  from unnest(p_nodes) as target (id)
  join public.workflow_nodes w on w.id = any (array[target.id])
  cross join lateral (
    select newest.* from public.runs newest
    where newest.kind = 'image_gen' and newest.ticket is not null
      and newest.metadata ->> 'nodeId' = w.id and newest.subject_id = w.workflow_id
    order by newest.ticket desc limit 1
  ) r
  cross join lateral (
    select image_jobs.node_data(w.node_data, r.id, r.status, r.progress, r.message, r.preview_url, r.payload) as node_data
  ) shown
  where n.id = any (array[w.id])
    and (n.pinned_run is null or r.ticket > coalesce(n.run_ticket, 0))
    and (n.run_ticket is distinct from r.ticket or n.node_data - 'updatedAt' <> shown.node_data - 'updatedAt');
end
$$;

-- Tally the runs that ended otherwise than by the settlement of the daemon that held them, which counts and logs those itself. Of
-- the failed ones each, for the log; of cancelled ones, which may be many, how many.
create or replace function image_jobs.tally_endings(p_changes image_jobs.run_change[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into image_jobs.tallies (metric, provider, model, result, code, count, run_id, workflow_id, node_id, error)
  select 'runs', split_part(at.processor, ':', 1), substr(at.processor, strpos(at.processor, ':') + 1), c.status,
    e.payload ->> 'code', count(*), e.id, e.subject_id, e.node_id, e.payload ->> 'error'
  from unnest(p_changes) c
  -- One that is older than the migration may have none.
  cross join lateral (select coalesce(c.processor, '') as processor) at
  left join lateral (select c.id, c.subject_id, c.node_id, c.payload where c.status = 'failed') e on true
  where c.status in ('completed', 'failed', 'cancelled') and c.old_status is distinct from c.status
    and (c.old_holder is null or c.claim <> c.old_claim)
  group by 2, 3, c.status, e.id, e.subject_id, e.node_id, e.payload;
end
$$;

-- Project changed runs, in the lock order: calls, nodes, then events. Notifications go out at commit.
create or replace function image_jobs.project_changes(p_changes image_jobs.run_change[])
returns void language plpgsql volatile security definer set search_path = ''
  set enable_nestloop = on set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off
  set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_cancels boolean;
  v_calls bigint[];
  v_resumes boolean;
  v_failed varchar[];
  v_ended boolean;
  v_lost bigint[];
  v_waking boolean;
  v_nodes varchar[];
  v_nodeless varchar[];
  v_events image_jobs.event[];
begin
  -- Look once for all that is to be done: each statement costs a run that changes alone some 10 µs.
  select
    bool_or(c.old_provider_job_id is not null and c.old_status in ('pending', 'running')
      and (c.claim is distinct from c.old_claim or c.processor is distinct from c.old_processor)),
    array_agg(coalesce(c.old_call, c.old_claim)) filter (where c.claim <> c.old_claim
      and (c.old_holder is not null or c.old_call is not null) and c.call is distinct from coalesce(c.old_call, c.old_claim)),
    bool_or(c.ticket <> c.old_ticket and c.call is not null),
    array_agg(c.id) filter (where c.status = 'failed' and c.old_status <> 'failed'),
    bool_or(c.status in ('completed', 'failed', 'cancelled') and c.old_status is distinct from c.status
      and (c.old_holder is null or c.claim <> c.old_claim)),
    array_agg(c.old_claim) filter (where c.old_holder is not null and c.claim is distinct from c.old_claim),
    bool_or(c.due_at <= v_now and c.holder is null and c.status in ('pending', 'running')
      and (c.claim is distinct from c.old_claim or c.old_holder is null))
  into v_cancels, v_calls, v_resumes, v_failed, v_ended, v_lost, v_waking
  from unnest(p_changes) c;

  -- Cancel the provider job of a run that an outside writer took away from it. Taking over from a silent daemon keeps the job,
  -- and so does a requeue after polling_timeout; a daemon that submits anew knows from the provider that the first job failed.
  -- One that reroutes after polling_timeout does not know that, so the job is cancelled, too.
  if v_cancels then
    perform image_jobs.cancel_provider_job(split_part(c.old_processor, ':', 1), c.old_provider_job_id, c.id, c.old_call)
    from unnest(p_changes) c
    where c.old_provider_job_id is not null and c.old_status in ('pending', 'running')
      and (c.claim is distinct from c.old_claim
          and (c.status = 'cancelled' or c.provider_job_id is distinct from c.old_provider_job_id)
        or c.processor is distinct from c.old_processor and c.payload ->> 'code' = 'polling_timeout');
  end if;
  -- A held or parked run that was taken away lets go of its call, unless it keeps the provider job.
  if v_calls is not null then
    perform image_jobs.lose_calls(v_calls);
  end if;
  -- A requeue that resumes a provider job takes its cost along.
  if v_resumes then
    update image_jobs.calls k set ticket = c.ticket
    from unnest(p_changes) c where c.ticket <> c.old_ticket and k.id = any (array[c.call]);
  end if;
  -- The cost of a run that is given up; where its holder settles it, that is there already.
  if v_failed is not null then
    perform image_jobs.refresh_costs(v_failed);
  end if;

  -- A node of another workflow is never touched, whatever metadata.nodeId says.
  select array_agg(distinct n.id) filter (where n.id is not null), array_agg(c.id) filter (where n.id is null)
  into v_nodes, v_nodeless
  from unnest(p_changes) c
  left join public.workflow_nodes n on n.id = any (array[c.node_id]) and (n.workflow_id = c.subject_id) is true
  where (c.status, c.progress, c.message, c.ticket)
    is distinct from (c.old_status, c.old_progress, c.old_message, c.old_ticket);
  if v_nodes is not null then
    perform image_jobs.project_nodes(v_nodes);
  end if;

  select array_agg(row(null, c.id, e.kind, jsonb_strip_nulls(jsonb_build_object(
    'event', e.event, 'message', e.message, 'progress', c.progress, 'data', e.data)))::image_jobs.event
    order by c.ordinality, e.place)
  into v_events
  from unnest(p_changes) with ordinality as c
  cross join lateral (
    select 1 as place, 'log' as kind, 'created' as event, 'Waiting in line.' as message,
      jsonb_build_object('processor', c.processor, 'dueAt', c.due_at) as data
    where c.old_status is null
    union all
    select 2, 'log', 'requeued', 'In line again.', jsonb_strip_nulls(jsonb_build_object(
      'before', c.old_status, 'attempts', c.old_attempt,
      'payload', case when not image_jobs.has_base64(c.old_payload) then c.old_payload end,
      'providerJobId', case when c.provider_job_id is null then c.old_provider_job_id end))
    where c.old_status is not null and c.ticket is distinct from c.old_ticket
    union all
    select 3, 'error', 'taken_over', case
        when c.status = 'running' then 'The daemon that was checking this run went silent; another goes on.'
        else 'The daemon that was making this image went silent. Whether the provider made and charged it is unknown.' end,
      jsonb_strip_nulls(jsonb_build_object('daemon', c.old_holder, 'processor', c.processor, 'possibleCost', case when c.status <> 'running' then (
        -- None if the image came, for then its cost is known.
        select k.estimate from image_jobs.calls k where k.id = c.old_claim and k.state = 'unknown') end))
    where c.old_status = 'running' and c.ticket = c.old_ticket and c.claim <> c.old_claim
      and c.old_holder is not null and c.holder is null and c.status <> 'cancelled'
    union all
    select 4, 'log', 'claimed', format('Attempt %s of %s.', c.attempt, c.max_attempts),
      jsonb_build_object('daemon', c.holder, 'attempt', c.attempt, 'processor', c.processor)
    where c.old_status = 'pending' and c.status = 'running' and c.holder is not null
    union all
    select 5, 'log', 'parked', coalesce(c.message, 'The provider took the order.'),
      jsonb_build_object('providerJobId', c.provider_job_id, 'checkAt', c.due_at)
    where c.status = 'running' and c.provider_job_id is distinct from c.old_provider_job_id and c.provider_job_id is not null
      and c.old_status in ('pending', 'running')
    union all
    select 6, case when c.payload ? 'code' then 'error' else 'log' end, 'retry', coalesce(c.payload ->> 'error', c.message, 'In line again.'),
      jsonb_strip_nulls(jsonb_build_object('code', c.payload ->> 'code', 'hint', c.payload ->> 'hint',
        'details', c.payload -> 'details',
        'attempt', c.old_attempt, 'dueAt', c.due_at))
    where c.old_status = 'running' and c.status = 'pending' and c.claim = c.old_claim and c.processor = c.old_processor
    union all
    select 6, 'error', 'fallback', coalesce(c.message, 'Another provider is tried.'), jsonb_strip_nulls(jsonb_build_object(
      'from', c.old_processor, 'to', c.processor, 'code', c.payload ->> 'code', 'hint', c.payload ->> 'hint',
      'details', c.payload -> 'details', 'attempts', c.payload -> 'attempts', 'providerJobId', c.old_provider_job_id))
    where c.processor <> c.old_processor and c.ticket = c.old_ticket
    union all
    select 7, 'log', 'completed', 'The image is ready.', c.payload
    where c.old_status is distinct from c.status and c.status = 'completed'
    union all
    select 8, 'error', 'failed', c.payload ->> 'error', c.payload - 'error'
    where c.old_status is distinct from c.status and c.status = 'failed'
    union all
    select 9, 'log', 'cancelled', 'Cancelled.', null
    where c.old_status is distinct from c.status and c.status = 'cancelled'
    union all
    select 10, 'progress', 'progress', coalesce(c.message, c.progress || ' %'), null
    where c.status = 'running' and c.old_status = 'running' and c.claim = c.old_claim and c.holder is not distinct from c.old_holder
      and (c.progress, c.message) is distinct from (c.old_progress, c.old_message)
  ) e;
  if v_events is not null then
    perform image_jobs.write_events(v_events);
  end if;
  if v_nodeless is not null then
    perform image_jobs.broadcast_runs(v_nodeless);
  end if;
  if v_ended then
    perform image_jobs.tally_endings(p_changes);
  end if;

  -- "You no longer hold this": to the holder of a claim that is not the run's any more. At most 8,000 bytes a message.
  for v_first in 1..coalesce(cardinality(v_lost), 0) by 300 loop
    perform pg_notify('image_jobs_drop', array_to_string(v_lost[v_first:v_first + 299], ','));
  end loop;

  -- "Look again": only for what can be claimed now, and only if no daemon that serves its provider syncs by itself anyway.
  if v_waking and exists (
      select from unnest(p_changes) c
      where c.due_at <= v_now and c.holder is null and c.status in ('pending', 'running')
        and (c.claim is distinct from c.old_claim or c.old_holder is null)
        and not exists (
          select from image_jobs.wake w
          where w.provider = coalesce(
              (select p.name from image_jobs.providers p where p.name = split_part(c.processor, ':', 1)), '?')
            and w.awake_until > v_now and w.awake_until < v_now + interval '1 min'))
  then
    perform pg_notify('image_jobs_wake', '');
  end if;
end
$$;

create or replace function image_jobs.runs_inserted()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_slices refcursor;
  v_changes image_jobs.run_change[];
begin
  if not exists (select from new_rows n where n.kind = 'image_gen') then
    return null;
  end if;
  perform image_jobs.is_sound(
    n.id, n.status, n.finished_at, n.claimed_by, n.payload, n.progress, n.webhook, n.ticket, n.queue_state)
  from new_rows n where n.kind = 'image_gen';
  -- Limits lead the lock order. When the rows are there: a repeat of an idempotencyKey has added none, and is not refused.
  if not image_jobs.is_operator() then
    perform image_jobs.check_usage(
      array(select distinct n.created_by from new_rows n where n.kind = 'image_gen' and n.created_by is not null),
      array(select distinct n.subject_id from new_rows n where n.kind = 'image_gen'), 0, 0);
  end if;
  -- One slice at a time: a bulk insert would not fit into memory.
  open v_slices for
    select array_agg(row(n.id, n.subject_id, n.metadata ->> 'nodeId', n.ticket, null, null, n.status, null, n.claim, null,
      n.claimed_by, n.attempt, null, n.max_attempts, n.progress, null, n.message, null, n.preview_url, n.processor, n.due_at,
      n.provider_job_id, null, n.payload, null, null, n.call, null)::image_jobs.run_change order by n.ticket)
    from (select i.*, row_number() over (order by i.ticket) / 1000 as slice from new_rows i where i.kind = 'image_gen') n
    group by n.slice order by n.slice;
  loop
    fetch v_slices into v_changes;
    exit when not found;
    perform image_jobs.project_changes(v_changes);
  end loop;
  close v_slices;
  return null;
end
$$;

create or replace function image_jobs.runs_updated()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_slices refcursor;
  v_changes image_jobs.run_change[];
  v_nestloop text := current_setting('enable_nestloop');
  v_hashjoin text := current_setting('enable_hashjoin');
begin
  perform image_jobs.is_sound(
    n.id, n.status, n.finished_at, n.claimed_by, n.payload, n.progress, n.webhook, n.ticket, n.queue_state)
  from new_rows n where n.kind = 'image_gen';
  perform set_config('enable_nestloop', 'off', true), set_config('enable_hashjoin', 'on', true);
  -- One slice at a time, as above: a requeue of 80,000 runs was one array of 305 MB.
  open v_slices for
    select array_agg(c.change order by c.id)
    from (
      select n.id, row_number() over (order by n.id) / 1000 as slice,
        row(n.id, n.subject_id, n.metadata ->> 'nodeId', n.ticket, o.ticket, o.status, n.status, o.claim, n.claim,
          o.claimed_by, n.claimed_by, n.attempt, o.attempt, n.max_attempts, n.progress, o.progress, n.message, o.message,
          n.preview_url, coalesce(n.routed_to, n.processor), n.due_at, n.provider_job_id, o.provider_job_id, n.payload, o.payload,
          coalesce(o.routed_to, o.processor), n.call, o.call)::image_jobs.run_change as change
      from new_rows n join old_rows o on o.id = n.id
      where n.kind = 'image_gen' and (n.ticket is not null or n.status <> o.status)
        and (n.status, n.claim, n.claimed_by, n.progress, n.message, n.preview_url, n.provider_job_id, n.due_at, n.routed_to,
          n.metadata ->> 'nodeId')
          is distinct from
          (o.status, o.claim, o.claimed_by, o.progress, o.message, o.preview_url, o.provider_job_id, o.due_at, o.routed_to,
          o.metadata ->> 'nodeId')
    ) c
    group by c.slice order by c.slice;
  perform set_config('enable_nestloop', v_nestloop, true), set_config('enable_hashjoin', v_hashjoin, true);
  loop
    fetch v_slices into v_changes;
    exit when not found;
    perform image_jobs.project_changes(v_changes);
  end loop;
  close v_slices;
  return null;
end
$$;

-- Project deleted runs: the holder drops each, and a node that showed it, or its picture, shows the next newest run, or none.
create or replace function image_jobs.runs_deleted()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  if not exists (select from old_rows o where o.kind = 'image_gen') then
    return null;
  end if;
  perform image_jobs.cancel_provider_job(split_part(coalesce(o.routed_to, o.processor), ':', 1), o.provider_job_id, o.id, o.call)
  from old_rows o
  where o.kind = 'image_gen' and o.provider_job_id is not null and o.status in ('pending', 'running');
  perform image_jobs.lose_calls(array(
    select coalesce(o.call, o.claim) from old_rows o where o.kind = 'image_gen' and o.status in ('pending', 'running')));
  perform image_jobs.remove_files(
    array_agg(o.subject_id order by o.id), array_agg(o.id order by o.id), array_agg(o.claimed_by is not null order by o.id))
  from old_rows o where o.kind = 'image_gen';
  for v_run in
    select o.id, o.claim, o.claimed_by, o.ticket, o.subject_id, o.metadata ->> 'nodeId' as node_id
    from old_rows o where o.kind = 'image_gen' order by o.metadata ->> 'nodeId', o.ticket
  loop
    if v_run.claimed_by is not null then
      perform pg_notify('image_jobs_drop', v_run.claim::text);
    end if;
    perform set_config('image_jobs.writer', 'projection', true);
    update public.workflow_nodes n
    set node_data = (n.node_data - image_jobs.owned_keys()) || image_jobs.newest_picture(n.id, n.workflow_id),
      run_ticket = null, pinned_run = null, version = nextval('image_jobs.node_versions'), updated_at = image_jobs.now()
    where n.id = v_run.node_id and (n.workflow_id = v_run.subject_id) is true
      and (n.pinned_run = v_run.id or image_jobs.pictured_run(n.node_data ->> 'imageUrl') = v_run.id
        or n.pinned_run is null and n.run_ticket = v_run.ticket);
    if found then
      perform image_jobs.project_nodes(array[v_run.node_id]::varchar[]);
    end if;
    perform set_config('image_jobs.writer', v_writer, true);
  end loop;
  perform image_jobs.broadcast_deleted_runs((
    select jsonb_agg(jsonb_build_object('id', o.id, 'workflow', o.subject_id, 'node', o.metadata ->> 'nodeId'))
    from old_rows o where o.kind = 'image_gen'));
  return null;
end
$$;

-- Move a run to another node, since an operator has changed metadata.nodeId: the old one shows its newest other run, or none.
create or replace function image_jobs.run_moved()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  perform set_config('image_jobs.writer', 'projection', true);
  update public.workflow_nodes n
  set node_data = (n.node_data - image_jobs.owned_keys()) || image_jobs.newest_picture(n.id, n.workflow_id),
    run_ticket = null, pinned_run = null, version = nextval('image_jobs.node_versions'), updated_at = image_jobs.now()
  where n.id = old.metadata ->> 'nodeId' and (n.workflow_id = old.subject_id) is true
    and (n.pinned_run = old.id or image_jobs.pictured_run(n.node_data ->> 'imageUrl') = old.id
      or n.pinned_run is null and n.run_ticket = old.ticket);
  perform set_config('image_jobs.writer', v_writer, true);
  perform image_jobs.project_nodes(array(
    select n.id from public.workflow_nodes n
    where n.id in (old.metadata ->> 'nodeId', new.metadata ->> 'nodeId') and (n.workflow_id = new.subject_id) is true));
  return null;
end
$$;

-- A daemon's statements leave metadata alone, so this costs them nothing.
create or replace trigger image_jobs_run_moved after update of metadata on public.runs
  for each row when (new.kind = 'image_gen' and old.metadata ->> 'nodeId' is distinct from new.metadata ->> 'nodeId')
  execute function image_jobs.run_moved();

-- Returns true once a run of ours was updated or deleted in this transaction: triggers by the row have noted it. Else a statement
-- is about rows of other kinds, and is not looked at. (Clients, who may insert alone, could undo that note in a `returning`.)
create or replace function image_jobs.touched_runs()
returns boolean language plpgsql stable set search_path = ''
as $$
begin
  return current_setting('image_jobs.touched', true) = 'runs';
end
$$;

create or replace trigger image_jobs_runs_inserted after insert on public.runs
  referencing new table as new_rows for each statement execute function image_jobs.runs_inserted();
create or replace trigger image_jobs_runs_updated after update on public.runs
  referencing old table as old_rows new table as new_rows for each statement when (image_jobs.touched_runs())
  execute function image_jobs.runs_updated();
create or replace trigger image_jobs_runs_deleted after delete on public.runs
  referencing old table as old_rows for each statement when (image_jobs.touched_runs())
  execute function image_jobs.runs_deleted();

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

-- pending → pending at another provider: metadata.fallback names the ones to try when the one before can do nothing.
--
-- A run goes to runs.routed_to, or processor while that is null. Steps are taken forwards only, each at most once.

-- Returns the steps of metadata.fallback that a run may still take, in order. Never fails, whatever old rows hold.
create or replace function image_jobs.remaining_fallbacks(p_metadata jsonb, p_processor varchar, p_routed_to varchar)
returns varchar[] language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_step varchar;
  v_seen varchar[] := array[p_processor];
  v_left varchar[] := '{}';
  v_reached boolean := p_routed_to is null;
begin
  if jsonb_typeof(p_metadata -> 'fallback') is distinct from 'array' then
    return v_left;
  end if;
  for v_step in
    select e.value #>> '{}' from jsonb_array_elements(p_metadata -> 'fallback') with ordinality as e (value, place)
    where jsonb_typeof(e.value) = 'string' and e.value #>> '{}' ~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$'
    order by e.place
  loop
    if v_reached and not v_step = any (v_seen) then
      v_left := v_left || v_step;
    end if;
    v_reached := v_reached or v_step = p_routed_to;
    v_seen := v_seen || v_step;
  end loop;
  return v_left;
end
$$;

-- Returns a number for where a run is and the steps it may still take: runs of one number can move, or none of them can.
create or replace function image_jobs.route_hash(p_metadata jsonb, p_processor varchar, p_routed_to varchar)
returns bigint language plpgsql immutable parallel safe set search_path = ''
as $$
begin
  return hash_array_extended(
    coalesce(p_routed_to, p_processor) || image_jobs.remaining_fallbacks(p_metadata, p_processor, p_routed_to), 0);
end
$$;

-- On large tables `image-jobs migrate` makes these itself, afterwards and concurrently (daemon/indexes.py).
if current_setting('image_jobs.indexes', true) is distinct from 'later' then
-- Waiting runs by that. Runs without a fallback are not in it.
create index if not exists runs_may_be_rerouted
  on public.runs (lane, (image_jobs.route_hash(metadata, processor, routed_to)), due_at)
  where queue_state = 'pending' and metadata ? 'fallback';
end if;

-- Returns why nothing will start soon at a provider, or at one model of it: {error, code}; null if it is open. Neither a block of
-- less than 30 s (LONGEST_RATE_LIMIT in daemon/worker/retries.py) nor a daemon that restarts within its lease closes anything,
-- and a limit that is used up is only waited for.
create or replace function image_jobs.closed_reason(p_processor text)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_provider text := split_part(p_processor, ':', 1);
  v_limit record;
  v_block record;
begin
  for v_limit in
    select l.*, l.paused or l.per_minute = 0 or l.max_running = 0 as stopped from image_jobs.limits_of(v_provider) l
    where l.model is null or l.provider || ':' || l.model = p_processor
  loop
    if v_limit.stopped then
      return jsonb_build_object('error', format('%s is paused.', concat_ws(':', v_provider, v_limit.model)), 'code', 'paused');
    end if;
  end loop;
  select b.model, b.reason into v_block from image_jobs.provider_blocks b
  where b.provider = v_provider and b.until >= v_now + interval '30 s'
    and (b.model is null or b.model = image_jobs.drawing_model(p_processor))
  order by b.until desc limit 1;
  if found then
    return jsonb_build_object('error', coalesce(v_block.reason,
      format('%s is closed for a while.', concat_ws(':', v_provider, v_block.model))), 'code', 'blocked');
  end if;
  if not exists (select from image_jobs.daemons d where v_provider = any (d.providers) and d.seen_at > v_now - d.lease) then
    return jsonb_build_object('error', format('No daemon serves %s.', v_provider), 'code', 'not_served');
  end if;
  return null;
end
$$;

-- Returns the first of these steps that is open; null if none is.
create or replace function image_jobs.first_open_fallback(p_steps varchar[])
returns varchar language plpgsql volatile set search_path = ''
as $$
declare
  v_step varchar;
begin
  foreach v_step in array p_steps loop
    if image_jobs.closed_reason(v_step) is null then
      return v_step;
    end if;
  end loop;
  return null;
end
$$;

-- Returns the message for the person at the canvas; p_payload.error is the reason.
create or replace function image_jobs.reroute_message(p_payload jsonb, p_step varchar)
returns text language sql immutable parallel safe set search_path = ''
as $$
  select format('%s Going on with %s.', coalesce(p_payload ->> 'error', 'There is no image yet.'), p_step)
$$;

-- Reroute runs that wait for a closed provider to the first of their steps that is open. Where all are closed, a run
-- stays, and goes with the first one that opens. Called by full scans: looks at 200 routes of a lane, from a random one on, so
-- that routes which lead nowhere, however many, keep no others waiting for ever; moves at most 200 runs of a route, and
-- of 2,000 no more.
create or replace function image_jobs.reroute_runs()
returns void language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set enable_sort = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_lane text;
  v_open boolean;
  v_start bigint;
  v_after bigint;
  v_wrapped boolean;
  v_route record;
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
  v_moved integer := 0;
begin
  perform set_config('image_jobs.writer', 'daemon', true);
  for v_lane in
    select distinct l.lane from image_jobs.lanes l where l.lane <> '?'
  loop
    v_open := image_jobs.closed_reason(v_lane) is null;
    -- An open lane has closed runs only where a model of it is blocked.
    continue when v_open and not exists (
      select from image_jobs.provider_blocks b where b.provider = v_lane and b.model is not null and b.until > v_now);
    v_start := ((random() - 0.5) * 18e18)::bigint;
    v_after := v_start;
    v_wrapped := false;
    for v_look in 1..200 loop
      select image_jobs.route_hash(r.metadata, r.processor, r.routed_to) as hash, coalesce(r.routed_to, r.processor) as name,
        image_jobs.remaining_fallbacks(r.metadata, r.processor, r.routed_to) as steps
      into v_route
      from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane
        and image_jobs.route_hash(r.metadata, r.processor, r.routed_to) > v_after
      order by image_jobs.route_hash(r.metadata, r.processor, r.routed_to) limit 1;
      if not found and not v_wrapped then
        v_wrapped := true;
        v_after := -9223372036854775808;
        continue;
      end if;
      exit when not found or v_wrapped and v_route.hash > v_start or v_moved >= 2000;
      v_after := v_route.hash;
      continue when (v_open and image_jobs.closed_reason(v_route.name) is null)
        or image_jobs.first_open_fallback(v_route.steps) is null;
      select array_agg(m.id) into v_runs
      from (
        select r.id from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'pending' and r.metadata ? 'fallback' and r.lane = v_lane
          and image_jobs.route_hash(r.metadata, r.processor, r.routed_to) = v_route.hash
          and r.due_at <= v_now and not r.id = any (v_aside)
        order by r.due_at limit 200
        for update skip locked
      ) m;
      if v_runs is not null then
        perform image_jobs.change_runs('reroute_each', v_runs);
        v_moved := v_moved + cardinality(v_runs);
      end if;
    end loop;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

create or replace function image_jobs.reroute_each(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set routed_to = m.step, lane = image_jobs.lane_of(m.step), attempt = 0, refused_since = null,
    rank = image_jobs.next_rank(coalesce(r.created_by, r.subject_id), image_jobs.lane_of(m.step), r.priority),
    workflow_rank = image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, image_jobs.lane_of(m.step), r.priority),
    payload = m.closed, message = image_jobs.reroute_message(m.closed, m.step)
  from (
    select o.id, image_jobs.closed_reason(coalesce(o.routed_to, o.processor)) as closed,
      image_jobs.first_open_fallback(image_jobs.remaining_fallbacks(o.metadata, o.processor, o.routed_to)) as step
    from unnest(p_runs) as p (id) join public.runs o on o.id = any (array[p.id])
  ) m
  where r.id = any (array[m.id]) and m.step is not null and m.closed is not null;
  return null;
end
$$;

-- Lanes that may start now: the limits that leave room, the lanes in which runs wait, and their first runs.

-- Returns how many runs are running at a provider, or of one model of it, counted no further than p_limit, whatever else is.
-- By processor, not by lane: what was started before its model had a limit stands in the provider's lane.
create or replace function image_jobs.count_running(p_provider text, p_model text, p_limit integer)
returns integer language plpgsql volatile set search_path = ''
as $$
begin
  return (
    select count(*)
    from (
      select from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'running'
        and r.lane in (select distinct n.lane from image_jobs.lanes n where split_part(n.lane, ':', 1) = p_provider)
        and (p_model is null or coalesce(r.routed_to, r.processor) = p_provider || ':' || p_model)
      limit p_limit
    ) counted);
end
$$;

-- Returns how many more runs a provider (or one model of it) may start now; null: without limit.
-- Exact only if the caller holds the locks of the rows: then no other start can be on its way.
create or replace function image_jobs.available_starts(p_provider text, p_lane text)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_second bigint := floor(extract(epoch from v_now));
  v_streak image_jobs.provider_streaks := image_jobs.streak_of(p_provider);
  v_limit record;
  v_left integer;
  v_least integer;
begin
  if exists (
    select from image_jobs.provider_blocks b
    where b.provider = p_provider and b.until > v_now and (b.model is null or b.model = image_jobs.drawing_model(p_lane)))
  then
    return 0;
  end if;
  if v_streak.closings > 0 then
    v_least := case when v_streak.probed_at > v_now - interval '30 s' then 0 else 1 end;
  end if;
  for v_limit in
    select l.* from image_jobs.limits_of(p_provider) l where l.model is null or l.provider || ':' || l.model = p_lane
  loop
    if v_limit.paused then
      return 0;
    end if;
    if v_limit.per_minute is not null then
      -- Whole seconds: a start counts for 60 to 61 seconds, so no minute ever sees more than its limit.
      select v_limit.per_minute - coalesce(sum(recent.starts), 0) into v_left
      from image_jobs.starts_of(v_limit.id) last
      cross join lateral unnest(last.at, last.starts) as recent (at, starts)
      where recent.at between v_second - 60 and v_second + 60;
      v_least := least(v_least, v_left);
    end if;
    if v_limit.max_running is not null then
      v_least := least(
        v_least, v_limit.max_running - image_jobs.count_running(p_provider, v_limit.model, v_limit.max_running));
    end if;
  end loop;
  return case when v_least is not null then greatest(v_least, 0) end;
end
$$;

-- Count runs that have started, in each limit that applies to them. The caller holds the rows' locks.
create or replace function image_jobs.record_starts(p_provider text, p_lane text, p_starts integer)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_second bigint := floor(extract(epoch from image_jobs.now()));
  v_limit bigint;
  v_last image_jobs.recent_starts;
begin
  for v_limit in
    select l.id from image_jobs.limits_of(p_provider) l
    where (l.model is null or l.provider || ':' || l.model = p_lane) and l.per_minute is not null
  loop
    v_last := image_jobs.starts_of(v_limit);
    delete from image_jobs.recent_starts s where s.limit_id = v_limit and s.version = v_last.version;
    insert into image_jobs.recent_starts (limit_id, at, starts)
    select v_limit, array_agg(s.at order by s.at), array_agg(s.starts order by s.at)
    from (
      select r.at, sum(r.starts) as starts
      from (select * from unnest(v_last.at, v_last.starts) union all select v_second, p_starts) r (at, starts)
      where r.at between v_second - 60 and v_second + 60
      group by r.at
    ) s;
  end loop;
end
$$;

-- The plans of the functions below are pinned by claim_runs, which calls them: its settings reach into what it calls.
-- Each locks the runs it changes, without those that are set aside, and changes them by image_jobs.change_runs.

-- Returns the providers that a daemon claims for: those it serves, and those that no living daemon has served for its grace
-- (a deploy), since some daemon has to say that the key is missing.
create or replace function image_jobs.claimable_providers(p_served text[], p_grace interval, p_full_scan boolean)
returns text[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := image_jobs.due_from('', p_full_scan);
begin
  return p_served || array(
    select distinct split_part(l.lane, ':', 1)
    from image_jobs.lanes l
    where not split_part(l.lane, ':', 1) = any (p_served)
      and (l.lane = '?' or exists (select from image_jobs.providers p where p.name = split_part(l.lane, ':', 1)))
      and (
        exists (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
            and r.lane = l.lane and r.priority = l.priority
            and r.rank >= case when p_full_scan then 0 else least(l.watermark, l.passed_over) end
          order by r.rank, r.ticket offset 0)
        or exists (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'running' and r.lane = l.lane
            and r.due_at between image_jobs.due_from(l.lane, p_full_scan) and v_now and r.claimed_by is null
          order by r.due_at offset 0)
        or exists (
          select from public.runs r
          where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null
            and r.due_at between v_from and v_now and r.lane = l.lane
          order by r.due_at offset 0))
      -- The daemons, with all their beats, are looked at only where it matters.
      and not exists (
        select from image_jobs.daemons d
        where split_part(l.lane, ':', 1) = any (d.providers) and d.seen_at > v_now - p_grace));
end
$$;

-- Returns the lanes of these providers in which runs wait that may start now, higher priorities first, else at random.
create or replace function image_jobs.open_lanes(p_providers text[], p_full_scan boolean)
returns image_jobs.lanes[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := image_jobs.due_from('', p_full_scan);
  v_lanes image_jobs.lanes[];
  v_first timestamptz;
begin
  with put_off as materialized (
    select r.lane, r.priority, r.due_at from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
    order by r.due_at limit 200
  ),
  -- A run that was put off has opened no lane; it is to be claimed with the others of its priority.
  opened as (
    insert into image_jobs.opened_lanes as o (lane, priority)
    select distinct p.lane, p.priority from put_off p
    where not exists (select from image_jobs.opened_lanes l where l.lane = p.lane and l.priority = p.priority)
    on conflict do nothing
    returning row(o.lane, o.priority, 0, null, null)::image_jobs.lanes as lane
  )
  select array_agg(each.lane order by l.priority desc, random()), (select min(p.due_at) from put_off p) into v_lanes, v_first
  from (select l from image_jobs.lanes l union all select o.lane from opened o) as each (lane)
  cross join lateral (select (each.lane).*) l
  where split_part(l.lane, ':', 1) = any (p_providers)
    and image_jobs.available_starts(split_part(l.lane, ':', 1), l.lane) is distinct from 0
    and (
      exists (
        select from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
          and r.lane = l.lane and r.priority = l.priority
          and r.rank >= case when p_full_scan then 0 else least(l.watermark, l.passed_over) end
        order by r.rank, r.ticket offset 0)
      or exists (select from put_off p where p.lane = l.lane and p.priority = l.priority));
  perform image_jobs.move_due_mark('', v_first);
  return v_lanes;
end
$$;

-- Put runs that were put off and are due now in line, 200 at a time: those that have been at work (their claim has a call, or
-- they have lost an attempt) at the front of their lanes, where they were, all others behind the last of their user.
create or replace function image_jobs.promote_due(p_full_scan boolean)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := image_jobs.due_from('', p_full_scan);
  v_aside varchar[];
  v_runs varchar[];
begin
  if not exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
    order by r.due_at offset 0)
  then
    return;
  end if;
  v_aside := image_jobs.runs_set_aside();
  select array_agg(due.id) into v_runs
  from (
    select r.id from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
      and not r.id = any (v_aside)
    order by r.due_at limit 200
    for update skip locked
  ) due;
  if v_runs is not null then
    perform image_jobs.change_runs('promote_runs', v_runs);
  end if;
end
$$;

create or replace function image_jobs.promote_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set lane = due.lane,
    rank = coalesce(due.front, image_jobs.next_rank(coalesce(r.created_by, r.subject_id), due.lane, r.priority)),
    workflow_rank = coalesce(case when due.front is not null then r.workflow_rank end, image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, due.lane, r.priority))
  from (
    select o.id, l.lane, case when o.attempt > 0 or exists (select from image_jobs.calls c where c.id = o.claim) then (
      select least(n.watermark, n.passed_over) from image_jobs.lanes n where n.lane = l.lane and n.priority = o.priority) end as front
    from unnest(p_runs) as p (id) join public.runs o on o.id = any (array[p.id])
    cross join lateral (select image_jobs.lane_of(coalesce(o.routed_to, o.processor)) as lane) l
  ) due
  where r.id = any (array[due.id]);
  return null;
end
$$;

-- Move runs from a provider's lane into those of their models: one that was inserted while its model got a limit may stand
-- in the wrong lane. Returns whether models of this provider have limits.
create or replace function image_jobs.move_to_model_lanes(p_lane image_jobs.lanes, p_limit integer)
returns boolean language plpgsql volatile set search_path = ''
as $$
declare
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
begin
  if not exists (
    select from image_jobs.limits_of(p_lane.lane) l where l.model is not null)
  then
    return false;
  end if;
  select array_agg(next.id) into v_runs
  from (
    select r.id, coalesce(r.routed_to, r.processor) as processor from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
      and r.lane = p_lane.lane and r.priority = p_lane.priority and not r.id = any (v_aside)
    order by r.rank, r.ticket limit p_limit
    for update skip locked
  ) next
  where image_jobs.lane_of(next.processor) <> p_lane.lane;
  if v_runs is not null then
    perform image_jobs.change_runs('move_runs', v_runs);
  end if;
  return true;
end
$$;

create or replace function image_jobs.move_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set lane = image_jobs.lane_of(coalesce(r.routed_to, r.processor)),
    rank = image_jobs.next_rank(
      coalesce(r.created_by, r.subject_id), image_jobs.lane_of(coalesce(r.routed_to, r.processor)), r.priority),
    workflow_rank = image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, image_jobs.lane_of(coalesce(r.routed_to, r.processor)), r.priority)
  where r.id = any (p_runs);
  return null;
end
$$;

-- Returns the processors that runs in a provider's lane wait for and whose model is not blocked; null where none is blocked.
-- The models on offer, and at most 100 others: their names may be anything, and must not stand before those. Goes from one name to
-- the next in runs_ready_by_name, so that it costs nothing how many runs wait for each.
create or replace function image_jobs.unblocked_names(p_lane image_jobs.lanes)
returns varchar[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_blocked text[];
  v_name varchar := '';
  v_names varchar[];
  v_offered integer;
begin
  select array_agg(b.model) into v_blocked from image_jobs.provider_blocks b
  where b.provider = p_lane.lane and b.model is not null and b.until > v_now;
  if v_blocked is null then
    return null;
  end if;
  v_names := array(
    select n.name from image_jobs.models m
    cross join lateral (select p_lane.lane || ':' || m.model as name) n
    where m.provider = p_lane.lane and image_jobs.drawing_model(n.name) <> all (v_blocked));
  v_offered := cardinality(v_names);
  for v_look in 1..1000 loop
    v_name := (
      select coalesce(r.routed_to, r.processor) from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority and coalesce(r.routed_to, r.processor) > v_name
      order by coalesce(r.routed_to, r.processor) limit 1);
    exit when v_name is null or cardinality(v_names) = v_offered + 100;
    if v_name <> all (v_names) and image_jobs.drawing_model(v_name) <> all (v_blocked) then
      v_names := v_names || v_name;
    end if;
  end loop;
  return v_names;
end
$$;

-- Returns the runs of a lane that come first, from a rank on; with names, only those of them.
create or replace function image_jobs.first_waiting(
  p_lane image_jobs.lanes, p_names varchar[], p_from bigint, p_aside varchar[], p_limit integer)
returns varchar[] language plpgsql volatile set search_path = ''
as $$
begin
  if p_names is null then
    return array(
      select r.id from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority and r.rank >= p_from and not r.id = any (p_aside)
      order by r.rank, r.ticket limit p_limit);
  end if;
  return array(
    select first.id
    from unnest(p_names) as open (name)
    cross join lateral (
      select r.id, r.rank, r.ticket from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority
        and coalesce(r.routed_to, r.processor) = open.name and r.rank >= p_from and not r.id = any (p_aside)
      order by r.rank, r.ticket limit p_limit
    ) first
    order by first.rank, first.ticket limit p_limit);
end
$$;

-- Returns the runs that go in the places of these: of each user the first by workflow_rank, so that a user's second workflow
-- does not wait behind all runs of the first. Places are given back: a run that others of its user go before takes theirs.
-- Looks at a hundred waiting runs of a user more than it needs, for those of other models (p_names) may stand before them.
-- The caller holds the locks of these runs.
create or replace function image_jobs.share_places(
  p_lane image_jobs.lanes, p_runs varchar[], p_names varchar[], p_models boolean, p_aside varchar[], p_full_scan boolean)
returns varchar[] language plpgsql volatile set search_path = ''
as $$
declare
  v_before varchar[];
  v_runs varchar[];
  v_waiting varchar[];
begin
  select array_agg(b.id) into v_before
  from (
    select coalesce(r.created_by, r.subject_id) as owner, count(*) as places, max(r.workflow_rank) as last
    from unnest(p_runs) as p (id) join public.runs r on r.id = any (array[p.id])
    group by 1
  ) o
  cross join lateral (
    select w.id, w.processor from (
      select r.id, coalesce(r.routed_to, r.processor) as processor, r.workflow_rank, r.ticket from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and coalesce(r.created_by, r.subject_id) = o.owner
        and num_nulls(r.rank) = 0 and r.lane = p_lane.lane and r.priority = p_lane.priority
        and r.workflow_rank >= case when p_full_scan then 0
          else coalesce(image_jobs.served_rank(o.owner, p_lane.lane, p_lane.priority), 0) end
        and r.workflow_rank <= o.last
      order by r.workflow_rank, r.ticket limit o.places + case when p_names is null and not p_models then 0 else 100 end
    ) w
    where (p_names is null or w.processor = any (p_names))
      and (not p_models or image_jobs.lane_of(w.processor) = p_lane.lane) and not w.id = any (p_aside)
    order by w.workflow_rank, w.ticket limit o.places
  ) b
  where not b.id = any (p_runs);
  if v_before is null then
    return p_runs;
  end if;
  v_before := array(
    select r.id from public.runs r
    where r.id = any (v_before) and r.status = 'pending' and r.rank is not null
      and r.lane = p_lane.lane and r.priority = p_lane.priority
    for update skip locked);
  select array_agg(c.id) filter (where c.place <= c.places), array_agg(c.id) filter (where c.place > c.places and c.given)
  into v_runs, v_waiting
  from (
    select r.id, r.id = any (p_runs) as given,
      count(*) filter (where r.id = any (p_runs)) over (partition by coalesce(r.created_by, r.subject_id)) as places,
      row_number() over (partition by coalesce(r.created_by, r.subject_id) order by r.workflow_rank, r.ticket) as place
    from unnest(p_runs || v_before) as p (id) join public.runs r on r.id = any (array[p.id])
  ) c;
  if v_waiting is not null then
    perform image_jobs.change_runs('swap_ranks', v_waiting || array(
      select c.id from unnest(v_runs) as c (id) where not c.id = any (p_runs)));
  end if;
  return v_runs;
end
$$;

-- Swap the ranks of runs: the first of the array with the first of its second half, and so on. One alone keeps its rank.
create or replace function image_jobs.swap_ranks(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
begin
  update public.runs r
  set rank = o.rank
  from unnest(p_runs) with ordinality as p (id, place)
  join public.runs o on o.id = any (array[p_runs[1 + (p.place - 1 + cardinality(p_runs) / 2) % cardinality(p_runs)]])
  where r.id = any (array[p.id]);
  return null;
end
$$;

-- pending → running, and parked → held: the daemon claims work.

-- Returns a claimed run for the daemon. generated: the data of the `generated` event of an earlier attempt since the last
-- requeue; its picture may lie in storage. contested: a claim that was taken away had a picture, which it may still be storing.
create or replace function image_jobs.claimed_run(r public.runs, p_due_at timestamptz)
returns jsonb language plpgsql stable set search_path = ''
as $$
declare
  v_generated jsonb;
  v_contested boolean := false;
begin
  if r.attempt > 1 then
    select e.payload -> 'data' into v_generated from public.run_events e
    where e.run_id = r.id and e.payload ->> 'event' = 'generated' and e.payload -> 'data' -> 'ticket' = to_jsonb(r.ticket)
    order by e.seq desc limit 1;
  end if;
  if exists (select from image_jobs.calls c where c.run_id = r.id and (c.id < r.claim) is true and c.image) then
    v_contested := coalesce((
      select e.payload ->> 'event' = 'generated' from public.run_events e
      where e.run_id = r.id and e.payload ->> 'event' in ('generated', 'completed')
      order by e.seq desc limit 1), false);
  end if;
  return jsonb_build_object(
    'id', r.id, 'claim', r.claim, 'ticket', r.ticket, 'subject_id', r.subject_id,
    'processor', coalesce(r.routed_to, r.processor), 'requested', r.processor,
    'metadata', case when jsonb_path_exists(r.metadata, '$.**{65}') then '{}' else coalesce(r.metadata, '{}') end,
    'attempt', r.attempt, 'max_attempts', r.max_attempts,
    'provider_job_id', r.provider_job_id, 'call', coalesce(r.call, r.claim), 'webhook', r.webhook,
    'created_by', r.created_by, 'source_workflow', r.source_workflow,
    'submitted_ago', extract(epoch from image_jobs.now() - r.submitted_at),
    'waited', case when isfinite(p_due_at) then extract(epoch from image_jobs.now() - p_due_at) else 0 end,
    'generated', v_generated, 'contested', v_contested);
end
$$;

-- Returns parked runs whose check is due, and their priorities: of each lane the p_limit that have waited longest, at least 50,
-- since one of a higher priority may be among them.
create or replace function image_jobs.due_checks(p_providers text[], p_limit integer, p_full_scan boolean)
returns table (id varchar, priority integer) language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_due record;
begin
  for v_due in
    select o.lane, found.ids, found.priorities, found.first, m.due_from
    from (select distinct l.lane from image_jobs.opened_lanes l where split_part(l.lane, ':', 1) = any (p_providers)) o
    left join lateral (
      select k.due_at - interval '10 s' as due_from from image_jobs.due_marks k
      where k.queue = o.lane and not p_full_scan order by k.version desc limit 1
    ) m on true
    cross join lateral (
      select array_agg(due.id) as ids, array_agg(due.priority) as priorities, min(due.due_at) as first
      from (
        -- Tables that were there before may have other types of texts and numbers.
        select r.id::varchar, r.priority::integer, r.due_at from public.runs r
        where r.kind = 'image_gen' and r.queue_state = 'running' and r.lane = o.lane
          and r.due_at >= coalesce(m.due_from, '-infinity') and r.due_at <= v_now
          and r.claimed_by is null and not r.id = any (v_aside)
        order by r.due_at limit greatest(p_limit, 50)
      ) due
    ) found
  loop
    -- One that is set aside stays behind the mark. And as a rule it is too early to move the mark.
    if v_aside = '{}' and coalesce(coalesce(v_due.first, v_now - interval '59 s') - interval '11 s' > v_due.due_from, true) then
      perform image_jobs.move_due_mark(v_due.lane, v_due.first);
    end if;
    return query select d.id, d.priority from unnest(v_due.ids, v_due.priorities) as d (id, priority);
  end loop;
end
$$;

-- Claim these parked runs, at most p_limit, those that have waited longest first. Pausing and limits are about new starts;
-- checks go on.
create or replace function image_jobs.claim_checks(p_daemon uuid, p_runs varchar[], p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_runs varchar[];
begin
  select array_agg(due.id) into v_runs
  from (
    select r.id from public.runs r
    where r.id = any (p_runs) and r.status = 'running' and r.due_at <= image_jobs.now() and r.claimed_by is null
    order by r.due_at limit p_limit
    for update skip locked
  ) due;
  if v_runs is not null then
    return query select unnest(image_jobs.change_runs('check_runs', v_runs, p_daemon));
  end if;
end
$$;

create or replace function image_jobs.check_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
declare
  v_claimed jsonb[];
begin
  with claimed as (
    update public.runs r
    set claim = o.next_claim, claimed_by = p_daemon, due_at = null, call = coalesce(o.call, o.next_claim)
    from (
      select q.id, q.due_at, q.call, nextval('image_jobs.claims') as next_claim
      from unnest(p_runs) as p (id) join public.runs q on q.id = any (array[p.id])
    ) o
    where r.id = any (array[o.id])
    returning image_jobs.claimed_run(r, o.due_at) as run
  )
  select array_agg(c.run) into v_claimed from claimed c;
  -- Of a provider job that no call is known for, an operator's for example.
  perform image_jobs.open_calls(p_runs);
  return v_claimed;
end
$$;

-- Start the first p_limit runs of one lane, passing over those of blocked models, counts them in the limits, and moves the
-- lane's watermark. With p_probe, one that has lost the fewest attempts. The caller holds the locks of the limits.
-- p_budget: USD; one starts while those before it leave some. Null: without limit.
create or replace function image_jobs.claim_starts(
  p_daemon uuid, p_lane image_jobs.lanes, p_limit integer, p_full_scan boolean, p_probe boolean, p_budget numeric)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_models boolean := image_jobs.move_to_model_lanes(p_lane, p_limit);
  v_names varchar[] := image_jobs.unblocked_names(p_lane);
  v_from bigint := case when p_full_scan then 0 else least(p_lane.watermark, p_lane.passed_over) end;
  v_passing boolean := p_probe or v_names is not null;
  v_first varchar[];
  v_runs varchar[];
  v_claimed jsonb[];
  v_last bigint;
  v_newest image_jobs.lanes;
  v_streak image_jobs.provider_streaks;
begin
  if not v_passing then
    select array_agg(next.id), max(next.rank) into v_runs, v_last
    from (
      select r.id, r.rank from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = p_lane.lane and r.priority = p_lane.priority and r.rank >= v_from
        and (not v_models or image_jobs.lane_of(coalesce(r.routed_to, r.processor)) = r.lane)
        and not r.id = any (v_aside)
      order by r.rank, r.ticket limit p_limit
      for update skip locked
    ) next;
  else
    -- A few more than wanted, since others may be claiming them.
    v_first := image_jobs.first_waiting(p_lane, v_names, v_from, v_aside, case when p_probe then 100 else p_limit + 20 end);
    select array_agg(next.id), max(next.rank) into v_runs, v_last
    from (
      select r.id, r.rank from public.runs r
      where (r.kind = 'image_gen' and r.queue_state = 'pending') is true and r.rank is not null and r.id = any (v_first)
        and (not v_models or image_jobs.lane_of(coalesce(r.routed_to, r.processor)) = r.lane)
      order by case when p_probe then r.attempt end, r.rank, r.ticket limit p_limit
      for update skip locked
    ) next;
  end if;
  if p_budget is not null then
    select array_agg(b.id), max(b.rank) into v_runs, v_last
    from (
      select r.id, r.rank, coalesce(sum(image_jobs.estimate_cost(coalesce(r.routed_to, r.processor), r.metadata -> 'promptSpec'))
        over (order by r.rank, r.ticket rows between unbounded preceding and 1 preceding), 0) as before
      from unnest(v_runs) as p (id) join public.runs r on r.id = any (array[p.id])
    ) b
    where b.before < p_budget;
  end if;
  if v_runs is null then
    return;
  end if;
  if not p_probe then
    v_runs := image_jobs.share_places(p_lane, v_runs, v_names, v_models, v_aside, p_full_scan);
  end if;
  v_claimed := image_jobs.change_runs('start_runs', v_runs, p_daemon);
  if v_claimed is null then
    return;
  end if;
  return query select unnest(v_claimed);
  perform image_jobs.record_starts(split_part(p_lane.lane, ':', 1), p_lane.lane, cardinality(v_claimed));
  if p_probe then
    v_streak := image_jobs.streak_of(split_part(p_lane.lane, ':', 1));
    v_streak.probe := (v_claimed[1] ->> 'claim')::bigint;
    v_streak.probed_at := image_jobs.now();
    perform image_jobs.write_streak(v_streak);
  end if;
  -- The watermark is a hint: if another daemon is moving it just now, that will do. But never without a note of the runs that
  -- it passes over.
  select l.* into v_newest from image_jobs.lanes l
  where l.lane = p_lane.lane and l.priority = p_lane.priority and (l.watermark < v_last or l.passed_over < v_last);
  if not found then
    return;
  end if;
  if v_newest.version is not null then
    perform from image_jobs.watermarks m
    where m.lane = p_lane.lane and m.priority = p_lane.priority and m.version = v_newest.version
    for update skip locked;
    if not found then
      return;
    end if;
    delete from image_jobs.watermarks m
    where m.lane = p_lane.lane and m.priority = p_lane.priority and m.version = v_newest.version;
  end if;
  insert into image_jobs.watermarks (lane, priority, watermark, passed_over)
  values (p_lane.lane, p_lane.priority, greatest(v_newest.watermark, v_last), case
    when v_passing then least(v_newest.passed_over, p_lane.watermark)
    when v_from > v_newest.passed_over then v_newest.passed_over
    when v_last < v_newest.watermark then v_last end);
end
$$;

create or replace function image_jobs.start_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_claimed jsonb[];
begin
  with claimed as (
    update public.runs r
    set status = 'running', claim = o.next_claim, claimed_by = p_daemon, attempt = r.attempt + 1,
      started_at = v_now, due_at = null, payload = null, message = null, preview_url = null,
      call = case when o.provider_job_id is not null then coalesce(o.call, o.next_claim) end
    from (
      select q.id, q.due_at, q.call, q.provider_job_id, nextval('image_jobs.claims') as next_claim
      from unnest(p_runs) as p (id) join public.runs q on q.id = any (array[p.id])
    ) o
    where r.id = any (array[o.id])
    returning image_jobs.claimed_run(r, o.due_at) as run
  )
  select array_agg(c.run) into v_claimed from claimed c;
  perform image_jobs.open_calls(p_runs);
  return v_claimed;
end
$$;

-- Claim up to p_slots runs for a daemon, higher priorities first: due checks of parked runs, in the sequence in which they fell
-- due, and pending runs share the slots where there are both; pending ones of lanes evenly, users interleaved within a lane, and their workflows within their places. p_full_scan reads whole lanes instead of from their watermarks: at
-- least once a second of idleness, since a slow transaction may commit a lower rank.
-- Nothing of the providers that this daemon cannot reach (p_unreachable).
-- Never claims more than the limits allow, however many daemons claim at once. Raises IJ001 if the daemon was fenced.
-- Looks first, and writes nothing where there is nothing to claim. Locks: the daemon's row of claimants (against a take-over), the budget of all together, then limits_in_force, the providers that have a
-- streak (skipping locked ones: another daemon is at it), and only then runs (skipping locked ones).
create or replace function image_jobs.claim_runs(
  p_daemon uuid, p_slots integer, p_full_scan boolean default false, p_unreachable text[] default null)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
  set enable_sort = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_now timestamptz := image_jobs.now();
  v_from timestamptz;
  v_daemon record;
  v_left integer := p_slots;
  v_providers text[];
  v_lanes image_jobs.lanes[];
  v_lane image_jobs.lanes;
  v_checks varchar[];
  v_priorities integer[];
  v_due varchar[];
  v_priority integer;
  v_peers integer;
  v_quota integer;
  v_count integer;
  v_provider text;
  v_probing text[];
  v_probe boolean;
  v_budget numeric;
begin
  if p_slots <= 0 then
    return;
  end if;
  select c.* into v_daemon from image_jobs.claimants c where c.daemon = p_daemon;
  v_providers := array(
    select p.name from unnest(image_jobs.claimable_providers(v_daemon.providers, v_daemon.unserved_grace, p_full_scan)) as p (name)
    where p.name <> all (coalesce(p_unreachable, '{}')));
  v_lanes := coalesce(image_jobs.open_lanes(v_providers, p_full_scan), '{}');
  select array_agg(d.id), array_agg(d.priority) into v_checks, v_priorities from image_jobs.due_checks(v_providers, p_slots, p_full_scan) d;
  -- A lock is a write, and an idle daemon looks every second.
  v_from := image_jobs.due_from('', p_full_scan);
  if v_daemon.daemon is not null and v_lanes = '{}' and v_checks is null and not exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is null and r.due_at between v_from and v_now
    order by r.due_at offset 0)
  then
    return;
  end if;
  perform from image_jobs.claimants c where c.daemon = p_daemon for key share;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
  perform set_config('image_jobs.writer', 'daemon', true);
  if v_lanes <> '{}' and image_jobs.has_budget() then
    -- One at a time: another would spend the same.
    perform pg_advisory_xact_lock(hashtextextended('image_jobs budget', 0));
    v_budget := (select b.usd from image_jobs.budget_left() b);
    if v_budget <= 0 then
      v_lanes := '{}';
    end if;
  end if;
  -- The locks of the limits, all at once and in order.
  perform image_jobs.lock_limits(array(select split_part(o.lane, ':', 1) from unnest(v_lanes) o));
  v_probing := array(
    select p.name from image_jobs.providers p
    where p.name in (select split_part(o.lane, ':', 1) from unnest(v_lanes) o) and (image_jobs.streak_of(p.name)).closings > 0
    for update skip locked);
  perform image_jobs.promote_due(p_full_scan);

  for v_priority in
    select o.priority from unnest(v_lanes) o union select c.priority from unnest(v_priorities) as c (priority) order by 1 desc
  loop
    v_due := array(
      select c.id from unnest(v_checks, v_priorities) as c (id, priority) where c.priority = v_priority);
    if cardinality(v_due) > 0 then
      -- Half of them, where runs wait to be started; of an odd one a coin decides.
      v_quota := v_left;
      if exists (select from unnest(v_lanes) o where o.priority = v_priority) then
        v_quota := floor(v_left / 2.0 + random());
      end if;
      return query select image_jobs.claim_checks(p_daemon, v_due, v_quota);
      get diagnostics v_count = row_count;
      v_left := v_left - v_count;
    end if;
    -- First an even share for each lane, then what the others left.
    for v_pass in 1..2 loop
      select count(*) into v_peers from unnest(v_lanes) o where o.priority = v_priority;
      exit when v_pass = 2 and v_peers = 1;
      foreach v_lane in array v_lanes loop
        continue when v_lane.priority <> v_priority;
        exit when v_left <= 0;
        v_provider := split_part(v_lane.lane, ':', 1);
        v_quota := case v_pass when 1 then ceil(v_left::numeric / v_peers) else v_left end;
        v_quota := least(v_quota, image_jobs.available_starts(v_provider, v_lane.lane));
        v_peers := v_peers - 1;
        v_probe := coalesce((image_jobs.streak_of(v_provider)).closings > 0, false);
        continue when v_quota <= 0 or v_budget <= 0 or v_probe and not v_provider = any (v_probing);
        return query select image_jobs.claim_starts(p_daemon, v_lane, v_quota, p_full_scan, v_probe, v_budget);
        get diagnostics v_count = row_count;
        v_left := v_left - v_count;
        if v_budget is not null and v_count > 0 then
          v_budget := (select b.usd from image_jobs.budget_left() b);
        end if;
      end loop;
    end loop;
    if v_left > 0 and cardinality(v_due) > 0 then
      return query select image_jobs.claim_checks(p_daemon, v_due, v_left);
      get diagnostics v_count = row_count;
      v_left := v_left - v_count;
    end if;
    exit when v_left <= 0;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
end
$$;

-- running → completed, failed, pending again, or parked: the daemon writes back, fenced by the claim.

-- Add events to runs, in sequence: [{"run_id", "id", "kind", "payload"}, …].
-- One that comes again with its id, since an acknowledgement was lost, is left out.
create or replace function image_jobs.add_events(p_events jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.write_events(array_agg(row((e.value ->> 'id')::uuid, e.value ->> 'run_id',
    coalesce(e.value ->> 'kind', 'log'), e.value -> 'payload')::image_jobs.event order by e.place))
  from jsonb_array_elements(p_events) with ordinality as e (value, place);
end
$$;

-- Returns what became of a run by a settlement of this outcome, for metrics and logs: the daemon asks, the database decides.
-- Its state says it, so it is the same if the settlement comes twice. A reroute begins with attempt 0 and nothing refused.
create or replace function image_jobs.fate_of(r public.runs, p_outcome text)
returns jsonb language plpgsql stable set search_path = ''
as $$
begin
  return jsonb_strip_nulls(jsonb_build_object(
    'outcome', case
      when r.status in ('completed', 'failed', 'cancelled') then r.status
      when p_outcome = 'released' then 'released'
      when r.status = 'running' then 'parked'
      when r.attempt = 0 and r.refused_since is null then 'fallback'
      else 'retried' end,
    'code', r.payload -> 'code', 'error', r.payload -> 'error', 'timings', r.payload -> 'timings'));
end
$$;

-- Settle (acknowledge) runs, fenced by the claim. The keys of a settlement, and what each outcome reads, stand in
-- sql/README.md, "The daemon's JSON".
-- Returns {id, claim, result} for each: settled; already (this claim was settled before: the acknowledgement was lost);
-- lost (the run has another claim by now); busy (the row is locked: send it again with the next sync, nothing waits for it).
-- And of the settled, also where that is said for the second time, what became of the run: see image_jobs.fate_of.
-- A retry beyond max_attempts fails the run instead, with the payload's reason and the hint for that (over_hint).
-- Plans are pinned: rows of runs by their ids, never by walking the table, and everything else hashed.
create or replace function image_jobs.settle_runs(p_daemon uuid, p_settlements jsonb)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_nestloop = off set enable_hashjoin = on
  set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_ids varchar[] := array(select s.value ->> 'id' from jsonb_array_elements(p_settlements) s);
  v_held bigint[];
  v_seen varchar[];
  v_events jsonb;
  v_calls jsonb;
  v_makers jsonb;
begin
  if jsonb_array_length(p_settlements) = 0 then
    return;
  end if;
  if exists (
    select from jsonb_array_elements(p_settlements) s
    where coalesce(s.value ->> 'outcome', '') not in ('completed', 'failed', 'retry', 'parked', 'released')
  ) then
    perform image_jobs.refuse('A settlement has an unknown outcome.', 'completed, failed, retry, parked or released.');
  end if;
  perform set_config('image_jobs.writer', 'daemon', true);

  -- The fence is the claim, also within this batch: it may hold an old and a new claim of the same run.
  with mine as materialized (
    select r.id, r.claim, r.status, r.claimed_by from public.runs r
    where r.id = any (v_ids)
    order by r.id
    for update skip locked
  )
  select array_agg(m.id),
    array_agg(m.claim) filter (where m.status = 'running' and m.claimed_by = p_daemon
      and m.claim = (s.value ->> 'claim')::bigint)
  into v_seen, v_held
  from mine m join jsonb_array_elements(p_settlements) s on s.value ->> 'id' = m.id;
  v_seen := coalesce(v_seen, '{}');
  v_held := coalesce(v_held, '{}');

  select jsonb_agg(e.value || jsonb_build_object('run_id', s.value ->> 'id') order by s.place, e.place) into v_events
  from jsonb_array_elements(p_settlements) with ordinality as s (value, place)
  cross join lateral jsonb_array_elements(s.value -> 'events') with ordinality as e (value, place)
  where (s.value ->> 'claim')::bigint = any (v_held);
  if v_events is not null then
    perform image_jobs.add_events(v_events);
  end if;

  -- The books come first: the payload's costs are read from them. Exact also of a claim that is lost, or a run that is gone.
  -- A request that was answered with the job of another call made nothing.
  if exists (select from jsonb_array_elements(p_settlements) s where s.value ->> 'outcome' = 'parked') then
    v_makers := image_jobs.makers_of_jobs(p_settlements);
  end if;
  select jsonb_agg(k.value) into v_calls
  from jsonb_array_elements(p_settlements) as s (value)
  left join public.runs r on r.id = s.value ->> 'id' and r.id = any (v_ids)
  cross join lateral jsonb_array_elements(
    case when v_makers -> (s.value ->> 'claim') is not null
      then jsonb_build_array(
        jsonb_build_object('id', s.value -> 'claim', 'state', 'free'),
        jsonb_build_object('id', v_makers -> (s.value ->> 'claim'), 'provider_job_id', s.value -> 'provider_job_id'))
      else image_jobs.calls_of(s.value, case when r.claim = (s.value ->> 'claim')::bigint then r.call end) end) as k (value)
  where r.id is null or r.id = any (v_seen);
  if v_calls is not null then
    perform image_jobs.close_calls(v_calls);
  end if;

  update public.runs r
  set
    status = case fate
      when 'reroute' then 'pending'
      when 'retry' then case when over then 'failed' else 'pending' end
      when 'parked' then 'running' when 'released' then case when submitted then 'running' else 'pending' end
      else fate end,
    claimed_by = null,
    attempt = case when fate = 'reroute' then 0 else r.attempt end
      - case when (fate = 'retry' and refunded) or (fate = 'released' and not submitted) then 1 else 0 end,
    refused_since = case when fate = 'retry' and s.refund then coalesce(r.refused_since, v_now) end,
    payload = case
      when s.outcome not in ('parked', 'released') then s.payload
        || case when over and s.over_hint is not null then jsonb_build_object('hint', s.over_hint) else '{}' end
        || image_jobs.shared_cost(r) || image_jobs.costs_of(r.id, r.ticket)
        || case when s.outcome = 'completed' then jsonb_build_object('timings', image_jobs.timings_of(
            r, coalesce((jsonb_path_query_first(s.calls, '$[*] ? (@.image == true).id'))::bigint, r.call, r.claim),
            image_jobs.seconds_ago(s.stored_ago), v_now))
          else jsonb_build_object('attempts', r.attempt) end
        || case when fate = 'failed' or over then image_jobs.timings_of_failure(r, v_now) else '{}' end end,
    message = case
      when fate = 'reroute' then image_jobs.reroute_message(s.payload, step)
      when fate in ('retry', 'parked', 'released') and not over then s.message end,
    progress = case s.outcome when 'completed' then 100 when 'parked' then coalesce(s.progress, r.progress) else
      case when fate in ('retry', 'reroute') or (fate = 'released' and not submitted) then 0 else r.progress end end,
    preview_url = case when s.outcome = 'parked' then r.preview_url end,
    provider_job_id = case when fate in ('retry', 'reroute') then null else coalesce(s.provider_job_id, r.provider_job_id) end,
    call = case fate
      when 'parked' then coalesce(r.call, (v_makers ->> s.claim::text)::bigint, r.claim)
      when 'retry' then null when 'reroute' then null else r.call end,
    submitted_at = case
      when fate in ('retry', 'reroute') then null
      when s.provider_job_id is distinct from r.provider_job_id and s.provider_job_id is not null then v_now
      else r.submitted_at end,
    due_at = case
      when fate = 'reroute' then v_now
      when over then null
      when fate in ('retry', 'parked', 'released') then v_now + make_interval(secs => coalesce(s.due_in, 0)) end,
    webhook = case fate when 'parked' then case when s.webhook then 'awaited' end when 'released' then r.webhook end,
    -- Among the runs that wait there already, as a new run would: not in front of them.
    rank = case when fate = 'reroute'
      then image_jobs.next_rank(coalesce(r.created_by, r.subject_id), image_jobs.lane_of(step), r.priority) end,
    workflow_rank = case when fate = 'reroute' then image_jobs.next_workflow_rank(
      coalesce(r.created_by, r.subject_id), r.subject_id, image_jobs.lane_of(step), r.priority) else r.workflow_rank end,
    lane = case when fate = 'reroute' then image_jobs.lane_of(step) else r.lane end,
    routed_to = coalesce(step, r.routed_to),
    finished_at = case
      when fate in ('completed', 'failed') or over then v_now end
  from public.runs o
  join jsonb_to_recordset(p_settlements) as s (
    id varchar, claim bigint, outcome text, payload jsonb, message text, due_in double precision, refund boolean,
    refund_for double precision,
    over_hint text, fall_back boolean, provider_job_id text, progress integer, webhook boolean, stored_ago double precision, calls jsonb
  ) on s.id = o.id and s.claim = o.claim
  cross join lateral (
    select coalesce(s.refund, false)
        and coalesce(o.refused_since, v_now) > v_now - make_interval(secs => coalesce(s.refund_for, 3600)) as refunded,
      o.provider_job_id is not null as submitted,
      case when s.fall_back and s.outcome in ('failed', 'retry')
        then (image_jobs.remaining_fallbacks(o.metadata, o.processor, o.routed_to))[1] end as step
  ) policy
  cross join lateral (select case when step is null then s.outcome else 'reroute' end as fate) way
  cross join lateral (select fate = 'retry' and not refunded and o.attempt >= o.max_attempts as over) attempts
  where r.id = o.id and r.id = any (v_seen) and o.id = any (v_seen) and o.claim = any (v_held);

  -- A lost claim: its result is not used, but may have been paid for, so an event records it.
  -- Once, also if this reply is lost and the settlement comes again: the event's id follows from the claim. Not if the run
  -- has this very provider job: then an acknowledgement was lost, and its next check was claimed meanwhile.
  perform image_jobs.write_events(array_agg(row(
    md5('lost claim ' || s.claim)::uuid, s.id, coalesce(s.if_lost ->> 'kind', 'log'), s.if_lost -> 'payload')::image_jobs.event))
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, provider_job_id text, if_lost jsonb)
  join public.runs r on r.id = s.id and r.claim <> s.claim
  where s.if_lost -> 'payload' is not null and s.id = any (v_seen) and r.id = any (v_seen)
    and (s.provider_job_id is null or s.provider_job_id is distinct from r.provider_job_id)
  having count(*) > 0;
  if cardinality(v_held) < cardinality(v_seen) then
    perform image_jobs.refresh_costs(v_seen);
    perform image_jobs.attach_provider_job(
      split_part(coalesce(s.processor, r.routed_to, r.processor), ':', 1), s.provider_job_id, s.id, s.ticket)
    from jsonb_to_recordset(p_settlements) as s (
      id varchar, claim bigint, outcome text, provider_job_id text, ticket bigint, processor text)
    join public.runs r on r.id = s.id and r.claim <> s.claim
    where s.outcome = 'parked' and s.provider_job_id is not null and s.ticket is not null
      and s.id = any (v_seen) and r.id = any (v_seen);
  end if;

  perform set_config('image_jobs.writer', v_writer, true);

  return query
  select jsonb_build_object('id', s.id, 'claim', s.claim, 'result', case
    when r.claim = s.claim and s.claim = any (v_held) then 'settled'
    when s.id = any (v_seen) and r.claim = s.claim then 'already'
    when s.id = any (v_seen) or r.id is null then 'lost'
    else 'busy' end,
    'fate', case when s.id = any (v_seen) and r.claim = s.claim then image_jobs.fate_of(r, s.outcome) end)
  from jsonb_to_recordset(p_settlements) as s (id varchar, claim bigint, outcome text)
  left join public.runs r on r.id = s.id and r.id = any (v_ids);
end
$$;

-- running → running: progress, previews and events of runs that are held.

-- Record progress. Each entry is {id, claim, progress, message, preview_url, events, calls}; null leaves a column as it is.
-- Returns {id, claim, result} like settle_runs: recorded, lost or busy (send its events again, its progress is stale).
create or replace function image_jobs.record_progress(p_daemon uuid, p_entries jsonb)
returns setof jsonb language plpgsql volatile set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_nestloop = off set enable_hashjoin = on
  set enable_mergejoin = off set jit = off set plan_cache_mode = force_generic_plan
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_ids varchar[] := array(select e.value ->> 'id' from jsonb_array_elements(p_entries) e);
  v_held bigint[];
  v_seen varchar[];
  v_events jsonb;
  v_calls jsonb;
begin
  if jsonb_array_length(p_entries) = 0 then
    return;
  end if;
  perform set_config('image_jobs.writer', 'daemon', true);
  with mine as materialized (
    select r.id, r.claim, r.status, r.claimed_by from public.runs r
    where r.id = any (v_ids)
    order by r.id
    for update skip locked
  )
  select array_agg(m.id),
    array_agg(m.claim) filter (where m.status = 'running' and m.claimed_by = p_daemon
      and m.claim = (e.value ->> 'claim')::bigint)
  into v_seen, v_held
  from mine m join jsonb_array_elements(p_entries) e on e.value ->> 'id' = m.id;
  v_seen := coalesce(v_seen, '{}');
  v_held := coalesce(v_held, '{}');

  select jsonb_agg(x.value || jsonb_build_object('run_id', e.value ->> 'id') order by e.place, x.place) into v_events
  from jsonb_array_elements(p_entries) with ordinality as e (value, place)
  cross join lateral jsonb_array_elements(e.value -> 'events') with ordinality as x (value, place)
  where (e.value ->> 'claim')::bigint = any (v_held);
  if v_events is not null then
    perform image_jobs.add_events(v_events);
  end if;

  select jsonb_agg(k.value) into v_calls
  from jsonb_array_elements(p_entries) as e (value)
  left join public.runs r on r.id = e.value ->> 'id' and r.id = any (v_ids)
  cross join lateral jsonb_array_elements(e.value -> 'calls') as k (value)
  where r.id is null or r.id = any (v_seen);
  if v_calls is not null then
    perform image_jobs.close_calls(v_calls);
    if cardinality(v_held) < cardinality(v_seen) then
      perform image_jobs.refresh_costs(v_seen);
    end if;
  end if;

  update public.runs r
  set progress = coalesce(greatest(r.progress, e.progress), r.progress),
    message = coalesce(e.message, r.message),
    preview_url = coalesce(e.preview_url, r.preview_url)
  from jsonb_to_recordset(p_entries) as e (id varchar, claim bigint, progress integer, message text, preview_url text)
  where r.id = any (v_seen) and r.id = e.id and r.claim = e.claim and r.claim = any (v_held)
    and (e.progress is not null or e.message is not null or e.preview_url is not null);
  perform set_config('image_jobs.writer', v_writer, true);

  return query
  select jsonb_build_object('id', e.id, 'claim', e.claim, 'result', case
    when r.claim = e.claim and e.claim = any (v_held) then 'recorded'
    when e.id = any (v_seen) or r.id is null then 'lost'
    else 'busy' end)
  from jsonb_to_recordset(p_entries) as e (id varchar, claim bigint)
  left join public.runs r on r.id = e.id and r.id = any (v_ids);
end
$$;

-- sync: one statement, one round trip. Finished runs are settled and free slots are filled; whatever happens meanwhile
-- goes with the next sync. A daemon has one sync in flight, never two.

-- Release runs that the database thinks a daemon holds and it does not: claims whose reply was lost on the way.
-- p_held are the claims it holds. Their work never began, so the attempt comes back, once; if it happens again, or the request
-- went out, they are not what they seem, and cost an attempt: else a run could be paid for again without end.
-- A sync that its daemon had given up may be done late, when later ones have claimed what its list does not name yet: of claims
-- that are newer than p_newest, the newest there was before the list was made, it says nothing. Null: it names them all.
create or replace function image_jobs.release_unheld(p_daemon uuid, p_held bigint[], p_newest bigint)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
begin
  select array_agg(unheld.id) into v_runs
  from (
    select r.id from public.runs r
    where r.claimed_by = p_daemon and not r.claim = any (p_held) and r.claim <= coalesce(p_newest, r.claim)
      and not r.id = any (v_aside)
    order by r.id
    for update skip locked
  ) unheld;
  if v_runs is not null then
    perform set_config('image_jobs.writer', 'daemon', true);
    perform image_jobs.change_runs('release_runs', v_runs);
    perform set_config('image_jobs.writer', v_writer, true);
  end if;
end
$$;

create or replace function image_jobs.release_runs(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_calls jsonb;
  v_spent bigint[];
begin
  select jsonb_agg(jsonb_build_object('id', r.claim,
      'state', case when r.unheld or c.sent_at is not null or c.state <> 'open' then 'unknown' else 'free' end)),
    array_agg(r.claim) filter (where r.unheld or c.sent_at is not null or c.state <> 'open')
  into v_calls, v_spent
  from unnest(p_runs) as p (id)
  join public.runs r on r.id = any (array[p.id])
  left join image_jobs.calls c on c.id = any (array[r.claim])
  where r.provider_job_id is null;
  perform image_jobs.close_calls(v_calls);
  update public.runs r
  set status = fate.status,
    attempt = r.attempt - case when fate.status = 'pending' and not fate.spent then 1 else 0 end,
    unheld = case when fate.status = 'running' then r.unheld else true end,
    claimed_by = null, rank = null, due_at = case when fate.status <> 'failed' then v_now end,
    finished_at = case when fate.status = 'failed' then v_now end,
    payload = case when fate.status = 'failed' then jsonb_build_object(
      'error', 'The daemon lost sight of this run while it was at work.', 'code', 'outcome_unknown', 'attempts', r.attempt,
      'hint', 'The provider may have charged for it. Look at the daemons'' logs, then requeue the run.')
      || image_jobs.costs_of(r.id, r.ticket) || image_jobs.timings_of_failure(o, v_now) end
  from unnest(p_runs) as p (id)
  join public.runs o on o.id = any (array[p.id])
  cross join lateral (select coalesce(o.claim = any (v_spent), false) as spent) held
  cross join lateral (select held.spent, case
    when o.provider_job_id is not null then 'running'
    when held.spent and o.attempt >= o.max_attempts then 'failed' else 'pending' end as status) fate
  where r.id = any (array[o.id]);
  -- By the claim it looks like a settlement of the daemon, which knows nothing of it.
  insert into image_jobs.tallies (metric, provider, model, result, code, count, run_id, workflow_id, node_id, error)
  select 'runs', split_part(at.processor, ':', 1), substr(at.processor, strpos(at.processor, ':') + 1), r.status,
    r.payload ->> 'code', 1, r.id, r.subject_id, r.metadata ->> 'nodeId', r.payload ->> 'error'
  from unnest(p_runs) as p (id)
  join public.runs r on r.id = any (array[p.id])
  cross join lateral (select coalesce(r.routed_to, r.processor, '') as processor) at
  where r.status = 'failed';
  return null;
end
$$;

-- Show nodes the runs they missed while they were locked, or were refused.
create or replace function image_jobs.refresh_stale_nodes(p_from timestamptz default '-infinity')
returns void language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_due record;
begin
  for v_due in
    with taken as (
      -- An array, since `in` may be planned to select anew for each row.
      delete from image_jobs.stale_nodes s
      where s.id = any (array(
        select q.id from image_jobs.stale_nodes q where q.due_at between p_from and image_jobs.now()
        order by q.due_at, q.id limit 1000 for update skip locked))
      returning s.node_id, s.failures
    )
    select t.failures, array_agg(t.node_id) as nodes
    from (select node_id, max(failures) as failures from taken group by node_id) t
    group by t.failures
  loop
    perform image_jobs.project_nodes(v_due.nodes, v_due.failures);
  end loop;
end
$$;

-- Keep image_jobs.wake ahead for the providers of a daemon that will sync by itself for so many seconds.
create or replace function image_jobs.stay_awake(p_daemon uuid, p_awake double precision)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_provider text;
  v_until timestamptz;
begin
  for v_provider in
    select '?' union select unnest(c.providers) from image_jobs.claimants c where c.daemon = p_daemon order by 1
  loop
    select w.awake_until into v_until from image_jobs.wake w where w.provider = v_provider order by w.awake_until desc limit 1;
    continue when v_until >= v_now + make_interval(secs => p_awake / 2) and v_until < v_now + interval '1 min';
    perform from image_jobs.wake w where w.provider = v_provider and w.awake_until = v_until for update skip locked;
    if found then
      delete from image_jobs.wake w where w.provider = v_provider and w.awake_until = v_until;
      insert into image_jobs.wake (provider, awake_until) values (v_provider, v_now + make_interval(secs => p_awake))
      on conflict do nothing;
    end if;
  end loop;
end
$$;

-- One sync of a daemon.
--   p_slots        free slots to fill
--   p_full_scan    see claim_runs
--   p_settlements  see settle_runs
--   p_progress     see record_progress
--   p_held         the claims it holds, now and then (after a reconnect, every few beats); null: not this time.
--                  Those it holds no longer are returned as lost: the notification may have missed it
--   p_awake        seconds for which this daemon will sync by itself, so that inserts for its providers need no NOTIFY;
--                  null: it will not
--   p_unreachable  see claim_runs
--   p_newest       the last value of image_jobs.claims, read before p_held was put together: see release_unheld
-- Returns rows {part: lost | claimed | settled | recorded, run: …}. Claims come before settlements: limits lead the lock order.
create or replace function image_jobs.sync(
  p_daemon uuid, p_slots integer, p_full_scan boolean, p_settlements jsonb, p_progress jsonb, p_held bigint[],
  p_awake double precision, p_unreachable text[] default null, p_newest bigint default null)
returns table (part text, run jsonb) language plpgsql volatile set search_path = ''
as $$
declare
  v_stale timestamptz;
begin
  -- As a rule there is no streak, and no server error that could begin one.
  if p_settlements <> '[]' and (image_jobs.has_streaks()
    or exists (select from jsonb_array_elements(p_settlements) s where (s.value ->> 'http_status')::integer >= 500))
  then
    perform image_jobs.note_responses(p_daemon, p_settlements);
  end if;
  if p_held is not null then
    perform image_jobs.release_unheld(p_daemon, p_held, p_newest);
    return query
    select 'lost', jsonb_build_object('claim', held.claim)
    from unnest(p_held) as held (claim)
    where held.claim not in (select r.claim from public.runs r where r.claimed_by = p_daemon);
  end if;
  if p_slots > 0 then
    return query select 'claimed', c from image_jobs.claim_runs(p_daemon, p_slots, p_full_scan, p_unreachable) c;
  end if;
  if p_progress <> '[]' then
    return query select 'recorded', r from image_jobs.record_progress(p_daemon, p_progress) r;
  end if;
  if p_settlements <> '[]' then
    return query select 'settled', s from image_jobs.settle_runs(p_daemon, p_settlements) s;
  end if;
  if p_full_scan then
    perform image_jobs.reroute_runs();
  end if;
  v_stale := image_jobs.due_from('stale nodes', p_full_scan);
  if exists (select from image_jobs.stale_nodes s where s.due_at between v_stale and image_jobs.now()) then
    perform image_jobs.refresh_stale_nodes(v_stale);
  elsif v_stale < image_jobs.now() - interval '70 s' then
    perform image_jobs.move_due_mark('stale nodes', null);
  end if;
  if p_awake is not null then
    perform image_jobs.stay_awake(p_daemon, p_awake);
  end if;
end
$$;

-- Wake all daemons. Called by one that stops syncing by itself, once its awake_until has lapsed.
create or replace function image_jobs.wake_all()
returns void language sql volatile set search_path = ''
as $$
  select pg_notify('image_jobs_wake', '')
$$;

-- The life of a daemon: register, beat, take over from the silent, leave.

-- Returns the version of the oldest daemon that may work with this schema. A release whose functions an older daemon could not
-- call any more says so here; until then the one before it goes on.
create or replace function image_jobs.oldest_daemon()
returns text language sql immutable set search_path = ''
as $$ select '0' $$;

-- Returns whether a daemon's version is older than that. A version without numbers is not judged.
create or replace function image_jobs.is_too_old(p_version text)
returns boolean language sql stable set search_path = ''
as $$
  select coalesce(string_to_array(substring(p_version from '^[0-9]+(?:\.[0-9]+)*'), '.')::numeric[]
    < string_to_array(image_jobs.oldest_daemon(), '.')::numeric[], false)
$$;

-- Register a daemon that has just started (or was fenced, and starts anew under a new id). Raises IJ002 if it is too old.
create or replace function image_jobs.register_daemon(
  p_id uuid, p_name text, p_version text, p_slots integer, p_lease interval, p_providers text[],
  p_unserved_grace interval default interval '2 minutes')
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if image_jobs.is_too_old(p_version) then
    raise exception using errcode = 'IJ002',
      message = format('This daemon is of version %s, too old for this database.', p_version),
      hint = format('Install version %s or a newer one, and start it again.', image_jobs.oldest_daemon());
  end if;
  insert into image_jobs.providers (name) select unnest(p_providers) on conflict do nothing;
  insert into image_jobs.wake (provider, awake_until) select p, '-infinity' from unnest(p_providers) p
  where not exists (select from image_jobs.wake w where w.provider = p) order by p on conflict do nothing;
  insert into image_jobs.opened_lanes (lane, priority) select p, 0 from unnest(p_providers) p order by p on conflict do nothing;
  insert into image_jobs.daemons (id, name, version, slots, lease, providers, unserved_grace, started_at, seen_at, fresh_since)
  values (p_id, p_name, p_version, p_slots, p_lease, p_providers, p_unserved_grace,
    image_jobs.now(), image_jobs.now(), image_jobs.now())
  on conflict (id) do nothing;
  delete from image_jobs.daemons d where d.ended_at < image_jobs.now() - interval '7 days';
  perform image_jobs.note_provider_states();
end
$$;

-- Returns the key of the advisory lock that a daemon's LISTEN session holds while it lives.
create or replace function image_jobs.session_lock_key(p_daemon uuid)
returns bigint language sql immutable parallel safe set search_path = ''
as $$
  select hashtextextended('image_jobs daemon ' || p_daemon::text, 0)
$$;

-- Record a beat. Raises IJ001 if the daemon was taken for dead meanwhile.
-- A gap of half a lease breaks its freshness: after an outage of the database no daemon may take over at once.
create or replace function image_jobs.heartbeat(p_daemon uuid, p_in_flight integer, p_session_lock boolean, p_draining boolean)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  update image_jobs.daemons d
  set fresh_since = case when v_now - d.seen_at > d.lease / 2 or d.fresh_since > v_now then v_now else d.fresh_since end,
    seen_at = v_now, in_flight = p_in_flight, session_lock = p_session_lock, draining = p_draining
  where d.id = p_daemon and d.ended_at is null;
  if not found then
    raise exception using errcode = 'IJ001', message = 'This daemon was taken for dead; it has to register anew.';
  end if;
end
$$;

-- Take the runs of one daemon away from it. A parked run is checked; a call that was in flight has an unknown
-- outcome, and is made again only as the run's next attempt, after a pause (what killed one daemon may kill the next): as
-- long as a webhook is waited for if a provider job may have been made of which one may come.
-- Locked runs are left for the next take_over.
create or replace function image_jobs.abandon_runs(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_runs varchar[];
  v_abandoned jsonb[];
begin
  select array_agg(theirs.id) into v_runs
  from (
    select r.id from public.runs r
    where r.claimed_by = p_daemon and not r.id = any (v_aside)
    order by r.id for update skip locked
  ) theirs;
  if v_runs is null then
    return 0;
  end if;
  perform set_config('image_jobs.writer', 'daemon', true);
  v_abandoned := image_jobs.change_runs('abandon_each', v_runs);
  perform set_config('image_jobs.writer', v_writer, true);
  return coalesce(cardinality(v_abandoned), 0);
end
$$;

create or replace function image_jobs.abandon_each(p_runs varchar[], p_daemon uuid)
returns jsonb[] language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  update public.runs r
  set claim = nextval('image_jobs.claims'), claimed_by = null, rank = null, progress = case when r.provider_job_id is null then 0 else r.progress end,
    status = fate.status,
    due_at = case fate.status when 'running' then v_now when 'pending' then v_now + greatest(
      make_interval(secs => 2 ^ least(r.attempt, 8)), image_jobs.webhook_wait(r)) end,
    finished_at = case when fate.status = 'failed' then v_now end,
    message = case when fate.status = 'pending' then 'The daemon that was making this image went silent; another tries again.' end,
    payload = case when fate.status = 'failed' then jsonb_build_object(
      'error', 'Every daemon that tried to make this image went silent while it was at work.',
      'code', 'outcome_unknown', 'attempts', r.attempt,
      'hint', 'The provider may have charged for it. Look at the daemons'' logs, then requeue the run.')
      || image_jobs.timings_of_failure(o, v_now) end
  from unnest(p_runs) as p (id)
  join public.runs o on o.id = any (array[p.id])
  cross join lateral (select case
    when o.provider_job_id is not null then 'running' when o.attempt < o.max_attempts then 'pending' else 'failed' end as status) fate
  where r.id = any (array[o.id]);
  return array(select to_jsonb(p.id) from unnest(p_runs) as p (id));
end
$$;

-- Returns when the LISTEN session of a daemon began; null if it has none, or does not hold the daemon's lock.
create or replace function image_jobs.session_began(p_daemon uuid)
returns timestamptz language sql volatile set search_path = ''
as $$
  select a.backend_start
  from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid and a.datname = current_database()
  where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and l.database = a.datid
    and (l.classid::bigint << 32 | l.objid::bigint) = image_jobs.session_lock_key(p_daemon)
$$;

-- Take over (rescue) from daemons that have gone silent: no beat for their lease, or no beat for 6 s (a fifth of a long lease, so
-- that a beat was missed) and their session's lock is free. Locks go with a restart of the server too, so they count only
-- for a daemon whose own session was there before the last beat of the silent one, and still is.
-- Only a daemon whose own beats have come unbroken for one lease may do so. Returns how many runs were taken over.
create or replace function image_jobs.take_over(p_daemon uuid)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_silent record;
  v_count integer := 0;
begin
  if not exists (
    select from image_jobs.daemons d
    where d.id = p_daemon and d.ended_at is null and d.seen_at - d.fresh_since >= d.lease and v_now - d.seen_at < d.lease / 2
  ) then
    return 0;
  end if;
  -- Seen by a clock that was ahead for a while: its lease begins now.
  update image_jobs.daemons d set seen_at = v_now
  where d.id = any (array(
    select o.id from image_jobs.daemons o
    where o.ended_at is null and o.id <> p_daemon and o.seen_at > v_now + o.lease order by o.id for update skip locked));
  for v_silent in
    select d.id, d.seen_at, d.seen_at < v_now - d.lease as lapsed from image_jobs.daemons d
    where d.ended_at is null and d.id <> p_daemon
      and (d.seen_at < v_now - d.lease or (d.session_lock and d.seen_at < v_now - greatest(interval '6 s', d.lease / 5)))
    order by d.id
    for update skip locked
  loop
    continue when not v_silent.lapsed and not (
      coalesce(image_jobs.session_began(p_daemon) < v_silent.seen_at, false)
      and pg_try_advisory_xact_lock(image_jobs.session_lock_key(v_silent.id)));
    -- It is claiming just now.
    perform from image_jobs.claimants c where c.daemon = v_silent.id for update skip locked;
    continue when not found;
    update image_jobs.daemons d set ended_at = v_now, ended = 'taken over' where d.id = v_silent.id;
    v_count := v_count + image_jobs.abandon_runs(v_silent.id);
  end loop;
  -- Runs that were locked when their daemon ended.
  for v_silent in
    select distinct r.claimed_by as id from public.runs r
    where r.claimed_by is not null
      and not exists (select from image_jobs.daemons d where d.id = r.claimed_by and d.ended_at is null)
  loop
    v_count := v_count + image_jobs.abandon_runs(v_silent.id);
  end loop;
  return v_count;
end
$$;

-- Leave in good order. Runs that the daemon still holds are treated as in a take-over.
create or replace function image_jobs.leave(p_daemon uuid)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update image_jobs.daemons d set ended_at = image_jobs.now(), ended = 'stopped', in_flight = 0
  where d.id = p_daemon and d.ended_at is null;
  if found then
    perform image_jobs.abandon_runs(p_daemon);
    perform image_jobs.note_provider_states();
  end if;
end
$$;

-- Publish the models of a provider: the rows of image_models are replaced by these. A daemon from before there were
-- qualities does not name any.
create or replace function image_jobs.publish_models(p_provider text, p_models jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  delete from image_jobs.models m
  where m.provider = p_provider and not exists (
    select from jsonb_to_recordset(p_models) as n (model text) where n.model = m.model);
  insert into image_jobs.models
  select n.* from jsonb_populate_recordset(
    jsonb_populate_record(null::image_jobs.models, '{"qualities": []}'), p_models) n
  order by n.provider, n.model
  on conflict (provider, model) do update set
    sizes = excluded.sizes, ratios = excluded.ratios, seed = excluded.seed, negative_prompt = excluded.negative_prompt,
    previous_image = excluded.previous_image, previews = excluded.previews, price = excluded.price,
    typical_seconds = excluded.typical_seconds, retired = excluded.retired, successor = excluded.successor,
    as_of = excluded.as_of, source = excluded.source, qualities = excluded.qualities;
  delete from image_jobs.prices p where p.provider = p_provider;
  insert into image_jobs.prices (provider, model, quality, width, height, price)
  select p_provider, m.value ->> 'model', p.quality, p.width, p.height, p.price
  from jsonb_array_elements(p_models) as m (value)
  cross join lateral jsonb_to_recordset(coalesce(m.value -> 'prices', '[]'))
    as p (quality text, width integer, height integer, price numeric)
  on conflict do nothing;
end
$$;

-- Why runs wait: the state of each provider, and of each model that has one of its own.
--
-- It belongs to the lane and never to its runs: a pause of 100,000 runs writes no row of theirs. It follows from what is there
-- at the moment, so it is never late; `provider_states` only remembers since when, and what was told.

-- No row: open.
create table if not exists image_jobs.provider_states (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  state text not null,
  since timestamptz not null,
  until timestamptz,
  sentence text,
  constraint provider_states_one_row_each unique nulls not distinct (provider, model)
);
comment on table image_jobs.provider_states is 'Providers, and models, that are not open: since when, and what was broadcast of them.';

-- Returns the name of a provider for the person at the canvas.
create or replace function image_jobs.provider_name(p_provider text)
returns text language sql immutable set search_path = ''
as $$
  select case p_provider when 'openai' then 'OpenAI' else initcap(p_provider) end
$$;

-- Returns whether runs wait in a lane that could start but for its limits. From its watermark, which is a hint: a walk over dead
-- index entries would cost too much.
create or replace function image_jobs.has_waiting(p_lane text)
returns boolean language plpgsql volatile set search_path = ''
as $$
begin
  return exists (
    select from image_jobs.lanes l
    where l.lane = p_lane and exists (
      select from public.runs r
      where r.kind = 'image_gen' and r.queue_state = 'pending' and r.rank is not null
        and r.lane = l.lane and r.priority = l.priority and r.rank >= least(l.watermark, l.passed_over)));
end
$$;

-- Returns how a limit is used up: until when, as far as that is known, and a sentence; no row where it leaves room.
create or replace function image_jobs.limit_reached(p_limit image_jobs.provider_limits)
returns table (until timestamptz, sentence text) language plpgsql volatile set search_path = ''
as $$
#variable_conflict use_column
declare
  v_second bigint := floor(extract(epoch from image_jobs.now()));
  v_what text := concat_ws(' ', image_jobs.provider_name(p_limit.provider), p_limit.model);
  v_starts bigint;
  v_first bigint;
begin
  if p_limit.per_minute is not null then
    select sum(s.starts), min(s.at) into v_starts, v_first
    from image_jobs.starts_of(p_limit.id) last
    cross join lateral unnest(last.at, last.starts) as s (at, starts) where s.at between v_second - 60 and v_second + 60;
    if v_starts >= p_limit.per_minute then
      return query select to_timestamp(v_first + 61), format(
        '%s may start %s image%s a minute here, and this minute''s are used up. What waits starts by itself.',
        v_what, p_limit.per_minute, case when p_limit.per_minute <> 1 then 's' else '' end);
      return;
    end if;
  end if;
  if p_limit.max_running is not null
    and image_jobs.count_running(p_limit.provider, p_limit.model, p_limit.max_running) >= p_limit.max_running
  then
    return query select null::timestamptz, format(
      '%s makes %s image%s at a time here. What waits starts by itself when one is ready.',
      v_what, p_limit.max_running, case when p_limit.max_running <> 1 then 's' else '' end);
  end if;
end
$$;

-- Returns the state of each provider (model null), and of each model that has a limit or a block of its own, also of retired ones
-- that draw with a blocked one: of several things in the way the one that is told.
--
-- check_in: seconds after which nobody may be there any more to tell that it has changed, as the last daemon's lease has ended by
-- then. Null: no daemon lives, and the first one tells.
create or replace function image_jobs.provider_status()
returns table (
  provider text, model text, state text, since timestamptz, until timestamptz, sentence text, check_in double precision)
language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
as $$
#variable_conflict use_column
declare
  v_now timestamptz := image_jobs.now();
  v_budget record;
begin
  select b.usd, b.opens_at into v_budget from image_jobs.budget_left() b;
  return query
  with living as materialized (
    select d.providers, d.seen_at + d.lease as until, d.storage_closed_at, d.unreachable
    from image_jobs.daemons d
    where d.ended_at is null and not d.draining and d.seen_at + d.lease > v_now
  ),
  last as materialized (select max(v.until) as until from living v),
  subjects as materialized (
    select p.name as provider, null::text as model, p.name as lane from image_jobs.providers p
    union
    select l.provider, l.model, l.provider || ':' || l.model from image_jobs.provider_limits l
    where l.model is not null and l.provider in (select p.name from image_jobs.providers p)
    union
    select b.provider, m.name, image_jobs.lane_of(b.provider || ':' || m.name)
    from image_jobs.provider_blocks b
    cross join lateral (
      select b.model as name
      union
      select o.model from image_jobs.models o
      where o.provider = b.provider and o.retired is not null
        and image_jobs.drawing_model(o.provider || ':' || o.model) = b.model
    ) m
    where b.model is not null and b.until > v_now and b.provider in (select p.name from image_jobs.providers p)
  )
  select s.provider, s.model, told.state,
    case when told.state <> 'open' then least(coalesce(told.since, noted.since, v_now), v_now) end,
    told.until, told.sentence,
    extract(epoch from last.until - v_now)::double precision
  from subjects s
  cross join last
  cross join lateral (select image_jobs.provider_name(s.provider) as name) named
  cross join lateral (
    select 1 as place, 'paused' as state, null::timestamptz as since, null::timestamptz as until,
      format('%s is paused. Images wait, and start by themselves when it goes on.', concat_ws(' ', named.name, l.model)) as sentence
    from image_jobs.provider_limits l
    where l.provider = s.provider and (l.model is null or l.model = s.model)
      and (l.paused or l.per_minute = 0 or l.max_running = 0)
    union all
    select 2, 'unserved', (
        select max(least(d.ended_at, d.seen_at + d.lease)) from image_jobs.daemons d where s.provider = any (d.providers)), null,
      case when last.until is null
        then 'No images are made at the moment. They wait, and start by themselves when it goes on.'
        else format('%s is not served here at the moment. Images wait a little, and start by themselves if that changes.', named.name) end
    where not exists (select from living v where s.provider = any (v.providers))
    union all
    select 3, 'budget', null, v_budget.opens_at,
      'The budget of all together is used up. Images wait, and start by themselves when there is one again.'
    where v_budget.usd <= 0
    union all
    select 4, 'storage', min(v.storage_closed_at), null,
      'Storage takes no images at the moment. New ones wait, and start by themselves when it does.'
    from living v where s.provider = any (v.providers)
    having bool_and(v.storage_closed_at is not null)
    union all
    -- An end that is none, or in a year of five digits, which JavaScript and Python cannot read: until it is opened.
    (select 5, 'blocked', null, case when b.until < '10000-01-01Z' then b.until end,
      coalesce(b.reason, format('%s is closed for a while. Images wait, and start by themselves.', concat_ws(' ', named.name, b.model)))
    from image_jobs.provider_blocks b
    where b.provider = s.provider and b.until > v_now
      and (b.model is null or b.model = image_jobs.drawing_model(s.provider || ':' || s.model))
    order by b.until desc limit 1)
    union all
    select 6, 'blocked', null, null,
      format('%s cannot be reached at the moment. Images wait, and start by themselves when it can.', named.name)
    from living v where s.provider = any (v.providers)
    having bool_and(s.provider = any (v.unreachable))
    union all
    (select 7, 'limited', null, reached.until, reached.sentence
    from image_jobs.provider_limits l
    cross join lateral image_jobs.limit_reached(l) reached
    where l.provider = s.provider and (l.model is null or l.model = s.model) and image_jobs.has_waiting(s.lane)
    order by reached.until nulls first limit 1)
    union all
    select 8, 'open', null, null, null
    order by 1 limit 1
  ) told
  left join image_jobs.provider_states noted
    on noted.provider = s.provider and noted.model is not distinct from s.model and noted.state = told.state;
end
$$;

create or replace view public.image_provider_status with (security_invoker = on) as
select s.provider, s.model, s.state, s.since, s.until, s.sentence, s.check_in from image_jobs.provider_status() s;
comment on view public.image_provider_status is
  'Image Job Orchestrator: why runs wait. A row for each provider (model null), and for each model that differs.';

-- Note what has changed, and broadcast it: one message for all. Whoever finds another at it leaves it to him, as he may wait for
-- nobody; the daemons come every second.
create or replace function image_jobs.note_provider_states()
returns void language plpgsql volatile security definer set search_path = '' set lock_timeout = '100ms'
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_changed jsonb;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('image_jobs provider states', 0)) then
    return;
  end if;
  if image_jobs.has_budget() then
    perform image_jobs.add_up_hours();
  end if;
  with status as materialized (
    select s.* from image_jobs.provider_status() s
  ),
  changed as materialized (
    select s.provider, s.model, s.state, s.since, s.until, s.sentence, s.check_in
    from status s
    left join image_jobs.provider_states n on n.provider = s.provider and n.model is not distinct from s.model
    where (s.state, s.sentence) is distinct from (coalesce(n.state, 'open'), n.sentence)
      -- That of a limit moves with every start.
      or s.state <> 'limited' and s.until is distinct from n.until
    union all
    select n.provider, n.model, 'open', null, null, null, null from image_jobs.provider_states n
    where not exists (select from status s where s.provider = n.provider and s.model is not distinct from n.model)
  ),
  opened as (
    delete from image_jobs.provider_states n using changed c
    where n.provider = c.provider and n.model is not distinct from c.model and c.state = 'open'
  ),
  closed as (
    insert into image_jobs.provider_states as n (provider, model, state, since, until, sentence)
    select c.provider, c.model, c.state, coalesce(c.since, v_now), c.until, c.sentence from changed c where c.state <> 'open'
    on conflict (provider, model) do update
      set state = excluded.state, since = excluded.since, until = excluded.until, sentence = excluded.sentence
  )
  select jsonb_agg(to_jsonb(c) order by c.provider, c.model) into v_changed from changed c;
  if v_changed is null or to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null then
    return;
  end if;
  begin
    execute 'select realtime.send($1, $2, $3, true)'
    using jsonb_build_object('providers', v_changed), 'providers_changed', 'image_providers';
  exception when others then
    raise warning 'providers_changed was not broadcast: %', sqlerrm;
  end;
end
$$;

-- Note what an operator, or a 429, has changed, with the statement that does it.
create or replace function image_jobs.limits_changed()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
begin
  perform image_jobs.note_provider_states();
  return null;
end
$$;

create or replace trigger limits_changed
  after insert or delete or update of provider, model, per_minute, max_running, paused on image_jobs.provider_limits
  for each statement execute function image_jobs.limits_changed();
create or replace trigger usage_limits_changed after insert or update or delete on image_jobs.usage_limits
  for each statement execute function image_jobs.limits_changed();
create or replace trigger blocks_changed after insert or update or delete on image_jobs.provider_blocks
  for each statement execute function image_jobs.limits_changed();

-- Say what keeps a daemon from claiming, and note what has changed by that, by time, or by a daemon that went silent. Every daemon
-- does so every second.
create or replace function image_jobs.report_daemon(p_daemon uuid, p_storage_closed boolean, p_unreachable text[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update image_jobs.daemons d
  set storage_closed_at = case when p_storage_closed then coalesce(d.storage_closed_at, image_jobs.now()) end,
    unreachable = p_unreachable
  where d.id = p_daemon and d.ended_at is null
    and ((d.storage_closed_at is not null) <> p_storage_closed or d.unreachable <> p_unreachable);
  perform image_jobs.note_provider_states();
end
$$;

-- Views: two for clients, the rest for operators.

create or replace view public.image_jobs with (security_invoker = on) as
select
  r.id as "jobId",
  r.metadata ->> 'nodeId' as "nodeId",
  r.subject_id as "workflowId",
  split_part(r.processor, ':', 1) as provider,
  substr(r.processor, strpos(r.processor, ':') + 1) as model,
  r.status,
  r.started_at as "startedAt",
  r.finished_at as "finishedAt",
  r.payload ->> 'imageUrl' as "imageUrl",
  r.metadata,
  case when r.status = 'failed' then r.payload ->> 'error' end as error
from public.runs r
where r.kind = 'image_gen';
comment on view public.image_jobs is 'Image Job Orchestrator: runs as ImageJobRecords.';

create or replace view public.image_models with (security_invoker = on) as
select m.provider, m.model, m.sizes, m.ratios, m.qualities, m.seed, m.negative_prompt, m.previous_image, m.previews,
  m.price, m.typical_seconds, m.retired, m.successor, m.as_of, m.source
from image_jobs.models m;
comment on view public.image_models is 'Image Job Orchestrator: the models on offer, for menus. Prices in USD for one image of default size.';

-- Views of operators look at a window: 24 hours, run_costs at 31 days. Its end is named, too, though nothing lies behind it: a
-- planner that does not know where a window begins takes it for a third of the table if it has no end, and would read all of that.

create or replace view image_jobs.queue_stats with (security_invoker = on) as
with clock as materialized (
  select image_jobs.now() as at
),
-- Each part is an index; names are split only when they are counted.
counted as (
  select coalesce(r.routed_to, r.processor) as name,
    case when r.due_at <= (select c.at from clock c) then 'pending' else 'delayed' end as state, count(*) as runs, min(r.due_at) as due_at
  from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is not null
  group by 1, 2
  union all
  select coalesce(r.routed_to, r.processor), case when r.due_at <= (select c.at from clock c) then 'pending' else 'delayed' end,
    count(*), min(r.due_at)
  from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is null
  group by 1, 2
  union all
  select coalesce(r.routed_to, r.processor), case when r.claimed_by is null then 'parked' else 'running' end, count(*), null
  from public.runs r where r.queue_state = 'running' and r.kind = 'image_gen'
  group by 1, 2
  union all
  select coalesce(r.routed_to, r.processor), r.status, count(*), null
  from public.runs r
  where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
    and r.claim between (select image_jobs.claim_before(c.at - interval '24 hours') from clock c) and 9223372036854775807
    and r.finished_at > (select c.at - interval '24 hours' from clock c)
  group by 1, 2
  union all
  select l.provider || ':', null, 0, null from image_jobs.provider_limits l where l.paused
  union all
  select b.provider || ':', null, 0, null from image_jobs.provider_blocks b
  where b.model is null and b.until > (select c.at from clock c)
)
-- Names of providers are the callers': those that nobody knows are one, '?', as in lanes.
select
  p.provider, p.pending, p.delayed, p.running, p.parked, p.completed, p.failed, p.cancelled, p.oldest_wait,
  coalesce(l.paused, false) as paused,
  (
    select b.until from image_jobs.provider_blocks b
    where b.provider = p.provider and b.model is null and b.until > (select c.at from clock c)) as blocked_until
from (
  select
    coalesce(k.name, '?') as provider,
    coalesce(sum(c.runs) filter (where c.state = 'pending'), 0)::bigint as pending,
    coalesce(sum(c.runs) filter (where c.state = 'delayed'), 0)::bigint as delayed,
    coalesce(sum(c.runs) filter (where c.state = 'running'), 0)::bigint as running,
    coalesce(sum(c.runs) filter (where c.state = 'parked'), 0)::bigint as parked,
    coalesce(sum(c.runs) filter (where c.state = 'completed'), 0)::bigint as completed,
    coalesce(sum(c.runs) filter (where c.state = 'failed'), 0)::bigint as failed,
    coalesce(sum(c.runs) filter (where c.state = 'cancelled'), 0)::bigint as cancelled,
    (select c.at from clock c) - min(c.due_at) filter (where c.state = 'pending') as oldest_wait
  from counted c
  left join (select p.name from image_jobs.providers p union select l.provider from image_jobs.provider_limits l) k
    on k.name = split_part(c.name, ':', 1)
  group by 1
) p
left join image_jobs.provider_limits l on l.provider = p.provider and l.model is null;
comment on view image_jobs.queue_stats is
  'Counts of runs by provider and state; what ended, in the last 24 hours. Paused and blocked providers are here even without runs; those that no daemon has served are one, ''?''.';

create or replace view image_jobs.run_timings with (security_invoker = on) as
select
  t.provider,
  t.model,
  stage.name as stage,
  stage.runs,
  stage.p[1] as p50,
  stage.p[2] as p95,
  stage.p[3] as p99
from (
  -- One look at each run; its timings are read once (offset 0).
  select r.provider, r.model,
    count(r.queued) as queued, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.queued) as p_queued,
    count(r.generate) as generate, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.generate) as p_generate,
    count(r.store) as store, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.store) as p_store,
    count(r.settle) as settle, percentile_cont(array[0.5, 0.95, 0.99]) within group (order by r.settle) as p_settle
  from (
    select c.provider, c.model, (c.timings ->> 'queuedMs')::double precision as queued, (c.timings ->> 'generateMs')::double precision as generate,
      (c.timings ->> 'storeMs')::double precision as store, (c.timings ->> 'settleMs')::double precision as settle
    from (
      select split_part(coalesce(r.routed_to, r.processor), ':', 1) as provider,
        coalesce(r.payload ->> 'model', substr(r.processor, strpos(r.processor, ':') + 1)) as model, r.payload -> 'timings' as timings
      from public.runs r
      where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen' and r.status = 'completed'
        and r.claim between (select image_jobs.claim_before(image_jobs.now() - interval '24 hours')) and 9223372036854775807
        and r.finished_at > (select image_jobs.now() - interval '24 hours')
      offset 0
    ) c
    offset 0
  ) r
  group by r.provider, r.model
) t
cross join lateral (values
  ('queuedMs', t.queued, t.p_queued), ('generateMs', t.generate, t.p_generate),
  ('storeMs', t.store, t.p_store), ('settleMs', t.settle, t.p_settle)) as stage (name, runs, p)
where stage.runs > 0;
comment on view image_jobs.run_timings is
  'Milliseconds of each stage of the runs that were completed in the last 24 hours, by provider and the model that drew: in line, at the provider, to storage, from there to the node.';

create or replace view image_jobs.failures with (security_invoker = on) as
select f.code, f.count, f.last, f.example, r.payload ->> 'error' as sentence
from (
  select r.payload ->> 'code' as code, count(*) as count, max(r.finished_at) as last,
    (array_agg(r.id order by r.finished_at desc))[1] as example
  from public.runs r
  where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen' and r.status = 'failed'
    and r.claim between (select image_jobs.claim_before(image_jobs.now() - interval '24 hours')) and 9223372036854775807
    and r.finished_at > (select image_jobs.now() - interval '24 hours')
  group by 1
) f
join public.runs r on r.id = f.example;
comment on view image_jobs.failures is 'Runs that failed in the last 24 hours, by code: how many, and the newest as an example with its sentence.';

create or replace view image_jobs.throughput with (security_invoker = on) as
select
  date_bin('1 min', r.finished_at, '2000-01-01 00:00:00+00') as minute,
  count(*) filter (where r.status = 'completed') as done,
  count(*) filter (where r.status = 'failed') as failed,
  coalesce(sum(r.attempt - 1) filter (where r.attempt > 1), 0)::bigint as retried
from public.runs r
where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
  and r.claim between (select image_jobs.claim_before(image_jobs.now() - interval '24 hours')) and 9223372036854775807
  and r.finished_at > (select image_jobs.now() - interval '24 hours')
group by 1;
comment on view image_jobs.throughput is
  'Runs that ended in the last 24 hours, by minute. retried: how many more attempts than one these runs took.';

create or replace view image_jobs.run_costs with (security_invoker = on) as
select
  -- A day of UTC.
  date_bin('1 day', c.opened_at, '2000-01-01 00:00:00+00') as day,
  c.provider,
  c.model,
  count(*) as calls,
  count(*) filter (where c.image) as images,
  sum(c.cost) as cost,
  sum(c.estimate) filter (where c.state = 'unknown') as possible_cost,
  count(*) filter (where c.state = 'charged' and c.cost is null) as unpriced
from image_jobs.calls c
where c.state in ('charged', 'unknown')
  and c.opened_at between (select date_trunc('day', image_jobs.now(), 'UTC') - interval '30 days') and (select image_jobs.now() + interval '1 hour')
group by 1, 2, 3;
comment on view image_jobs.run_costs is
  'USD by day (UTC), provider and the model that drew, of the last 31 days. possible_cost: calls whose outcome is unknown. unpriced: charged calls without a known price.';

create or replace view image_jobs.storage_stats with (security_invoker = on) as
select
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) as tried,
  coalesce(sum((e.payload -> 'data' ->> 'uploadTries')::bigint), 0) - count(*) filter (where e.payload ->> 'event' = 'stored') as failed,
  round(count(*) filter (where e.payload ->> 'event' = 'stored')
    / nullif(sum((e.payload -> 'data' ->> 'uploadTries')::numeric), 0), 4) as success_rate
from public.run_events e
where e.run_kind = 'image_gen' and e.payload -> 'data' ? 'uploadTries'
  and e.ts between (select image_jobs.now() - interval '24 hours') and (select image_jobs.now() + interval '1 hour');
comment on view image_jobs.storage_stats is 'Uploads of images in the last 24 hours: tried, failed, success rate.';

-- Everything else was held against the rule when it was written.
create or replace view image_jobs.storage_violations with (security_invoker = on) as
select 'runs' as table_name, r.id::text as id, c.name as column_name
from public.runs r cross join lateral (values ('payload', r.payload), ('metadata', r.metadata)) c (name, value)
where r.kind = 'image_gen' and r.ticket is null and image_jobs.has_base64(c.value)
union all
select 'run_events', e.id::text, 'payload' from public.runs r join public.run_events e on e.run_id = r.id
where r.kind = 'image_gen' and r.ticket is null and e.run_kind is null and image_jobs.has_base64(e.payload)
union all
select 'workflow_nodes', n.id::text, c.name
from public.workflow_nodes n cross join lateral (values ('node_data', n.node_data), ('position', n.position)) c (name, value)
where n.version is null and image_jobs.has_base64(c.value);
comment on view image_jobs.storage_violations is
  'Rows that hold base64: must be empty. Only rows older than the rule can be here: runs that were never requeued, their events, nodes that were never changed.';

create or replace view image_jobs.daemon_status with (security_invoker = on) as
select d.id, d.name, d.version, d.slots, d.in_flight, d.providers, d.started_at, d.seen_at, d.session_lock, d.lease, case
    when d.ended is not null then d.ended
    when d.seen_at < image_jobs.now() - d.lease then 'silent'
    when d.draining then 'draining'
    else 'alive' end as state
from image_jobs.daemons d;
comment on view image_jobs.daemon_status is 'Every daemon that has run in the last days, and whether it lives.';

-- Alerts: what an operator has to see to, each with a sentence and a cure. And notices of them, which daemons send.

create table if not exists image_jobs.alert_notices (
  id uuid primary key default gen_random_uuid(),
  name text not null,
  subject text not null,
  severity text not null,
  sentence text not null,
  cure text not null,
  since timestamptz not null,
  away_since timestamptz,
  closed_at timestamptz,
  sent text check (sent in ('open', 'closed')),
  due_at timestamptz not null,
  tries integer not null default 0
);
comment on table image_jobs.alert_notices is
  'Alerts of which daemons with IMAGE_JOBS_ALERT_URL tell: when they open, and when they close. Kept for a week.';
comment on column image_jobs.alert_notices.away_since is 'Since when there is no such alert. It closes after five minutes.';
comment on column image_jobs.alert_notices.sent is 'What has been sent of it; null: nothing yet.';
comment on column image_jobs.alert_notices.due_at is 'Not before then is the next sent; while a daemon is at it, the end of its lease.';
create unique index if not exists alert_notices_one_open on image_jobs.alert_notices (name, subject) where closed_at is null;

-- Returns what is wrong now. Thresholds stand here and nowhere else; sql/README.md lists them. Nothing that users or providers
-- have written gets into a sentence, but the reason of a block.
create or replace function image_jobs.current_alerts()
returns table (name text, subject text, severity text, since timestamptz, sentence text, cure text)
language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set jit = off set plan_cache_mode = force_custom_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_hour_ago bigint := image_jobs.claim_before(v_now - interval '1 hour');
  v_quarter_ago bigint := image_jobs.claim_before(v_now - interval '15 min');
  v_living integer := (
    select count(*) from image_jobs.daemons d where d.ended_at is null and d.seen_at >= v_now - d.lease);
  v_last timestamptz := (
    select max(least(d.ended_at, d.seen_at + d.lease)) from image_jobs.daemons d);
begin
  return query
  with waiting as materialized (
    -- The first of each lane: users take turns in it, so the one that waits longest is among them.
    select split_part(l.lane, ':', 1) as provider, min(head.due_at) as since
    from image_jobs.lanes l
    cross join lateral (
      select r.due_at from public.runs r
      where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is not null
        and r.lane = l.lane and r.priority = l.priority and r.rank >= least(l.watermark, l.passed_over)
      order by r.rank limit 1000
    ) head
    group by 1
  ),
  failed as materialized (
    select split_part(coalesce(r.routed_to, r.processor), ':', 1) as provider, r.payload ->> 'code' as code, r.finished_at
    from public.runs r
    where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen' and r.claim >= v_hour_ago
      and r.status = 'failed' and r.finished_at > v_now - interval '1 hour'
  ),
  completed as materialized (
    select split_part(coalesce(r.routed_to, r.processor), ':', 1) as provider, count(*) as runs, max(r.finished_at) as last
    from public.runs r
    where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen' and r.claim >= v_quarter_ago
      and r.status = 'completed' and r.finished_at > v_now - interval '15 min'
    group by 1
  ),
  told as materialized (
    select e.ts, e.payload -> 'data' as data, split_part(coalesce(r.routed_to, r.processor), ':', 1) as provider
    from public.run_events e join public.runs r on r.id = e.run_id
    where e.run_kind = 'image_gen' and e.kind = 'error' and e.payload ->> 'event' in ('incident', 'warning')
      and e.ts > v_now - interval '1 hour'
  ),
  found as (
    select 'no_daemon' as name, '' as subject, case when w.since is null then 'warning' else 'critical' end as severity,
      coalesce(v_last, w.since) as since,
      case when w.since is null then 'No daemon is running.' else 'No daemon is running, and runs are waiting.' end as sentence,
      'Start one with image-jobs run, and look at the log of the last one.' as cure
    from (select min(waiting.since) as since from waiting) w
    where v_living = 0 and (v_last is not null or w.since is not null)
    union all
    select 'provider_unserved', w.provider, 'critical', greatest(w.since, served.until),
      format('Runs for %s are waiting, and no daemon serves it.', w.provider),
      'Set its key for a daemon, and start that again; or requeue the runs with another provider.'
    from waiting w
    cross join lateral (
      select max(least(d.ended_at, d.seen_at + d.lease)) as until,
        bool_or(d.ended_at is null and d.seen_at >= v_now - d.lease and not d.draining) as now
      from image_jobs.daemons d where w.provider = any (d.providers)
    ) served
    where w.provider <> '?' and v_living > 0 and served.now is not true
    union all
    -- For a minute at least: 429s of seconds come and go.
    select 'provider_blocked', concat_ws(':', b.provider, b.model), 'warning', state.since,
      format('%s is closed to all daemons until %s: %s', concat_ws(':', b.provider, b.model),
        case when b.until < '10000-01-01Z' then to_char(b.until at time zone 'utc', 'YYYY-MM-DD HH24:MI "UTC"') else 'it is opened' end,
        left(coalesce(b.reason, 'no reason was given.'), 300)),
      'Do what the reason says. Deleting its row of image_jobs.provider_blocks opens it at once.'
    from image_jobs.provider_blocks b
    left join image_jobs.provider_states state
      on state.provider = b.provider and state.model is not distinct from b.model and state.state = 'blocked'
    where b.until > v_now and b.until >= coalesce(state.since, v_now) + interval '1 min'
    union all
    select 'provider_unreachable', n.provider, 'critical', n.since,
      format('No daemon can connect to %s.', n.provider),
      'Look at the daemons'' network, and at the provider''s status page. Runs wait, or go on to their fallback.'
    from image_jobs.provider_states n
    where n.model is null and n.state = 'blocked' and n.until is null and n.since <= v_now - interval '1 min' and v_living > 0
      and not exists (select from image_jobs.provider_blocks b where b.provider = n.provider and b.model is null and b.until > v_now)
    union all
    -- Longer than a minute altogether: 4 + 8 + 16 + 32 + 60 s.
    select 'provider_down', s.provider, 'critical', null::timestamptz,
      format('%s has answered with server errors only for more than a minute.', s.provider),
      'Look at the provider''s status page. Runs wait, or go on to their fallback; it is tried again by itself.'
    from image_jobs.provider_streaks s where s.closings >= 5
    union all
    select 'polling_timeouts', f.provider, 'warning', min(f.finished_at),
      format('%s run%s of %s ended with "Polling timeout exceeded" in the last hour.',
        count(*), case when count(*) > 1 then 's' else '' end, f.provider),
      'Look whether the provider is slow. Requeue the runs: they ask for the same pictures again. IMAGE_JOBS_POLL_TIMEOUT is how long a job may take.'
    from failed f where f.code = 'polling_timeout'
    group by f.provider
    union all
    -- Of what users did wrong nothing has to be mended, and what nobody serves has an alert of its own.
    select 'failure_rate', f.provider, 'critical', null,
      format('%s of %s runs of %s failed in the last 15 minutes, most of them with %s.', count(*),
        count(*) + coalesce(max(c.runs), 0), f.provider, coalesce(mode() within group (order by f.code), 'no code')),
      'Look at image_jobs.failures, or image-jobs list --status failed; requeue the runs when it is mended.'
    from failed f left join completed c on c.provider = f.provider
    where f.finished_at > v_now - interval '15 min' and coalesce(f.code, '') <> all (array[
      'content_policy', 'invalid_request', 'input_image_invalid', 'input_image_forbidden', 'unknown_model', 'unknown_provider',
      'model_retired', 'not_served'])
    group by f.provider
    having count(*) >= 5 and count(*) >= 0.2 * (count(*) + coalesce(max(c.runs), 0))
    union all
    -- Either daemons have seen it and claim nothing, or pictures that were paid for were lost: several, or none is stored since.
    select 'storage_failing', '', 'critical', least(closed.since, lost.since),
      case when closed.since is not null then 'Storage takes no uploads, so no run is started.'
        else format('%s picture%s could not be stored in the last 15 minutes, the last with %s.',
          lost.pictures, case when lost.pictures > 1 then 's' else '' end, lost.code) end,
      'Look whether Storage works and the bucket is there: image-jobs doctor does. Requeue failed runs: their pictures are not paid for again.'
    from (
      select min(d.storage_closed_at) as since from image_jobs.daemons d
      where d.ended_at is null and d.seen_at >= v_now - d.lease and d.storage_closed_at <= v_now - interval '10 s'
    ) closed
    cross join (
      select count(*) as pictures, min(f.finished_at) as since, max(f.finished_at) as last,
        (array_agg(f.code order by f.finished_at desc))[1] as code
      from failed f where f.code like 'storage\_%' and f.finished_at > v_now - interval '15 min'
    ) lost
    where closed.since is not null or lost.pictures >= 3
      or lost.last > coalesce((select max(c.last) from completed c), '-infinity')
    union all
    select 'base64_refused', '', 'warning', min(t.ts),
      format('%s time%s in the last hour, base64 was kept out of the database.',
        count(*), case when count(*) > 1 then 's' else '' end),
      'Look at the events "warning" of these runs: what sends files as text is to send URLs.'
    from told t where (t.data ->> 'base64')::boolean
    having count(*) > 0
    union all
    -- Until one arrives: that one was late alone is no trouble.
    select 'webhook_late', t.provider, 'warning', min(t.ts),
      format('%s webhook%s of %s did not come in time in the last hour, and none has come since.',
        count(*), case when count(*) > 1 then 's' else '' end, t.provider),
      'Run image-jobs doctor: it posts a test delivery. The runs are polled meanwhile.'
    from told t
    where t.data ->> 'webhook' = 'late'
      and t.ts > coalesce((
        select max(d.received_at) from image_jobs.webhook_deliveries d
        where d.provider in (t.provider, 'hmac') and d.received_at > v_now - interval '1 hour'), '-infinity')
    group by t.provider
    union all
    select 'oldest_wait', w.provider, 'warning', w.since + interval '10 min',
      format('A run for %s has been waiting for %s minutes.', w.provider, floor(extract(epoch from v_now - w.since) / 60)),
      'Start more daemons, or raise IMAGE_JOBS_CONCURRENCY or the limit in image_jobs.provider_limits, if the provider allows more.'
    from waiting w
    -- While something else is in the way, more daemons would wait with it.
    where w.since < v_now - interval '10 min' and not exists (
      select from image_jobs.provider_states s where s.provider = w.provider and s.model is null and s.state <> 'limited')
    union all
    select alert.name, budget.period, alert.severity, null,
      format('Of this %s''s budget of $%s for all together, $%s are used.',
        budget.period, round(budget.usd, 2), round(used.usd, 2)),
      format('Raise usd_per_%s of "all together" in image_jobs.usage_limits, or wait: the %s ends at %s UTC.', budget.period, budget.period,
        to_char(image_jobs.period_end(budget.period) at time zone 'utc', 'YYYY-MM-DD HH24:MI'))
    from image_jobs.usage_limits l
    cross join lateral (
      select b.period, b.usd from (values ('day', l.usd_per_day), ('month', l.usd_per_month)) as b (period, usd) where b.usd is not null
    ) budget
    cross join lateral image_jobs.used_together(image_jobs.period_start(budget.period)) used
    cross join (values ('budget_nearly_spent', 'warning', 0.8, 1), ('budget_spent', 'critical', 1, null)) as alert (name, severity, share, below)
    where l.applies_to = 'all together' and used.usd >= alert.share * budget.usd
      and (alert.below is null or used.usd < alert.below * budget.usd)
  )
  select f.name, f.subject, f.severity, coalesce(f.since, n.since, v_now), f.sentence, f.cure
  from found f
  left join image_jobs.alert_notices n on n.name = f.name and n.subject = f.subject and n.closed_at is null;
end
$$;

create or replace view image_jobs.alerts with (security_invoker = on) as
select a.name, a.severity, a.since, a.sentence, a.cure, a.subject
from image_jobs.current_alerts() a
order by a.severity, a.since, a.name, a.subject;
comment on view image_jobs.alerts is 'What an operator has to see to now, the worst first. subject: the provider or model it is about.';

-- Note alerts that are new, and that others have passed: one row each, however many daemons look. That there was no daemon is
-- noted by the first one after it. What may pass by itself, as in a deploy, is noted after a minute. One closes once it has been
-- away for five minutes, as of then: a provider that opens for seconds between two 429s is one piece of news.
create or replace function image_jobs.note_alerts()
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_alerts image_jobs.alerts[];
  v_first timestamptz;
  v_last timestamptz;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('image_jobs.alerts', 0)) then
    return;
  end if;
  v_alerts := array(select a from image_jobs.alerts a where a.name <> 'no_daemon');
  insert into image_jobs.alert_notices (name, subject, severity, sentence, cure, since, due_at)
  select a.name, a.subject, a.severity, a.sentence, a.cure, a.since, v_now from unnest(v_alerts) a
  where a.name <> 'provider_unserved' or a.since <= v_now - interval '1 min'
  on conflict (name, subject) where closed_at is null do nothing;
  update image_jobs.alert_notices n
  set away_since = case when n.away_since is null then v_now end
  where n.closed_at is null
    and (n.away_since is null) <> exists (select from unnest(v_alerts) a where a.name = n.name and a.subject = n.subject);
  update image_jobs.alert_notices n
  set closed_at = n.away_since, due_at = case when n.sent is null then n.due_at else v_now end
  where n.closed_at is null and n.away_since <= v_now - interval '5 min';

  v_first := (select min(d.started_at) from image_jobs.daemons d where d.ended_at is null and d.seen_at >= v_now - d.lease);
  v_last := (select max(least(d.ended_at, d.seen_at + d.lease)) from image_jobs.daemons d where d.started_at < v_first);
  if v_first - v_last >= interval '1 min' and v_first > v_now - interval '1 hour'
    and not exists (select from image_jobs.alert_notices n where n.name = 'no_daemon' and n.since = v_last)
  then
    insert into image_jobs.alert_notices (name, subject, severity, sentence, cure, since, closed_at, due_at)
    values ('no_daemon', '', 'critical', 'No daemon was running.', 'Look at the log of the last one.', v_last, v_first, v_now);
  end if;
  delete from image_jobs.alert_notices n where n.closed_at < v_now - interval '7 days';
end
$$;

-- Returns notices that are to be sent now, leased for a minute: {id, state, name, subject, severity, since, closed, sentence, cure},
-- where state is open or closed. That one has closed is sent once its opening has been. What is over for a day is not news.
create or replace function image_jobs.take_alert_notices(p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz;
begin
  perform image_jobs.note_alerts();
  v_now := image_jobs.now();
  return query
  with due as materialized (
    select n.id from image_jobs.alert_notices n
    where n.due_at <= v_now and (n.sent is null or n.sent = 'open' and n.closed_at is not null)
      and coalesce(n.closed_at, 'infinity') > v_now - interval '1 day'
    order by n.since, n.id limit p_limit
    for update skip locked
  )
  update image_jobs.alert_notices n set due_at = v_now + interval '1 min', tries = n.tries + 1
  from due where n.id = due.id
  returning jsonb_build_object('id', n.id, 'state', case when n.sent is null then 'open' else 'closed' end,
    'name', n.name, 'subject', n.subject, 'severity', n.severity, 'since', n.since, 'closed', n.closed_at,
    'sentence', n.sentence, 'cure', n.cure);
end
$$;

-- Write down that a notice was sent, or that it could not be: then it is due again after a pause that grows to 5 minutes.
create or replace function image_jobs.finish_alert_notice(p_id uuid, p_state text, p_done boolean)
returns void language sql volatile set search_path = ''
as $$
  update image_jobs.alert_notices n
  set sent = case when p_done then p_state else n.sent end,
    tries = case when p_done then 0 else n.tries end,
    due_at = image_jobs.now() + case when p_done then interval '0' else make_interval(secs => least(2 ^ least(n.tries, 9), 300)) end
  where n.id = p_id and n.sent is distinct from p_state and n.sent is distinct from 'closed'
$$;

-- The dashboard: all that an operator looks at, in one call. `image-jobs status` is drawn from it.

-- Returns how runs go, in `period` until now and at the moment; sql/README.md lists the keys. Names of models are the callers': of
-- those that are not on offer only the hundred with the most runs are told apart. Providers that nobody knows are one, '?'.
-- Nothing is sorted that can be hashed: the planner expects as many steps as calls, and would sort these by their names.
create or replace function image_jobs.dashboard(period interval default '1 hour')
returns jsonb language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set enable_sort = off set jit = off set plan_cache_mode = force_custom_plan
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_from timestamptz := v_now - dashboard.period;
  v_today timestamptz := date_trunc('day', v_now, 'UTC');
  v_ended bigint := image_jobs.claim_before(v_from);
  v_day_ago bigint := image_jobs.claim_before(least(v_from, v_now - interval '1 day'));
  -- Of the series: the least of these of which the period has at most a hundred.
  v_step interval := (
    select min(step.width) from unnest(array[
      '15 s', '1 min', '5 min', '15 min', '1 hour', '3 hours', '12 hours']::interval[]) as step (width)
    where dashboard.period <= 100 * step.width);
  v_board jsonb;
begin
  if dashboard.period is null or dashboard.period <= interval '0' or dashboard.period > interval '31 days' then
    perform image_jobs.refuse('The period of a dashboard is more than nothing, and at most 31 days.', 'The last day: interval ''1 day''.');
  end if;
  with pending as materialized (
    select coalesce(r.routed_to, r.processor) as name, count(*) as waiting, 0 as delayed, min(r.due_at) as since
    from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is not null
    group by 1
    union all
    select coalesce(r.routed_to, r.processor), count(*) filter (where r.due_at <= v_now),
      count(*) filter (where r.due_at > v_now), min(r.due_at) filter (where r.due_at <= v_now)
    from public.runs r where r.queue_state = 'pending' and r.kind = 'image_gen' and r.rank is null and r.due_at is not null
    group by 1
  ),
  running as materialized (
    select coalesce(r.routed_to, r.processor) as name, count(*) filter (where r.claimed_by is not null) as running,
      count(*) filter (where r.claimed_by is null) as parked
    from public.runs r where r.queue_state = 'running' and r.kind = 'image_gen'
    group by 1
  ),
  ended as materialized (
    select coalesce(r.routed_to, r.processor) as name, r.status, r.id, r.finished_at,
      case when r.status = 'completed' then (r.payload -> 'timings' ->> 'generateMs')::double precision end as generate_ms,
      case when r.status = 'failed' then r.payload ->> 'code' end as code
    from public.runs r
    where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
      and r.claim >= v_ended and r.finished_at > v_from
  ),
  settled as materialized (
    select e.name, count(*) filter (where e.status = 'completed') as completed, count(*) filter (where e.status = 'failed') as failed,
      count(*) filter (where e.status = 'cancelled') as cancelled
    from ended e group by 1
  ),
  spent as materialized (
    select c.provider, c.model, date_bin(v_step, c.opened_at, v_today) as step,
      sum(c.cost) filter (where c.opened_at > v_from) as usd,
      sum(c.estimate) filter (where c.state = 'unknown' and c.opened_at > v_from) as possible_usd,
      sum(c.cost) filter (where c.opened_at >= v_today) as usd_today,
      sum(c.estimate) filter (where c.state = 'unknown' and c.opened_at >= v_today) as possible_usd_today
    from image_jobs.calls c
    where c.opened_at >= least(v_from, v_today) and c.state in ('charged', 'unknown')
    group by 1, 2, 3
  ),
  calls as materialized (
    select s.provider, s.model, sum(s.usd) as usd, sum(s.possible_usd) as possible_usd,
      sum(s.usd_today) as usd_today, sum(s.possible_usd_today) as possible_usd_today
    from spent s group by 1, 2
  ),
  series as materialized (
    select step.at, coalesce(r.completed, 0) as completed, coalesce(r.failed, 0) as failed,
      r.percentiles, coalesce(c.usd, 0) as usd
    from generate_series(date_bin(v_step, v_from, v_today), v_now, v_step) as step (at)
    left join (
      select date_bin(v_step, e.finished_at, v_today) as at, count(*) filter (where e.status = 'completed') as completed,
        count(*) filter (where e.status = 'failed') as failed,
        percentile_cont(array[0.5, 0.95]) within group (order by e.generate_ms) as percentiles
      from ended e group by 1
    ) r on r.at = step.at
    left join (select s.step as at, sum(s.usd) as usd from spent s group by 1) c on c.at = step.at
  ),
  named as materialized (
    select counts.name,
      -- As in lanes: names of providers are the callers', too.
      coalesce((select p.name from image_jobs.providers p where p.name = split_part(counts.name, ':', 1)), '?') as provider,
      case when row_number() over (order by counts.runs desc) > 100 then '…' else image_jobs.drawing_model(counts.name) end as model
    from (
      select each.name, sum(each.runs) as runs
      from (
        select p.name, p.waiting + p.delayed as runs from pending p
        union all select r.name, r.running + r.parked from running r
        union all select s.name, s.completed + s.failed + s.cancelled from settled s
      ) each
      group by 1
    ) counts
  ),
  timed as materialized (
    select n.provider, n.model, percentile_cont(array[0.5, 0.95]) within group (order by e.generate_ms) as percentiles
    from ended e join named n on n.name = e.name where e.generate_ms is not null
    group by 1, 2
  ),
  living as materialized (
    select d.slots, d.providers, d.draining from image_jobs.daemons d
    where d.ended_at is null and d.seen_at >= v_now - d.lease
  ),
  status as materialized (
    select s.provider, s.model, s.state, s.since, s.until, s.sentence from image_jobs.provider_status() s
  ),
  models as materialized (
    select sums.*, coalesce(own.per_minute, common.per_minute) as per_minute, coalesce(own.max_running, common.max_running) as max_running
    from (
      select each.provider, each.model, sum(each.waiting) as waiting, sum(each.delayed) as delayed, min(each.since) as since,
        sum(each.running) as running, sum(each.parked) as parked, sum(each.completed) as completed, sum(each.failed) as failed,
        sum(each.cancelled) as cancelled, sum(each.usd) as usd, sum(each.possible_usd) as possible_usd
      from (
        select n.provider, n.model, p.waiting, p.delayed, p.since, null::bigint as running, null::bigint as parked,
          null::bigint as completed, null::bigint as failed, null::bigint as cancelled, null::numeric as usd, null::numeric as possible_usd
        from pending p join named n on n.name = p.name
        union all
        select n.provider, n.model, null, null, null, r.running, r.parked, null, null, null, null, null
        from running r join named n on n.name = r.name
        union all
        select n.provider, n.model, null, null, null, null, null, s.completed, s.failed, s.cancelled, null, null
        from settled s join named n on n.name = s.name
        union all
        select c.provider, c.model, null, null, null, null, null, null, null, null, c.usd, c.possible_usd from calls c
        where coalesce(c.usd, c.possible_usd) is not null
        union all
        -- A closing is told, also where nothing waits.
        select s.provider, s.model, null, null, null, null, null, null, null, null, null, null
        from status s where s.state not in ('open', 'unserved', 'storage')
      ) each
      group by 1, 2
    ) sums
    left join image_jobs.provider_limits common on common.provider = sums.provider and common.model is null
    left join image_jobs.provider_limits own on own.provider = sums.provider and own.model = sums.model
  ),
  providers as materialized (
    select m.provider, sum(m.waiting) as waiting, sum(m.delayed) as delayed, min(m.since) as since, sum(m.running) as running,
      sum(m.parked) as parked, sum(m.completed) as completed, sum(m.failed) as failed, sum(m.cancelled) as cancelled,
      sum(m.usd) as usd, sum(m.possible_usd) as possible_usd
    from models m group by 1
  ),
  told as materialized (
    select e.payload -> 'data' as data, coalesce(split_part(coalesce(r.routed_to, r.processor), ':', 1), '') as provider
    from public.run_events e join public.runs r on r.id = e.run_id
    where e.run_kind = 'image_gen' and e.kind = 'error' and e.payload ->> 'event' in ('incident', 'warning') and e.ts > v_from
  )
  select jsonb_build_object(
    'at', v_now,
    'from', v_from,
    'alerts', (
      select coalesce(jsonb_agg(to_jsonb(a) order by a.severity, a.since, a.name, a.subject), '[]') from image_jobs.alerts a),
    'totals', (
      select jsonb_build_object(
        'waiting', coalesce(sum(p.waiting), 0), 'delayed', coalesce(sum(p.delayed), 0),
        'oldest_wait', extract(epoch from v_now - min(p.since)),
        'running', coalesce(sum(p.running), 0), 'parked', coalesce(sum(p.parked), 0),
        'slots', (select coalesce(sum(l.slots), 0) from living l), 'daemons', (select count(*) from living),
        'completed', coalesce(sum(p.completed), 0), 'failed', coalesce(sum(p.failed), 0), 'cancelled', coalesce(sum(p.cancelled), 0),
        'usd', coalesce(sum(p.usd), 0), 'possible_usd', coalesce(sum(p.possible_usd), 0),
        'usd_today', (select coalesce(sum(c.usd_today), 0) from calls c),
        'possible_usd_today', (select coalesce(sum(c.possible_usd_today), 0) from calls c))
      from providers p),
    'step', extract(epoch from v_step),
    'series', (
      select jsonb_agg(jsonb_build_object('at', s.at, 'completed', s.completed, 'failed', s.failed,
        'generate_p50_ms', round(s.percentiles[1]), 'generate_p95_ms', round(s.percentiles[2]), 'usd', s.usd) order by s.at)
      from series s),
    'queue', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'provider', p.provider, 'pending', coalesce(p.waiting, 0), 'delayed', coalesce(p.delayed, 0),
        'running', coalesce(p.running, 0), 'parked', coalesce(p.parked, 0), 'completed', coalesce(p.completed, 0),
        'failed', coalesce(p.failed, 0), 'cancelled', coalesce(p.cancelled, 0),
        'oldest_wait', extract(epoch from v_now - p.since), 'usd', coalesce(p.usd, 0),
        'per_minute', l.per_minute, 'max_running', l.max_running, 'paused', coalesce(l.paused, false),
        'blocked_until', case when s.state = 'blocked' then s.until end,
        'state', coalesce(s.state, 'unserved'), 'since', s.since, 'until', s.until, 'sentence', s.sentence
      ) order by p.provider), '[]')
      from providers p
      left join image_jobs.provider_limits l on l.provider = p.provider and l.model is null
      left join status s on s.provider = p.provider and s.model is null),
    'models', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'provider', m.provider, 'model', m.model, 'waiting', coalesce(m.waiting, 0), 'delayed', coalesce(m.delayed, 0),
        'oldest_wait', extract(epoch from v_now - m.since), 'running', coalesce(m.running, 0), 'parked', coalesce(m.parked, 0),
        'per_minute', m.per_minute, 'max_running', m.max_running,
        'completed', coalesce(m.completed, 0), 'failed', coalesce(m.failed, 0), 'cancelled', coalesce(m.cancelled, 0),
        'failure_share', round(m.failed / nullif(m.completed + m.failed, 0), 4),
        'generate_p50_ms', round(t.percentiles[1]), 'generate_p95_ms', round(t.percentiles[2]),
        'usd', coalesce(m.usd, 0), 'possible_usd', coalesce(m.possible_usd, 0),
        'state', coalesce(s.state, 'unserved'), 'since', s.since, 'until', s.until, 'sentence', s.sentence
      ) order by m.provider, m.model), '[]')
      from models m
      left join timed t on t.provider = m.provider and t.model = m.model
      left join lateral (
        select own.* from status own
        where own.provider = m.provider and (own.model = m.model or own.model is null)
        order by own.model nulls last limit 1
      ) s on true
      where m.model is not null),
    'failures_by_code', (
      select coalesce(jsonb_agg(jsonb_build_object(
        'code', f.code, 'count', f.count, 'last', f.last, 'providers', f.providers, 'example', f.example,
        'error', r.payload ->> 'error', 'hint', r.payload ->> 'hint') order by f.count desc, f.code), '[]')
      from (
        select e.code, count(*) as count, max(e.finished_at) as last, (array_agg(e.id order by e.finished_at desc))[1] as example,
          array_agg(distinct n.provider) as providers
        from ended e join named n on n.name = e.name where e.status = 'failed' group by 1 order by 2 desc limit 50
      ) f
      join public.runs r on r.id = f.example),
    'storage', (
      select jsonb_build_object('stored', uploads.stored, 'failed', uploads.failed,
        'success_rate', round(uploads.stored / nullif(uploads.stored + uploads.failed, 0), 4))
      from (
        select (select coalesce(sum(p.completed), 0) from providers p) as stored, count(*)::numeric as failed
        from ended e where e.code like 'storage\_%'
      ) uploads),
    'base64_refused', (select count(*) from told t where (t.data ->> 'base64')::boolean),
    'webhooks', (
      select coalesce(jsonb_agg(jsonb_build_object('provider', w.provider, 'accepted', w.accepted, 'duplicates', w.duplicates,
        'refused', w.refused, 'late', w.late) order by w.provider), '[]')
      from (
        select each.provider, sum(each.accepted) as accepted, sum(each.duplicates) as duplicates, sum(each.refused) as refused,
          sum(each.late) as late
        from (
          select c.provider, c.accepted, c.duplicates, c.refused, 0 as late from image_jobs.webhook_counters c
          where c.minute > v_from - interval '1 min'
          union all
          select t.provider, 0, 0, 0, 1 from told t where t.data ->> 'webhook' = 'late'
        ) each
        group by 1
      ) w),
    'cancellations', (
      select jsonb_build_object('waiting', count(*), 'tried', count(*) filter (where c.tries > 0),
        'oldest_wait', extract(epoch from v_now - min(c.requested_at)))
      from image_jobs.cancellations c),
    'daemons', (
      select coalesce(jsonb_agg(jsonb_build_object('id', d.id, 'name', d.name, 'state', d.state, 'version', d.version,
        'in_flight', d.in_flight, 'slots', d.slots, 'providers', d.providers, 'started_at', d.started_at, 'seen_at', d.seen_at,
        'last_beat', extract(epoch from v_now - d.seen_at)) order by d.started_at), '[]')
      from image_jobs.daemon_status d where d.state in ('alive', 'draining', 'silent')),
    'failures', (
      select coalesce(jsonb_agg(jsonb_build_object('id', f.id, 'workflow_id', f.subject_id, 'finished_at', f.finished_at,
        'processor', f.processor, 'attempt', f.attempt, 'code', f.payload ->> 'code', 'error', f.payload ->> 'error',
        'hint', f.payload ->> 'hint') order by f.finished_at desc), '[]')
      from (
        -- By claim, which the index has; that is nearly the sequence in which they ended.
        select r.* from public.runs r
        where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
          and r.claim >= v_day_ago and r.status = 'failed' and r.finished_at is not null
        order by r.claim desc limit 10
      ) f)
  ) into v_board;
  return v_board;
end
$$;

-- Functions for clients: start_image_job, cancel_run, requeue_run. The public ones run with the caller's rights and RLS;
-- those that must change runs go through a function in image_jobs that checks membership first.

-- Cancel a run that is pending or running; a finished one is left as it is. For members and operators.
create or replace function image_jobs.cancel_run(p_run_id varchar)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
begin
  select r.* into v_run from public.runs r where r.id = p_run_id and (r.kind = 'image_gen') is true for update;
  if not found or not (image_jobs.is_operator() or image_jobs.can_access_workflow(v_run.subject_id)) then
    raise exception using errcode = 'PT404', message = 'There is no such run.', hint = 'Check the id, and that you are a member of its workflow.';
  end if;
  if v_run.status in ('pending', 'running') then
    update public.runs r set status = 'cancelled' where r.id = p_run_id;
  end if;
end
$$;

-- Requeue a failed or cancelled run. For members; operators may requeue any run.
create or replace function image_jobs.requeue_run(p_run_id varchar)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
  v_operator boolean := image_jobs.is_operator();
begin
  -- Limits before the row, as inserts have it: of the caller, as whose the run counts from now on. Whatever the status is: it may be
  -- another one when the row is locked.
  if not v_operator then
    select r.subject_id, image_jobs.dearest_cost(
      r.processor || image_jobs.remaining_fallbacks(r.metadata, r.processor, null), r.metadata -> 'promptSpec') as usd
    into v_run from public.runs r
    where r.id = p_run_id and (r.kind = 'image_gen') is true and image_jobs.can_access_workflow(r.subject_id);
    if found then
      perform image_jobs.check_usage(
        array_remove(array[image_jobs.current_user_id()], null), array[v_run.subject_id], 1, v_run.usd);
    end if;
  end if;
  select r.* into v_run from public.runs r where r.id = p_run_id and (r.kind = 'image_gen') is true for update;
  if not found or not (v_operator or image_jobs.can_access_workflow(v_run.subject_id)) then
    raise exception using errcode = 'PT404', message = 'There is no such run.', hint = 'Check the id, and that you are a member of its workflow.';
  end if;
  if not v_operator and v_run.status not in ('failed', 'cancelled') then
    perform image_jobs.refuse(format('A run that is %s cannot be requeued.', v_run.status),
      case v_run.status when 'completed' then 'Insert a new run to make another image.'
        else 'It is on its way; cancel it first to start anew.' end);
  end if;
  update public.runs r set status = 'pending' where r.id = p_run_id;
end
$$;

-- Returns a run as an ImageJobRecord, if the caller may see it.
create or replace function image_jobs.image_job_record(p_run_id varchar)
returns jsonb language sql stable set search_path = ''
as $$
  select to_jsonb(j) from public.image_jobs j where j."jobId" = p_run_id
$$;

create or replace function public.cancel_run(run_id varchar)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.cancel_run(run_id);
  return image_jobs.image_job_record(run_id);
end
$$;
comment on function public.cancel_run(varchar) is 'Image Job Orchestrator: stops a run; returns its ImageJobRecord. A finished run is left as it is.';

create or replace function public.requeue_run(run_id varchar)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.requeue_run(run_id);
  return image_jobs.image_job_record(run_id);
end
$$;
comment on function public.requeue_run(varchar) is
  'Image Job Orchestrator: puts a failed or cancelled run in line again; returns its ImageJobRecord.';

-- StartImageJobRequest in, ImageJobRecord out. metadata is merged at the top level, the named fields win.
-- The same idempotency key (of the same user, in the same workflow) returns the first run.
create or replace function public.start_image_job(request jsonb)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_metadata jsonb;
  v_workflow uuid;
  v_id varchar;
begin
  if jsonb_typeof(request) is distinct from 'object' then
    perform image_jobs.refuse('The request must be an object.', 'Send {nodeId, workflowId, promptSpec, provider, model}.');
  end if;
  if coalesce(jsonb_typeof(request -> 'metadata'), 'null') not in ('object', 'null') then
    perform image_jobs.refuse('metadata must be an object.', 'Leave it out if there is none.');
  end if;
  if coalesce(request ->> 'nodeId', '') = '' then
    perform image_jobs.refuse('nodeId is missing.', 'Name the canvas node that shall show the image.');
  end if;
  if coalesce(request ->> 'provider', '') = '' or coalesce(request ->> 'model', '') = '' then
    perform image_jobs.refuse('provider and model are missing.', 'The view image_models lists what is on offer.');
  end if;
  if request ->> 'workflowId' !~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' or request ->> 'workflowId' is null then
    perform image_jobs.refuse('workflowId must be a uuid.', 'For example crypto.randomUUID().');
  end if;
  v_workflow := request ->> 'workflowId';
  v_metadata := coalesce(nullif(request -> 'metadata', 'null'), '{}')
    || coalesce((
      select jsonb_object_agg(named.key, named.value) from jsonb_each(request) named
      where named.key in ('nodeId', 'webhookUrl', 'idempotencyKey', 'mode', 'fallback', 'fallbackOnRefusal') and named.value <> 'null'
    ), '{}')
    || case when request ? 'promptSpec' then jsonb_build_object('promptSpec', request -> 'promptSpec') else '{}' end;

  insert into public.runs (kind, subject_id, status, processor, metadata)
  values ('image_gen', v_workflow, 'pending', (request ->> 'provider') || ':' || (request ->> 'model'), v_metadata)
  on conflict (created_by, subject_id, (metadata ->> 'idempotencyKey'))
    where kind = 'image_gen' and ticket is not null and metadata ->> 'idempotencyKey' is not null
    do nothing
  returning id into v_id;
  if v_id is null then
    select r.id into v_id from public.runs r
    where r.kind = 'image_gen' and r.subject_id = v_workflow and r.ticket is not null
      and r.created_by is not distinct from image_jobs.current_user_id()
      and r.metadata ->> 'idempotencyKey' = v_metadata ->> 'idempotencyKey';
  end if;
  return image_jobs.image_job_record(v_id);
end
$$;
comment on function public.start_image_job(jsonb) is 'Image Job Orchestrator: StartImageJobRequest in, ImageJobRecord out.';

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

-- Signatures of webhooks: verified before anything else is read.

create table if not exists image_jobs.webhook_secrets (
  provider text not null,
  key bytea not null,
  primary key (provider, key),
  -- With an empty key, forged deliveries would verify.
  constraint webhook_secrets_are_long check (octet_length(key) >= 16)
);
comment on table image_jobs.webhook_secrets is 'The keys that deliveries may be signed with; several while one is replaced.';

-- Returns the HMAC-SHA256 (RFC 2104), by built-in functions alone: pgcrypto is not everywhere.
create or replace function image_jobs.hmac_sha256(p_key bytea, p_message bytea)
returns bytea language plpgsql immutable parallel safe strict set search_path = ''
as $$
declare
  v_key bytea := case when octet_length(p_key) > 64 then sha256(p_key) else p_key end;
  v_inner bytea;
  v_outer bytea;
begin
  v_key := v_key || decode(repeat('00', 64 - octet_length(v_key)), 'hex');
  v_inner := v_key;
  v_outer := v_key;
  for i in 0..63 loop
    v_inner := set_byte(v_inner, i, get_byte(v_key, i) # 54);
    v_outer := set_byte(v_outer, i, get_byte(v_key, i) # 92);
  end loop;
  return sha256(v_outer || sha256(v_inner || p_message));
end
$$;

-- Returns the key that a secret stands for. Standard Webhooks: `whsec_` and base64, or any text as it stands; the other schemes
-- take every text as it stands. Null if it cannot be read.
create or replace function image_jobs.webhook_key(p_provider text, p_secret text)
returns bytea language plpgsql immutable parallel safe set search_path = ''
as $$
begin
  if p_provider not in ('hmac', 'midjourney') and p_secret like 'whsec\_%' then
    return decode(substr(p_secret, 7), 'base64');
  end if;
  return convert_to(p_secret, 'UTF8');
exception when data_exception then
  return null;
end
$$;

-- Replace the secrets of the providers that are named: {"openai": ["whsec_…", …], …}. Others keep theirs.
create or replace function image_jobs.set_webhook_secrets(p_secrets jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if jsonb_typeof(p_secrets) is distinct from 'object' then
    perform image_jobs.refuse('The webhook secrets must be an object of arrays.', 'Write them like {"openai": ["whsec_…"]}.');
  end if;
  if exists (
    select from jsonb_each(p_secrets) p
    cross join lateral jsonb_array_elements_text(case jsonb_typeof(p.value) when 'array' then p.value else '[]' end) s
    where s.value is not null and image_jobs.webhook_key(p.key, s.value) is null)
  then
    perform image_jobs.refuse('A webhook secret is no base64 behind whsec_.',
      'Copy it again from the provider, with all that it ends in.');
  end if;
  if exists (
    select from jsonb_each(p_secrets) p
    where jsonb_typeof(p.value) <> 'array' or p.value = '[]' or exists (
      select from jsonb_array_elements_text(p.value) s
      where coalesce(octet_length(image_jobs.webhook_key(p.key, s.value)), 0) < 16)
  ) then
    perform image_jobs.refuse('A webhook secret is empty or shorter than 16 bytes.',
      'Use the one the provider gave you, or make one: openssl rand -hex 32.');
  end if;
  delete from image_jobs.webhook_secrets w where p_secrets ? w.provider;
  insert into image_jobs.webhook_secrets (provider, key)
  select p.key, image_jobs.webhook_key(p.key, s.value)
  from jsonb_each(p_secrets) p cross join lateral jsonb_array_elements_text(p.value) s
  on conflict do nothing;
end
$$;

-- Returns a text as JSON; of one that jsonb cannot hold (\u0000, half a surrogate pair, a number too large) only what a delivery is
-- about, if it has at most p_longest bytes: that costs a hundred times as much. Null if it is none.
create or replace function image_jobs.json_or_null(p_text text, p_longest integer)
returns jsonb language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_text text := p_text;
  v_json json;
begin
  begin
    return p_text::jsonb;
  exception when data_exception or statement_too_complex or program_limit_exceeded then
    if octet_length(p_text) > p_longest then
      return null;
    end if;
  end;
  -- Twice: of two escapes in a row the first pass leaves the second. Whole pairs go, too: no id has one.
  for pass in 1..2 loop
    v_text := regexp_replace(
      v_text, '(^|[^\\])((?:\\\\)*)\\u(?:0000|[dD][89a-fA-F][0-9a-fA-F][0-9a-fA-F])', '\1\2\\ufffd', 'g');
  end loop;
  v_json := v_text::json;
  return jsonb_build_object('id', v_json ->> 'id', 'job_id', v_json ->> 'job_id', 'type', v_json ->> 'type',
    'status', v_json ->> 'status', 'state', v_json ->> 'state',
    'data', jsonb_build_object('id', v_json #>> '{data,id}', 'job_id', v_json #>> '{data,job_id}'));
exception when data_exception or statement_too_complex or program_limit_exceeded then
  return null;
end
$$;

-- Returns whether one of the provider's secrets signed p_message and made one of p_signatures, of which there are at most 10.
-- Both sides are digested before they are compared, so the time it takes says nothing about the signature. The HMAC is made
-- once for each secret: who sends it is not known yet, so it must not cost more for more signatures.
create or replace function image_jobs.is_signed(
  p_provider text, p_message text, p_signatures text[], p_prefix text, p_encoding text)
returns boolean language sql stable set search_path = ''
as $$
  with right_ones as materialized (
    select sha256(convert_to(
      p_prefix || encode(image_jobs.hmac_sha256(w.key, convert_to(p_message, 'UTF8')), p_encoding), 'UTF8')) as digest
    from image_jobs.webhook_secrets w
    where w.provider = p_provider and cardinality(p_signatures) <= 10
  )
  select coalesce(bool_or(r.digest = sha256(convert_to(given.signature, 'UTF8'))), false)
  from right_ones r cross join unnest(p_signatures) as given (signature)
$$;

-- Returns the id of a delivery if its signature is right and fresh; null if not. Three schemes:
--   hmac        webhook-signature is the hex HMAC-SHA256 of the body; the same body again is the same delivery
--   midjourney  unsigned callbacks that echo a value of ours: state is '<run id>:<ticket>.<hex HMAC-SHA256 of that>'
--   all others  Standard Webhooks: webhook-id, webhook-timestamp, webhook-signature 'v1,<base64> v1,<base64> …'
create or replace function image_jobs.verified_delivery(p_provider text, p_headers jsonb, p_body text, p_json jsonb)
returns text language plpgsql volatile set search_path = ''
as $$
declare
  v_signature text := p_headers ->> 'webhook-signature';
  v_id text := p_headers ->> 'webhook-id';
  v_at text := p_headers ->> 'webhook-timestamp';
  v_state text := p_json ->> 'state';
begin
  case p_provider
    when 'hmac' then
      if image_jobs.is_signed(p_provider, p_body, array[lower(v_signature)], '', 'hex') then
        return encode(sha256(convert_to(p_body, 'UTF8')), 'hex');
      end if;
    when 'midjourney' then
      if image_jobs.is_signed(p_provider, split_part(v_state, '.', 1), array[lower(split_part(v_state, '.', 2))], '', 'hex')
        and v_state = split_part(v_state, '.', 1) || '.' || split_part(v_state, '.', 2)
      then
        return encode(sha256(convert_to(p_body, 'UTF8')), 'hex');
      end if;
    else
      if length(v_id) between 1 and 200 and length(v_signature) <= 2000 and v_at ~ '^[0-9]{1,12}$'
        and abs(extract(epoch from image_jobs.now()) - v_at::numeric) <= 300
        and image_jobs.is_signed(
          p_provider, v_id || '.' || v_at || '.' || p_body, string_to_array(v_signature, ' '), 'v1,', 'base64')
      then
        return v_id;
      end if;
  end case;
  return null;
end
$$;

-- Webhooks: a provider posts to the project's own REST endpoint, and the database is the receiver.
--
-- A delivery never settles a run. It only makes the run's next check due now; the check that follows polls the provider.
-- So a delivery that is duplicate, late, early, out of sequence or contradicting does no harm.

create table if not exists image_jobs.webhook_deliveries (
  provider text not null,
  delivery_id text not null,
  provider_job_id text,
  run_id varchar,
  type text,
  body text,
  received_at timestamptz not null,
  closed_at timestamptz,
  ticket bigint,
  ask_at timestamptz,
  state text,
  primary key (provider, delivery_id)
);
comment on table image_jobs.webhook_deliveries is 'The inbox: verified deliveries, each once. Kept for a week.';
comment on column image_jobs.webhook_deliveries.provider_job_id is 'The provider job it is about.';
comment on column image_jobs.webhook_deliveries.run_id is 'The run it names, or whose provider job it is about, once known.';
comment on column image_jobs.webhook_deliveries.body is
  'As received, byte for byte; null if it has base64 in it, or is of midjourney, which does not sign it, and larger than 16 KiB.';
comment on column image_jobs.webhook_deliveries.closed_at is 'When it was matched, or given up. Open ones wait an hour for their run.';
comment on column image_jobs.webhook_deliveries.ticket is 'Of the run that the provider job was made for, where the provider had to be asked.';
comment on column image_jobs.webhook_deliveries.ask_at is
  'Not before then is the provider asked whose job it is, or the run looked at again. Null: not asked yet.';
comment on column image_jobs.webhook_deliveries.state is 'Of midjourney: what the signature is of; not of the body.';
create index if not exists webhook_deliveries_of_a_state on image_jobs.webhook_deliveries (state, received_at) where state is not null;
create index if not exists webhook_deliveries_open on image_jobs.webhook_deliveries (provider_job_id) where closed_at is null;
create index if not exists webhook_deliveries_received on image_jobs.webhook_deliveries (received_at);

create table if not exists image_jobs.webhook_counters (
  provider text not null,
  minute timestamptz not null,
  accepted bigint not null default 0,
  duplicates bigint not null default 0,
  refused bigint not null default 0,
  slot bigint not null default 0,
  told bigint[] not null default '{0,0,0}',
  primary key (provider, minute, slot)
);
comment on table image_jobs.webhook_counters is 'All that is kept of a bad call: a row for each would let anyone fill the disk.';
comment on column image_jobs.webhook_counters.told is 'What of accepted, duplicates and refused the daemons'' metrics have counted.';
comment on column image_jobs.webhook_counters.slot is '0 counts good calls, 1 to 8 bad ones: sum them up.';

-- On large tables `image-jobs migrate` makes these itself, afterwards and concurrently (daemon/indexes.py).
if current_setting('image_jobs.indexes', true) is distinct from 'later' then
-- Finds the run whose provider job a delivery is about.
create index if not exists runs_provider_job on public.runs (provider_job_id)
  where provider_job_id is not null;
end if;

-- Match open deliveries to their runs: those of one provider job, or all (null), which the daemons' sweeps do. A locked
-- run is left for the next sweep. A held run is left to the park that follows: only then it can be checked again.
create or replace function image_jobs.match_deliveries(p_provider_job_id text)
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_aside varchar[] := image_jobs.runs_set_aside();
  v_matched integer := 0;
  v_delivery record;
begin
  perform set_config('image_jobs.writer', 'daemon', true);
  for v_delivery in
    select d.provider, d.delivery_id, d.type, d.run_id as known, d.provider_job_id,
      r.id as run_id, r.status, r.claimed_by, r.ticket, r.payload ->> 'code' as code
    from image_jobs.webhook_deliveries d
    join public.runs r on r.kind = 'image_gen' and r.ticket is not null and r.provider_job_id = d.provider_job_id
    where d.closed_at is null and d.received_at > v_now - interval '1 hour'
      and (p_provider_job_id is null or d.provider_job_id = p_provider_job_id)
      and d.provider in ('hmac', split_part(coalesce(r.routed_to, r.processor), ':', 1))
      and not r.id = any (v_aside)
    order by r.id
    for update of r skip locked
  loop
    begin
      if v_delivery.known is null then
        perform image_jobs.record_delivery(v_delivery.run_id, v_delivery.provider, v_delivery.delivery_id, v_delivery.type);
      end if;
      update image_jobs.webhook_deliveries d
      set run_id = v_delivery.run_id,
        closed_at = case when v_delivery.status <> 'running' or v_delivery.claimed_by is null then v_now end
      where d.provider = v_delivery.provider and d.delivery_id = v_delivery.delivery_id;
      if v_delivery.status = 'running' and v_delivery.claimed_by is null then
        update public.runs r set due_at = least(r.due_at, v_now), webhook = 'came'
        where r.id = v_delivery.run_id and (r.due_at > v_now or r.webhook = 'awaited');
      elsif v_delivery.status = 'failed' and v_delivery.code = 'polling_timeout' then
        -- Once, however often it is delivered.
        perform image_jobs.write_events(array[row(
          md5('late webhook ' || v_delivery.run_id || ' ' || v_delivery.ticket)::uuid, v_delivery.run_id, 'log', jsonb_build_object('event', 'late_webhook',
            'message', 'A webhook of the order came after it had been given up: its image may be there now.',
            'data', jsonb_build_object('providerJobId', v_delivery.provider_job_id,
              'hint', 'Requeue the run: it asks for the same order, and nothing is ordered anew.')))::image_jobs.event]);
      end if;
      v_matched := v_matched + 1;
    exception when others or query_canceled or assert_failure then
      perform image_jobs.set_run_aside(v_delivery.run_id, sqlstate, sqlerrm);
    end;
  end loop;
  perform set_config('image_jobs.writer', v_writer, true);
  return v_matched;
end
$$;

-- Record a receipt among a run's events, once. Nothing of the body: it may hold anything.
create or replace function image_jobs.record_delivery(p_run varchar, p_provider text, p_delivery text, p_type text)
returns void language sql volatile set search_path = ''
as $$
  select image_jobs.write_events(array[row(
    md5('delivery ' || p_run || ' ' || p_provider || ' ' || p_delivery)::uuid, p_run, 'webhook', jsonb_strip_nulls(jsonb_build_object('event', 'webhook',
    'message', 'A webhook came from the provider.',
    'data', jsonb_build_object('provider', p_provider, 'type', p_type,
      'delivery', case when not image_jobs.has_base64(to_jsonb(p_delivery)) then p_delivery end))))::image_jobs.event])
$$;

-- Make the next check due at once if a delivery came before the provider job was saved, or while it was being checked. Called by
-- the guard of runs (31_guard_runs.sql).
create or replace function image_jobs.consume_deliveries(p_run public.runs)
returns public.runs language plpgsql volatile set search_path = ''
as $$
declare
  v_delivery record;
begin
  for v_delivery in
    select d.provider, d.delivery_id, d.type, d.run_id from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.provider_job_id = p_run.provider_job_id
      and d.received_at > image_jobs.now() - interval '1 hour'
      and d.provider in ('hmac', split_part(coalesce(p_run.routed_to, p_run.processor), ':', 1))
    for update skip locked
  loop
    if v_delivery.run_id is null then
      perform image_jobs.record_delivery(p_run.id, v_delivery.provider, v_delivery.delivery_id, v_delivery.type);
    end if;
    update image_jobs.webhook_deliveries d set run_id = p_run.id, closed_at = image_jobs.now()
    where d.provider = v_delivery.provider and d.delivery_id = v_delivery.delivery_id;
    p_run.due_at := image_jobs.now();
    p_run.webhook := 'came';
  end loop;
  return p_run;
end
$$;

-- Count a call. With a minute's rows there is always something to conflict with, so these are few. Good calls never wait
-- for bad ones: a flood of those queues for rows of its own.
create or replace function image_jobs.count_webhook(p_provider text, p_accepted integer, p_duplicates integer, p_refused integer)
returns void language sql volatile set search_path = ''
as $$
  insert into image_jobs.webhook_counters as c (provider, minute, accepted, duplicates, refused, slot)
  values (p_provider, date_trunc('minute', image_jobs.now()), p_accepted, p_duplicates, p_refused,
    case when p_refused > 0 then 1 + pg_backend_pid() % 8 else 0 end)
  on conflict (provider, minute, slot) do update
  set accepted = c.accepted + excluded.accepted, duplicates = c.duplicates + excluded.duplicates,
    refused = c.refused + excluded.refused
$$;

-- Receive one delivery. Never raises, since that would roll the counter back: a refusal is the response's status.
create or replace function image_jobs.receive_webhook(p_provider text, p_headers jsonb, p_body text)
returns jsonb language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_provider text := left(coalesce(p_provider, ''), 50);
  v_has_secret boolean := exists (select from image_jobs.webhook_secrets w where w.provider = v_provider);
  -- An Edge Function passes on whatever it was called with: a counter for each name would let anyone fill the disk.
  v_counted text := case
    when v_has_secret or v_provider in ('openai', 'midjourney', 'hmac')
      or exists (select from image_jobs.models m where m.provider = v_provider) then v_provider
    else 'unknown' end;
  v_headers jsonb := '{}';
  v_json jsonb;
  v_id text;
  v_state text;
  v_replaces boolean := false;
  v_job text;
  v_named text;
  v_run record;
begin
  select null::varchar as id, null::text as provider_job_id, false as ended into v_run;
  if octet_length(p_body) > 1048576 then
    perform image_jobs.count_webhook(v_counted, 0, 0, 1);
    perform set_config('response.status', '413', true);
    return jsonb_build_object('code', 'PT413', 'message', 'A delivery has at most 1 MiB.');
  end if;
  if v_has_secret then
    if jsonb_typeof(p_headers) = 'object' then
      select coalesce(jsonb_object_agg(lower(h.key), h.value), '{}') into v_headers from jsonb_each_text(p_headers) h;
    end if;
    -- Anybody may have sent it, so what is read before it is verified must cost little.
    if v_provider = 'midjourney' then
      v_json := image_jobs.json_or_null(p_body, 16384);
    end if;
    v_id := image_jobs.verified_delivery(v_provider, v_headers, p_body, v_json);
    if v_id is not null then
      v_json := coalesce(v_json, image_jobs.json_or_null(p_body, 1048576));
    end if;
  end if;
  if v_id is null then
    perform image_jobs.count_webhook(v_counted, 0, 0, 1);
    perform set_config('response.status', '401', true);
    return jsonb_build_object('code', 'PT401', 'message', 'The signature is missing, wrong or stale.');
  end if;

  -- The provider's id of its job, also under job_id; in the hex scheme job_id may name the run instead.
  v_named := nullif(coalesce(v_json #>> '{data,job_id}', v_json ->> 'job_id'), '');
  if v_provider = 'hmac' and v_named is not null then
    select r.id, r.provider_job_id, r.status in ('completed', 'failed', 'cancelled') as ended into v_run
    from public.runs r where (r.kind = 'image_gen') is true and r.ticket is not null and r.id = v_named;
  end if;
  v_job := nullif(coalesce(v_json #>> '{data,id}', v_json ->> 'id', v_run.provider_job_id, v_named), '');
  -- Who has seen a state may send any body with it: it has twenty places, then each new body takes that of the oldest.
  if v_provider = 'midjourney' then
    v_state := split_part(v_json ->> 'state', '.', 1);
    if not exists (select from image_jobs.webhook_deliveries d where d.provider = v_provider and d.delivery_id = v_id)
      and (select count(*) from image_jobs.webhook_deliveries d where d.state = v_state) >= 20
    then
      select d.delivery_id, true into v_id, v_replaces
      from image_jobs.webhook_deliveries d where d.state = v_state order by d.received_at limit 1;
    end if;
  end if;
  insert into image_jobs.webhook_deliveries as d (provider, delivery_id, provider_job_id, type, body, received_at, state)
  values (v_provider, v_id, case when length(v_job) <= 500 then v_job end,
    case when not image_jobs.has_base64(v_json) then left(coalesce(v_json ->> 'type', v_json ->> 'status'), 100) end,
    case when not (v_provider = 'midjourney' and octet_length(p_body) > 16384 or image_jobs.has_base64(to_jsonb(p_body))) then p_body end,
    image_jobs.now(), v_state)
  on conflict (provider, delivery_id) do update
  set provider_job_id = excluded.provider_job_id, type = excluded.type, body = excluded.body,
    received_at = excluded.received_at, run_id = null, closed_at = null, ticket = null, ask_at = null
  where v_replaces;
  if not found then
    perform image_jobs.count_webhook(v_provider, 0, 1, 0);
    return jsonb_build_object('received', true, 'duplicate', true);
  end if;
  if length(v_job) <= 500 then
    perform image_jobs.match_deliveries(v_job);
  end if;
  -- A receipt of a run that has no provider job: all there is to do is to keep it. Not behind a daemon that holds the row's lock.
  if v_run.id is not null and v_run.provider_job_id is null then
    perform from public.runs r where r.id = v_run.id for key share skip locked;
    if found then
      perform image_jobs.record_delivery(v_run.id, v_provider, v_id,
        (select d.type from image_jobs.webhook_deliveries d where d.provider = v_provider and d.delivery_id = v_id));
      update image_jobs.webhook_deliveries d set run_id = v_run.id, closed_at = case when v_run.ended then image_jobs.now() end
      where d.provider = v_provider and d.delivery_id = v_id;
    end if;
  end if;
  perform image_jobs.count_webhook(v_provider, 1, 0, 0);
  return jsonb_build_object('received', true, 'duplicate', false);
end
$$;

-- Sweep the inbox, which daemons do every few seconds: match deliveries that crossed with their runs, delete old ones.
create or replace function image_jobs.sweep_webhooks()
returns integer language plpgsql volatile set search_path = ''
as $$
declare
  v_job record;
begin
  update image_jobs.webhook_deliveries d set closed_at = image_jobs.now()
  where d.closed_at is null and d.received_at <= image_jobs.now() - interval '1 hour';
  -- A provider tries for up to three days; a delivery that it repeats must still be known.
  delete from image_jobs.webhook_deliveries d where d.received_at < image_jobs.now() - interval '7 days';
  delete from image_jobs.webhook_counters c where c.minute < image_jobs.now() - interval '30 days';
  for v_job in
    select distinct d.provider, d.provider_job_id, d.run_id, d.ticket from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.ticket is not null and d.ask_at <= image_jobs.now()
  loop
    perform image_jobs.attach_provider_job(v_job.provider, v_job.provider_job_id, v_job.run_id, v_job.ticket);
  end loop;
  return image_jobs.match_deliveries(null);
end
$$;

-- Delete a delivery from the inbox, which doctor does with its own. Returns whether it was there.
create or replace function image_jobs.delete_delivery(p_provider text, p_delivery text)
returns boolean language sql volatile set search_path = ''
as $$
  with deleted as (
    delete from image_jobs.webhook_deliveries d where d.provider = p_provider and d.delivery_id = p_delivery returning 1
  )
  select exists (select from deleted)
$$;

-- One function per provider. PostgREST hands a JSON object to a single unnamed json parameter byte for byte; jsonb would not keep it.
create or replace function public.webhook_openai(json)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook('openai', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;
comment on function public.webhook_openai(json) is 'Image Job Orchestrator: receives the webhooks of OpenAI.';

create or replace function public.webhook_midjourney(json)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook('midjourney', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;
comment on function public.webhook_midjourney(json) is 'Image Job Orchestrator: receives the webhooks of midjourney-proxy.';

create or replace function public.webhook_hmac(json)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook('hmac', nullif(current_setting('request.headers', true), '')::jsonb, $1::text) $$;
comment on function public.webhook_hmac(json) is 'Image Job Orchestrator: receives the webhooks of providers that sign the body with a shared secret.';

-- For an Edge Function or a route of the application, which has the raw body.
create or replace function public.receive_webhook(provider text, headers jsonb, body text)
returns jsonb language sql volatile set search_path = ''
as $$ select image_jobs.receive_webhook(provider, headers, body) $$;
comment on function public.receive_webhook(text, jsonb, text) is
  'Image Job Orchestrator: receives a webhook from an Edge Function or a server of the application.';

-- Provider jobs that no run waits for: their run was cancelled, deleted, or requeued such that they were dropped. They are
-- cancelled at their providers; a row here stays until a daemon has done that.

create table if not exists image_jobs.cancellations (
  provider text not null,
  provider_job_id text not null,
  run_id varchar not null,
  requested_at timestamptz not null,
  due_at timestamptz not null,
  tries integer not null default 0,
  call bigint,
  primary key (provider, provider_job_id)
);
comment on table image_jobs.cancellations is 'Provider jobs that are to be cancelled. A row goes when that is done, or given up.';
comment on column image_jobs.cancellations.due_at is 'Not before then; while a daemon is at it, the end of its lease.';
comment on column image_jobs.cancellations.call is 'The call under which the job was made: what the provider says about its charge is written there.';
create index if not exists cancellations_of_a_call on image_jobs.cancellations (call);
create index if not exists cancellations_due on image_jobs.cancellations (due_at);

-- Request that a job is cancelled at its provider, by any daemon that serves it. An empty list of dropped claims makes them
-- look at once. Some providers return the same job for the same request: one that another run waits for is left to that.
create or replace function image_jobs.cancel_provider_job(
  p_provider text, p_provider_job_id text, p_run_id varchar, p_call bigint default null)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if exists (
    select from public.runs r
    where r.kind = 'image_gen' and r.provider_job_id = p_provider_job_id and r.id <> p_run_id
      and r.status in ('pending', 'running') and split_part(coalesce(r.routed_to, r.processor), ':', 1) = p_provider)
  then
    return;
  end if;
  insert into image_jobs.cancellations (provider, provider_job_id, run_id, requested_at, due_at, call)
  values (p_provider, p_provider_job_id, p_run_id, image_jobs.now(), image_jobs.now(), p_call)
  on conflict do nothing;
  perform pg_notify('image_jobs_drop', '');
end
$$;

-- Record an event about a provider job on its run; once, and not at all if the run was deleted.
create or replace function image_jobs.record_provider_job(
  p_run_id varchar, p_kind text, p_event text, p_message text, p_provider_job_id text, p_data jsonb)
returns void language sql volatile set search_path = ''
as $$
  select image_jobs.write_events(array[row(
    md5(p_event || ' provider job ' || p_run_id || ' ' || p_provider_job_id)::uuid, r.id, p_kind, jsonb_build_object(
    'event', p_event, 'message', p_message,
    'data', jsonb_strip_nulls(jsonb_build_object('providerJobId', p_provider_job_id) || p_data)))::image_jobs.event])
  from public.runs r where r.id = p_run_id
$$;

-- Lease up to p_limit cancellations at these providers to the caller, for a minute. Returns {provider, provider_job_id,
-- run_id}. A cancellation that no daemon could do for a day (none serves the provider any more) is given up.
create or replace function image_jobs.take_cancellations(p_providers text[], p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_old record;
begin
  for v_old in
    select c.provider, c.provider_job_id from image_jobs.cancellations c
    where c.requested_at < v_now - interval '1 day' and c.due_at <= v_now
    order by c.due_at for update skip locked
  loop
    perform image_jobs.finish_cancellation(v_old.provider, v_old.provider_job_id, 'No daemon serves this provider.', true);
  end loop;
  return query
  with due as materialized (
    select c.provider, c.provider_job_id from image_jobs.cancellations c
    where c.provider = any (p_providers) and c.due_at <= v_now
    order by c.due_at limit p_limit
    for update skip locked
  )
  update image_jobs.cancellations c set tries = c.tries + 1, due_at = v_now + interval '1 min'
  from due where c.provider = any (array[due.provider]) and c.provider_job_id = any (array[due.provider_job_id])
  returning jsonb_build_object('provider', c.provider, 'provider_job_id', c.provider_job_id, 'run_id', c.run_id);
end
$$;

-- Finish a cancellation: done (p_reason null), or why not. It is tried five times, with exponential back-off, unless
-- the provider's response is final. Does nothing if another daemon was faster. p_charge is what the provider said about its
-- charge, {"state", "cost"}; null: nothing, and the call's outcome is unknown.
create or replace function image_jobs.finish_cancellation(
  p_provider text, p_provider_job_id text, p_reason text, p_final boolean, p_charge jsonb default null)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_cancellation record;
begin
  -- Runs come first in the lock order, and the event at the end needs its run.
  perform from public.runs r
  where r.id = (
    select c.run_id from image_jobs.cancellations c where c.provider = p_provider and c.provider_job_id = p_provider_job_id)
  for no key update;
  select c.* into v_cancellation from image_jobs.cancellations c
  where c.provider = p_provider and c.provider_job_id = p_provider_job_id for update;
  if not found then
    return;
  end if;
  if p_reason is not null and not p_final and v_cancellation.tries < 5 then
    update image_jobs.cancellations c set due_at = image_jobs.now() + make_interval(secs => 5 * 2 ^ c.tries)
    where c.provider = p_provider and c.provider_job_id = p_provider_job_id;
    return;
  end if;
  delete from image_jobs.cancellations c where c.provider = p_provider and c.provider_job_id = p_provider_job_id;
  perform image_jobs.close_calls(jsonb_build_array(
    '{"state": "unknown"}' || coalesce(p_charge, '{}') || jsonb_build_object('id', v_cancellation.call)));
  perform image_jobs.refresh_costs(array[v_cancellation.run_id]);
  if p_reason is null then
    perform image_jobs.record_provider_job(v_cancellation.run_id, 'log', 'provider_job_cancelled', 'The order was cancelled at the provider.',
      p_provider_job_id, jsonb_build_object('hint', 'What was made of it by then may be charged.'));
  else
    perform image_jobs.record_provider_job(v_cancellation.run_id, 'error', 'warning',
      'The order could not be cancelled at the provider; it may still be charged.',
      p_provider_job_id, jsonb_build_object('tries', v_cancellation.tries,
        'reason', case when not image_jobs.has_base64(to_jsonb(p_reason)) then left(p_reason, 500) end));
  end if;
end
$$;

-- Orphans: provider jobs whose ids were never saved (the daemon died between submit and save). The first webhook shows that
-- there is one. The daemons ask the provider for which run it is, and the run goes on with it instead of submitting again.

-- Lease provider jobs that have deliveries and no run, a few seconds after these came (before that, the id may be on its way
-- here): up to p_limit of these providers, for a minute. The caller asks the provider whose they are and calls
-- attach_provider_job.
-- The newest first: where others use the same account, most are theirs, and ours must not wait behind them.
create or replace function image_jobs.unmatched_deliveries(p_providers text[], p_limit integer)
returns setof jsonb language sql volatile set search_path = ''
as $$
  with open as materialized (
    select d.provider, d.delivery_id from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.run_id is null and d.provider = any (p_providers) and d.provider_job_id is not null
      and d.received_at between image_jobs.now() - interval '1 hour' and image_jobs.now() - interval '3 s'
      and coalesce(d.ask_at, '-infinity') <= image_jobs.now()
      and not exists (select from public.runs r where r.kind = 'image_gen' and r.provider_job_id = d.provider_job_id)
    order by d.received_at desc limit p_limit
    for update skip locked
  ), leased as (
    update image_jobs.webhook_deliveries d set ask_at = image_jobs.now() + interval '1 min'
    from open where d.provider = open.provider and d.delivery_id = open.delivery_id
    returning d.provider, d.provider_job_id
  )
  select distinct jsonb_build_object('provider', l.provider, 'provider_job_id', l.provider_job_id) from leased l
$$;

-- Returns whether a job at this provider can have been made for a run: there, or on its way through its fallback.
create or replace function image_jobs.may_have_submitted(r public.runs, p_provider text)
returns boolean language sql stable set search_path = ''
as $$
  select p_provider in (
    select split_part(step, ':', 1) from unnest(r.processor || image_jobs.remaining_fallbacks(r.metadata, r.processor, null)) step)
$$;

-- Returns whether max_running of a provider and a model leaves room for one more. Locks the limits, as claims do, but waits
-- for no claim, since the caller holds a run: then there is no room for now.
create or replace function image_jobs.has_room(p_provider text, p_processor text)
returns boolean language plpgsql volatile set search_path = ''
as $$
declare
  v_version bigint := (
    select f.version from image_jobs.limits_in_force f where f.provider = p_provider order by f.version desc limit 1);
  v_limit record;
begin
  if not exists (
    select from image_jobs.limits_of(p_provider) l
    where (l.model is null or l.provider || ':' || l.model = p_processor) and l.max_running is not null)
  then
    return true;
  end if;
  perform from image_jobs.limits_in_force f where f.provider = p_provider and f.version = v_version for update skip locked;
  if not found then
    return false;
  end if;
  for v_limit in
    select l.* from image_jobs.limits_of(p_provider) l
    where (l.model is null or l.provider || ':' || l.model = p_processor) and l.max_running is not null
  loop
    if image_jobs.count_running(p_provider, v_limit.model, v_limit.max_running) >= v_limit.max_running then
      return false;
    end if;
  end loop;
  return true;
end
$$;

-- Attach an orphaned provider job to the run that it was made for (p_run_id null: it is none of ours). Returns:
--   attached   the run waited for its next attempt; now it is parked with this job, and polled at once. Where max_running
--              leaves no room for it, it waits on, and its next start polls this job
--   known      the run has this job
--   held       an attempt is at work, perhaps the one that made the job: looked at again when that has ended. Where no
--              webhook of the job came, a note in the inbox sees to that
--   noted      the run has failed; an event says that there is a provider job
--   cancelled  the run has no use for it: cancelled, requeued, completed, rerouted, or submitted again; the job is
--              cancelled at the provider
--   unknown    there is no such run
create or replace function image_jobs.attach_provider_job(p_provider text, p_provider_job_id text, p_run_id varchar, p_ticket bigint)
returns text language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
  v_run record;
  v_delivery record;
  v_result text;
  v_claim bigint;
  v_call bigint;
begin
  select r.* into v_run from public.runs r
  where r.id = p_run_id and (r.kind = 'image_gen') is true and r.ticket is not null and image_jobs.may_have_submitted(r, p_provider)
  for update skip locked;
  -- The run is locked. An event would wait for that: its run must be there.
  if not found and exists (
    select from public.runs r
    where r.id = p_run_id and (r.kind = 'image_gen') is true and r.ticket is not null and image_jobs.may_have_submitted(r, p_provider))
  then
    return 'held';
  end if;
  v_result := case
    when v_run.id is null then 'unknown'
    when v_run.provider_job_id = p_provider_job_id then 'known'
    when v_run.ticket <> p_ticket or v_run.status in ('cancelled', 'completed') or v_run.provider_job_id is not null
      then 'cancelled'
    when v_run.status = 'failed' then 'noted'
    when split_part(coalesce(v_run.routed_to, v_run.processor), ':', 1) <> p_provider then 'cancelled'
    when v_run.status = 'pending' then 'attached'
    else 'held' end;
  v_call := image_jobs.call_of_job(p_run_id, p_ticket, p_provider, p_provider_job_id);
  perform image_jobs.close_calls(jsonb_build_array(jsonb_build_object('id', v_call, 'provider_job_id', p_provider_job_id)));

  case v_result
    when 'attached' then
      perform set_config('image_jobs.writer', 'daemon', true);
      v_claim := nextval('image_jobs.claims');
      if image_jobs.has_room(p_provider, coalesce(v_run.routed_to, v_run.processor)) then
        update public.runs r
        set status = 'running', claim = v_claim, call = coalesce(v_call, v_claim), provider_job_id = p_provider_job_id,
          submitted_at = v_now,
          due_at = v_now, rank = null, attempt = greatest(r.attempt, 1), refused_since = null, payload = null,
          webhook = case when exists (
            select from image_jobs.webhook_deliveries d
            where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id
              and d.type is distinct from 'provider job taken') then 'came' end,
          message = 'An earlier attempt had ordered it; that order is used.'
        where r.id = p_run_id;
        perform image_jobs.open_calls(array[p_run_id]);
      else
        -- The start to come counts an attempt, which is this job's.
        update public.runs r
        set call = v_call, provider_job_id = p_provider_job_id, submitted_at = v_now, attempt = greatest(r.attempt - 1, 0),
          message = 'An earlier attempt had ordered it; that order is used.'
        where r.id = p_run_id;
      end if;
      perform set_config('image_jobs.writer', v_writer, true);
    when 'cancelled' then
      perform image_jobs.cancel_provider_job(p_provider, p_provider_job_id, p_run_id, v_call);
    when 'noted' then
      perform image_jobs.record_provider_job(p_run_id, 'log', 'late_provider_job',
        'The provider has an order of this run whose id was never written down; it may be charged.', p_provider_job_id, '{}');
    when 'held' then
      insert into image_jobs.webhook_deliveries (provider, delivery_id, provider_job_id, run_id, type, received_at)
      select p_provider, 'provider job ' || p_provider_job_id, p_provider_job_id, p_run_id, 'provider job taken', v_now
      where not exists (
        select from image_jobs.webhook_deliveries d
        where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id)
      on conflict do nothing;
    else
  end case;

  for v_delivery in
    select d.delivery_id, d.type, d.run_id from image_jobs.webhook_deliveries d
    where d.closed_at is null and d.provider = p_provider and d.provider_job_id = p_provider_job_id
    for update
  loop
    if v_delivery.run_id is null and v_result <> 'unknown' then
      perform image_jobs.record_delivery(p_run_id, p_provider, v_delivery.delivery_id, v_delivery.type);
    end if;
    update image_jobs.webhook_deliveries d
    set run_id = case when v_result <> 'unknown' then p_run_id end,
      ticket = case when v_result <> 'unknown' then p_ticket end,
      closed_at = case when v_result in ('attached', 'cancelled', 'noted') then v_now end,
      ask_at = case v_result when 'unknown' then 'infinity' else v_now + interval '1 min' end
    where d.provider = p_provider and d.delivery_id = v_delivery.delivery_id;
  end loop;
  if v_result = 'known' then
    perform image_jobs.match_deliveries(p_provider_job_id);
  end if;
  return v_result;
end
$$;

-- Returns how long a webhook of an attempt with an unknown outcome may still come: the daemon recorded it when it
-- submitted. Null if none will: nothing was submitted, or there are no secrets, without which no webhook verifies.
create or replace function image_jobs.webhook_wait(r public.runs)
returns interval language sql stable set search_path = ''
as $$
  select make_interval(secs => last.wait)
  from (
    select (e.payload #>> '{data,webhookWait}')::double precision as wait from public.run_events e
    where e.run_id = r.id and e.payload ->> 'event' in ('claimed', 'submitted')
    order by e.seq desc limit 1) last
  where r.provider_job_id is null
    and exists (select from image_jobs.webhook_secrets w where w.provider = split_part(coalesce(r.routed_to, r.processor), ':', 1))
$$;

-- Resume the provider job of an attempt that ends with an unknown outcome, if a webhook of it is here already: the run goes
-- on with that job, and not to another provider. Called by the guard of runs (31_guard_runs.sql).
create or replace function image_jobs.resume_provider_job(p_old public.runs, p_new public.runs)
returns public.runs language plpgsql volatile set search_path = ''
as $$
declare
  v_delivery record;
begin
  select d.provider_job_id, d.type into v_delivery from image_jobs.webhook_deliveries d
  where d.closed_at is null and d.run_id = p_new.id and d.ticket = p_new.ticket
    and d.received_at > image_jobs.now() - interval '1 hour'
    and d.provider in ('hmac', split_part(coalesce(p_old.routed_to, p_old.processor), ':', 1))
  order by d.received_at limit 1;
  if found then
    p_new.status := 'running';
    if p_new.routed_to is distinct from p_old.routed_to then
      p_new.routed_to := p_old.routed_to;
      p_new.lane := p_old.lane;
      p_new.rank := null;
      p_new.attempt := p_old.attempt;
    end if;
    p_new.provider_job_id := v_delivery.provider_job_id;
    p_new.call := coalesce(image_jobs.call_of_job(
      p_old.id, p_old.ticket, split_part(coalesce(p_old.routed_to, p_old.processor), ':', 1), v_delivery.provider_job_id), p_old.claim);
    p_new.submitted_at := image_jobs.now();
    p_new.due_at := image_jobs.now();
    p_new.webhook := case when v_delivery.type is distinct from 'provider job taken' then 'came' end;
    p_new.finished_at := null;
    p_new.payload := null;
    p_new.message := 'An earlier attempt had ordered it; that order is used.';
    update image_jobs.webhook_deliveries d set closed_at = image_jobs.now() where d.run_id = p_new.id and d.provider_job_id = v_delivery.provider_job_id;
  end if;
  return p_new;
end
$$;

-- Retention: terminal runs that are old enough, and the files of runs that are gone, whoever deleted them.

-- Files of runs that are gone. A row stays until a daemon has removed them.
create table if not exists image_jobs.file_removals (
  workflow_id uuid not null,
  run_id varchar not null,
  due_at timestamptz not null,
  tries integer not null default 0,
  primary key (workflow_id, run_id)
);
comment on table image_jobs.file_removals is 'Runs that are gone, and whose files in storage are to be removed. A row goes when that is done.';
comment on column image_jobs.file_removals.due_at is 'Not before then; while a daemon is at it, the end of its lease.';
create index if not exists file_removals_due on image_jobs.file_removals (due_at);

-- Uploads of forgotten users, and those in workflows that went with them. A row stays until none of it is left.
create table if not exists image_jobs.source_removals (
  belongs_to text not null check (belongs_to in ('user', 'workflow')),
  id uuid not null,
  due_at timestamptz not null,
  tries integer not null default 0,
  primary key (belongs_to, id)
);
comment on table image_jobs.source_removals is 'Users and workflows whose uploads in the bucket image-sources are to be removed.';

-- How far a walk has come: through runs, for retention; through a bucket, for files whose run is gone. A bucket stays here
-- when another one is used: files in it go with their runs, too.
create table if not exists image_jobs.walks (
  name text primary key,
  holds text not null check (holds in ('runs', 'images', 'conversations', 'kept')),
  position text not null default '',
  due_at timestamptz not null
);
comment on table image_jobs.walks is 'How far a walk through runs or a bucket has come; at its end it rests until due_at.';

-- Have the files of deleted runs removed. A daemon that held one may be storing: then they are looked for once it has stopped.
create or replace function image_jobs.remove_files(p_workflows uuid[], p_runs varchar[], p_held boolean[])
returns void language plpgsql volatile set search_path = ''
as $$
begin
  insert into image_jobs.file_removals (workflow_id, run_id, due_at)
  select gone.workflow_id, gone.run_id, image_jobs.now() + case when gone.held then interval '5 min' else interval '0' end
  from unnest(p_workflows, p_runs, p_held) gone (workflow_id, run_id, held)
  where gone.workflow_id is not null
  on conflict do nothing;
  perform pg_notify('image_jobs_drop', '');
end
$$;

-- Keep the files of a run whose id is used again. Refused while a daemon removes them: it would remove the new run's.
create or replace function image_jobs.keep_files_of(p_workflow_id uuid, p_run_id varchar)
returns void language plpgsql volatile set search_path = '' set enable_seqscan = off set jit = off
as $$
declare
  v_tries integer;
begin
  select f.tries into v_tries from image_jobs.file_removals f
  where f.workflow_id = p_workflow_id and f.run_id = p_run_id for update;
  if v_tries > 0 then
    perform image_jobs.refuse('The files of an earlier run with this id are still being removed.',
      'Leave id out to get a new one, or use this one once they are gone.');
  elsif v_tries = 0 then
    delete from image_jobs.file_removals f where f.workflow_id = p_workflow_id and f.run_id = p_run_id;
  end if;
end
$$;

-- Whether an object's name is a run's, as the daemon names them: its images, thumbnail and preview in the bucket, its
-- conversation beside it, and what is kept of it. Never by a prefix alone: run `a` has no part in `ab.png` or `a-1.png`.
create or replace function image_jobs.is_file_of(p_name text, p_workflow_id uuid, p_run_id varchar, p_kept boolean)
returns boolean language sql immutable set search_path = ''
as $$
  select starts_with(p_name, p_workflow_id || '/' || p_run_id)
    and substr(p_name, 38 + length(p_run_id)) ~ case when p_kept then '^-([0-9]+\.bin|copy\.[0-9a-z.]+)$' else '^\.[0-9a-z.]+$' end
$$;

-- Lease up to p_limit removals to the caller, for a minute: {workflow_id, run_id, files: {bucket: [name]}}. A run of that id
-- that is there again keeps what is there. In a bucket of images only what carries a daemon's metadata is a run's.
create or replace function image_jobs.take_file_removals(p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_sees_files constant boolean := image_jobs.sees_files();
  v_removal record;
  v_files jsonb;
begin
  for v_removal in
    update image_jobs.file_removals f set tries = f.tries + 1, due_at = v_now + interval '1 min'
    from (
      select d.workflow_id, d.run_id from image_jobs.file_removals d
      where d.due_at <= v_now order by d.due_at limit p_limit for update skip locked
    ) due
    where f.workflow_id = due.workflow_id and f.run_id = due.run_id
    returning f.workflow_id, f.run_id
  loop
    if exists (select from public.runs r where r.id = v_removal.run_id and (r.subject_id = v_removal.workflow_id and r.kind = 'image_gen') is true) then
      delete from image_jobs.file_removals f where f.workflow_id = v_removal.workflow_id and f.run_id = v_removal.run_id;
      continue;
    end if;
    v_files := '{}';
    if v_sees_files then
      -- The range serves Storage's index (bucket_id, name collate "C"): all names with the prefix, as ids hold no `~`.
      select coalesce(jsonb_object_agg(found.bucket_id, found.names), '{}') into v_files
      from (
        select o.bucket_id, jsonb_agg(o.name order by o.name) as names
        from image_jobs.walks w
        join storage.objects o on o.bucket_id = w.name
        where o.name collate "C" >= v_removal.workflow_id || '/' || v_removal.run_id
          and o.name collate "C" < v_removal.workflow_id || '/' || v_removal.run_id || '~'
          and image_jobs.is_file_of(o.name, v_removal.workflow_id, v_removal.run_id, w.holds = 'kept')
          and (w.holds <> 'images' or to_jsonb(o) #>> '{user_metadata,image_jobs}' = v_removal.run_id)
        group by o.bucket_id) found;
    end if;
    return next jsonb_build_object('workflow_id', v_removal.workflow_id, 'run_id', v_removal.run_id, 'files', v_files);
  end loop;
end
$$;

-- Returns whether there are files that can be looked for: none without Storage. Refuses a role from which they are hidden:
-- to it everything would look removed.
create or replace function image_jobs.sees_files()
returns boolean language plpgsql stable set search_path = ''
as $$
begin
  if to_regclass('storage.objects') is null then
    return false;
  end if;
  if pg_catalog.row_security_active('storage.objects') then
    raise exception using errcode = 'insufficient_privilege',
      message = format('The role %s cannot see what is stored, so the files of deleted runs stay.', current_user),
      hint = 'Let the daemon connect as postgres, or grant its role bypassrls.';
  end if;
  return true;
end
$$;

-- End a removal, or put it off: 10 s, doubled with each try, up to an hour.
create or replace function image_jobs.finish_file_removal(p_workflow_id uuid, p_run_id varchar, p_done boolean)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if p_done then
    delete from image_jobs.file_removals f where f.workflow_id = p_workflow_id and f.run_id = p_run_id;
  else
    update image_jobs.file_removals f set due_at = image_jobs.now() + least(interval '1 hour', interval '5 s' * 2 ^ least(f.tries, 10))
    where f.workflow_id = p_workflow_id and f.run_id = p_run_id;
  end if;
end
$$;

-- Lease removals of sources to the caller, for a minute, at most p_limit names each: {belongs_to, id, names}. None in a bucket
-- of that name that was there before us: what lies in it may be others'.
create or replace function image_jobs.take_source_removals(p_limit integer)
returns setof jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_removal record;
  v_names text[];
begin
  if not image_jobs.sees_files() then
    return;
  end if;
  for v_removal in
    update image_jobs.source_removals s set tries = s.tries + 1, due_at = image_jobs.now() + interval '1 min'
    from (
      select d.belongs_to, d.id from image_jobs.source_removals d
      where d.due_at <= image_jobs.now() order by d.due_at limit 20 for update skip locked
    ) due
    where s.belongs_to = due.belongs_to and s.id = due.id
    returning s.belongs_to, s.id
  loop
    v_names := case when exists (select from image_jobs.project p where 'image-sources' = any (p.own_buckets)) then
      case v_removal.belongs_to
        when 'workflow' then array(
          select o.name from storage.objects o
          where o.bucket_id = 'image-sources' and o.name collate "C" >= v_removal.id || '/' and o.name collate "C" < v_removal.id || '0'
          limit p_limit)
        else array(
          select o.name from storage.objects o
          where o.bucket_id = 'image-sources'
            and v_removal.id::text in (to_jsonb(o) ->> 'owner_id', to_jsonb(o) ->> 'owner')
          limit p_limit) end end;
    if coalesce(cardinality(v_names), 0) = 0 then
      delete from image_jobs.source_removals s where s.belongs_to = v_removal.belongs_to and s.id = v_removal.id;
      continue;
    end if;
    return next jsonb_build_object('belongs_to', v_removal.belongs_to, 'id', v_removal.id, 'names', v_names);
  end loop;
end
$$;

-- Look for more at once, or put a removal off as finish_file_removal does.
create or replace function image_jobs.finish_source_removal(p_belongs_to text, p_id uuid, p_done boolean)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  update image_jobs.source_removals s set tries = case when p_done then 0 else s.tries end,
    due_at = image_jobs.now()
      + case when p_done then interval '0' else least(interval '1 hour', interval '5 s' * 2 ^ least(s.tries, 10)) end
  where s.belongs_to = p_belongs_to and s.id = p_id;
end
$$;

-- The id of the run to which the address of a picture of ours belongs, however it is spelled; null for any other.
create or replace function image_jobs.pictured_run(p_url text)
returns text language sql immutable set search_path = ''
as $$
  select substring(image_jobs.percent_decoded(left(substring(p_url from '^[^?#]*'), 2048)) from '/([A-Za-z0-9_-]{1,200})\.[0-9A-Za-z.]+$')
$$;

-- Delete what has ended before p_before among the p_limit runs whose ids follow p_after, 500 of them at most. Returns {pruned,
-- after, refused, reason}: `after` is null at the end; `refused` is how many an application's own rules keep, and one's reason.
-- Kept: runs that a node shows or has pinned, and those whose picture a node shows or a living run starts from. Rows that somebody has
-- locked are left for the next time.
create or replace function image_jobs.prune_runs(p_before timestamptz, p_after varchar, p_limit integer)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_walked varchar[];
  v_old varchar[];
  v_id varchar;
  v_after varchar;
  v_pruned integer := 0;
  v_refused integer := 0;
  v_reason text;
begin
  select array_agg(walked.id order by walked.id) into v_walked
  from (select r.id from public.runs r where r.id > p_after order by r.id limit p_limit) walked;
  v_after := case when cardinality(v_walked) = p_limit then v_walked[p_limit] end;
  with old as materialized (
    select r.id, r.subject_id, r.ticket from public.runs r
    where r.id = any (v_walked) and (r.kind = 'image_gen') is true and r.status in ('completed', 'failed', 'cancelled') and r.finished_at < p_before
    order by r.id limit 501
  ), shown as materialized (
    select n.run_ticket, n.pinned_run, image_jobs.pictured_run(n.node_data ->> 'imageUrl') as run_id
    from public.workflow_nodes n where n.workflow_id in (select old.subject_id from old)
  ), sources as materialized (
    select image_jobs.pictured_run(living.metadata #>> '{promptSpec,previousImage}') as run_id
    from public.runs living
    where living.kind = 'image_gen' and living.queue_state is not null
      and living.source_workflow = any (array(select old.subject_id from old))
  )
  select array_agg(old.id order by old.id) into v_old
  from old
  where not exists (select from shown where shown.run_ticket = old.ticket)
    and not exists (select from shown where shown.pinned_run = old.id)
    and not exists (select from shown where shown.run_id = old.id)
    and not exists (select from sources where sources.run_id = old.id);
  if cardinality(v_old) > 500 then
    v_old := v_old[:500];
    v_after := v_old[500];
  end if;
  begin
    delete from public.runs r
    using (select l.id from public.runs l where l.id = any (v_old) order by l.id for update skip locked) unlocked
    where r.id = any (array[unlocked.id]) and r.status in ('completed', 'failed', 'cancelled');
    get diagnostics v_pruned = row_count;
  exception when others then
    -- A foreign key or a trigger of the application keeps one: the others go.
    v_pruned := 0;
    foreach v_id in array v_old loop
      begin
        delete from public.runs r
        using (select l.id from public.runs l where l.id = v_id for update skip locked) unlocked
        where r.id = any (array[unlocked.id]) and r.status in ('completed', 'failed', 'cancelled');
        v_pruned := v_pruned + case when found then 1 else 0 end;
      exception when others then
        v_refused := v_refused + 1;
        v_reason := sqlerrm;
      end;
    end loop;
  end;
  return jsonb_build_object('pruned', v_pruned, 'after', v_after, 'refused', v_refused, 'reason', v_reason);
end
$$;

-- Request the removal of files whose run is gone, among the p_limit objects of a bucket whose names follow p_after. This
-- finds what no trigger saw: TRUNCATE, and a daemon that stored a file after its run was deleted. p_holds says what the
-- bucket is for: images, conversations, or what is kept. Among images only objects with a daemon's metadata count, for an
-- application may have files of its own there; the other two are ours alone. Returns {found, after}.
create or replace function image_jobs.find_lost_files(p_bucket text, p_holds text, p_after text, p_limit integer)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_name constant text := '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}/([A-Za-z0-9_-]{1,200})'
    || case p_holds when 'kept' then '-(?:[0-9]+\.bin|copy\.[0-9a-z.]+)$' else '\.[0-9a-z.]+$' end;
  v_walked integer;
  v_last text;
  v_found integer;
begin
  if not image_jobs.sees_files() then
    return '{"found": 0, "after": null}';
  end if;
  with walked as materialized (
    select o.name, to_jsonb(o) #>> '{user_metadata,image_jobs}' as run_id from storage.objects o
    where o.bucket_id = p_bucket and o.name collate "C" > p_after
    order by o.name collate "C" limit p_limit
  ), named as materialized (
    select distinct left(w.name, 36)::uuid as workflow_id, substring(w.name from v_name) as run_id
    from walked w
    where w.name ~ v_name and (p_holds <> 'images' or w.run_id = substring(w.name from v_name))
  ), requested as (
    insert into image_jobs.file_removals (workflow_id, run_id, due_at)
    select named.workflow_id, named.run_id, image_jobs.now() from named
    where not exists (select from public.runs r where r.id = named.run_id and r.subject_id = named.workflow_id)
    on conflict do nothing
    returning 1
  )
  select count(*), max(walked.name collate "C"), (select count(*) from requested) into v_walked, v_last, v_found from walked;
  return jsonb_build_object('found', v_found, 'after', case when v_walked = p_limit then v_last end);
end
$$;

-- Take the next step of each walk that is due: through the runs, where p_retention says how long they are kept, and through
-- the buckets, those of p_buckets (of images, of conversations, of what is kept) and those of before. One daemon at a time is
-- at a walk. What a step meets ends no other. Returns {pruned, found, more, reason}: `more` if a walk has not come to its end,
-- `reason` why something was not done.
create or replace function image_jobs.walk(p_buckets text[], p_retention interval, p_limit integer)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_walk record;
  v_step jsonb;
  v_pruned integer := 0;
  v_found integer := 0;
  v_more boolean := false;
  v_reason text;
begin
  insert into image_jobs.walks (name, holds, due_at)
  select wanted.name, wanted.holds, v_now
  from (
    select '' as name, 'runs' as holds
    union all
    select b.bucket, (array['images', 'conversations', 'kept'])[b.place] from unnest(p_buckets) with ordinality b (bucket, place)
  ) wanted
  where not exists (select from image_jobs.walks w where w.name = wanted.name)
  on conflict do nothing;
  for v_walk in
    select w.name, w.holds, w.position from image_jobs.walks w
    where w.due_at <= v_now and (w.holds <> 'runs' or p_retention is not null)
    order by w.name for update skip locked
  loop
    begin
      v_step := case v_walk.holds
        when 'runs' then image_jobs.prune_runs(v_now - p_retention, v_walk.position, p_limit)
        else image_jobs.find_lost_files(v_walk.name, v_walk.holds, v_walk.position, p_limit) end;
    exception when others then
      v_step := jsonb_build_object('reason', sqlerrm);
    end;
    update image_jobs.walks w set
      position = coalesce(v_step ->> 'after', ''),
      due_at = v_now + case when v_step ->> 'after' is not null then interval '0' else interval '1 day' end
    where w.name = v_walk.name;
    v_pruned := v_pruned + coalesce((v_step ->> 'pruned')::integer, 0);
    v_found := v_found + coalesce((v_step ->> 'found')::integer, 0);
    v_more := v_more or v_step ->> 'after' is not null;
    v_reason := coalesce(v_step ->> 'reason', v_reason);
  end loop;
  return jsonb_build_object('pruned', v_pruned, 'found', v_found, 'more', v_more, 'reason', v_reason);
end
$$;

-- Erase a user: the runs that are theirs, with events and files; what they have uploaded; their memberships; and the nodes of workflows that they
-- alone were members of, with whatever runs are left there. The books keep their sums, without the user. For operators.
create or replace function image_jobs.forget_user(p_user_id uuid)
returns jsonb language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_own uuid[];
  v_runs integer := 0;
  v_deleted integer;
  v_nodes integer;
  v_memberships integer;
  v_writer text := coalesce(current_setting('image_jobs.writer', true), '');
begin
  if p_user_id is null then
    perform image_jobs.refuse('forget_user needs the id of a user.', 'It stands in auth.users.');
  end if;
  select coalesce(array_agg(m.workflow_id), '{}') into v_own
  from public.workflow_members m
  where m.user_id = p_user_id
    and not exists (select from public.workflow_members o where o.workflow_id = m.workflow_id and o.user_id <> p_user_id);
  -- All of them before the first is deleted: nodes are locked after runs.
  perform set_config('image_jobs.writer', 'daemon', true);
  perform from public.runs r
  where r.kind = 'image_gen' and (r.requeued_by = p_user_id or r.created_by = p_user_id or r.subject_id = any (v_own))
  order by r.id for update;
  update public.runs r set requeued_by = null where r.requeued_by = p_user_id and r.kind = 'image_gen';
  perform set_config('image_jobs.writer', v_writer, true);
  loop
    delete from public.runs r where r.id in (
      select o.id from public.runs o
      where o.kind = 'image_gen' and (o.created_by = p_user_id or o.subject_id = any (v_own)) limit 1000);
    get diagnostics v_deleted = row_count;
    exit when v_deleted = 0;
    v_runs := v_runs + v_deleted;
  end loop;
  insert into image_jobs.source_removals (belongs_to, id, due_at)
  select gone.belongs_to, gone.id, image_jobs.now()
  from (select 'user' as belongs_to, p_user_id as id union all select 'workflow', unnest(v_own)) gone
  on conflict (belongs_to, id) do update set due_at = excluded.due_at, tries = 0;
  perform pg_notify('image_jobs_drop', '');
  update image_jobs.calls c set user_id = null where c.user_id = p_user_id;
  delete from public.workflow_nodes n where n.workflow_id = any (v_own);
  get diagnostics v_nodes = row_count;
  delete from public.workflow_members m where m.user_id = p_user_id;
  get diagnostics v_memberships = row_count;
  delete from image_jobs.workflow_links l where l.created_by = p_user_id or l.workflow_id = any (v_own);
  delete from image_jobs.usage_limits l where l.user_id = p_user_id;
  return jsonb_build_object('runs', v_runs, 'nodes', v_nodes, 'memberships', v_memberships);
end
$$;

-- The buckets, and who sees what lies in them. Images are public to read by URL, unless they are wanted private; what lies in
-- the buckets beside them is not. Only the service role writes into any but that of sources, which members upload.

-- Returns whether there is room for one more source in the workflow that an object's name begins with: 1,000 of them, and 2 GB.
-- Reads no more than that many entries of an index of Storage's (by name in the C collation, or by text_pattern_ops), of that
-- folder alone. Limits how much members may upload; of a user
-- it is as much in each of the user's workflows, since no index of Storage has an owner.
create or replace function image_jobs.may_upload(p_name text)
returns boolean language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set plan_cache_mode = force_custom_plan
as $$
declare
  v_folder text := split_part(p_name, '/', 1);
begin
  return (
    select count(*) < 1000 and coalesce(sum(s.bytes), 0) < 2000000000
    from (
      select case when o.metadata ->> 'size' ~ '^[0-9]{1,15}$' then (o.metadata ->> 'size')::bigint end as bytes
      from storage.objects o
      where o.bucket_id = 'image-sources' and o.name ^@ (v_folder || '/')
      limit 1000
    ) s);
end
$$;

-- Returns what Supabase Storage needs of us: the bucket of images, private where p_private; `<name>-context` for conversations
-- with providers (a thought signature); `<name>-kept` for what was paid for and cannot be decoded, as it came; `image-sources`;
-- and the policies. Columns as of check_set_up.
create or replace function image_jobs.storage_steps(p_bucket text, p_private boolean)
returns table (step text, state text, note text, command text) language plpgsql stable set search_path = ''
  -- Policies are compared as they are written without quotes.
  set quote_all_identifiers = off
as $$
declare
  v_sources constant text := 'image-sources';
  -- Compared as text: a cast would fail at an object that is named otherwise. Asked for once a statement, and only when a
  -- row of the bucket is met: an application's own queries of its own buckets pay nothing.
  v_mine constant text := 'split_part(name, ''/'', 2) <> '''' '
    'and split_part(name, ''/'', 1) = any (array(select mine.id::text from image_jobs.my_workflows() mine (id)))';
  v_ours constant text := ' and user_metadata ->> ''image_jobs'' = split_part(split_part(name, ''/'', 2), ''.'', 1)';
  v_own text[] := coalesce((select p.own_buckets from image_jobs.project p), '{}');
  v_lacks text;
  v_lack text;
  v_seen text[];
  v_bucket record;
  v_policy record;
begin
  if not exists (select from pg_catalog.pg_namespace n where n.nspname = 'storage') then
    return;
  end if;
  -- The images of Supabase's Postgres come with tables that have not all of these until Storage has started.
  select string_agg(wanted.name, ', ' order by wanted.name) filter (where wanted.relation = 'buckets'),
    string_agg(wanted.relation || '.' || wanted.name, ', ' order by wanted.relation, wanted.name)
  into v_lacks, v_lack
  from (values ('buckets', 'id'), ('buckets', 'name'), ('buckets', 'public'), ('buckets', 'file_size_limit'),
    ('buckets', 'allowed_mime_types'), ('objects', 'bucket_id'), ('objects', 'name'), ('objects', 'user_metadata'))
    as wanted (relation, name)
  where not exists (
    select from pg_catalog.pg_attribute a
    join pg_catalog.pg_class c on c.oid = a.attrelid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'storage' and c.relname = wanted.relation and a.attname = wanted.name and not a.attisdropped);
  if v_lacks is null then
    begin
      v_seen := array(select b.id || case when b.public then ' public' else '' end from storage.buckets b);
    exception when insufficient_privilege then
      null; -- set_up says so
    end;
  end if;

  for v_bucket in
    select b.* from (values
      (p_bucket, not p_private, 52428800, array['image/png', 'image/jpeg', 'image/webp', 'image/gif', 'image/avif'],
        'no image can be stored'),
      (p_bucket || '-context', false, 20971520, array['application/json'],
        'images are refined without the conversation that made them'),
      (p_bucket || '-kept', false, 52428800, null,
        'the daemon makes it when a picture that was paid for cannot be decoded'),
      (v_sources, false, 20971520, array['image/png', 'image/jpeg', 'image/webp'],
        'members can upload no pictures to start from')) b (id, public, size, types, without)
  loop
    step := 'the bucket ' || v_bucket.id;
    -- A bucket that was there before us may hold what members are not to see.
    command := format('with made as (insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types) '
      'values (%L, %1$L, %2$L, %3$s, %4$L) on conflict do nothing returning id) '
      'update image_jobs.project p set own_buckets = p.own_buckets || made.id from made;',
      v_bucket.id, v_bucket.public, v_bucket.size, v_bucket.types);
    state := case when v_lacks is not null then 'later'
      when v_bucket.id = any (v_seen) or v_bucket.id || ' public' = any (v_seen) then 'there' else 'missing' end;
    note := case when v_lacks is null then v_bucket.without
      else 'Storage has not made all of storage.buckets yet, which lacks ' || v_lacks end;
    return next;
  end loop;

  if p_private and (p_bucket || ' public') = any (v_seen) then
    step := 'the privacy of the bucket ' || p_bucket;
    state := 'missing';
    note := 'IMAGE_JOBS_PRIVATE is set, and its pictures open for whoever has their addresses';
    command := format('update storage.buckets set public = false where id = %L;', p_bucket);
    return next;
  end if;

  for v_policy in
    select p.*, not p.bucket = any (v_own) and (p.bucket = any (v_seen) or p.bucket || ' public' = any (v_seen)) as foreign
    from (values
      ('Members see the pictures of their workflows', p_bucket, 'select', 'using', 'members see no private pictures'),
      ('Members see the sources of their workflows', v_sources, 'select', 'using', 'members do not see what they have uploaded'),
      ('Members add sources to their workflows', v_sources, 'insert', 'with check', 'members can upload no pictures to start from'),
      ('Members delete the sources of their workflows', v_sources, 'delete', 'using', 'members cannot delete what they have uploaded')
    ) p (name, bucket, does, clause, without)
  loop
    step := format('the policy "%s" on storage.objects', v_policy.name);
    command := format('drop policy if exists %I on storage.objects; create policy %1$I on storage.objects for %s to authenticated '
      '%s (bucket_id = %L and %s%s);', v_policy.name, v_policy.does, v_policy.clause, v_policy.bucket, v_mine,
      -- An application's own files lie beside ours, perhaps in folders of users, and anybody may found a workflow of such an id.
      case when v_policy.foreign and v_policy.bucket = p_bucket then v_ours
        when v_policy.does = 'insert' then ' and image_jobs.may_upload(name)' else '' end);
    if v_lack is not null then
      state := 'later';
      note := 'Storage has not made all of its tables yet, which lack ' || v_lack;
    elsif v_seen is null then
      state := 'later';
      note := format('the role %s may not read storage.buckets', current_user);
    elsif exists (
      select from pg_catalog.pg_policies p
      where p.schemaname = 'storage' and p.tablename = 'objects' and p.policyname = v_policy.name
        and strpos(coalesce(p.qual, p.with_check), format('(bucket_id = %L::text)', v_policy.bucket)) > 0
        and (strpos(coalesce(p.qual, p.with_check), 'user_metadata') > 0) = (v_policy.foreign and v_policy.bucket = p_bucket)
        and (strpos(coalesce(p.qual, p.with_check), 'may_upload') > 0) = (v_policy.does = 'insert'))
    then
      state := 'there';
      note := null;
    elsif v_policy.foreign and v_policy.bucket = v_sources then
      state := 'absent';
      note := 'a bucket of the name ' || v_sources || ' was there before, and may hold what members are not to see';
    else
      state := 'missing';
      note := v_policy.without;
    end if;
    return next;
  end loop;
end
$$;

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

-- The parts that a project around us has to have: buckets, policies of Storage and Realtime, a table in a publication. Both make their
-- tables in their own time, perhaps after us. So this runs at every `image-jobs migrate` and as each migration's last line.

create table if not exists image_jobs.project (
  single boolean primary key default true check (single),
  bucket text not null,
  private boolean not null default false,
  own_buckets text[] not null default '{}'
);
comment on table image_jobs.project is 'One row: what migrate was last told of this project.';
comment on column image_jobs.project.own_buckets is 'Buckets that were made by us, so that all that lies in them is ours.';

-- Returns each thing that is wanted around us: `state` is `there`; `missing`; `later`, where a service has not made what it
-- goes into; or `absent`, where nothing is to be done. `note` says why or what follows, `command` is the SQL that makes it.
create or replace function image_jobs.check_set_up(p_bucket text, p_private boolean default false)
returns table (step text, state text, note text, command text) language sql stable set search_path = ''
as $$
  select * from image_jobs.storage_steps(p_bucket, p_private)
  union all
  select * from image_jobs.realtime_steps()
$$;

-- Make what is missing, and return it all as check_set_up does: `state` may also be `made`, or `refused`, with the reason as
-- `note`, which is a warning, too. Without a bucket, or whether it is to be private: as the last time.
create or replace function image_jobs.set_up(p_bucket text default null, p_private boolean default null)
returns table (step text, state text, note text, command text) language plpgsql volatile
  set search_path = '' set lock_timeout = '5s' set client_min_messages = 'warning'
as $$
declare
  v_bucket constant text := coalesce(p_bucket, (select p.bucket from image_jobs.project p), 'images');
  v_private constant boolean := coalesce(p_private, (select p.private from image_jobs.project p), false);
begin
  -- Of two at once the second finds all of it there.
  perform pg_advisory_xact_lock(hashtextextended('image_jobs.set_up', 0));
  insert into image_jobs.project as p (bucket, private) values (v_bucket, v_private)
  on conflict (single) do update set bucket = excluded.bucket, private = excluded.private
    where (p.bucket, p.private) <> (excluded.bucket, excluded.private);
  for step, state, note, command in select c.* from image_jobs.check_set_up(v_bucket, v_private) c loop
    if state = 'missing' then
      begin
        execute command;
        state := 'made';
      exception when others then
        state := 'refused';
        note := sqlerrm;
      end;
    end if;
    if state in ('refused', 'later') then
      raise warning using message = format('%s could not be made: %s.', upper(left(step, 1)) || substr(step, 2), note),
        hint = 'Run image-jobs migrate later, or as a role that may: ' || command;
    end if;
    return next;
  end loop;
end
$$;

-- Every grant and every policy, on one page.
--
-- Since October 2026 Supabase grants nothing in public by itself; older projects grant everything. Both end here.
-- Clients (anon, authenticated) read what their workflows hold, insert runs, and own their nodes. They have no UPDATE and
-- no DELETE on runs and run_events: cancel_run and requeue_run are the way. Operators come as service_role or owner.

-- Ours, one by one.
revoke all on
  image_jobs.cancellations, image_jobs.daemon_status, image_jobs.daemons, image_jobs.lanes, image_jobs.models,
  image_jobs.claimants, image_jobs.due_marks, image_jobs.limits_in_force, image_jobs.opened_lanes, image_jobs.recent_starts, image_jobs.watermarks,
  image_jobs.provider_blocks, image_jobs.provider_limits, image_jobs.provider_streaks, image_jobs.providers,
  image_jobs.failures, image_jobs.queue_stats, image_jobs.run_costs, image_jobs.throughput,
  image_jobs.run_timings, image_jobs.set_aside, image_jobs.stale_nodes, image_jobs.storage_stats, image_jobs.storage_violations,
  image_jobs.usage_limits, image_jobs.wake, image_jobs.webhook_counters, image_jobs.webhook_deliveries, image_jobs.webhook_secrets,
  image_jobs.workflows, public.image_jobs, public.image_models, public.workflow_members
  from public, anon, authenticated, service_role;
revoke all on sequence
  image_jobs.claims, image_jobs.due_marks_version_seq, image_jobs.event_numbers, image_jobs.node_versions, image_jobs.provider_blocks_id_seq,
  image_jobs.limits_in_force_version_seq, image_jobs.provider_limits_id_seq, image_jobs.provider_streaks_version_seq, image_jobs.recent_starts_version_seq, image_jobs.stale_nodes_id_seq, image_jobs.tickets,
  image_jobs.usage_limits_id_seq, image_jobs.watermarks_version_seq
  from public, anon, authenticated, service_role;
revoke all on image_jobs.calls, image_jobs.file_removals, image_jobs.migrations, image_jobs.prices, image_jobs.project, image_jobs.source_removals, image_jobs.walks from public, anon, authenticated, service_role;
revoke all on function image_jobs.check_set_up(text, boolean), image_jobs.realtime_steps(), image_jobs.set_up(text, boolean), image_jobs.storage_steps(text, boolean)
  from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.call_of_job(varchar, bigint, text, text), image_jobs.calls_of(jsonb, bigint), image_jobs.close_calls(jsonb),
  image_jobs.costs_of(varchar, bigint), image_jobs.estimate_cost(text, jsonb), image_jobs.guard_call(),
  image_jobs.makers_of_jobs(jsonb), image_jobs.shared_cost(public.runs),
  image_jobs.lose_calls(bigint[]), image_jobs.open_calls(varchar[]), image_jobs.refresh_costs(varchar[]),
  image_jobs.sweep_calls(bigint, integer)
  from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.abandon_each(varchar[], uuid), image_jobs.abandon_runs(uuid), image_jobs.accept_run(),
  image_jobs.add_events(jsonb), image_jobs.attach_provider_job(text, text, varchar, bigint),
  image_jobs.available_starts(text, text), image_jobs.block_provider(text, text, interval, text),
  image_jobs.block_until(text, text, timestamptz, text),
  image_jobs.broadcast(text, text, jsonb), image_jobs.broadcast_deleted_runs(jsonb),
  image_jobs.broadcast_runs(varchar[]), image_jobs.send_message(text, uuid, jsonb), image_jobs.run_messages(varchar[]), image_jobs.can_access_run(varchar), image_jobs.can_access_workflow(uuid),
  image_jobs.can_subscribe(text),
  image_jobs.cancel_provider_job(text, text, varchar, bigint), image_jobs.cancel_run(varchar),
  image_jobs.change_lanes(), image_jobs.change_runs(text, varchar[], uuid), image_jobs.check_prompt(jsonb),
  image_jobs.check_runs(varchar[], uuid), image_jobs.check_usage(uuid[], uuid[], integer, numeric),
  image_jobs.claim_checks(uuid, varchar[], integer),
  image_jobs.claim_runs(uuid, integer, boolean, text[]),
  image_jobs.claim_starts(uuid, image_jobs.lanes, integer, boolean, boolean, numeric),
  image_jobs.claimable_providers(text[], interval, boolean), image_jobs.claimed_run(public.runs, timestamptz),
  image_jobs.closed_reason(text), image_jobs.consume_deliveries(public.runs),
  image_jobs.count_running(text, text, integer), image_jobs.count_webhook(text, integer, integer, integer),
  image_jobs.current_user_id(), image_jobs.delete_delivery(text, text), image_jobs.delete_events(),
  image_jobs.drawing_model(text), image_jobs.finish_cancellation(text, text, text, boolean, jsonb),
  image_jobs.first_open_fallback(varchar[]),
  image_jobs.first_waiting(image_jobs.lanes, varchar[], bigint, varchar[], integer), image_jobs.found_workflow(uuid), image_jobs.guard_run(),
  image_jobs.guard_status(), image_jobs.has_base64(jsonb), image_jobs.has_room(text, text), image_jobs.heartbeat(uuid, integer, boolean, boolean),
  image_jobs.hmac_sha256(bytea, bytea), image_jobs.image_job_record(varchar), image_jobs.is_image_run(varchar),
  image_jobs.is_operator(), image_jobs.is_sound(varchar, varchar, timestamptz, uuid, jsonb, integer, text, bigint, text),
  image_jobs.is_signed(text, text, text[], text, text), image_jobs.is_too_old(text), image_jobs.oldest_daemon(),
  image_jobs.json_or_null(text, integer),
  image_jobs.guard_pin(), image_jobs.keep_node(), image_jobs.newest_picture(varchar, uuid), image_jobs.lane_of(text), image_jobs.leave(uuid),
  image_jobs.match_deliveries(text), image_jobs.may_upload(text), image_jobs.my_workflows(), image_jobs.refuse_founded(uuid),
  image_jobs.may_have_submitted(public.runs, text), image_jobs.may_write(uuid), image_jobs.move_runs(varchar[], uuid),
  image_jobs.move_to_model_lanes(image_jobs.lanes, integer), image_jobs.next_rank(uuid, text, integer),
  image_jobs.next_workflow_rank(uuid, uuid, text, integer), image_jobs.served_rank(uuid, text, integer),
  image_jobs.share_places(image_jobs.lanes, varchar[], varchar[], boolean, varchar[], boolean),
  image_jobs.swap_ranks(varchar[], uuid),
  image_jobs.node_data(jsonb, varchar, varchar, integer, text, text, jsonb),
  image_jobs.node_message(public.workflow_nodes), image_jobs.nodes_changed(), image_jobs.note_responses(uuid, jsonb), image_jobs.now(),
  image_jobs.open_lanes(text[], boolean), image_jobs.owned_keys(), image_jobs.pictured_workflow(text),
  image_jobs.postpone_node(varchar, integer, text, text), image_jobs.project_changes(image_jobs.run_change[]),
  image_jobs.project_nodes(varchar[], integer), image_jobs.promote_due(boolean), image_jobs.promote_runs(varchar[], uuid),
  image_jobs.publish_models(text, jsonb), image_jobs.receive_webhook(text, jsonb, text),
  image_jobs.record_delivery(varchar, text, text, text), image_jobs.record_progress(uuid, jsonb),
  image_jobs.record_provider_job(varchar, text, text, text, text, jsonb),
  image_jobs.record_starts(text, text, integer), image_jobs.refresh_stale_nodes(timestamptz), image_jobs.refuse(text, text),
  image_jobs.refuse_nameless(), image_jobs.register_daemon(uuid, text, text, integer, interval, text[], interval), image_jobs.release_runs(varchar[], uuid),
  image_jobs.release_unheld(uuid, bigint[], bigint), image_jobs.remaining_fallbacks(jsonb, varchar, varchar),
  image_jobs.requeue_run(varchar), image_jobs.show_run(varchar), image_jobs.reroute_each(varchar[], uuid),
  image_jobs.reroute_message(jsonb, varchar), image_jobs.reroute_runs(), image_jobs.route_hash(jsonb, varchar, varchar), image_jobs.due_checks(text[], integer, boolean),
  image_jobs.resume_provider_job(public.runs, public.runs),
  image_jobs.run_moved(), image_jobs.runs_deleted(), image_jobs.runs_inserted(), image_jobs.runs_set_aside(), image_jobs.runs_updated(),
  image_jobs.session_began(uuid), image_jobs.session_lock_key(uuid), image_jobs.set_run_aside(varchar, text, text),
  image_jobs.set_webhook_secrets(jsonb), image_jobs.settle_runs(uuid, jsonb), image_jobs.source_workflow(jsonb, boolean),
  image_jobs.starts_of(bigint), image_jobs.stay_awake(uuid, double precision), image_jobs.due_from(text, boolean),
  image_jobs.move_due_mark(text, timestamptz), image_jobs.keep_claimant(),
  image_jobs.stamp_events(), image_jobs.storage_path(text),
  image_jobs.touched_runs(), image_jobs.writes_numbered_events(regclass),
  image_jobs.start_runs(varchar[], uuid), image_jobs.sweep_webhooks(),
  image_jobs.sync(uuid, integer, boolean, jsonb, jsonb, bigint[], double precision, text[], bigint),
  image_jobs.take_cancellations(text[], integer), image_jobs.take_over(uuid),
  image_jobs.unblocked_names(image_jobs.lanes), image_jobs.unmatched_deliveries(text[], integer), image_jobs.verified_delivery(text, jsonb, text, jsonb),
  image_jobs.wake_all(), image_jobs.find_lost_files(text, text, text, integer),
  image_jobs.finish_file_removal(uuid, varchar, boolean), image_jobs.forget_user(uuid),
  image_jobs.is_file_of(text, uuid, varchar, boolean), image_jobs.keep_files_of(uuid, varchar), image_jobs.pictured_run(text),
  image_jobs.prune_runs(timestamptz, varchar, integer), image_jobs.remove_files(uuid[], varchar[], boolean[]), image_jobs.take_file_removals(integer), image_jobs.take_source_removals(integer), image_jobs.finish_source_removal(text, uuid, boolean), image_jobs.sees_files(), image_jobs.percent_decoded(text),
  image_jobs.walk(text[], interval, integer), image_jobs.webhook_key(text, text), image_jobs.webhook_wait(public.runs),
  image_jobs.write_events(image_jobs.event[]), image_jobs.write_nodes(varchar[])
  from public, anon, authenticated, service_role;
revoke all on image_jobs.tallies from public, anon, authenticated, service_role;
revoke all on sequence image_jobs.tallies_id_seq from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.fate_of(public.runs, text), image_jobs.gauges(), image_jobs.take_tallies(boolean), image_jobs.tally_calls(bigint[]),
  image_jobs.tally_endings(image_jobs.run_change[]), image_jobs.seconds_ago(double precision),
  image_jobs.timings_of(public.runs, bigint, timestamptz, timestamptz), image_jobs.timings_of_failure(public.runs, timestamptz)
  from public, anon, authenticated, service_role;
revoke all on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar), public.show_run(varchar),
  public.estimate_cost(text, jsonb),
  public.webhook_openai(json), public.webhook_midjourney(json), public.webhook_hmac(json),
  public.receive_webhook(text, jsonb, text) from public, anon, authenticated, service_role;
revoke all on image_jobs.workflow_links from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.can_open_workflow(uuid), public.can_open_workflow(uuid),
  image_jobs.join_workflow(text), image_jobs.leave_workflow(uuid), image_jobs.lock_members(uuid), image_jobs.lock_memberships(uuid),
  image_jobs.refuse_foreign_members(), image_jobs.require_member(uuid), image_jobs.share_workflow(uuid), image_jobs.token_hash(text),
  image_jobs.unshare_workflow(uuid), public.join_workflow(text), public.leave_workflow(uuid), public.share_workflow(uuid),
  public.unshare_workflow(uuid)
  from public, anon, authenticated, service_role;
revoke all on image_jobs.provider_states, image_jobs.used_hours, public.image_provider_status, public.image_usage
  from public, anon, authenticated, service_role;
revoke all on sequence image_jobs.provider_states_id_seq from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.add_up_hours(), image_jobs.first_open_hour(), image_jobs.budget_left(),
  image_jobs.check_limit(image_jobs.usage_limits, uuid, uuid, integer, numeric),
  image_jobs.count_waiting(uuid, uuid, bigint), image_jobs.has_budget(),
  image_jobs.images_together(timestamptz, bigint), image_jobs.limits_of_user(uuid),
  image_jobs.opens_again(text, numeric), image_jobs.period_end(text), image_jobs.period_start(text),
  image_jobs.refuse_usage(text, text), image_jobs.usage_of_caller(),
  image_jobs.used_since(uuid, uuid, timestamptz), image_jobs.used_together(timestamptz)
  from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.carry_limits(), image_jobs.dearest_cost(varchar[], jsonb), image_jobs.has_streaks(), image_jobs.limits_of(text), image_jobs.lock_limits(text[]),
  image_jobs.streak_of(text), image_jobs.write_streak(image_jobs.provider_streaks),
  image_jobs.has_waiting(text), image_jobs.limit_reached(image_jobs.provider_limits), image_jobs.limits_changed(),
  image_jobs.note_provider_states(), image_jobs.provider_name(text), image_jobs.provider_status(),
  image_jobs.report_daemon(uuid, boolean, text[])
  from public, anon, authenticated, service_role;
revoke all on image_jobs.alert_notices, image_jobs.alerts from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.claim_before(timestamptz), image_jobs.current_alerts(), image_jobs.dashboard(interval),
  image_jobs.finish_alert_notice(uuid, text, boolean),
  image_jobs.note_alerts(), image_jobs.take_alert_notices(integer)
  from public, anon, authenticated, service_role;
revoke all on public.workflow_nodes from public, anon, authenticated, service_role;
-- On tables that were there before, rows of other kinds stay as open as they were; but row level security does not stop these.
revoke truncate, references, trigger on public.runs, public.run_events from public, anon, authenticated, service_role;

-- Default privileges of the owner's may have given more on what was made just now, also to roles of the application's.
revoke all on schema image_jobs from public, anon, authenticated, service_role;
do $$
declare
  v_role text;
  v_object text;
begin
  for v_role in
    select distinct a.grantee::regrole::text
    from pg_default_acl d cross join aclexplode(d.defaclacl) a
    -- No cast to regrole: that folds the case of a name.
    where d.defaclrole = (select r.oid from pg_catalog.pg_roles r where r.rolname = current_user)
      and d.defaclnamespace in (0, 'public'::regnamespace)
      and a.grantee not in (0, d.defaclrole) and a.grantee::regrole::text not in ('anon', 'authenticated', 'service_role')
  loop
    for v_object in
      select 'schema image_jobs'
      union all
      select case c.relkind when 'S' then 'sequence ' else 'table ' end || c.oid::regclass
      from pg_class c
      where c.relkind in ('r', 'v', 'm', 'S') and (c.relnamespace = 'image_jobs'::regnamespace
        or c.relnamespace = 'public'::regnamespace and starts_with(obj_description(c.oid, 'pg_class'), 'Image Job Orchestrator: ')
        or c.oid in (to_regclass('public.runs'), to_regclass('public.run_events'), to_regclass('public.workflow_nodes'))
          and not c.relname = any (string_to_array(coalesce(current_setting('image_jobs.adopted', true), ''), ',')))
      union all
      -- The rules of adopted tables call these, with the rights of whoever writes.
      select 'function ' || p.oid::regprocedure
      from pg_proc p
      where p.pronamespace = 'image_jobs'::regnamespace and p.proname not in ('has_base64', 'is_image_run', 'touched_runs', 'writes_numbered_events')
        or p.pronamespace = 'public'::regnamespace and starts_with(obj_description(p.oid, 'pg_proc'), 'Image Job Orchestrator: ')
    loop
      execute format('revoke all on %s from %s cascade', v_object, v_role);
    end loop;
  end loop;
end
$$;

grant usage on schema image_jobs to anon, authenticated, service_role;

-- Functions that the checks, the triggers' conditions and the policies of these tables call run with the rights of the writer. They
-- are looked up for rows of other kinds, too, whoever writes them; who may not use the schema cannot call these by name.
grant execute on function image_jobs.has_base64(jsonb), image_jobs.touched_runs(), image_jobs.writes_numbered_events(regclass) to public;
-- On tables that were there before, the writer may be anybody.
do $$
begin
  if exists (
    select from information_schema.column_privileges g
    where g.table_schema = 'public' and g.table_name in ('runs', 'run_events') and g.grantee = 'PUBLIC')
  then
    grant execute on function image_jobs.has_base64(jsonb), image_jobs.is_image_run(varchar) to public;
  end if;
end
$$;
-- As are the keys of an index.
grant execute on function image_jobs.remaining_fallbacks(jsonb, varchar, varchar),
  image_jobs.route_hash(jsonb, varchar, varchar) to authenticated, service_role;
grant execute on function image_jobs.may_upload(text) to authenticated;
grant execute on function image_jobs.my_workflows(), image_jobs.can_access_workflow(uuid), image_jobs.can_access_run(varchar),
  image_jobs.is_image_run(varchar), image_jobs.may_write(uuid), image_jobs.refuse_founded(uuid) to anon, authenticated, service_role;
-- Functions that the client functions and the views call.
grant execute on function image_jobs.cancel_run(varchar), image_jobs.requeue_run(varchar), image_jobs.show_run(varchar), image_jobs.image_job_record(varchar),
  image_jobs.refuse(text, text), image_jobs.current_user_id() to authenticated, service_role;
grant execute on function image_jobs.now(), image_jobs.claim_before(timestamptz), image_jobs.forget_user(uuid) to service_role;
grant select on image_jobs.alerts to service_role;
grant execute on function image_jobs.current_alerts(), image_jobs.dashboard(interval) to service_role;

grant select, insert on public.runs to authenticated;
grant select on public.run_events to authenticated;
grant select, insert, update, delete on public.workflow_nodes to authenticated;
grant select on public.workflow_members to authenticated;
grant select on public.image_jobs to authenticated;
grant select on image_jobs.models, public.image_models to anon, authenticated, service_role;
grant execute on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar), public.show_run(varchar),
  public.estimate_cost(text, jsonb), image_jobs.estimate_cost(text, jsonb)
  to authenticated, service_role;
grant execute on function
  image_jobs.can_open_workflow(uuid), public.can_open_workflow(uuid),
  image_jobs.join_workflow(text), image_jobs.leave_workflow(uuid), image_jobs.share_workflow(uuid), image_jobs.unshare_workflow(uuid),
  public.join_workflow(text), public.leave_workflow(uuid), public.share_workflow(uuid), public.unshare_workflow(uuid)
  to authenticated, service_role;
grant select on public.image_provider_status, public.image_usage to authenticated, service_role;
grant execute on function image_jobs.provider_status(), image_jobs.usage_of_caller() to authenticated, service_role;

-- Anybody may post a webhook, and only through these functions. The inbox and the secrets are closed to all.
grant execute on function image_jobs.receive_webhook(text, jsonb, text) to anon, service_role;
grant execute on function public.webhook_openai(json), public.webhook_midjourney(json), public.webhook_hmac(json) to anon;
grant execute on function public.receive_webhook(text, jsonb, text) to service_role;
-- Called by the policy on realtime.messages.
grant execute on function image_jobs.can_subscribe(text) to authenticated;

grant select, insert, update, delete on public.runs, public.run_events, public.workflow_nodes, public.workflow_members,
  image_jobs.provider_blocks, image_jobs.provider_limits, image_jobs.usage_limits to service_role;
grant select on public.image_jobs, image_jobs.calls, image_jobs.queue_stats, image_jobs.run_timings, image_jobs.run_costs, image_jobs.storage_stats,
  image_jobs.failures, image_jobs.throughput, image_jobs.storage_violations, image_jobs.daemon_status, image_jobs.daemons,
  image_jobs.providers, image_jobs.migrations to service_role;

alter table public.runs enable row level security;
alter table public.run_events enable row level security;
alter table public.workflow_nodes enable row level security;
alter table public.workflow_members enable row level security;
alter table image_jobs.migrations enable row level security;
alter table image_jobs.project enable row level security;
alter table image_jobs.provider_blocks enable row level security;
alter table image_jobs.provider_limits enable row level security;
alter table image_jobs.tallies enable row level security;
alter table image_jobs.usage_limits enable row level security;
alter table image_jobs.provider_streaks enable row level security;
alter table image_jobs.workflows enable row level security;
alter table image_jobs.workflow_links enable row level security;
alter table image_jobs.provider_states enable row level security;
alter table image_jobs.used_hours enable row level security;
alter table image_jobs.set_aside enable row level security;
alter table image_jobs.stale_nodes enable row level security;
alter table image_jobs.providers enable row level security;
alter table image_jobs.opened_lanes enable row level security;
alter table image_jobs.watermarks enable row level security;
alter table image_jobs.due_marks enable row level security;
alter table image_jobs.claimants enable row level security;
alter table image_jobs.recent_starts enable row level security;
alter table image_jobs.limits_in_force enable row level security;
alter table image_jobs.daemons enable row level security;
alter table image_jobs.wake enable row level security;
alter table image_jobs.models enable row level security;
alter table image_jobs.prices enable row level security;
alter table image_jobs.calls enable row level security;
alter table image_jobs.webhook_secrets enable row level security;
alter table image_jobs.webhook_deliveries enable row level security;
alter table image_jobs.webhook_counters enable row level security;
alter table image_jobs.cancellations enable row level security;
alter table image_jobs.file_removals enable row level security;
alter table image_jobs.source_removals enable row level security;
alter table image_jobs.walks enable row level security;
alter table image_jobs.alert_notices enable row level security;

-- A row that is read is held against the set of the user's workflows, which is found once a statement, and by which an index is
-- read; `in (select …)` would read the whole table. A row that is written is asked for by itself: it may found its workflow.
-- What is said once more is in coalesce, which planners take for half of all rows: for a thousandth of a thousandth they would
-- rather sort all that a workflow has than read its newest in order.
-- The setting is read in a select, for linters, that names a column, since a statement founds workflows row by row.

-- runs
drop policy if exists "Members see the runs of their workflows" on public.runs;
create policy "Members see the runs of their workflows" on public.runs for select to authenticated
  using (kind = 'image_gen'
    and case when nullif((select current_setting('image_jobs.founded', true) where subject_id is not null), '') is null
      then true else subject_id = any (array(select image_jobs.my_workflows())) or image_jobs.refuse_founded(subject_id) end
    and subject_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Members insert runs into their workflows" on public.runs;
create policy "Members insert runs into their workflows" on public.runs for insert to authenticated
  with check (kind = 'image_gen' and image_jobs.can_access_workflow(subject_id));
-- On a table that was there before, other policies may be wider. These hold all the same, for our kind alone.
drop policy if exists "Nobody else sees image runs" on public.runs;
create policy "Nobody else sees image runs" on public.runs as restrictive for select to anon, authenticated
  using (kind is distinct from 'image_gen' or coalesce(subject_id = any (array(select image_jobs.my_workflows())), false));
drop policy if exists "Nobody else inserts image runs" on public.runs;
create policy "Nobody else inserts image runs" on public.runs as restrictive for insert to anon, authenticated
  with check (kind is distinct from 'image_gen' or image_jobs.can_access_workflow(subject_id));
drop policy if exists "No client updates image runs" on public.runs;
create policy "No client updates image runs" on public.runs as restrictive for update to anon, authenticated
  using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
drop policy if exists "No client deletes image runs" on public.runs;
create policy "No client deletes image runs" on public.runs as restrictive for delete to anon, authenticated
  using (kind is distinct from 'image_gen');

-- run_events
drop policy if exists "Members see the events of their runs" on public.run_events;
create policy "Members see the events of their runs" on public.run_events for select to authenticated
  using (run_kind = 'image_gen' and workflow_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Nobody else sees events of image runs" on public.run_events;
create policy "Nobody else sees events of image runs" on public.run_events as restrictive for select to anon, authenticated
  using (run_kind = 'image_gen' and coalesce(workflow_id = any (array(select image_jobs.my_workflows())), false)
    or run_kind is null and (not image_jobs.is_image_run(run_id) or image_jobs.can_access_run(run_id)));
drop policy if exists "No client inserts events of image runs" on public.run_events;
create policy "No client inserts events of image runs" on public.run_events as restrictive for insert to anon, authenticated
  with check (not image_jobs.is_image_run(run_id));
drop policy if exists "No client updates events of image runs" on public.run_events;
create policy "No client updates events of image runs" on public.run_events as restrictive for update to anon, authenticated
  using (not image_jobs.is_image_run(run_id)) with check (not image_jobs.is_image_run(run_id));
drop policy if exists "No client deletes events of image runs" on public.run_events;
create policy "No client deletes events of image runs" on public.run_events as restrictive for delete to anon, authenticated
  using (not image_jobs.is_image_run(run_id));

-- workflow_nodes
drop policy if exists "Members see the nodes of their workflows" on public.workflow_nodes;
create policy "Members see the nodes of their workflows" on public.workflow_nodes for select to authenticated
  using (case when nullif((select current_setting('image_jobs.founded', true) where workflow_id is not null), '') is null
      then true else workflow_id = any (array(select image_jobs.my_workflows())) or image_jobs.refuse_founded(workflow_id) end
    and workflow_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Members add nodes to their workflows" on public.workflow_nodes;
create policy "Members add nodes to their workflows" on public.workflow_nodes for insert to authenticated
  with check (image_jobs.may_write(workflow_id));
drop policy if exists "Members change the nodes of their workflows" on public.workflow_nodes;
create policy "Members change the nodes of their workflows" on public.workflow_nodes for update to authenticated
  using (workflow_id = any (array(select image_jobs.my_workflows()))) with check (image_jobs.can_access_workflow(workflow_id));
drop policy if exists "Members delete the nodes of their workflows" on public.workflow_nodes;
create policy "Members delete the nodes of their workflows" on public.workflow_nodes for delete to authenticated
  using (workflow_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Nobody else touches nodes" on public.workflow_nodes;
create policy "Nobody else touches nodes" on public.workflow_nodes as restrictive for all to anon, authenticated
  using (coalesce(workflow_id = any (array(select image_jobs.my_workflows())), false))
  with check (image_jobs.can_access_workflow(workflow_id));

-- workflow_members
drop policy if exists "Users see their own memberships" on public.workflow_members;
create policy "Users see their own memberships" on public.workflow_members for select to authenticated
  using (user_id = (select image_jobs.current_user_id()));

-- models
drop policy if exists "Everybody sees the models on offer" on image_jobs.models;
create policy "Everybody sees the models on offer" on image_jobs.models for select to anon, authenticated
  using (true);

-- Workflow ids that rows have used before us belong to nobody until an operator says so.
if current_setting('image_jobs.indexes', true) is distinct from 'later' then
insert into image_jobs.workflows (id)
select r.subject_id from public.runs r where r.subject_id is not null
union
select n.workflow_id from public.workflow_nodes n where n.workflow_id is not null
on conflict do nothing;
end if;

-- Try an image run from end to end, as the last thing: insert, claim, progress, settle, requeue, cancel. All of it is undone:
-- nothing is notified, broadcast or booked, and only numbers of sequences are used up. Where it fails, so would every image
-- run: the error names what is in the way, and a migration is undone with it. `image-jobs doctor` runs this, too.

if current_setting('image_jobs.indexes', true) is distinct from 'later' then
do $probe$
declare
  v_done constant text := 'IJ091';
  v_unlike constant text := 'IJ092';
  v_daemon constant uuid := gen_random_uuid();
  v_node constant text := 'image-jobs-probe-' || v_daemon;
  -- A provider of nobody's, whose lane is empty; others where the application has a rule about names.
  v_processors constant text[] := array[
    'image_jobs_probe:none', 'demo:painter', 'openai:gpt-image-2', 'google:gemini-3-pro-image', 'stability:core', 'midjourney:v7'];
  v_processor text;
  v_workflow uuid;
  v_run varchar;
  v_row public.runs;
  v_event public.run_events;
  v_claimed jsonb;
  v_result text;
  v_round integer;
  v_kind text;
  v_step text;
  v_changed text;
  v_table text;
  v_state text;
  v_message text;
  v_trace text;
  v_constraint text;
  v_column text;
  v_culprits text;
  v_sentence text;
  v_cure text;
  v_rule record;
begin
  -- A workflow that the application knows, if it says that it has to know them.
  v_workflow := gen_random_uuid();
  for v_rule in
    select k.confrelid::regclass as target, r.attname as target_column
    from pg_constraint k
    join pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1] and a.attname = 'subject_id'
    join pg_attribute r on r.attrelid = k.confrelid and r.attnum = k.confkey[1]
    where k.conrelid = 'public.runs'::regclass and k.contype = 'f' and cardinality(k.conkey) = 1
  loop
    execute format('select t.%I from %s t limit 1', v_rule.target_column, v_rule.target) into v_workflow;
    if v_workflow is null then
      raise notice 'An image run was not tried: % has no row yet, and runs refers to it.', v_rule.target;
      return;
    end if;
  end loop;

  foreach v_processor in array v_processors loop
    v_sentence := null;
    v_table := 'public.runs';
    begin
      perform image_jobs.register_daemon(v_daemon, 'probe', 'probe', 1, interval '30 s', array[split_part(v_processor, ':', 1)]);
      -- A node may need columns that only the application knows; and one that refuses to be changed is passed over later, too.
      begin
        insert into public.workflow_nodes (id, workflow_id, node_type, node_data)
        values (v_node, v_workflow, 'image_generation', '{}');
      exception when others then
        null;
      end;

      -- Triggers of theirs that wait for the end of a transaction are asked after each step, when all of it is written.
      for v_round in 1..2 loop
        v_step := 'inserted';
        insert into public.runs (kind, subject_id, status, processor, metadata, priority)
        values ('image_gen', v_workflow, 'pending', v_processor, jsonb_build_object(
          'nodeId', v_node, 'promptSpec', jsonb_build_object('basePrompt', 'a red fox')), 32767)
        returning * into v_row;
        v_run := v_row.id;
        set constraints all immediate;
        set constraints all deferred;
        select r.* into v_row from public.runs r where r.id = v_run;
        v_changed := case when v_row.id is null then 'the row' when v_row.kind <> 'image_gen' then 'kind'
          when v_row.subject_id <> v_workflow then 'subject_id' when v_row.status <> 'pending' then 'status'
          when v_row.processor <> v_processor then 'processor' when v_row.metadata #>> '{promptSpec,basePrompt}' is distinct from 'a red fox' then 'metadata'
          when v_row.claim is null or v_row.ticket is null or v_row.lane is null or v_row.rank is null or v_row.due_at is null
            then 'a column of the queue' end;
        exit when v_changed is not null;

        v_step := 'claimed';
        select c.run into v_claimed from image_jobs.claim_runs(v_daemon, 1, true) as c (run);
        if v_claimed ->> 'id' is distinct from v_run then
          select s.reason into v_message from image_jobs.set_aside s where s.run_id = v_run;
          if not found and v_processor <> v_processors[1] then
            raise notice 'An image run was not tried: the limits of % leave no room.', split_part(v_processor, ':', 1);
            raise exception using errcode = v_done;
          end if;
          -- Once more, outside of what sets a run aside, for the whole error.
          perform set_config('image_jobs.writer', 'daemon', true);
          perform image_jobs.start_runs(array[v_run], v_daemon);
          v_changed := 'status';
          exit;
        end if;
        set constraints all immediate;
        set constraints all deferred;
        select r.* into v_row from public.runs r where r.id = v_run;
        v_changed := case when v_row.status is distinct from 'running' then 'status' when v_row.claimed_by is distinct from v_daemon then 'claimed_by'
          when v_row.claim is distinct from (v_claimed ->> 'claim')::bigint then 'claim' when v_row.due_at is not null then 'due_at'
          when v_row.payload is not null then 'payload' end;
        exit when v_changed is not null;

        v_step := case v_round when 1 then 'completed' else 'failed' end;
        select s ->> 'result' into v_result from image_jobs.settle_runs(v_daemon, jsonb_build_array(jsonb_build_object(
          'id', v_run, 'claim', v_row.claim, 'outcome', v_step, 'payload', case v_round
            when 1 then '{"imageUrl": "https://example.com/a.png"}'::jsonb else '{"error": "No.", "code": "refused", "hint": "Ask again."}' end))) s;
        set constraints all immediate;
        set constraints all deferred;
        select r.* into v_row from public.runs r where r.id = v_run;
        v_changed := case when v_result is distinct from 'settled' or v_row.status is distinct from v_step then 'status'
          when v_row.finished_at is null then 'finished_at'
          when coalesce(v_row.payload ->> 'imageUrl', v_row.payload ->> 'error') is null then 'payload' end;
        exit when v_changed is not null;

        v_step := 'requeued';
        update public.runs r set status = 'pending' where r.id = v_run;
        set constraints all immediate;
        set constraints all deferred;
        select r.* into v_row from public.runs r where r.id = v_run;
        v_changed := case when v_row.status is distinct from 'pending' then 'status' when v_row.finished_at is not null then 'finished_at'
          when v_row.payload is not null then 'payload' when v_row.due_at is null then 'due_at' end;
        exit when v_changed is not null;

        v_step := 'cancelled';
        update public.runs r set status = 'cancelled' where r.id = v_run;
        set constraints all immediate;
        set constraints all deferred;
        select r.* into v_row from public.runs r where r.id = v_run;
        v_changed := case when v_row.status is distinct from 'cancelled' then 'status' when v_row.finished_at is null then 'finished_at' end;
        exit when v_changed is not null;
      end loop;

      -- Events that are refused cost nothing but themselves, so they are looked at one by one.
      if v_changed is null then
        v_table := 'public.run_events';
        foreach v_kind in array array['log', 'progress', 'error', 'webhook'] loop
          v_step := 'noted';
          insert into public.run_events (id, run_id, kind, payload)
          values (gen_random_uuid(), v_run, v_kind, '{"event": "warning", "message": "Only tried."}')
          returning * into v_event;
          set constraints all immediate;
          set constraints all deferred;
          v_changed := case when v_event.id is null then 'the row' when v_event.run_id <> v_run then 'run_id' when v_event.kind <> v_kind then 'kind'
            when v_event.payload ->> 'event' is distinct from 'warning' then 'payload' end;
          exit when v_changed is not null;
        end loop;
      end if;
      if v_changed is not null then
        raise exception using errcode = v_unlike;
      end if;
      raise exception using errcode = v_done;
    exception
      when sqlstate 'IJ091' then
        return;
      when others then
        get stacked diagnostics v_state = returned_sqlstate, v_message = message_text, v_trace = pg_exception_context,
          v_constraint = constraint_name, v_column = column_name;
    end;
    -- A rule of ours is broken by what a trigger of theirs wrote.
    if starts_with(v_constraint, 'runs_') and v_message like '%check constraint%' and exists (
      select from pg_constraint k
      where k.conrelid = 'public.runs'::regclass and k.conname = v_constraint and pg_get_constraintdef(k.oid) like '%image_gen%')
    then
      v_changed := 'what the rule ' || v_constraint || ' is about';
    end if;
    -- Locks of others are no fault of the schema.
    if v_state in ('40P01', '40001', '55P03', '57014') then
      raise exception using errcode = v_state, message = v_message;
    end if;

    select string_agg(distinct format('%I', t.tgname), ', ') into v_culprits
    from pg_trigger t join pg_proc p on p.oid = t.tgfoid
    where t.tgrelid in (v_table::regclass, 'public.run_events'::regclass) and not t.tgisinternal and t.tgenabled <> 'D'
      and not starts_with(t.tgname, 'image_jobs_')
      and (v_changed is not null and t.tgrelid = v_table::regclass and t.tgtype & 2 = 2
        or v_changed is null and v_constraint = '' and position(p.proname || '(' in v_trace) > 0);
    v_sentence := case
      when v_changed is not null and v_culprits is not null
        then format('An image run cannot be %s: on %s a trigger changes %s (%s).', v_step, v_table, v_changed, v_culprits)
      when v_changed is not null then format('An image run cannot be %s: %s changes on %s.', v_step, v_changed, v_table)
      when v_culprits is not null
        then format('An image run cannot be %s: the trigger %s says: %s', v_step, v_culprits, v_message)
      when v_constraint <> '' then format('An image run cannot be %s: %s is in the way (%s).', v_step, v_constraint, v_message)
      else format('An image run cannot be %s: %s', v_step, v_message) end;
    v_cure := case
      when v_culprits is not null then format(
        'Let it leave rows of kind image_gen alone: create the trigger again with when (new.kind is distinct from ''image_gen'')%s.',
        case v_table when 'public.runs' then '' else ', by run_id' end)
      when v_state = '23502' then format('Run: alter table %s alter column %I drop not null; or give it a default.', v_table, v_column)
      when v_constraint <> '' then format('Let it leave rows of kind image_gen alone: drop %I, and add it again with kind is distinct from ''image_gen'' or ….', v_constraint)
      else 'Let what raises this leave rows of kind image_gen alone.' end;
    exit when v_constraint = '' or v_changed is not null;  -- Another name would not help.
  end loop;

  raise exception using errcode = 'object_not_in_prerequisite_state', message = v_sentence,
    detail = format(E'- %s\n  %s', v_sentence, v_cure), hint = 'Nothing was changed. Do what the lines above say, then migrate again.';
end
$probe$;
end if;

-- To here.

  insert into image_jobs.migrations (version, name, hash) values (v_version, 'initial', v_hash);
  perform set_config('lock_timeout', v_lock_timeout, true);
end
$migration_0001$;

-- By whatever tool and how often it is run.
do $$ begin if to_regprocedure('image_jobs.set_up(text, boolean)') is not null then perform image_jobs.set_up(); end if; end $$;
