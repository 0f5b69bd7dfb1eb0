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
