-- Which documents does a hosted parser have, since when, and which parses may exist there that nobody knows of?
--   psql "$WORKER_URL" -f sql/operator/hosted_parses.sql
--   psql "$WORKER_URL" -v longer='10 minutes' -f sql/operator/hosted_parses.sql
\if :{?longer}
\else
  \set longer '0 seconds'
\endif
select j.job_id, j.document_id, s.provider, s.tier, s.version, s.parse_id,
       case when s.parse_id is not null then 'at work' when s.called_until > now() then 'being submitted'
            when s.called_at is not null then 'to be looked for' else 'to be submitted' end as parse,
       date_trunc('second', now() - coalesce(s.submitted_at, s.begun_at)) as since, j.stage, j.state, j.run_at
  from upload_pipeline.upload_jobs j
  join upload_pipeline.documents d on d.document_id = j.document_id
  join upload_pipeline.parse_submissions s
    on s.document_id = j.document_id and s.failed_at is null and s.finished_at is null
   and (s.parse_id is null or s.parse_id = d.parse_id)
 where j.stage in ('job_validated', 'parsing') and j.state in ('queued', 'working', 'retryable') and j.pipeline = 'document'
   and coalesce(s.submitted_at, s.begun_at) <= now() - :'longer'::interval
 order by coalesce(s.submitted_at, s.begun_at);
