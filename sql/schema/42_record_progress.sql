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
