-- The register of workers: who works, where, on which pools and on how many jobs at once. No verb of the queue reads it:
-- what a worker holds, the leases say.

-- A worker's entry in the register, and its end. renew_leases keeps it fresh.
create function upload_pipeline.register_worker(
  p_worker_id uuid, p_host text, p_pid integer, p_version text, p_pools text[], p_concurrency integer
)
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.workers as w (worker_id, host, pid, version, pools, concurrency, started_at, last_beat_at)
  values (p_worker_id, p_host, p_pid, p_version, p_pools, p_concurrency, upload_pipeline.now(), upload_pipeline.now())
  on conflict (worker_id) do update set last_beat_at = excluded.last_beat_at;
  select upload_pipeline.record_event('worker_started', p_worker_id => p_worker_id,
    p_payload => jsonb_build_object('host', p_host, 'pid', p_pid, 'pools', p_pools));
$$;

create function upload_pipeline.unregister_worker(p_worker_id uuid)
returns void
language sql
security definer
set search_path = ''
as $$
  delete from upload_pipeline.workers w where w.worker_id = p_worker_id;
  select upload_pipeline.record_event('worker_stopped', p_worker_id => p_worker_id);
$$;

-- Says which of its pools a worker leaves to others for now, since it lacks what their jobs need: all that it leaves, in
-- order; none where it serves all again. Each change is an event, an error where nobody heard of lately serves such a pool.
create function upload_pipeline.leave_pools(p_worker_id uuid, p_left_pools text[])
returns void
language sql
security definer
set search_path = ''
as $$
  -- of two that leave at the same moment, the second sees that nobody is left
  select pg_advisory_xact_lock(hashtextextended('upload_pipeline.leave_pools', 0));
  with changed as (
    update upload_pipeline.workers w set left_pools = p_left_pools
     where w.worker_id = p_worker_id and w.left_pools <> p_left_pools
    returning 1
  ), unserved as (
    select a.pool from unnest(p_left_pools) a (pool)
     where not exists (select from upload_pipeline.workers o
                        where o.worker_id <> p_worker_id and a.pool = any (o.pools) and a.pool <> all (o.left_pools)
                          and o.last_beat_at > upload_pipeline.now() - interval '2 minutes')
  )
  select upload_pipeline.record_event('worker_left_pools',
           case when exists (select from unserved) then 'error' when p_left_pools = '{}' then 'info'
                else 'warning' end::upload_pipeline.event_severity,
           p_worker_id => p_worker_id,
           p_payload => jsonb_build_object('left_pools', p_left_pools, 'served_by_nobody', array(select pool from unserved)))
    from changed;
$$;

-- Removes the entries of workers that have been silent for p_silence and hold nothing. Returns how many.
create function upload_pipeline.forget_lost_workers(p_silence interval default '10 minutes')
returns integer
language sql
security definer
set search_path = ''
as $$
  with gone as (
    delete from upload_pipeline.workers w
     where w.last_beat_at < upload_pipeline.now() - p_silence
       and not exists (select from upload_pipeline.upload_jobs j where j.state = 'working' and j.worker_id = w.worker_id)
    returning 1
  )
  select count(*)::integer from gone
$$;
