-- The buckets. Images are public to read by URL; what providers said beside them is not. Nobody but the service role
-- writes into either, or reads the second, as there is no policy for anybody else.

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
