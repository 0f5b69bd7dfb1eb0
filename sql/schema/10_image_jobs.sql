-- The schema image_jobs: what the daemon calls and what clients must not see. PostgREST never exposes it.
-- Here: the clock, the sequences, and the caller's identity.

create schema if not exists image_jobs;
comment on schema image_jobs is 'Image Job Orchestrator: the daemon''s side. Not exposed to the API.';

-- The ledger: each file of migrations/ writes its own row. That of the Supabase CLI is never touched.
create table image_jobs.migrations (
  version text primary key,
  name text not null,
  hash text,
  applied_at timestamptz not null default now()
);
comment on table image_jobs.migrations is 'The migrations that have run here, by whatever tool.';
comment on column image_jobs.migrations.hash is 'SHA-256 of the file''s block, without comments and white space.';

-- One sequence for all claims (the fencing tokens): a number is never used twice, so an old holder never passes for the new one.
create sequence if not exists image_jobs.claims;
-- The newest ticket of a node's runs owns the node. Equal timestamps and commit order decide nothing.
create sequence if not exists image_jobs.tickets;
-- Versions of nodes only grow, over all nodes: a client merges by them.
create sequence if not exists image_jobs.node_versions;
-- Number events: the audit trail is read by them.
create sequence if not exists image_jobs.event_numbers;

-- Functions that return a value are plpgsql, also where they are one expression: with a search_path of its own none is inlined
-- (and without one Supabase's advisors warn of it), and then plpgsql takes a third of the time.

-- The one clock. Tests move it by the session's setting image_jobs.clock_offset; nothing ever sleeps.
create or replace function image_jobs.now()
returns timestamptz language plpgsql volatile parallel safe set search_path = ''
as $$
begin
  return case when current_setting('image_jobs.clock_offset', true) <> ''
    then clock_timestamp() + current_setting('image_jobs.clock_offset')::interval
    else clock_timestamp() end;
end
$$;

-- Returns the signed-in user, from the JWT that PostgREST has verified; null for anon, for servers, and for an id that is no uuid.
create or replace function image_jobs.current_user_id()
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

-- Returns whether the session acts for an operator (owner, superuser, service_role) and not for an end user.
-- Reads the role that was set, because inside a security definer function, as this one is, current_user is the owner.
create or replace function image_jobs.is_operator()
returns boolean language plpgsql stable security definer set search_path = ''
as $$
declare
  v_role name := case current_setting('role') when 'none' then session_user else current_setting('role') end;
begin
  -- Superusers have every role.
  if pg_has_role(v_role, current_user, 'usage') then
    return true;
  end if;
  return exists (select from pg_catalog.pg_roles r where r.rolname = v_role and r.rolbypassrls);
end
$$;

-- Refuse a user whom no uuid names: there is nobody who could become a member of a workflow.
create or replace function image_jobs.refuse_nameless()
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = '42501', message = 'Your token names no user: its claim sub is not a uuid.',
    hint = 'Sign in with Supabase Auth, or have the token carry a uuid as sub; ids of Clerk or Firebase are none.';
end
$$;

-- Refuse bad input: 22023, which PostgREST returns as 400, with a sentence and a cure.
create or replace function image_jobs.refuse(p_message text, p_hint text)
returns void language plpgsql volatile set search_path = ''
as $$
begin
  raise exception using errcode = '22023', message = p_message, hint = p_hint;
end
$$;
