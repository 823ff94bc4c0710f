-- What has failed for good, of what, and which are the latest of each kind?
--   psql "$WORKER_URL" -f sql/operator/dead_letters.sql
select o.error_code, j.stage, count(*) as jobs, max(j.finished_at) as latest
  from upload_pipeline.upload_jobs j
  left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
 where j.state = 'deadletter'
 group by o.error_code, j.stage
 order by jobs desc, o.error_code, j.stage;

select j.job_id, j.user_id, coalesce(d.filename, p.file_name) as filename, j.stage, o.error_code, left(o.error_message, 120) as error_message, j.finished_at
  from upload_pipeline.upload_jobs j
  left join upload_pipeline.documents d on d.document_id = j.document_id
  left join upload_pipeline.photos p on p.photo_id = j.photo_id
  left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
 where j.state = 'deadletter'
 order by j.finished_at desc
 limit 50;
