-- Counting a flood of bad webhooks must not make good ones wait.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

alter table private.webhook_counters
  add column if not exists slot bigint not null default 0;
alter table private.webhook_counters
  drop constraint if exists webhook_counters_pkey;
create unique index if not exists webhook_counters_slot on private.webhook_counters (provider, minute, slot);
alter table private.webhook_counters
  add constraint webhook_counters_pkey primary key using index webhook_counters_slot;
comment on column private.webhook_counters.slot is '0 counts good calls, 1 to 8 bad ones: sum them up.';

-- Counts a call. With a minute's rows there is always something to conflict with, so these are few. Good calls never wait
-- for bad ones: a flood of those queues for rows of its own.
create or replace function private.count_webhook(p_provider text, p_accepted integer, p_duplicates integer, p_refused integer)
returns void language sql volatile set search_path = ''
as $$
  insert into private.webhook_counters as c (provider, minute, accepted, duplicates, refused, slot)
  values (p_provider, date_trunc('minute', private.now()), p_accepted, p_duplicates, p_refused,
    case when p_refused > 0 then 1 + pg_backend_pid() % 8 else 0 end)
  on conflict (provider, minute, slot) do update
  set accepted = c.accepted + excluded.accepted, duplicates = c.duplicates + excluded.duplicates,
    refused = c.refused + excluded.refused
$$;
