-- Jobs go on from stage to stage, by one and in groups, and are done at the final one. What the verb locks, in this order,
-- and what it returns where the lease is lost:
--
--   verb             locks                                        a stale token
--   advance_jobs     jobs in id order, then lanes in user order   that job is missing from the answer

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
    select m.job_id, m.user_id,
           case when m.state = 'cancelled' then m.results || upload_pipeline.job_cost(m.job_id) else m.results end, v_now
      from moved m where m.results is not null
    on conflict (job_id) do update
      set results = excluded.results, error_code = null, error_message = null, error_details = null, updated_at = v_now
  ), woken as (
    select upload_pipeline.wake_lanes(h.pool, h.user_ids)
      from (select m.pool, array_agg(m.user_id) as user_ids from moved m where m.state = 'queued' group by m.pool
             order by m.pool) h
  ), costs as (
    -- what is done says its cost by its results; an outcome is written by `kept` or here, and not twice
    select upload_pipeline.keep_costs(array_agg(m.job_id))
      from moved m where m.state = 'cancelled' and m.results is null having count(*) > 0
  )
  -- `woken` and `costs` are named here so that they run: a CTE that only reads runs only where it is asked for
  select m.job_id, m.stage, m.state, m.lease_expires_at
    from moved m cross join (select count(*) from woken) w cross join (select count(*) from costs) c
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
