-- Orders are between the database and its daemons.

revoke all on private.cancellations from public, anon, authenticated, service_role;
revoke all on function private.cancel_order(text, text, varchar), private.drop_order(),
  private.note_order(varchar, text, text, text, text, jsonb), private.take_cancellations(text[], integer),
  private.finish_cancellation(text, text, text, boolean), private.unmatched_deliveries(text[], integer),
  private.attach_order(text, text, varchar, bigint), private.webhook_wait(public.runs), private.find_order(),
  private.may_have_asked(public.runs, text)
  from public, anon, authenticated, service_role;

alter table private.cancellations enable row level security;
