-- Providers, or models of theirs, that are closed for all daemons until a time: a 429 said so, the credit is used up, or a
-- streak of server errors did it (29_provider_streaks.sql).
--
-- A block moves no runs. Those of a blocked model stay in their lane, and claims pass over them (image_jobs.unblocked_names).

create table if not exists image_jobs.provider_blocks (
  id bigint generated always as identity primary key,
  provider text not null,
  model text,
  until timestamptz not null,
  reason text,
  constraint provider_blocks_one_row_each unique nulls not distinct (provider, model),
  constraint provider_blocks_name_a_provider check (provider ~ '^[a-z0-9_.-]+$')
);
-- Claims read from now on, however many there were before.
create index if not exists provider_blocks_until on image_jobs.provider_blocks (provider, until);
comment on table image_jobs.provider_blocks is 'Set by the daemons; delete a row to open. model null: the whole provider.';
comment on column image_jobs.provider_blocks.model is
  'The model that draws: runs that name a retired one wait, too, where this is its successor.';
comment on column image_jobs.provider_blocks.reason is 'A sentence for the person at the canvas.';

-- Close a provider, or the model that draws, for all daemons until a time; what is closed for longer stays so.
-- Waits for no lock but that of its row, which claims never take.
create or replace function image_jobs.block_until(p_provider text, p_model text, p_until timestamptz, p_reason text)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
begin
  -- Each of many calls that were under way says so.
  if exists (
    select from image_jobs.provider_blocks b
    where b.provider = p_provider and b.model is not distinct from p_model and b.until >= greatest(p_until, v_now))
  then
    return;
  end if;
  insert into image_jobs.provider_blocks as b (provider, model, until, reason)
  values (p_provider, p_model, p_until, p_reason)
  on conflict (provider, model) do update set
    until = greatest(b.until, excluded.until),
    reason = case when b.until > excluded.until then b.reason else excluded.reason end;
  delete from image_jobs.provider_blocks b
  where b.id = any (array(
    select o.id from image_jobs.provider_blocks o where o.until < v_now - interval '1 hour' for update skip locked));
end
$$;

-- Close a provider, or the model that draws, until p_for has passed: it returned 429, or is out of credit.
create or replace function image_jobs.block_provider(p_provider text, p_model text, p_for interval, p_reason text)
returns void language sql volatile set search_path = ''
as $$
  select image_jobs.block_until(p_provider, p_model, image_jobs.now() + p_for, p_reason)
$$;
