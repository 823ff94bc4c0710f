-- Which photos wait for a detector, and for what? The longest waiting first.
--   psql "$WORKER_URL" -f sql/operator/waiting_detections.sql
select j.photo_id, j.user_id,
       case when r.answered_at is null and r.expires_at > now() then 'to be answered' else 'to be asked again' end as waits,
       r.attempt, j.retry_count, r.sent_at, j.run_at
  from upload_pipeline.upload_jobs j
  left join upload_pipeline.photo_detection_requests r on r.photo_id = j.photo_id
 where j.pipeline = 'photo' and j.stage = 'detecting' and j.state = 'retryable'
 order by j.created_at
 limit 100;
