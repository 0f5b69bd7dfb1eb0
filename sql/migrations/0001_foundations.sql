-- The private schema: clock, sequences, who is asking, and the base64 rule.
-- Every migration may run twice and changes nothing the second time.

set local lock_timeout = '5s';
set local statement_timeout = '10min';

-- A plain Postgres gets the roles that a Supabase database has.
do $$
declare
  v_role text;
begin
  foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
    if not exists (select from pg_roles where rolname = v_role) then
      execute format('create role %I nologin noinherit %s', v_role, case v_role when 'service_role' then 'bypassrls' else '' end);
    end if;
  end loop;
end
$$;

-- The private schema: what the daemon calls and what clients must not see. PostgREST never exposes it.
-- Here: the clock, the sequences, and who is asking.

create schema if not exists private;
comment on schema private is 'Image Job Orchestrator: the daemon''s side. Not exposed to the API.';

-- One sequence for all claims: a number is never used twice, so an old holder can never pass for the new one.
create sequence if not exists private.claims;
-- The newest ticket of a node's runs owns the node. Equal timestamps and commit order decide nothing.
create sequence if not exists private.tickets;
-- Versions of nodes only grow, over all nodes: a client merges by them.
create sequence if not exists private.node_versions;
-- The order of the audit trail.
create sequence if not exists private.event_order;

-- The one clock. Tests move it by the session's setting image_jobs.clock_offset; nothing ever sleeps.
create or replace function private.now()
returns timestamptz language sql volatile parallel safe set search_path = ''
as $$
  select clock_timestamp()
    + coalesce(nullif(current_setting('image_jobs.clock_offset', true), '')::interval, interval '0')
$$;

-- The signed-in user, from the JWT that PostgREST has verified; null for anon, for servers, and for an id that is no uuid.
create or replace function private.current_user_id()
returns uuid language plpgsql stable set search_path = ''
as $$
declare
  v_claims text := nullif(current_setting('request.jwt.claims', true), '');
  v_sub text;
begin
  v_sub := coalesce(nullif(current_setting('request.jwt.claim.sub', true), ''), v_claims::jsonb ->> 'sub');
  return v_sub::uuid;
exception when invalid_text_representation then
  return null;
end
$$;

-- Whether the session acts for an operator (owner, superuser, service_role) and not for an end user.
-- Reads the role that was set, because inside a security definer function current_user is the owner.
create or replace function private.is_operator()
returns boolean language sql stable set search_path = ''
as $$
  select coalesce((
    select r.rolsuper or r.rolbypassrls or pg_has_role(r.oid, c.relowner, 'usage')
    from pg_catalog.pg_roles r, pg_catalog.pg_class c
    where c.oid = 'private.claims'::regclass
      and r.rolname = case current_setting('role') when 'none' then session_user else current_setting('role') end
  ), false)
$$;

-- Refuses bad input: 22023, which PostgREST answers as 400, with a sentence and a cure.
create or replace function private.refuse(p_message text, p_hint text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = '22023', message = p_message, hint = p_hint;
end
$$;

-- Never base64 in the database: the rule behind every check constraint whose name contains `base64`.

-- True if a column's value holds an embedded file. That is:
--   any `data:…;base64,` in any case; or
--   more than 1,024 characters in total of tokens of at least 60 characters in either base64 alphabet, keys included,
--   where http(s) URLs of up to 2,048 characters are not counted.
-- Works on the text of the value with its escape sequences blanked, which is every key and every string in one piece.
create or replace function private.has_base64(p_value jsonb)
returns boolean language plpgsql immutable parallel safe set search_path = ''
as $$
declare
  v_text text := p_value::text;
  v_total bigint;
begin
  if v_text is null then
    return false;
  end if;
  if v_text ~* 'data:[^,]*;base64,' then
    -- Within one string: a key and its value do not make a file between them.
    v_text := regexp_replace(v_text, '\\(u[0-9a-f]{4}|.)', ' ', 'g');
    if v_text ~* 'data:[^,"]*;base64,' then
      return true;
    end if;
  end if;
  if length(v_text) <= 1024 then
    return false;
  end if;
  -- chr(1) cannot stand in the text of a jsonb value, so it can fence the URLs: every second piece is one.
  v_text := regexp_replace(v_text, '\\(u[0-9a-f]{4}|.)', ' ', 'g');
  v_text := regexp_replace(v_text, 'https?://[^\s"<>]+', chr(1) || '\&' || chr(1), 'gi');
  select coalesce(sum(length(token[1])), 0) into v_total
  from string_to_table(v_text, chr(1)) with ordinality as piece (content, place)
  cross join lateral regexp_matches(piece.content, '([A-Za-z0-9+/]{60,}={0,2}|[A-Za-z0-9_-]{60,}={0,2})', 'g') as token
  where piece.place % 2 = 1 or length(piece.content) > 2048;
  return v_total > 1024;
end
$$;
comment on function private.has_base64(jsonb) is 'Whether a jsonb value embeds a file as base64.';
