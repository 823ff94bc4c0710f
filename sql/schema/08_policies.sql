-- Row-level security and grants. Users read their own rows; buffers, lanes and workers are not theirs to read; nobody
-- who logs in writes a table: the verbs do. `(select auth.uid())` and not `auth.uid()`, so that it is computed once
-- for a statement and not for each row.

do $$
declare
  v_table text;
begin
  for v_table in
    select c.relname from pg_catalog.pg_class c
     where c.relnamespace = 'upload_pipeline'::regnamespace and c.relkind in ('r', 'p')
  loop
    execute format('alter table upload_pipeline.%I enable row level security', v_table);
  end loop;

  foreach v_table in array array[
    'stages', 'embedding_models', 'documents', 'upload_jobs', 'job_outcomes', 'lanes', 'events', 'document_chunk_buffer',
    'document_vector_buffer', 'document_cached_chunks', 'document_chunks', 'document_outline', 'workers',
    'stage_durations', 'policies', 'batches', 'batch_members', 'processing_records', 'provider_budgets',
    'provider_reservations', 'usage_records', 'organizations', 'organization_members', 'projects', 'photos', 'parse_submissions',
    'photo_detection_requests', 'chunk_vectors', 'upkeep_rounds']
  loop
    execute format('create policy %I on upload_pipeline.%I for select to upload_worker using (true)', v_table || '_worker', v_table);
    execute format('grant select on upload_pipeline.%I to upload_worker, service_role', v_table);
  end loop;

  foreach v_table in array array[
    'job_outcomes', 'events', 'document_outline', 'policies', 'batches', 'batch_members',
    'usage_records']
  loop
    execute format(
      'create policy %I on upload_pipeline.%I for select to authenticated using (user_id = (select auth.uid()))',
      v_table || '_owner', v_table);
    execute format('grant select on upload_pipeline.%I to authenticated', v_table);
  end loop;
end
$$;

-- a document that is being deleted is gone for its user, and so is what hangs on it once the rows go
create policy documents_owner on upload_pipeline.documents for select to authenticated
  using (user_id = (select auth.uid()) and deleted_at is null);
create policy document_chunks_owner on upload_pipeline.document_chunks for select to authenticated
  using (user_id = (select auth.uid()) and live);
-- what belongs to an organisation is its members' to see: the array is found once for a statement, and is short
do $$
declare
  v_table text;
begin
  foreach v_table in array array['organizations', 'organization_members', 'projects'] loop
    execute format(
      'create policy %I on upload_pipeline.%I for select to authenticated
         using (organization_id = any ((select upload_pipeline.member_organizations())::uuid[]))',
      v_table || '_member', v_table);
    execute format('grant select on upload_pipeline.%I to authenticated', v_table);
  end loop;
end
$$;
create policy photos_member on upload_pipeline.photos for select to authenticated
  using (organization_id = any ((select upload_pipeline.member_organizations())::uuid[]) and deleted_at is null);
-- filling a model is nothing that a user asked for, or can act on
create policy upload_jobs_owner on upload_pipeline.upload_jobs for select to authenticated
  using (user_id = (select auth.uid()) and pipeline <> 'reembed');
create policy stages_reader on upload_pipeline.stages for select to authenticated using (true);
grant select on upload_pipeline.documents, upload_pipeline.document_chunks, upload_pipeline.upload_jobs, upload_pipeline.stages,
  upload_pipeline.photos to authenticated;
grant select on upload_pipeline.model_overview to upload_worker, service_role;
grant select on upload_pipeline.job_overview, upload_pipeline.queue_depth, upload_pipeline.upload_history,
  upload_pipeline.batch_overview, upload_pipeline.batch_member_overview, upload_pipeline.document_nodes,
  upload_pipeline.document_edges,
  upload_pipeline.usage_by_user, upload_pipeline.usage_by_day, upload_pipeline.usage_by_model to authenticated, upload_worker, service_role;

-- Functions are executable by everybody unless that is taken back.
revoke execute on all functions in schema upload_pipeline from public;

grant execute on function
  upload_pipeline.now(),
  upload_pipeline.estimate_jobs(uuid[], double precision),
  upload_pipeline.member_organizations(),
  upload_pipeline.photo_progress(uuid[]),
  upload_pipeline.search_chunks(text, extensions.vector, text, integer, text, uuid[], jsonb)
  to authenticated;

do $$
declare
  v_function regprocedure;
begin
  for v_function in
    select p.oid::regprocedure from pg_catalog.pg_proc p
     where p.pronamespace = 'upload_pipeline'::regnamespace
       -- inner parts of the verbs, and what only the schema's owner may do
       and p.proname not in ('new_job_id', 'wake_lanes', 'check_step', 'prepare_restart', 'drop_event_partitions',
                             'notify_watchers', 'settle_batch_members', 'wake_job', 'lock_awaited', 'lock_latest_job',
                             'check_no_stranger', 'look_for_upload', 'resume_upload_job', 'move_session_documents',
                             'forget_session_document', 'keep_named_models', 'lock_budget', 'job_cost', 'keep_costs', 'note_photo_status',
                             'lock_photo_job', 'start_photo_deletion', 'check_owner', 'check_vectors', 'today', 'touch_vectors',
                             'move_user_vectors', 'note_parse', 'set_detections', 'detection_results', 'hold_models',
                             'lacks_vectors', 'note_model_change', 'pending_chunks', 'place_vectors')
  loop
    execute format('grant execute on function %s to upload_worker, service_role', v_function);
  end loop;
end
$$;

-- Workers and the terminal see whether migrations are pending. Where this file is not run as a migration there is no ledger.
do $$
begin
  if to_regclass('supabase_migrations.schema_migrations') is not null then
    grant usage on schema supabase_migrations to upload_worker;
    grant select on supabase_migrations.schema_migrations to upload_worker;
  end if;
end
$$;

notify pgrst, 'reload schema';
