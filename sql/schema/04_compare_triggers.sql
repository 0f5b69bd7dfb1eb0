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
