-- Action: give a stage a pool, so that only workers that serve it run that step. Start those workers first. Jobs that
-- wait at the stage go along; those at work finish their step where they are. As the schema's owner.
--   psql "$ADMIN_URL" -v pipeline=document -v stage=embedding -v pool=embed -f sql/operator/move_stage_pool.sql
begin;
update upload_pipeline.stages set pool = :'pool' where pipeline = :'pipeline' and stage = :'stage';

-- jobs in id order and then lanes, as the verbs lock them; a job that is being claimed at this moment stays
with waiting as materialized (
  select j.job_id from upload_pipeline.upload_jobs j
   where j.pipeline = :'pipeline' and j.stage = :'stage' and j.state in ('queued', 'retryable') and j.pool <> :'pool'
   order by j.job_id for no key update skip locked
), moved as (
  update upload_pipeline.upload_jobs j set pool = :'pool' from waiting w where j.job_id = w.job_id
  returning j.user_id, j.state
)
select count(*) as moved,
       coalesce(array_agg(distinct user_id) filter (where state = 'queued'), '{}')::text as users
  from moved \gset
select upload_pipeline.wake_lanes(:'pool', :'users'::uuid[]);
commit;

select :moved as jobs_moved;
select pipeline, stage, pool from upload_pipeline.stages where pipeline = :'pipeline' order by position;
