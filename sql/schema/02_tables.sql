-- Pipelines and their stages. A job at a stage waits for the step that leaves that stage; `pool` names the
-- workers who run that step. Adding a stage is adding a row here and a step module in the workers.
create table upload_pipeline.stages (
  pipeline text not null,
  stage    text not null,
  position smallint not null,
  progress smallint not null,
  pool     text not null default 'default',
  final    boolean not null default false,
  primary key (pipeline, stage),
  unique (pipeline, position),
  constraint stages_names check (pipeline ~ '^[a-z][a-z0-9_]*$' and stage ~ '^[a-z][a-z0-9_]*$' and pool ~ '^[a-z][a-z0-9_-]*$'),
  constraint stages_position check (position >= 0),
  constraint stages_progress check (progress between 0 and 100)
);

-- one end for each pipeline
create unique index stages_final on upload_pipeline.stages (pipeline) where final;

insert into upload_pipeline.stages (pipeline, stage, position, progress, final) values
  ('document', 'queued',               0,   0, false),
  ('document', 'job_validated',        1,  10, false),
  ('document', 'parsing',              2,  20, false),
  ('document', 'parsed',               3,  30, false),
  ('document', 'parse_validated',      4,  35, false),
  ('document', 'chunking',             5,  45, false),
  ('document', 'chunks_buffered',      6,  50, false),
  ('document', 'chunked',              7,  55, false),
  ('document', 'embedding',            8,  70, false),
  ('document', 'embeddings_buffered',  9,  75, false),
  ('document', 'embedded',            10, 100, true),
  ('photo',    'pending_upload',       0,   0, false),
  ('photo',    'uploaded',             1,  20, false),
  ('photo',    'extracting',           2,  40, false),
  ('photo',    'extracted',            3,  60, false),
  ('photo',    'detecting',            4,  80, false),
  ('photo',    'completed',            5, 100, true);

-- Filling a model (05_models): in a pool of its own, so that no user's upload waits for a slot of its lane.
insert into upload_pipeline.stages (pipeline, stage, position, progress, pool, final) values
  ('reembed', 'queued', 0,   0, 'background', false),
  ('reembed', 'filled', 1, 100, 'background', true);

-- Which vectors exist and which serve searches. One model is active once any is registered; one at a time is filled. Rows
-- with vectors name their model and have no foreign key: every one of them would lock the one row of the model, at the price
-- of an index entry, and workers at once would do it in turns. Their verbs ask for the model once, and keep_named_models
-- keeps one that is named.
create table upload_pipeline.embedding_models (
  model          text primary key,
  provider       text not null,
  dimensions     integer not null,
  status         upload_pipeline.model_status not null,
  -- of a model that is being filled: no more jobs, until it goes on
  paused         boolean not null default false,
  created_at     timestamptz not null default upload_pipeline.now(),
  building_since timestamptz,
  activated_at   timestamptz,
  -- of one that is retiring: when its vectors may go
  retire_at      timestamptz,
  -- how far enqueue_refills has walked through the documents, and when it may walk again
  fill_after     uuid,
  next_fill_at   timestamptz not null default upload_pipeline.now(),
  -- of one that is being filled: when and how its provider failed last
  failed_at      timestamptz,
  failure        text,
  constraint embedding_models_dimensions check (dimensions between 1 and 16000),
  constraint embedding_models_building check (status <> 'building' or building_since is not null),
  constraint embedding_models_grace check ((status = 'retiring') = (retire_at is not null)),
  constraint embedding_models_paused check (status = 'building' or not paused),
  constraint embedding_models_failure check ((failure is null) = (failed_at is null))
);

create unique index embedding_models_active on upload_pipeline.embedding_models (status) where status = 'active';
create unique index embedding_models_building on upload_pipeline.embedding_models (status) where status = 'building';

-- One row a file of a user. Same user and same bytes are the same document.
create table upload_pipeline.documents (
  document_id     uuid primary key,
  user_id         uuid not null,
  filename        text not null,
  media_type      text not null,
  file_bytes      bigint not null,
  file_sha256     text not null,
  metadata        jsonb not null default '{}',
  raw_key         text not null unique,
  parser          text,
  -- where a hosted parser has it, and what it was asked for: the submission that counts (05_parsing)
  parse_provider     text,
  parse_id           text,
  parse_tier         text,
  parse_version      text,
  parse_submitted_at timestamptz,
  page_count      integer,
  warnings        text[] not null default '{}',
  markdown_key    text,
  markdown_sha256 text,
  markdown_chars  integer,
  page_starts     integer[] not null default '{}',
  chunker         text,
  chunk_count     integer,
  embed_model     text references upload_pipeline.embedding_models,
  -- until when announced bytes may come; null once the bytes are in the store and were seen to be those
  upload_deadline timestamptz,
  created_at      timestamptz not null default upload_pipeline.now(),
  updated_at      timestamptz not null default upload_pipeline.now(),
  searchable_at   timestamptz,
  deleted_at      timestamptz,
  unique (user_id, file_sha256),
  -- what the children's composite keys point at: a child can never carry another user's id
  unique (document_id, user_id),
  constraint documents_filename check (filename <> '' and length(filename) <= 1024),
  constraint documents_bytes check (file_bytes > 0),
  constraint documents_sha256 check (file_sha256 ~ '^[0-9a-f]{64}$'),
  constraint documents_markdown_sha256 check (markdown_sha256 ~ '^[0-9a-f]{64}$'),
  constraint documents_markdown_whole check ((markdown_key is null) = (markdown_sha256 is null)),
  constraint documents_parse_whole check (num_nulls(parse_provider, parse_id, parse_tier, parse_version, parse_submitted_at) in (0, 5)),
  constraint documents_metadata check (jsonb_typeof(metadata) = 'object'),
  constraint documents_searchable check (searchable_at is null or (embed_model is not null and chunk_count > 0))
);

-- a user's documents, newest first, page by page
create index documents_listing on upload_pipeline.documents (user_id, created_at desc, document_id);
create index documents_embed_model on upload_pipeline.documents (embed_model) where embed_model is not null;
-- deletions that a crash left half done
create index documents_deleting on upload_pipeline.documents (deleted_at) where deleted_at is not null;

-- One narrow row a job: what a claim, a renewal and a transition touch, and nothing else. It is about one document or one
-- photo (05_photo), its subject; no verb of the queue reads which. Results and errors stand
-- in `job_outcomes`, history in `events`. `stage`, the lease and the counters are in no index, so a stage change and
-- a renewal are HOT updates (heap-only, no index written).
create table upload_pipeline.upload_jobs (
  -- ids come in order and each row is written again at least twice: room for that in the pages
  job_id           uuid primary key with (fillfactor = 70) default upload_pipeline.new_job_id(),
  seq              bigint generated always as identity,
  document_id      uuid,
  photo_id         uuid,
  user_id          uuid not null,
  pipeline         text not null,
  stage            text not null,
  pool             text not null,
  state            upload_pipeline.job_state not null default 'queued',
  priority         smallint not null default 0,
  retry_count      smallint not null default 0,
  cancel_requested boolean not null default false,
  lease_token      bigint not null default 0,
  worker_id        uuid,
  lease_expires_at timestamptz,
  run_at           timestamptz not null default upload_pipeline.now(),
  correlation_id   text not null default '',
  created_at       timestamptz not null default upload_pipeline.now(),
  started_at       timestamptz,
  updated_at       timestamptz not null default upload_pipeline.now(),
  finished_at      timestamptz,
  foreign key (document_id, user_id) references upload_pipeline.documents (document_id, user_id)
    on update cascade on delete cascade,
  foreign key (pipeline, stage) references upload_pipeline.stages,
  constraint upload_jobs_subject check (num_nonnulls(document_id, photo_id) = 1),
  -- a job has a lease and a holder exactly while it is working: the fence reads the one for the other
  constraint upload_jobs_lease check ((state = 'working') = (lease_expires_at is not null)),
  constraint upload_jobs_holder check ((state = 'working') = (worker_id is not null)),
  constraint upload_jobs_finished check ((state in ('done', 'deadletter', 'cancelled')) = (finished_at is not null)),
  constraint upload_jobs_counts check (retry_count >= 0 and lease_token >= 0),
  constraint upload_jobs_correlation check (length(correlation_id) <= 200)
) with (
  -- room for HOT updates; a hot queue table must be vacuumed by rows changed, not by a fifth of its size
  fillfactor = 80,
  autovacuum_vacuum_scale_factor = 0.01,
  autovacuum_vacuum_threshold = 500,
  autovacuum_analyze_scale_factor = 0.02,
  autovacuum_vacuum_cost_delay = 0
);

-- claim_jobs: the head of one lane
create index upload_jobs_ready on upload_pipeline.upload_jobs (pool, user_id, priority desc, seq) where state = 'queued';
-- claim_jobs: how many of a lane are at work; reap_expired: whose lease ran out
create index upload_jobs_working on upload_pipeline.upload_jobs (pool, user_id) where state = 'working';
-- promote_due: what is due
create index upload_jobs_retryable on upload_pipeline.upload_jobs (run_at) where state = 'retryable';
-- enqueue_jobs: at most one live job for a document and pipeline; enqueue_refills: how many of a pipeline there are
create unique index upload_jobs_live on upload_pipeline.upload_jobs (document_id, pipeline)
  where state in ('queued', 'working', 'retryable') and document_id is not null;
-- a document's jobs, newest last; the foreign key to documents
create index upload_jobs_document on upload_pipeline.upload_jobs (document_id, seq) where document_id is not null;
-- a user's jobs, newest first, page by page
create index upload_jobs_listing on upload_pipeline.upload_jobs (user_id, created_at desc, job_id) with (fillfactor = 70);

-- What came of a job: its results, or its last error. Written at a failure or at the end, never on the way.
create table upload_pipeline.job_outcomes (
  job_id        uuid primary key references upload_pipeline.upload_jobs on delete cascade,
  user_id       uuid not null,
  results       jsonb,
  error_code    text,
  error_message text,
  error_details jsonb,
  updated_at    timestamptz not null default upload_pipeline.now(),
  constraint job_outcomes_error check ((error_code is null) = (error_message is null)),
  constraint job_outcomes_code check (error_code ~ '^[A-Z][A-Z0-9_]*$')
);

-- One tiny row for each user and pool. Locking it makes the cap on a user's working jobs exact; walking the ready
-- ones in user order from a cursor in the worker's memory makes the claim fair at a cost that no backlog changes.
-- Never updated to rotate: the cursor rotates, so the table does not bloat.
create table upload_pipeline.lanes (
  pool          text not null,
  user_id       uuid not null,
  max_in_flight integer not null default 2,
  ready         boolean not null default true,
  primary key (pool, user_id),
  constraint lanes_cap check (max_in_flight >= 1),
  -- the walk starts behind the nil UUID
  constraint lanes_user check (user_id <> '00000000-0000-0000-0000-000000000000')
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);

create index lanes_ready on upload_pipeline.lanes (pool, user_id) where ready;

-- The audit trail: append-only, one partition a month, no foreign keys, so it outlives what it tells of.
create sequence upload_pipeline.events_event_id_seq as bigint;

create table upload_pipeline.events (
  event_id       bigint not null default nextval('upload_pipeline.events_event_id_seq'),
  at             timestamptz not null,
  code           upload_pipeline.event_code not null,
  severity       upload_pipeline.event_severity not null default 'info',
  user_id        uuid,
  document_id    uuid,
  job_id         uuid,
  worker_id      uuid,
  stage          text,
  lease_token    bigint,
  correlation_id text not null default '',
  payload        jsonb,
  -- one job's history, in order; with `at` because a partitioned table wants its key in it
  unique (job_id, event_id, at)
) partition by range (at);

-- what happened lately; rows come in order of time, so a block range index says where at next to no cost
create index events_at on upload_pipeline.events using brin (at) with (autosummarize = on);

-- Catches what no month covers, so that an event can always be written; ensure_event_partitions empties it.
create table upload_pipeline.events_default partition of upload_pipeline.events default;

-- The new set of a document's chunks, from the moment they are cut until the document is embedded.
create table upload_pipeline.document_chunk_buffer (
  document_id  uuid not null,
  ordinal      integer not null,
  chunk_id     uuid not null unique,
  user_id      uuid not null,
  text         text not null,
  -- of the text in UTF-8, in hexadecimal: by it the vector is found that was paid for before
  chunk_sha256 text not null,
  chunker      text not null,
  start_offset integer not null,
  end_offset   integer not null,
  page_from    integer,
  page_to      integer,
  heading_path text[] not null,
  section_ids  uuid[] not null,
  primary key (document_id, ordinal),
  foreign key (document_id, user_id) references upload_pipeline.documents (document_id, user_id)
    on update cascade on delete cascade,
  constraint document_chunk_buffer_span check (0 <= start_offset and start_offset < end_offset),
  constraint document_chunk_buffer_ordinal check (ordinal >= 0),
  constraint document_chunk_buffer_pages check ((page_from is null) = (page_to is null) and page_from <= page_to),
  -- by trimming, at a fifth of what a regular expression costs: it is asked for each chunk, each time it is written
  constraint document_chunk_buffer_sha256 check (octet_length(chunk_sha256) = 64 and ltrim(chunk_sha256, '0123456789abcdef') = ''),
  constraint document_chunk_buffer_sections check (cardinality(heading_path) = cardinality(section_ids))
);

-- Vectors that a provider was paid for, for each user; 05_embedding_cache tells what is done with them.
--
-- `text_sha256` is of the exact text that was sent, in UTF-8. The vector is stored as it was made (float32): what a search
-- finds must not depend on whether a text came from here. The text itself is not kept. No foreign keys: a vector outlives
-- the document that it was made for, and a retired model may come back.
--
-- Of 1,536 dimensions a row takes 8.4 kB, those of its indexes included.
create table upload_pipeline.embedding_cache (
  user_id      uuid not null,
  model        text not null,
  dimensions   integer not null,
  text_sha256  bytea not null,
  last_used_on date not null,
  embedding    extensions.vector not null,
  primary key (user_id, model, dimensions, text_sha256),
  constraint embedding_cache_sha256 check (octet_length(text_sha256) = 32),
  constraint embedding_cache_dimensions check (extensions.vector_dims(embedding) = dimensions)
);

-- A vector of up to 1,900 dimensions stands in the row: it is written at two thirds of what the parts of one that stands out
-- of line cost, and written again when `last_used_on` changes, once a day at most.
alter table upload_pipeline.embedding_cache set (toast_tuple_target = 8160);

-- forget_unused_vectors: those that were not used for the longest time
create index embedding_cache_used on upload_pipeline.embedding_cache (last_used_on);

-- Vectors as they arrive, so that a crash repeats only what was not yet stored: those that are not in `embedding_cache`.
create table upload_pipeline.document_vector_buffer (
  chunk_id    uuid not null,
  embed_model text not null,
  document_id uuid not null references upload_pipeline.documents on delete cascade,
  embedding   extensions.vector not null,
  -- the model first: so the key also finds what a model that was given up has left here
  primary key (embed_model, chunk_id)
);

-- A vector of up to 1,900 dimensions stands in the row: each is written once, read once and deleted, at a third of what the
-- parts of one that stands out of line would cost.
alter table upload_pipeline.document_vector_buffer set (toast_tuple_target = 8160);

create index document_vector_buffer_document on upload_pipeline.document_vector_buffer (document_id);

-- Buffered chunks whose vectors are in `embedding_cache`, under the digests of their texts: so a vector that was paid for is
-- written once before its commit, and a chunk counts once as found. A row for what one request brought, or one look found,
-- of a document: as a row for each chunk they took a third of what keeping a vector costs. Where a vector is forgotten before
-- its commit, the chunk is pending again.
create table upload_pipeline.document_cached_chunks (
  place       bigint primary key generated always as identity,
  document_id uuid not null references upload_pipeline.documents on delete cascade,
  embed_model text not null,
  chunk_ids   uuid[] not null
);

create index document_cached_chunks_document on upload_pipeline.document_cached_chunks (document_id, embed_model);
-- settle_models: what a model that was given up has left here
create index document_cached_chunks_model on upload_pipeline.document_cached_chunks (embed_model);

-- What a text search reads: headings weigh more than the text below them.
create function upload_pipeline.chunk_search_vector(p_heading_path text[], p_text text)
returns tsvector
language sql
immutable
parallel safe
set search_path = ''
as $$
  select setweight(to_tsvector('pg_catalog.english', array_to_string(p_heading_path, ' ')), 'A')
      || setweight(to_tsvector('pg_catalog.english', p_text), 'D')
$$;

-- The searchable result. `live` rows are what readers see; a new set stands beside them, not live, until it has its
-- vectors, and then takes their place in one transaction.
create table upload_pipeline.document_chunks (
  chunk_id      uuid primary key,
  document_id   uuid not null,
  user_id       uuid not null,
  ordinal       integer not null,
  text          text not null,
  chunk_sha256  text not null,
  chunker       text not null,
  start_offset  integer not null,
  end_offset    integer not null,
  page_from     integer,
  page_to       integer,
  heading_path  text[] not null,
  section_ids   uuid[] not null,
  search_vector tsvector not null generated always as
                  (upload_pipeline.chunk_search_vector(heading_path, text)) stored,
  embed_model   text,
  embedding     extensions.vector,
  live          boolean not null default false,
  created_at    timestamptz not null default upload_pipeline.now(),
  foreign key (document_id, user_id) references upload_pipeline.documents (document_id, user_id)
    on update cascade on delete cascade,
  constraint document_chunks_span check (0 <= start_offset and start_offset < end_offset),
  constraint document_chunks_ordinal check (ordinal >= 0),
  constraint document_chunks_pages check ((page_from is null) = (page_to is null) and page_from <= page_to),
  constraint document_chunks_sha256 check (octet_length(chunk_sha256) = 64 and ltrim(chunk_sha256, '0123456789abcdef') = ''),
  constraint document_chunks_sections check (cardinality(heading_path) = cardinality(section_ids)),
  constraint document_chunks_vector check ((embedding is null) = (embed_model is null)),
  constraint document_chunks_live check (not live or embedding is not null)
);

-- search_chunks looks at the words and the vector of every chunk of a user: they stand in the row itself where a page holds
-- both, and the text, of which a search reads ten, goes out of line before them. Measured with 10,000 chunks of 2,000
-- characters and 1,536 dimensions, against vectors out of line: 10,000 blocks instead of 40,000, a hybrid search 69 ms
-- instead of 106, one by vectors 24 instead of 53; where a page does not hold both (many different words) nothing is lost.
alter table upload_pipeline.document_chunks alter column search_vector set storage main;
alter table upload_pipeline.document_chunks alter column embedding set storage main;
alter table upload_pipeline.document_chunks set (toast_tuple_target = 8160);

-- a document shows each place in it once; activate_model looks at each live chunk, in here and not in its wide row
create unique index document_chunks_place on upload_pipeline.document_chunks (document_id, ordinal)
  include (chunk_id, embed_model) where live;
-- the foreign key to documents, and the old set when a new one takes its place
create index document_chunks_document on upload_pipeline.document_chunks (document_id);
-- search_chunks: exact search over one user's rows
create index document_chunks_user on upload_pipeline.document_chunks (user_id) where live;
create index document_chunks_model on upload_pipeline.document_chunks (embed_model) where embed_model is not null;

-- Vectors of other models than the one in the chunk's own row: of the model that is being filled, and for a grace time of
-- the one before. Empty but while a model changes (05_models tells how they move).
create table upload_pipeline.chunk_vectors (
  chunk_id    uuid not null references upload_pipeline.document_chunks on delete cascade,
  embed_model text not null,
  document_id uuid not null,
  embedding   extensions.vector not null,
  created_at  timestamptz not null default upload_pipeline.now(),
  primary key (chunk_id, embed_model)
);

-- settle_models: which documents have vectors of the active model here, and which those of a document are
create index chunk_vectors_model on upload_pipeline.chunk_vectors (embed_model, document_id);
-- model_overview: how many came lately; rows come in order of time
create index chunk_vectors_created on upload_pipeline.chunk_vectors using brin (created_at) with (autosummarize = on);

-- The upper part of a document's structure: the document itself, whose node has its id, and its sections.
create table upload_pipeline.document_outline (
  node_id     uuid primary key,
  document_id uuid not null,
  user_id     uuid not null,
  kind        upload_pipeline.node_kind not null,
  title       text not null,
  level       smallint not null,
  ordinal     integer not null,
  parent_id   uuid references upload_pipeline.document_outline on delete cascade,
  foreign key (document_id, user_id) references upload_pipeline.documents (document_id, user_id)
    on update cascade on delete cascade,
  constraint document_outline_kind check (kind <> 'chunk'),
  constraint document_outline_level check (level >= 0),
  constraint document_outline_ordinal check (ordinal >= 0),
  constraint document_outline_root check ((kind = 'document') = (parent_id is null)),
  constraint document_outline_no_loop check (parent_id <> node_id)
);

create index document_outline_document on upload_pipeline.document_outline (document_id);
-- the foreign key
create index document_outline_parent on upload_pipeline.document_outline (parent_id) where parent_id is not null;

-- The document's structure, a tree: document, sections, chunks. A chunk's node has the chunk's id, and all of it follows from
-- the chunk; stored as rows of their own, these took a fifth of the time of a commit.
create view upload_pipeline.document_nodes with (security_invoker = true) as
select o.node_id, o.document_id, o.user_id, o.kind, o.title, o.level, o.ordinal, o.parent_id
  from upload_pipeline.document_outline o
union all
select c.chunk_id, c.document_id, c.user_id, 'chunk', '', (cardinality(c.section_ids) + 1)::smallint, c.ordinal,
       coalesce(c.section_ids[cardinality(c.section_ids)], c.document_id)
  from upload_pipeline.document_chunks c
 where c.live;

-- How the nodes hang together: each is contained in its parent, and a chunk is followed by the one with the next ordinal.
create view upload_pipeline.document_edges with (security_invoker = true) as
select n.parent_id as source_id, n.node_id as target_id, 'contains'::upload_pipeline.edge_kind as kind, n.document_id, n.user_id
  from upload_pipeline.document_nodes n
 where n.parent_id is not null
union all
select c.chunk_id, f.chunk_id, 'next', c.document_id, c.user_id
  from upload_pipeline.document_chunks c
  join upload_pipeline.document_chunks f on f.document_id = c.document_id and f.ordinal = c.ordinal + 1 and f.live
 where c.live;

-- Which worker processes there are. What one holds is read from upload_jobs by its id; the row is a report, and no
-- verb trusts it: a lease lives and dies by `lease_expires_at` alone.
create table upload_pipeline.workers (
  worker_id    uuid primary key,
  host         text not null,
  pid          integer not null,
  version      text not null,
  pools        text[] not null,
  -- of these, what it leaves to others for now, since it lacks what their jobs need
  left_pools   text[] not null default '{}',
  concurrency  integer not null,
  started_at   timestamptz not null default upload_pipeline.now(),
  last_beat_at timestamptz not null default upload_pipeline.now(),
  constraint workers_pools check (cardinality(pools) >= 1),
  constraint workers_concurrency check (concurrency >= 1)
) with (fillfactor = 50);
