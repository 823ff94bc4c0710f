-- Which embedding models are there, and how far is the one that is being filled?
--   psql "$WORKER_URL" -f sql/operator/model_progress.sql
select model, status, case when paused then 'paused' end as paused, chunks, filled_chunks, lacking_documents,
       round(chunks_per_second::numeric, 1) as chunks_per_second, date_trunc('second', time_left) as time_left,
       open_jobs, failed_documents, date_trunc('second', failed_at) as failed_at, left(failure, 60) as failure, vectors,
       date_trunc('second', retire_at) as kept_until
  from upload_pipeline.model_overview
 order by status, created_at;
