-- The queue: jobs come into it, and a lane for each user in a pool says who has jobs ready. Its verbs stand here and in
-- 04_queue_claims (leases), 04_queue_advance (steps), 04_queue_failures (waits and retries) and 04_queue_control (what
-- an operator does). Each file tells of its verbs what they lock, in this order, and what they return where the lease is
-- lost:
--
--   verb             locks                                        a stale token
--   enqueue_jobs     inserts jobs, then lanes in user order       -
--   set_lane_cap     one lane                                     -
--
-- A verb that waits for a lane holds jobs; a verb that holds lanes never waits for a job: so no cycle, no deadlock.

-- Readies the lanes of these users and wakes the pool's workers if one of them turned from empty to ready.
-- Every lane is locked, written or not: an enqueue that is not committed yet and a claim that parks the lane as empty
-- take turns on that lock, and whoever comes second sees what the first did. That is what makes `ready` exact.
-- NOTIFY serialises commits across the whole server, so it is sent for a flip and not for each job.
create function upload_pipeline.wake_lanes(p_pool text, p_user_ids uuid[])
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  insert into upload_pipeline.lanes as l (pool, user_id, ready)
  select p_pool, s.user_id, true
    from (select distinct unnest(p_user_ids) as user_id order by 1) s
  on conflict (pool, user_id) do update set ready = true where not l.ready;
  if found then
    perform pg_notify('upload_pipeline_jobs', p_pool);
  end if;
end
$$;

-- Makes a job at the pipeline's first stage for each document, in the caller's transaction. A document that has a
-- live job of this pipeline gets that job back, `created` false; so does one that is named twice, the second time.
-- Rows come back in the order asked, one for each document, and the jobs are as old as that order says. A document that
-- is unknown, or is not that user's, breaks the foreign key and undoes the whole call.
create function upload_pipeline.enqueue_jobs(
  p_document_ids   uuid[],
  p_user_ids       uuid[],
  p_pipeline       text default 'document',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (job_id uuid, document_id uuid, created boolean)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now   timestamptz := upload_pipeline.now();
  v_first record;
  v_made  uuid[];
begin
  select s.stage, s.pool into v_first
    from upload_pipeline.stages s where s.pipeline = p_pipeline and s.position = 0;
  if not found then
    raise exception 'there is no pipeline "%"', p_pipeline
      using errcode = 'UP002', hint = 'The pipelines are the rows of upload_pipeline.stages.';
  end if;

  with asked as materialized (
    -- each job's age is drawn in the order asked ...
    select a.document_id, a.user_id, nextval('upload_pipeline.upload_jobs_seq_seq') as seq
      from unnest(p_document_ids, p_user_ids) a (document_id, user_id)
  ), made as (
    insert into upload_pipeline.upload_jobs
      (seq, document_id, user_id, pipeline, stage, pool, priority, correlation_id, run_at, created_at, updated_at)
    overriding system value
    select a.seq, a.document_id, a.user_id, p_pipeline, v_first.stage, v_first.pool, p_priority, p_correlation_id, v_now, v_now, v_now
      from asked a
     -- ... and the rows are written in id order: a row waits for another call's row of the same document, so two calls
     -- with the same documents in opposite order would wait for each other
     order by a.document_id, a.seq
    on conflict (document_id, pipeline) where state in ('queued', 'working', 'retryable') and document_id is not null do nothing
    returning job_id, document_id, user_id, stage
  ), logged as (
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, correlation_id)
    select v_now, 'job_enqueued', m.user_id, m.document_id, m.job_id, m.stage, p_correlation_id from made m
  )
  select array_agg(m.job_id) into v_made from made m;

  if v_made is not null then
    perform upload_pipeline.wake_lanes(v_first.pool, p_user_ids);
  end if;

  -- A new statement, so a new snapshot: a live job that another transaction made meanwhile is seen.
  return query
    select j.job_id, a.document_id,
           j.job_id in (select unnest(v_made)) and a.place = min(a.place) over (partition by a.document_id)
      from unnest(p_document_ids) with ordinality a (document_id, place)
     cross join lateral (
       -- one index look-up a document, whatever the planner thinks of the table; the live job, or, where it has ended
       -- since this call found it live, that one
       select u.job_id from upload_pipeline.upload_jobs u
        where u.document_id = a.document_id and u.pipeline = p_pipeline
        order by u.state in ('queued', 'working', 'retryable') desc, u.updated_at desc, u.seq desc
        limit 1) j
     order by a.place;
end
$$;

create function upload_pipeline.enqueue_job(
  p_document_id    uuid,
  p_user_id        uuid,
  p_pipeline       text default 'document',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (job_id uuid, document_id uuid, created boolean)
language sql
security definer
set search_path = ''
as $$
  select * from upload_pipeline.enqueue_jobs(array[p_document_id], array[p_user_id], p_pipeline, p_priority, p_correlation_id)
$$;

-- Sets how many jobs of a user a pool may have at work at once. A cap that is lowered lets running jobs run, and starts
-- none until there are fewer. Makes the lane where the user has had no job in that pool yet.
create function upload_pipeline.set_lane_cap(p_user_id uuid, p_pool text, p_max_in_flight integer)
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.lanes (pool, user_id, max_in_flight, ready) values (p_pool, p_user_id, p_max_in_flight, false)
  on conflict (pool, user_id) do update set max_in_flight = excluded.max_in_flight
$$;
