-- Vectors for a job's chunks: which are lacking, and where those are put that have come. They come in parts, so no verb
-- here advances the job: commit_embeddings does, when none is lacking.

-- The buffered chunks of a document that have no vector of a model yet, neither buffered nor stored, in document order.
create function upload_pipeline.pending_vectors(p_document_id uuid, p_model text, p_limit integer default 256)
returns table (chunk_id uuid, text text, chunk_sha256 text)
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
  select b.chunk_id, b.text, b.chunk_sha256
    from upload_pipeline.document_chunk_buffer b
   where b.document_id = p_document_id
     and (b.chunk_id not in (select unnest(k.chunk_ids) from upload_pipeline.document_cached_chunks k
                              where k.document_id = p_document_id and k.embed_model = p_model)
          -- a value, and not `exists`: for that the planner may read all that the cache has of the model
          or (select e.model from upload_pipeline.embedding_cache e
               where e.user_id = b.user_id and e.model = p_model and e.text_sha256 = decode(b.chunk_sha256, 'hex')
                 and e.dimensions = (select m.dimensions from upload_pipeline.embedding_models m where m.model = p_model)) is null)
     and not exists (select from upload_pipeline.document_vector_buffer v
                      where v.chunk_id = b.chunk_id and v.embed_model = p_model)
     and not exists (select from upload_pipeline.document_chunks c
                      where c.chunk_id = b.chunk_id and c.embed_model || '' = p_model)  -- by the chunk's key
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
  -- by their places: as rows they would all be copied
  select extensions.vector_dims(p_embeddings[place]) into v_wrong from generate_subscripts(p_embeddings, 1) place
   where extensions.vector_dims(p_embeddings[place]) <> v_dimensions limit 1;
  if found then
    raise exception 'a vector of % dimensions came for model "%", which has %', v_wrong, p_model, v_dimensions using errcode = 'UP005';
  end if;
  return v_dimensions;
end
$$;

-- Puts vectors where a job's chunks have them: those of a document that is processed into the buffer, those that a model
-- is filled with (pipeline `reembed`) beside the live chunks. One place in the arrays for each chunk, with its job; the
-- caller holds the jobs. Of a buffered chunk whose vector is in the cache (p_cached) just this is noted, and no vector is
-- needed. Vectors that are there already stay, and what is no chunk of the job's document is left out. Of a model that was
-- given up nothing is put beside live chunks. Returns the chunks that have theirs now: of those in the cache all.
create function upload_pipeline.place_vectors(
  p_model text, p_job_ids uuid[], p_chunk_ids uuid[], p_embeddings extensions.vector[], p_cached boolean[] default '{}'
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
set plan_cache_mode = force_generic_plan
as $$
declare
  v_refills uuid[] := array(select j.job_id from upload_pipeline.upload_jobs j
                             where j.job_id = any (p_job_ids) and j.pipeline = 'reembed');
  v_cached  uuid[];
  v_placed  uuid[];
  v_more    uuid[];
begin
  -- once, and not by each vector: it is not deleted meanwhile (keep_named_models)
  perform from upload_pipeline.embedding_models m where m.model = p_model for key share;
  if not found then
    raise exception 'there is no embedding model "%" any more', p_model
      using errcode = 'UP002', hint = 'Add it with `upload-pipeline models add`.';
  end if;
  with asked as (
    select distinct b.document_id, b.chunk_id
      from unnest(p_job_ids, p_chunk_ids, p_cached) a (job_id, chunk_id, cached)
      join upload_pipeline.upload_jobs j on j.job_id = a.job_id
      join upload_pipeline.document_chunk_buffer b on b.chunk_id = a.chunk_id and b.document_id = j.document_id
     where a.cached and a.job_id <> all (v_refills)
  ), noted as (
    insert into upload_pipeline.document_cached_chunks (document_id, embed_model, chunk_ids)
    select a.document_id, p_model, array_agg(a.chunk_id)
      from asked a
     where a.chunk_id not in (select unnest(k.chunk_ids) from upload_pipeline.document_cached_chunks k
                               where k.document_id = any (array(select e.document_id from asked e)) and k.embed_model = p_model)
     group by a.document_id
  )
  select coalesce(array_agg(a.chunk_id), '{}') into v_cached from asked a;
  if cardinality(v_cached) = cardinality(p_chunk_ids) then
    return v_cached;
  end if;

  with placed as (
    insert into upload_pipeline.document_vector_buffer (chunk_id, embed_model, document_id, embedding)
    select distinct on (b.chunk_id) b.chunk_id, p_model, b.document_id, a.embedding
      from unnest(p_job_ids, p_chunk_ids, p_embeddings, p_cached) a (job_id, chunk_id, embedding, cached)
      join upload_pipeline.upload_jobs j on j.job_id = a.job_id
      join upload_pipeline.document_chunk_buffer b on b.chunk_id = a.chunk_id and b.document_id = j.document_id
     where a.cached is not true and a.job_id <> all (v_refills) and b.chunk_id <> all (v_cached)
     order by b.chunk_id
    on conflict (chunk_id, embed_model) do nothing
    returning chunk_id
  )
  select v_cached || coalesce(array_agg(p.chunk_id), '{}') into v_placed from placed p;
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
