-- Documents are deleted: hidden at once, gone when their objects are.

-- Deletion in two steps, because objects are outside the transaction: begin_deletion hides the document, ends its jobs
-- (a busy worker is fenced off) and names the owner's raw key; then the caller removes the objects; finish_deletion
-- removes the rows. Both are safe to repeat; what a crash leaves between them maintenance finishes.
-- `p_correlation_id` is that of the request; a job that is cancelled keeps the one it came by.
create function upload_pipeline.begin_deletion(p_document_id uuid, p_correlation_id text default '')
returns table (document_id uuid, user_id uuid, raw_key text)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now timestamptz := upload_pipeline.now();
begin
  -- jobs before the document: the order in which the steps of a job lock them
  with ended as (
    update upload_pipeline.upload_jobs j
       set state = 'cancelled', cancel_requested = true, lease_token = j.lease_token + 1, worker_id = null,
           lease_expires_at = null, finished_at = v_now, updated_at = v_now
     where j.document_id = p_document_id and j.state in ('queued', 'working', 'retryable')
    returning j.job_id, j.user_id, j.document_id, j.stage, j.lease_token, j.correlation_id
  )
  insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id)
  select v_now, 'job_cancelled', e.user_id, e.document_id, e.job_id, e.stage, e.lease_token, e.correlation_id from ended e;
  update upload_pipeline.documents d set deleted_at = v_now, updated_at = v_now
   where d.document_id = p_document_id and d.deleted_at is null;
  if found then
    perform upload_pipeline.record_event('document_deletion_started', p_user_id => d.user_id,
      p_document_id => p_document_id, p_correlation_id => p_correlation_id)
       from upload_pipeline.documents d where d.document_id = p_document_id;
  end if;
  return query select d.document_id, d.user_id, d.raw_key from upload_pipeline.documents d where d.document_id = p_document_id;
end
$$;

create function upload_pipeline.finish_deletion(p_document_id uuid, p_correlation_id text default '')
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_user uuid;
begin
  delete from upload_pipeline.documents d
   where d.document_id = p_document_id and d.deleted_at is not null
  returning d.user_id into v_user;
  if not found then
    return false;
  end if;
  perform upload_pipeline.record_event('document_deleted', p_user_id => v_user, p_document_id => p_document_id,
    p_correlation_id => p_correlation_id);
  return true;
end
$$;

-- Deletions begun before p_before and not finished.
create function upload_pipeline.unfinished_deletions(p_before timestamptz, p_limit integer default 100)
returns table (document_id uuid, user_id uuid, raw_key text)
language sql
stable
security definer
set search_path = ''
as $$
  select d.document_id, d.user_id, d.raw_key from upload_pipeline.documents d
   where d.deleted_at is not null and d.deleted_at < p_before
   order by d.deleted_at limit p_limit
$$;
