-- Photos: a second pipeline of the same queue. A photo is announced, its bytes come by a signed URL, and a job of pipeline
-- `photo` carries it along. It has one job, ever: where that has ended, it is retried.
--
--   status           the job is
--   pending_upload   at its first stage, and nobody has seen the bytes
--   uploaded         at its first stage, and somebody has (`uploaded_at`); or has checked them
--   processing       between the check and the end
--   completed        done
--   failed           a dead letter, or cancelled
--
-- `photo_status` says so, in one place. The row carries it for lists, written by a trigger at each change of the job that
-- changes it, with an event `photo_status_changed`: whatever verb moves the job, the status has moved with it.
--
-- Locks, each verb here: the photo's job, the photo, the user's lane.

create table upload_pipeline.photos (
  photo_id        uuid primary key,
  project_id      uuid not null,
  organization_id uuid not null,
  -- who has uploaded it
  user_id         uuid not null,
  file_name       text not null,
  file_bytes      bigint not null,
  media_type      text not null,
  raw_key         text not null unique,
  detection_types text[] not null default '{}',
  priority        text not null default 'normal',
  status          text not null default 'pending_upload',
  -- as displayed
  width           integer,
  height          integer,
  exif            jsonb not null default '{}',
  warnings        text[] not null default '{}',
  thumbnail_key   text,
  -- the copy that is handed out in the original's place, which tells no place; null: the original is
  shared_key      text,
  -- of the object that is handed out; null before it was looked at
  file_sha256     text,
  detections      jsonb,
  detector        text,
  -- until when the bytes may come; null once they were checked
  upload_deadline timestamptz,
  -- when somebody first saw that they were there
  uploaded_at     timestamptz,
  created_at      timestamptz not null default upload_pipeline.now(),
  updated_at      timestamptz not null default upload_pipeline.now(),
  deleted_at      timestamptz,
  foreign key (project_id, organization_id) references upload_pipeline.projects (project_id, organization_id),
  -- what a job's composite key points at
  unique (photo_id, user_id),
  constraint photos_file_name check (file_name <> '' and length(file_name) <= 1024),
  constraint photos_bytes check (file_bytes > 0),
  constraint photos_media_type check (media_type in ('image/jpeg', 'image/png')),
  constraint photos_priority check (priority in ('low', 'normal', 'high')),
  constraint photos_status check (status in ('pending_upload', 'uploaded', 'processing', 'completed', 'failed')),
  constraint photos_size check ((width is null) = (height is null) and width > 0 and height > 0),
  constraint photos_sha256 check (file_sha256 ~ '^[0-9a-f]{64}$'),
  constraint photos_exif check (jsonb_typeof(exif) = 'object')
);

-- a project's photos, newest first, page by page; the foreign key to projects
create index photos_listing on upload_pipeline.photos (project_id, created_at desc, photo_id);
-- those of one status
create index photos_status on upload_pipeline.photos (project_id, status, created_at desc, photo_id);
-- begin_photo_expiry
create index photos_awaited on upload_pipeline.photos (upload_deadline)
  where upload_deadline is not null and uploaded_at is null;
-- deletions that a crash left half done
create index photos_deleting on upload_pipeline.photos (deleted_at) where deleted_at is not null;

alter table upload_pipeline.upload_jobs add foreign key (photo_id, user_id)
  references upload_pipeline.photos (photo_id, user_id) on update cascade on delete cascade;

-- one job a photo
create unique index upload_jobs_photo_live on upload_pipeline.upload_jobs (photo_id, pipeline)
  where state in ('queued', 'working', 'retryable') and photo_id is not null;
-- a photo's job; the foreign key to photos
create index upload_jobs_photo on upload_pipeline.upload_jobs (photo_id, seq) where photo_id is not null;

-- A photo's status, of its job and whether the bytes were seen.
create function upload_pipeline.photo_status(p_stage text, p_state upload_pipeline.job_state, p_uploaded boolean)
returns text
language sql
immutable
set search_path = ''
as $$
  select case when p_state in ('deadletter', 'cancelled') then 'failed'
              when p_state = 'done' then 'completed'
              when p_stage = 'pending_upload' and not p_uploaded then 'pending_upload'
              when p_stage in ('pending_upload', 'uploaded') then 'uploaded'
              else 'processing' end
$$;

-- A job's priority within its user's lane, of the word that the photo came with.
create function upload_pipeline.photo_priority(p_priority text)
returns smallint
language sql
immutable
set search_path = ''
as $$ select case p_priority when 'low' then -10 when 'high' then 10 else 0 end::smallint $$;

-- Whether a job that has failed with this code has seen bytes, and refused them.
create function upload_pipeline.is_photo_refusal(p_error_code text)
returns boolean
language sql
immutable
set search_path = ''
as $$
  select p_error_code in ('CHECKSUM_MISMATCH', 'TYPE_MISMATCH', 'UNSUPPORTED_TYPE', 'MALWARE_FOUND', 'FILE_TOO_SMALL',
                          'FILE_TOO_LARGE', 'CORRUPT_FILE', 'CORRUPT_IMAGE', 'IMAGE_TOO_LARGE')
$$;

-- Carries a job's stage and state over to its photo. Who leaves the first stage has seen the bytes, and that they are those;
-- who refuses them there has seen them, too.
create function upload_pipeline.note_photo_status()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now    timestamptz := upload_pipeline.now();
  v_fit    boolean := new.stage <> 'pending_upload';
  v_seen   boolean := v_fit or (new.state = 'deadletter' and exists (
                        select from upload_pipeline.job_outcomes o
                         where o.job_id = new.job_id and upload_pipeline.is_photo_refusal(o.error_code)));
  v_photo  upload_pipeline.photos;
  v_status text;
begin
  select p.* into v_photo from upload_pipeline.photos p where p.photo_id = new.photo_id for no key update;
  if v_photo.deleted_at is not null then
    return null;
  end if;
  v_status := upload_pipeline.photo_status(new.stage, new.state, v_seen or v_photo.uploaded_at is not null);
  if v_status = v_photo.status and not (v_fit and v_photo.upload_deadline is not null) then
    return null;
  end if;
  update upload_pipeline.photos p
     set status = v_status, updated_at = v_now,
         uploaded_at = case when v_seen then coalesce(p.uploaded_at, v_now) else p.uploaded_at end,
         upload_deadline = case when v_fit then null else p.upload_deadline end
   where p.photo_id = new.photo_id;
  if v_status <> v_photo.status then
    insert into upload_pipeline.events (at, code, user_id, job_id, stage, lease_token, correlation_id, payload)
    values (v_now, 'photo_status_changed', new.user_id, new.job_id, new.stage, new.lease_token, new.correlation_id,
            jsonb_build_object('photo_id', new.photo_id, 'status', v_status));
  end if;
  return null;
end
$$;

-- `finished_at` tells ended from live; asked of documents' jobs too, the condition is all that they pay
create trigger note_photo_status after update of stage, state on upload_pipeline.upload_jobs
  for each row
  when (new.photo_id is not null
        and (new.stage is distinct from old.stage or (new.finished_at is null) is distinct from (old.finished_at is null)))
  execute function upload_pipeline.note_photo_status();

-- A photo's job, locked; null where it has none.
create function upload_pipeline.lock_photo_job(p_photo_id uuid)
returns upload_pipeline.upload_jobs
language sql
security definer
set search_path = ''
as $$
  select j.* from upload_pipeline.upload_jobs j where j.photo_id = p_photo_id order by j.seq desc limit 1 for no key update
$$;

-- Announces a photo whose bytes are going to come within p_window: makes photo, job and event. A project that there is not,
-- or of an organisation that the user is not in, raises UP002; a role that may not upload, UP006. A photo of this id that is
-- there breaks the primary key.
create function upload_pipeline.reserve_photo(
  p_photo_id        uuid,
  p_user_id         uuid,
  p_project_id      uuid,
  p_file_name       text,
  p_media_type      text,
  p_file_bytes      bigint,
  p_raw_key         text,
  p_window          interval,
  p_detection_types text[] default '{}',
  p_priority        text default 'normal',
  p_correlation_id  text default ''
)
returns table (photo_id uuid, job_id uuid, upload_deadline timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     uuid;
  v_project record;
  v_first   record;
begin
  if p_window is null or p_window <= interval '0' then
    raise exception 'p_window is %, it must be longer than nothing', p_window using errcode = '22023';
  end if;
  select p.organization_id, m.role into v_project
    from upload_pipeline.projects p
    join upload_pipeline.organization_members m on m.organization_id = p.organization_id and m.user_id = p_user_id
   where p.project_id = p_project_id;
  if not found then
    raise exception 'there is no project %', p_project_id using errcode = 'UP002', hint = 'Check the id.';
  end if;
  if v_project.role = 'viewer' then
    raise exception 'role "viewer" may not upload' using errcode = 'UP006', hint = 'Ask an owner of the organization.';
  end if;
  insert into upload_pipeline.photos
    (photo_id, project_id, organization_id, user_id, file_name, file_bytes, media_type, raw_key, detection_types, priority,
     upload_deadline, created_at, updated_at)
  values (p_photo_id, p_project_id, v_project.organization_id, p_user_id, p_file_name, p_file_bytes, p_media_type, p_raw_key,
          p_detection_types, p_priority, v_now + p_window, v_now, v_now);

  select s.stage, s.pool into v_first from upload_pipeline.stages s where s.pipeline = 'photo' and s.position = 0;
  insert into upload_pipeline.upload_jobs as j
    (photo_id, user_id, pipeline, stage, pool, priority, correlation_id, run_at, created_at, updated_at)
  values (p_photo_id, p_user_id, 'photo', v_first.stage, v_first.pool, upload_pipeline.photo_priority(p_priority),
          left(p_correlation_id, 200), v_now, v_now, v_now)
  returning j.job_id into v_job;
  insert into upload_pipeline.events (at, code, user_id, job_id, stage, correlation_id, payload)
  values (v_now, 'job_enqueued', p_user_id, v_job, v_first.stage, left(p_correlation_id, 200),
          jsonb_build_object('photo_id', p_photo_id)),
         (v_now, 'photo_status_changed', p_user_id, v_job, v_first.stage, left(p_correlation_id, 200),
          jsonb_build_object('photo_id', p_photo_id, 'status', 'pending_upload'));
  perform upload_pipeline.wake_lanes(v_first.pool, array[p_user_id]);
  return query select p_photo_id, v_job, v_now + p_window;
end
$$;

-- Somebody says what a photo's status is now, and has looked: `uploaded` of one that awaits its bytes, whose job then looks
-- at once; it starts again where it had failed without having seen any, in time or for an outage. Of one that is past that
-- nothing changes, so saying it twice is saying it once. Every other status is for the job to reach, and out of any other
-- failure only a retry leads: those raise UP003 and name the status that there is. The deadline stays: nobody has checked
-- the bytes yet. No photo, or one that is being deleted: UP002.
create function upload_pipeline.announce_photo(p_photo_id uuid, p_status text)
returns text
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_job   upload_pipeline.upload_jobs := upload_pipeline.lock_photo_job(p_photo_id);
  v_photo upload_pipeline.photos;
  v_again boolean;
begin
  select p.* into v_photo from upload_pipeline.photos p
   where p.photo_id = p_photo_id and p.deleted_at is null for no key update;
  if not found then
    raise exception 'there is no photo %', p_photo_id using errcode = 'UP002', hint = 'Check the id.';
  end if;
  if p_status = v_photo.status or (p_status = 'uploaded' and v_photo.status in ('processing', 'completed')) then
    return v_photo.status;
  end if;
  v_again := v_job.state = 'deadletter' and v_photo.uploaded_at is null;
  if p_status <> 'uploaded' or not (v_photo.status = 'pending_upload' or v_again) then
    raise exception 'photo % is "%" and cannot become "%"', p_photo_id, v_photo.status, p_status
      using errcode = 'UP003',
            hint = case v_photo.status when 'failed' then 'Retry its job, or delete it and upload it again.'
                                       else 'Only a photo that is "pending_upload" can be said to be "uploaded".' end;
  end if;
  update upload_pipeline.photos p set status = 'uploaded', uploaded_at = v_now, updated_at = v_now where p.photo_id = p_photo_id;
  insert into upload_pipeline.events (at, code, user_id, job_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'photo_status_changed', v_job.user_id, v_job.job_id, v_job.stage, v_job.lease_token, v_job.correlation_id,
          jsonb_build_object('photo_id', p_photo_id, 'status', 'uploaded'));
  if v_again then
    perform upload_pipeline.retry_job(v_job.job_id);
  else
    perform upload_pipeline.wake_job(v_job.job_id);
  end if;
  return 'uploaded';
end
$$;

-- Where the jobs of some photos stand, what went wrong, and what their statuses were, oldest first. Of photos of the
-- caller's organisations, who is `auth.uid()`, read here: jobs and events are otherwise their owner's to read, and a photo
-- is also its uploader's colleagues'. Therefore `security definer`.
create function upload_pipeline.photo_progress(p_photo_ids uuid[])
returns table (
  photo_id uuid, job_id uuid, error_code text, error_message text, error_details jsonb, statuses text[], times timestamptz[]
)
language plpgsql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_organizations uuid[] := upload_pipeline.member_organizations();
begin
  return query
    select p.photo_id, j.job_id,
           case when p.status = 'failed'
                then coalesce(o.error_code, case j.state when 'cancelled' then 'CANCELLED' else 'INTERNAL' end) end,
           case when p.status = 'failed'
                then coalesce(o.error_message, case j.state when 'cancelled' then 'The job was cancelled. Retry it to go on.'
                                                            else 'The job failed.' end) end,
           case when p.status = 'failed' then o.error_details end, h.statuses, h.times
      from unnest(p_photo_ids) a (photo_id)
      join upload_pipeline.photos p on p.photo_id = a.photo_id
     cross join lateral (
       select u.job_id, u.state from upload_pipeline.upload_jobs u where u.photo_id = p.photo_id order by u.seq desc limit 1) j
      left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
     cross join lateral (
       select coalesce(array_agg(e.payload ->> 'status' order by e.event_id), '{}') as statuses,
              coalesce(array_agg(e.at order by e.event_id), '{}') as times
         from upload_pipeline.events e
        where e.job_id = j.job_id and e.code = 'photo_status_changed') h
     where p.organization_id = any (v_organizations) and p.deleted_at is null;
end
$$;

-- Hides a photo and ends its job, whose holder is fenced off. The caller has locked the job. False: there is no such photo.
create function upload_pipeline.start_photo_deletion(
  p_photo_id uuid, p_code upload_pipeline.event_code, p_correlation_id text
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_photo upload_pipeline.photos;
begin
  -- hidden first: then the end of the job is no change of a status that anybody is shown
  update upload_pipeline.photos p set deleted_at = v_now, updated_at = v_now
   where p.photo_id = p_photo_id and p.deleted_at is null
  returning p.* into v_photo;
  if not found then
    return false;
  end if;
  with ended as (
    update upload_pipeline.upload_jobs j
       set state = 'cancelled', cancel_requested = true, lease_token = j.lease_token + 1, worker_id = null,
           lease_expires_at = null, finished_at = v_now, updated_at = v_now
     where j.photo_id = p_photo_id and j.state in ('queued', 'working', 'retryable')
    returning j.job_id, j.user_id, j.stage, j.lease_token, j.correlation_id
  )
  insert into upload_pipeline.events (at, code, user_id, job_id, stage, lease_token, correlation_id)
  select v_now, 'job_cancelled', e.user_id, e.job_id, e.stage, e.lease_token, e.correlation_id from ended e;
  perform upload_pipeline.record_event(p_code, p_user_id => v_photo.user_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('photo_id', p_photo_id, 'project_id', v_photo.project_id, 'file_name', v_photo.file_name));
  return true;
end
$$;

-- Deletion in two steps, as of documents: begin_photo_deletion hides the photo and names its objects' key; then the caller
-- removes the objects; finish_photo_deletion removes the rows. Both are safe to repeat; what a crash leaves between them
-- maintenance finishes. No row: there is no such photo.
create function upload_pipeline.begin_photo_deletion(p_photo_id uuid, p_correlation_id text default '')
returns table (photo_id uuid, raw_key text)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
begin
  perform upload_pipeline.lock_photo_job(p_photo_id);
  perform upload_pipeline.start_photo_deletion(p_photo_id, 'photo_deletion_started', p_correlation_id);
  return query select p.photo_id, p.raw_key from upload_pipeline.photos p where p.photo_id = p_photo_id;
end
$$;

create function upload_pipeline.finish_photo_deletion(p_photo_id uuid, p_correlation_id text default '')
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_photo upload_pipeline.photos;
begin
  -- the job before the photo, which takes it along
  perform upload_pipeline.lock_photo_job(p_photo_id);
  delete from upload_pipeline.photos p
   where p.photo_id = p_photo_id and p.deleted_at is not null
  returning p.* into v_photo;
  if not found then
    return false;
  end if;
  perform upload_pipeline.record_event('photo_deleted', p_user_id => v_photo.user_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('photo_id', p_photo_id, 'project_id', v_photo.project_id));
  return true;
end
$$;

-- Deletions begun before p_before and not finished.
create function upload_pipeline.unfinished_photo_deletions(p_before timestamptz, p_limit integer default 100)
returns table (photo_id uuid, raw_key text)
language sql
stable
security definer
set search_path = ''
as $$
  select p.photo_id, p.raw_key from upload_pipeline.photos p
   where p.deleted_at is not null and p.deleted_at < p_before
   order by p.deleted_at limit p_limit
$$;

-- Photos that were announced and did not come: p_grace after the deadline their deletion begins. Returns them. That they did
-- not come their job says, which has looked after the deadline, or its user has cancelled it. One that has not looked yet has
-- the time that it takes; one that has failed without having seen bytes looks again. Any worker runs it, bounded, beside
-- others; a photo whose job another transaction holds is for the next round.
create function upload_pipeline.begin_photo_expiry(p_grace interval, p_limit integer default 100)
returns table (photo_id uuid, raw_key text)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_before timestamptz := upload_pipeline.now() - p_grace;
  v_photo  record;
  v_job    upload_pipeline.upload_jobs;
begin
  for v_photo in
    select p.photo_id, p.raw_key, j.job_id
      from upload_pipeline.photos p
     cross join lateral (
       select u.job_id, u.state from upload_pipeline.upload_jobs u where u.photo_id = p.photo_id order by u.seq desc limit 1) j
     where p.upload_deadline < v_before and p.uploaded_at is null and p.deleted_at is null
       and j.state in ('deadletter', 'cancelled')
     order by p.upload_deadline limit p_limit
  loop
    select j.* into v_job from upload_pipeline.upload_jobs j
     where j.job_id = v_photo.job_id and j.state in ('deadletter', 'cancelled') for no key update skip locked;
    continue when not found;
    -- they may have come since the look above; who says so holds the job
    continue when not exists (select from upload_pipeline.photos p
                               where p.photo_id = v_photo.photo_id and p.uploaded_at is null and p.deleted_at is null);
    if v_job.state = 'deadletter'
       and not exists (select from upload_pipeline.job_outcomes o
                        where o.job_id = v_job.job_id and o.error_code = 'UPLOAD_EXPIRED') then
      perform upload_pipeline.retry_job(v_job.job_id);
      continue;
    end if;
    perform upload_pipeline.start_photo_deletion(v_photo.photo_id, 'photo_expired', '');
    photo_id := v_photo.photo_id;
    raw_key := v_photo.raw_key;
    return next;
  end loop;
end
$$;
