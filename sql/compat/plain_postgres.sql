-- What the migrations take from Supabase, for a Postgres that is not Supabase: roles, schema `auth`, pgvector.
--
-- Applied by `upload-pipeline migrate` before the first migration where there is no schema `auth`; never a part of
-- the Supabase migrations. Running it again changes nothing. It needs a superuser, or a role that may create roles
-- (on Postgres 15 also with BYPASSRLS: a superuser) on a server where pgvector is already installed.

-- Roles belong to the server and not to the database, so another database may have made them, also at this moment.
do $$
declare
  v_role text;
begin
  foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
    if exists (select from pg_catalog.pg_roles where rolname = v_role) then
      continue;
    end if;
    begin
      execute format(
        'create role %I nologin inherit %s', v_role,
        case when v_role = 'service_role' then 'bypassrls' else '' end);
      if v_role = 'anon' then
        alter role anon set statement_timeout = '3s';
      elsif v_role = 'authenticated' then
        alter role authenticated set statement_timeout = '8s';
      end if;
    exception
      when duplicate_object or unique_violation then null;
    end;
  end loop;
end
$$;

create schema if not exists extensions;
grant usage on schema extensions to anon, authenticated, service_role;

create extension if not exists vector with schema extensions;

do $$
declare
  v_schema text := (
    select e.extnamespace::regnamespace::text from pg_catalog.pg_extension as e where e.extname = 'vector');
begin
  if v_schema <> 'extensions' then
    raise exception 'pgvector is installed in schema %, and it is needed in schema extensions', v_schema
      using hint = 'Run: alter extension vector set schema extensions; and give other users of the type that search path.';
  end if;
end
$$;

create schema if not exists auth;
grant usage on schema auth to anon, authenticated, service_role;

create table if not exists auth.users (
  id                 uuid primary key,
  aud                text,
  role               text,
  email              text,
  raw_app_meta_data  jsonb,
  raw_user_meta_data jsonb,
  created_at         timestamptz default now(),
  updated_at         timestamptz default now()
);

-- The caller, from the claims that the API sets for its transaction: all of them as JSON in `request.jwt.claims`, or
-- one in `request.jwt.claim.<name>` as older gateways do. A setting that a past transaction had is '', not NULL.
create or replace function auth.uid()
returns uuid
language sql
stable
as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid
$$;

create or replace function auth.role()
returns text
language sql
stable
as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.role', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
  )
$$;

create or replace function auth.email()
returns text
language sql
stable
as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.email', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'email'
  )
$$;

create or replace function auth.jwt()
returns jsonb
language sql
stable
as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')
  )::jsonb
$$;
