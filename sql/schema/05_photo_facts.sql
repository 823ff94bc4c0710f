-- What the steps find out about a photo's bytes. As with documents, a step's effect and the transition that says it has
-- happened are one call; asked the same again, each verb answers the same again (check_step).

-- uploaded -> extracting of a photo whose project drops the place where photos were taken: the copy without it is in the
-- store. From now on the copy is the photo, whatever the project says later; the original may go.
create function upload_pipeline.commit_photo_copy(
  p_job_id     uuid,
  p_token      bigint,
  p_shared_key text,
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'extracting');
begin
  if v_job.stage = 'extracting' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  -- one that was read before tells its place no more
  update upload_pipeline.photos p set shared_key = p_shared_key, exif = p.exif - 'gps', updated_at = upload_pipeline.now()
   where p.photo_id = v_job.photo_id;
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'uploaded', 'extracting', p_keep, p_ttl);
end
$$;

-- extracting -> extracted: the photo was decoded and its EXIF read, and its thumbnail is in the store. Size and sha256 are
-- of the object that is handed out.
create function upload_pipeline.commit_photo_facts(
  p_job_id        uuid,
  p_token         bigint,
  p_width         integer,
  p_height        integer,
  p_exif          jsonb,
  p_warnings      text[],
  p_thumbnail_key text,
  p_file_bytes    bigint,
  p_file_sha256   text,
  p_keep          boolean default true,
  p_ttl           interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'extracted');
begin
  if v_job.stage = 'extracted' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  update upload_pipeline.photos p
     set width = p_width, height = p_height, exif = p_exif, warnings = p_warnings, thumbnail_key = p_thumbnail_key,
         file_bytes = p_file_bytes, file_sha256 = p_file_sha256, updated_at = upload_pipeline.now()
   where p.photo_id = v_job.photo_id;
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'extracting', 'extracted', p_keep, p_ttl);
end
$$;
