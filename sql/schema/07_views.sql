-- What operators and users look at. Each view runs with the rights of who reads it, so row-level security holds.

-- A job as a person asks after it.
create view upload_pipeline.job_overview with (security_invoker = true) as
select j.job_id, j.document_id, j.photo_id, j.user_id, coalesce(d.filename, p.file_name) as filename, j.pipeline, j.stage, j.state, s.progress, j.pool, j.priority,
       j.retry_count, j.cancel_requested, j.run_at, j.created_at, j.started_at, j.updated_at, j.finished_at,
       o.error_code, o.error_message, o.results, j.worker_id, j.lease_expires_at, j.correlation_id, j.seq
  from upload_pipeline.upload_jobs j
  left join upload_pipeline.documents d on d.document_id = j.document_id
  left join upload_pipeline.photos p on p.photo_id = j.photo_id
  join upload_pipeline.stages s on s.pipeline = j.pipeline and s.stage = j.stage
  left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
 -- what is being deleted is gone for its owner, with its jobs
 where d.document_id is not null or p.photo_id is not null;

-- How much stands where: jobs by pipeline, stage and state, and how long the oldest has been there.
create view upload_pipeline.queue_depth with (security_invoker = true) as
select j.pipeline, j.pool, j.stage, s.position, j.state, count(*) as jobs, min(j.updated_at) as oldest
  from upload_pipeline.upload_jobs j
  join upload_pipeline.stages s on s.pipeline = j.pipeline and s.stage = j.stage
 where j.state in ('queued', 'working', 'retryable')
 group by j.pipeline, j.pool, j.stage, s.position, j.state;

-- A document as the one who uploaded it asks after it: one row each, with the latest job of its processing told in four
-- words. `pending`: nobody has begun, or the bytes have not come. `failed`: also where it was cancelled. The same mapping is
-- `upload_pipeline.stages.shown_status`; a test holds the two together. The latest job is the one that has no later one:
-- so a filter by status reads all of a user's jobs in one pass, and twenty rows of a page their own only.
create view upload_pipeline.upload_history with (security_invoker = true) as
select d.document_id, d.user_id, d.filename, d.file_bytes, d.media_type, d.created_at as uploaded_at,
       case when j.job_id is null then case when d.searchable_at is null then 'failed' else 'completed' end
            when j.state = 'done' then 'completed'
            when j.state in ('deadletter', 'cancelled') then 'failed'
            when j.stage = 'queued' and (j.state <> 'working' or d.upload_deadline is not null) then 'pending'
            else 'processing' end as status,
       case when j.job_id is null then d.searchable_at else j.finished_at end as completed_at,
       case when j.state in ('deadletter', 'cancelled')
            then coalesce(o.error_code, case j.state when 'cancelled' then 'CANCELLED' else 'INTERNAL' end) end as error_code,
       case when j.state in ('deadletter', 'cancelled')
            then coalesce(o.error_message, case j.state when 'cancelled' then 'The job was cancelled. Retry it to go on.'
                                                        else 'The job failed.' end) end as error_message,
       d.raw_key, d.upload_deadline is null as stored
  from upload_pipeline.documents d
  left join upload_pipeline.upload_jobs j
    on j.document_id = d.document_id and j.pipeline = 'document'
   and not exists (select from upload_pipeline.upload_jobs n
                    where n.document_id = j.document_id and n.pipeline = 'document' and n.seq > j.seq)
  left join upload_pipeline.job_outcomes o on o.job_id = j.job_id;

-- The embedding models, and how far the one is that is being filled. `chunks_per_second` is the rate of the last five
-- minutes; the time left follows from it. `failed_documents` are those whose job has failed for good since it was added;
-- `failure` is what its provider said in the last ten minutes, twice as long as a worker leaves it alone at most. What a
-- retired model lacks nobody asks, and is not counted. The others' is counted by joins over all chunks: by `|| ''` and
-- `offset 0` the planner does not take what differs for rare, and looks up no vector and no document for each chunk: with
-- 320,000 chunks and a model that is half filled 0.9 s instead of 1.8, and each retired model took 1.3 more.
create view upload_pipeline.model_overview with (security_invoker = true) as
select m.model, m.provider, m.dimensions, m.status, m.paused, m.created_at, m.building_since, m.activated_at, m.retire_at,
       live.chunks, case when m.status <> 'retired' then live.chunks - lacking.chunks end as filled_chunks,
       case when m.status <> 'retired' then lacking.chunks end as lacking_chunks,
       case when m.status <> 'retired' then lacking.documents end as lacking_documents,
       stored.vectors, rate.chunks_per_second,
       case when m.status = 'building' and not m.paused and rate.chunks_per_second > 0
            then make_interval(secs => lacking.chunks / rate.chunks_per_second) end as time_left,
       jobs.open_jobs, jobs.failed_documents, fault.failed_at, fault.failure
  from upload_pipeline.embedding_models m
 cross join lateral (
   select count(*) as chunks from upload_pipeline.document_chunks c
     join upload_pipeline.documents d on d.document_id = c.document_id
    where c.live and d.deleted_at is null) live
 cross join lateral (
   select count(*) as chunks, count(distinct c.document_id) as documents
     from (select c.document_id
             from upload_pipeline.document_chunks c
            where m.status <> 'retired' and c.live and c.embed_model || '' <> m.model
              and not exists (select from upload_pipeline.chunk_vectors s
                               where s.chunk_id = c.chunk_id and s.embed_model || '' = m.model)
           offset 0) c
     join upload_pipeline.documents d on d.document_id = c.document_id
    where d.deleted_at is null) lacking
 cross join lateral (
   select (select count(*) from upload_pipeline.document_chunks c where c.embed_model = m.model)
          + (select count(*) from upload_pipeline.chunk_vectors s where s.embed_model = m.model) as vectors) stored
  left join lateral (
   select count(s.chunk_id) / nullif(extract(epoch from upload_pipeline.now() - w.since), 0)::double precision as chunks_per_second
     from (select greatest(m.building_since, upload_pipeline.now() - interval '5 minutes') as since) w
     left join upload_pipeline.chunk_vectors s on s.embed_model = m.model and s.created_at >= w.since
    where m.status = 'building'
    group by w.since) rate on true
 cross join lateral (
   select count(*) filter (where j.finished_at is null) as open_jobs,
          count(distinct j.document_id) filter (where j.state = 'deadletter' and j.finished_at >= m.building_since) as failed_documents
     from upload_pipeline.upload_jobs j
    where j.pipeline = 'reembed' and m.status = 'building') jobs
  left join lateral (
   select m.failed_at, m.failure
    where m.status = 'building' and m.failed_at >= greatest(m.building_since, upload_pipeline.now() - interval '10 minutes')) fault on true;
