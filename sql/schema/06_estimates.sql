-- How long a job still takes: what the recent past says of each stage by the size of files, and what is in front of it.

-- The typical seconds at work of each stage, by size of file. A report, made anew by refresh_stage_durations; nothing
-- but estimates reads it. `size_class` c holds files of up to 64 KiB x 4^c.
create table upload_pipeline.stage_durations (
  pipeline     text not null,
  stage        text not null,
  size_class   smallint not null,
  seconds      double precision not null,
  samples      integer not null,
  refreshed_at timestamptz not null default upload_pipeline.now(),
  primary key (pipeline, stage, size_class),
  constraint stage_durations_seconds check (seconds >= 0),
  constraint stage_durations_samples check (samples > 0)
);

-- The size class of a file: 0 up to 64 KiB, 1 up to 256 KiB, 2 up to 1 MiB, and so on; 6 for all above 64 MiB.
create function upload_pipeline.size_class(p_bytes bigint)
returns smallint
language sql
immutable
set search_path = ''
as $$ select least(6, greatest(0, ceil(log(4, greatest(p_bytes, 1) / 65536.0))))::smallint $$;

-- Measures the stages anew: the median time at work over the last p_events events of the audit trail, from the claim or
-- the step before to the transition, waits in the queue left out. What the recent past has no sample of keeps its
-- value. Workers run it as part of maintenance; a run beside another, or within p_pause of one, does nothing.
-- Returns how many rows it wrote.
create function upload_pipeline.refresh_stage_durations(
  p_events integer default 20000,
  p_pause  interval default '15 seconds'
)
returns integer
language plpgsql
security definer
set search_path = ''
set jit = off
as $$
declare
  v_now     timestamptz := upload_pipeline.now();
  v_written integer;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('upload_pipeline.refresh_stage_durations', 0))
     or exists (select from upload_pipeline.stage_durations d where d.refreshed_at > v_now - p_pause) then
    return 0;
  end if;
  with recent as materialized (
    -- the primary key of the newest partitions, read backwards
    select e.event_id, e.at, e.code, e.job_id, e.stage, e.lease_token
      from upload_pipeline.events e
     where e.at > v_now - interval '7 days' and e.at <= v_now
     order by e.at desc, e.event_id desc limit p_events
  ), passage as (
    select r.job_id, r.code, r.stage, r.at, r.lease_token,
           lead(r.code) over job as next_code, lead(r.at) over job as next_at, lead(r.lease_token) over job as next_token
      from recent r
     where r.job_id is not null and r.code not in ('document_searchable', 'photo_status_changed')
    window job as (partition by r.job_id order by r.event_id)
  ), sample as (
    select j.pipeline, p.stage, upload_pipeline.size_class(coalesce(d.file_bytes, f.file_bytes)) as size_class,
           extract(epoch from p.next_at - p.at)::double precision as seconds
      from passage p
      join upload_pipeline.upload_jobs j on j.job_id = p.job_id
      left join upload_pipeline.documents d on d.document_id = j.document_id
      left join upload_pipeline.photos f on f.photo_id = j.photo_id
     where p.code in ('job_claimed', 'job_advanced') and p.next_code in ('job_advanced', 'job_handed_on', 'job_done')
       and p.next_token = p.lease_token
  )
  insert into upload_pipeline.stage_durations as t (pipeline, stage, size_class, seconds, samples, refreshed_at)
  select s.pipeline, s.stage, s.size_class, greatest(0, percentile_cont(0.5) within group (order by s.seconds)), count(*), v_now
    from sample s
   group by s.pipeline, s.stage, s.size_class
  on conflict (pipeline, stage, size_class) do update
    set seconds = excluded.seconds, samples = excluded.samples, refreshed_at = excluded.refreshed_at;
  get diagnostics v_written = row_count;
  return v_written;
end
$$;

-- What stands before each of the caller's live jobs among p_job_ids, and when it should be done. Jobs that have ended, and
-- jobs of others, are missing from the answer. The caller is `auth.uid()`, read here. It counts what the caller may not
-- read, other users' jobs, and tells no more of them than how many there are: therefore `security definer`.
--
--   queued_ahead   ready jobs of the same pool that are claimed before this one when all lanes take turns: those before
--                  it in its own lane, and as many of each other lane. 0 for a job at work. At most 10,000, the bound of
--                  what is counted; for jobs before one with more in front an estimate.
--   estimated_completion_at
--                  now + the wait + what its stages take for files of its size. The wait is what stands before it, at the
--                  pool's present concurrency, and no less than its own lane takes at the user's cap. A stage without
--                  history at any size takes its share of p_default_seconds, which a whole document is assumed to take.
--   progress       percent: the stage's; while vectors arrive, on the way to the next stage by the share that is there
--
-- Cost: one walk over the caller's own lane and one over the heads of the others, each of at most 10,000 index entries,
-- however many jobs are asked for and however long the queue is.
create function upload_pipeline.estimate_jobs(
  p_job_ids         uuid[],
  p_default_seconds double precision default 60
)
returns table (job_id uuid, queued_ahead integer, estimated_completion_at timestamptz, progress integer)
language plpgsql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
-- The plans are the same whatever is asked for, and making them takes longer than running them: 1.5 of 2.3 ms.
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_bound  constant integer := 10000;
  v_user   uuid := auth.uid();
  v_now    timestamptz := upload_pipeline.now();
  v_pool   text;
  v_jobs   uuid[];
  v_places integer[];
  v_depths integer[];
  v_deeper integer;
  v_slots  integer;
  v_cap    integer;
begin
  if v_user is null then
    raise exception 'estimate_jobs needs a signed-in user' using errcode = '42501';
  end if;
  for v_pool, v_jobs in
    select j.pool, array_agg(j.job_id) from unnest(p_job_ids) a (job_id)
     cross join lateral (
       -- `offset 0`: by their ids, and never by reading all that the user has had, which looks cheap of an average user
       select u.job_id, u.pool, u.user_id, u.finished_at from upload_pipeline.upload_jobs u
        where u.job_id = a.job_id offset 0) j
     where j.user_id = v_user and j.finished_at is null
     group by j.pool
  loop
    -- places in the caller's own lane, in the order of v_jobs: null for a job at work; one that waits for its next try
    -- stands where it would if it were ready
    with asked as materialized (
      select a.n, j.job_id, j.state, j.priority, j.seq
        from unnest(v_jobs) with ordinality a (job_id, n)
       cross join lateral (
         select u.job_id, u.state, u.priority, u.seq from upload_pipeline.upload_jobs u where u.job_id = a.job_id) j
    ), waiting as materialized (
      (select q.job_id, q.priority, q.seq from upload_pipeline.upload_jobs q
        where q.pool = v_pool and q.user_id = v_user and q.state = 'queued'
        order by q.pool, q.user_id, q.priority desc, q.seq limit v_bound)
      union all
      select a.job_id, a.priority, a.seq from asked a where a.state = 'retryable'
    ), placed as materialized (
      select w.job_id, (row_number() over (order by w.priority desc, w.seq) - 1)::integer as place from waiting w
    )
    select array_agg(case when a.state <> 'working' then coalesce(p.place, v_bound) end order by a.n) into v_places
      from asked a left join placed p on p.job_id = a.job_id;

    -- how deep each other lane is, as far as the last place asked for
    select array_agg(d.jobs) into v_depths
      from (
        select count(*)::integer as jobs
          from (
            select l.user_id from upload_pipeline.lanes l
             cross join lateral (
               select from upload_pipeline.upload_jobs q
                where q.pool = l.pool and q.user_id = l.user_id and q.state = 'queued'
                order by q.pool, q.user_id, q.priority desc, q.seq
                limit (select coalesce(max(p), 0) from unnest(v_places) p)) q
             where l.pool = v_pool and l.ready and l.user_id <> v_user
             limit v_bound) h
         group by h.user_id) d;

    -- lanes that the bound has left uncounted are taken for as deep as it matters
    select case when (select sum(d) from unnest(v_depths) d) < v_bound then 0 else count(*) - cardinality(v_depths) end into v_deeper
      from (select from upload_pipeline.lanes l where l.pool = v_pool and l.ready and l.user_id <> v_user limit v_bound) l;

    -- without a worker in the register: as if there were one slot
    select greatest(1, sum(w.concurrency)) into v_slots from upload_pipeline.workers w
     where v_pool = any (w.pools) and v_pool <> all (w.left_pools) and w.last_beat_at > v_now - interval '2 minutes';
    select least(v_slots, coalesce(max(l.max_in_flight), 1)) into v_cap from upload_pipeline.lanes l
     where l.pool = v_pool and l.user_id = v_user;

    return query
    with step as materialized (
      -- a stage without any history takes an equal share of the whole
      select s.pipeline, s.stage, s.position, p_default_seconds / count(*) over (partition by s.pipeline) as share
        from upload_pipeline.stages s where not s.final
    ), typical as materialized (
      -- what a job in front takes in whole
      select s.pipeline, sum(coalesce(m.seconds, s.share)) as seconds
        from step s
       cross join lateral (
         select sum(d.seconds * d.samples) / sum(d.samples) as seconds from upload_pipeline.stage_durations d
          where d.pipeline = s.pipeline and d.stage = s.stage) m
       group by s.pipeline
    ), asked as materialized (
      select j.*, coalesce(a.place, 0) as place, upload_pipeline.size_class(c.file_bytes) as size_class,
             case when j.state = 'working' then extract(epoch from v_now - j.updated_at) else 0 end::double precision as spent,
             case when j.state = 'working' then 0
                  else least(v_bound, a.place::bigint * (1 + coalesce(v_deeper, 0))
                                + (select coalesce(sum(least(d, a.place)), 0) from unnest(v_depths) d))
             end::integer as ahead
        from unnest(v_jobs, v_places) a (job_id, place)
       cross join lateral (select u.* from upload_pipeline.upload_jobs u where u.job_id = a.job_id) j
       cross join lateral (
         select d.file_bytes from upload_pipeline.documents d where d.document_id = j.document_id
         union all
         select p.file_bytes from upload_pipeline.photos p where p.photo_id = j.photo_id) c
    )
    select a.job_id, a.ahead,
           v_now + make_interval(secs => work.seconds + greatest(
             a.ahead * t.seconds / v_slots, a.place * t.seconds / v_cap,
             case when a.state = 'retryable' then extract(epoch from a.run_at - v_now)::double precision end)),
           f.progress + coalesce(floor((n.progress - f.progress) * vectors.share), 0)::integer
      from asked a
      join typical t on t.pipeline = a.pipeline
      join upload_pipeline.stages f on f.pipeline = a.pipeline and f.stage = a.stage
      left join upload_pipeline.stages n on n.pipeline = a.pipeline and n.position = f.position + 1
     cross join lateral (
       select case when a.pipeline = 'document' and a.stage = 'embedding' then (
         -- counts and no join: vectors of more than one model may lie there, so at most all
         select least(1, ((select count(*) from upload_pipeline.document_vector_buffer v where v.document_id = a.document_id)
                          + (select coalesce(sum(cardinality(k.chunk_ids)), 0) from upload_pipeline.document_cached_chunks k
                              where k.document_id = a.document_id))::double precision / nullif(count(*), 0))
           from upload_pipeline.document_chunk_buffer b
          where b.document_id = a.document_id) end as share) vectors
     cross join lateral (
       select sum(case when s.stage = a.stage then greatest(0, coalesce(m.seconds, s.share) - a.spent)
                       else coalesce(m.seconds, s.share) end) as seconds
         from step s
         left join lateral (
           -- the nearest size that there is history of
           select d.seconds from upload_pipeline.stage_durations d
            where d.pipeline = s.pipeline and d.stage = s.stage
            order by abs(d.size_class - a.size_class), d.size_class limit 1) m on true
        where s.pipeline = a.pipeline and s.position >= f.position) work;
  end loop;
end
$$;
