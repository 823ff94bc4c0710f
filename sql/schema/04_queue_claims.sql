-- Leases on jobs: given, renewed, checked, handed back. What each verb locks, in this order, and what it returns where
-- the lease is lost:
--
--   verb             locks                                        a stale token
--   claim_jobs       lanes, then jobs, both SKIP LOCKED           -
--   renew_leases     jobs in id order                             that job is missing from the answer
--   check_lease      one job                                      raises UP001: undoes the caller's transaction
--   check_step       one job                                      raises UP001: undoes the caller's transaction
--   record_fenced_write  one job                                  is what it notes
--   release_jobs     jobs in id order, then lanes in user order   that job is missing from the answer
--
-- The fence. `lease_token` only grows: a claim and a restart raise it. Whoever writes for a job names the token it was
-- given, and the write happens only where the row still has that token and is `working`. So at most one claimant of a
-- job can ever write, however late, however often, and whatever it believes of the time. A fence reads `working` as
-- "has a lease", which a constraint makes the same thing: told the state, the planner may look the job up in the partial
-- index of working jobs and read all of them; told the lease, it has only the primary key.

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
-- Where all of them were empty before, since their jobs were cancelled or deleted, the next ones are looked at at once, a
-- bounded number of times: else the jobs behind them would wait for as many looks of an idle worker.
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
  v_rounds  constant integer := 20;
  v_now     timestamptz := upload_pipeline.now();
  v_after   uuid := coalesce(p_after_user, '00000000-0000-0000-0000-000000000000');
  v_users   uuid[];
  v_more    uuid[];
  v_claimed integer;
  v_parked  integer;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'claim_jobs needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'The cap is exact only where each statement has a snapshot of its own.';
  end if;
  if p_limit is null or p_limit < 1 then
    raise exception 'p_limit is %, it must be at least 1', p_limit using errcode = '22023';
  end if;

  for v_round in 1..v_rounds loop
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
    exit when v_users is null;

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
    get diagnostics v_claimed = row_count;

    update upload_pipeline.lanes l set ready = false
     where l.pool = p_pool and l.user_id = any (v_users)
       and not exists (select from upload_pipeline.upload_jobs j
                        where j.pool = p_pool and j.user_id = l.user_id and j.state = 'queued');
    get diagnostics v_parked = row_count;
    exit when v_claimed > 0 or v_parked = 0;
  end loop;
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
  v_ended uuid[];
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
  select array_agg(b.job_id), array_agg(b.job_id) filter (where b.state = 'cancelled') into v_back, v_ended from back b;
  if v_ended is not null then
    perform upload_pipeline.keep_costs(v_ended);
  end if;

  for v_lanes in
    select j.pool, array_agg(j.user_id) as user_ids from upload_pipeline.upload_jobs j
     where j.job_id = any (v_back) and j.state = 'queued' group by j.pool order by j.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, v_lanes.user_ids);
  end loop;

  return query select j.job_id, j.state from upload_pipeline.upload_jobs j where j.job_id = any (v_back);
end
$$;
