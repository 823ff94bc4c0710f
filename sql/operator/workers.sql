-- Which workers are there, and what does each hold? A holder without a host has left the register: its leases run out.
-- What is in left_pools a worker leaves to others, since it lacks what their jobs need: the key of an embedding model.
--   psql "$WORKER_URL" -f sql/operator/workers.sql
select coalesce(w.worker_id, j.worker_id) as worker_id, w.host, w.pid, w.version, w.pools, w.left_pools, w.concurrency,
       date_trunc('second', now() - w.last_beat_at) as silent_for, count(j.job_id) as holds,
       date_trunc('second', min(j.lease_expires_at) - now()) as first_lease_ends_in,
       array_agg(distinct j.stage) filter (where j.stage is not null) as stages
  from upload_pipeline.workers w
  full join (select * from upload_pipeline.upload_jobs where state = 'working') j on j.worker_id = w.worker_id
 group by 1, w.worker_id
 order by silent_for desc nulls first, worker_id;
