-- Uploads whose bytes come after their announcement: document and job are there first, and wait for them.
--
--   verb               what it says                                             upload_deadline
--   reserve_document   bytes of this name, size and sha256 are going to come    now + window
--   announce_upload    they should be there: look                               stays
--   confirm_upload     they came through this service, which checked them       null
--   commit_validation  the job has found them and checked them                  null
--   accept_document    the same bytes came whole, by another way                null
--
-- The job waits at its first stage by snooze_job. Whatever it does, it does to what it saw; so each of these verbs wakes it
-- (wake_job), and what it then says of a moment that has passed does not count.
--
-- Locks, each of these verbs: the document's latest job, the document, the user's lane.

-- A user's document that awaits these bytes, with its latest job and itself locked in that order; null where there is none.
create function upload_pipeline.lock_awaited(p_user_id uuid, p_file_sha256 text)
returns upload_pipeline.documents
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_document upload_pipeline.documents;
begin
  select d.* into v_document from upload_pipeline.documents d
   where d.user_id = p_user_id and d.file_sha256 = p_file_sha256;
  if not found then
    return null;
  end if;
  perform upload_pipeline.lock_latest_job(v_document.document_id);
  select d.* into v_document from upload_pipeline.documents d
   where d.document_id = v_document.document_id and d.user_id = p_user_id
     and d.upload_deadline is not null and d.deleted_at is null
     for no key update;
  if not found then
    return null;
  end if;
  return v_document;
end
$$;

-- Raises UP003 where a document of this id is another user's: a session's that was claimed while this was on its way.
create function upload_pipeline.check_no_stranger(p_document_id uuid, p_user_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  if exists (select from upload_pipeline.documents d where d.document_id = p_document_id and d.user_id <> p_user_id) then
    raise exception 'document % belongs to another user by now', p_document_id
      using errcode = 'UP003', hint = 'Send the file as that user.';
  end if;
end
$$;

-- A document's latest job, locked; null where it has none.
create function upload_pipeline.lock_latest_job(p_document_id uuid)
returns upload_pipeline.upload_jobs
language sql
security definer
set search_path = ''
as $$
  select j.* from upload_pipeline.upload_jobs j
   where j.document_id = p_document_id and j.pipeline = 'document'
   order by j.seq desc limit 1
     for no key update
$$;

-- The job of an awaited document looks now: one that waits or works is woken, one that failed while the bytes were awaited
-- starts again. A job that its user has cancelled stays so. The caller has locked job and document.
create function upload_pipeline.look_for_upload(p_job upload_pipeline.upload_jobs)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  if p_job.state = 'deadletter' then
    perform upload_pipeline.retry_job(p_job.job_id);
  else
    perform upload_pipeline.wake_job(p_job.job_id);
  end if;
end
$$;

-- The job of an awaited document as somebody asks for it who has the bytes: their correlation id and priority; one that was
-- cancelled starts again as well, and where there is none it is made. Returns its id. The caller has locked both.
create function upload_pipeline.resume_upload_job(
  p_document_id    uuid,
  p_user_id        uuid,
  p_priority       smallint,
  p_correlation_id text
)
returns uuid
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.lock_latest_job(p_document_id);
begin
  if v_job.job_id is null then
    return (select e.job_id from upload_pipeline.enqueue_job(p_document_id, p_user_id, 'document', p_priority, p_correlation_id) e);
  end if;
  update upload_pipeline.upload_jobs j set priority = p_priority, correlation_id = p_correlation_id
   where j.job_id = v_job.job_id;
  if v_job.state = 'cancelled' or v_job.cancel_requested then
    -- by force: one that is to stop and has not yet is fenced off
    perform upload_pipeline.retry_job(v_job.job_id, p_force => true);
  else
    perform upload_pipeline.look_for_upload(v_job);
  end if;
  return v_job.job_id;
end
$$;

-- Announces bytes that are going to come within p_window: makes document, job and event. The same user and sha256 again:
--   bytes known            the first document and its job, `duplicate`, no deadline
--   bytes still awaited    the same document and job with the newer claim's name, size, type, metadata and deadline; a job that
--                          has ended starts again
-- A document that is being deleted raises UP003.
create function upload_pipeline.reserve_document(
  p_document_id    uuid,
  p_user_id        uuid,
  p_filename       text,
  p_media_type     text,
  p_file_bytes     bigint,
  p_file_sha256    text,
  p_raw_key        text,
  p_window         interval,
  p_metadata       jsonb default '{}',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (document_id uuid, job_id uuid, duplicate boolean, raw_key text, upload_deadline timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now      timestamptz := upload_pipeline.now();
  v_deadline timestamptz := v_now + p_window;
  v_made     boolean;
  v_document upload_pipeline.documents;
  v_job      uuid;
begin
  if p_window is null or p_window <= interval '0' then
    raise exception 'p_window is %, it must be longer than nothing', p_window using errcode = '22023';
  end if;
  -- once more where the document that stood in the way has gone, or got its bytes, since it was met
  loop
    insert into upload_pipeline.documents as d
      (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata, upload_deadline, created_at,
       updated_at)
    values (p_document_id, p_user_id, p_filename, p_media_type, p_file_bytes, p_file_sha256, p_raw_key, p_metadata,
            v_deadline, v_now, v_now)
    -- of any index: told one, a rival that has only just begun breaks the others
    on conflict do nothing
    returning d.* into v_document;
    v_made := found;
    exit when v_made;
    return query
      select f.document_id, f.job_id, true, d.raw_key, null::timestamptz
        from upload_pipeline.find_duplicate(p_user_id, p_file_sha256) f
        join upload_pipeline.documents d on d.document_id = f.document_id;
    if found then
      return;
    end if;
    v_document := upload_pipeline.lock_awaited(p_user_id, p_file_sha256);
    exit when v_document.document_id is not null;
    perform upload_pipeline.check_no_stranger(p_document_id, p_user_id);
  end loop;

  if not v_made then
    update upload_pipeline.documents d
       set filename = p_filename, media_type = p_media_type, file_bytes = p_file_bytes, metadata = p_metadata,
           upload_deadline = v_deadline, updated_at = v_now
     where d.document_id = v_document.document_id;
  end if;
  perform upload_pipeline.record_event('document_reserved', p_user_id => p_user_id,
    p_document_id => v_document.document_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('filename', p_filename, 'media_type', p_media_type, 'file_bytes', p_file_bytes,
                                    'upload_deadline', v_deadline));
  v_job := upload_pipeline.resume_upload_job(v_document.document_id, p_user_id, p_priority, p_correlation_id);
  return query select v_document.document_id, v_job, false, v_document.raw_key, v_deadline;
end
$$;

-- Somebody says that the bytes are there: the job looks now, and the deadline stays, since nobody has checked them yet.
-- Says nothing new of a document that has its bytes. False: there is no such document.
create function upload_pipeline.announce_upload(p_document_id uuid)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job     upload_pipeline.upload_jobs := upload_pipeline.lock_latest_job(p_document_id);
  v_awaited boolean;
begin
  -- the job's lock is enough: whoever ends the wait holds it
  select d.upload_deadline is not null into v_awaited from upload_pipeline.documents d
   where d.document_id = p_document_id and d.deleted_at is null;
  if not found then
    return false;
  end if;
  if v_awaited then
    perform upload_pipeline.look_for_upload(v_job);
  end if;
  return true;
end
$$;

-- The bytes are in place and are those that were announced; p_media_type and p_file_bytes are what they were found to be.
-- Doing it twice is doing it once. False: there is no such document any more. p_created_at tells it from one that was made
-- anew since the sender was let in: the deletion in between may have taken the bytes.
create function upload_pipeline.confirm_upload(
  p_document_id uuid,
  p_created_at  timestamptz,
  p_media_type  text,
  p_file_bytes  bigint
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job      upload_pipeline.upload_jobs := upload_pipeline.lock_latest_job(p_document_id);
  v_document upload_pipeline.documents;
begin
  select d.* into v_document from upload_pipeline.documents d
   where d.document_id = p_document_id and d.created_at = p_created_at and d.deleted_at is null
     for no key update;
  if not found then
    return false;
  end if;
  if v_document.upload_deadline is null then
    return true;
  end if;
  update upload_pipeline.documents d
     set media_type = p_media_type, file_bytes = p_file_bytes, upload_deadline = null, updated_at = upload_pipeline.now()
   where d.document_id = p_document_id;
  perform upload_pipeline.record_event('document_accepted', p_user_id => v_document.user_id, p_document_id => p_document_id,
    p_correlation_id => coalesce(v_job.correlation_id, ''),
    p_payload => jsonb_build_object('filename', v_document.filename, 'media_type', p_media_type, 'file_bytes', p_file_bytes));
  perform upload_pipeline.look_for_upload(v_job);
  return true;
end
$$;

-- queued -> job_validated of a document whose bytes were awaited: they are in the store and are those that were announced.
create function upload_pipeline.commit_validation(
  p_job_id     uuid,
  p_token      bigint,
  p_media_type text,
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job      upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'job_validated');
  v_document upload_pipeline.documents;
begin
  if v_job.stage = 'job_validated' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  -- unless they have come by another way meanwhile, which found the type as well
  update upload_pipeline.documents d
     set media_type = p_media_type, upload_deadline = null, updated_at = upload_pipeline.now()
   where d.document_id = v_job.document_id and d.upload_deadline is not null
  returning d.* into v_document;
  if found then
    perform upload_pipeline.record_event('document_accepted', p_user_id => v_document.user_id,
      p_document_id => v_document.document_id, p_correlation_id => v_job.correlation_id,
      p_payload => jsonb_build_object('filename', v_document.filename, 'media_type', p_media_type,
                                      'file_bytes', v_document.file_bytes));
  end if;
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'queued', 'job_validated', p_keep, p_ttl);
end
$$;
