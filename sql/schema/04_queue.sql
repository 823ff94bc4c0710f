-- The queue. What each verb locks, in this order, and what it returns where the lease is lost:
--
--   verb             locks                                        a stale token
--   enqueue_jobs     inserts jobs, then lanes in user order       -
--   claim_jobs       lanes, then jobs, both SKIP LOCKED           -
--   renew_leases     jobs in id order                             that job is missing from the answer
--   check_lease      one job                                      raises UP001: undoes the caller's transaction
--   check_step       one job                                      raises UP001: undoes the caller's transaction
--   advance_jobs     jobs in id order, then lanes in user order   that job is missing from the answer
--   snooze_job       one job                                      raises UP001
--   fail_job         one job                                      raises UP001
--   release_jobs     jobs in id order, then lanes in user order   that job is missing from the answer
--   promote_due      jobs SKIP LOCKED, then lanes in user order   -
--   reap_expired     jobs SKIP LOCKED                             -
--   retry_job        one job, then its lane                       raises the token: fences the holder off
--   cancel_job       one job                                      -
--   wake_job         one job, then its lane                       -
--   record_fenced_write  one job                                  is what it notes
--   set_lane_cap     one lane                                     -
--
-- A verb that waits for a lane holds jobs; a verb that holds lanes never waits for a job: so no cycle, no deadlock.
--
-- The fence. `lease_token` only grows: a claim and a restart raise it. Whoever writes for a job names the token it was
-- given, and the write happens only where the row still has that token and is `working`. So at most one claimant of a
-- job can ever write, however late, however often, and whatever it believes of the time. A fence reads `working` as
-- "has a lease", which a constraint makes the same thing: told the state, the planner may look the job up in the partial
-- index of working jobs and read all of them; told the lease, it has only the primary key.

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

-- Leases up to p_limit ready jobs of a pool to a worker for p_ttl.
--
-- Fair: lanes are taken in user order behind p_after_user (the worker keeps the last one it was given as its cursor)
-- and from the start again at the end; while there are lanes enough each gives one job, and only when there are fewer
-- does a lane give more. Within a lane: highest priority first, then oldest.
--
-- Exact: a lane never has more than max_in_flight jobs working. That takes three statements, that is, three
-- snapshots: the count that decides must be taken after the lane's lock was won, or two claims at once both count
-- the state before either.
--   1. lock ready lanes that look open, skipping those that another claim holds
--   2. count again under the lock, take the heads, write the leases
--   3. park the lanes that are now empty
--
-- Flat: rows read are bounded by p_limit and by the jobs at work, not by anybody's backlog or history. The planner is
-- left no way to decide otherwise on stale statistics: the only plans are the partial indexes, read in order.
create function upload_pipeline.claim_jobs(
  p_worker_id  uuid,
  p_pool       text,
  p_limit      integer,
  p_after_user uuid default null,
  p_ttl        interval default '60 seconds'
)
returns table (
  job_id           uuid,
  subject_id       uuid,
  user_id          uuid,
  pipeline         text,
  stage            text,
  retry_count      smallint,
  lease_token      bigint,
  lease_expires_at timestamptz,
  correlation_id   text
)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now   timestamptz := upload_pipeline.now();
  v_after uuid := coalesce(p_after_user, '00000000-0000-0000-0000-000000000000');
  v_users uuid[];
  v_more  uuid[];
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'claim_jobs needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'The cap is exact only where each statement has a snapshot of its own.';
  end if;
  if p_limit is null or p_limit < 1 then
    raise exception 'p_limit is %, it must be at least 1', p_limit using errcode = '22023';
  end if;

  select array_agg(s.user_id) into v_users from (
    select l.user_id from upload_pipeline.lanes l
     where l.pool = p_pool and l.ready and l.user_id > v_after
       and l.max_in_flight > (select count(*) from upload_pipeline.upload_jobs w
                               where w.pool = l.pool and w.user_id = l.user_id and w.state = 'working')
     order by l.pool, l.user_id limit p_limit
       for no key update of l skip locked) s;
  if p_after_user is not null and coalesce(cardinality(v_users), 0) < p_limit then
    select array_agg(s.user_id) into v_more from (
      select l.user_id from upload_pipeline.lanes l
       where l.pool = p_pool and l.ready and l.user_id <= v_after
         and l.max_in_flight > (select count(*) from upload_pipeline.upload_jobs w
                                 where w.pool = l.pool and w.user_id = l.user_id and w.state = 'working')
       order by l.pool, l.user_id limit p_limit - coalesce(cardinality(v_users), 0)
         for no key update of l skip locked) s;
    v_users := v_users || v_more;
  end if;
  if v_users is null then
    return;
  end if;

  return query
  with open as materialized (
    select l.user_id, u.turn, l.max_in_flight - w.working as slots
      from unnest(v_users) with ordinality u (user_id, turn)
      join upload_pipeline.lanes l on l.pool = p_pool and l.user_id = u.user_id
     cross join lateral (
       select count(*)::integer as working from upload_pipeline.upload_jobs j
        where j.pool = p_pool and j.user_id = l.user_id and j.state = 'working') w
     where l.max_in_flight > w.working
  ), head as materialized (
    select h.job_id, o.turn, row_number() over () as place
      from open o
     cross join lateral (
       select j.job_id from upload_pipeline.upload_jobs j
        where j.pool = p_pool and j.user_id = o.user_id and j.state = 'queued'
        order by j.pool, j.user_id, j.priority desc, j.seq
        -- an equal share of p_limit; the first lanes of the turn take the remainder
        limit least(o.slots, p_limit / cardinality(v_users) + (o.turn <= p_limit % cardinality(v_users))::integer)
          for update skip locked) h
  ), taken as (
    update upload_pipeline.upload_jobs j
       set state = 'working', lease_token = j.lease_token + 1, worker_id = p_worker_id,
           lease_expires_at = v_now + p_ttl, started_at = coalesce(j.started_at, v_now),
           -- only of a woken job at work (wake_job) is `run_at` later than this
           updated_at = greatest(v_now, j.run_at)
      from head h
     where j.job_id = h.job_id
    returning j.job_id, j.document_id, j.photo_id, j.user_id, j.pipeline, j.stage, j.retry_count, j.lease_token,
              j.lease_expires_at, j.correlation_id, h.turn, h.place
  ), logged as (
    insert into upload_pipeline.events
      (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id)
    select v_now, 'job_claimed', 'debug', t.user_id, t.document_id, t.job_id, p_worker_id, t.stage, t.lease_token,
           t.correlation_id
      from taken t
  )
  -- in the turn's order, whatever plan the update had: the last row's user is the worker's next cursor
  select t.job_id, coalesce(t.document_id, t.photo_id), t.user_id, t.pipeline, t.stage, t.retry_count, t.lease_token,
         t.lease_expires_at, t.correlation_id
    from taken t
   order by t.turn, t.place;

  update upload_pipeline.lanes l set ready = false
   where l.pool = p_pool and l.user_id = any (v_users)
     and not exists (select from upload_pipeline.upload_jobs j
                      where j.pool = p_pool and j.user_id = l.user_id and j.state = 'queued');
end
$$;

-- One statement a beat for all that a worker holds, and its sign of life. A job that does not come back is lost; one
-- that comes back flagged is to be cancelled: stop the step and give it back by release_jobs.
create function upload_pipeline.renew_leases(
  p_worker_id uuid,
  p_job_ids   uuid[],
  p_tokens    bigint[],
  p_ttl       interval default '60 seconds'
)
returns table (job_id uuid, cancel_requested boolean)
language sql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  update upload_pipeline.workers w set last_beat_at = upload_pipeline.now() where w.worker_id = p_worker_id;

  with asked as materialized (
    select a.job_id, a.token from unnest(p_job_ids, p_tokens) a (job_id, token) order by a.job_id
  ), held as materialized (
    select a.job_id from asked a
     cross join lateral (
       select from upload_pipeline.upload_jobs u
        where u.job_id = a.job_id and u.lease_token = a.token and u.lease_expires_at is not null
          for no key update) j
  )
  update upload_pipeline.upload_jobs j
     set lease_expires_at = upload_pipeline.now() + p_ttl
    from held h
   where j.job_id = h.job_id
  returning j.job_id, j.cancel_requested
$$;

-- The fence: the first statement of each transaction that writes results. Locks the job's row until the end of that
-- transaction and returns it, or raises UP001 and so undoes the transaction.
create function upload_pipeline.check_lease(p_job_id uuid, p_token bigint)
returns upload_pipeline.upload_jobs
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j
   where j.job_id = p_job_id and j.lease_token = p_token and j.lease_expires_at is not null
     for no key update;
  if not found then
    raise exception 'the lease on job % with token % is lost', p_job_id, p_token
      using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
  end if;
  return v_job;
end
$$;

-- The fence of a verb that moves a job to p_to_stage. Asked again because the answer was lost on the way, the job stands
-- there already, under this very token and perhaps with its lease handed on: then the row comes back as it is, the verb
-- answers by it as it did before, and writes nothing.
create function upload_pipeline.check_step(p_job_id uuid, p_token bigint, p_to_stage text)
returns upload_pipeline.upload_jobs
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j
   where j.job_id = p_job_id and j.lease_token = p_token
     for no key update;
  if v_job.stage = p_to_stage or v_job.lease_expires_at is not null then
    return v_job;
  end if;
  raise exception 'the lease on job % with token % is lost', p_job_id, p_token
    using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
end
$$;

-- Notes that the fence has refused a write under p_token, so that an operator sees it: the writer had lost its lease and
-- found out late. Locks the job as whatever writes an event of it does, so that its history stays in order.
create function upload_pipeline.record_fenced_write(p_job_id uuid, p_token bigint, p_worker_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (upload_pipeline.now(), 'write_fenced', 'warning', v_job.user_id, v_job.document_id, p_job_id, p_worker_id, v_job.stage,
          p_token, coalesce(v_job.correlation_id, ''), jsonb_build_object('current_token', v_job.lease_token));
end
$$;

-- Moves jobs one stage on. Arrays in parallel: a worker sends what its jobs ask for within a few milliseconds as one
-- statement. A job at whose end p_keep asks for it, and whose next stage is served by the same pool, stays leased to
-- its worker (`working`); else it is handed on to the next stage's pool (`queued`), or ended at the final stage
-- (`done`), or, where a cancel was asked for, ended there (`cancelled`).
--
-- What comes back per job is its new stage, state and lease. A job is missing from the answer when its token is stale.
-- Asking the same again, because an answer was lost on the way, answers the same again and writes nothing.
-- A stage that is not the next one raises UP004 and moves none: that is an error of the program, not of the moment.
create function upload_pipeline.advance_jobs(
  p_job_ids     uuid[],
  p_tokens      bigint[],
  p_from_stages text[],
  p_to_stages   text[],
  p_keep        boolean[],
  p_ttl         interval default '60 seconds',
  p_results     jsonb[] default null
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_answers bigint;
  v_wrong   record;
begin
  return query
  with asked as materialized (
    -- in id order, so that two groups never lock the same jobs in opposite order
    select a.job_id, a.token, a.from_stage, a.to_stage, a.keep, a.results
      from unnest(p_job_ids, p_tokens, p_from_stages, p_to_stages, p_keep, p_results)
             a (job_id, token, from_stage, to_stage, keep, results)
     order by a.job_id
  ), fenced as materialized (
    select a.job_id, a.from_stage, a.to_stage, a.keep, a.results, j.pipeline, j.pool, j.cancel_requested
      from asked a
     cross join lateral (
       -- the fence: one primary-key look-up a job on every plan; joined with nothing else, so that no plan changes the
       -- order of the locks
       select u.pipeline, u.pool, u.cancel_requested from upload_pipeline.upload_jobs u
        where u.job_id = a.job_id and u.lease_token = a.token and u.lease_expires_at is not null and u.stage = a.from_stage
          for no key update) j
  ), held as materialized (
    select c.job_id, c.to_stage, c.results, t.pool, t.final,
           case when t.final then 'done'
                when c.cancel_requested then 'cancelled'
                when c.keep and t.pool = c.pool then 'working'
                else 'queued' end::upload_pipeline.job_state as next_state
      from fenced c
      join upload_pipeline.stages f on f.pipeline = c.pipeline and f.stage = c.from_stage
      join upload_pipeline.stages t on t.pipeline = c.pipeline and t.stage = c.to_stage and t.position = f.position + 1
  ), moved as (
    update upload_pipeline.upload_jobs j
       set stage = h.to_stage,
           state = h.next_state,
           pool = case when h.final then j.pool else h.pool end,
           retry_count = 0,
           worker_id = case when h.next_state = 'working' then j.worker_id end,
           lease_expires_at = case when h.next_state = 'working' then v_now + p_ttl end,
           updated_at = v_now,
           finished_at = case when h.next_state in ('done', 'cancelled') then v_now end
      from held h
     where j.job_id = h.job_id
    returning j.job_id, j.user_id, j.document_id, j.pool, j.stage, j.state, j.lease_token, j.lease_expires_at,
              j.correlation_id, h.results
  ), logged as (
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id)
    select v_now,
           case m.state when 'working' then 'job_advanced' when 'queued' then 'job_handed_on'
                        when 'done' then 'job_done' else 'job_cancelled' end::upload_pipeline.event_code,
           m.user_id, m.document_id, m.job_id, m.stage, m.lease_token, m.correlation_id
      from moved m
  ), kept as (
    insert into upload_pipeline.job_outcomes as o (job_id, user_id, results, updated_at)
    select m.job_id, m.user_id, m.results, v_now from moved m where m.results is not null
    on conflict (job_id) do update
      set results = excluded.results, error_code = null, error_message = null, error_details = null, updated_at = v_now
  ), woken as (
    select upload_pipeline.wake_lanes(h.pool, h.user_ids)
      from (select m.pool, array_agg(m.user_id) as user_ids from moved m where m.state = 'queued' group by m.pool
             order by m.pool) h
  )
  -- `woken` is named here so that it runs: a CTE that only reads runs only where it is asked for
  select m.job_id, m.stage, m.state, m.lease_expires_at from moved m cross join (select count(*) from woken) w
  union all
  -- The token is still the caller's and the stage is the one asked for: moved by the same call before.
  select j.job_id, j.stage, j.state, j.lease_expires_at
    from asked a
   cross join lateral (
     select u.* from upload_pipeline.upload_jobs u
      where u.job_id = a.job_id and u.lease_token = a.token and u.stage = a.to_stage) j
   where a.job_id not in (select f.job_id from fenced f);
  get diagnostics v_answers = row_count;
  if v_answers = cardinality(p_job_ids) then
    return;
  end if;

  -- The rest is lost, or its caller has a bug: it holds the job, but names a stage that does not follow.
  select j.stage, a.job_id, a.from_stage, a.to_stage into v_wrong
    from unnest(p_job_ids, p_tokens, p_from_stages, p_to_stages) a (job_id, token, from_stage, to_stage)
   cross join lateral (
     select u.stage from upload_pipeline.upload_jobs u
      where u.job_id = a.job_id and u.lease_token = a.token and u.lease_expires_at is not null and u.stage <> a.to_stage
      limit 1) j
   limit 1;
  if found then
    raise exception 'job % is at stage "%" and cannot go from "%" to "%"',
        v_wrong.job_id, v_wrong.stage, v_wrong.from_stage, v_wrong.to_stage
      using errcode = 'UP004', hint = 'Only the next stage of upload_pipeline.stages is accepted.';
  end if;
end
$$;

-- advance_jobs for one job: its new stage, state and lease, or UP001.
create function upload_pipeline.advance_job(
  p_job_id     uuid,
  p_token      bigint,
  p_from_stage text,
  p_to_stage   text,
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds',
  p_results    jsonb default null
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
begin
  return query
    select * from upload_pipeline.advance_jobs(
      array[p_job_id], array[p_token], array[p_from_stage], array[p_to_stage], array[p_keep], p_ttl, array[p_results]);
  if not found then
    raise exception 'the lease on job % with token % is lost', p_job_id, p_token
      using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
  end if;
end
$$;

-- Gives a job back until later without counting a retry: a remote parse still runs, a file is not there yet. One that was
-- woken while it was at work is due at once.
create function upload_pipeline.snooze_job(p_job_id uuid, p_token bigint, p_delay interval)
returns timestamptz
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_lease(p_job_id, p_token);
  v_at  timestamptz;
begin
  if v_job.cancel_requested then
    perform upload_pipeline.release_jobs(array[p_job_id], array[p_token]);
    return null;
  end if;
  v_at := v_now + case when v_job.run_at > v_job.updated_at then interval '0' else p_delay end;
  update upload_pipeline.upload_jobs j
     set state = 'retryable', run_at = v_at, worker_id = null, lease_expires_at = null, updated_at = v_now
   where j.job_id = p_job_id;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'job_snoozed', 'debug', v_job.user_id, v_job.document_id, v_job.job_id, v_job.worker_id, v_job.stage,
          p_token, v_job.correlation_id, jsonb_build_object('run_at', v_at));
  return v_at;
end
$$;

-- How long to wait before try p_retry + 1: 3 s x 2^p_retry, less or more by up to a tenth, so 3, 6, 12 s.
-- p_jitter in [0, 1) is drawn where it is not given. An operator may set `upload_pipeline.backoff_base` for a role.
create function upload_pipeline.retry_delay(p_retry integer, p_jitter double precision default null)
returns interval
language sql
volatile
set search_path = ''
as $$
  select coalesce(nullif(current_setting('upload_pipeline.backoff_base', true), '')::interval, interval '3 seconds')
         * power(2, p_retry) * (0.9 + 0.2 * coalesce(p_jitter, random()))
$$;

-- How many times a stage of a job is tried again before the job is a dead letter.
create function upload_pipeline.max_retries()
returns integer
language sql
immutable
set search_path = ''
as $$ select 3 $$;

-- A step failed. `retryable` with back-off up to the third retry; `deadletter` at the failure after that, or at once
-- where the error says that a retry is no use. Returns the new state and, for a retry, when. A lease fails once, so the
-- same failure told again under its token, because the answer was lost on the way, is answered from the event of the
-- first time and writes nothing.
-- A job that was woken while it was at work failed at what is outdated: it is due at once, nothing counted, no error kept.
create function upload_pipeline.fail_job(
  p_job_id        uuid,
  p_token         bigint,
  p_error_code    text,
  p_error_message text,
  p_retryable     boolean,
  p_error_details jsonb default null,
  p_jitter        double precision default null
)
returns table (state upload_pipeline.job_state, retry_count smallint, run_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now   timestamptz := upload_pipeline.now();
  v_job   upload_pipeline.upload_jobs;
  v_woken boolean;
  v_state upload_pipeline.job_state;
  v_retry smallint;
  v_at    timestamptz;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j
   where j.job_id = p_job_id and j.lease_token = p_token and j.lease_expires_at is not null
     for no key update;
  if not found then
    return query
      select (e.payload ->> 'state')::upload_pipeline.job_state, (e.payload ->> 'next_retry_count')::smallint,
             (e.payload ->> 'run_at')::timestamptz
        from upload_pipeline.events e
       where e.job_id = p_job_id and e.lease_token = p_token
         and e.code in ('job_failed', 'job_deadlettered', 'job_cancelled') and e.payload ->> 'error_code' = p_error_code
         -- a failure that fail_job wrote, and not the end of a lease that ran out
         and e.payload ? 'next_retry_count'
       order by e.event_id desc limit 1;
    if not found then
      raise exception 'the lease on job % with token % is lost', p_job_id, p_token
        using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
    end if;
    return;
  end if;
  v_woken := v_job.run_at > v_job.updated_at and not v_job.cancel_requested;
  v_state := case
    when v_job.cancel_requested then 'cancelled'
    when v_woken then 'retryable'
    when p_retryable and v_job.retry_count < upload_pipeline.max_retries() then 'retryable'
    else 'deadletter' end;
  v_retry := v_job.retry_count + (v_state = 'retryable' and not v_woken)::integer;
  if v_woken then
    v_at := v_now;
  elsif v_state = 'retryable' then
    v_at := v_now + upload_pipeline.retry_delay(v_job.retry_count, p_jitter);
  end if;
  if not v_woken then
    -- a job that ends here tells what it has used all the same
    insert into upload_pipeline.job_outcomes as o
      (job_id, user_id, results, error_code, error_message, error_details, updated_at)
    values (p_job_id, v_job.user_id,
            case when v_state <> 'retryable' then nullif(upload_pipeline.job_cost(p_job_id), '{}'::jsonb) end,
            p_error_code, left(p_error_message, 4000), p_error_details, v_now)
    on conflict (job_id) do update
      set results = excluded.results, error_code = excluded.error_code, error_message = excluded.error_message,
          error_details = excluded.error_details, updated_at = v_now;
  end if;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (v_now,
          case v_state when 'retryable' then 'job_failed' when 'deadletter' then 'job_deadlettered' else 'job_cancelled' end::upload_pipeline.event_code,
          case v_state when 'deadletter' then 'error' else 'warning' end::upload_pipeline.event_severity,
          v_job.user_id, v_job.document_id, v_job.job_id, v_job.worker_id, v_job.stage, p_token, v_job.correlation_id,
          jsonb_build_object('error_code', p_error_code, 'error_message', left(p_error_message, 4000),
                             'retry_count', v_job.retry_count, 'retryable', p_retryable,
                             'state', v_state, 'next_retry_count', v_retry, 'run_at', v_at));
  return query
    update upload_pipeline.upload_jobs j
       set state = v_state, retry_count = v_retry, run_at = coalesce(v_at, j.run_at),
           worker_id = null, lease_expires_at = null, updated_at = v_now,
           finished_at = case when v_state <> 'retryable' then v_now end
     where j.job_id = p_job_id
    returning j.state, j.retry_count, v_at;
end
$$;

-- A stopping worker hands back all that it holds, retry counts untouched; a job whose cancel was asked for ends here.
-- Returns what was handed back; a stale token's job is missing.
create function upload_pipeline.release_jobs(p_job_ids uuid[], p_tokens bigint[])
returns table (job_id uuid, state upload_pipeline.job_state)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now   timestamptz := upload_pipeline.now();
  v_back  uuid[];
  v_lanes record;
begin
  with held as materialized (
    select j.job_id, j.worker_id from upload_pipeline.upload_jobs j
      join unnest(p_job_ids, p_tokens) a (job_id, token) on a.job_id = j.job_id and a.token = j.lease_token
     where j.lease_expires_at is not null
     order by j.job_id for no key update of j
  ), back as (
    update upload_pipeline.upload_jobs j
       set state = case when j.cancel_requested then 'cancelled' else 'queued' end::upload_pipeline.job_state,
           finished_at = case when j.cancel_requested then v_now end,
           worker_id = null, lease_expires_at = null, updated_at = v_now
      from held h
     where j.job_id = h.job_id
    returning j.*, h.worker_id as holder
  ), logged as (
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id)
    select v_now, case when b.state = 'cancelled' then 'job_cancelled' else 'job_released' end::upload_pipeline.event_code,
           b.user_id, b.document_id, b.job_id, b.holder, b.stage, b.lease_token, b.correlation_id
      from back b
  )
  select array_agg(b.job_id) into v_back from back b;

  for v_lanes in
    select j.pool, array_agg(j.user_id) as user_ids from upload_pipeline.upload_jobs j
     where j.job_id = any (v_back) and j.state = 'queued' group by j.pool order by j.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, v_lanes.user_ids);
  end loop;

  return query select j.job_id, j.state from upload_pipeline.upload_jobs j where j.job_id = any (v_back);
end
$$;

-- Makes due retries and snoozes ready. Any worker runs it, bounded, beside others: there is no leader.
create function upload_pipeline.promote_due(p_limit integer default 100)
returns integer
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_lanes record;
  v_count integer := 0;
begin
  for v_lanes in
    with due as materialized (
      select j.job_id from upload_pipeline.upload_jobs j
       where j.state = 'retryable' and j.run_at <= v_now
       order by j.run_at limit p_limit for update skip locked
    ), ready as (
      update upload_pipeline.upload_jobs j set state = 'queued', updated_at = v_now
        from due where j.job_id = due.job_id
      returning j.*
    ), logged as (
      insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, stage, lease_token, correlation_id)
      select v_now, 'job_promoted', 'debug', r.user_id, r.document_id, r.job_id, r.stage, r.lease_token, r.correlation_id
        from ready r
    )
    select r.pool, array_agg(r.user_id) as user_ids, count(*) as n from ready r group by r.pool order by r.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, v_lanes.user_ids);
    v_count := v_count + v_lanes.n;
  end loop;
  return v_count;
end
$$;

-- Takes back jobs whose lease ran out, counting one attempt, so that a file that kills its worker ends in the dead
-- letters. A lease renewed between the scan and the lock is left alone: the lock rereads the row. Any worker runs it.
create function upload_pipeline.reap_expired(p_limit integer default 100)
returns integer
language sql
security definer
set search_path = ''
as $$
  with dead as materialized (
    select j.job_id, j.worker_id from upload_pipeline.upload_jobs j
     where j.state = 'working' and j.lease_expires_at < upload_pipeline.now()
     limit p_limit for update skip locked
  ), reaped as (
    update upload_pipeline.upload_jobs j
       set state = case when j.cancel_requested then 'cancelled'
                        when j.retry_count < upload_pipeline.max_retries() then 'retryable'
                        else 'deadletter' end::upload_pipeline.job_state,
           retry_count = case when not j.cancel_requested and j.retry_count < upload_pipeline.max_retries()
                              then j.retry_count + 1 else j.retry_count end,
           run_at = upload_pipeline.now() + upload_pipeline.retry_delay(j.retry_count),
           finished_at = case when j.cancel_requested or j.retry_count >= upload_pipeline.max_retries()
                              then upload_pipeline.now() end,
           worker_id = null, lease_expires_at = null, updated_at = upload_pipeline.now()
      from dead where j.job_id = dead.job_id
    returning j.*, dead.worker_id as holder
  ), outcome as (
    insert into upload_pipeline.job_outcomes as o (job_id, user_id, results, error_code, error_message, updated_at)
    select r.job_id, r.user_id,
           case when r.state = 'deadletter' then nullif(upload_pipeline.job_cost(r.job_id), '{}'::jsonb) end, 'WORKER_LOST',
           format('The worker stopped renewing its lease at stage "%s": it was killed, it hung, or it lost the database.', r.stage),
           upload_pipeline.now()
      from reaped r where r.state <> 'cancelled'
    on conflict (job_id) do update
      set results = excluded.results, error_code = excluded.error_code, error_message = excluded.error_message, error_details = null,
          updated_at = excluded.updated_at
  ), logged as (
    insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
    select upload_pipeline.now(),
           case r.state when 'retryable' then 'job_reaped' when 'deadletter' then 'job_deadlettered' else 'job_cancelled' end::upload_pipeline.event_code,
           case r.state when 'deadletter' then 'error' else 'warning' end::upload_pipeline.event_severity,
           r.user_id, r.document_id, r.job_id, r.holder, r.stage, r.lease_token, r.correlation_id,
           jsonb_build_object('error_code', 'WORKER_LOST', 'retry_count', r.retry_count)
      from reaped r
  )
  select count(*)::integer from reaped
$$;

-- Starts an ended job again, at p_from_stage or where it stopped. Of `deadletter` and `cancelled`; of `done` only with
-- a stage. With p_force also of a live job: the token is raised, so that a worker still busy with it is fenced off.
-- What it makes anew is dropped from the buffers (prepare_restart); vectors of chunks that do not change are kept. What
-- follows is told under `p_correlation_id` where that is given.
create function upload_pipeline.retry_job(
  p_job_id         uuid,
  p_from_stage     text default null,
  p_force          boolean default false,
  p_correlation_id text default null
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     upload_pipeline.upload_jobs;
  v_at      upload_pipeline.stages;
  v_target  upload_pipeline.stages;
  v_subject text;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  if not found then
    raise exception 'there is no job %', p_job_id using errcode = 'UP002', hint = 'List the jobs to find its id.';
  end if;
  if not p_force and not (v_job.state in ('deadletter', 'cancelled') or (v_job.state = 'done' and p_from_stage is not null)) then
    raise exception 'job % is %', p_job_id, v_job.state
      using errcode = 'UP003',
            hint = case v_job.state when 'done' then 'A job that is done starts again only from a stage that you name.'
                                    else 'Wait for it to end, or cancel it first.' end;
  end if;
  select s.* into v_at from upload_pipeline.stages s where s.pipeline = v_job.pipeline and s.stage = v_job.stage;
  select s.* into v_target from upload_pipeline.stages s
   where s.pipeline = v_job.pipeline and s.stage = coalesce(p_from_stage, v_job.stage);
  if not found or v_target.final or v_target.position > v_at.position then
    raise exception 'job % at stage "%" cannot start again at "%"', p_job_id, v_job.stage, coalesce(p_from_stage, v_job.stage)
      using errcode = 'UP004',
            hint = format('Stages that it can start at: %s.', (
              select string_agg(s.stage, ', ' order by s.position) from upload_pipeline.stages s
               where s.pipeline = v_job.pipeline and s.position <= v_at.position and not s.final));
  end if;
  v_subject := coalesce('document ' || v_job.document_id, 'photo ' || v_job.photo_id);
  -- a photo has one job, ever
  if exists (select from upload_pipeline.upload_jobs o
              where o.document_id = v_job.document_id and o.pipeline = v_job.pipeline and o.job_id <> p_job_id
                and o.state in ('queued', 'working', 'retryable')) then
    raise exception '% has another job under way', v_subject
      using errcode = 'UP003', hint = 'Wait for that job to end, or cancel it first.';
  end if;
  if exists (select from upload_pipeline.documents d
              where d.document_id = v_job.document_id and d.deleted_at is not null)
     or exists (select from upload_pipeline.photos p
                 where p.photo_id = v_job.photo_id and p.deleted_at is not null) then
    raise exception '% is being deleted', v_subject
      using errcode = 'UP003', hint = 'Send the file again once it is gone.';
  end if;
  perform upload_pipeline.prepare_restart(v_job.pipeline, v_job.document_id, v_target.stage);

  begin
    update upload_pipeline.upload_jobs j
       set stage = v_target.stage, pool = v_target.pool, state = 'queued', retry_count = 0, cancel_requested = false,
           lease_token = j.lease_token + 1, worker_id = null, lease_expires_at = null, run_at = v_now, updated_at = v_now,
           finished_at = null, correlation_id = coalesce(p_correlation_id, j.correlation_id)
     where j.job_id = p_job_id;
  exception when unique_violation then
    -- one was enqueued or started again since the look above
    raise exception '% has another job under way', v_subject
      using errcode = 'UP003', hint = 'Wait for that job to end, or cancel it first.';
  end;
  delete from upload_pipeline.job_outcomes o where o.job_id = p_job_id;
  insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'job_restarted', v_job.user_id, v_job.document_id, p_job_id, v_target.stage, v_job.lease_token + 1,
          coalesce(p_correlation_id, v_job.correlation_id), jsonb_build_object('from_state', v_job.state, 'from_stage', v_job.stage));
  perform upload_pipeline.wake_lanes(v_target.pool, array[v_job.user_id]);
  return query select p_job_id, v_target.stage, 'queued'::upload_pipeline.job_state;
end
$$;

-- Stops a job: at once where nobody works on it; a working one at its next step boundary or heartbeat. Of an ended
-- job: nothing changes, and its state comes back.
create function upload_pipeline.cancel_job(p_job_id uuid, p_correlation_id text default null)
returns table (job_id uuid, state upload_pipeline.job_state, cancel_requested boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  if not found then
    raise exception 'there is no job %', p_job_id using errcode = 'UP002', hint = 'List the jobs to find its id.';
  end if;
  if v_job.state in ('queued', 'retryable', 'working') and not v_job.cancel_requested then
    update upload_pipeline.upload_jobs j
       set cancel_requested = true, updated_at = v_now, correlation_id = coalesce(p_correlation_id, j.correlation_id),
           state = case when j.state = 'working' then j.state else 'cancelled' end,
           finished_at = case when j.state = 'working' then null else v_now end
     where j.job_id = p_job_id
    returning j.* into v_job;
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id)
    values (v_now, case when v_job.state = 'working' then 'job_cancel_requested' else 'job_cancelled' end::upload_pipeline.event_code,
            v_job.user_id, v_job.document_id, p_job_id, v_job.stage, v_job.lease_token, v_job.correlation_id);
  end if;
  return query select v_job.job_id, v_job.state, v_job.cancel_requested;
end
$$;

-- What a job waits for has come, or is said to have come: one that waits for its next try is ready now; one at work is due
-- at once should its step end in a snooze or a failure, since what the step saw is outdated by then. Any other is left as
-- it is. While a woken job is at work its `run_at` is later than its `updated_at`; its next transition ends that.
create function upload_pipeline.wake_job(p_job_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs;
begin
  update upload_pipeline.upload_jobs j
     set run_at = greatest(v_now, j.updated_at + interval '1 microsecond')
   where j.job_id = p_job_id and j.state = 'working';
  update upload_pipeline.upload_jobs j set state = 'queued', run_at = least(j.run_at, v_now), updated_at = v_now
   where j.job_id = p_job_id and j.state = 'retryable'
  returning j.* into v_job;
  if found then
    insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, stage, lease_token, correlation_id)
    values (v_now, 'job_promoted', 'debug', v_job.user_id, v_job.document_id, v_job.job_id, v_job.stage, v_job.lease_token,
            v_job.correlation_id);
    perform upload_pipeline.wake_lanes(v_job.pool, array[v_job.user_id]);
  end if;
end
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
