-- The buckets. Images are public to read by URL; what lies in the buckets beside them is not. Only the service role writes
-- into any, or reads the private ones, as there is no policy for any other role.

-- Returns what Supabase Storage needs of us: the bucket of images; `<name>-context` for conversations with providers (a
-- thought signature); `<name>-kept` for what was paid for and cannot be decoded, as it came. Columns as of check_set_up.
create or replace function image_jobs.storage_steps(p_bucket text)
returns table (step text, state text, note text, command text) language plpgsql stable set search_path = ''
as $$
declare
  v_lacks text;
  v_bucket record;
begin
  if not exists (select from pg_catalog.pg_namespace n where n.nspname = 'storage') then
    return;
  end if;
  -- The images of Supabase's Postgres come with a table that has not all of these until Storage has started.
  select string_agg(wanted.name, ', ' order by wanted.name) into v_lacks
  from unnest(array['id', 'name', 'public', 'file_size_limit', 'allowed_mime_types']) as wanted (name)
  where not exists (
    select from pg_catalog.pg_attribute a
    join pg_catalog.pg_class c on c.oid = a.attrelid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'storage' and c.relname = 'buckets' and a.attname = wanted.name and not a.attisdropped);
  for v_bucket in
    select b.* from (values
      (p_bucket, true, 52428800, array['image/png', 'image/jpeg', 'image/webp', 'image/gif', 'image/avif'],
        'no image can be stored'),
      (p_bucket || '-context', false, 20971520, array['application/json'],
        'images are refined without the conversation that made them'),
      (p_bucket || '-kept', false, 52428800, null,
        'the daemon makes it when a picture that was paid for cannot be decoded')) b (id, public, size, types, without)
  loop
    step := 'the bucket ' || v_bucket.id;
    command := format('insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types) '
      'values (%L, %1$L, %2$L, %3$s, %4$L) on conflict do nothing;', v_bucket.id, v_bucket.public, v_bucket.size, v_bucket.types);
    state := 'missing';
    note := v_bucket.without;
    if v_lacks is not null then
      state := 'later';
      note := 'Storage has not made all of storage.buckets yet, which lacks ' || v_lacks;
    else
      begin
        if exists (select from storage.buckets b where b.id = v_bucket.id) then
          state := 'there';
        end if;
      exception when insufficient_privilege then
        null; -- set_up says so
      end;
    end if;
    return next;
  end loop;
end
$$;
