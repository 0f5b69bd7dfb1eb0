-- Try an image run from end to end, as the last thing: insert, claim, progress, settle, requeue, cancel. All of it is undone:
-- nothing is notified, broadcast or booked, and only numbers of sequences are used up. Where it fails, so would every image
-- run: the error names what is in the way, and a migration is undone with it. `image-jobs doctor` runs this, too.

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
