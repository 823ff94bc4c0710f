-- Which jobs at work are stuck: lease run out, or at one stage longer than `longer` (default 15 minutes)?
--   psql "$WORKER_URL" -v longer='5 minutes' -f sql/operator/stuck_jobs.sql
\if :{?longer}
\else
  \set longer '15 minutes'
\endif
select j.job_id, j.stage, j.worker_id, j.retry_count, j.lease_expires_at < now() as lease_ran_out,
       date_trunc('second', now() - j.updated_at) as at_stage_for, j.correlation_id
  from upload_pipeline.upload_jobs j
 where j.state = 'working' and (j.lease_expires_at < now() or j.updated_at < now() - :'longer'::interval)
 order by j.updated_at;
