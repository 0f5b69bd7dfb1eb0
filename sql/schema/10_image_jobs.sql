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
