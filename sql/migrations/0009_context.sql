-- A second bucket, which is not public: what a provider wants to hear again when one of its images is refined.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- Makes the buckets if there are none of these names. Does nothing where there is no Supabase Storage.
-- The first holds images; the second, `<name>-context`, what a provider said beside one (a thought signature).
create or replace function private.make_bucket(p_name text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if to_regclass('storage.buckets') is not null then
    insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types)
    values
      (p_name, p_name, true, 52428800, array['image/png', 'image/jpeg', 'image/webp', 'image/gif', 'image/avif']),
      (p_name || '-context', p_name || '-context', false, 20971520, array['application/json'])
    on conflict (id) do nothing;
  end if;
end
$$;

select private.make_bucket('images');
