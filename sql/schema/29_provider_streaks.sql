-- Streaks of server errors: three answers of 5xx in a row, to calls of any daemons, close a provider for all of them for
-- 4 s. Then it is half open: one call goes first. Any success ends the streak; another 5xx closes it again, for twice as long,
-- up to a minute.
--
-- Answers come with settlements (`http_status`). A sync notes them before it holds any lock, and claims do not wait for the
-- locks of streaks: so nobody waits for them while others wait for him.

create table if not exists image_jobs.provider_streaks (
  provider text primary key,
  failed bigint[] not null default '{}',
  closings integer not null default 0,
  closed_at timestamptz,
  closed_until timestamptz,
  probe bigint,
  probed_at timestamptz
);
comment on table image_jobs.provider_streaks is 'Providers that answer with server errors; a success deletes the row.';
comment on column image_jobs.provider_streaks.failed is
  'Claims whose calls had server errors since the last success, until it is closed. One whose run is locked settles again.';
comment on column image_jobs.provider_streaks.closings is 'How often it was closed since the last success. From 1 on and not blocked: half open.';
comment on column image_jobs.provider_streaks.closed_at is 'When it was closed last. Calls that began before say nothing new.';
comment on column image_jobs.provider_streaks.closed_until is 'Until when, as provider_blocks has it unless something else has closed it for longer.';
comment on column image_jobs.provider_streaks.probe is 'The claim of the call that went first …';
comment on column image_jobs.provider_streaks.probed_at is '… and when; half a minute later another may go.';

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
    join public.runs r on r.id = s.id and r.claim = s.claim and r.claimed_by = p_daemon
    group by 1 order by 1
  loop
    if v_noted.well then
      delete from image_jobs.provider_streaks s where s.provider = v_noted.provider returning s.* into v_streak;
      delete from image_jobs.provider_blocks b
      where b.provider = v_streak.provider and b.model is null and b.until = v_streak.closed_until;
      continue;
    end if;
    if v_noted.failed is not null then
      insert into image_jobs.provider_streaks (provider) values (v_noted.provider) on conflict do nothing;
    end if;
    select s.* into v_streak from image_jobs.provider_streaks s where s.provider = v_noted.provider for update;
    continue when not found;
    if v_streak.probe = any (v_noted.unanswered) then
      update image_jobs.provider_streaks s set probed_at = null where s.provider = v_noted.provider;
    end if;
    v_failed := array(
      select call.claim from unnest(v_noted.failed, v_noted.began) as call (claim, began)
      where call.began >= coalesce(v_streak.closed_at, '-infinity') and call.claim <> all (v_streak.failed));
    continue when v_failed = '{}' or exists (
      select from image_jobs.provider_blocks b where b.provider = v_noted.provider and b.model is null and b.until > v_now);
    if v_streak.closings = 0 and cardinality(v_streak.failed || v_failed) < 3 then
      update image_jobs.provider_streaks s set failed = s.failed || v_failed where s.provider = v_noted.provider;
      continue;
    end if;
    update image_jobs.provider_streaks s
    set failed = '{}', closings = s.closings + 1, closed_at = v_now, probe = null, probed_at = null,
      closed_until = v_now + make_interval(secs => least(4 * 2 ^ least(s.closings, 9), 60))
    where s.provider = v_noted.provider
    returning s.* into v_streak;
    -- Every signed-in user reads it. The provider's words, which may be about one of them, stand in the events of the run.
    perform image_jobs.block_until(v_noted.provider, null, v_streak.closed_until,
      format('%s has a problem at the moment.', image_jobs.provider_name(v_noted.provider)));
  end loop;
end
$$;
