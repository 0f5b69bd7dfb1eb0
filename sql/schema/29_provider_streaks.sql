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
