-- What was used of the providers, by whom and at what cost. One row a call, or a part of one that served several jobs.

-- `usage_id` is given by whoever records, so that what is recorded again after a lost answer counts once. `job_id` is null
-- for what no job asked for (searches). `tokens`, `pages`, `credits`: what the provider counted, in its own units.
-- `cached`: texts or pages that cost nothing because they were there already. `cost_micros`: millionths of a US dollar by
-- the price table of the one who recorded, at that time; null where it has no price for what was used, which is not zero.
-- No foreign keys: what was paid outlives what it was paid for.
create table upload_pipeline.usage_records (
  usage_id    uuid primary key,
  at          timestamptz not null,
  job_id      uuid,
  document_id uuid,
  user_id     uuid,
  provider    text not null,
  model       text not null,
  operation   text not null,
  requests    bigint not null default 0,
  tokens      bigint not null default 0,
  pages       bigint not null default 0,
  credits     numeric(20, 6) not null default 0,
  cached      bigint not null default 0,
  cost_micros numeric(20, 6),
  constraint usage_records_names check (provider <> '' and model <> '' and operation <> ''),
  constraint usage_records_counts check (requests >= 0 and tokens >= 0 and pages >= 0 and credits >= 0 and cached >= 0),
  constraint usage_records_cost check (cost_micros >= 0)
);

-- job_cost: a job's records
create index usage_records_job on upload_pipeline.usage_records (job_id) where job_id is not null;
-- a user's usage, and what becomes of it when a session is claimed or forgotten
create index usage_records_user on upload_pipeline.usage_records (user_id, at) where user_id is not null;
-- usage of a time; rows come in order of time
create index usage_records_at on upload_pipeline.usage_records using brin (at) with (autosummarize = on);

-- What a job has used, all its tries together, as {"cost": {…}} for its results; {} where it used nothing: one look into
-- an index. `usd` is null where a part of it has no price. Volatile, so that it sees what was committed before the lock
-- under which it is called.
create function upload_pipeline.job_cost(p_job_id uuid)
returns jsonb
language plpgsql
volatile
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_cost jsonb;
begin
  select jsonb_build_object('usd', case when count(*) = count(r.cost_micros) then trim_scale(sum(r.cost_micros) / 1000000) end,
                            'requests', sum(r.requests), 'tokens', sum(r.tokens), 'pages', sum(r.pages), 'cached', sum(r.cached))
    into v_cost
    from upload_pipeline.usage_records r where r.job_id = p_job_id
  having count(*) > 0;
  return case when v_cost is null then '{}'::jsonb else jsonb_build_object('cost', v_cost) end;
end
$$;

-- Writes what ended jobs have used into their results, those that have used anything. The caller has locked them.
create function upload_pipeline.keep_costs(p_job_ids uuid[])
returns void
language sql
security definer
set search_path = ''
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  insert into upload_pipeline.job_outcomes as o (job_id, user_id, results, updated_at)
  select j.job_id, j.user_id, c.cost, upload_pipeline.now()
    from upload_pipeline.upload_jobs j
   cross join lateral (select upload_pipeline.job_cost(j.job_id) as cost) c
   where j.job_id = any (p_job_ids) and c.cost <> '{}'
   order by j.job_id
  on conflict (job_id) do update
    -- asked anew, behind the lock of the row: of two that record at once the second counts what the first wrote
    set results = coalesce(o.results, '{}'::jsonb) || upload_pipeline.job_cost(o.job_id), updated_at = excluded.updated_at
$$;

-- Records usage: an array of objects with the names of the table's columns, `usage_id`, `provider`, `model` and
-- `operation` among them. What was recorded before is left out. The user and the document of a record are those of its
-- job, where there is one. Returns how many were new.
--
-- A job that has ended gets its cost written anew. Its row is locked before, in the way that its end waits for: either
-- the job ends behind this call and counts what it wrote, or this call sees that it has ended.
create function upload_pipeline.record_usage(p_records jsonb)
returns integer
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_jobs  uuid[];
  v_ended uuid[];
  v_count integer;
begin
  select array_agg(distinct g.job_id order by g.job_id) into v_jobs
    from jsonb_to_recordset(p_records) g (job_id uuid) where g.job_id is not null;
  perform from upload_pipeline.upload_jobs j where j.job_id = any (v_jobs) order by j.job_id for share;

  with made as (
    insert into upload_pipeline.usage_records
      (usage_id, at, job_id, document_id, user_id, provider, model, operation, requests, tokens, pages, credits, cached, cost_micros)
    select g.usage_id, upload_pipeline.now(), g.job_id, coalesce(j.document_id, g.document_id), coalesce(j.user_id, g.user_id),
           g.provider, g.model, g.operation, coalesce(g.requests, 0), coalesce(g.tokens, 0), coalesce(g.pages, 0),
           coalesce(g.credits, 0), coalesce(g.cached, 0), g.cost_micros
      from jsonb_to_recordset(p_records) g (
             usage_id uuid, job_id uuid, document_id uuid, user_id uuid, provider text, model text, operation text,
             requests bigint, tokens bigint, pages bigint, credits numeric, cached bigint, cost_micros numeric)
      left join upload_pipeline.upload_jobs j on j.job_id = g.job_id
     -- two calls with the same records in opposite order would wait for each other
     order by g.usage_id
    on conflict (usage_id) do nothing
    returning job_id
  )
  select count(*) into v_count from made;

  if v_count > 0 and v_jobs is not null then
    select array_agg(j.job_id order by j.job_id) into v_ended
      from upload_pipeline.upload_jobs j where j.job_id = any (v_jobs) and j.finished_at is not null;
    perform upload_pipeline.keep_costs(v_ended);
  end if;
  return v_count;
end
$$;

-- Usage by user, by day (UTC) and by model. Rows of the reader's own usage, or of all for those who read all. `unpriced`
-- counts the records that no price was known for: the cost lacks theirs.
create view upload_pipeline.usage_by_user with (security_invoker = true) as
select r.user_id, r.provider, r.model, r.operation, count(distinct r.document_id) as documents, sum(r.requests) as requests,
       sum(r.tokens) as tokens, sum(r.pages) as pages, sum(r.credits) as credits, sum(r.cached) as cached,
       sum(r.cost_micros) as cost_micros, count(*) - count(r.cost_micros) as unpriced, min(r.at) as first_at, max(r.at) as last_at
  from upload_pipeline.usage_records r
 group by r.user_id, r.provider, r.model, r.operation;

create view upload_pipeline.usage_by_day with (security_invoker = true) as
select (r.at at time zone 'UTC')::date as day, r.provider, r.model, r.operation, count(distinct r.document_id) as documents,
       sum(r.requests) as requests, sum(r.tokens) as tokens, sum(r.pages) as pages, sum(r.credits) as credits,
       sum(r.cached) as cached, sum(r.cost_micros) as cost_micros, count(*) - count(r.cost_micros) as unpriced
  from upload_pipeline.usage_records r
 group by 1, r.provider, r.model, r.operation;

create view upload_pipeline.usage_by_model with (security_invoker = true) as
select r.provider, r.model, r.operation, count(distinct r.user_id) as users, count(distinct r.document_id) as documents,
       sum(r.requests) as requests, sum(r.tokens) as tokens, sum(r.pages) as pages, sum(r.credits) as credits,
       sum(r.cached) as cached, sum(r.cost_micros) as cost_micros, count(*) - count(r.cost_micros) as unpriced
  from upload_pipeline.usage_records r
 group by r.provider, r.model, r.operation;
