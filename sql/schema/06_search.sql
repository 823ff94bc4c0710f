-- Search over the caller's own live chunks: nearest vectors and full text, fused by reciprocal rank.
--
-- The caller is `auth.uid()`, read here and nowhere else: no argument can widen what is searched. The function runs
-- with its owner's rights and hands the planner the user's id as a plain value; under row-level security the planner
-- hides it behind a sub-select and drops the text operators' indexes. Exact: every live chunk of the user that passes
-- the filters is compared, which is right for users of up to some tens of thousands of chunks.
--
--   p_mode     'hybrid': reciprocal ranks (Cormack, Clarke, Buettcher 2009), 1 / (10 + rank by vector) + 1.5 / (10 + rank
--              by words), 'vector': cosine similarity, 'text': sum over the query's words of idf x ts_rank, idf as in BM25
--              over the chunks searched. The numbers are measured: tests/search/test_retrieval_quality.py. A word in a
--              heading weighs 1.5 times one in the text (ts_rank's own default, ten times, finds a quarter fewer answers),
--              and ts_rank is divided by 1 + log(length)
--   p_filter   a document's metadata must contain this object
--   p_model    the active model, or one that was until lately (its vectors are there for a grace time; documents that came
--              since are found by words only). Any other raises UP002: its vectors are not there, or not all of them
--
-- A vector stands in the chunk's row or, for a while after a change of models, in `chunk_vectors`. It is looked up there,
-- by its key, for those chunks only whose own vector is another model's: a join would be asked for each chunk always, and
-- in which way would hang on statistics of a table that is empty most of the time.
create function upload_pipeline.search_chunks(
  p_query        text,
  p_embedding    extensions.vector,
  p_model        text,
  p_limit        integer default 10,
  p_mode         text default 'hybrid',
  p_document_ids uuid[] default null,
  p_filter       jsonb default null
)
returns table (
  chunk_id     uuid,
  document_id  uuid,
  filename     text,
  text         text,
  score        double precision,
  heading_path text[],
  page_from    integer,
  page_to      integer,
  start_offset integer,
  end_offset   integer,
  metadata     jsonb
)
language plpgsql
stable
security definer
set search_path = ''
set jit = off
-- A plan for any user, which Postgres would settle on at the sixth call, takes every user for a small one: 50 times slower.
set plan_cache_mode = force_custom_plan
-- room for the candidates of a large user; the default spills them to disk
set work_mem = '32MB'
as $$
#variable_conflict use_column
declare
  v_user  uuid := auth.uid();
  v_depth integer := greatest(p_limit * 4, 50);
  v_words tsvector := to_tsvector('pg_catalog.english', case when p_mode <> 'vector' then p_query else '' end);
  -- any of the query's words
  v_any   tsquery := (select string_agg(q.query::text, ' | ')
                        from (select plainto_tsquery('pg_catalog.simple', w.lexeme) as query from unnest(v_words) w) q
                       where numnode(q.query) > 0);
begin
  if v_user is null then
    raise exception 'search_chunks needs a signed-in user' using errcode = '42501';
  end if;
  if p_mode is null or p_mode not in ('hybrid', 'vector', 'text') then
    raise exception 'p_mode is "%", it must be hybrid, vector or text', p_mode using errcode = '22023';
  end if;
  if p_limit is null or p_limit not between 1 and 1000 then
    raise exception 'p_limit is %, it must be between 1 and 1000', p_limit using errcode = '22023';
  end if;
  if p_mode <> 'text' and p_embedding is null then
    raise exception 'p_embedding is null, mode "%" needs the query''s vector', p_mode using errcode = '22023';
  end if;
  if p_mode <> 'text'
     and not exists (select from upload_pipeline.embedding_models m
                      where m.model = p_model and m.status in ('active', 'retiring'))
     and exists (select from upload_pipeline.embedding_models m where m.status = 'active') then
    raise exception 'vectors of "%" do not serve searches, those of "%" do', p_model, (
        select m.model from upload_pipeline.embedding_models m where m.status = 'active')
      using errcode = 'UP002', hint = 'Embed the query with the active model.';
  end if;

  return query
  with term as materialized (
    select plainto_tsquery('pg_catalog.simple', w.lexeme) as query from unnest(v_words) w
  ), candidate as materialized (
    -- One pass over the user's chunks, which keeps numbers and no words: a large user's would not fit into work_mem.
    -- Most chunks are done with at the first look, whether any word is there. For the others each word of the query is
    -- looked for; `ts_delete` of nothing and `offset 0` have a chunk's words read once where they lie out of line.
    select c.chunk_id,
           case when p_mode <> 'text'
                then 1 - (case when c.embed_model = p_model then c.embedding
                               else (select s.embedding from upload_pipeline.chunk_vectors s
                                      where s.chunk_id = c.chunk_id and s.embed_model = p_model) end
                          operator(extensions.<=>) p_embedding) end as similarity,
           case when c.search_vector @@ v_any then array(
             select case when w.words @@ t.query
                         then ts_rank(array[0.1, 0.1, 0.1, 0.15]::real[], w.words, t.query, 1) end
               from (select ts_delete(c.search_vector, '') as words offset 0) w cross join term t) end as weights
      from upload_pipeline.document_chunks c
      join upload_pipeline.documents d on d.document_id = c.document_id
     where c.user_id = v_user and c.live and d.deleted_at is null
       and (p_document_ids is null or c.document_id = any (p_document_ids))
       and (p_filter is null or d.metadata @> p_filter)
  ), nearest as (
    select n.chunk_id, n.similarity, row_number() over (order by n.similarity desc, n.chunk_id) as place
      from (
        select c.chunk_id, c.similarity from candidate c
         where c.similarity is not null
         order by 2 desc, 1 limit v_depth) n
  ), occurrence as materialized (
    select c.chunk_id, o.term, o.weight
      from candidate c
     cross join lateral unnest(c.weights) with ordinality o (weight, term)
     where c.weights is not null and o.weight is not null
  ), rarity as (
    select o.term, ln(1 + (n.chunks - count(*) + 0.5) / (count(*) + 0.5)) as idf
      from occurrence o cross join (select count(*) as chunks from candidate) n
     group by o.term, n.chunks
  ), worded as (
    select w.chunk_id, w.relevance, row_number() over (order by w.relevance desc, w.chunk_id) as place
      from (
        select o.chunk_id, sum(o.weight * r.idf) as relevance
          from occurrence o join rarity r on r.term = o.term
         group by o.chunk_id
         order by 2 desc, 1 limit v_depth) w
  ), fused as (
    select chunk_id,
           case p_mode
             when 'vector' then n.similarity
             when 'text' then w.relevance
             else coalesce(1.0 / (10 + n.place), 0) + coalesce(1.5 / (10 + w.place), 0)
           end::double precision as score
      from nearest n full join worded w using (chunk_id)
     order by 2 desc, 1
     limit p_limit
  )
  select c.chunk_id, c.document_id, d.filename, c.text, f.score, c.heading_path, c.page_from, c.page_to,
         c.start_offset, c.end_offset, d.metadata
    from fused f
    join upload_pipeline.document_chunks c on c.chunk_id = f.chunk_id
    join upload_pipeline.documents d on d.document_id = c.document_id
   order by f.score desc, c.chunk_id;
end
$$;
