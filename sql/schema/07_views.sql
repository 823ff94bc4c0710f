-- What operators and users look at. Each view runs with the rights of who reads it, so row-level security holds.

-- A job as a person asks after it.
create view upload_pipeline.job_overview with (security_invoker = true) as
select j.job_id, j.document_id, j.user_id, d.filename, j.pipeline, j.stage, j.state, s.progress, j.pool, j.priority,
       j.retry_count, j.cancel_requested, j.run_at, j.created_at, j.started_at, j.updated_at, j.finished_at,
       o.error_code, o.error_message, o.results, j.worker_id, j.lease_expires_at, j.correlation_id, j.seq
  from upload_pipeline.upload_jobs j
  join upload_pipeline.documents d on d.document_id = j.document_id
  join upload_pipeline.stages s on s.pipeline = j.pipeline and s.stage = j.stage
  left join upload_pipeline.job_outcomes o on o.job_id = j.job_id;

-- How much stands where: jobs by pipeline, stage and state, and how long the oldest has been there.
create view upload_pipeline.queue_depth with (security_invoker = true) as
select j.pipeline, j.pool, j.stage, s.position, j.state, count(*) as jobs, min(j.updated_at) as oldest
  from upload_pipeline.upload_jobs j
  join upload_pipeline.stages s on s.pipeline = j.pipeline and s.stage = j.stage
 where j.state in ('queued', 'working', 'retryable')
 group by j.pipeline, j.pool, j.stage, s.position, j.state;
