-- How many jobs reached each stage in the last hour, and how many stumbled there?
--   psql "$WORKER_URL" -f sql/operator/throughput.sql
select e.stage,
       count(*) filter (where e.code in ('job_advanced', 'job_handed_on', 'job_done')) as reached,
       count(*) filter (where e.code = 'job_failed') as failed,
       count(*) filter (where e.code = 'job_reaped') as reaped,
       count(*) filter (where e.code = 'job_deadlettered') as dead
  from upload_pipeline.events e
  left join upload_pipeline.stages s on s.stage = e.stage and s.pipeline = 'document'
 where e.at > now() - interval '1 hour' and e.at <= now() and e.stage is not null
 group by e.stage, s.position
 order by s.position nulls last, e.stage;
