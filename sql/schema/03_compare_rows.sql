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
