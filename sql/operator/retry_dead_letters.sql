-- Action: every dead letter of one error code starts again where it stopped. Those of a document or a photo that is being
-- deleted, and those of a document that has another live job, are left. At most `at_most` (default 1000) a run, oldest first: run it again for the rest.
--   psql "$WORKER_URL" -v code=PARSER_FAILED -f sql/operator/retry_dead_letters.sql
\if :{?at_most}
\else
  \set at_most 1000
\endif
select r.job_id, r.stage, r.state
  from (select j.job_id
          from upload_pipeline.upload_jobs j
          join upload_pipeline.job_outcomes o on o.job_id = j.job_id and o.error_code = :'code'
          left join upload_pipeline.documents d on d.document_id = j.document_id and d.deleted_at is null
          left join upload_pipeline.photos p on p.photo_id = j.photo_id and p.deleted_at is null
         where j.state = 'deadletter' and (d.document_id is not null or p.photo_id is not null)
           -- the latest of a document, and nothing else of it under way: one of its jobs may be live at a time
           and not exists (select from upload_pipeline.upload_jobs k
                            where k.document_id = j.document_id and k.pipeline = j.pipeline
                              and (k.state in ('queued', 'working', 'retryable') or k.seq > j.seq))
         order by j.finished_at
         limit :at_most) dead
 cross join lateral upload_pipeline.retry_job(dead.job_id) r;
