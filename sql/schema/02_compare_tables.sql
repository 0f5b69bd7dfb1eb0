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
