-- The bucket. Public to read by URL; nobody but the service role writes, as there is no policy for anybody else.

-- Makes a bucket if there is none of that name. Does nothing where there is no Supabase Storage.
create or replace function private.make_bucket(p_name text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if to_regclass('storage.buckets') is not null then
    insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types)
    values (p_name, p_name, true, 52428800,
      array['image/png', 'image/jpeg', 'image/webp', 'image/gif', 'image/avif'])
    on conflict (id) do nothing;
  end if;
end
$$;

select private.make_bucket('images');
