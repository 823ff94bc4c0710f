-- How long has the longest-waiting ready job of each pool waited? Growing here while workers idle: look at lanes that
-- stand at their cap (user_backlog.sql), or at a pool that no worker serves, or all have left (workers.sql).
--   psql "$WORKER_URL" -f sql/operator/oldest_ready.sql
select j.pool, count(*) as ready, count(distinct j.user_id) as users,
       date_trunc('second', now() - min(j.updated_at)) as oldest_for,
       (array_agg(j.job_id order by j.updated_at))[1] as oldest_job,
       (select count(*) from upload_pipeline.workers w
         where j.pool = any (w.pools) and j.pool <> all (w.left_pools)) as workers
  from upload_pipeline.upload_jobs j
 where j.state = 'queued'
 group by j.pool
 order by oldest_for desc;
