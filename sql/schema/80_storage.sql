-- The buckets, and who sees what lies in them. Images are public to read by URL, unless they are wanted private; what lies in
-- the buckets beside them is not. Only the service role writes into any but that of sources, which members upload.

-- Returns whether there is room for one more source in the workflow that an object's name begins with: 1,000 of them, and 2 GB.
-- Reads no more than that many entries of an index of Storage's (by name in the C collation, or by text_pattern_ops), of that
-- folder alone. Limits how much members may upload; of a user
-- it is as much in each of the user's workflows, since no index of Storage has an owner.
create or replace function image_jobs.may_upload(p_name text)
returns boolean language plpgsql volatile security definer set search_path = ''
  set enable_seqscan = off set plan_cache_mode = force_custom_plan
as $$
declare
  v_folder text := split_part(p_name, '/', 1);
begin
  return (
    select count(*) < 1000 and coalesce(sum(s.bytes), 0) < 2000000000
    from (
      select case when o.metadata ->> 'size' ~ '^[0-9]{1,15}$' then (o.metadata ->> 'size')::bigint end as bytes
      from storage.objects o
      where o.bucket_id = 'image-sources' and o.name ^@ (v_folder || '/')
      limit 1000
    ) s);
end
$$;

-- Returns what Supabase Storage needs of us: the bucket of images, private where p_private; `<name>-context` for conversations
-- with providers (a thought signature); `<name>-kept` for what was paid for and cannot be decoded, as it came; `image-sources`;
-- and the policies. Columns as of check_set_up.
create or replace function image_jobs.storage_steps(p_bucket text, p_private boolean)
returns table (step text, state text, note text, command text) language plpgsql stable set search_path = ''
  -- Policies are compared as they are written without quotes.
  set quote_all_identifiers = off
as $$
declare
  v_sources constant text := 'image-sources';
  -- Compared as text: a cast would fail at an object that is named otherwise. Asked for once a statement, and only when a
  -- row of the bucket is met: an application's own queries of its own buckets pay nothing.
  v_mine constant text := 'split_part(name, ''/'', 2) <> '''' '
    'and split_part(name, ''/'', 1) = any (array(select mine.id::text from image_jobs.my_workflows() mine (id)))';
  v_ours constant text := ' and user_metadata ->> ''image_jobs'' = split_part(split_part(name, ''/'', 2), ''.'', 1)';
  v_own text[] := coalesce((select p.own_buckets from image_jobs.project p), '{}');
  v_lacks text;
  v_lack text;
  v_seen text[];
  v_bucket record;
  v_policy record;
begin
  if not exists (select from pg_catalog.pg_namespace n where n.nspname = 'storage') then
    return;
  end if;
  -- The images of Supabase's Postgres come with tables that have not all of these until Storage has started.
  select string_agg(wanted.name, ', ' order by wanted.name) filter (where wanted.relation = 'buckets'),
    string_agg(wanted.relation || '.' || wanted.name, ', ' order by wanted.relation, wanted.name)
  into v_lacks, v_lack
  from (values ('buckets', 'id'), ('buckets', 'name'), ('buckets', 'public'), ('buckets', 'file_size_limit'),
    ('buckets', 'allowed_mime_types'), ('objects', 'bucket_id'), ('objects', 'name'), ('objects', 'user_metadata'))
    as wanted (relation, name)
  where not exists (
    select from pg_catalog.pg_attribute a
    join pg_catalog.pg_class c on c.oid = a.attrelid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'storage' and c.relname = wanted.relation and a.attname = wanted.name and not a.attisdropped);
  if v_lacks is null then
    begin
      v_seen := array(select b.id || case when b.public then ' public' else '' end from storage.buckets b);
    exception when insufficient_privilege then
      null; -- set_up says so
    end;
  end if;

  for v_bucket in
    select b.* from (values
      (p_bucket, not p_private, 52428800, array['image/png', 'image/jpeg', 'image/webp', 'image/gif', 'image/avif'],
        'no image can be stored'),
      (p_bucket || '-context', false, 20971520, array['application/json'],
        'images are refined without the conversation that made them'),
      (p_bucket || '-kept', false, 52428800, null,
        'the daemon makes it when a picture that was paid for cannot be decoded'),
      (v_sources, false, 20971520, array['image/png', 'image/jpeg', 'image/webp'],
        'members can upload no pictures to start from')) b (id, public, size, types, without)
  loop
    step := 'the bucket ' || v_bucket.id;
    -- A bucket that was there before us may hold what members are not to see.
    command := format('with made as (insert into storage.buckets (id, name, public, file_size_limit, allowed_mime_types) '
      'values (%L, %1$L, %2$L, %3$s, %4$L) on conflict do nothing returning id) '
      'update image_jobs.project p set own_buckets = p.own_buckets || made.id from made;',
      v_bucket.id, v_bucket.public, v_bucket.size, v_bucket.types);
    state := case when v_lacks is not null then 'later'
      when v_bucket.id = any (v_seen) or v_bucket.id || ' public' = any (v_seen) then 'there' else 'missing' end;
    note := case when v_lacks is null then v_bucket.without
      else 'Storage has not made all of storage.buckets yet, which lacks ' || v_lacks end;
    return next;
  end loop;

  if p_private and (p_bucket || ' public') = any (v_seen) then
    step := 'the privacy of the bucket ' || p_bucket;
    state := 'missing';
    note := 'IMAGE_JOBS_PRIVATE is set, and its pictures open for whoever has their addresses';
    command := format('update storage.buckets set public = false where id = %L;', p_bucket);
    return next;
  end if;

  for v_policy in
    select p.*, not p.bucket = any (v_own) and (p.bucket = any (v_seen) or p.bucket || ' public' = any (v_seen)) as foreign
    from (values
      ('Members see the pictures of their workflows', p_bucket, 'select', 'using', 'members see no private pictures'),
      ('Members see the sources of their workflows', v_sources, 'select', 'using', 'members do not see what they have uploaded'),
      ('Members add sources to their workflows', v_sources, 'insert', 'with check', 'members can upload no pictures to start from'),
      ('Members delete the sources of their workflows', v_sources, 'delete', 'using', 'members cannot delete what they have uploaded')
    ) p (name, bucket, does, clause, without)
  loop
    step := format('the policy "%s" on storage.objects', v_policy.name);
    command := format('drop policy if exists %I on storage.objects; create policy %1$I on storage.objects for %s to authenticated '
      '%s (bucket_id = %L and %s%s);', v_policy.name, v_policy.does, v_policy.clause, v_policy.bucket, v_mine,
      -- An application's own files lie beside ours, perhaps in folders of users, and anybody may found a workflow of such an id.
      case when v_policy.foreign and v_policy.bucket = p_bucket then v_ours
        when v_policy.does = 'insert' then ' and image_jobs.may_upload(name)' else '' end);
    if v_lack is not null then
      state := 'later';
      note := 'Storage has not made all of its tables yet, which lack ' || v_lack;
    elsif v_seen is null then
      state := 'later';
      note := format('the role %s may not read storage.buckets', current_user);
    elsif exists (
      select from pg_catalog.pg_policies p
      where p.schemaname = 'storage' and p.tablename = 'objects' and p.policyname = v_policy.name
        and strpos(coalesce(p.qual, p.with_check), format('(bucket_id = %L::text)', v_policy.bucket)) > 0
        and (strpos(coalesce(p.qual, p.with_check), 'user_metadata') > 0) = (v_policy.foreign and v_policy.bucket = p_bucket)
        and (strpos(coalesce(p.qual, p.with_check), 'may_upload') > 0) = (v_policy.does = 'insert'))
    then
      state := 'there';
      note := null;
    elsif v_policy.foreign and v_policy.bucket = v_sources then
      state := 'absent';
      note := 'a bucket of the name ' || v_sources || ' was there before, and may hold what members are not to see';
    else
      state := 'missing';
      note := v_policy.without;
    end if;
    return next;
  end loop;
end
$$;
