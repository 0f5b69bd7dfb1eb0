-- Who may post a webhook: anybody, and only through the doors. The inbox and the secrets are nobody's.

revoke all on private.webhook_secrets, private.webhook_deliveries, private.webhook_counters
  from public, anon, authenticated, service_role;
revoke all on function private.hmac_sha256(bytea, bytea), private.webhook_key(text, text), private.set_webhook_secrets(jsonb),
  private.json_or_null(text), private.is_signed(text, text, text[], text, text),
  private.verified_delivery(text, jsonb, text, jsonb), private.match_deliveries(text),
  private.note_delivery(varchar, text, text, text), private.hear_deliveries(),
  private.count_webhook(text, integer, integer, integer), private.receive_webhook(text, jsonb, text),
  private.sweep_webhooks(), private.forget_delivery(text, text), public.webhook_openai(json), public.webhook_midjourney(json), public.webhook_hmac(json),
  public.receive_webhook(text, jsonb, text) from public, anon, authenticated, service_role;

grant execute on function private.receive_webhook(text, jsonb, text) to anon, service_role;
grant execute on function public.webhook_openai(json), public.webhook_midjourney(json), public.webhook_hmac(json) to anon;
grant execute on function public.receive_webhook(text, jsonb, text) to service_role;

alter table private.webhook_secrets enable row level security;
alter table private.webhook_deliveries enable row level security;
alter table private.webhook_counters enable row level security;
