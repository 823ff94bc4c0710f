-- What has happened to one job?
--   psql "$WORKER_URL" -v job_id="$JOB_ID" -f sql/operator/job_history.sql
select job_id, filename, stage, state, progress, retry_count, cancel_requested, error_code, error_message, worker_id,
       lease_expires_at, created_at, finished_at
  from upload_pipeline.job_overview
 where job_id = :'job_id'::uuid \gx

select e.at, e.at - lag(e.at) over (order by e.event_id) as after, e.code, e.stage, e.lease_token, e.worker_id, e.payload
  from upload_pipeline.events e
 where e.job_id = :'job_id'::uuid
 order by e.event_id;
