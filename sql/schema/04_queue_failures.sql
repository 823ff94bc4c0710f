-- Jobs that do not go on: they fail, wait, are tried again when that is due or what they wait for has come, and end as
-- dead letters. What each verb locks, in this order, and what it returns where the lease is lost:
--
--   verb             locks                                        a stale token
--   snooze_job       one job                                      raises UP001
--   fail_job         one job                                      raises UP001
--   promote_due      jobs SKIP LOCKED, then lanes in user order   -
--   reap_expired     jobs SKIP LOCKED                             -
--   wake_job         one job, then its lane                       -

-- Gives a job back until later without counting a retry: a remote parse still runs, a file is not there yet. One that was
-- woken while it was at work is due at once.
create function upload_pipeline.snooze_job(p_job_id uuid, p_token bigint, p_delay interval)
returns timestamptz
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_lease(p_job_id, p_token);
  v_at  timestamptz;
begin
  if v_job.cancel_requested then
    perform upload_pipeline.release_jobs(array[p_job_id], array[p_token]);
    return null;
  end if;
  v_at := v_now + case when v_job.run_at > v_job.updated_at then interval '0' else p_delay end;
  update upload_pipeline.upload_jobs j
     set state = 'retryable', run_at = v_at, worker_id = null, lease_expires_at = null, updated_at = v_now
   where j.job_id = p_job_id;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'job_snoozed', 'debug', v_job.user_id, v_job.document_id, v_job.job_id, v_job.worker_id, v_job.stage,
          p_token, v_job.correlation_id, jsonb_build_object('run_at', v_at));
  return v_at;
end
$$;

-- How long to wait before try p_retry + 1: 3 s x 2^p_retry, less or more by up to a tenth, so 3, 6, 12 s.
-- p_jitter in [0, 1) is drawn where it is not given. An operator may set `upload_pipeline.backoff_base` for a role.
create function upload_pipeline.retry_delay(p_retry integer, p_jitter double precision default null)
returns interval
language sql
volatile
set search_path = ''
as $$
  select coalesce(nullif(current_setting('upload_pipeline.backoff_base', true), '')::interval, interval '3 seconds')
         * power(2, p_retry) * (0.9 + 0.2 * coalesce(p_jitter, random()))
$$;

-- How many times a stage of a job is tried again before the job is a dead letter.
create function upload_pipeline.max_retries()
returns integer
language sql
immutable
set search_path = ''
as $$ select 3 $$;

-- A step failed. `retryable` with back-off up to the third retry; `deadletter` at the failure after that, or at once
-- where the error says that a retry is no use. Returns the new state and, for a retry, when. A lease fails once, so the
-- same failure told again under its token, because the answer was lost on the way, is answered from the event of the
-- first time and writes nothing.
-- A job that was woken while it was at work is due at once where it is tried again. At the first stage it waits for bytes,
-- and what woke it has outdated what it failed at: nothing is counted, no error kept. At any other a wake-up is a hint: it
-- undoes no failure, and each retry counts, or hints that come again and again would keep a job alive for ever.
create function upload_pipeline.fail_job(
  p_job_id        uuid,
  p_token         bigint,
  p_error_code    text,
  p_error_message text,
  p_retryable     boolean,
  p_error_details jsonb default null,
  p_jitter        double precision default null
)
returns table (state upload_pipeline.job_state, retry_count smallint, run_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now      timestamptz := upload_pipeline.now();
  v_job      upload_pipeline.upload_jobs;
  v_woken    boolean;
  v_outdated boolean;
  v_state    upload_pipeline.job_state;
  v_retry    smallint;
  v_at       timestamptz;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j
   where j.job_id = p_job_id and j.lease_token = p_token and j.lease_expires_at is not null
     for no key update;
  if not found then
    return query
      select (e.payload ->> 'state')::upload_pipeline.job_state, (e.payload ->> 'next_retry_count')::smallint,
             (e.payload ->> 'run_at')::timestamptz
        from upload_pipeline.events e
       where e.job_id = p_job_id and e.lease_token = p_token
         and e.code in ('job_failed', 'job_deadlettered', 'job_cancelled') and e.payload ->> 'error_code' = p_error_code
         -- a failure that fail_job wrote, and not the end of a lease that ran out
         and e.payload ? 'next_retry_count'
       order by e.event_id desc limit 1;
    if not found then
      raise exception 'the lease on job % with token % is lost', p_job_id, p_token
        using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
    end if;
    return;
  end if;
  v_woken := v_job.run_at > v_job.updated_at and not v_job.cancel_requested;
  v_outdated := v_woken and (select s.position = 0 from upload_pipeline.stages s
                              where s.pipeline = v_job.pipeline and s.stage = v_job.stage);
  v_state := case
    when v_job.cancel_requested then 'cancelled'
    when v_outdated then 'retryable'
    when p_retryable and v_job.retry_count < upload_pipeline.max_retries() then 'retryable'
    else 'deadletter' end;
  v_retry := v_job.retry_count + (v_state = 'retryable' and not v_outdated)::integer;
  if v_state = 'retryable' then
    v_at := v_now + case when v_woken then interval '0' else upload_pipeline.retry_delay(v_job.retry_count, p_jitter) end;
  end if;
  if not v_outdated then
    -- a job that ends here tells what it has used all the same
    insert into upload_pipeline.job_outcomes as o
      (job_id, user_id, results, error_code, error_message, error_details, updated_at)
    values (p_job_id, v_job.user_id,
            case when v_state <> 'retryable' then nullif(upload_pipeline.job_cost(p_job_id), '{}'::jsonb) end,
            p_error_code, left(p_error_message, 4000), p_error_details, v_now)
    on conflict (job_id) do update
      set results = excluded.results, error_code = excluded.error_code, error_message = excluded.error_message,
          error_details = excluded.error_details, updated_at = v_now;
  end if;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (v_now,
          case v_state when 'retryable' then 'job_failed' when 'deadletter' then 'job_deadlettered' else 'job_cancelled' end::upload_pipeline.event_code,
          case v_state when 'deadletter' then 'error' else 'warning' end::upload_pipeline.event_severity,
          v_job.user_id, v_job.document_id, v_job.job_id, v_job.worker_id, v_job.stage, p_token, v_job.correlation_id,
          jsonb_build_object('error_code', p_error_code, 'error_message', left(p_error_message, 4000),
                             'retry_count', v_job.retry_count, 'retryable', p_retryable,
                             'state', v_state, 'next_retry_count', v_retry, 'run_at', v_at));
  return query
    update upload_pipeline.upload_jobs j
       set state = v_state, retry_count = v_retry, run_at = coalesce(v_at, j.run_at),
           worker_id = null, lease_expires_at = null, updated_at = v_now,
           finished_at = case when v_state <> 'retryable' then v_now end
     where j.job_id = p_job_id
    returning j.state, j.retry_count, v_at;
end
$$;

-- Makes due retries and snoozes ready. Any worker runs it, bounded, beside others: there is no leader.
create function upload_pipeline.promote_due(p_limit integer default 100)
returns integer
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_lanes record;
  v_count integer := 0;
begin
  for v_lanes in
    with due as materialized (
      select j.job_id from upload_pipeline.upload_jobs j
       where j.state = 'retryable' and j.run_at <= v_now
       order by j.run_at limit p_limit for update skip locked
    ), ready as (
      update upload_pipeline.upload_jobs j set state = 'queued', updated_at = v_now
        from due where j.job_id = due.job_id
      returning j.*
    ), logged as (
      insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, stage, lease_token, correlation_id)
      select v_now, 'job_promoted', 'debug', r.user_id, r.document_id, r.job_id, r.stage, r.lease_token, r.correlation_id
        from ready r
    )
    select r.pool, array_agg(r.user_id) as user_ids, count(*) as n from ready r group by r.pool order by r.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, v_lanes.user_ids);
    v_count := v_count + v_lanes.n;
  end loop;
  return v_count;
end
$$;

-- Takes back jobs whose lease ran out, counting one attempt, so that a file that kills its worker ends in the dead
-- letters. A lease renewed between the scan and the lock is left alone: the lock rereads the row. Any worker runs it.
create function upload_pipeline.reap_expired(p_limit integer default 100)
returns integer
language sql
security definer
set search_path = ''
as $$
  with dead as materialized (
    select j.job_id, j.worker_id from upload_pipeline.upload_jobs j
     where j.state = 'working' and j.lease_expires_at < upload_pipeline.now()
     limit p_limit for update skip locked
  ), reaped as (
    update upload_pipeline.upload_jobs j
       set state = case when j.cancel_requested then 'cancelled'
                        when j.retry_count < upload_pipeline.max_retries() then 'retryable'
                        else 'deadletter' end::upload_pipeline.job_state,
           retry_count = case when not j.cancel_requested and j.retry_count < upload_pipeline.max_retries()
                              then j.retry_count + 1 else j.retry_count end,
           run_at = upload_pipeline.now() + upload_pipeline.retry_delay(j.retry_count),
           finished_at = case when j.cancel_requested or j.retry_count >= upload_pipeline.max_retries()
                              then upload_pipeline.now() end,
           worker_id = null, lease_expires_at = null, updated_at = upload_pipeline.now()
      from dead where j.job_id = dead.job_id
    returning j.*, dead.worker_id as holder
  ), outcome as (
    insert into upload_pipeline.job_outcomes as o (job_id, user_id, results, error_code, error_message, updated_at)
    select r.job_id, r.user_id,
           case when r.state = 'deadletter' then nullif(upload_pipeline.job_cost(r.job_id), '{}'::jsonb) end, 'WORKER_LOST',
           format('The worker stopped renewing its lease at stage "%s": it was killed, it hung, or it lost the database.', r.stage),
           upload_pipeline.now()
      from reaped r where r.state <> 'cancelled'
    on conflict (job_id) do update
      set results = excluded.results, error_code = excluded.error_code, error_message = excluded.error_message, error_details = null,
          updated_at = excluded.updated_at
  ), logged as (
    insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
    select upload_pipeline.now(),
           case r.state when 'retryable' then 'job_reaped' when 'deadletter' then 'job_deadlettered' else 'job_cancelled' end::upload_pipeline.event_code,
           case r.state when 'deadletter' then 'error' else 'warning' end::upload_pipeline.event_severity,
           r.user_id, r.document_id, r.job_id, r.holder, r.stage, r.lease_token, r.correlation_id,
           jsonb_build_object('error_code', 'WORKER_LOST', 'retry_count', r.retry_count)
      from reaped r
  ), costs as (
    select upload_pipeline.keep_costs(array_agg(r.job_id)) from reaped r where r.state = 'cancelled' having count(*) > 0
  )
  -- `costs` is named here so that it runs
  select count(*)::integer from reaped cross join (select count(*) from costs) c
$$;

-- What a job waits for has come, or is said to have come: one that waits for its next try is ready now; one at work is due
-- at once should its step end in a snooze or a failure that is tried again, since what the step saw may be outdated by then
-- (fail_job says what a failure counts). Any other is left as it is. While a woken job is at work its `run_at` is later than its `updated_at`; its next transition ends that.
create function upload_pipeline.wake_job(p_job_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs;
begin
  update upload_pipeline.upload_jobs j
     set run_at = greatest(v_now, j.updated_at + interval '1 microsecond')
   where j.job_id = p_job_id and j.state = 'working';
  update upload_pipeline.upload_jobs j set state = 'queued', run_at = least(j.run_at, v_now), updated_at = v_now
   where j.job_id = p_job_id and j.state = 'retryable'
  returning j.* into v_job;
  if found then
    insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, stage, lease_token, correlation_id)
    values (v_now, 'job_promoted', 'debug', v_job.user_id, v_job.document_id, v_job.job_id, v_job.stage, v_job.lease_token,
            v_job.correlation_id);
    perform upload_pipeline.wake_lanes(v_job.pool, array[v_job.user_id]);
  end if;
end
$$;
