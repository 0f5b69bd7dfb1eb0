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
