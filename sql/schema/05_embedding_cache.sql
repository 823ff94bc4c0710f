-- Vectors that a provider was paid for: a text that was once embedded for a user is not paid for again, in whatever
-- document, cut or query it comes. Nobody reads the table: the verbs below do, for one user at a time.

-- The day (UTC) by which use is counted.
create function upload_pipeline.today()
returns date
language sql
stable
set search_path = ''
as $$
  select (upload_pipeline.now() at time zone 'UTC')::date
$$;

-- Places (place_vectors) what the cache has for the first p_limit pending chunks of a job, and gives these chunks: with their
-- text where it is still to be embedded, without where the vector is there now. No row: none is pending. What came from the
-- cache is written into the books as p_billed_as, the model as prices name it.
create function upload_pipeline.fill_vectors(
  p_job_id    uuid,
  p_token     bigint,
  p_model     text,
  p_billed_as text,
  p_limit     integer default 1024
)
returns table (chunk_id uuid, text text)
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
#variable_conflict use_column
declare
  v_job        upload_pipeline.upload_jobs := upload_pipeline.check_lease(p_job_id, p_token);
  v_dimensions integer := upload_pipeline.check_vectors(p_model, '{}');
  v_chunks     uuid[];
  v_words      text[];
  v_texts      bytea[];
  v_found      uuid[] := '{}';
begin
  select array_agg(p.chunk_id), array_agg(p.text), array_agg(decode(p.chunk_sha256, 'hex'))
    into v_chunks, v_words, v_texts
    from upload_pipeline.pending_chunks(v_job.pipeline, v_job.document_id, p_model, p_limit) p;
  if v_chunks is null then
    return;
  end if;

  select upload_pipeline.place_vectors(
           p_model, array_agg(v_job.job_id), array_agg(p.chunk_id), array_agg(c.embedding),
           array_agg(v_job.pipeline <> 'reembed'))
    into v_found
    from unnest(v_chunks, v_texts) p (chunk_id, text_sha256)
   cross join lateral (
     select case when v_job.pipeline = 'reembed' then e.embedding end as embedding
       from upload_pipeline.embedding_cache e
      where e.user_id = v_job.user_id and e.model = p_model and e.dimensions = v_dimensions
        and e.text_sha256 = p.text_sha256
     offset 0) c
  having count(*) > 0;

  if v_found <> '{}' then
    perform upload_pipeline.touch_vectors(v_job.user_id, p_model, v_dimensions,
      (select array_agg(distinct p.text_sha256) from unnest(v_chunks, v_texts) p (chunk_id, text_sha256)
        where p.chunk_id = any (v_found)));
    insert into upload_pipeline.usage_records
      (usage_id, at, job_id, document_id, user_id, provider, model, operation, cached, cost_micros)
    select gen_random_uuid(), upload_pipeline.now(), v_job.job_id, v_job.document_id, v_job.user_id, m.provider, p_billed_as,
           'embed', cardinality(v_found), 0
      from upload_pipeline.embedding_models m where m.model = p_model;
  end if;
  return query
    select p.chunk_id, case when f.chunk_id is null then p.words end
      from unnest(v_chunks, v_words) with ordinality p (chunk_id, words, place)
      left join unnest(v_found) f (chunk_id) on f.chunk_id = p.chunk_id
     order by p.place;
end
$$;

-- Says of a user's vectors that they were used today. One that somebody else is writing is being touched, or goes.
create function upload_pipeline.touch_vectors(p_user_id uuid, p_model text, p_dimensions integer, p_texts bytea[])
returns void
language sql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
set jit = off
as $$
  update upload_pipeline.embedding_cache c set last_used_on = upload_pipeline.today()
   where c.ctid = any (array(
     select e.ctid
       from unnest(p_texts) t (text_sha256)
      cross join lateral (
        select u.ctid from upload_pipeline.embedding_cache u
         where u.user_id = p_user_id and u.model = p_model and u.dimensions = p_dimensions
           and u.text_sha256 = t.text_sha256 and u.last_used_on < upload_pipeline.today()
           for no key update skip locked) e))
$$;

-- Keeps what a provider was paid for: each vector in the cache, for the user that it was made for, and where the chunks that
-- wait for it have theirs (place_vectors), whose jobs are asked by their leases. Returns how many chunks got theirs. The cache
-- needs no lease: a job that lost its own gets nothing here, but what was paid for is there for whoever leads it now.
--
--   p_user_ids, p_texts, p_embeddings    one place a text: for whom, its SHA-256, its vector
--   p_job_ids, p_tokens, p_chunk_ids     one place a chunk
--   p_places                             where in p_embeddings its vector stands, counted from 1
--
-- A session's user may have been claimed meanwhile: then the vector is that of the user who has claimed it. The session's row
-- is locked, as claim_session and clean_session lock it: either they see what is written here, or this sees what they did.
-- For a session that is gone nothing is kept: of a user that there is something is known, if only the lane of a job that
-- once was.
create function upload_pipeline.keep_vectors(
  p_model      text,
  p_user_ids   uuid[],
  p_texts      bytea[],
  p_embeddings extensions.vector[],
  p_job_ids    uuid[] default '{}',
  p_tokens     bigint[] default '{}',
  p_chunk_ids  uuid[] default '{}',
  p_places     integer[] default '{}'
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
set plan_cache_mode = force_generic_plan
as $$
declare
  v_dimensions integer := upload_pipeline.check_vectors(p_model, p_embeddings);
  v_told       uuid[];
  v_owners     uuid[];
  v_held       uuid[];
  v_holders    uuid[];
  v_refilled   boolean;
  v_today      date := upload_pipeline.today();
begin
  if cardinality(p_user_ids) <> cardinality(p_embeddings) or cardinality(p_texts) <> cardinality(p_embeddings) then
    raise exception '% vectors came for % texts of % users', cardinality(p_embeddings), cardinality(p_texts),
      cardinality(p_user_ids) using errcode = 'UP005';
  end if;
  perform from upload_pipeline.sessions s where s.user_id = any (p_user_ids) order by s.session_id for share;
  select array_agg(t.user_id), array_agg(coalesce(s.claimed_by, t.user_id)) into v_told, v_owners
    from (select distinct u from unnest(p_user_ids) u) t (user_id)
    left join upload_pipeline.sessions s on s.user_id = t.user_id
   where s.user_id is not null
      or exists (select from upload_pipeline.lanes l
                  where l.user_id = t.user_id and l.pool in (select g.pool from upload_pipeline.stages g));

  -- jobs before what hangs on them, and all in order, as everywhere: nobody waits in a circle
  select array_agg(h.job_id), array_agg(h.user_id), coalesce(bool_or(h.pipeline = 'reembed'), false)
    into v_held, v_holders, v_refilled
    from (select j.job_id, j.user_id, j.pipeline
            from (select distinct a.job_id, a.token from unnest(p_job_ids, p_tokens) a (job_id, token)) asked
            join upload_pipeline.upload_jobs j on j.job_id = asked.job_id
           where j.lease_token = asked.token and j.lease_expires_at is not null
           order by j.job_id
             for share of j) h;

  insert into upload_pipeline.embedding_cache as c (user_id, model, dimensions, text_sha256, last_used_on, embedding)
  select k.owner, p_model, v_dimensions, k.text_sha256, v_today, p_embeddings[k.place]
    -- sorted by their keys alone, so that no vector is copied for it
    from (select distinct on (o.owner, t.text_sha256) o.owner, t.text_sha256, t.place
            from unnest(p_user_ids, p_texts) with ordinality t (user_id, text_sha256, place)
            join unnest(v_told, v_owners) o (told, owner) on o.told = t.user_id
           order by o.owner, t.text_sha256, t.place) k
  -- the first stands; it counts as used
  on conflict (user_id, model, dimensions, text_sha256) do update set last_used_on = excluded.last_used_on
     where c.last_used_on < excluded.last_used_on;

  return coalesce((
    select cardinality(upload_pipeline.place_vectors(
             p_model, array_agg(a.job_id), array_agg(a.chunk_id),
             array_agg(case when v_refilled or b.chunk_id is null then p_embeddings[a.place] end),
             array_agg(b.chunk_id is not null)))
      from unnest(p_job_ids, p_chunk_ids, p_places) a (job_id, chunk_id, place)
      join unnest(v_held, v_holders) h (job_id, user_id) on h.job_id = a.job_id
      left join unnest(v_told, v_owners) o (told, owner) on o.told = p_user_ids[a.place] and o.owner = h.user_id
      -- the commit looks for it by the chunk's own digest
      left join upload_pipeline.document_chunk_buffer b
        on b.chunk_id = a.chunk_id and o.owner is not null and b.chunk_sha256 = encode(p_texts[a.place], 'hex')
    having count(*) > 0), 0);
end
$$;

-- The vector that a user's text has in the cache, or null.
create function upload_pipeline.cached_vector(p_user_id uuid, p_model text, p_text bytea)
returns extensions.vector
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_found upload_pipeline.embedding_cache;
begin
  select c.* into v_found
    from upload_pipeline.embedding_models m
    join upload_pipeline.embedding_cache c
      on c.user_id = p_user_id and c.model = m.model and c.dimensions = m.dimensions and c.text_sha256 = p_text
   where m.model = p_model;
  if v_found.last_used_on < upload_pipeline.today() then
    perform upload_pipeline.touch_vectors(p_user_id, p_model, v_found.dimensions, array[p_text]);
  end if;
  return v_found.embedding;
end
$$;

-- Removes vectors that nobody has used for p_unused, the oldest first, at most p_limit. Returns how many.
create function upload_pipeline.forget_unused_vectors(p_unused interval, p_limit integer default 1000)
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
declare
  v_count integer;
begin
  -- by place: a lock that is held keeps the row where it is
  delete from upload_pipeline.embedding_cache c
   where c.ctid = any (array(
     select e.ctid from upload_pipeline.embedding_cache e
      where e.last_used_on < ((upload_pipeline.now() - p_unused) at time zone 'UTC')::date
      order by e.last_used_on limit p_limit
        for update skip locked));
  get diagnostics v_count = row_count;
  return v_count;
end
$$;

-- Removes all that is kept for a user. Returns how many vectors that was.
create function upload_pipeline.forget_user_vectors(p_user_id uuid)
returns integer
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_count integer;
begin
  delete from upload_pipeline.embedding_cache c where c.user_id = p_user_id;
  get diagnostics v_count = row_count;
  return v_count;
end
$$;

-- Makes a user's vectors another's, who may have some of them: used when either used them last. The chunks of a document that
-- stays the first user's, whose vectors were in the cache, have them in the buffer from now on.
create function upload_pipeline.move_user_vectors(p_from uuid, p_to uuid)
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
  insert into upload_pipeline.document_vector_buffer (chunk_id, embed_model, document_id, embedding)
  select b.chunk_id, k.embed_model, b.document_id, e.embedding
    from upload_pipeline.documents d
    join upload_pipeline.document_cached_chunks k on k.document_id = d.document_id
    join upload_pipeline.embedding_models m on m.model = k.embed_model
   cross join lateral unnest(k.chunk_ids) n (chunk_id)
    join upload_pipeline.document_chunk_buffer b on b.chunk_id = n.chunk_id
   cross join lateral (
     select c.embedding from upload_pipeline.embedding_cache c
      where c.user_id = p_from and c.model = m.model and c.dimensions = m.dimensions
        and c.text_sha256 = decode(b.chunk_sha256, 'hex')
     offset 0) e
   where d.user_id = p_from and d.deleted_at is null
   order by b.chunk_id
  on conflict (chunk_id, embed_model) do nothing;
  insert into upload_pipeline.embedding_cache as c (user_id, model, dimensions, text_sha256, last_used_on, embedding)
  select p_to, f.model, f.dimensions, f.text_sha256, f.last_used_on, f.embedding
    from upload_pipeline.embedding_cache f where f.user_id = p_from
   order by f.model, f.dimensions, f.text_sha256
  on conflict (user_id, model, dimensions, text_sha256) do update set last_used_on = excluded.last_used_on
     where c.last_used_on < excluded.last_used_on;
  delete from upload_pipeline.embedding_cache c where c.user_id = p_from;
end
$$;
