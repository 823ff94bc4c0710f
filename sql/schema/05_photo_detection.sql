-- Detection in photos: detecting -> completed, by the worker that has the answer (commit_detections), or by the answer
-- itself, which comes by a callback at whatever time (answer_detections).
--
--   the photo's job is                          a callback
--   at "detecting", queued, snoozed or failed   ends it; also while a worker is busy with it, who is fenced off
--     before and to be tried again
--   a dead letter that no answer made           ends it too: an answer that is late is still an answer
--   done, or a dead letter by an answer         the same answer again: nothing changes; another one: UP003
--   anything else                               UP003
--
-- Locks, each verb here: the photo's job, the photo, its request, the user's lane.

-- What was sent to a model that answers later, one row a photo. `delivery_id` stays until there is an answer, `attempt`
-- counts the deliveries under it. `retry_count` is the job's when it was sent last: a job that has failed since, or whose
-- worker died before it said so, sends again. `lease_token` is the lease that it was sent under; `answered_token` the one
-- that the answer took away, so that its holder learns why.
create table upload_pipeline.photo_detection_requests (
  photo_id       uuid primary key references upload_pipeline.photos on delete cascade,
  delivery_id    uuid not null,
  attempt        integer not null,
  retry_count    smallint not null,
  lease_token    bigint not null,
  sent_at        timestamptz not null,
  expires_at     timestamptz not null,
  answered_at    timestamptz,
  answered_token bigint,
  answer_sha256  text,
  constraint photo_detection_requests_attempt check (attempt >= 1),
  constraint photo_detection_requests_answer check (
    (answered_at is null) = (answer_sha256 is null) and (answered_at is null) = (answered_token is null)),
  constraint photo_detection_requests_sha256 check (answer_sha256 ~ '^[0-9a-f]{64}$')
);

-- Writes what was found into a photo. The warning that nobody has looked is there exactly where nobody has.
create function upload_pipeline.set_detections(p_photo_id uuid, p_detector text, p_detections jsonb)
returns void
language sql
security definer
set search_path = ''
as $$
  update upload_pipeline.photos p
     set detections = p_detections, detector = p_detector, updated_at = upload_pipeline.now(),
         warnings = array_remove(p.warnings, 'Detection is off.')
                    || case when p_detector = 'none' then array['Detection is off.'] else '{}'::text[] end
   where p.photo_id = p_photo_id
$$;

-- A job's results at its end: who has looked, how much there is, and what it cost.
create function upload_pipeline.detection_results(p_job_id uuid, p_detector text, p_detections jsonb)
returns jsonb
language sql
security definer
set search_path = ''
as $$
  select jsonb_build_object('detector', p_detector, 'detections', jsonb_array_length(p_detections))
         || upload_pipeline.job_cost(p_job_id)
$$;

-- detecting -> completed: what the worker's detector found; null where detection is off.
create function upload_pipeline.commit_detections(
  p_job_id     uuid,
  p_token      bigint,
  p_detector   text,
  p_detections jsonb,
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'completed');
begin
  if v_job.stage = 'completed' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  perform upload_pipeline.set_detections(v_job.photo_id, p_detector, p_detections);
  return query select * from upload_pipeline.advance_job(
    p_job_id, p_token, 'detecting', 'completed', p_keep, p_ttl,
    upload_pipeline.detection_results(p_job_id, p_detector, p_detections));
end
$$;

-- Notes that a message was taken, and snoozes the job until p_wait is over. Where the answer was here first, the job is
-- wherever that has brought it, and nothing is written. Asked again because its own answer was lost: the same.
create function upload_pipeline.await_detections(
  p_job_id      uuid,
  p_token       bigint,
  p_delivery_id uuid,
  p_attempt     integer,
  p_wait        interval
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     upload_pipeline.upload_jobs;
  v_request upload_pipeline.photo_detection_requests;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  select r.* into v_request from upload_pipeline.photo_detection_requests r where r.photo_id = v_job.photo_id for update;
  if v_request.answered_token is distinct from p_token
     and (v_request.lease_token is distinct from p_token or v_job.lease_token <> p_token
          or v_job.lease_expires_at is not null) then
    perform upload_pipeline.check_lease(p_job_id, p_token);
    insert into upload_pipeline.photo_detection_requests as r
      (photo_id, delivery_id, attempt, retry_count, lease_token, sent_at, expires_at)
    values (v_job.photo_id, p_delivery_id, p_attempt, v_job.retry_count, p_token, v_now, v_now + p_wait)
    on conflict (photo_id) do update
      set delivery_id = excluded.delivery_id, attempt = excluded.attempt, retry_count = excluded.retry_count,
          lease_token = excluded.lease_token, sent_at = excluded.sent_at, expires_at = excluded.expires_at,
          answered_at = null, answered_token = null, answer_sha256 = null;
    perform upload_pipeline.snooze_job(p_job_id, p_token, p_wait);
  end if;
  return query select j.job_id, j.stage, j.state from upload_pipeline.upload_jobs j where j.job_id = p_job_id;
end
$$;

-- Ends a photo's job by the answer of a model: by detections, or, where p_error is given, as a dead letter with that text.
-- The job is leased for the length of this transaction: whoever holds it is fenced off, and then the queue's own verbs
-- end it. p_answer_sha256 tells one answer from another. False: this answer has been given before, nothing has changed.
create function upload_pipeline.answer_detections(
  p_photo_id      uuid,
  p_detections    jsonb,
  p_error         text,
  p_answer_sha256 text
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     upload_pipeline.upload_jobs := upload_pipeline.lock_photo_job(p_photo_id);
  v_request upload_pipeline.photo_detection_requests;
  v_live    boolean := v_job.state in ('queued', 'working', 'retryable');
  v_token   bigint := v_job.lease_token + 1;
begin
  perform from upload_pipeline.photos p where p.photo_id = p_photo_id and p.deleted_at is null for no key update;
  if not found or v_job.job_id is null then
    raise exception 'there is no photo %', p_photo_id using errcode = 'UP002', hint = 'It may have been deleted.';
  end if;
  select r.* into v_request from upload_pipeline.photo_detection_requests r where r.photo_id = p_photo_id for update;
  if not v_live and v_request.answer_sha256 = p_answer_sha256 then
    return false;
  end if;
  if v_job.stage <> 'detecting' or v_job.cancel_requested
     or not (v_live or (v_job.state = 'deadletter' and v_request.sent_at is not null and v_request.answered_at is null)) then
    raise exception 'photo % awaits no detections', p_photo_id
      using errcode = 'UP003',
            hint = case when v_request.answered_at is not null then 'It was given another answer before. '
                        else '' end || format('Its job is "%s" at "%s".', v_job.state, v_job.stage);
  end if;

  insert into upload_pipeline.photo_detection_requests as r
    (photo_id, delivery_id, attempt, retry_count, lease_token, sent_at, expires_at, answered_at, answered_token, answer_sha256)
  values (p_photo_id, gen_random_uuid(), 1, v_job.retry_count, v_job.lease_token, v_now, v_now, v_now, v_job.lease_token,
          p_answer_sha256)
  on conflict (photo_id) do update
    set answered_at = v_now, answered_token = excluded.answered_token, answer_sha256 = excluded.answer_sha256;
  update upload_pipeline.upload_jobs j
     set state = 'working', lease_token = v_token, worker_id = '00000000-0000-0000-0000-000000000000',
         lease_expires_at = v_now + interval '1 minute', run_at = v_now, updated_at = v_now, finished_at = null
   where j.job_id = v_job.job_id;
  if p_error is null then
    perform upload_pipeline.set_detections(p_photo_id, 'webhook', p_detections);
    perform upload_pipeline.advance_job(
      v_job.job_id, v_token, 'detecting', 'completed', false, interval '1 minute',
      upload_pipeline.detection_results(v_job.job_id, 'webhook', p_detections));
  else
    perform upload_pipeline.fail_job(v_job.job_id, v_token, 'DETECT_FAILED', p_error, false);
  end if;
  return true;
end
$$;
