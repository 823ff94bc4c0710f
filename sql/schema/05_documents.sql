-- Documents: acceptance, the effects of each step, restart, deletion. A step's effect and the transition that says it
-- has happened are one call, so one transaction: each verb here checks the lease, writes, and advances the job. Asked
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

-- chunking -> chunks_buffered: p_chunks is the document's whole new set, an array of objects with the columns of
-- `document_chunk_buffer` from ordinal to section_ids. It replaces what an earlier try had buffered.
--
-- Rows travel as one parameter and not by COPY: COPY is refused on a table with row-level security for any role that
-- does not bypass it, and one call is one round trip with the fence inside.
create function upload_pipeline.buffer_chunks(
  p_job_id uuid,
  p_token  bigint,
  p_chunks jsonb,
  p_keep   boolean default true,
  p_ttl    interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'chunks_buffered');
begin
  if v_job.stage = 'chunks_buffered' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  if jsonb_array_length(p_chunks) = 0 then
    raise exception 'no chunks were handed in for document %', v_job.document_id using errcode = 'UP005';
  end if;
  delete from upload_pipeline.document_chunk_buffer b where b.document_id = v_job.document_id;
  insert into upload_pipeline.document_chunk_buffer
    (document_id, user_id, ordinal, chunk_id, text, chunk_sha256, chunker, start_offset, end_offset, page_from, page_to,
     heading_path, section_ids)
  select v_job.document_id, v_job.user_id, c.ordinal, c.chunk_id, c.text, c.chunk_sha256, c.chunker, c.start_offset,
         c.end_offset, c.page_from, c.page_to, c.heading_path, c.section_ids
    from jsonb_to_recordset(p_chunks) as c (
           ordinal integer, chunk_id uuid, text text, chunk_sha256 text, chunker text, start_offset integer,
           end_offset integer, page_from integer, page_to integer, heading_path text[], section_ids uuid[]);
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'chunking', 'chunks_buffered', p_keep, p_ttl);
end
$$;

-- chunks_buffered -> chunked: the buffered chunks that are not stored yet are stored, not live; readers see nothing.
create function upload_pipeline.commit_chunks(
  p_job_id uuid,
  p_token  bigint,
  p_keep   boolean default true,
  p_ttl    interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
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
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'chunked');
begin
  if v_job.stage = 'chunked' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  if not exists (select from upload_pipeline.document_chunk_buffer b where b.document_id = v_job.document_id) then
    raise exception 'the chunk buffer of document % is empty', v_job.document_id
      using errcode = 'UP005', hint = 'Retry the job from stage "chunking".';
  end if;
  insert into upload_pipeline.document_chunks
    (chunk_id, document_id, user_id, ordinal, text, chunk_sha256, chunker, start_offset, end_offset, page_from, page_to,
     heading_path, section_ids, created_at)
  select b.chunk_id, b.document_id, b.user_id, b.ordinal, b.text, b.chunk_sha256, b.chunker, b.start_offset,
         b.end_offset, b.page_from, b.page_to, b.heading_path, b.section_ids, upload_pipeline.now()
    from upload_pipeline.document_chunk_buffer b
   where b.document_id = v_job.document_id
   order by b.ordinal
  on conflict (chunk_id) do nothing;
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'chunks_buffered', 'chunked', p_keep, p_ttl);
end
$$;

-- The buffered chunks of a document that have no vector of a model yet, neither buffered nor stored, in document order.
create function upload_pipeline.pending_vectors(p_document_id uuid, p_model text, p_limit integer default 256)
returns table (chunk_id uuid, text text)
language sql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
set jit = off
as $$
  select b.chunk_id, b.text
    from upload_pipeline.document_chunk_buffer b
   where b.document_id = p_document_id
     and not exists (select from upload_pipeline.document_vector_buffer v
                      where v.chunk_id = b.chunk_id and v.embed_model = p_model
                        and (v.text_sha256 is null
                             or exists (select from upload_pipeline.embedding_cache e
                                         where e.user_id = b.user_id and e.model = p_model and e.text_sha256 = v.text_sha256
                                           and e.dimensions = (select m.dimensions from upload_pipeline.embedding_models m
                                                                where m.model = p_model))))
     and not exists (select from upload_pipeline.document_chunks c
                      where c.chunk_id = b.chunk_id and c.embed_model = p_model)
     and not exists (select from upload_pipeline.chunk_vectors s
                      where s.chunk_id = b.chunk_id and s.embed_model = p_model)
   order by b.ordinal
   limit p_limit
$$;

-- The dimensions of a model that is registered, which are those of all the vectors.
create function upload_pipeline.check_vectors(p_model text, p_embeddings extensions.vector[])
returns integer
language plpgsql
stable
security definer
set search_path = ''
as $$
declare
  v_dimensions integer;
  v_wrong      integer;
begin
  select m.dimensions into v_dimensions from upload_pipeline.embedding_models m where m.model = p_model;
  if not found then
    raise exception 'there is no embedding model "%"', p_model
      using errcode = 'UP002', hint = 'Add it with `upload-pipeline models add`.';
  end if;
  select extensions.vector_dims(e) into v_wrong from unnest(p_embeddings) e where extensions.vector_dims(e) <> v_dimensions limit 1;
  if found then
    raise exception 'a vector of % dimensions came for model "%", which has %', v_wrong, p_model, v_dimensions using errcode = 'UP005';
  end if;
  return v_dimensions;
end
$$;

-- Puts vectors where a job's chunks have them: those of a document that is processed into the buffer, those that a model
-- is filled with (pipeline `reembed`) beside the live chunks. One place in the arrays for each chunk, with its job; the
-- caller holds the jobs. With the SHA-256 of a text the buffer names the vector that the cache has for it, and needs none.
-- Vectors that are there already stay, and what is no chunk of the job's document is left out. Of a model that was given up
-- nothing is put beside live chunks. Returns the chunks that got theirs.
create function upload_pipeline.place_vectors(
  p_model text, p_job_ids uuid[], p_chunk_ids uuid[], p_embeddings extensions.vector[], p_texts bytea[] default '{}'
)
returns uuid[]
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
declare
  v_refills uuid[] := array(select j.job_id from upload_pipeline.upload_jobs j
                             where j.job_id = any (p_job_ids) and j.pipeline = 'reembed');
  v_placed  uuid[];
  v_more    uuid[];
begin
  with placed as (
    insert into upload_pipeline.document_vector_buffer as v (chunk_id, embed_model, document_id, embedding, text_sha256)
    select distinct on (b.chunk_id) b.chunk_id, p_model, b.document_id, case when a.text_sha256 is null then a.embedding end, a.text_sha256
      from unnest(p_job_ids, p_chunk_ids, p_embeddings, p_texts) a (job_id, chunk_id, embedding, text_sha256)
      join upload_pipeline.upload_jobs j on j.job_id = a.job_id
      join upload_pipeline.document_chunk_buffer b on b.chunk_id = a.chunk_id and b.document_id = j.document_id
     where a.job_id <> all (v_refills)
     order by b.chunk_id
    -- the name of a vector that was forgotten meanwhile is as good as none
    on conflict (chunk_id, embed_model) do update set embedding = excluded.embedding, text_sha256 = excluded.text_sha256
       where v.text_sha256 is not null
    returning chunk_id
  )
  select coalesce(array_agg(p.chunk_id), '{}') into v_placed from placed p;
  if v_refills = '{}' then
    return v_placed;
  end if;

  -- the document before its chunks, as commit_embeddings and settle_models have it
  perform from upload_pipeline.documents d
   where d.document_id = any (array(select j.document_id from upload_pipeline.upload_jobs j where j.job_id = any (v_refills)))
   order by d.document_id for no key update;
  with placed as (
    insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding, created_at)
    select c.chunk_id, p_model, c.document_id, a.embedding, upload_pipeline.now()
      from unnest(p_job_ids, p_chunk_ids, p_embeddings) a (job_id, chunk_id, embedding)
      join upload_pipeline.upload_jobs j on j.job_id = a.job_id
      join upload_pipeline.document_chunks c on c.chunk_id = a.chunk_id and c.document_id = j.document_id
      join upload_pipeline.embedding_models m on m.model = p_model and m.status <> 'retired'
     where a.job_id = any (v_refills) and c.live and c.embed_model <> p_model
     order by c.chunk_id
    on conflict (chunk_id, embed_model) do nothing
    returning chunk_id
  )
  select coalesce(array_agg(p.chunk_id), '{}') into v_more from placed p;
  return v_placed || v_more;
end
$$;

-- Stores vectors of a job's chunks as they arrive; ones that are there already stay. Returns how many were new.
create function upload_pipeline.buffer_vectors(
  p_job_id     uuid,
  p_token      bigint,
  p_model      text,
  p_chunk_ids  uuid[],
  p_embeddings extensions.vector[]
)
returns integer
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
  perform upload_pipeline.check_lease(p_job_id, p_token);
  if cardinality(p_chunk_ids) <> cardinality(p_embeddings) then
    raise exception '% vectors came for % chunks', cardinality(p_embeddings), cardinality(p_chunk_ids) using errcode = 'UP005';
  end if;
  perform upload_pipeline.check_vectors(p_model, p_embeddings);
  return cardinality(upload_pipeline.place_vectors(
    p_model, array_fill(p_job_id, array[cardinality(p_chunk_ids)]), p_chunk_ids, p_embeddings));
end
$$;

-- embeddings_buffered -> embedded, the job's end: in one transaction the new set gets its vectors and becomes live,
-- rows that are no longer in it go, nodes and edges are written anew, and the buffers are emptied. Until it commits
-- readers see the old set, after it the new one. Chunks that did not change keep their rows and vectors.
--
-- p_model is the model that the caller takes for the active one. UP007 where it is not, or where a chunk has no vector of
-- it: the caller embeds what is lacking, and asks again. A chunk's first vector stands in its row; those of other models
-- that were buffered stand beside it. Where a model is being filled that the set lacks vectors of, a job is made for them,
-- so that nothing becomes live unknown to the filling.
create function upload_pipeline.commit_embeddings(
  p_job_id uuid,
  p_token  bigint,
  p_model  text,
  p_ttl    interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
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
declare
  v_now      timestamptz := upload_pipeline.now();
  v_job      upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'embedded');
  v_document uuid := v_job.document_id;
  v_active   text;
  v_dimensions integer;
  v_building text;
  v_chunks   integer;
  v_missing  integer;
  v_lacking  integer;
  v_nodes    integer;
  v_edges    integer;
begin
  if v_job.stage = 'embedded' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  if v_job.stage <> 'embeddings_buffered' then
    raise exception 'job % is at stage "%", not "embeddings_buffered"', p_job_id, v_job.stage using errcode = 'UP004';
  end if;
  -- no model becomes the active one between here and the commit, and nobody else writes chunks of this document
  perform upload_pipeline.hold_models();
  perform from upload_pipeline.documents d where d.document_id = v_document for no key update;
  select m.model, m.dimensions into v_active, v_dimensions from upload_pipeline.embedding_models m where m.status = 'active';
  if v_active is distinct from p_model then
    raise exception 'vectors of "%" were made for document %, and the active embedding model is "%"', p_model, v_document, v_active
      using errcode = 'UP007', hint = 'Embed what lacks a vector of that model, then commit again.';
  end if;
  select count(*), count(*) filter (where c.chunk_id is null) into v_chunks, v_missing
    from upload_pipeline.document_chunk_buffer b
    left join upload_pipeline.document_chunks c on c.chunk_id = b.chunk_id
   where b.document_id = v_document;
  if v_chunks = 0 or v_missing > 0 then
    raise exception 'document %: % of % buffered chunks lack a row', v_document, v_missing, v_chunks
      using errcode = 'UP005', hint = 'Retry the job from stage "chunking".';
  end if;

  delete from upload_pipeline.document_chunks c
   where c.document_id = v_document
     and not exists (select from upload_pipeline.document_chunk_buffer b where b.chunk_id = c.chunk_id);

  -- apart from the vectors: what names heading_path computes search_vector anew, at more than all else costs
  update upload_pipeline.document_chunks c
     set start_offset = b.start_offset, end_offset = b.end_offset, page_from = b.page_from, page_to = b.page_to,
         heading_path = b.heading_path, section_ids = b.section_ids
    from upload_pipeline.document_chunk_buffer b
   where b.document_id = v_document and c.chunk_id = b.chunk_id
     and (c.start_offset, c.end_offset, c.page_from, c.page_to, c.heading_path, c.section_ids)
         is distinct from (b.start_offset, b.end_offset, b.page_from, b.page_to, b.heading_path, b.section_ids);
  update upload_pipeline.document_chunks c
     set embedding = coalesce(c.embedding, v.embedding, e.embedding), embed_model = coalesce(c.embed_model, p_model), live = true
    from upload_pipeline.document_chunk_buffer b
    left join upload_pipeline.document_vector_buffer v on v.chunk_id = b.chunk_id and v.embed_model = p_model
    left join lateral (
      select k.embedding, k.text_sha256 from upload_pipeline.embedding_cache k
       where k.user_id = v_job.user_id and k.model = p_model and k.dimensions = v_dimensions and k.text_sha256 = v.text_sha256
      offset 0) e on true
   where b.document_id = v_document and c.chunk_id = b.chunk_id and not c.live
     and coalesce(c.embed_model, v.embed_model) is not null
     and (c.embedding is not null or v.text_sha256 is null or e.text_sha256 is not null);

  insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding, created_at)
  select c.chunk_id, v.embed_model, v_document, coalesce(v.embedding, e.embedding), v_now
    from upload_pipeline.document_chunk_buffer b
    join upload_pipeline.document_chunks c on c.chunk_id = b.chunk_id
    join upload_pipeline.document_vector_buffer v on v.chunk_id = b.chunk_id and v.embed_model <> c.embed_model
    join upload_pipeline.embedding_models m on m.model = v.embed_model and m.status <> 'retired'
    left join lateral (
      select k.embedding, k.text_sha256 from upload_pipeline.embedding_cache k
       where k.user_id = v_job.user_id and k.model = m.model and k.dimensions = m.dimensions and k.text_sha256 = v.text_sha256
      offset 0) e on true
   where b.document_id = v_document and (v.text_sha256 is null or e.text_sha256 is not null)
  on conflict (chunk_id, embed_model) do nothing;

  -- asked of what is written: a vector that was buffered by name may have been forgotten until a moment ago. By outer joins,
  -- so that it begins with the buffer and goes by keys: whatever the planner takes for rare, it looks for in whole tables.
  select count(*) filter (where c.live is not true or c.embed_model <> p_model and s.chunk_id is null) into v_lacking
    from upload_pipeline.document_chunk_buffer b
    left join upload_pipeline.document_chunks c on c.chunk_id = b.chunk_id
    left join upload_pipeline.chunk_vectors s on s.chunk_id = b.chunk_id and s.embed_model = p_model
   where b.document_id = v_document;
  if v_lacking > 0 then
    raise exception 'document %: % of % buffered chunks lack a vector of "%"', v_document, v_lacking, v_chunks, p_model
      using errcode = 'UP007', hint = 'Embed them, then commit again.';
  end if;

  delete from upload_pipeline.document_nodes n where n.document_id = v_document;
  insert into upload_pipeline.document_nodes (node_id, document_id, user_id, kind, title, level, ordinal)
  select d.document_id, d.document_id, d.user_id, 'document'::upload_pipeline.node_kind, d.filename, 0, 0
    from upload_pipeline.documents d where d.document_id = v_document
  union all
  -- a section stands where its first chunk stands
  (select distinct on (s.section_id) s.section_id, v_document, b.user_id, 'section', b.heading_path[s.level], s.level, b.ordinal
     from upload_pipeline.document_chunk_buffer b
    cross join lateral unnest(b.section_ids) with ordinality s (section_id, level)
    where b.document_id = v_document
    order by s.section_id, b.ordinal);
  get diagnostics v_nodes = row_count;
  insert into upload_pipeline.document_nodes (node_id, document_id, user_id, kind, title, level, ordinal)
  select b.chunk_id, v_document, b.user_id, 'chunk', '', cardinality(b.section_ids) + 1, b.ordinal
    from upload_pipeline.document_chunk_buffer b where b.document_id = v_document;
  v_nodes := v_nodes + v_chunks;

  insert into upload_pipeline.document_edges (source_id, target_id, kind, document_id, user_id)
  select distinct coalesce(b.section_ids[s.level - 1], v_document), s.section_id, 'contains'::upload_pipeline.edge_kind, v_document, v_job.user_id
    from upload_pipeline.document_chunk_buffer b
   cross join lateral unnest(b.section_ids) with ordinality s (section_id, level)
   where b.document_id = v_document
  union all
  select coalesce(b.section_ids[cardinality(b.section_ids)], v_document), b.chunk_id, 'contains', v_document, v_job.user_id
    from upload_pipeline.document_chunk_buffer b where b.document_id = v_document
  union all
  select b.chunk_id, n.chunk_id, 'next', v_document, v_job.user_id
    from upload_pipeline.document_chunk_buffer b
    join upload_pipeline.document_chunk_buffer n on n.document_id = b.document_id and n.ordinal = b.ordinal + 1
   where b.document_id = v_document;
  get diagnostics v_edges = row_count;

  update upload_pipeline.documents d
     set chunk_count = v_chunks, embed_model = p_model, searchable_at = coalesce(d.searchable_at, v_now), updated_at = v_now,
         chunker = (select b.chunker from upload_pipeline.document_chunk_buffer b where b.document_id = v_document limit 1)
   where d.document_id = v_document;
  delete from upload_pipeline.document_vector_buffer v where v.document_id = v_document;
  delete from upload_pipeline.document_chunk_buffer b where b.document_id = v_document;
  perform upload_pipeline.record_event('document_searchable', p_user_id => v_job.user_id, p_document_id => v_document,
    p_job_id => p_job_id, p_worker_id => v_job.worker_id, p_correlation_id => v_job.correlation_id,
    p_payload => jsonb_build_object('chunks', v_chunks, 'embed_model', p_model));

  select m.model into v_building from upload_pipeline.embedding_models m where m.status = 'building' and not m.paused;
  if upload_pipeline.lacks_vectors(v_document, v_building) then
    perform upload_pipeline.enqueue_job(v_document, v_job.user_id, 'reembed', 0::smallint, v_job.correlation_id);
  end if;

  return query
    select * from upload_pipeline.advance_job(p_job_id, p_token, 'embeddings_buffered', 'embedded', false, p_ttl,
      jsonb_build_object('chunks', v_chunks, 'nodes_created', v_nodes, 'edges_created', v_edges, 'embed_model', p_model)
      || upload_pipeline.job_cost(p_job_id));
end
$$;

-- What a restart at a stage needs of the document's buffers. At or before `chunking` both are dropped: they are made
-- again. Behind it the chunk buffer is what the steps read, and an embedded document has none left, so it is filled
-- from the live chunks. Before `parsing` the document forgets who parsed it: the setting of the day decides anew.
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
    delete from upload_pipeline.document_vector_buffer v where v.document_id = p_document_id;
    delete from upload_pipeline.document_chunk_buffer b where b.document_id = p_document_id;
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
