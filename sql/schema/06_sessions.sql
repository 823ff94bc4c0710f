-- Anonymous sessions. A browser without credentials is a user of its own: a fresh id that nobody can sign in as, an ordinary
-- owner under row-level security. What it has uploaded becomes a signed-in user's by claim_session, or goes when its time
-- is over. Nobody reads these tables: the functions below say what has to be known.
--
-- Locks: the session first; then as everywhere jobs in id order, documents, batches, lanes.

-- One row a session. Its cookie is random (256 bits) and is not kept: a plain SHA-256 of it cannot be guessed back. No
-- address and no name of a browser is kept either.
create table upload_pipeline.sessions (
  session_id   uuid primary key default gen_random_uuid(),
  user_id      uuid not null unique default gen_random_uuid(),
  token_sha256 text not null unique,
  created_at   timestamptz not null default upload_pipeline.now(),
  last_seen_at timestamptz not null default upload_pipeline.now(),
  expires_at   timestamptz not null,
  claimed_by   uuid,
  claimed_at   timestamptz,
  ended_at     timestamptz,
  constraint sessions_token check (token_sha256 ~ '^[0-9a-f]{64}$'),
  constraint sessions_claim check ((claimed_by is null) = (claimed_at is null) and claimed_by <> user_id)
);

-- sessions_to_clean: those that were over first
create index sessions_over on upload_pipeline.sessions (least(expires_at, ended_at, claimed_at), session_id);
-- sessions_to_clean: those that may have got documents since; no more than a grace time has claims
create index sessions_claimed on upload_pipeline.sessions (claimed_at) where claimed_at is not null;

-- What a claim has done with each document of a session: moved, or given up for the one with the same bytes that the user
-- had. It outlives the documents, so that a claim that is asked again answers the same.
create table upload_pipeline.claimed_documents (
  session_id           uuid not null references upload_pipeline.sessions on delete cascade,
  document_id          uuid not null,
  existing_document_id uuid,
  primary key (session_id, document_id)
);

-- What stays of the documents of sessions that nobody has claimed: that a file was processed, and how that went. Nothing
-- says whose it was; `session_id` is there only until the session's row goes.
create table upload_pipeline.processing_records (
  document_id  uuid primary key,
  session_id   uuid references upload_pipeline.sessions on delete set null,
  filename     text not null,
  file_bytes   bigint not null,
  media_type   text not null,
  uploaded_at  timestamptz not null,
  completed_at timestamptz,
  status       text not null,
  error_code   text,
  recorded_at  timestamptz not null default upload_pipeline.now()
);

create index processing_records_session on upload_pipeline.processing_records (session_id) where session_id is not null;

-- claim_session, clean_session: what has happened to a user's documents themselves, and batches; what has happened to jobs
-- is found by them
create index events_of_no_job on upload_pipeline.events (user_id) where job_id is null;

-- Of a session's document that goes, for whatever reason, the audit trail keeps what happened and not to whom: its jobs go
-- with it, and afterwards nobody could find their events.
create function upload_pipeline.forget_session_document()
returns trigger
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
begin
  if exists (select from upload_pipeline.sessions s where s.user_id = old.user_id) then
    update upload_pipeline.events e set user_id = null, correlation_id = ''
     where e.user_id = old.user_id
       and e.job_id in (select j.job_id from upload_pipeline.upload_jobs j where j.document_id = old.document_id);
  end if;
  return old;
end
$$;

create trigger forget_session_document before delete on upload_pipeline.documents
  for each row execute function upload_pipeline.forget_session_document();

create function upload_pipeline.open_session(p_token_sha256 text, p_life interval)
returns table (session_id uuid, user_id uuid, expires_at timestamptz)
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.sessions (token_sha256, created_at, last_seen_at, expires_at)
  values (p_token_sha256, upload_pipeline.now(), upload_pipeline.now(), upload_pipeline.now() + p_life)
  returning session_id, user_id, expires_at
$$;

-- The session of a cookie, where it is not over; its end moves to p_life from now. That is written once an hour, or, of a
-- life shorter than a day, once in a 24th of it: a busy session is not a busy row. `slid` where this call wrote it. A row that
-- another call holds is being written there.
create function upload_pipeline.find_session(p_token_sha256 text, p_life interval)
returns table (session_id uuid, user_id uuid, expires_at timestamptz, slid boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_session upload_pipeline.sessions;
begin
  select s.* into v_session from upload_pipeline.sessions s
   where s.token_sha256 = p_token_sha256 and s.ended_at is null and s.claimed_at is null and s.expires_at > v_now;
  if not found then
    return;
  end if;
  if v_session.last_seen_at < v_now - least(interval '1 hour', p_life / 24) then
    return query
      update upload_pipeline.sessions s set last_seen_at = v_now, expires_at = v_now + p_life
        from (select n.session_id from upload_pipeline.sessions n
               where n.session_id = v_session.session_id and n.ended_at is null and n.claimed_at is null
                 and n.last_seen_at = v_session.last_seen_at
                 for no key update skip locked) n
       where s.session_id = n.session_id
      returning s.session_id, s.user_id, s.expires_at, true;
    if found then
      return;
    end if;
  end if;
  return query select v_session.session_id, v_session.user_id, v_session.expires_at, false;
end
$$;

-- Ends a session at once. False where there is none that could be ended. Its documents stay until it is cleaned.
create function upload_pipeline.end_session(p_token_sha256 text)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
begin
  update upload_pipeline.sessions s set ended_at = upload_pipeline.now()
   where s.token_sha256 = p_token_sha256 and s.ended_at is null and s.claimed_at is null
     and s.expires_at > upload_pipeline.now();
  return found;
end
$$;

-- Makes a claimed session's documents the user's, those that it has now, with all that hangs on them. The caller has locked
-- the session.
--
-- Ids stay; so do the objects, whose keys name whose upload they were. A job at work goes on: its fence is a token and no
-- user. It counts for the user's cap from now on, so there may be more at work than the cap allows, until they end.
--
-- A document whose bytes the user has already is not moved: its deletion begins, and members of batches name the user's
-- own from now on. One stays for the next call: while the user's own document of the same bytes is being deleted, or
-- waits for its upload and this one does not.
create function upload_pipeline.move_session_documents(p_session_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_session   upload_pipeline.sessions;
  v_jobs      uuid[];
  v_document  upload_pipeline.documents;
  v_existing  upload_pipeline.documents;
  v_lanes     record;
begin
  select s.* into v_session from upload_pipeline.sessions s where s.session_id = p_session_id;
  select array_agg(j.job_id) into v_jobs
    from (select l.job_id from upload_pipeline.upload_jobs l where l.user_id = v_session.user_id
           order by l.job_id for no key update) j;

  for v_document in
    select d.* from upload_pipeline.documents d
     where d.user_id = v_session.user_id and d.deleted_at is null
       -- one that came since the jobs were locked is for the next call
       and not exists (select from upload_pipeline.upload_jobs j
                        where j.document_id = d.document_id and not j.job_id = any (coalesce(v_jobs, '{}')))
     -- two claims of one user meet each other's files in the same order
     order by d.file_sha256
       for update
  loop
    loop
      select e.* into v_existing from upload_pipeline.documents e
       where e.user_id = v_session.claimed_by and e.file_sha256 = v_document.file_sha256;
      if not found then
        begin
          update upload_pipeline.documents d set user_id = v_session.claimed_by, updated_at = upload_pipeline.now()
           where d.document_id = v_document.document_id;
          insert into upload_pipeline.claimed_documents (session_id, document_id) values (p_session_id, v_document.document_id);
          exit;
        exception when unique_violation then
          continue; -- the user has uploaded the same bytes since the look above
        end;
      end if;

      exit when v_existing.deleted_at is not null;
      if v_existing.upload_deadline is not null and v_document.upload_deadline is null then
        exit when exists (select from upload_pipeline.upload_jobs j
                           where j.document_id = v_existing.document_id and j.state in ('queued', 'working', 'retryable'));
        -- announced, and it never came: what did come takes its place
        perform upload_pipeline.begin_deletion(v_existing.document_id);
        perform upload_pipeline.finish_deletion(v_existing.document_id);
        continue;
      end if;

      insert into upload_pipeline.claimed_documents (session_id, document_id, existing_document_id)
      values (p_session_id, v_document.document_id, v_existing.document_id);
      update upload_pipeline.batch_members m
         set document_id = v_existing.document_id, job_id = j.job_id, duplicate = true
        from (select u.job_id from upload_pipeline.upload_jobs u
               where u.document_id = v_existing.document_id and u.pipeline = 'document' order by u.seq desc limit 1) j
       where m.document_id = v_document.document_id;
      perform upload_pipeline.begin_deletion(v_document.document_id);
      exit;
    end loop;
  end loop;

  -- what is told of them is told to the user: also of those given up, whose jobs are there until their deletion ends
  select array_agg(j.job_id) into v_jobs
    from upload_pipeline.claimed_documents c
    join upload_pipeline.upload_jobs j on j.document_id = c.document_id
   where c.session_id = p_session_id;
  update upload_pipeline.job_outcomes o set user_id = v_session.claimed_by
   where o.job_id = any (v_jobs) and o.user_id = v_session.user_id;
  update upload_pipeline.events e set user_id = v_session.claimed_by
   where e.job_id = any (v_jobs) and e.user_id = v_session.user_id;
  update upload_pipeline.events e set user_id = v_session.claimed_by
   where e.job_id is null and e.user_id = v_session.user_id
     and (e.document_id is null
          or e.document_id in (select c.document_id from upload_pipeline.claimed_documents c where c.session_id = p_session_id));
  update upload_pipeline.batches b set user_id = v_session.claimed_by where b.user_id = v_session.user_id;
  update upload_pipeline.usage_records r set user_id = v_session.claimed_by where r.user_id = v_session.user_id;
  perform upload_pipeline.move_user_vectors(v_session.user_id, v_session.claimed_by);
  for v_lanes in
    select j.pool from upload_pipeline.upload_jobs j
     where j.job_id = any (v_jobs) and j.state = 'queued' group by j.pool order by j.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, array[v_session.claimed_by]);
  end loop;
end
$$;

-- Makes a session's documents a user's, once, and ends the session. The same user again: the same answer, and documents
-- follow that came late, from a request that was under way. A session that there is not, or that is over otherwise, raises
-- UP002; one that another user has claimed, UP003.
--
--   documents    moved, of all calls so far; their ids are the same as before
--   duplicates   given up for existing_documents, place by place
--   remaining    those for the next call; maintenance calls as well
create function upload_pipeline.claim_session(p_token_sha256 text, p_user_id uuid)
returns table (
  session_id uuid, user_id uuid, documents uuid[], duplicates uuid[], existing_documents uuid[], remaining integer
)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_session upload_pipeline.sessions;
begin
  select s.* into v_session from upload_pipeline.sessions s where s.token_sha256 = p_token_sha256 for update;
  if not found or (v_session.claimed_by is null
                   and (v_session.ended_at is not null or v_session.expires_at <= upload_pipeline.now())) then
    raise exception 'there is no such session, or it is over' using errcode = 'UP002';
  end if;
  if v_session.claimed_by <> p_user_id then
    raise exception 'the session was claimed by another user' using errcode = 'UP003';
  end if;
  update upload_pipeline.sessions s set claimed_by = p_user_id, claimed_at = upload_pipeline.now()
   where s.session_id = v_session.session_id and s.claimed_by is null;
  perform upload_pipeline.move_session_documents(v_session.session_id);
  return query
    select v_session.session_id, v_session.user_id,
           coalesce(array_agg(c.document_id order by c.document_id) filter (where c.existing_document_id is null), '{}'),
           coalesce(array_agg(c.document_id order by c.document_id) filter (where c.existing_document_id is not null), '{}'),
           coalesce(array_agg(c.existing_document_id order by c.document_id) filter (where c.existing_document_id is not null), '{}'),
           (select count(*)::integer from upload_pipeline.documents d
             where d.user_id = v_session.user_id and d.deleted_at is null)
      from upload_pipeline.claimed_documents c where c.session_id = v_session.session_id;
end
$$;

-- Sessions that have been over for longer than p_grace, and claimed ones that have a document left, as many of each.
create function upload_pipeline.sessions_to_clean(p_grace interval, p_limit integer default 100)
returns table (session_id uuid)
language sql
stable
security definer
set search_path = ''
set enable_seqscan = off
as $$
  (select s.session_id from upload_pipeline.sessions s
    where least(s.expires_at, s.ended_at, s.claimed_at) < upload_pipeline.now() - p_grace
    order by least(s.expires_at, s.ended_at, s.claimed_at), s.session_id limit p_limit)
  union
  (select s.session_id from upload_pipeline.sessions s
    where s.claimed_at is not null
      and exists (select from upload_pipeline.documents d where d.user_id = s.user_id and d.deleted_at is null)
    limit p_limit)
$$;

-- Cleans a session that is over. Of one that was claimed the documents that came late follow, whenever this is called. Of any
-- other, once it has been over for p_grace, the documents go (their deletion begins here; who removes objects ends it), and a
-- record without an owner stays of each. After p_grace, once there is no document left, the session goes too, and with it
-- whatever tells whose the records were. Returns how many deletions have begun, and whether the session is gone. A session
-- that another call holds is being cleaned there.
create function upload_pipeline.clean_session(p_session_id uuid, p_grace interval)
returns table (documents integer, removed boolean)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_session  upload_pipeline.sessions;
  v_document uuid;
  v_count    integer := 0;
begin
  select s.* into v_session from upload_pipeline.sessions s
   where s.session_id = p_session_id
     and (s.claimed_at is not null or least(s.expires_at, s.ended_at) < upload_pipeline.now() - p_grace)
     for update skip locked;
  if not found then
    return query select 0, false;
    return;
  end if;

  if v_session.claimed_by is not null then
    perform upload_pipeline.move_session_documents(p_session_id);
  else
    perform from upload_pipeline.upload_jobs j where j.user_id = v_session.user_id order by j.job_id for no key update;
    -- with the documents that they were made of; and what came late, when this is called again
    perform upload_pipeline.forget_user_vectors(v_session.user_id);
    for v_document in
      select d.document_id from upload_pipeline.documents d
       where d.user_id = v_session.user_id and d.deleted_at is null
       order by d.document_id limit 1000
    loop
      perform upload_pipeline.begin_deletion(v_document);
      insert into upload_pipeline.processing_records
        (document_id, session_id, filename, file_bytes, media_type, uploaded_at, completed_at, status, error_code, recorded_at)
      select h.document_id, p_session_id, h.filename, h.file_bytes, h.media_type, h.uploaded_at, h.completed_at, h.status,
             h.error_code, upload_pipeline.now()
        from upload_pipeline.upload_history h where h.document_id = v_document
      on conflict (document_id) do nothing;
      v_count := v_count + 1;
    end loop;
  end if;

  if least(v_session.expires_at, v_session.ended_at, v_session.claimed_at) >= upload_pipeline.now() - p_grace
     or exists (select from upload_pipeline.documents d where d.user_id = v_session.user_id) then
    return query select v_count, false;
    return;
  end if;
  update upload_pipeline.events e set user_id = null, correlation_id = ''
   where e.job_id is null and e.user_id = v_session.user_id;
  update upload_pipeline.usage_records r set user_id = null where r.user_id = v_session.user_id;
  delete from upload_pipeline.batches b where b.user_id = v_session.user_id;
  delete from upload_pipeline.lanes l
   where l.user_id = v_session.user_id and l.pool in (select s.pool from upload_pipeline.stages s);
  delete from upload_pipeline.sessions s where s.session_id = p_session_id;
  return query select v_count, true;
end
$$;
