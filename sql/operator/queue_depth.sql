-- How much stands where, and for how long?
--   psql "$WORKER_URL" -f sql/operator/queue_depth.sql
select pipeline, stage, pool, state, jobs, date_trunc('second', now() - oldest) as oldest_for
  from upload_pipeline.queue_depth
 order by pipeline, position, state;
