-- Lets users' own tokens sign URLs for their files in a bucket of Supabase Storage: each may add and read
-- raw/<user>/<document>, and change or remove nothing. Where the pipeline's own schema is in the same database, members of an
-- organisation may also add photos to its projects, <project>/<yyyy>/<mm>/<dd>/<photo>.jpg or .png. Workers and the service need no policy, their S3 keys pass them all.
--
-- Write your bucket and prefix below, then run it in the project's SQL editor, or with
--   psql "$UPLOAD_PIPELINE_MIGRATION_DATABASE_URL" -f sql/supabase/storage_policies.sql
-- Safe to repeat: another bucket or prefix takes the place of the one before.
do $$
declare
  v_bucket constant text := 'upload-pipeline';  -- the bucket that UPLOAD_PIPELINE_STORAGE_URL names
  v_prefix constant text := '';                 -- what follows the bucket there, as claims/2026; empty where nothing does
  v_lead   constant text := case v_prefix when '' then '' else v_prefix || '/' end;
  v_rule   text;
begin
  if to_regclass('storage.objects') is null then
    raise notice 'This database has no storage.objects: it belongs to no Supabase project, and needs no policies.';
    return;
  end if;
  -- A name that is no document's would be no orphan either, and stay for good.
  v_rule := format(
    $rule$bucket_id = %L
      and storage.foldername(name) = %L::text[] || array['raw', (select auth.uid())::text]
      and storage.filename(name) ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'$rule$,
    v_bucket, string_to_array(v_prefix, '/'));
  drop policy if exists upload_pipeline_add_own on storage.objects;
  drop policy if exists upload_pipeline_read_own on storage.objects;
  execute format('create policy upload_pipeline_add_own on storage.objects for insert to authenticated with check (%s)', v_rule);
  execute format('create policy upload_pipeline_read_own on storage.objects for select to authenticated using (%s)', v_rule);
  drop policy if exists upload_pipeline_add_photo on storage.objects;
  if to_regclass('upload_pipeline.projects') is null then
    return;
  end if;
  -- Read they are by URLs of the service: a project may hand out copies only.
  v_rule := format(
    $rule$bucket_id = %1$L and starts_with(name, %2$L)
      and substr(name, %3$s) ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/\d{4}/\d{2}/\d{2}/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.(jpg|png)$'
      and exists (
        select from upload_pipeline.organization_members m
          join upload_pipeline.projects p on p.organization_id = m.organization_id
         where m.user_id = (select auth.uid()) and m.role <> 'viewer' and p.project_id::text = substr(objects.name, %3$s, 36))$rule$,
    v_bucket, v_lead, length(v_lead) + 1);
  execute format('create policy upload_pipeline_add_photo on storage.objects for insert to authenticated with check (%s)', v_rule);
end
$$;
