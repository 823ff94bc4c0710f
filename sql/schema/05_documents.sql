-- Documents: acceptance, the effects of the steps up to the markdown, restart. What follows is in 05_document_chunks and
-- 05_document_vectors, their end in 05_document_deletion. A step's effect and the transition that says it has happened are
-- one call, so one transaction: each verb of a step, here and there, checks the lease, writes, and advances the job. Asked
-- the same again, each answers the same again (check_step).

-- A file's bytes are in the store: makes document, job and event, or gives back the ones there are. `duplicate` says
-- which. The document's id is computed by the caller from user and bytes, so doing this twice is doing it once. A document
-- that awaits these very bytes (05_uploads) has them now: it becomes what came, with its job, and is no duplicate.
create function upload_pipeline.accept_document(
  p_document_id    uuid,
  p_user_id        uuid,
  p_filename       text,
  p_media_type     text,
  p_file_bytes     bigint,
  p_file_sha256    text,
  p_raw_key        text,
  p_metadata       jsonb default '{}',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (document_id uuid, job_id uuid, duplicate boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now      timestamptz := upload_pipeline.now();
  v_document upload_pipeline.documents;
begin
  -- once more where the document that stood in the way has gone, or got its bytes, since it was met
  loop
    insert into upload_pipeline.documents as d
      (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata, created_at, updated_at)
    values (p_document_id, p_user_id, p_filename, p_media_type, p_file_bytes, p_file_sha256, p_raw_key, p_metadata,
            v_now, v_now)
    -- of any index: told one, a rival that has only just begun breaks the others
    on conflict do nothing;
    if found then
      perform upload_pipeline.record_event('document_accepted', p_user_id => p_user_id, p_document_id => p_document_id,
        p_correlation_id => p_correlation_id,
        p_payload => jsonb_build_object('filename', p_filename, 'media_type', p_media_type, 'file_bytes', p_file_bytes));
      return query
        select e.document_id, e.job_id, false
          from upload_pipeline.enqueue_job(p_document_id, p_user_id, 'document', p_priority, p_correlation_id) e;
      return;
    end if;
    return query select * from upload_pipeline.find_duplicate(p_user_id, p_file_sha256);
    if found then
      return;
    end if;
    v_document := upload_pipeline.lock_awaited(p_user_id, p_file_sha256);
    exit when v_document.document_id is not null;
    perform upload_pipeline.check_no_stranger(p_document_id, p_user_id);
  end loop;

  if v_document.raw_key <> p_raw_key then
    raise exception 'document % awaits these bytes at another place', v_document.document_id
      using errcode = 'UP003', hint = 'Send the file again.';
  end if;
  update upload_pipeline.documents d
     set filename = p_filename, media_type = p_media_type, file_bytes = p_file_bytes, metadata = p_metadata,
         upload_deadline = null, updated_at = v_now
   where d.document_id = v_document.document_id;
  perform upload_pipeline.record_event('document_accepted', p_user_id => p_user_id,
    p_document_id => v_document.document_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('filename', p_filename, 'media_type', p_media_type, 'file_bytes', p_file_bytes));
  return query
    select v_document.document_id,
           upload_pipeline.resume_upload_job(v_document.document_id, p_user_id, p_priority, p_correlation_id), false;
end
$$;

-- The document that a user's bytes already are, with its latest job. No row: there is none, or one that still awaits its
-- bytes. A document that is being deleted raises UP003.
create function upload_pipeline.find_duplicate(p_user_id uuid, p_file_sha256 text)
returns table (document_id uuid, job_id uuid, duplicate boolean)
language plpgsql
stable
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_document upload_pipeline.documents;
begin
  select d.* into v_document from upload_pipeline.documents d
   where d.user_id = p_user_id and d.file_sha256 = p_file_sha256;
  if not found then
    return;
  end if;
  if v_document.deleted_at is not null then
    raise exception 'document % with the same bytes is being deleted', v_document.document_id
      using errcode = 'UP003', hint = 'Send the file again in a moment.';
  end if;
  if v_document.upload_deadline is not null then
    return;
  end if;
  return query
    select v_document.document_id, j.job_id, true
      from (select 1) one
      left join lateral (
        select u.job_id from upload_pipeline.upload_jobs u
         where u.document_id = v_document.document_id and u.pipeline = 'document'
         order by u.seq desc limit 1) j on true;
end
$$;

-- parsing -> parsed: the parser's output is in the store.
create function upload_pipeline.commit_parse(
  p_job_id     uuid,
  p_token      bigint,
  p_parser     text,
  p_page_count integer,
  p_warnings   text[],
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'parsed');
begin
  if v_job.stage = 'parsed' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  update upload_pipeline.documents d
     set parser = p_parser, page_count = p_page_count, warnings = p_warnings, updated_at = upload_pipeline.now()
   where d.document_id = v_job.document_id;
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'parsing', 'parsed', p_keep, p_ttl);
end
$$;

-- parsed -> parse_validated: the normalised markdown is in the store; these are its facts.
create function upload_pipeline.commit_markdown(
  p_job_id          uuid,
  p_token           bigint,
  p_markdown_key    text,
  p_markdown_sha256 text,
  p_markdown_chars  integer,
  p_page_starts     integer[],
  p_keep            boolean default true,
  p_ttl             interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'parse_validated');
begin
  if v_job.stage = 'parse_validated' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  update upload_pipeline.documents d
     set markdown_key = p_markdown_key, markdown_sha256 = p_markdown_sha256, markdown_chars = p_markdown_chars,
         page_starts = p_page_starts, updated_at = upload_pipeline.now()
   where d.document_id = v_job.document_id;
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'parsed', 'parse_validated', p_keep, p_ttl);
end
$$;

-- What a restart at a stage needs of the document's buffers. At or before `chunking` both are dropped: they are made
-- again. Behind it the chunk buffer is what the steps read, and an embedded document has none left, so it is filled
-- from the live chunks. Before `parsing` the document forgets who parsed it: the setting of the day decides anew. What a hosted
-- parser is still to bring may be waited for as long again.
create function upload_pipeline.prepare_restart(p_pipeline text, p_document_id uuid, p_stage text)
returns void
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
set jit = off
as $$
begin
  if p_pipeline <> 'document' then
    return;
  end if;
  if (select a.position <= b.position from upload_pipeline.stages a, upload_pipeline.stages b
       where a.pipeline = 'document' and a.stage = p_stage and b.pipeline = 'document' and b.stage = 'chunking') then
    delete from upload_pipeline.document_cached_chunks k where k.document_id = p_document_id;
    delete from upload_pipeline.document_vector_buffer v where v.document_id = p_document_id;
    delete from upload_pipeline.document_chunk_buffer b where b.document_id = p_document_id;
    update upload_pipeline.parse_submissions s set begun_at = upload_pipeline.now()
     where s.document_id = p_document_id and s.failed_at is null and s.finished_at is null;
    if (select a.position < b.position from upload_pipeline.stages a, upload_pipeline.stages b
         where a.pipeline = 'document' and a.stage = p_stage and b.pipeline = 'document' and b.stage = 'parsing') then
      update upload_pipeline.documents d
         set parse_provider = null, parse_id = null, parse_tier = null, parse_version = null, parse_submitted_at = null
       where d.document_id = p_document_id and d.parse_id is not null;
    end if;
  elsif not exists (select from upload_pipeline.document_chunk_buffer b where b.document_id = p_document_id) then
    insert into upload_pipeline.document_chunk_buffer
      (document_id, user_id, ordinal, chunk_id, text, chunk_sha256, chunker, start_offset, end_offset, page_from, page_to,
       heading_path, section_ids)
    select c.document_id, c.user_id, c.ordinal, c.chunk_id, c.text, c.chunk_sha256, c.chunker, c.start_offset,
           c.end_offset, c.page_from, c.page_to, c.heading_path, c.section_ids
      from upload_pipeline.document_chunks c
     where c.document_id = p_document_id and c.live;
  end if;
end
$$;
