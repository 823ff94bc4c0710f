-- What an operator, or a job's owner, does to it: start it again, stop it. What each verb locks, in this order, and what
-- it does to a holder's token:
--
--   verb             locks                                        a stale token
--   retry_job        one job, then its lane                       raises the token: fences the holder off
--   cancel_job       one job                                      -

-- Starts an ended job again, at p_from_stage or where it stopped. Of `deadletter` and `cancelled`; of `done` only with
-- a stage. With p_force also of a live job: the token is raised, so that a worker still busy with it is fenced off.
-- What it makes anew is dropped from the buffers (prepare_restart); vectors of chunks that do not change are kept. What
-- follows is told under `p_correlation_id` where that is given.
create function upload_pipeline.retry_job(
  p_job_id         uuid,
  p_from_stage     text default null,
  p_force          boolean default false,
  p_correlation_id text default null
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
  v_at      upload_pipeline.stages;
  v_target  upload_pipeline.stages;
  v_subject text;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  if not found then
    raise exception 'there is no job %', p_job_id using errcode = 'UP002', hint = 'List the jobs to find its id.';
  end if;
  if not p_force and not (v_job.state in ('deadletter', 'cancelled') or (v_job.state = 'done' and p_from_stage is not null)) then
    raise exception 'job % is %', p_job_id, v_job.state
      using errcode = 'UP003',
            hint = case v_job.state when 'done' then 'A job that is done starts again only from a stage that you name.'
                                    else 'Wait for it to end, or cancel it first.' end;
  end if;
  select s.* into v_at from upload_pipeline.stages s where s.pipeline = v_job.pipeline and s.stage = v_job.stage;
  select s.* into v_target from upload_pipeline.stages s
   where s.pipeline = v_job.pipeline and s.stage = coalesce(p_from_stage, v_job.stage);
  if not found or v_target.final or v_target.position > v_at.position then
    raise exception 'job % at stage "%" cannot start again at "%"', p_job_id, v_job.stage, coalesce(p_from_stage, v_job.stage)
      using errcode = 'UP004',
            hint = format('Stages that it can start at: %s.', (
              select string_agg(s.stage, ', ' order by s.position) from upload_pipeline.stages s
               where s.pipeline = v_job.pipeline and s.position <= v_at.position and not s.final));
  end if;
  v_subject := coalesce('document ' || v_job.document_id, 'photo ' || v_job.photo_id);
  -- a photo has one job, ever
  if exists (select from upload_pipeline.upload_jobs o
              where o.document_id = v_job.document_id and o.pipeline = v_job.pipeline and o.job_id <> p_job_id
                and o.state in ('queued', 'working', 'retryable')) then
    raise exception '% has another job under way', v_subject
      using errcode = 'UP003', hint = 'Wait for that job to end, or cancel it first.';
  end if;
  if exists (select from upload_pipeline.documents d
              where d.document_id = v_job.document_id and d.deleted_at is not null)
     or exists (select from upload_pipeline.photos p
                 where p.photo_id = v_job.photo_id and p.deleted_at is not null) then
    raise exception '% is being deleted', v_subject
      using errcode = 'UP003', hint = 'Send the file again once it is gone.';
  end if;
  perform upload_pipeline.prepare_restart(v_job.pipeline, v_job.document_id, v_target.stage);

  begin
    update upload_pipeline.upload_jobs j
       set stage = v_target.stage, pool = v_target.pool, state = 'queued', retry_count = 0, cancel_requested = false,
           lease_token = j.lease_token + 1, worker_id = null, lease_expires_at = null, run_at = v_now, updated_at = v_now,
           finished_at = null, correlation_id = coalesce(p_correlation_id, j.correlation_id)
     where j.job_id = p_job_id;
  exception when unique_violation then
    -- one was enqueued or started again since the look above
    raise exception '% has another job under way', v_subject
      using errcode = 'UP003', hint = 'Wait for that job to end, or cancel it first.';
  end;
  delete from upload_pipeline.job_outcomes o where o.job_id = p_job_id;
  insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'job_restarted', v_job.user_id, v_job.document_id, p_job_id, v_target.stage, v_job.lease_token + 1,
          coalesce(p_correlation_id, v_job.correlation_id), jsonb_build_object('from_state', v_job.state, 'from_stage', v_job.stage));
  perform upload_pipeline.wake_lanes(v_target.pool, array[v_job.user_id]);
  return query select p_job_id, v_target.stage, 'queued'::upload_pipeline.job_state;
end
$$;

-- Stops a job: at once where nobody works on it; a working one at its next step boundary or heartbeat. Of an ended
-- job: nothing changes, and its state comes back.
create function upload_pipeline.cancel_job(p_job_id uuid, p_correlation_id text default null)
returns table (job_id uuid, state upload_pipeline.job_state, cancel_requested boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  if not found then
    raise exception 'there is no job %', p_job_id using errcode = 'UP002', hint = 'List the jobs to find its id.';
  end if;
  if v_job.state in ('queued', 'retryable', 'working') and not v_job.cancel_requested then
    update upload_pipeline.upload_jobs j
       set cancel_requested = true, updated_at = v_now, correlation_id = coalesce(p_correlation_id, j.correlation_id),
           state = case when j.state = 'working' then j.state else 'cancelled' end,
           finished_at = case when j.state = 'working' then null else v_now end
     where j.job_id = p_job_id
    returning j.* into v_job;
    if v_job.state = 'cancelled' then
      perform upload_pipeline.keep_costs(array[p_job_id]);
    end if;
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id)
    values (v_now, case when v_job.state = 'working' then 'job_cancel_requested' else 'job_cancelled' end::upload_pipeline.event_code,
            v_job.user_id, v_job.document_id, p_job_id, v_job.stage, v_job.lease_token, v_job.correlation_id);
  end if;
  return query select v_job.job_id, v_job.state, v_job.cancel_requested;
end
$$;
