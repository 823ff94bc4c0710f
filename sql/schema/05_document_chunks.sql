-- A document's set of chunks: buffered, stored, live. Until commit_embeddings commits, readers see the old set, after it
-- the new one. Each verb is a step's effect and its transition in one transaction, as 05_documents tells.

-- chunking -> chunks_buffered: p_chunks is the document's whole new set, an array of objects with the columns of
-- `document_chunk_buffer` from ordinal to section_ids, numbered from 0 without a gap. It replaces what an earlier try had
-- buffered.
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
  if jsonb_array_length(p_chunks) <= (select max(b.ordinal) from upload_pipeline.document_chunk_buffer b where b.document_id = v_job.document_id) then
    raise exception 'the chunks of document % are not numbered from 0 without a gap', v_job.document_id using errcode = 'UP005';
  end if;
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

-- embeddings_buffered -> embedded, the job's end: in one transaction the new set gets its vectors and becomes live,
-- rows that are no longer in it go, the outline is written anew, and the buffers are emptied. Until it commits
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
set plan_cache_mode = force_generic_plan
as $$
declare
  v_now      timestamptz := upload_pipeline.now();
  v_job      upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'embedded');
  v_document uuid := v_job.document_id;
  v_active   text;
  v_dimensions integer;
  v_building text;
  v_chunks   integer;
  v_stored   integer;
  v_gone     integer;
  v_moved    integer;
  v_placed   integer;
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
  -- one look at both sets: most documents are new, and have nothing that goes or moves
  select count(*) into v_chunks from upload_pipeline.document_chunk_buffer b where b.document_id = v_document;
  select count(b.chunk_id), count(*) filter (where b.chunk_id is null),
         count(*) filter (where (c.start_offset, c.end_offset, c.page_from, c.page_to, c.heading_path, c.section_ids)
                                is distinct from (b.start_offset, b.end_offset, b.page_from, b.page_to, b.heading_path, b.section_ids))
    into v_stored, v_gone, v_moved
    from upload_pipeline.document_chunks c
    left join upload_pipeline.document_chunk_buffer b on b.chunk_id = c.chunk_id
   where c.document_id = v_document;
  if v_chunks = 0 or v_stored < v_chunks then
    raise exception 'document %: % of % buffered chunks lack a row', v_document, v_chunks - v_stored, v_chunks
      using errcode = 'UP005', hint = 'Retry the job from stage "chunking".';
  end if;

  if v_gone > 0 then
    delete from upload_pipeline.document_chunks c
     where c.document_id = v_document
       and not exists (select from upload_pipeline.document_chunk_buffer b where b.chunk_id = c.chunk_id);
  end if;

  -- apart from the vectors: what names heading_path computes search_vector anew, at more than all else costs
  if v_moved > v_gone then
    update upload_pipeline.document_chunks c
       set start_offset = b.start_offset, end_offset = b.end_offset, page_from = b.page_from, page_to = b.page_to,
           heading_path = b.heading_path, section_ids = b.section_ids
      from upload_pipeline.document_chunk_buffer b
     where b.document_id = v_document and c.chunk_id = b.chunk_id
       and (c.start_offset, c.end_offset, c.page_from, c.page_to, c.heading_path, c.section_ids)
           is distinct from (b.start_offset, b.end_offset, b.page_from, b.page_to, b.heading_path, b.section_ids);
  end if;
  with placed as (
    update upload_pipeline.document_chunks c
       set embedding = coalesce(c.embedding, v.embedding, e.embedding), embed_model = coalesce(c.embed_model, p_model), live = true
      from upload_pipeline.document_chunk_buffer b
      left join upload_pipeline.document_vector_buffer v on v.chunk_id = b.chunk_id and v.embed_model = p_model
      left join lateral (
        select k.embedding, k.model from upload_pipeline.embedding_cache k
         where v.chunk_id is null and k.user_id = v_job.user_id and k.model = p_model and k.dimensions = v_dimensions
           and k.text_sha256 = decode(b.chunk_sha256, 'hex')
        offset 0) e on true
     where b.document_id = v_document and c.chunk_id = b.chunk_id and not c.live
       and coalesce(c.embed_model, v.embed_model, e.model) is not null
    returning c.embed_model
  )
  select count(*) into v_placed from placed p where p.embed_model = p_model;

  -- vectors of other models than their chunk's: none but while a model changes
  if v_placed < v_chunks
     or exists (select from upload_pipeline.document_vector_buffer v where v.document_id = v_document and v.embed_model <> p_model)
     or exists (select from upload_pipeline.document_cached_chunks k where k.document_id = v_document and k.embed_model <> p_model) then
    insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding, created_at)
    select c.chunk_id, v.embed_model, v_document, coalesce(v.embedding, e.embedding), v_now
      from (select s.chunk_id, s.embed_model, s.embedding
              from upload_pipeline.document_vector_buffer s where s.document_id = v_document
            union all
            select unnest(k.chunk_ids), k.embed_model, null
              from upload_pipeline.document_cached_chunks k where k.document_id = v_document) v
      join upload_pipeline.document_chunk_buffer b on b.chunk_id = v.chunk_id
      join upload_pipeline.document_chunks c on c.chunk_id = v.chunk_id and c.embed_model <> v.embed_model
      join upload_pipeline.embedding_models m on m.model = v.embed_model and m.status <> 'retired'
      left join lateral (
        select k.embedding from upload_pipeline.embedding_cache k
         where v.embedding is null and k.user_id = v_job.user_id and k.model = m.model and k.dimensions = m.dimensions
           and k.text_sha256 = decode(b.chunk_sha256, 'hex')
        offset 0) e on true
     where coalesce(v.embedding, e.embedding) is not null
    on conflict (chunk_id, embed_model) do nothing;

    -- asked of what is written: a vector that was in the cache may have been forgotten until a moment ago. By outer joins,
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
  end if;

  delete from upload_pipeline.document_outline o where o.document_id = v_document;
  insert into upload_pipeline.document_outline (node_id, document_id, user_id, kind, title, level, ordinal, parent_id)
  select d.document_id, d.document_id, d.user_id, 'document'::upload_pipeline.node_kind, d.filename, 0, 0, null
    from upload_pipeline.documents d where d.document_id = v_document
  union all
  -- a section stands where its first chunk stands
  (select distinct on (s.section_id) s.section_id, v_document, b.user_id, 'section', b.heading_path[s.level], s.level, b.ordinal,
          coalesce(b.section_ids[s.level - 1], v_document)
     from upload_pipeline.document_chunk_buffer b
    cross join lateral unnest(b.section_ids) with ordinality s (section_id, level)
    where b.document_id = v_document
    order by s.section_id, b.ordinal);
  get diagnostics v_nodes = row_count;
  v_nodes := v_nodes + v_chunks;
  -- each node but the document is contained in one, and each chunk but the last is followed by one
  v_edges := v_nodes - 1 + v_chunks - 1;

  update upload_pipeline.documents d
     set chunk_count = v_chunks, embed_model = p_model, searchable_at = coalesce(d.searchable_at, v_now), updated_at = v_now,
         chunker = (select b.chunker from upload_pipeline.document_chunk_buffer b where b.document_id = v_document limit 1)
   where d.document_id = v_document;
  delete from upload_pipeline.document_cached_chunks k where k.document_id = v_document;
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
