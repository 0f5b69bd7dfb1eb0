-- Signatures of webhooks: verified before anything else is read.

create table if not exists image_jobs.webhook_secrets (
  provider text not null,
  key bytea not null,
  primary key (provider, key),
  -- With an empty key, forged deliveries would verify.
  constraint webhook_secrets_are_long check (octet_length(key) >= 16)
);
comment on table image_jobs.webhook_secrets is 'The keys that deliveries may be signed with; several while one is replaced.';

-- Returns the HMAC-SHA256 (RFC 2104), by built-in functions alone: pgcrypto is not everywhere.
create or replace function image_jobs.hmac_sha256(p_key bytea, p_message bytea)
returns bytea language plpgsql immutable parallel safe strict set search_path = ''
as $$
declare
  v_key bytea := case when octet_length(p_key) > 64 then sha256(p_key) else p_key end;
  v_inner bytea;
  v_outer bytea;
begin
  v_key := v_key || decode(repeat('00', 64 - octet_length(v_key)), 'hex');
  v_inner := v_key;
  v_outer := v_key;
  for i in 0..63 loop
    v_inner := set_byte(v_inner, i, get_byte(v_key, i) # 54);
    v_outer := set_byte(v_outer, i, get_byte(v_key, i) # 92);
  end loop;
  return sha256(v_outer || sha256(v_inner || p_message));
end
$$;

-- Returns the key that a secret stands for. Standard Webhooks: `whsec_` and base64, or any text as it stands; the other schemes
-- take every text as it stands. Null if it cannot be read.
create or replace function image_jobs.webhook_key(p_provider text, p_secret text)
returns bytea language plpgsql immutable parallel safe set search_path = ''
as $$
begin
  if p_provider not in ('hmac', 'midjourney') and p_secret like 'whsec\_%' then
    return decode(substr(p_secret, 7), 'base64');
  end if;
  return convert_to(p_secret, 'UTF8');
exception when data_exception then
  return null;
end
$$;

-- Replace the secrets of the providers that are named: {"openai": ["whsec_…", …], …}. Others keep theirs.
create or replace function image_jobs.set_webhook_secrets(p_secrets jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  if jsonb_typeof(p_secrets) is distinct from 'object' then
    perform image_jobs.refuse('The webhook secrets must be an object of arrays.', 'Write them like {"openai": ["whsec_…"]}.');
  end if;
  if exists (
    select from jsonb_each(p_secrets) p
    cross join lateral jsonb_array_elements_text(case jsonb_typeof(p.value) when 'array' then p.value else '[]' end) s
    where s.value is not null and image_jobs.webhook_key(p.key, s.value) is null)
  then
    perform image_jobs.refuse('A webhook secret is no base64 behind whsec_.',
      'Copy it again from the provider, with all that it ends in.');
  end if;
  if exists (
    select from jsonb_each(p_secrets) p
    where jsonb_typeof(p.value) <> 'array' or p.value = '[]' or exists (
      select from jsonb_array_elements_text(p.value) s
      where coalesce(octet_length(image_jobs.webhook_key(p.key, s.value)), 0) < 16)
  ) then
    perform image_jobs.refuse('A webhook secret is empty or shorter than 16 bytes.',
      'Use the one the provider gave you, or make one: openssl rand -hex 32.');
  end if;
  delete from image_jobs.webhook_secrets w where p_secrets ? w.provider;
  insert into image_jobs.webhook_secrets (provider, key)
  select p.key, image_jobs.webhook_key(p.key, s.value)
  from jsonb_each(p_secrets) p cross join lateral jsonb_array_elements_text(p.value) s
  on conflict do nothing;
end
$$;

-- Returns a text as JSON; of one that jsonb cannot hold (\u0000, half a surrogate pair, a number too large) only what a delivery is
-- about, if it has at most p_longest bytes: that costs a hundred times as much. Null if it is none.
create or replace function image_jobs.json_or_null(p_text text, p_longest integer)
returns jsonb language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_text text := p_text;
  v_json json;
begin
  begin
    return p_text::jsonb;
  exception when data_exception or statement_too_complex or program_limit_exceeded then
    if octet_length(p_text) > p_longest then
      return null;
    end if;
  end;
  -- Twice: of two escapes in a row the first pass leaves the second. Whole pairs go, too: no id has one.
  for pass in 1..2 loop
    v_text := regexp_replace(
      v_text, '(^|[^\\])((?:\\\\)*)\\u(?:0000|[dD][89a-fA-F][0-9a-fA-F][0-9a-fA-F])', '\1\2\\ufffd', 'g');
  end loop;
  v_json := v_text::json;
  return jsonb_build_object('id', v_json ->> 'id', 'job_id', v_json ->> 'job_id', 'type', v_json ->> 'type',
    'status', v_json ->> 'status', 'state', v_json ->> 'state',
    'data', jsonb_build_object('id', v_json #>> '{data,id}', 'job_id', v_json #>> '{data,job_id}'));
exception when data_exception or statement_too_complex or program_limit_exceeded then
  return null;
end
$$;

-- Returns whether one of the provider's secrets signed p_message and made one of p_signatures, of which there are at most 10.
-- Both sides are digested before they are compared, so the time it takes says nothing about the signature. The HMAC is made
-- once for each secret: who sends it is not known yet, so it must not cost more for more signatures.
create or replace function image_jobs.is_signed(
  p_provider text, p_message text, p_signatures text[], p_prefix text, p_encoding text)
returns boolean language sql stable set search_path = ''
as $$
  with right_ones as materialized (
    select sha256(convert_to(
      p_prefix || encode(image_jobs.hmac_sha256(w.key, convert_to(p_message, 'UTF8')), p_encoding), 'UTF8')) as digest
    from image_jobs.webhook_secrets w
    where w.provider = p_provider and cardinality(p_signatures) <= 10
  )
  select coalesce(bool_or(r.digest = sha256(convert_to(given.signature, 'UTF8'))), false)
  from right_ones r cross join unnest(p_signatures) as given (signature)
$$;

-- Returns the id of a delivery if its signature is right and fresh; null if not. Three schemes:
--   hmac        webhook-signature is the hex HMAC-SHA256 of the body; the same body again is the same delivery
--   midjourney  unsigned callbacks that echo a value of ours: state is '<run id>:<ticket>.<hex HMAC-SHA256 of that>'
--   all others  Standard Webhooks: webhook-id, webhook-timestamp, webhook-signature 'v1,<base64> v1,<base64> …'
create or replace function image_jobs.verified_delivery(p_provider text, p_headers jsonb, p_body text, p_json jsonb)
returns text language plpgsql volatile set search_path = ''
as $$
declare
  v_signature text := p_headers ->> 'webhook-signature';
  v_id text := p_headers ->> 'webhook-id';
  v_at text := p_headers ->> 'webhook-timestamp';
  v_state text := p_json ->> 'state';
begin
  case p_provider
    when 'hmac' then
      if image_jobs.is_signed(p_provider, p_body, array[lower(v_signature)], '', 'hex') then
        return encode(sha256(convert_to(p_body, 'UTF8')), 'hex');
      end if;
    when 'midjourney' then
      if image_jobs.is_signed(p_provider, split_part(v_state, '.', 1), array[lower(split_part(v_state, '.', 2))], '', 'hex')
        and v_state = split_part(v_state, '.', 1) || '.' || split_part(v_state, '.', 2)
      then
        return encode(sha256(convert_to(p_body, 'UTF8')), 'hex');
      end if;
    else
      if length(v_id) between 1 and 200 and length(v_signature) <= 2000 and v_at ~ '^[0-9]{1,12}$'
        and abs(extract(epoch from image_jobs.now()) - v_at::numeric) <= 300
        and image_jobs.is_signed(
          p_provider, v_id || '.' || v_at || '.' || p_body, string_to_array(v_signature, ' '), 'v1,', 'base64')
      then
        return v_id;
      end if;
  end case;
  return null;
end
$$;
