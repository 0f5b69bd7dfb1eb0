-- What image-jobs doctor needs to test webhooks.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- Takes a delivery out of the inbox again, which doctor does with its own; whether it was there.
create or replace function private.forget_delivery(p_provider text, p_delivery text)
returns boolean language sql volatile set search_path = ''
as $$
  with gone as (
    delete from private.webhook_deliveries d where d.provider = p_provider and d.delivery_id = p_delivery returning 1
  )
  select exists (select from gone)
$$;

revoke all on function private.forget_delivery(text, text) from public, anon, authenticated, service_role;
