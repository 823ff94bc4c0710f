-- Organisations, who is in them, and their projects. What belongs to a project is its organisation's: every member sees
-- it, and nobody else learns that it is there.
--
--   role      may
--   owner     all that an admin may
--   admin     upload, say that a file has come, delete what anybody has uploaded
--   member    upload, say that a file has come, delete what they have uploaded themselves
--   viewer    look
--
-- Members, roles and projects are set by who runs the service (`upload-pipeline organizations`, `projects`).

create table upload_pipeline.organizations (
  organization_id uuid primary key default gen_random_uuid(),
  name            text not null unique,
  created_at      timestamptz not null default upload_pipeline.now(),
  constraint organizations_name check (name <> '' and length(name) <= 200)
);

create table upload_pipeline.organization_members (
  organization_id uuid not null references upload_pipeline.organizations on delete cascade,
  user_id         uuid not null,
  role            text not null,
  created_at      timestamptz not null default upload_pipeline.now(),
  primary key (organization_id, user_id),
  constraint organization_members_role check (role in ('owner', 'admin', 'member', 'viewer')),
  constraint organization_members_user check (user_id <> '00000000-0000-0000-0000-000000000000')
);

-- member_organizations: where a user is a member
create index organization_members_user on upload_pipeline.organization_members (user_id, organization_id);

create table upload_pipeline.projects (
  project_id      uuid primary key default gen_random_uuid(),
  organization_id uuid not null references upload_pipeline.organizations,
  name            text not null,
  -- photos of it are handed out without the place where they were taken
  drop_gps        boolean not null default false,
  created_at      timestamptz not null default upload_pipeline.now(),
  unique (organization_id, name),
  -- what the children's composite keys point at: a child can never name another organisation
  unique (project_id, organization_id),
  constraint projects_name check (name <> '' and length(name) <= 200)
);

-- The organisations of the caller, who is `auth.uid()`. What policies ask: `security definer`, since a policy of members
-- that read members would ask itself.
create function upload_pipeline.member_organizations()
returns uuid[]
language sql
stable
security definer
set search_path = ''
as $$
  select coalesce(array_agg(m.organization_id), '{}') from upload_pipeline.organization_members m where m.user_id = auth.uid()
$$;

create function upload_pipeline.add_organization(p_name text)
returns uuid
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_organization uuid;
begin
  insert into upload_pipeline.organizations (name, created_at) values (p_name, upload_pipeline.now())
  on conflict (name) do nothing
  returning organization_id into v_organization;
  if not found then
    raise exception 'there is an organization "%" already', p_name
      using errcode = 'UP003', hint = 'Choose another name, or use that one.';
  end if;
  return v_organization;
end
$$;

-- Makes a user a member with this role, or gives a member this role. The last owner's role cannot be taken: UP003.
create function upload_pipeline.set_member(p_organization_id uuid, p_user_id uuid, p_role text)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  -- one change of an organisation at a time, so that two owners cannot step down at once
  perform from upload_pipeline.organizations o where o.organization_id = p_organization_id for no key update;
  if not found then
    raise exception 'there is no organization %', p_organization_id
      using errcode = 'UP002', hint = '`upload-pipeline organizations list` shows those that there are.';
  end if;
  insert into upload_pipeline.organization_members as m (organization_id, user_id, role, created_at)
  values (p_organization_id, p_user_id, p_role, upload_pipeline.now())
  on conflict (organization_id, user_id) do update set role = excluded.role;
  perform upload_pipeline.check_owner(p_organization_id);
end
$$;

-- Ends a membership. False where there is none. What the user has uploaded stays the organisation's.
create function upload_pipeline.remove_member(p_organization_id uuid, p_user_id uuid)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
begin
  perform from upload_pipeline.organizations o where o.organization_id = p_organization_id for no key update;
  delete from upload_pipeline.organization_members m where m.organization_id = p_organization_id and m.user_id = p_user_id;
  if not found then
    return false;
  end if;
  perform upload_pipeline.check_owner(p_organization_id);
  return true;
end
$$;

-- Raises UP003 where an organisation that has members has no owner.
create function upload_pipeline.check_owner(p_organization_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  if exists (select from upload_pipeline.organization_members m where m.organization_id = p_organization_id)
     and not exists (select from upload_pipeline.organization_members m
                      where m.organization_id = p_organization_id and m.role = 'owner') then
    raise exception 'organization % would have members and no owner', p_organization_id
      using errcode = 'UP003', hint = 'Make another member the owner first.';
  end if;
end
$$;

create function upload_pipeline.add_project(p_organization_id uuid, p_name text, p_drop_gps boolean default false)
returns uuid
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_project uuid;
begin
  perform from upload_pipeline.organizations o where o.organization_id = p_organization_id;
  if not found then
    raise exception 'there is no organization %', p_organization_id
      using errcode = 'UP002', hint = '`upload-pipeline organizations list` shows those that there are.';
  end if;
  insert into upload_pipeline.projects (organization_id, name, drop_gps, created_at)
  values (p_organization_id, p_name, p_drop_gps, upload_pipeline.now())
  on conflict (organization_id, name) do nothing
  returning project_id into v_project;
  if not found then
    raise exception 'the organization has a project "%" already', p_name
      using errcode = 'UP003', hint = 'Choose another name, or use that one.';
  end if;
  return v_project;
end
$$;

-- Changes what is given of a project; null leaves it. Photos that were processed before stay as they are.
create function upload_pipeline.set_project(p_project_id uuid, p_name text default null, p_drop_gps boolean default null)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  update upload_pipeline.projects p set name = coalesce(p_name, p.name), drop_gps = coalesce(p_drop_gps, p.drop_gps)
   where p.project_id = p_project_id;
  if not found then
    raise exception 'there is no project %', p_project_id
      using errcode = 'UP002', hint = '`upload-pipeline projects list` shows those that there are.';
  end if;
exception when unique_violation then
  raise exception 'the organization has a project "%" already', p_name
    using errcode = 'UP003', hint = 'Choose another name.';
end
$$;
