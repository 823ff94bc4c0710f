-- What waits for one user, how much of it is at work, and at which cap?
--   psql "$WORKER_URL" -v user_id="$USER_ID" -f sql/operator/user_backlog.sql
select l.pool, l.max_in_flight, l.ready,
       count(*) filter (where j.state = 'working') as working,
       count(*) filter (where j.state = 'queued') as queued,
       count(*) filter (where j.state = 'retryable') as retryable,
       date_trunc('second', now() - min(j.updated_at) filter (where j.state = 'queued')) as oldest_for
  from upload_pipeline.lanes l
  left join upload_pipeline.upload_jobs j
    on j.pool = l.pool and j.user_id = l.user_id and j.state in ('queued', 'working', 'retryable')
 where l.user_id = :'user_id'::uuid
 group by l.pool, l.max_in_flight, l.ready
 order by l.pool;
