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
