-- Embedding models, and how one takes another's place while searches go on.
--
--            add                activate             the other one is activated
--   (none) ───────▶ building ───────────▶ active ─────────────────────────────▶ retiring ──grace over──▶ retired
--                      ▲ │ retire: abandoned, its vectors go                     │ ▲ │                     │
--                      │ └───────────────────────────────────────────────────────┼─┼─┼────────────────────▶│
--                      └──────────────────── add: fill what it lacks ────────────┘ │ └──── activate: back ─┘ (add)
--
-- Where vectors stand. A chunk's first vector is in its row; vectors of other models are in `chunk_vectors`. All vectors
-- in a table of their own would be simpler, and would cost every search a join with as many rows as the user has chunks.
-- As it is, a search of a user's 20,000 chunks reads 10,195 blocks; with no model to change it read 10,190. So the active
-- model's vectors come home: after an activation `settle_models` exchanges them with the ones in the rows, bit by bit;
-- both stay for the grace time. A search reads either place, so that it does not matter how far that is. Activation
-- itself moves nothing: it is one update, however many vectors there are. `chunk_vectors` has no user of its own: whose a
-- vector is, its chunk says.
--
-- How a new model is filled. `enqueue_refills` walks through the documents in pages and makes a job of pipeline `reembed`
-- for each that lacks vectors, never more than a bounded number at once, put off or not. The jobs have a pool of their own,
-- `background`: a lane is a user in a pool, so they take no slot of the user's uploads, and a worker gives that pool at most
-- half of its slots. Documents that are processed meanwhile are embedded for both models; where that did not work out,
-- commit_embeddings makes the job. Nothing remembers what is filled: it is read from the vectors.
--
-- Why nothing slips through. commit_embeddings, the one verb that makes chunks live, holds the registry shared
-- (hold_models) from before it reads it until its commit; add_model, activate_model and retire_model hold it alone. So a
-- document is live before an activation counts what is lacking, or it is committed by the new active model. Commits wait as
-- long as the count under the lock takes, one look at each live chunk; searches do not. Each chunk and its vector are looked
-- up in indexes alone: of 500,000 chunks 28,000 blocks are read, while their rows, of 1,536 dimensions, stand in 500,000.
--
-- Locks, in this order: a job, the registry, a document, its chunks, their vectors; lanes last. Each verb that writes
-- chunks or vectors of a document locks the document first, so two of them never lock chunks in opposite orders.

-- The advisory lock of the registry: the table is its own name for it.
create function upload_pipeline.hold_models(p_alone boolean default false)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_key constant bigint := 'upload_pipeline.embedding_models'::regclass::oid::bigint;
begin
  if not p_alone then
    perform pg_advisory_xact_lock_shared(v_key);
    return;
  end if;
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'this verb needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'What is lacking must be counted after the lock is won.';
  end if;
  perform pg_advisory_xact_lock(v_key);
end
$$;

-- In place of foreign keys (embedding_models): a model that vectors name is not deleted, and keeps its name. The row is locked
-- by then: place_vectors, through which each vector comes, has ended, and what it wrote is seen. From the buffer vectors move
-- in one transaction, so that at each moment one of the four names their model.
create function upload_pipeline.keep_named_models()
returns trigger
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
as $$
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'this change needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'Vectors must be looked for after the lock is won.';
  end if;
  if exists (select from upload_pipeline.document_chunks c where c.embed_model = old.model)
     or exists (select from upload_pipeline.chunk_vectors s where s.embed_model = old.model)
     or exists (select from upload_pipeline.document_vector_buffer v where v.embed_model = old.model)
     or exists (select from upload_pipeline.document_cached_chunks k where k.embed_model = old.model) then
    raise exception 'embedding model "%" has vectors', old.model
      using errcode = '23503', hint = 'Retire it: its vectors are removed, and its name stays.';
  end if;
  return coalesce(new, old);
end
$$;

create trigger keep_named_models before delete on upload_pipeline.embedding_models
  for each row execute function upload_pipeline.keep_named_models();
create trigger keep_model_names before update on upload_pipeline.embedding_models
  for each row when (old.model is distinct from new.model) execute function upload_pipeline.keep_named_models();

create function upload_pipeline.note_model_change(p_model text, p_to upload_pipeline.model_status, p_more jsonb default '{}')
returns void
language sql
security definer
set search_path = ''
as $$
  select upload_pipeline.record_event('embedding_model_changed',
    p_payload => jsonb_build_object('model', p_model, 'status', p_to) || p_more)
$$;

-- Whether a live chunk of a document has no vector of a model. Null for no model.
create function upload_pipeline.lacks_vectors(p_document_id uuid, p_model text)
returns boolean
language sql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  select exists (
    select from upload_pipeline.document_chunks c
     where c.document_id = p_document_id and c.live and c.embed_model <> p_model
       and not exists (select from upload_pipeline.chunk_vectors s where s.chunk_id = c.chunk_id and s.embed_model = p_model))
   where p_model is not null
$$;

-- The active model. Where none was ever named, this one is it from now on; another one changes nothing (add_model does).
-- A model that is known with other dimensions raises UP005. Workers ask when they start.
create function upload_pipeline.register_model(p_model text, p_provider text, p_dimensions integer)
returns table (model text, provider text, dimensions integer)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_dimensions integer;
begin
  if not exists (select from upload_pipeline.embedding_models m where m.status = 'active') then
    insert into upload_pipeline.embedding_models as m (model, provider, dimensions, status, activated_at)
    values (p_model, p_provider, p_dimensions, 'active', upload_pipeline.now())
    -- of any index: another process may name the first model at the same moment, and then that one is active
    on conflict do nothing;
  end if;
  select m.dimensions into v_dimensions from upload_pipeline.embedding_models m where m.model = p_model;
  if v_dimensions <> p_dimensions then
    raise exception 'embedding model "%" is registered with % dimensions, not %', p_model, v_dimensions, p_dimensions
      using errcode = 'UP005', hint = 'Give the model with other dimensions another name.';
  end if;
  return query select m.model, m.provider, m.dimensions from upload_pipeline.embedding_models m where m.status = 'active';
end
$$;

-- Begins to fill a model, or begins anew: jobs that failed for good are made again, and vectors that it has are kept. The
-- first model of all has nothing to fill and is active at once. Returns its status.
create function upload_pipeline.add_model(
  p_model text, p_provider text, p_dimensions integer, p_paused boolean default false
)
returns upload_pipeline.model_status
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_model upload_pipeline.embedding_models;
  v_other text;
begin
  perform upload_pipeline.hold_models(p_alone => true);
  select m.* into v_model from upload_pipeline.embedding_models m where m.model = p_model;
  if found and (v_model.provider, v_model.dimensions) is distinct from (p_provider, p_dimensions) then
    raise exception 'embedding model "%" is registered as one of "%" with % dimensions', p_model, v_model.provider, v_model.dimensions
      using errcode = 'UP005', hint = 'Give the other one another name.';
  end if;
  if v_model.status = 'active' then
    raise exception 'embedding model "%" is the active one', p_model
      using errcode = 'UP003', hint = 'It has every vector already.';
  end if;
  if not exists (select from upload_pipeline.embedding_models m where m.status = 'active') then
    perform upload_pipeline.register_model(p_model, p_provider, p_dimensions);
    return 'active';
  end if;
  select m.model into v_other from upload_pipeline.embedding_models m where m.status = 'building' and m.model <> p_model;
  if found then
    raise exception 'embedding model "%" is being filled', v_other
      using errcode = 'UP003',
            hint = format('Activate it, or give it up with `upload-pipeline models retire %s`, before another is added.', v_other);
  end if;
  insert into upload_pipeline.embedding_models as m (model, provider, dimensions, status, paused, building_since, next_fill_at)
  values (p_model, p_provider, p_dimensions, 'building', p_paused, v_now, v_now)
  on conflict (model) do update
    set status = 'building', paused = p_paused, building_since = v_now, retire_at = null, fill_after = null, next_fill_at = v_now;
  perform upload_pipeline.note_model_change(p_model, 'building');
  return 'building';
end
$$;

-- Stops the filling of a model, or lets it go on. Jobs that a worker has come to an end; those that wait are given back
-- by whoever claims them, and are due at once when it goes on.
create function upload_pipeline.pause_model(p_model text, p_paused boolean)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
begin
  update upload_pipeline.embedding_models m set paused = p_paused, next_fill_at = v_now
   where m.model = p_model and m.status = 'building';
  if not found then
    raise exception 'embedding model "%" is not being filled', p_model
      using errcode = 'UP003', hint = '`upload-pipeline models status` lists the models.';
  end if;
  if not p_paused then
    update upload_pipeline.upload_jobs j set run_at = v_now
     where j.state = 'retryable' and j.pipeline = 'reembed' and j.run_at > v_now and j.retry_count = 0;
  end if;
end
$$;

-- Why a model is filled no further: its provider fails, and a worker leaves it alone for a while. The jobs lose no retry
-- by it and are no dead letters, so model_overview tells operators. Of a model that is not being filled nothing is kept.
create function upload_pipeline.note_model_failure(p_model text, p_failure text)
returns void
language sql
security definer
set search_path = ''
as $$
  update upload_pipeline.embedding_models m set failed_at = upload_pipeline.now(), failure = left(p_failure, 500)
   where m.model = p_model and m.status = 'building'
$$;

-- Makes a filled model the active one, in one transaction: searches that begin after it use it, and what was active is
-- kept for p_grace. Of the active one: nothing changes. UP003 where live chunks lack a vector of it, telling how many, up to
-- a thousand: counted once without the lock, so that a refusal makes nobody wait, and again under it. Returns what was
-- active.
create function upload_pipeline.activate_model(p_model text, p_grace interval)
returns text
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_nestloop = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_now       timestamptz := upload_pipeline.now();
  v_most      constant integer := 1000;
  v_status    upload_pipeline.model_status;
  v_before    text;
  v_chunks    bigint;
  v_documents bigint;
begin
  for v_look in 1..2 loop
    if v_look = 2 then
      perform upload_pipeline.hold_models(p_alone => true);
    end if;
    select m.status into v_status from upload_pipeline.embedding_models m where m.model = p_model;
    if not found then
      raise exception 'there is no embedding model "%"', p_model
        using errcode = 'UP002', hint = 'Add it with `upload-pipeline models add`.';
    end if;
    if v_status = 'active' then
      return p_model;
    end if;
    if v_status = 'retired' then
      raise exception 'embedding model "%" is retired', p_model
        using errcode = 'UP003', hint = format('Fill it anew with `upload-pipeline models add %s`.', p_model);
    end if;
    -- Whether a document is being deleted is asked behind `offset 0`, that is, only of what lacks a vector. With `|| ''`
    -- the vectors' primary key is the only index that will do: it has all that is asked, and the one of models has not,
    -- which looks cheap as long as the statistics do not know the model.
    select count(*), count(distinct l.document_id) into v_chunks, v_documents
      from (select c.document_id
              from (select c.document_id
                      from upload_pipeline.document_chunks c
                     where c.live and c.embed_model <> p_model
                       and not exists (select from upload_pipeline.chunk_vectors s
                                        where s.chunk_id = c.chunk_id and s.embed_model || '' = p_model)
                    offset 0) c
             where (select d.deleted_at is null from upload_pipeline.documents d where d.document_id = c.document_id)
             limit v_most + 1) l;
    if v_chunks > 0 then
      raise exception '%', case when v_chunks > v_most then format('more than %s chunks have no vector of "%s" yet', v_most, p_model)
                           else format('%s chunks of %s documents have no vector of "%s" yet', v_chunks, v_documents, p_model) end
        using errcode = 'UP003',
              hint = case v_status
                when 'building' then 'Wait until it is filled: `upload-pipeline models status` tells how far it is, and what failed.'
                else format('They came since it was active. Fill them with `upload-pipeline models add %s`, then activate it.', p_model) end;
    end if;
  end loop;

  update upload_pipeline.embedding_models m set status = 'retiring', retire_at = v_now + p_grace
   where m.status = 'active'
  returning m.model into v_before;
  update upload_pipeline.embedding_models m
     set status = 'active', paused = false, activated_at = v_now, building_since = null, retire_at = null, fill_after = null
   where m.model = p_model;
  perform upload_pipeline.note_model_change(p_model, 'active', jsonb_build_object('before', v_before));
  return v_before;
end
$$;

-- Gives up a model: one that is being filled, with its jobs, or, with p_now, one whose grace time is not over. Its
-- vectors are removed by settle_models. Of a retired one nothing changes. Holds the registry alone, so that no activation
-- that has counted its vectors overrules it; jobs are locked after it, and none is waited for. Returns how many jobs were
-- cancelled.
create function upload_pipeline.retire_model(p_model text, p_now boolean default false)
returns integer
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_model upload_pipeline.embedding_models;
  v_jobs  integer := 0;
begin
  perform upload_pipeline.hold_models(p_alone => true);
  select m.* into v_model from upload_pipeline.embedding_models m where m.model = p_model for no key update;
  if not found then
    raise exception 'there is no embedding model "%"', p_model
      using errcode = 'UP002', hint = '`upload-pipeline models status` lists the models.';
  end if;
  if v_model.status = 'active' then
    raise exception 'embedding model "%" is the active one', p_model
      using errcode = 'UP003', hint = 'Activate another one first.';
  end if;
  if v_model.status = 'retiring' and not p_now then
    raise exception 'embedding model "%" can be activated again until %', p_model, v_model.retire_at
      using errcode = 'UP003', hint = 'It is retired by itself then; --now does not wait.';
  end if;
  if v_model.status = 'retired' then
    return 0;
  end if;
  update upload_pipeline.embedding_models m
     set status = 'retired', paused = false, building_since = null, retire_at = null, fill_after = null
   where m.model = p_model;
  perform upload_pipeline.note_model_change(p_model, 'retired');
  if v_model.status = 'building' then
    -- a job at work sees for itself that there is nothing to fill
    select count(*) into v_jobs
      from (select j.job_id from upload_pipeline.upload_jobs j
             where j.pipeline = 'reembed' and j.state in ('queued', 'retryable')
             order by j.job_id for no key update skip locked) w
     cross join lateral upload_pipeline.cancel_job(w.job_id) c;
  end if;
  return v_jobs;
end
$$;

-- Makes jobs for a page of documents that lack vectors of the model that is being filled, while fewer than p_open have not
-- ended: those that are put off count too, or a provider that is paused would get a job for every document there is.
-- Behind the last document it begins again, after a rest: that finds what was missed, and costs little when there is
-- nothing. A document whose job has failed for good is left out until the model is added anew. Any worker runs it, one at
-- a time. Returns how many jobs it made, and whether there may be more to do at once.
create function upload_pipeline.enqueue_refills(p_limit integer default 500, p_open integer default 1000)
returns table (jobs integer, more boolean)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now       timestamptz := upload_pipeline.now();
  v_model     upload_pipeline.embedding_models;
  v_open      integer;
  v_seen      integer;
  v_last      uuid;
  v_documents uuid[];
  v_users     uuid[];
begin
  if not pg_try_advisory_xact_lock(hashtextextended('upload_pipeline.enqueue_refills', 0)) then
    return query select 0, false;
    return;
  end if;
  select m.* into v_model from upload_pipeline.embedding_models m
   where m.status = 'building' and not m.paused and m.next_fill_at <= v_now;
  if not found then
    return query select 0, false;
    return;
  end if;
  -- in upload_jobs_live, which has the pipeline; of 50,000 jobs that have not ended it reads 400 blocks
  select count(*) into v_open
    from (select from upload_pipeline.upload_jobs j
           where j.pipeline = 'reembed' and j.document_id is not null and j.state in ('queued', 'working', 'retryable')
           limit p_open) w;
  if v_open >= p_open then
    return query select 0, false;
    return;
  end if;

  with page as materialized (
    select d.document_id, d.user_id, d.searchable_at is not null and d.deleted_at is null as found
      from upload_pipeline.documents d
     where d.document_id > coalesce(v_model.fill_after, '00000000-0000-0000-0000-000000000000')
     order by d.document_id limit p_limit
       -- a document that goes away in this moment would break the foreign key of its job
       for key share skip locked
  ), lacking as (
    select p.document_id, p.user_id from page p
     where p.found and upload_pipeline.lacks_vectors(p.document_id, v_model.model)
       and not exists (select from upload_pipeline.upload_jobs j
                        where j.document_id = p.document_id and j.pipeline = 'reembed'
                          and (j.finished_at is null or (j.state = 'deadletter' and j.finished_at >= v_model.building_since)))
  )
  select (select count(*) from page), (select (array_agg(p.document_id order by p.document_id desc))[1] from page p),
         array_agg(l.document_id order by l.document_id), array_agg(l.user_id order by l.document_id)
    into v_seen, v_last, v_documents, v_users
    from lacking l;
  if v_documents is not null then
    perform upload_pipeline.enqueue_jobs(v_documents, v_users, 'reembed', (-1)::smallint);
  end if;
  update upload_pipeline.embedding_models m
     set fill_after = case when v_seen < p_limit then null else v_last end,
         next_fill_at = case when v_seen < p_limit then v_now + interval '30 seconds' else v_now end
   where m.model = v_model.model and m.status = 'building';
  return query select coalesce(cardinality(v_documents), 0), v_seen = p_limit;
end
$$;

-- Live chunks of a document that have no vector of a model, in document order. Of a retired model none: place_vectors takes
-- no vectors of it, so a job that was at work when it was given up would have them made, and paid for, again and again.
create function upload_pipeline.pending_refill(p_document_id uuid, p_model text, p_limit integer default 256)
returns table (chunk_id uuid, text text, chunk_sha256 text)
language sql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  select c.chunk_id, c.text, c.chunk_sha256
    from upload_pipeline.document_chunks c
   where c.document_id = p_document_id and c.live and c.embed_model <> p_model
     and not exists (select from upload_pipeline.chunk_vectors s where s.chunk_id = c.chunk_id and s.embed_model = p_model)
     and exists (select from upload_pipeline.embedding_models m where m.model = p_model and m.status <> 'retired')
   order by c.ordinal
   limit p_limit
$$;

-- The chunks of a job that have no vector of a model yet.
create function upload_pipeline.pending_chunks(p_pipeline text, p_document_id uuid, p_model text, p_limit integer)
returns table (chunk_id uuid, text text, chunk_sha256 text)
language plpgsql
stable
security definer
set search_path = ''
as $$
begin
  if p_pipeline = 'reembed' then
    return query select * from upload_pipeline.pending_refill(p_document_id, p_model, p_limit);
  else
    return query select * from upload_pipeline.pending_vectors(p_document_id, p_model, p_limit);
  end if;
end
$$;

-- queued -> filled, the job's end. UP007 where a live chunk of the document still has no vector of the model that is being
-- filled, which may be another one than the caller's, or the chunk may be new: the caller embeds it and asks again.
create function upload_pipeline.commit_refill(p_job_id uuid, p_token bigint, p_ttl interval default '60 seconds')
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job      upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'filled');
  v_building text;
begin
  if v_job.stage = 'filled' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  perform from upload_pipeline.documents d where d.document_id = v_job.document_id for no key update;
  select m.model into v_building from upload_pipeline.embedding_models m where m.status = 'building';
  if upload_pipeline.lacks_vectors(v_job.document_id, v_building) then
    raise exception 'document %: live chunks lack a vector of "%"', v_job.document_id, v_building
      using errcode = 'UP007', hint = 'Embed them, then commit again.';
  end if;
  return query
    select * from upload_pipeline.advance_job(p_job_id, p_token, 'queued', 'filled', false, p_ttl,
      jsonb_build_object('embed_model', v_building) || upload_pipeline.job_cost(p_job_id));
end
$$;

-- What follows a change of models, bit by bit: the active model's vectors come into the chunks' rows, and the ones there
-- take their place beside, for as long as their model may be activated again; models whose grace time is over are retired;
-- vectors of retired ones go. At most p_limit vectors of each kind, so a large document comes in parts; a search finds the
-- vector of each chunk in one place or the other, whatever became of the chunks around it. Any worker runs it; a document
-- that is being written is left for the next time, and holds up no other. Returns how many vectors came home, and how many
-- were removed.
create function upload_pipeline.settle_models(p_limit integer default 1000)
returns table (moved integer, removed integer)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now       timestamptz := upload_pipeline.now();
  v_active    text;
  v_retired   text;
  v_chunks    uuid[];
  v_documents uuid[];
  v_part      integer;
  v_moved     integer := 0;
  v_removed   integer := 0;
begin
  perform upload_pipeline.hold_models();
  for v_retired in
    update upload_pipeline.embedding_models m set status = 'retired', retire_at = null
     where m.status = 'retiring' and m.retire_at <= v_now
    returning m.model
  loop
    perform upload_pipeline.note_model_change(v_retired, 'retired');
  end loop;

  select m.model into v_active from upload_pipeline.embedding_models m where m.status = 'active';
  -- The limit counts what is locked, so vectors of a document that is not are passed over, however many there are. They are
  -- read behind `offset 0`, that is, first: otherwise a plan may look for vectors of each document there is.
  select array_agg(p.chunk_id), array_agg(distinct p.document_id) into v_chunks, v_documents
    from (select v.chunk_id, d.document_id
            from (select s.chunk_id, s.document_id from upload_pipeline.chunk_vectors s
                   where s.embed_model = v_active
                   order by s.document_id offset 0) v
            join upload_pipeline.documents d on d.document_id = v.document_id
           order by v.document_id limit p_limit
             for no key update of d skip locked) p;
  if v_chunks is not null then
    -- what was seen before the documents were locked is looked for anew; by `|| ''`, in the primary key (activate_model)
    with home as (
      delete from upload_pipeline.chunk_vectors s
       where s.chunk_id = any (v_chunks) and s.embed_model || '' = v_active
      returning s.chunk_id, s.embedding
    ), kept as (
      insert into upload_pipeline.chunk_vectors (chunk_id, embed_model, document_id, embedding, created_at)
      select c.chunk_id, c.embed_model, c.document_id, c.embedding, v_now
        from home h
        join upload_pipeline.document_chunks c on c.chunk_id = h.chunk_id and c.embed_model <> v_active
        join upload_pipeline.embedding_models m on m.model = c.embed_model and m.status <> 'retired'
      on conflict (chunk_id, embed_model) do nothing
    )
    update upload_pipeline.document_chunks c set embedding = h.embedding, embed_model = v_active
      from home h where c.chunk_id = h.chunk_id;
    get diagnostics v_moved = row_count;
    update upload_pipeline.documents d set embed_model = v_active
     where d.document_id = any (v_documents) and d.embed_model <> v_active
       and not exists (select from upload_pipeline.chunk_vectors s
                        where s.document_id = d.document_id and s.embed_model = v_active);
  end if;

  for v_retired in select m.model from upload_pipeline.embedding_models m where m.status = 'retired' loop
    -- by place, so that the limit is asked once: joined, it would be asked for each row that is looked at
    delete from upload_pipeline.chunk_vectors s
     where s.ctid = any (array(
       select g.ctid from upload_pipeline.chunk_vectors g where g.embed_model = v_retired limit p_limit for update skip locked));
    get diagnostics v_part = row_count;
    v_removed := v_removed + v_part;
    delete from upload_pipeline.document_vector_buffer b
     where b.ctid = any (array(
       select g.ctid from upload_pipeline.document_vector_buffer g where g.embed_model = v_retired limit p_limit for update skip locked));
    delete from upload_pipeline.document_cached_chunks k
     where k.ctid = any (array(
       select g.ctid from upload_pipeline.document_cached_chunks g where g.embed_model = v_retired limit p_limit for update skip locked));
  end loop;
  return query select v_moved, v_removed;
end
$$;
