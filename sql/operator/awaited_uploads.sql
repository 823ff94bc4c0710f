-- Which announced files have not come yet, the most urgent first? Those that came too late, or never, are the dead letters
-- with the code UPLOAD_EXPIRED.
--   psql "$WORKER_URL" -f sql/operator/awaited_uploads.sql
select d.document_id, j.job_id, d.user_id, d.filename, d.file_bytes, j.state,
       date_trunc('second', now() - d.updated_at) as awaited_for, date_trunc('second', d.upload_deadline - now()) as left_for,
       case when j.state = 'retryable' then date_trunc('second', j.run_at - now()) end as next_look_in
  from upload_pipeline.upload_jobs j
  join upload_pipeline.documents d on d.document_id = j.document_id
 where j.state in ('queued', 'working', 'retryable') and j.stage = 'queued' and d.upload_deadline is not null
 order by d.upload_deadline
 limit 200;
