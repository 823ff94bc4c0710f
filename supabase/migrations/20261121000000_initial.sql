-- Made by scripts/build-migration from sql/schema/*.sql. Edit those and run it again.

-- sql/schema/01_foundation.sql

-- The document pipeline's database.
--
-- Everything lives in the schema `upload_pipeline`. Tables are nouns (documents, upload_jobs, lanes, events, ...),
-- functions are verbs (enqueue_jobs, claim_jobs, renew_leases, advance_jobs, fail_job, ...), and only the verbs
-- change a job's state: no role that logs in has update rights on `upload_jobs`.
--
-- Who is who:
--   the schema's owner   runs migrations; owns every function, so that each verb runs with the owner's rights
--   upload_worker        logs in; workers, intake and the terminal. Reads every table, calls the verbs, no more
--   authenticated        a signed-in user (Supabase's role). Reads own rows, may call `search_chunks`
--   service_role         Supabase's back-end role. Reads every table, calls the verbs
--   anon                 may do nothing here
--
-- SQLSTATEs that the verbs raise, all of class UP:
--   UP001  the lease is lost: another worker, an operator or the clock has taken the job
--   UP002  no such job, document or pipeline
--   UP003  the job's or the document's state does not allow this
--   UP004  the stage does not allow this
--   UP005  the work handed in is not whole or does not fit
--   UP006  the caller's role does not allow this
--   UP007  vectors of the embedding model in use are lacking, or it is another one by now: embed, then try again

create schema if not exists upload_pipeline;

create extension if not exists vector with schema extensions;

do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'upload_worker') then
    -- noinherit: membership in `authenticated` serves only to search as a user, by `set local role`
    create role upload_worker login noinherit;
  end if;
exception when duplicate_object or unique_violation then
  null; -- roles belong to the whole server: another database of it was migrated at the same moment
end
$$;

grant authenticated to upload_worker;
grant usage on schema upload_pipeline to authenticated, service_role, upload_worker;

create type upload_pipeline.job_state as enum (
  'queued',      -- ready: any worker of its pool may claim it
  'working',     -- leased by one worker
  'retryable',   -- waits for run_at: back-off after a failure, or a snooze
  'done',
  'deadletter',  -- failed for good; an operator or the user may retry it
  'cancelled'
);

create type upload_pipeline.event_severity as enum ('debug', 'info', 'warning', 'error');

create type upload_pipeline.event_code as enum (
  'document_reserved',
  'document_accepted',
  'document_searchable',
  'document_deletion_started',
  'document_deleted',
  'photo_status_changed',
  'photo_deletion_started',
  'photo_deleted',
  'photo_expired',
  'job_enqueued',
  'job_claimed',
  'job_advanced',
  'job_handed_on',
  'job_snoozed',
  'job_failed',
  'job_promoted',
  'job_released',
  'job_reaped',
  'job_deadlettered',
  'job_cancel_requested',
  'job_cancelled',
  'job_restarted',
  'job_done',
  'batch_accepted',
  'batch_completed',
  'write_fenced',
  'orphan_removed',
  'upkeep_refused',
  'capacity_warning',
  'provider_paused',
  'worker_started',
  'worker_stopped',
  'worker_left_pools',
  'embedding_model_changed'
);

create type upload_pipeline.model_status as enum (
  'building',  -- being filled beside the active one; serves nothing yet
  'active',    -- searches use it, and every live chunk has a vector of it
  'retiring',  -- was active; its vectors stay for a grace time, and it may be activated again
  'retired'    -- its vectors are removed bit by bit
);

create type upload_pipeline.node_kind as enum ('document', 'section', 'chunk');
create type upload_pipeline.edge_kind as enum ('contains', 'next');

-- A new job's id: a UUID of version 7 (RFC 9562: 48 bits of milliseconds, then random). Ids that grow with time keep the
-- newest jobs, which are the busy ones, side by side in every index that has them; random ones touch a page each.
create function upload_pipeline.new_job_id()
returns uuid
language sql
volatile
set search_path = ''
as $$
  select encode(
    -- version 4 is 0100 in the upper half of byte 6; with bits 52 and 53 it is 0111
    set_bit(set_bit(
      overlay(uuid_send(gen_random_uuid())
              placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
              from 1 for 6),
      52, 1), 53, 1),
    'hex')::uuid
$$;

-- The clock of every verb. Tests set `upload_pipeline.now`; production leaves it unset.
create function upload_pipeline.now()
returns timestamptz
language sql
stable
set search_path = ''
as $$
  select coalesce(
    nullif(current_setting('upload_pipeline.now', true), '')::timestamptz,
    pg_catalog.now()
  )
$$;

-- sql/schema/02_tables.sql

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

-- sql/schema/03_events.sql

-- Makes the partitions of `events` for this month and the months ahead, and moves what the default partition caught
-- into the month it belongs to. Safe to repeat and to run beside itself (a transaction lock orders the runs).
-- Returns the number of partitions made. Workers run it as part of maintenance.
create function upload_pipeline.ensure_event_partitions(p_months_ahead integer default 2)
returns integer
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_first date := date_trunc('month', upload_pipeline.now() at time zone 'UTC');
  v_month date;
  v_name  text;
  v_made  integer := 0;
begin
  perform pg_advisory_xact_lock(hashtextextended('upload_pipeline.ensure_event_partitions', 0));
  for v_month in
    select (v_first + make_interval(months => i))::date from generate_series(0, p_months_ahead) i
    union
    select distinct date_trunc('month', e.at at time zone 'UTC')::date from upload_pipeline.events_default e
    order by 1
  loop
    v_name := 'events_' || to_char(v_month, 'YYYY_MM');
    continue when to_regclass('upload_pipeline.' || v_name) is not null;
    -- what another transaction has written into the default partition and not committed would escape the move below,
    -- and then make the attachment fail: wait for it
    lock table upload_pipeline.events_default in access exclusive mode;
    execute format('create table upload_pipeline.%I (like upload_pipeline.events including defaults including constraints)', v_name);
    execute format('alter table upload_pipeline.%I enable row level security', v_name);
    execute format(
      'with moved as (delete from upload_pipeline.events_default where at >= %1$L and at < %2$L returning *)
       insert into upload_pipeline.%3$I select * from moved',
      v_month::timestamp at time zone 'UTC', (v_month + interval '1 month') at time zone 'UTC', v_name);
    execute format(
      'alter table upload_pipeline.events attach partition upload_pipeline.%I for values from (%L) to (%L)',
      v_name, v_month::timestamp at time zone 'UTC', (v_month + interval '1 month') at time zone 'UTC');
    v_made := v_made + 1;
  end loop;
  return v_made;
end
$$;

-- Drops the months that ended before p_before. Returns the names of what it dropped. For operators; nothing calls it.
create function upload_pipeline.drop_event_partitions(p_before timestamptz)
returns setof text
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_name text;
begin
  for v_name in
    select c.relname
      from pg_catalog.pg_inherits i
      join pg_catalog.pg_class c on c.oid = i.inhrelid
     where i.inhparent = 'upload_pipeline.events'::regclass
       and c.relname ~ '^events_\d{4}_\d{2}$'
       and to_date(substring(c.relname from 8), 'YYYY_MM') + interval '1 month' <= p_before at time zone 'UTC'
     order by c.relname
  loop
    execute format('drop table upload_pipeline.%I', v_name);
    return next v_name;
  end loop;
end
$$;

-- Writes one event. The verbs write theirs in their own statements; this is for workers, intake and maintenance.
create function upload_pipeline.record_event(
  p_code           upload_pipeline.event_code,
  p_severity       upload_pipeline.event_severity default 'info',
  p_user_id        uuid default null,
  p_document_id    uuid default null,
  p_job_id         uuid default null,
  p_worker_id      uuid default null,
  p_correlation_id text default '',
  p_payload        jsonb default null
)
returns bigint
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, correlation_id, payload)
  values (upload_pipeline.now(), p_code, p_severity, p_user_id, p_document_id, p_job_id, p_worker_id,
          left(p_correlation_id, 200), p_payload)
  returning event_id
$$;

select upload_pipeline.ensure_event_partitions();

-- sql/schema/03_usage.sql

-- What was used of the providers, by whom and at what cost. One row a call, or a part of one that served several jobs.

-- `usage_id` is given by whoever records, so that what is recorded again after a lost answer counts once. `job_id` is null
-- for what no job asked for (searches). `tokens`, `pages`, `credits`: what the provider counted, in its own units.
-- `cached`: texts or pages that cost nothing because they were there already. `cost_micros`: millionths of a US dollar by
-- the price table of the one who recorded, at that time; null where it has no price for what was used, which is not zero.
-- No foreign keys: what was paid outlives what it was paid for.
create table upload_pipeline.usage_records (
  usage_id    uuid primary key,
  at          timestamptz not null,
  job_id      uuid,
  document_id uuid,
  user_id     uuid,
  provider    text not null,
  model       text not null,
  operation   text not null,
  requests    bigint not null default 0,
  tokens      bigint not null default 0,
  pages       bigint not null default 0,
  credits     numeric(20, 6) not null default 0,
  cached      bigint not null default 0,
  cost_micros numeric(20, 6),
  constraint usage_records_names check (provider <> '' and model <> '' and operation <> ''),
  constraint usage_records_counts check (requests >= 0 and tokens >= 0 and pages >= 0 and credits >= 0 and cached >= 0),
  constraint usage_records_cost check (cost_micros >= 0)
);

-- job_cost: a job's records
create index usage_records_job on upload_pipeline.usage_records (job_id) where job_id is not null;
-- a user's usage, and what becomes of it when a session is claimed or forgotten
create index usage_records_user on upload_pipeline.usage_records (user_id, at) where user_id is not null;
-- usage of a time; rows come in order of time
create index usage_records_at on upload_pipeline.usage_records using brin (at) with (autosummarize = on);

-- What a job has used, all its tries together, as {"cost": {…}} for its results; {} where it used nothing: one look into
-- an index. `usd` is null where a part of it has no price. Volatile, so that it sees what was committed before the lock
-- under which it is called.
create function upload_pipeline.job_cost(p_job_id uuid)
returns jsonb
language plpgsql
volatile
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_cost jsonb;
begin
  select jsonb_build_object('usd', case when count(*) = count(r.cost_micros) then trim_scale(sum(r.cost_micros) / 1000000) end,
                            'requests', sum(r.requests), 'tokens', sum(r.tokens), 'pages', sum(r.pages), 'cached', sum(r.cached))
    into v_cost
    from upload_pipeline.usage_records r where r.job_id = p_job_id
  having count(*) > 0;
  return case when v_cost is null then '{}'::jsonb else jsonb_build_object('cost', v_cost) end;
end
$$;

-- Writes what ended jobs have used into their results, those that have used anything. The caller has locked them.
create function upload_pipeline.keep_costs(p_job_ids uuid[])
returns void
language sql
security definer
set search_path = ''
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  insert into upload_pipeline.job_outcomes as o (job_id, user_id, results, updated_at)
  select j.job_id, j.user_id, c.cost, upload_pipeline.now()
    from upload_pipeline.upload_jobs j
   cross join lateral (select upload_pipeline.job_cost(j.job_id) as cost) c
   where j.job_id = any (p_job_ids) and c.cost <> '{}'
   order by j.job_id
  on conflict (job_id) do update
    -- asked anew, behind the lock of the row: of two that record at once the second counts what the first wrote
    set results = coalesce(o.results, '{}'::jsonb) || upload_pipeline.job_cost(o.job_id), updated_at = excluded.updated_at
$$;

-- Records usage: an array of objects with the names of the table's columns, `usage_id`, `provider`, `model` and
-- `operation` among them. What was recorded before is left out. The user and the document of a record are those of its
-- job, where there is one. Returns how many were new.
--
-- A job that has ended gets its cost written anew. Its row is locked before, in the way that its end waits for: either
-- the job ends behind this call and counts what it wrote, or this call sees that it has ended.
create function upload_pipeline.record_usage(p_records jsonb)
returns integer
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
declare
  v_jobs  uuid[];
  v_ended uuid[];
  v_count integer;
begin
  select array_agg(distinct g.job_id order by g.job_id) into v_jobs
    from jsonb_to_recordset(p_records) g (job_id uuid) where g.job_id is not null;
  perform from upload_pipeline.upload_jobs j where j.job_id = any (v_jobs) order by j.job_id for share;

  with made as (
    insert into upload_pipeline.usage_records
      (usage_id, at, job_id, document_id, user_id, provider, model, operation, requests, tokens, pages, credits, cached, cost_micros)
    select g.usage_id, upload_pipeline.now(), g.job_id, coalesce(j.document_id, g.document_id), coalesce(j.user_id, g.user_id),
           g.provider, g.model, g.operation, coalesce(g.requests, 0), coalesce(g.tokens, 0), coalesce(g.pages, 0),
           coalesce(g.credits, 0), coalesce(g.cached, 0), g.cost_micros
      from jsonb_to_recordset(p_records) g (
             usage_id uuid, job_id uuid, document_id uuid, user_id uuid, provider text, model text, operation text,
             requests bigint, tokens bigint, pages bigint, credits numeric, cached bigint, cost_micros numeric)
      left join upload_pipeline.upload_jobs j on j.job_id = g.job_id
     -- two calls with the same records in opposite order would wait for each other
     order by g.usage_id
    on conflict (usage_id) do nothing
    returning job_id
  )
  select count(*) into v_count from made;

  if v_count > 0 and v_jobs is not null then
    select array_agg(j.job_id order by j.job_id) into v_ended
      from upload_pipeline.upload_jobs j where j.job_id = any (v_jobs) and j.finished_at is not null;
    perform upload_pipeline.keep_costs(v_ended);
  end if;
  return v_count;
end
$$;

-- Usage by user, by day (UTC) and by model. Rows of the reader's own usage, or of all for those who read all. `unpriced`
-- counts the records that no price was known for: the cost lacks theirs.
create view upload_pipeline.usage_by_user with (security_invoker = true) as
select r.user_id, r.provider, r.model, r.operation, count(distinct r.document_id) as documents, sum(r.requests) as requests,
       sum(r.tokens) as tokens, sum(r.pages) as pages, sum(r.credits) as credits, sum(r.cached) as cached,
       sum(r.cost_micros) as cost_micros, count(*) - count(r.cost_micros) as unpriced, min(r.at) as first_at, max(r.at) as last_at
  from upload_pipeline.usage_records r
 group by r.user_id, r.provider, r.model, r.operation;

create view upload_pipeline.usage_by_day with (security_invoker = true) as
select (r.at at time zone 'UTC')::date as day, r.provider, r.model, r.operation, count(distinct r.document_id) as documents,
       sum(r.requests) as requests, sum(r.tokens) as tokens, sum(r.pages) as pages, sum(r.credits) as credits,
       sum(r.cached) as cached, sum(r.cost_micros) as cost_micros, count(*) - count(r.cost_micros) as unpriced
  from upload_pipeline.usage_records r
 group by 1, r.provider, r.model, r.operation;

create view upload_pipeline.usage_by_model with (security_invoker = true) as
select r.provider, r.model, r.operation, count(distinct r.user_id) as users, count(distinct r.document_id) as documents,
       sum(r.requests) as requests, sum(r.tokens) as tokens, sum(r.pages) as pages, sum(r.credits) as credits,
       sum(r.cached) as cached, sum(r.cost_micros) as cost_micros, count(*) - count(r.cost_micros) as unpriced
  from upload_pipeline.usage_records r
 group by r.provider, r.model, r.operation;

-- sql/schema/04_queue.sql

-- The queue: jobs come into it, and a lane for each user in a pool says who has jobs ready. Its verbs stand here and in
-- 04_queue_claims (leases), 04_queue_advance (steps), 04_queue_failures (waits and retries) and 04_queue_control (what
-- an operator does). Each file tells of its verbs what they lock, in this order, and what they return where the lease is
-- lost:
--
--   verb             locks                                        a stale token
--   enqueue_jobs     inserts jobs, then lanes in user order       -
--   set_lane_cap     one lane                                     -
--
-- A verb that waits for a lane holds jobs; a verb that holds lanes never waits for a job: so no cycle, no deadlock.

-- Readies the lanes of these users and wakes the pool's workers if one of them turned from empty to ready.
-- Every lane is locked, written or not: an enqueue that is not committed yet and a claim that parks the lane as empty
-- take turns on that lock, and whoever comes second sees what the first did. That is what makes `ready` exact.
-- NOTIFY serialises commits across the whole server, so it is sent for a flip and not for each job.
create function upload_pipeline.wake_lanes(p_pool text, p_user_ids uuid[])
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  insert into upload_pipeline.lanes as l (pool, user_id, ready)
  select p_pool, s.user_id, true
    from (select distinct unnest(p_user_ids) as user_id order by 1) s
  on conflict (pool, user_id) do update set ready = true where not l.ready;
  if found then
    perform pg_notify('upload_pipeline_jobs', p_pool);
  end if;
end
$$;

-- Makes a job at the pipeline's first stage for each document, in the caller's transaction. A document that has a
-- live job of this pipeline gets that job back, `created` false; so does one that is named twice, the second time.
-- Rows come back in the order asked, one for each document, and the jobs are as old as that order says. A document that
-- is unknown, or is not that user's, breaks the foreign key and undoes the whole call.
create function upload_pipeline.enqueue_jobs(
  p_document_ids   uuid[],
  p_user_ids       uuid[],
  p_pipeline       text default 'document',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (job_id uuid, document_id uuid, created boolean)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now   timestamptz := upload_pipeline.now();
  v_first record;
  v_made  uuid[];
begin
  select s.stage, s.pool into v_first
    from upload_pipeline.stages s where s.pipeline = p_pipeline and s.position = 0;
  if not found then
    raise exception 'there is no pipeline "%"', p_pipeline
      using errcode = 'UP002', hint = 'The pipelines are the rows of upload_pipeline.stages.';
  end if;

  with asked as materialized (
    -- each job's age is drawn in the order asked ...
    select a.document_id, a.user_id, nextval('upload_pipeline.upload_jobs_seq_seq') as seq
      from unnest(p_document_ids, p_user_ids) a (document_id, user_id)
  ), made as (
    insert into upload_pipeline.upload_jobs
      (seq, document_id, user_id, pipeline, stage, pool, priority, correlation_id, run_at, created_at, updated_at)
    overriding system value
    select a.seq, a.document_id, a.user_id, p_pipeline, v_first.stage, v_first.pool, p_priority, p_correlation_id, v_now, v_now, v_now
      from asked a
     -- ... and the rows are written in id order: a row waits for another call's row of the same document, so two calls
     -- with the same documents in opposite order would wait for each other
     order by a.document_id, a.seq
    on conflict (document_id, pipeline) where state in ('queued', 'working', 'retryable') and document_id is not null do nothing
    returning job_id, document_id, user_id, stage
  ), logged as (
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, correlation_id)
    select v_now, 'job_enqueued', m.user_id, m.document_id, m.job_id, m.stage, p_correlation_id from made m
  )
  select array_agg(m.job_id) into v_made from made m;

  if v_made is not null then
    perform upload_pipeline.wake_lanes(v_first.pool, p_user_ids);
  end if;

  -- A new statement, so a new snapshot: a live job that another transaction made meanwhile is seen.
  return query
    select j.job_id, a.document_id,
           j.job_id in (select unnest(v_made)) and a.place = min(a.place) over (partition by a.document_id)
      from unnest(p_document_ids) with ordinality a (document_id, place)
     cross join lateral (
       -- one index look-up a document, whatever the planner thinks of the table; the live job, or, where it has ended
       -- since this call found it live, that one
       select u.job_id from upload_pipeline.upload_jobs u
        where u.document_id = a.document_id and u.pipeline = p_pipeline
        order by u.state in ('queued', 'working', 'retryable') desc, u.updated_at desc, u.seq desc
        limit 1) j
     order by a.place;
end
$$;

create function upload_pipeline.enqueue_job(
  p_document_id    uuid,
  p_user_id        uuid,
  p_pipeline       text default 'document',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (job_id uuid, document_id uuid, created boolean)
language sql
security definer
set search_path = ''
as $$
  select * from upload_pipeline.enqueue_jobs(array[p_document_id], array[p_user_id], p_pipeline, p_priority, p_correlation_id)
$$;

-- Sets how many jobs of a user a pool may have at work at once. A cap that is lowered lets running jobs run, and starts
-- none until there are fewer. Makes the lane where the user has had no job in that pool yet.
create function upload_pipeline.set_lane_cap(p_user_id uuid, p_pool text, p_max_in_flight integer)
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.lanes (pool, user_id, max_in_flight, ready) values (p_pool, p_user_id, p_max_in_flight, false)
  on conflict (pool, user_id) do update set max_in_flight = excluded.max_in_flight
$$;

-- sql/schema/04_queue_advance.sql

-- Jobs go on from stage to stage, by one and in groups, and are done at the final one. What the verb locks, in this order,
-- and what it returns where the lease is lost:
--
--   verb             locks                                        a stale token
--   advance_jobs     jobs in id order, then lanes in user order   that job is missing from the answer

-- Moves jobs one stage on. Arrays in parallel: a worker sends what its jobs ask for within a few milliseconds as one
-- statement. A job at whose end p_keep asks for it, and whose next stage is served by the same pool, stays leased to
-- its worker (`working`); else it is handed on to the next stage's pool (`queued`), or ended at the final stage
-- (`done`), or, where a cancel was asked for, ended there (`cancelled`).
--
-- What comes back per job is its new stage, state and lease. A job is missing from the answer when its token is stale.
-- Asking the same again, because an answer was lost on the way, answers the same again and writes nothing.
-- A stage that is not the next one raises UP004 and moves none: that is an error of the program, not of the moment.
create function upload_pipeline.advance_jobs(
  p_job_ids     uuid[],
  p_tokens      bigint[],
  p_from_stages text[],
  p_to_stages   text[],
  p_keep        boolean[],
  p_ttl         interval default '60 seconds',
  p_results     jsonb[] default null
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
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
  v_now     timestamptz := upload_pipeline.now();
  v_answers bigint;
  v_wrong   record;
begin
  return query
  with asked as materialized (
    -- in id order, so that two groups never lock the same jobs in opposite order
    select a.job_id, a.token, a.from_stage, a.to_stage, a.keep, a.results
      from unnest(p_job_ids, p_tokens, p_from_stages, p_to_stages, p_keep, p_results)
             a (job_id, token, from_stage, to_stage, keep, results)
     order by a.job_id
  ), fenced as materialized (
    select a.job_id, a.from_stage, a.to_stage, a.keep, a.results, j.pipeline, j.pool, j.cancel_requested
      from asked a
     cross join lateral (
       -- the fence: one primary-key look-up a job on every plan; joined with nothing else, so that no plan changes the
       -- order of the locks
       select u.pipeline, u.pool, u.cancel_requested from upload_pipeline.upload_jobs u
        where u.job_id = a.job_id and u.lease_token = a.token and u.lease_expires_at is not null and u.stage = a.from_stage
          for no key update) j
  ), held as materialized (
    select c.job_id, c.to_stage, c.results, t.pool, t.final,
           case when t.final then 'done'
                when c.cancel_requested then 'cancelled'
                when c.keep and t.pool = c.pool then 'working'
                else 'queued' end::upload_pipeline.job_state as next_state
      from fenced c
      join upload_pipeline.stages f on f.pipeline = c.pipeline and f.stage = c.from_stage
      join upload_pipeline.stages t on t.pipeline = c.pipeline and t.stage = c.to_stage and t.position = f.position + 1
  ), moved as (
    update upload_pipeline.upload_jobs j
       set stage = h.to_stage,
           state = h.next_state,
           pool = case when h.final then j.pool else h.pool end,
           retry_count = 0,
           worker_id = case when h.next_state = 'working' then j.worker_id end,
           lease_expires_at = case when h.next_state = 'working' then v_now + p_ttl end,
           updated_at = v_now,
           finished_at = case when h.next_state in ('done', 'cancelled') then v_now end
      from held h
     where j.job_id = h.job_id
    returning j.job_id, j.user_id, j.document_id, j.pool, j.stage, j.state, j.lease_token, j.lease_expires_at,
              j.correlation_id, h.results
  ), logged as (
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id)
    select v_now,
           case m.state when 'working' then 'job_advanced' when 'queued' then 'job_handed_on'
                        when 'done' then 'job_done' else 'job_cancelled' end::upload_pipeline.event_code,
           m.user_id, m.document_id, m.job_id, m.stage, m.lease_token, m.correlation_id
      from moved m
  ), kept as (
    insert into upload_pipeline.job_outcomes as o (job_id, user_id, results, updated_at)
    select m.job_id, m.user_id,
           case when m.state = 'cancelled' then m.results || upload_pipeline.job_cost(m.job_id) else m.results end, v_now
      from moved m where m.results is not null
    on conflict (job_id) do update
      set results = excluded.results, error_code = null, error_message = null, error_details = null, updated_at = v_now
  ), woken as (
    select upload_pipeline.wake_lanes(h.pool, h.user_ids)
      from (select m.pool, array_agg(m.user_id) as user_ids from moved m where m.state = 'queued' group by m.pool
             order by m.pool) h
  ), costs as (
    -- what is done says its cost by its results; an outcome is written by `kept` or here, and not twice
    select upload_pipeline.keep_costs(array_agg(m.job_id))
      from moved m where m.state = 'cancelled' and m.results is null having count(*) > 0
  )
  -- `woken` and `costs` are named here so that they run: a CTE that only reads runs only where it is asked for
  select m.job_id, m.stage, m.state, m.lease_expires_at
    from moved m cross join (select count(*) from woken) w cross join (select count(*) from costs) c
  union all
  -- The token is still the caller's and the stage is the one asked for: moved by the same call before.
  select j.job_id, j.stage, j.state, j.lease_expires_at
    from asked a
   cross join lateral (
     select u.* from upload_pipeline.upload_jobs u
      where u.job_id = a.job_id and u.lease_token = a.token and u.stage = a.to_stage) j
   where a.job_id not in (select f.job_id from fenced f);
  get diagnostics v_answers = row_count;
  if v_answers = cardinality(p_job_ids) then
    return;
  end if;

  -- The rest is lost, or its caller has a bug: it holds the job, but names a stage that does not follow.
  select j.stage, a.job_id, a.from_stage, a.to_stage into v_wrong
    from unnest(p_job_ids, p_tokens, p_from_stages, p_to_stages) a (job_id, token, from_stage, to_stage)
   cross join lateral (
     select u.stage from upload_pipeline.upload_jobs u
      where u.job_id = a.job_id and u.lease_token = a.token and u.lease_expires_at is not null and u.stage <> a.to_stage
      limit 1) j
   limit 1;
  if found then
    raise exception 'job % is at stage "%" and cannot go from "%" to "%"',
        v_wrong.job_id, v_wrong.stage, v_wrong.from_stage, v_wrong.to_stage
      using errcode = 'UP004', hint = 'Only the next stage of upload_pipeline.stages is accepted.';
  end if;
end
$$;

-- advance_jobs for one job: its new stage, state and lease, or UP001.
create function upload_pipeline.advance_job(
  p_job_id     uuid,
  p_token      bigint,
  p_from_stage text,
  p_to_stage   text,
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds',
  p_results    jsonb default null
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
begin
  return query
    select * from upload_pipeline.advance_jobs(
      array[p_job_id], array[p_token], array[p_from_stage], array[p_to_stage], array[p_keep], p_ttl, array[p_results]);
  if not found then
    raise exception 'the lease on job % with token % is lost', p_job_id, p_token
      using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
  end if;
end
$$;

-- sql/schema/04_queue_claims.sql

-- Leases on jobs: given, renewed, checked, handed back. What each verb locks, in this order, and what it returns where
-- the lease is lost:
--
--   verb             locks                                        a stale token
--   claim_jobs       lanes, then jobs, both SKIP LOCKED           -
--   renew_leases     jobs in id order                             that job is missing from the answer
--   check_lease      one job                                      raises UP001: undoes the caller's transaction
--   check_step       one job                                      raises UP001: undoes the caller's transaction
--   record_fenced_write  one job                                  is what it notes
--   release_jobs     jobs in id order, then lanes in user order   that job is missing from the answer
--
-- The fence. `lease_token` only grows: a claim and a restart raise it. Whoever writes for a job names the token it was
-- given, and the write happens only where the row still has that token and is `working`. So at most one claimant of a
-- job can ever write, however late, however often, and whatever it believes of the time. A fence reads `working` as
-- "has a lease", which a constraint makes the same thing: told the state, the planner may look the job up in the partial
-- index of working jobs and read all of them; told the lease, it has only the primary key.

-- Leases up to p_limit ready jobs of a pool to a worker for p_ttl.
--
-- Fair: lanes are taken in user order behind p_after_user (the worker keeps the last one it was given as its cursor)
-- and from the start again at the end; while there are lanes enough each gives one job, and only when there are fewer
-- does a lane give more. Within a lane: highest priority first, then oldest.
--
-- Exact: a lane never has more than max_in_flight jobs working. That takes three statements, that is, three
-- snapshots: the count that decides must be taken after the lane's lock was won, or two claims at once both count
-- the state before either.
--   1. lock ready lanes that look open, skipping those that another claim holds
--   2. count again under the lock, take the heads, write the leases
--   3. park the lanes that are now empty
-- Where all of them were empty before, since their jobs were cancelled or deleted, the next ones are looked at at once, a
-- bounded number of times: else the jobs behind them would wait for as many looks of an idle worker.
--
-- Flat: rows read are bounded by p_limit and by the jobs at work, not by anybody's backlog or history. The planner is
-- left no way to decide otherwise on stale statistics: the only plans are the partial indexes, read in order.
create function upload_pipeline.claim_jobs(
  p_worker_id  uuid,
  p_pool       text,
  p_limit      integer,
  p_after_user uuid default null,
  p_ttl        interval default '60 seconds'
)
returns table (
  job_id           uuid,
  subject_id       uuid,
  user_id          uuid,
  pipeline         text,
  stage            text,
  retry_count      smallint,
  lease_token      bigint,
  lease_expires_at timestamptz,
  correlation_id   text
)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_rounds  constant integer := 20;
  v_now     timestamptz := upload_pipeline.now();
  v_after   uuid := coalesce(p_after_user, '00000000-0000-0000-0000-000000000000');
  v_users   uuid[];
  v_more    uuid[];
  v_claimed integer;
  v_parked  integer;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'claim_jobs needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'The cap is exact only where each statement has a snapshot of its own.';
  end if;
  if p_limit is null or p_limit < 1 then
    raise exception 'p_limit is %, it must be at least 1', p_limit using errcode = '22023';
  end if;

  for v_round in 1..v_rounds loop
    select array_agg(s.user_id) into v_users from (
      select l.user_id from upload_pipeline.lanes l
       where l.pool = p_pool and l.ready and l.user_id > v_after
         and l.max_in_flight > (select count(*) from upload_pipeline.upload_jobs w
                                 where w.pool = l.pool and w.user_id = l.user_id and w.state = 'working')
       order by l.pool, l.user_id limit p_limit
         for no key update of l skip locked) s;
    if p_after_user is not null and coalesce(cardinality(v_users), 0) < p_limit then
      select array_agg(s.user_id) into v_more from (
        select l.user_id from upload_pipeline.lanes l
         where l.pool = p_pool and l.ready and l.user_id <= v_after
           and l.max_in_flight > (select count(*) from upload_pipeline.upload_jobs w
                                   where w.pool = l.pool and w.user_id = l.user_id and w.state = 'working')
         order by l.pool, l.user_id limit p_limit - coalesce(cardinality(v_users), 0)
           for no key update of l skip locked) s;
      v_users := v_users || v_more;
    end if;
    exit when v_users is null;

    return query
    with open as materialized (
      select l.user_id, u.turn, l.max_in_flight - w.working as slots
        from unnest(v_users) with ordinality u (user_id, turn)
        join upload_pipeline.lanes l on l.pool = p_pool and l.user_id = u.user_id
       cross join lateral (
         select count(*)::integer as working from upload_pipeline.upload_jobs j
          where j.pool = p_pool and j.user_id = l.user_id and j.state = 'working') w
       where l.max_in_flight > w.working
    ), head as materialized (
      select h.job_id, o.turn, row_number() over () as place
        from open o
       cross join lateral (
         select j.job_id from upload_pipeline.upload_jobs j
          where j.pool = p_pool and j.user_id = o.user_id and j.state = 'queued'
          order by j.pool, j.user_id, j.priority desc, j.seq
          -- an equal share of p_limit; the first lanes of the turn take the remainder
          limit least(o.slots, p_limit / cardinality(v_users) + (o.turn <= p_limit % cardinality(v_users))::integer)
            for update skip locked) h
    ), taken as (
      update upload_pipeline.upload_jobs j
         set state = 'working', lease_token = j.lease_token + 1, worker_id = p_worker_id,
             lease_expires_at = v_now + p_ttl, started_at = coalesce(j.started_at, v_now),
             -- only of a woken job at work (wake_job) is `run_at` later than this
             updated_at = greatest(v_now, j.run_at)
        from head h
       where j.job_id = h.job_id
      returning j.job_id, j.document_id, j.photo_id, j.user_id, j.pipeline, j.stage, j.retry_count, j.lease_token,
                j.lease_expires_at, j.correlation_id, h.turn, h.place
    ), logged as (
      insert into upload_pipeline.events
        (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id)
      select v_now, 'job_claimed', 'debug', t.user_id, t.document_id, t.job_id, p_worker_id, t.stage, t.lease_token,
             t.correlation_id
        from taken t
    )
    -- in the turn's order, whatever plan the update had: the last row's user is the worker's next cursor
    select t.job_id, coalesce(t.document_id, t.photo_id), t.user_id, t.pipeline, t.stage, t.retry_count, t.lease_token,
           t.lease_expires_at, t.correlation_id
      from taken t
     order by t.turn, t.place;
    get diagnostics v_claimed = row_count;

    update upload_pipeline.lanes l set ready = false
     where l.pool = p_pool and l.user_id = any (v_users)
       and not exists (select from upload_pipeline.upload_jobs j
                        where j.pool = p_pool and j.user_id = l.user_id and j.state = 'queued');
    get diagnostics v_parked = row_count;
    exit when v_claimed > 0 or v_parked = 0;
  end loop;
end
$$;

-- One statement a beat for all that a worker holds, and its sign of life. A job that does not come back is lost; one
-- that comes back flagged is to be cancelled: stop the step and give it back by release_jobs.
create function upload_pipeline.renew_leases(
  p_worker_id uuid,
  p_job_ids   uuid[],
  p_tokens    bigint[],
  p_ttl       interval default '60 seconds'
)
returns table (job_id uuid, cancel_requested boolean)
language sql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  update upload_pipeline.workers w set last_beat_at = upload_pipeline.now() where w.worker_id = p_worker_id;

  with asked as materialized (
    select a.job_id, a.token from unnest(p_job_ids, p_tokens) a (job_id, token) order by a.job_id
  ), held as materialized (
    select a.job_id from asked a
     cross join lateral (
       select from upload_pipeline.upload_jobs u
        where u.job_id = a.job_id and u.lease_token = a.token and u.lease_expires_at is not null
          for no key update) j
  )
  update upload_pipeline.upload_jobs j
     set lease_expires_at = upload_pipeline.now() + p_ttl
    from held h
   where j.job_id = h.job_id
  returning j.job_id, j.cancel_requested
$$;

-- The fence: the first statement of each transaction that writes results. Locks the job's row until the end of that
-- transaction and returns it, or raises UP001 and so undoes the transaction.
create function upload_pipeline.check_lease(p_job_id uuid, p_token bigint)
returns upload_pipeline.upload_jobs
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j
   where j.job_id = p_job_id and j.lease_token = p_token and j.lease_expires_at is not null
     for no key update;
  if not found then
    raise exception 'the lease on job % with token % is lost', p_job_id, p_token
      using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
  end if;
  return v_job;
end
$$;

-- The fence of a verb that moves a job to p_to_stage. Asked again because the answer was lost on the way, the job stands
-- there already, under this very token and perhaps with its lease handed on: then the row comes back as it is, the verb
-- answers by it as it did before, and writes nothing.
create function upload_pipeline.check_step(p_job_id uuid, p_token bigint, p_to_stage text)
returns upload_pipeline.upload_jobs
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j
   where j.job_id = p_job_id and j.lease_token = p_token
     for no key update;
  if v_job.stage = p_to_stage or v_job.lease_expires_at is not null then
    return v_job;
  end if;
  raise exception 'the lease on job % with token % is lost', p_job_id, p_token
    using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
end
$$;

-- Notes that the fence has refused a write under p_token, so that an operator sees it: the writer had lost its lease and
-- found out late. Locks the job as whatever writes an event of it does, so that its history stays in order.
create function upload_pipeline.record_fenced_write(p_job_id uuid, p_token bigint, p_worker_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (upload_pipeline.now(), 'write_fenced', 'warning', v_job.user_id, v_job.document_id, p_job_id, p_worker_id, v_job.stage,
          p_token, coalesce(v_job.correlation_id, ''), jsonb_build_object('current_token', v_job.lease_token));
end
$$;

-- A stopping worker hands back all that it holds, retry counts untouched; a job whose cancel was asked for ends here.
-- Returns what was handed back; a stale token's job is missing.
create function upload_pipeline.release_jobs(p_job_ids uuid[], p_tokens bigint[])
returns table (job_id uuid, state upload_pipeline.job_state)
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
  v_now   timestamptz := upload_pipeline.now();
  v_back  uuid[];
  v_ended uuid[];
  v_lanes record;
begin
  with held as materialized (
    select j.job_id, j.worker_id from upload_pipeline.upload_jobs j
      join unnest(p_job_ids, p_tokens) a (job_id, token) on a.job_id = j.job_id and a.token = j.lease_token
     where j.lease_expires_at is not null
     order by j.job_id for no key update of j
  ), back as (
    update upload_pipeline.upload_jobs j
       set state = case when j.cancel_requested then 'cancelled' else 'queued' end::upload_pipeline.job_state,
           finished_at = case when j.cancel_requested then v_now end,
           worker_id = null, lease_expires_at = null, updated_at = v_now
      from held h
     where j.job_id = h.job_id
    returning j.*, h.worker_id as holder
  ), logged as (
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id)
    select v_now, case when b.state = 'cancelled' then 'job_cancelled' else 'job_released' end::upload_pipeline.event_code,
           b.user_id, b.document_id, b.job_id, b.holder, b.stage, b.lease_token, b.correlation_id
      from back b
  )
  select array_agg(b.job_id), array_agg(b.job_id) filter (where b.state = 'cancelled') into v_back, v_ended from back b;
  if v_ended is not null then
    perform upload_pipeline.keep_costs(v_ended);
  end if;

  for v_lanes in
    select j.pool, array_agg(j.user_id) as user_ids from upload_pipeline.upload_jobs j
     where j.job_id = any (v_back) and j.state = 'queued' group by j.pool order by j.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, v_lanes.user_ids);
  end loop;

  return query select j.job_id, j.state from upload_pipeline.upload_jobs j where j.job_id = any (v_back);
end
$$;

-- sql/schema/04_queue_control.sql

-- What an operator, or a job's owner, does to it: start it again, stop it. What each verb locks, in this order, and what
-- it does to a holder's token:
--
--   verb             locks                                        a stale token
--   retry_job        one job, then its lane                       raises the token: fences the holder off
--   cancel_job       one job                                      -

-- Starts an ended job again, at p_from_stage or where it stopped. Of `deadletter` and `cancelled`; of `done` only with
-- a stage. With p_force also of a live job: the token is raised, so that a worker still busy with it is fenced off.
-- What it makes anew is dropped from the buffers (prepare_restart); vectors of chunks that do not change are kept. What
-- follows is told under `p_correlation_id` where that is given.
create function upload_pipeline.retry_job(
  p_job_id         uuid,
  p_from_stage     text default null,
  p_force          boolean default false,
  p_correlation_id text default null
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     upload_pipeline.upload_jobs;
  v_at      upload_pipeline.stages;
  v_target  upload_pipeline.stages;
  v_subject text;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  if not found then
    raise exception 'there is no job %', p_job_id using errcode = 'UP002', hint = 'List the jobs to find its id.';
  end if;
  if not p_force and not (v_job.state in ('deadletter', 'cancelled') or (v_job.state = 'done' and p_from_stage is not null)) then
    raise exception 'job % is %', p_job_id, v_job.state
      using errcode = 'UP003',
            hint = case v_job.state when 'done' then 'A job that is done starts again only from a stage that you name.'
                                    else 'Wait for it to end, or cancel it first.' end;
  end if;
  select s.* into v_at from upload_pipeline.stages s where s.pipeline = v_job.pipeline and s.stage = v_job.stage;
  select s.* into v_target from upload_pipeline.stages s
   where s.pipeline = v_job.pipeline and s.stage = coalesce(p_from_stage, v_job.stage);
  if not found or v_target.final or v_target.position > v_at.position then
    raise exception 'job % at stage "%" cannot start again at "%"', p_job_id, v_job.stage, coalesce(p_from_stage, v_job.stage)
      using errcode = 'UP004',
            hint = format('Stages that it can start at: %s.', (
              select string_agg(s.stage, ', ' order by s.position) from upload_pipeline.stages s
               where s.pipeline = v_job.pipeline and s.position <= v_at.position and not s.final));
  end if;
  v_subject := coalesce('document ' || v_job.document_id, 'photo ' || v_job.photo_id);
  -- a photo has one job, ever
  if exists (select from upload_pipeline.upload_jobs o
              where o.document_id = v_job.document_id and o.pipeline = v_job.pipeline and o.job_id <> p_job_id
                and o.state in ('queued', 'working', 'retryable')) then
    raise exception '% has another job under way', v_subject
      using errcode = 'UP003', hint = 'Wait for that job to end, or cancel it first.';
  end if;
  if exists (select from upload_pipeline.documents d
              where d.document_id = v_job.document_id and d.deleted_at is not null)
     or exists (select from upload_pipeline.photos p
                 where p.photo_id = v_job.photo_id and p.deleted_at is not null) then
    raise exception '% is being deleted', v_subject
      using errcode = 'UP003', hint = 'Send the file again once it is gone.';
  end if;
  perform upload_pipeline.prepare_restart(v_job.pipeline, v_job.document_id, v_target.stage);

  begin
    update upload_pipeline.upload_jobs j
       set stage = v_target.stage, pool = v_target.pool, state = 'queued', retry_count = 0, cancel_requested = false,
           lease_token = j.lease_token + 1, worker_id = null, lease_expires_at = null, run_at = v_now, updated_at = v_now,
           finished_at = null, correlation_id = coalesce(p_correlation_id, j.correlation_id)
     where j.job_id = p_job_id;
  exception when unique_violation then
    -- one was enqueued or started again since the look above
    raise exception '% has another job under way', v_subject
      using errcode = 'UP003', hint = 'Wait for that job to end, or cancel it first.';
  end;
  delete from upload_pipeline.job_outcomes o where o.job_id = p_job_id;
  insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'job_restarted', v_job.user_id, v_job.document_id, p_job_id, v_target.stage, v_job.lease_token + 1,
          coalesce(p_correlation_id, v_job.correlation_id), jsonb_build_object('from_state', v_job.state, 'from_stage', v_job.stage));
  perform upload_pipeline.wake_lanes(v_target.pool, array[v_job.user_id]);
  return query select p_job_id, v_target.stage, 'queued'::upload_pipeline.job_state;
end
$$;

-- Stops a job: at once where nobody works on it; a working one at its next step boundary or heartbeat. Of an ended
-- job: nothing changes, and its state comes back.
create function upload_pipeline.cancel_job(p_job_id uuid, p_correlation_id text default null)
returns table (job_id uuid, state upload_pipeline.job_state, cancel_requested boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  if not found then
    raise exception 'there is no job %', p_job_id using errcode = 'UP002', hint = 'List the jobs to find its id.';
  end if;
  if v_job.state in ('queued', 'retryable', 'working') and not v_job.cancel_requested then
    update upload_pipeline.upload_jobs j
       set cancel_requested = true, updated_at = v_now, correlation_id = coalesce(p_correlation_id, j.correlation_id),
           state = case when j.state = 'working' then j.state else 'cancelled' end,
           finished_at = case when j.state = 'working' then null else v_now end
     where j.job_id = p_job_id
    returning j.* into v_job;
    if v_job.state = 'cancelled' then
      perform upload_pipeline.keep_costs(array[p_job_id]);
    end if;
    insert into upload_pipeline.events (at, code, user_id, document_id, job_id, stage, lease_token, correlation_id)
    values (v_now, case when v_job.state = 'working' then 'job_cancel_requested' else 'job_cancelled' end::upload_pipeline.event_code,
            v_job.user_id, v_job.document_id, p_job_id, v_job.stage, v_job.lease_token, v_job.correlation_id);
  end if;
  return query select v_job.job_id, v_job.state, v_job.cancel_requested;
end
$$;

-- sql/schema/04_queue_failures.sql

-- Jobs that do not go on: they fail, wait, are tried again when that is due or what they wait for has come, and end as
-- dead letters. What each verb locks, in this order, and what it returns where the lease is lost:
--
--   verb             locks                                        a stale token
--   snooze_job       one job                                      raises UP001
--   fail_job         one job                                      raises UP001
--   promote_due      jobs SKIP LOCKED, then lanes in user order   -
--   reap_expired     jobs SKIP LOCKED                             -
--   wake_job         one job, then its lane                       -

-- Gives a job back until later without counting a retry: a remote parse still runs, a file is not there yet. One that was
-- woken while it was at work is due at once.
create function upload_pipeline.snooze_job(p_job_id uuid, p_token bigint, p_delay interval)
returns timestamptz
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_lease(p_job_id, p_token);
  v_at  timestamptz;
begin
  if v_job.cancel_requested then
    perform upload_pipeline.release_jobs(array[p_job_id], array[p_token]);
    return null;
  end if;
  v_at := v_now + case when v_job.run_at > v_job.updated_at then interval '0' else p_delay end;
  update upload_pipeline.upload_jobs j
     set state = 'retryable', run_at = v_at, worker_id = null, lease_expires_at = null, updated_at = v_now
   where j.job_id = p_job_id;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'job_snoozed', 'debug', v_job.user_id, v_job.document_id, v_job.job_id, v_job.worker_id, v_job.stage,
          p_token, v_job.correlation_id, jsonb_build_object('run_at', v_at));
  return v_at;
end
$$;

-- How long to wait before try p_retry + 1: 3 s x 2^p_retry, less or more by up to a tenth, so 3, 6, 12 s.
-- p_jitter in [0, 1) is drawn where it is not given. An operator may set `upload_pipeline.backoff_base` for a role.
create function upload_pipeline.retry_delay(p_retry integer, p_jitter double precision default null)
returns interval
language sql
volatile
set search_path = ''
as $$
  select coalesce(nullif(current_setting('upload_pipeline.backoff_base', true), '')::interval, interval '3 seconds')
         * power(2, p_retry) * (0.9 + 0.2 * coalesce(p_jitter, random()))
$$;

-- How many times a stage of a job is tried again before the job is a dead letter.
create function upload_pipeline.max_retries()
returns integer
language sql
immutable
set search_path = ''
as $$ select 3 $$;

-- A step failed. `retryable` with back-off up to the third retry; `deadletter` at the failure after that, or at once
-- where the error says that a retry is no use. Returns the new state and, for a retry, when. A lease fails once, so the
-- same failure told again under its token, because the answer was lost on the way, is answered from the event of the
-- first time and writes nothing.
-- A job that was woken while it was at work is due at once where it is tried again. At the first stage it waits for bytes,
-- and what woke it has outdated what it failed at: nothing is counted, no error kept. At any other a wake-up is a hint: it
-- undoes no failure, and each retry counts, or hints that come again and again would keep a job alive for ever.
create function upload_pipeline.fail_job(
  p_job_id        uuid,
  p_token         bigint,
  p_error_code    text,
  p_error_message text,
  p_retryable     boolean,
  p_error_details jsonb default null,
  p_jitter        double precision default null
)
returns table (state upload_pipeline.job_state, retry_count smallint, run_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now      timestamptz := upload_pipeline.now();
  v_job      upload_pipeline.upload_jobs;
  v_woken    boolean;
  v_outdated boolean;
  v_state    upload_pipeline.job_state;
  v_retry    smallint;
  v_at       timestamptz;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j
   where j.job_id = p_job_id and j.lease_token = p_token and j.lease_expires_at is not null
     for no key update;
  if not found then
    return query
      select (e.payload ->> 'state')::upload_pipeline.job_state, (e.payload ->> 'next_retry_count')::smallint,
             (e.payload ->> 'run_at')::timestamptz
        from upload_pipeline.events e
       where e.job_id = p_job_id and e.lease_token = p_token
         and e.code in ('job_failed', 'job_deadlettered', 'job_cancelled') and e.payload ->> 'error_code' = p_error_code
         -- a failure that fail_job wrote, and not the end of a lease that ran out
         and e.payload ? 'next_retry_count'
       order by e.event_id desc limit 1;
    if not found then
      raise exception 'the lease on job % with token % is lost', p_job_id, p_token
        using errcode = 'UP001', hint = 'Another worker or an operator has the job. Stop, and write nothing.';
    end if;
    return;
  end if;
  v_woken := v_job.run_at > v_job.updated_at and not v_job.cancel_requested;
  v_outdated := v_woken and (select s.position = 0 from upload_pipeline.stages s
                              where s.pipeline = v_job.pipeline and s.stage = v_job.stage);
  v_state := case
    when v_job.cancel_requested then 'cancelled'
    when v_outdated then 'retryable'
    when p_retryable and v_job.retry_count < upload_pipeline.max_retries() then 'retryable'
    else 'deadletter' end;
  v_retry := v_job.retry_count + (v_state = 'retryable' and not v_outdated)::integer;
  if v_state = 'retryable' then
    v_at := v_now + case when v_woken then interval '0' else upload_pipeline.retry_delay(v_job.retry_count, p_jitter) end;
  end if;
  if not v_outdated then
    -- a job that ends here tells what it has used all the same
    insert into upload_pipeline.job_outcomes as o
      (job_id, user_id, results, error_code, error_message, error_details, updated_at)
    values (p_job_id, v_job.user_id,
            case when v_state <> 'retryable' then nullif(upload_pipeline.job_cost(p_job_id), '{}'::jsonb) end,
            p_error_code, left(p_error_message, 4000), p_error_details, v_now)
    on conflict (job_id) do update
      set results = excluded.results, error_code = excluded.error_code, error_message = excluded.error_message,
          error_details = excluded.error_details, updated_at = v_now;
  end if;
  insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
  values (v_now,
          case v_state when 'retryable' then 'job_failed' when 'deadletter' then 'job_deadlettered' else 'job_cancelled' end::upload_pipeline.event_code,
          case v_state when 'deadletter' then 'error' else 'warning' end::upload_pipeline.event_severity,
          v_job.user_id, v_job.document_id, v_job.job_id, v_job.worker_id, v_job.stage, p_token, v_job.correlation_id,
          jsonb_build_object('error_code', p_error_code, 'error_message', left(p_error_message, 4000),
                             'retry_count', v_job.retry_count, 'retryable', p_retryable,
                             'state', v_state, 'next_retry_count', v_retry, 'run_at', v_at));
  return query
    update upload_pipeline.upload_jobs j
       set state = v_state, retry_count = v_retry, run_at = coalesce(v_at, j.run_at),
           worker_id = null, lease_expires_at = null, updated_at = v_now,
           finished_at = case when v_state <> 'retryable' then v_now end
     where j.job_id = p_job_id
    returning j.state, j.retry_count, v_at;
end
$$;

-- Makes due retries and snoozes ready. Any worker runs it, bounded, beside others: there is no leader.
create function upload_pipeline.promote_due(p_limit integer default 100)
returns integer
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_lanes record;
  v_count integer := 0;
begin
  for v_lanes in
    with due as materialized (
      select j.job_id from upload_pipeline.upload_jobs j
       where j.state = 'retryable' and j.run_at <= v_now
       order by j.run_at limit p_limit for update skip locked
    ), ready as (
      update upload_pipeline.upload_jobs j set state = 'queued', updated_at = v_now
        from due where j.job_id = due.job_id
      returning j.*
    ), logged as (
      insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, stage, lease_token, correlation_id)
      select v_now, 'job_promoted', 'debug', r.user_id, r.document_id, r.job_id, r.stage, r.lease_token, r.correlation_id
        from ready r
    )
    select r.pool, array_agg(r.user_id) as user_ids, count(*) as n from ready r group by r.pool order by r.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, v_lanes.user_ids);
    v_count := v_count + v_lanes.n;
  end loop;
  return v_count;
end
$$;

-- Takes back jobs whose lease ran out, counting one attempt, so that a file that kills its worker ends in the dead
-- letters. A lease renewed between the scan and the lock is left alone: the lock rereads the row. Any worker runs it.
create function upload_pipeline.reap_expired(p_limit integer default 100)
returns integer
language sql
security definer
set search_path = ''
as $$
  with dead as materialized (
    select j.job_id, j.worker_id from upload_pipeline.upload_jobs j
     where j.state = 'working' and j.lease_expires_at < upload_pipeline.now()
     limit p_limit for update skip locked
  ), reaped as (
    update upload_pipeline.upload_jobs j
       set state = case when j.cancel_requested then 'cancelled'
                        when j.retry_count < upload_pipeline.max_retries() then 'retryable'
                        else 'deadletter' end::upload_pipeline.job_state,
           retry_count = case when not j.cancel_requested and j.retry_count < upload_pipeline.max_retries()
                              then j.retry_count + 1 else j.retry_count end,
           run_at = upload_pipeline.now() + upload_pipeline.retry_delay(j.retry_count),
           finished_at = case when j.cancel_requested or j.retry_count >= upload_pipeline.max_retries()
                              then upload_pipeline.now() end,
           worker_id = null, lease_expires_at = null, updated_at = upload_pipeline.now()
      from dead where j.job_id = dead.job_id
    returning j.*, dead.worker_id as holder
  ), outcome as (
    insert into upload_pipeline.job_outcomes as o (job_id, user_id, results, error_code, error_message, updated_at)
    select r.job_id, r.user_id,
           case when r.state = 'deadletter' then nullif(upload_pipeline.job_cost(r.job_id), '{}'::jsonb) end, 'WORKER_LOST',
           format('The worker stopped renewing its lease at stage "%s": it was killed, it hung, or it lost the database.', r.stage),
           upload_pipeline.now()
      from reaped r where r.state <> 'cancelled'
    on conflict (job_id) do update
      set results = excluded.results, error_code = excluded.error_code, error_message = excluded.error_message, error_details = null,
          updated_at = excluded.updated_at
  ), logged as (
    insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, worker_id, stage, lease_token, correlation_id, payload)
    select upload_pipeline.now(),
           case r.state when 'retryable' then 'job_reaped' when 'deadletter' then 'job_deadlettered' else 'job_cancelled' end::upload_pipeline.event_code,
           case r.state when 'deadletter' then 'error' else 'warning' end::upload_pipeline.event_severity,
           r.user_id, r.document_id, r.job_id, r.holder, r.stage, r.lease_token, r.correlation_id,
           jsonb_build_object('error_code', 'WORKER_LOST', 'retry_count', r.retry_count)
      from reaped r
  ), costs as (
    select upload_pipeline.keep_costs(array_agg(r.job_id)) from reaped r where r.state = 'cancelled' having count(*) > 0
  )
  -- `costs` is named here so that it runs
  select count(*)::integer from reaped cross join (select count(*) from costs) c
$$;

-- What a job waits for has come, or is said to have come: one that waits for its next try is ready now; one at work is due
-- at once should its step end in a snooze or a failure that is tried again, since what the step saw may be outdated by then
-- (fail_job says what a failure counts). Any other is left as it is. While a woken job is at work its `run_at` is later than its `updated_at`; its next transition ends that.
create function upload_pipeline.wake_job(p_job_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
  v_job upload_pipeline.upload_jobs;
begin
  update upload_pipeline.upload_jobs j
     set run_at = greatest(v_now, j.updated_at + interval '1 microsecond')
   where j.job_id = p_job_id and j.state = 'working';
  update upload_pipeline.upload_jobs j set state = 'queued', run_at = least(j.run_at, v_now), updated_at = v_now
   where j.job_id = p_job_id and j.state = 'retryable'
  returning j.* into v_job;
  if found then
    insert into upload_pipeline.events (at, code, severity, user_id, document_id, job_id, stage, lease_token, correlation_id)
    values (v_now, 'job_promoted', 'debug', v_job.user_id, v_job.document_id, v_job.job_id, v_job.stage, v_job.lease_token,
            v_job.correlation_id);
    perform upload_pipeline.wake_lanes(v_job.pool, array[v_job.user_id]);
  end if;
end
$$;

-- sql/schema/04_workers.sql

-- The register of workers: who works, where, on which pools and on how many jobs at once. No verb of the queue reads it:
-- what a worker holds, the leases say.

-- A worker's entry in the register, and its end. renew_leases keeps it fresh.
create function upload_pipeline.register_worker(
  p_worker_id uuid, p_host text, p_pid integer, p_version text, p_pools text[], p_concurrency integer
)
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.workers as w (worker_id, host, pid, version, pools, concurrency, started_at, last_beat_at)
  values (p_worker_id, p_host, p_pid, p_version, p_pools, p_concurrency, upload_pipeline.now(), upload_pipeline.now())
  on conflict (worker_id) do update set last_beat_at = excluded.last_beat_at;
  select upload_pipeline.record_event('worker_started', p_worker_id => p_worker_id,
    p_payload => jsonb_build_object('host', p_host, 'pid', p_pid, 'pools', p_pools));
$$;

create function upload_pipeline.unregister_worker(p_worker_id uuid)
returns void
language sql
security definer
set search_path = ''
as $$
  delete from upload_pipeline.workers w where w.worker_id = p_worker_id;
  select upload_pipeline.record_event('worker_stopped', p_worker_id => p_worker_id);
$$;

-- Says which of its pools a worker leaves to others for now, since it lacks what their jobs need: all that it leaves, in
-- order; none where it serves all again. Each change is an event, an error where nobody heard of lately serves such a pool.
create function upload_pipeline.leave_pools(p_worker_id uuid, p_left_pools text[])
returns void
language sql
security definer
set search_path = ''
as $$
  -- of two that leave at the same moment, the second sees that nobody is left
  select pg_advisory_xact_lock(hashtextextended('upload_pipeline.leave_pools', 0));
  with changed as (
    update upload_pipeline.workers w set left_pools = p_left_pools
     where w.worker_id = p_worker_id and w.left_pools <> p_left_pools
    returning 1
  ), unserved as (
    select a.pool from unnest(p_left_pools) a (pool)
     where not exists (select from upload_pipeline.workers o
                        where o.worker_id <> p_worker_id and a.pool = any (o.pools) and a.pool <> all (o.left_pools)
                          and o.last_beat_at > upload_pipeline.now() - interval '2 minutes')
  )
  select upload_pipeline.record_event('worker_left_pools',
           case when exists (select from unserved) then 'error' when p_left_pools = '{}' then 'info'
                else 'warning' end::upload_pipeline.event_severity,
           p_worker_id => p_worker_id,
           p_payload => jsonb_build_object('left_pools', p_left_pools, 'served_by_nobody', array(select pool from unserved)))
    from changed;
$$;

-- Removes the entries of workers that have been silent for p_silence and hold nothing. Returns how many.
create function upload_pipeline.forget_lost_workers(p_silence interval default '10 minutes')
returns integer
language sql
security definer
set search_path = ''
as $$
  with gone as (
    delete from upload_pipeline.workers w
     where w.last_beat_at < upload_pipeline.now() - p_silence
       and not exists (select from upload_pipeline.upload_jobs j where j.state = 'working' and j.worker_id = w.worker_id)
    returning 1
  )
  select count(*)::integer from gone
$$;

-- sql/schema/05_document_chunks.sql

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

-- sql/schema/05_document_deletion.sql

-- Documents are deleted: hidden at once, gone when their objects are.

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

-- sql/schema/05_document_vectors.sql

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

-- sql/schema/05_documents.sql

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

-- sql/schema/05_embedding_cache.sql

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

-- sql/schema/05_models.sql

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

-- sql/schema/05_organizations.sql

-- Organisations, who is in them, and their projects. What belongs to a project is its organisation's: every member sees
-- it, and nobody else learns that it is there.
--
--   role      may
--   owner     all that an admin may
--   admin     upload, say that a file has come, delete what anybody has uploaded
--   member    upload, say that a file has come, delete what they have uploaded themselves
--   viewer    look
--
-- Members, roles and projects are set by who runs the service (`upload-pipeline organizations`, `projects`).

create table upload_pipeline.organizations (
  organization_id uuid primary key default gen_random_uuid(),
  name            text not null unique,
  created_at      timestamptz not null default upload_pipeline.now(),
  constraint organizations_name check (name <> '' and length(name) <= 200)
);

create table upload_pipeline.organization_members (
  organization_id uuid not null references upload_pipeline.organizations on delete cascade,
  user_id         uuid not null,
  role            text not null,
  created_at      timestamptz not null default upload_pipeline.now(),
  primary key (organization_id, user_id),
  constraint organization_members_role check (role in ('owner', 'admin', 'member', 'viewer')),
  constraint organization_members_user check (user_id <> '00000000-0000-0000-0000-000000000000')
);

-- member_organizations: where a user is a member
create index organization_members_user on upload_pipeline.organization_members (user_id, organization_id);

create table upload_pipeline.projects (
  project_id      uuid primary key default gen_random_uuid(),
  organization_id uuid not null references upload_pipeline.organizations,
  name            text not null,
  -- photos of it are handed out without the place where they were taken
  drop_gps        boolean not null default false,
  created_at      timestamptz not null default upload_pipeline.now(),
  unique (organization_id, name),
  -- what the children's composite keys point at: a child can never name another organisation
  unique (project_id, organization_id),
  constraint projects_name check (name <> '' and length(name) <= 200)
);

-- The organisations of the caller, who is `auth.uid()`. What policies ask: `security definer`, since a policy of members
-- that read members would ask itself.
create function upload_pipeline.member_organizations()
returns uuid[]
language sql
stable
security definer
set search_path = ''
as $$
  select coalesce(array_agg(m.organization_id), '{}') from upload_pipeline.organization_members m where m.user_id = auth.uid()
$$;

create function upload_pipeline.add_organization(p_name text)
returns uuid
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_organization uuid;
begin
  insert into upload_pipeline.organizations (name, created_at) values (p_name, upload_pipeline.now())
  on conflict (name) do nothing
  returning organization_id into v_organization;
  if not found then
    raise exception 'there is an organization "%" already', p_name
      using errcode = 'UP003', hint = 'Choose another name, or use that one.';
  end if;
  return v_organization;
end
$$;

-- Makes a user a member with this role, or gives a member this role. The last owner's role cannot be taken: UP003.
create function upload_pipeline.set_member(p_organization_id uuid, p_user_id uuid, p_role text)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  -- one change of an organisation at a time, so that two owners cannot step down at once
  perform from upload_pipeline.organizations o where o.organization_id = p_organization_id for no key update;
  if not found then
    raise exception 'there is no organization %', p_organization_id
      using errcode = 'UP002', hint = '`upload-pipeline organizations list` shows those that there are.';
  end if;
  insert into upload_pipeline.organization_members as m (organization_id, user_id, role, created_at)
  values (p_organization_id, p_user_id, p_role, upload_pipeline.now())
  on conflict (organization_id, user_id) do update set role = excluded.role;
  perform upload_pipeline.check_owner(p_organization_id);
end
$$;

-- Ends a membership. False where there is none. What the user has uploaded stays the organisation's.
create function upload_pipeline.remove_member(p_organization_id uuid, p_user_id uuid)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
begin
  perform from upload_pipeline.organizations o where o.organization_id = p_organization_id for no key update;
  delete from upload_pipeline.organization_members m where m.organization_id = p_organization_id and m.user_id = p_user_id;
  if not found then
    return false;
  end if;
  perform upload_pipeline.check_owner(p_organization_id);
  return true;
end
$$;

-- Raises UP003 where an organisation that has members has no owner.
create function upload_pipeline.check_owner(p_organization_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  if exists (select from upload_pipeline.organization_members m where m.organization_id = p_organization_id)
     and not exists (select from upload_pipeline.organization_members m
                      where m.organization_id = p_organization_id and m.role = 'owner') then
    raise exception 'organization % would have members and no owner', p_organization_id
      using errcode = 'UP003', hint = 'Make another member the owner first.';
  end if;
end
$$;

create function upload_pipeline.add_project(p_organization_id uuid, p_name text, p_drop_gps boolean default false)
returns uuid
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_project uuid;
begin
  perform from upload_pipeline.organizations o where o.organization_id = p_organization_id;
  if not found then
    raise exception 'there is no organization %', p_organization_id
      using errcode = 'UP002', hint = '`upload-pipeline organizations list` shows those that there are.';
  end if;
  insert into upload_pipeline.projects (organization_id, name, drop_gps, created_at)
  values (p_organization_id, p_name, p_drop_gps, upload_pipeline.now())
  on conflict (organization_id, name) do nothing
  returning project_id into v_project;
  if not found then
    raise exception 'the organization has a project "%" already', p_name
      using errcode = 'UP003', hint = 'Choose another name, or use that one.';
  end if;
  return v_project;
end
$$;

-- Changes what is given of a project; null leaves it. Photos that were processed before stay as they are.
create function upload_pipeline.set_project(p_project_id uuid, p_name text default null, p_drop_gps boolean default null)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  update upload_pipeline.projects p set name = coalesce(p_name, p.name), drop_gps = coalesce(p_drop_gps, p.drop_gps)
   where p.project_id = p_project_id;
  if not found then
    raise exception 'there is no project %', p_project_id
      using errcode = 'UP002', hint = '`upload-pipeline projects list` shows those that there are.';
  end if;
exception when unique_violation then
  raise exception 'the organization has a project "%" already', p_name
    using errcode = 'UP003', hint = 'Choose another name.';
end
$$;

-- sql/schema/05_parsing.sql

-- Parses by a hosted parser: each is submitted once, and found again after a crash anywhere.
--
-- A submission is written down before anything is asked of the provider, and its id goes along with the request, so that
-- the job that was made can be found among all jobs. The provider has no key that would make a second request harmless.
-- So a call that may make a job is announced first, with the moment by which it is over at the latest; and nobody makes
-- another one for the same submission before that moment, and a time for the provider to finish it, are past, and a look
-- after that has found no job. Why nothing is paid twice is told in `workers/upload_workers/hosted_parse.py`.
--
--   verb                 stage                       says
--   begin_submission     job_validated or parsing    what there is: the submission that counts, or a new one
--   announce_submission  the same                    a call goes out now, and is over in so many seconds
--   end_submission_call  the same                    it is over; it surely made nothing, or nobody knows
--   commit_submission    job_validated -> parsing    this is the provider's id
--   store_submission     parsing                     the same, of a submission after one that failed
--   finish_submission    parsing                     the result is in the store
--   fail_submission      job_validated or parsing    it brings nothing: the next try is a new submission
--   wake_parse           -                           the provider says that it has ended: look now
--   take_abandoned_parses, account_submission        what did it cost, of which no job asks any more
--
-- All but the last three are fenced by the job's lease, whose row they lock first.

-- `submission_id` is what the provider is told. `begun_at`: how long it may be put off is counted from then; a restart of its
-- job begins anew. `called_at`, `called_until`: between which a call may have made its job; null
-- while none can have. Calls before that one made nothing: it was looked for what they made before another was allowed.
-- `told_at`: when the provider said that it has ended. `account_at`: when to ask next what it cost, where no job does; null where
-- that is recorded. Of one document, provider, tier and version one submission counts: that which has not failed.
create table upload_pipeline.parse_submissions (
  submission_id uuid primary key default gen_random_uuid(),
  document_id   uuid not null,
  user_id       uuid not null,
  provider      text not null,
  tier          text not null,
  version       text not null,
  begun_at      timestamptz not null,
  called_at     timestamptz,
  called_until  timestamptz,
  parse_id      text,
  submitted_at  timestamptz,
  told_at       timestamptz,
  account_at    timestamptz,
  finished_at   timestamptz,
  page_count    integer,
  failed_pages  integer[] not null default '{}',
  failed_at     timestamptz,
  foreign key (document_id, user_id) references upload_pipeline.documents (document_id, user_id)
    on update cascade on delete cascade,
  constraint parse_submissions_names check (provider <> '' and tier <> '' and version <> '' and parse_id <> ''),
  constraint parse_submissions_call check ((called_at is null) = (called_until is null)),
  constraint parse_submissions_submitted check ((parse_id is null) = (submitted_at is null)),
  constraint parse_submissions_finished check (finished_at is null or (parse_id is not null and page_count > 0))
);

-- begin_submission: the one that counts
create unique index parse_submissions_counts on upload_pipeline.parse_submissions (document_id, provider, tier, version)
  where failed_at is null;
-- the foreign key to documents
create index parse_submissions_document on upload_pipeline.parse_submissions (document_id);
-- wake_parse, load_submission; not unique: a provider that knows the bytes already may name the same job again
create index parse_submissions_parse on upload_pipeline.parse_submissions (parse_id, provider) where parse_id is not null;
-- take_abandoned_parses
create index parse_submissions_account on upload_pipeline.parse_submissions (provider, account_at) where account_at is not null;

-- The submission of the job's document that counts, or a new one. One of another tier or version counts too while a call
-- may have made its job and nobody knows. `called_at` where a call may have made the job; `wait`: seconds until another call
-- may be made, p_settle after that one is over; `age`: seconds since it was submitted, null once it has finished.
create function upload_pipeline.begin_submission(
  p_job_id uuid, p_token bigint, p_provider text, p_tier text, p_version text, p_settle interval
)
returns table (
  submission_id uuid, tier text, version text, parse_id text, called_at timestamptz, called_until timestamptz,
  wait double precision, age double precision
)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_now  timestamptz := upload_pipeline.now();
  v_job  upload_pipeline.upload_jobs := upload_pipeline.check_lease(p_job_id, p_token);
  v_mine upload_pipeline.parse_submissions;
begin
  -- the lock on the job lets nobody else in
  select s.* into v_mine from upload_pipeline.parse_submissions s
   where s.document_id = v_job.document_id and s.provider = p_provider and s.failed_at is null
     and ((s.tier = p_tier and s.version = p_version) or (s.called_at is not null and s.parse_id is null))
   order by s.called_at is not null and s.parse_id is null desc
   limit 1;
  if not found then
    insert into upload_pipeline.parse_submissions (document_id, user_id, provider, tier, version, begun_at)
    values (v_job.document_id, v_job.user_id, p_provider, p_tier, p_version, v_now)
    returning * into v_mine;
  end if;
  return query
    select v_mine.submission_id, v_mine.tier, v_mine.version, v_mine.parse_id, v_mine.called_at, v_mine.called_until,
           greatest(0, extract(epoch from v_mine.called_until + p_settle - v_now))::double precision,
           case when v_mine.finished_at is null then extract(epoch from v_now - v_mine.submitted_at)::double precision end;
end
$$;

-- A call goes out that may make a job, and is over within p_seconds of now. False, and nothing is noted, where that must
-- not be: another call may be under way, or has just been, or the job is known.
create function upload_pipeline.announce_submission(
  p_job_id uuid, p_token bigint, p_submission_id uuid, p_seconds interval, p_settle interval
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
begin
  perform upload_pipeline.check_lease(p_job_id, p_token);
  update upload_pipeline.parse_submissions s
     set called_at = v_now, called_until = v_now + p_seconds
   where s.submission_id = p_submission_id and s.parse_id is null and s.failed_at is null
     and (s.called_until is null or s.called_until + p_settle <= v_now);
  return found;
end
$$;

-- The call that was announced last is over. p_made_nothing: the provider refused it, so it is as if it had not been.
create function upload_pipeline.end_submission_call(
  p_job_id uuid, p_token bigint, p_submission_id uuid, p_made_nothing boolean
)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  perform upload_pipeline.check_lease(p_job_id, p_token);
  update upload_pipeline.parse_submissions s
     set called_at = case when not p_made_nothing then s.called_at end,
         called_until = case when not p_made_nothing then least(s.called_until, upload_pipeline.now()) end
   where s.submission_id = p_submission_id and s.called_at is not null;
end
$$;

-- Notes the provider's id of a submission, on it and on its document.
create function upload_pipeline.note_parse(p_document_id uuid, p_submission_id uuid, p_parse_id text)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
begin
  update upload_pipeline.parse_submissions s
     set parse_id = coalesce(s.parse_id, p_parse_id), submitted_at = coalesce(s.submitted_at, v_now),
         account_at = case when s.parse_id is null then v_now + interval '10 minutes' else s.account_at end
   where s.submission_id = p_submission_id and s.document_id = p_document_id;
  update upload_pipeline.documents d
     set parse_provider = s.provider, parse_id = s.parse_id, parse_tier = s.tier, parse_version = s.version,
         parse_submitted_at = s.submitted_at, updated_at = v_now
    from upload_pipeline.parse_submissions s
   where s.submission_id = p_submission_id and s.document_id = p_document_id and d.document_id = p_document_id;
end
$$;

-- job_validated -> parsing: the provider has the file, and this is its id of the parse.
create function upload_pipeline.commit_submission(
  p_job_id        uuid,
  p_token         bigint,
  p_submission_id uuid,
  p_parse_id      text,
  p_keep          boolean default true,
  p_ttl           interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'parsing');
begin
  if v_job.stage = 'parsing' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  perform upload_pipeline.note_parse(v_job.document_id, p_submission_id, p_parse_id);
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'job_validated', 'parsing', p_keep, p_ttl);
end
$$;

-- The same of a job that is at `parsing` already, since an earlier submission failed. Safe to repeat.
create function upload_pipeline.store_submission(p_job_id uuid, p_token bigint, p_submission_id uuid, p_parse_id text)
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_lease(p_job_id, p_token);
begin
  perform upload_pipeline.note_parse(v_job.document_id, p_submission_id, p_parse_id);
end
$$;

-- The result of a submission is in the store; it is not fetched, nor paid for, again.
create function upload_pipeline.finish_submission(
  p_job_id uuid, p_token bigint, p_submission_id uuid, p_page_count integer, p_failed_pages integer[]
)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  perform upload_pipeline.check_lease(p_job_id, p_token);
  update upload_pipeline.parse_submissions s
     set finished_at = upload_pipeline.now(), page_count = p_page_count, failed_pages = p_failed_pages, account_at = null
   where s.submission_id = p_submission_id and s.finished_at is null;
end
$$;

-- A submission brings nothing and never will. Whoever tries again makes a new one.
create function upload_pipeline.fail_submission(p_job_id uuid, p_token bigint, p_submission_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  perform upload_pipeline.check_lease(p_job_id, p_token);
  update upload_pipeline.parse_submissions s set failed_at = upload_pipeline.now()
   where s.submission_id = p_submission_id and s.failed_at is null;
end
$$;

-- The provider says that a parse has ended: the jobs that wait for it look now. How many there are; 0 for an id that
-- nobody waits for. Whoever says so need not be right: a job that looks too early waits again.
-- Locks the jobs in id order, each before its submissions, and lanes last, in user order: a parse id may belong to several
-- documents, and whoever else locks several jobs comes that way. What became of the parse is read behind the lock on its
-- job, so that a look that is about to say it is waited for, and is not repeated.
create function upload_pipeline.wake_parse(p_provider text, p_parse_id text)
returns integer
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
  v_document uuid;
  v_id       uuid;
  v_found    uuid[] := '{}';
  v_job      upload_pipeline.upload_jobs;
  v_jobs     upload_pipeline.upload_jobs[] := '{}';
begin
  -- step by step, and by the id alone: on old statistics the planner reads all jobs first, or all that has not failed
  for v_document in
    select distinct s.document_id from upload_pipeline.parse_submissions s
     where s.parse_id = p_parse_id and s.provider = p_provider
  loop
    select j.job_id into v_id from upload_pipeline.upload_jobs j
     where j.document_id = v_document and j.pipeline = 'document' and j.state in ('queued', 'working', 'retryable');
    if found then
      v_found := v_found || v_id;
    end if;
  end loop;
  -- all of them before the first lane: who holds a lane waits for no job
  for v_id in select f from unnest(v_found) f order by f loop
    select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = v_id for no key update;
    continue when not found or v_job.stage <> 'parsing' or v_job.state not in ('working', 'retryable')
      or (select d.parse_id is distinct from p_parse_id from upload_pipeline.documents d where d.document_id = v_job.document_id)
      or (select bool_and(s.finished_at is not null or s.failed_at is not null) from upload_pipeline.parse_submissions s
           where s.parse_id = p_parse_id and s.provider = p_provider and s.document_id = v_job.document_id);
    v_jobs := v_jobs || v_job;
    update upload_pipeline.parse_submissions s set told_at = upload_pipeline.now()
     where s.parse_id = p_parse_id and s.provider = p_provider and s.document_id = v_job.document_id and s.told_at is null;
  end loop;
  for v_id in select j.job_id from unnest(v_jobs) j order by j.pool, j.user_id loop
    perform upload_pipeline.wake_job(v_id);
  end loop;
  return cardinality(v_jobs);
end
$$;

-- Parses that were submitted some time ago and that no job looks at any more: it ended, or made another one. What they cost
-- is to be asked for and recorded. Each is given out once in ten minutes, until account_submission says that it is done.
-- Locks submissions, and waits for none.
create function upload_pipeline.take_abandoned_parses(p_provider text, p_limit integer)
returns table (
  submission_id uuid, parse_id text, tier text, version text, job_id uuid, age double precision, page_count integer
)
language sql
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
  with due as materialized (
    select s.submission_id from upload_pipeline.parse_submissions s
     where s.provider = p_provider and s.account_at <= upload_pipeline.now()
     order by s.account_at limit p_limit for no key update skip locked
  ), taken as (
    update upload_pipeline.parse_submissions s set account_at = upload_pipeline.now() + interval '10 minutes'
      from due where s.submission_id = due.submission_id
    returning s.*
  )
  select t.submission_id, t.parse_id, t.tier, t.version,
         (select j.job_id from upload_pipeline.upload_jobs j
           where j.document_id = t.document_id and j.pipeline = 'document' order by j.seq desc limit 1),
         extract(epoch from upload_pipeline.now() - t.submitted_at)::double precision,
         (select d.page_count from upload_pipeline.documents d where d.document_id = t.document_id)
    from taken t
   where t.failed_at is not null
      or not exists (select from upload_pipeline.upload_jobs j
                      where j.document_id = t.document_id and j.pipeline = 'document'
                        and j.state in ('queued', 'working', 'retryable'))
$$;

-- What a submission cost is recorded, or will never be known.
create function upload_pipeline.account_submission(p_submission_id uuid)
returns void
language sql
security definer
set search_path = ''
as $$
  update upload_pipeline.parse_submissions s set account_at = null where s.submission_id = p_submission_id
$$;

-- sql/schema/05_photo.sql

-- Photos: a second pipeline of the same queue. A photo is announced, its bytes come by a signed URL, and a job of pipeline
-- `photo` carries it along. It has one job, ever: where that has ended, it is retried.
--
--   status           the job is
--   pending_upload   at its first stage, and nobody has seen the bytes
--   uploaded         at its first stage, and somebody has (`uploaded_at`); or has checked them
--   processing       between the check and the end
--   completed        done
--   failed           a dead letter, or cancelled
--
-- `photo_status` says so, in one place. The row carries it for lists, written by a trigger at each change of the job that
-- changes it, with an event `photo_status_changed`: whatever verb moves the job, the status has moved with it.
--
-- Locks, each verb here: the photo's job, the photo, the user's lane.

create table upload_pipeline.photos (
  photo_id        uuid primary key,
  project_id      uuid not null,
  organization_id uuid not null,
  -- who has uploaded it
  user_id         uuid not null,
  file_name       text not null,
  file_bytes      bigint not null,
  media_type      text not null,
  raw_key         text not null unique,
  detection_types text[] not null default '{}',
  priority        text not null default 'normal',
  status          text not null default 'pending_upload',
  -- as displayed
  width           integer,
  height          integer,
  exif            jsonb not null default '{}',
  warnings        text[] not null default '{}',
  thumbnail_key   text,
  -- the copy that is handed out in the original's place, which tells no place; null: the original is
  shared_key      text,
  -- of the object that is handed out; null before it was looked at
  file_sha256     text,
  detections      jsonb,
  detector        text,
  -- until when the bytes may come; null once they were checked
  upload_deadline timestamptz,
  -- when somebody first saw that they were there
  uploaded_at     timestamptz,
  created_at      timestamptz not null default upload_pipeline.now(),
  updated_at      timestamptz not null default upload_pipeline.now(),
  deleted_at      timestamptz,
  foreign key (project_id, organization_id) references upload_pipeline.projects (project_id, organization_id),
  -- what a job's composite key points at
  unique (photo_id, user_id),
  constraint photos_file_name check (file_name <> '' and length(file_name) <= 1024),
  constraint photos_bytes check (file_bytes > 0),
  constraint photos_media_type check (media_type in ('image/jpeg', 'image/png')),
  constraint photos_priority check (priority in ('low', 'normal', 'high')),
  constraint photos_status check (status in ('pending_upload', 'uploaded', 'processing', 'completed', 'failed')),
  constraint photos_size check ((width is null) = (height is null) and width > 0 and height > 0),
  constraint photos_sha256 check (file_sha256 ~ '^[0-9a-f]{64}$'),
  constraint photos_exif check (jsonb_typeof(exif) = 'object')
);

-- a project's photos, newest first, page by page; the foreign key to projects
create index photos_listing on upload_pipeline.photos (project_id, created_at desc, photo_id);
-- those of one status
create index photos_status on upload_pipeline.photos (project_id, status, created_at desc, photo_id);
-- begin_photo_expiry
create index photos_awaited on upload_pipeline.photos (upload_deadline)
  where upload_deadline is not null and uploaded_at is null;
-- deletions that a crash left half done
create index photos_deleting on upload_pipeline.photos (deleted_at) where deleted_at is not null;

alter table upload_pipeline.upload_jobs add foreign key (photo_id, user_id)
  references upload_pipeline.photos (photo_id, user_id) on update cascade on delete cascade;

-- one job a photo
create unique index upload_jobs_photo_live on upload_pipeline.upload_jobs (photo_id, pipeline)
  where state in ('queued', 'working', 'retryable') and photo_id is not null;
-- a photo's job; the foreign key to photos
create index upload_jobs_photo on upload_pipeline.upload_jobs (photo_id, seq) where photo_id is not null;

-- A photo's status, of its job and whether the bytes were seen.
create function upload_pipeline.photo_status(p_stage text, p_state upload_pipeline.job_state, p_uploaded boolean)
returns text
language sql
immutable
set search_path = ''
as $$
  select case when p_state in ('deadletter', 'cancelled') then 'failed'
              when p_state = 'done' then 'completed'
              when p_stage = 'pending_upload' and not p_uploaded then 'pending_upload'
              when p_stage in ('pending_upload', 'uploaded') then 'uploaded'
              else 'processing' end
$$;

-- A job's priority within its user's lane, of the word that the photo came with.
create function upload_pipeline.photo_priority(p_priority text)
returns smallint
language sql
immutable
set search_path = ''
as $$ select case p_priority when 'low' then -10 when 'high' then 10 else 0 end::smallint $$;

-- Whether a job that has failed with this code has seen bytes, and refused them.
create function upload_pipeline.is_photo_refusal(p_error_code text)
returns boolean
language sql
immutable
set search_path = ''
as $$
  select p_error_code in ('CHECKSUM_MISMATCH', 'TYPE_MISMATCH', 'UNSUPPORTED_TYPE', 'MALWARE_FOUND', 'FILE_TOO_SMALL',
                          'FILE_TOO_LARGE', 'CORRUPT_FILE', 'CORRUPT_IMAGE', 'IMAGE_TOO_LARGE')
$$;

-- Carries a job's stage and state over to its photo. Who leaves the first stage has seen the bytes, and that they are those;
-- who refuses them there has seen them, too.
create function upload_pipeline.note_photo_status()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now    timestamptz := upload_pipeline.now();
  v_fit    boolean := new.stage <> 'pending_upload';
  v_seen   boolean := v_fit or (new.state = 'deadletter' and exists (
                        select from upload_pipeline.job_outcomes o
                         where o.job_id = new.job_id and upload_pipeline.is_photo_refusal(o.error_code)));
  v_photo  upload_pipeline.photos;
  v_status text;
begin
  select p.* into v_photo from upload_pipeline.photos p where p.photo_id = new.photo_id for no key update;
  if v_photo.deleted_at is not null then
    return null;
  end if;
  v_status := upload_pipeline.photo_status(new.stage, new.state, v_seen or v_photo.uploaded_at is not null);
  if v_status = v_photo.status and not (v_fit and v_photo.upload_deadline is not null) then
    return null;
  end if;
  update upload_pipeline.photos p
     set status = v_status, updated_at = v_now,
         uploaded_at = case when v_seen then coalesce(p.uploaded_at, v_now) else p.uploaded_at end,
         upload_deadline = case when v_fit then null else p.upload_deadline end
   where p.photo_id = new.photo_id;
  if v_status <> v_photo.status then
    insert into upload_pipeline.events (at, code, user_id, job_id, stage, lease_token, correlation_id, payload)
    values (v_now, 'photo_status_changed', new.user_id, new.job_id, new.stage, new.lease_token, new.correlation_id,
            jsonb_build_object('photo_id', new.photo_id, 'status', v_status));
  end if;
  return null;
end
$$;

-- `finished_at` tells ended from live; asked of documents' jobs too, the condition is all that they pay
create trigger note_photo_status after update of stage, state on upload_pipeline.upload_jobs
  for each row
  when (new.photo_id is not null
        and (new.stage is distinct from old.stage or (new.finished_at is null) is distinct from (old.finished_at is null)))
  execute function upload_pipeline.note_photo_status();

-- A photo's job, locked; null where it has none.
create function upload_pipeline.lock_photo_job(p_photo_id uuid)
returns upload_pipeline.upload_jobs
language sql
security definer
set search_path = ''
as $$
  select j.* from upload_pipeline.upload_jobs j where j.photo_id = p_photo_id order by j.seq desc limit 1 for no key update
$$;

-- Announces a photo whose bytes are going to come within p_window: makes photo, job and event. A project that there is not,
-- or of an organisation that the user is not in, raises UP002; a role that may not upload, UP006. A photo of this id that is
-- there breaks the primary key.
create function upload_pipeline.reserve_photo(
  p_photo_id        uuid,
  p_user_id         uuid,
  p_project_id      uuid,
  p_file_name       text,
  p_media_type      text,
  p_file_bytes      bigint,
  p_raw_key         text,
  p_window          interval,
  p_detection_types text[] default '{}',
  p_priority        text default 'normal',
  p_correlation_id  text default ''
)
returns table (photo_id uuid, job_id uuid, upload_deadline timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     uuid;
  v_project record;
  v_first   record;
begin
  if p_window is null or p_window <= interval '0' then
    raise exception 'p_window is %, it must be longer than nothing', p_window using errcode = '22023';
  end if;
  select p.organization_id, m.role into v_project
    from upload_pipeline.projects p
    join upload_pipeline.organization_members m on m.organization_id = p.organization_id and m.user_id = p_user_id
   where p.project_id = p_project_id;
  if not found then
    raise exception 'there is no project %', p_project_id using errcode = 'UP002', hint = 'Check the id.';
  end if;
  if v_project.role = 'viewer' then
    raise exception 'role "viewer" may not upload' using errcode = 'UP006', hint = 'Ask an owner of the organization.';
  end if;
  insert into upload_pipeline.photos
    (photo_id, project_id, organization_id, user_id, file_name, file_bytes, media_type, raw_key, detection_types, priority,
     upload_deadline, created_at, updated_at)
  values (p_photo_id, p_project_id, v_project.organization_id, p_user_id, p_file_name, p_file_bytes, p_media_type, p_raw_key,
          p_detection_types, p_priority, v_now + p_window, v_now, v_now);

  select s.stage, s.pool into v_first from upload_pipeline.stages s where s.pipeline = 'photo' and s.position = 0;
  insert into upload_pipeline.upload_jobs as j
    (photo_id, user_id, pipeline, stage, pool, priority, correlation_id, run_at, created_at, updated_at)
  values (p_photo_id, p_user_id, 'photo', v_first.stage, v_first.pool, upload_pipeline.photo_priority(p_priority),
          left(p_correlation_id, 200), v_now, v_now, v_now)
  returning j.job_id into v_job;
  insert into upload_pipeline.events (at, code, user_id, job_id, stage, correlation_id, payload)
  values (v_now, 'job_enqueued', p_user_id, v_job, v_first.stage, left(p_correlation_id, 200),
          jsonb_build_object('photo_id', p_photo_id)),
         (v_now, 'photo_status_changed', p_user_id, v_job, v_first.stage, left(p_correlation_id, 200),
          jsonb_build_object('photo_id', p_photo_id, 'status', 'pending_upload'));
  perform upload_pipeline.wake_lanes(v_first.pool, array[p_user_id]);
  return query select p_photo_id, v_job, v_now + p_window;
end
$$;

-- Somebody says what a photo's status is now, and has looked: `uploaded` of one that awaits its bytes, whose job then looks
-- at once; it starts again where it had failed without having seen any, in time or for an outage. Of one that is past that
-- nothing changes, so saying it twice is saying it once. Every other status is for the job to reach, and out of any other
-- failure only a retry leads: those raise UP003 and name the status that there is. The deadline stays: nobody has checked
-- the bytes yet. No photo, or one that is being deleted: UP002.
create function upload_pipeline.announce_photo(p_photo_id uuid, p_status text)
returns text
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_job   upload_pipeline.upload_jobs := upload_pipeline.lock_photo_job(p_photo_id);
  v_photo upload_pipeline.photos;
  v_again boolean;
begin
  select p.* into v_photo from upload_pipeline.photos p
   where p.photo_id = p_photo_id and p.deleted_at is null for no key update;
  if not found then
    raise exception 'there is no photo %', p_photo_id using errcode = 'UP002', hint = 'Check the id.';
  end if;
  if p_status = v_photo.status or (p_status = 'uploaded' and v_photo.status in ('processing', 'completed')) then
    return v_photo.status;
  end if;
  v_again := v_job.state = 'deadletter' and v_photo.uploaded_at is null;
  if p_status <> 'uploaded' or not (v_photo.status = 'pending_upload' or v_again) then
    raise exception 'photo % is "%" and cannot become "%"', p_photo_id, v_photo.status, p_status
      using errcode = 'UP003',
            hint = case v_photo.status when 'failed' then 'Retry its job, or delete it and upload it again.'
                                       else 'Only a photo that is "pending_upload" can be said to be "uploaded".' end;
  end if;
  update upload_pipeline.photos p set status = 'uploaded', uploaded_at = v_now, updated_at = v_now where p.photo_id = p_photo_id;
  insert into upload_pipeline.events (at, code, user_id, job_id, stage, lease_token, correlation_id, payload)
  values (v_now, 'photo_status_changed', v_job.user_id, v_job.job_id, v_job.stage, v_job.lease_token, v_job.correlation_id,
          jsonb_build_object('photo_id', p_photo_id, 'status', 'uploaded'));
  if v_again then
    perform upload_pipeline.retry_job(v_job.job_id);
  else
    perform upload_pipeline.wake_job(v_job.job_id);
  end if;
  return 'uploaded';
end
$$;

-- Where the jobs of some photos stand, what went wrong, and what their statuses were, oldest first. Of photos of the
-- caller's organisations, who is `auth.uid()`, read here: jobs and events are otherwise their owner's to read, and a photo
-- is also its uploader's colleagues'. Therefore `security definer`.
create function upload_pipeline.photo_progress(p_photo_ids uuid[])
returns table (
  photo_id uuid, job_id uuid, error_code text, error_message text, error_details jsonb, statuses text[], times timestamptz[]
)
language plpgsql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_organizations uuid[] := upload_pipeline.member_organizations();
begin
  return query
    select p.photo_id, j.job_id,
           case when p.status = 'failed'
                then coalesce(o.error_code, case j.state when 'cancelled' then 'CANCELLED' else 'INTERNAL' end) end,
           case when p.status = 'failed'
                then coalesce(o.error_message, case j.state when 'cancelled' then 'The job was cancelled. Retry it to go on.'
                                                            else 'The job failed.' end) end,
           case when p.status = 'failed' then o.error_details end, h.statuses, h.times
      from unnest(p_photo_ids) a (photo_id)
      join upload_pipeline.photos p on p.photo_id = a.photo_id
     cross join lateral (
       select u.job_id, u.state from upload_pipeline.upload_jobs u where u.photo_id = p.photo_id order by u.seq desc limit 1) j
      left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
     cross join lateral (
       select coalesce(array_agg(e.payload ->> 'status' order by e.event_id), '{}') as statuses,
              coalesce(array_agg(e.at order by e.event_id), '{}') as times
         from upload_pipeline.events e
        where e.job_id = j.job_id and e.code = 'photo_status_changed') h
     where p.organization_id = any (v_organizations) and p.deleted_at is null;
end
$$;

-- Hides a photo and ends its job, whose holder is fenced off. The caller has locked the job. False: there is no such photo.
create function upload_pipeline.start_photo_deletion(
  p_photo_id uuid, p_code upload_pipeline.event_code, p_correlation_id text
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_photo upload_pipeline.photos;
begin
  -- hidden first: then the end of the job is no change of a status that anybody is shown
  update upload_pipeline.photos p set deleted_at = v_now, updated_at = v_now
   where p.photo_id = p_photo_id and p.deleted_at is null
  returning p.* into v_photo;
  if not found then
    return false;
  end if;
  with ended as (
    update upload_pipeline.upload_jobs j
       set state = 'cancelled', cancel_requested = true, lease_token = j.lease_token + 1, worker_id = null,
           lease_expires_at = null, finished_at = v_now, updated_at = v_now
     where j.photo_id = p_photo_id and j.state in ('queued', 'working', 'retryable')
    returning j.job_id, j.user_id, j.stage, j.lease_token, j.correlation_id
  )
  insert into upload_pipeline.events (at, code, user_id, job_id, stage, lease_token, correlation_id)
  select v_now, 'job_cancelled', e.user_id, e.job_id, e.stage, e.lease_token, e.correlation_id from ended e;
  perform upload_pipeline.record_event(p_code, p_user_id => v_photo.user_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('photo_id', p_photo_id, 'project_id', v_photo.project_id, 'file_name', v_photo.file_name));
  return true;
end
$$;

-- Deletion in two steps, as of documents: begin_photo_deletion hides the photo and names its objects' key; then the caller
-- removes the objects; finish_photo_deletion removes the rows. Both are safe to repeat; what a crash leaves between them
-- maintenance finishes. No row: there is no such photo.
create function upload_pipeline.begin_photo_deletion(p_photo_id uuid, p_correlation_id text default '')
returns table (photo_id uuid, raw_key text)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
begin
  perform upload_pipeline.lock_photo_job(p_photo_id);
  perform upload_pipeline.start_photo_deletion(p_photo_id, 'photo_deletion_started', p_correlation_id);
  return query select p.photo_id, p.raw_key from upload_pipeline.photos p where p.photo_id = p_photo_id;
end
$$;

create function upload_pipeline.finish_photo_deletion(p_photo_id uuid, p_correlation_id text default '')
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_photo upload_pipeline.photos;
begin
  -- the job before the photo, which takes it along
  perform upload_pipeline.lock_photo_job(p_photo_id);
  delete from upload_pipeline.photos p
   where p.photo_id = p_photo_id and p.deleted_at is not null
  returning p.* into v_photo;
  if not found then
    return false;
  end if;
  perform upload_pipeline.record_event('photo_deleted', p_user_id => v_photo.user_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('photo_id', p_photo_id, 'project_id', v_photo.project_id));
  return true;
end
$$;

-- Deletions begun before p_before and not finished.
create function upload_pipeline.unfinished_photo_deletions(p_before timestamptz, p_limit integer default 100)
returns table (photo_id uuid, raw_key text)
language sql
stable
security definer
set search_path = ''
as $$
  select p.photo_id, p.raw_key from upload_pipeline.photos p
   where p.deleted_at is not null and p.deleted_at < p_before
   order by p.deleted_at limit p_limit
$$;

-- Photos that were announced and did not come: p_grace after the deadline their deletion begins. Returns them. That they did
-- not come their job says, which has looked after the deadline, or its user has cancelled it. One that has not looked yet has
-- the time that it takes; one that has failed without having seen bytes looks again. Any worker runs it, bounded, beside
-- others; a photo whose job another transaction holds is for the next round.
create function upload_pipeline.begin_photo_expiry(p_grace interval, p_limit integer default 100)
returns table (photo_id uuid, raw_key text)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_before timestamptz := upload_pipeline.now() - p_grace;
  v_photo  record;
  v_job    upload_pipeline.upload_jobs;
begin
  for v_photo in
    select p.photo_id, p.raw_key, j.job_id
      from upload_pipeline.photos p
     cross join lateral (
       select u.job_id, u.state from upload_pipeline.upload_jobs u where u.photo_id = p.photo_id order by u.seq desc limit 1) j
     where p.upload_deadline < v_before and p.uploaded_at is null and p.deleted_at is null
       and j.state in ('deadletter', 'cancelled')
     order by p.upload_deadline limit p_limit
  loop
    select j.* into v_job from upload_pipeline.upload_jobs j
     where j.job_id = v_photo.job_id and j.state in ('deadletter', 'cancelled') for no key update skip locked;
    continue when not found;
    -- they may have come since the look above; who says so holds the job
    continue when not exists (select from upload_pipeline.photos p
                               where p.photo_id = v_photo.photo_id and p.uploaded_at is null and p.deleted_at is null);
    if v_job.state = 'deadletter'
       and not exists (select from upload_pipeline.job_outcomes o
                        where o.job_id = v_job.job_id and o.error_code = 'UPLOAD_EXPIRED') then
      perform upload_pipeline.retry_job(v_job.job_id);
      continue;
    end if;
    perform upload_pipeline.start_photo_deletion(v_photo.photo_id, 'photo_expired', '');
    photo_id := v_photo.photo_id;
    raw_key := v_photo.raw_key;
    return next;
  end loop;
end
$$;

-- sql/schema/05_photo_detection.sql

-- Detection in photos: detecting -> completed, by the worker that has the answer (commit_detections), or by the answer
-- itself, which comes by a callback at whatever time (answer_detections).
--
--   the photo's job is                          a callback
--   at "detecting", queued, snoozed or failed   ends it; also while a worker is busy with it, who is fenced off
--     before and to be tried again
--   a dead letter that no answer made           ends it too: an answer that is late is still an answer
--   done, or a dead letter by an answer         the same answer again: nothing changes; another one: UP003
--   anything else                               UP003
--
-- Locks, each verb here: the photo's job, the photo, its request, the user's lane.

-- What was sent to a model that answers later, one row a photo. `delivery_id` stays until there is an answer, `attempt`
-- counts the deliveries under it. `retry_count` is the job's when it was sent last: a job that has failed since, or whose
-- worker died before it said so, sends again. `lease_token` is the lease that it was sent under; `answered_token` the one
-- that the answer took away, so that its holder learns why.
create table upload_pipeline.photo_detection_requests (
  photo_id       uuid primary key references upload_pipeline.photos on delete cascade,
  delivery_id    uuid not null,
  attempt        integer not null,
  retry_count    smallint not null,
  lease_token    bigint not null,
  sent_at        timestamptz not null,
  expires_at     timestamptz not null,
  answered_at    timestamptz,
  answered_token bigint,
  answer_sha256  text,
  constraint photo_detection_requests_attempt check (attempt >= 1),
  constraint photo_detection_requests_answer check (
    (answered_at is null) = (answer_sha256 is null) and (answered_at is null) = (answered_token is null)),
  constraint photo_detection_requests_sha256 check (answer_sha256 ~ '^[0-9a-f]{64}$')
);

-- Writes what was found into a photo. The warning that nobody has looked is there exactly where nobody has.
create function upload_pipeline.set_detections(p_photo_id uuid, p_detector text, p_detections jsonb)
returns void
language sql
security definer
set search_path = ''
as $$
  update upload_pipeline.photos p
     set detections = p_detections, detector = p_detector, updated_at = upload_pipeline.now(),
         warnings = array_remove(p.warnings, 'Detection is off.')
                    || case when p_detector = 'none' then array['Detection is off.'] else '{}'::text[] end
   where p.photo_id = p_photo_id
$$;

-- A job's results at its end: who has looked, how much there is, and what it cost.
create function upload_pipeline.detection_results(p_job_id uuid, p_detector text, p_detections jsonb)
returns jsonb
language sql
security definer
set search_path = ''
as $$
  select jsonb_build_object('detector', p_detector, 'detections', jsonb_array_length(p_detections))
         || upload_pipeline.job_cost(p_job_id)
$$;

-- detecting -> completed: what the worker's detector found; null where detection is off.
create function upload_pipeline.commit_detections(
  p_job_id     uuid,
  p_token      bigint,
  p_detector   text,
  p_detections jsonb,
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'completed');
begin
  if v_job.stage = 'completed' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  perform upload_pipeline.set_detections(v_job.photo_id, p_detector, p_detections);
  return query select * from upload_pipeline.advance_job(
    p_job_id, p_token, 'detecting', 'completed', p_keep, p_ttl,
    upload_pipeline.detection_results(p_job_id, p_detector, p_detections));
end
$$;

-- Notes that a message was taken, and snoozes the job until p_wait is over. Where the answer was here first, the job is
-- wherever that has brought it, and nothing is written. Asked again because its own answer was lost: the same.
create function upload_pipeline.await_detections(
  p_job_id      uuid,
  p_token       bigint,
  p_delivery_id uuid,
  p_attempt     integer,
  p_wait        interval
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     upload_pipeline.upload_jobs;
  v_request upload_pipeline.photo_detection_requests;
begin
  select j.* into v_job from upload_pipeline.upload_jobs j where j.job_id = p_job_id for no key update;
  select r.* into v_request from upload_pipeline.photo_detection_requests r where r.photo_id = v_job.photo_id for update;
  if v_request.answered_token is distinct from p_token
     and (v_request.lease_token is distinct from p_token or v_job.lease_token <> p_token
          or v_job.lease_expires_at is not null) then
    perform upload_pipeline.check_lease(p_job_id, p_token);
    insert into upload_pipeline.photo_detection_requests as r
      (photo_id, delivery_id, attempt, retry_count, lease_token, sent_at, expires_at)
    values (v_job.photo_id, p_delivery_id, p_attempt, v_job.retry_count, p_token, v_now, v_now + p_wait)
    on conflict (photo_id) do update
      set delivery_id = excluded.delivery_id, attempt = excluded.attempt, retry_count = excluded.retry_count,
          lease_token = excluded.lease_token, sent_at = excluded.sent_at, expires_at = excluded.expires_at,
          answered_at = null, answered_token = null, answer_sha256 = null;
    perform upload_pipeline.snooze_job(p_job_id, p_token, p_wait);
  end if;
  return query select j.job_id, j.stage, j.state from upload_pipeline.upload_jobs j where j.job_id = p_job_id;
end
$$;

-- Ends a photo's job by the answer of a model: by detections, or, where p_error is given, as a dead letter with that text.
-- The job is leased for the length of this transaction: whoever holds it is fenced off, and then the queue's own verbs
-- end it. p_answer_sha256 tells one answer from another. False: this answer has been given before, nothing has changed.
create function upload_pipeline.answer_detections(
  p_photo_id      uuid,
  p_detections    jsonb,
  p_error         text,
  p_answer_sha256 text
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now     timestamptz := upload_pipeline.now();
  v_job     upload_pipeline.upload_jobs := upload_pipeline.lock_photo_job(p_photo_id);
  v_request upload_pipeline.photo_detection_requests;
  v_live    boolean := v_job.state in ('queued', 'working', 'retryable');
  v_token   bigint := v_job.lease_token + 1;
begin
  perform from upload_pipeline.photos p where p.photo_id = p_photo_id and p.deleted_at is null for no key update;
  if not found or v_job.job_id is null then
    raise exception 'there is no photo %', p_photo_id using errcode = 'UP002', hint = 'It may have been deleted.';
  end if;
  select r.* into v_request from upload_pipeline.photo_detection_requests r where r.photo_id = p_photo_id for update;
  if not v_live and v_request.answer_sha256 = p_answer_sha256 then
    return false;
  end if;
  if v_job.stage <> 'detecting' or v_job.cancel_requested
     or not (v_live or (v_job.state = 'deadletter' and v_request.sent_at is not null and v_request.answered_at is null)) then
    raise exception 'photo % awaits no detections', p_photo_id
      using errcode = 'UP003',
            hint = case when v_request.answered_at is not null then 'It was given another answer before. '
                        else '' end || format('Its job is "%s" at "%s".', v_job.state, v_job.stage);
  end if;

  insert into upload_pipeline.photo_detection_requests as r
    (photo_id, delivery_id, attempt, retry_count, lease_token, sent_at, expires_at, answered_at, answered_token, answer_sha256)
  values (p_photo_id, gen_random_uuid(), 1, v_job.retry_count, v_job.lease_token, v_now, v_now, v_now, v_job.lease_token,
          p_answer_sha256)
  on conflict (photo_id) do update
    set answered_at = v_now, answered_token = excluded.answered_token, answer_sha256 = excluded.answer_sha256;
  update upload_pipeline.upload_jobs j
     set state = 'working', lease_token = v_token, worker_id = '00000000-0000-0000-0000-000000000000',
         lease_expires_at = v_now + interval '1 minute', run_at = v_now, updated_at = v_now, finished_at = null
   where j.job_id = v_job.job_id;
  if p_error is null then
    perform upload_pipeline.set_detections(p_photo_id, 'webhook', p_detections);
    perform upload_pipeline.advance_job(
      v_job.job_id, v_token, 'detecting', 'completed', false, interval '1 minute',
      upload_pipeline.detection_results(v_job.job_id, 'webhook', p_detections));
  else
    perform upload_pipeline.fail_job(v_job.job_id, v_token, 'DETECT_FAILED', p_error, false);
  end if;
  return true;
end
$$;

-- sql/schema/05_photo_facts.sql

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

-- sql/schema/05_uploads.sql

-- Uploads whose bytes come after their announcement: document and job are there first, and wait for them.
--
--   verb               what it says                                             upload_deadline
--   reserve_document   bytes of this name, size and sha256 are going to come    now + window
--   announce_upload    they should be there: look                               stays
--   confirm_upload     they came through this service, which checked them       null
--   commit_validation  the job has found them and checked them                  null
--   accept_document    the same bytes came whole, by another way                null
--
-- The job waits at its first stage by snooze_job. Whatever it does, it does to what it saw; so each of these verbs wakes it
-- (wake_job), and what it then says of a moment that has passed does not count.
--
-- Locks, each of these verbs: the document's latest job, the document, the user's lane.

-- A user's document that awaits these bytes, with its latest job and itself locked in that order; null where there is none.
create function upload_pipeline.lock_awaited(p_user_id uuid, p_file_sha256 text)
returns upload_pipeline.documents
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_document upload_pipeline.documents;
begin
  select d.* into v_document from upload_pipeline.documents d
   where d.user_id = p_user_id and d.file_sha256 = p_file_sha256;
  if not found then
    return null;
  end if;
  perform upload_pipeline.lock_latest_job(v_document.document_id);
  select d.* into v_document from upload_pipeline.documents d
   where d.document_id = v_document.document_id and d.user_id = p_user_id
     and d.upload_deadline is not null and d.deleted_at is null
     for no key update;
  if not found then
    return null;
  end if;
  return v_document;
end
$$;

-- Raises UP003 where a document of this id is another user's: a session's that was claimed while this was on its way.
create function upload_pipeline.check_no_stranger(p_document_id uuid, p_user_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  if exists (select from upload_pipeline.documents d where d.document_id = p_document_id and d.user_id <> p_user_id) then
    raise exception 'document % belongs to another user by now', p_document_id
      using errcode = 'UP003', hint = 'Send the file as that user.';
  end if;
end
$$;

-- A document's latest job, locked; null where it has none.
create function upload_pipeline.lock_latest_job(p_document_id uuid)
returns upload_pipeline.upload_jobs
language sql
security definer
set search_path = ''
as $$
  select j.* from upload_pipeline.upload_jobs j
   where j.document_id = p_document_id and j.pipeline = 'document'
   order by j.seq desc limit 1
     for no key update
$$;

-- The job of an awaited document looks now: one that waits or works is woken, one that failed while the bytes were awaited
-- starts again. A job that its user has cancelled stays so. The caller has locked job and document.
create function upload_pipeline.look_for_upload(p_job upload_pipeline.upload_jobs)
returns void
language plpgsql
security definer
set search_path = ''
as $$
begin
  if p_job.state = 'deadletter' then
    perform upload_pipeline.retry_job(p_job.job_id);
  else
    perform upload_pipeline.wake_job(p_job.job_id);
  end if;
end
$$;

-- The job of an awaited document as somebody asks for it who has the bytes: their correlation id and priority; one that was
-- cancelled starts again as well, and where there is none it is made. Returns its id. The caller has locked both.
create function upload_pipeline.resume_upload_job(
  p_document_id    uuid,
  p_user_id        uuid,
  p_priority       smallint,
  p_correlation_id text
)
returns uuid
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job upload_pipeline.upload_jobs := upload_pipeline.lock_latest_job(p_document_id);
begin
  if v_job.job_id is null then
    return (select e.job_id from upload_pipeline.enqueue_job(p_document_id, p_user_id, 'document', p_priority, p_correlation_id) e);
  end if;
  update upload_pipeline.upload_jobs j set priority = p_priority, correlation_id = p_correlation_id
   where j.job_id = v_job.job_id;
  if v_job.state = 'cancelled' or v_job.cancel_requested then
    -- by force: one that is to stop and has not yet is fenced off
    perform upload_pipeline.retry_job(v_job.job_id, p_force => true);
  else
    perform upload_pipeline.look_for_upload(v_job);
  end if;
  return v_job.job_id;
end
$$;

-- Announces bytes that are going to come within p_window: makes document, job and event. The same user and sha256 again:
--   bytes known            the first document and its job, `duplicate`, no deadline
--   bytes still awaited    the same document and job with the newer claim's name, size, type, metadata and deadline; a job that
--                          has ended starts again
-- A document that is being deleted raises UP003.
create function upload_pipeline.reserve_document(
  p_document_id    uuid,
  p_user_id        uuid,
  p_filename       text,
  p_media_type     text,
  p_file_bytes     bigint,
  p_file_sha256    text,
  p_raw_key        text,
  p_window         interval,
  p_metadata       jsonb default '{}',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (document_id uuid, job_id uuid, duplicate boolean, raw_key text, upload_deadline timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now      timestamptz := upload_pipeline.now();
  v_deadline timestamptz := v_now + p_window;
  v_made     boolean;
  v_document upload_pipeline.documents;
  v_job      uuid;
begin
  if p_window is null or p_window <= interval '0' then
    raise exception 'p_window is %, it must be longer than nothing', p_window using errcode = '22023';
  end if;
  -- once more where the document that stood in the way has gone, or got its bytes, since it was met
  loop
    insert into upload_pipeline.documents as d
      (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata, upload_deadline, created_at,
       updated_at)
    values (p_document_id, p_user_id, p_filename, p_media_type, p_file_bytes, p_file_sha256, p_raw_key, p_metadata,
            v_deadline, v_now, v_now)
    -- of any index: told one, a rival that has only just begun breaks the others
    on conflict do nothing
    returning d.* into v_document;
    v_made := found;
    exit when v_made;
    return query
      select f.document_id, f.job_id, true, d.raw_key, null::timestamptz
        from upload_pipeline.find_duplicate(p_user_id, p_file_sha256) f
        join upload_pipeline.documents d on d.document_id = f.document_id;
    if found then
      return;
    end if;
    v_document := upload_pipeline.lock_awaited(p_user_id, p_file_sha256);
    exit when v_document.document_id is not null;
    perform upload_pipeline.check_no_stranger(p_document_id, p_user_id);
  end loop;

  if not v_made then
    update upload_pipeline.documents d
       set filename = p_filename, media_type = p_media_type, file_bytes = p_file_bytes, metadata = p_metadata,
           upload_deadline = v_deadline, updated_at = v_now
     where d.document_id = v_document.document_id;
  end if;
  perform upload_pipeline.record_event('document_reserved', p_user_id => p_user_id,
    p_document_id => v_document.document_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('filename', p_filename, 'media_type', p_media_type, 'file_bytes', p_file_bytes,
                                    'upload_deadline', v_deadline));
  v_job := upload_pipeline.resume_upload_job(v_document.document_id, p_user_id, p_priority, p_correlation_id);
  return query select v_document.document_id, v_job, false, v_document.raw_key, v_deadline;
end
$$;

-- Somebody says that the bytes are there: the job looks now, and the deadline stays, since nobody has checked them yet.
-- Says nothing new of a document that has its bytes. False: there is no such document.
create function upload_pipeline.announce_upload(p_document_id uuid)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job     upload_pipeline.upload_jobs := upload_pipeline.lock_latest_job(p_document_id);
  v_awaited boolean;
begin
  -- the job's lock is enough: whoever ends the wait holds it
  select d.upload_deadline is not null into v_awaited from upload_pipeline.documents d
   where d.document_id = p_document_id and d.deleted_at is null;
  if not found then
    return false;
  end if;
  if v_awaited then
    perform upload_pipeline.look_for_upload(v_job);
  end if;
  return true;
end
$$;

-- The bytes are in place and are those that were announced; p_media_type and p_file_bytes are what they were found to be.
-- Doing it twice is doing it once. False: there is no such document any more. p_created_at tells it from one that was made
-- anew since the sender was let in: the deletion in between may have taken the bytes.
create function upload_pipeline.confirm_upload(
  p_document_id uuid,
  p_created_at  timestamptz,
  p_media_type  text,
  p_file_bytes  bigint
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job      upload_pipeline.upload_jobs := upload_pipeline.lock_latest_job(p_document_id);
  v_document upload_pipeline.documents;
begin
  select d.* into v_document from upload_pipeline.documents d
   where d.document_id = p_document_id and d.created_at = p_created_at and d.deleted_at is null
     for no key update;
  if not found then
    return false;
  end if;
  if v_document.upload_deadline is null then
    return true;
  end if;
  update upload_pipeline.documents d
     set media_type = p_media_type, file_bytes = p_file_bytes, upload_deadline = null, updated_at = upload_pipeline.now()
   where d.document_id = p_document_id;
  perform upload_pipeline.record_event('document_accepted', p_user_id => v_document.user_id, p_document_id => p_document_id,
    p_correlation_id => coalesce(v_job.correlation_id, ''),
    p_payload => jsonb_build_object('filename', v_document.filename, 'media_type', p_media_type, 'file_bytes', p_file_bytes));
  perform upload_pipeline.look_for_upload(v_job);
  return true;
end
$$;

-- queued -> job_validated of a document whose bytes were awaited: they are in the store and are those that were announced.
create function upload_pipeline.commit_validation(
  p_job_id     uuid,
  p_token      bigint,
  p_media_type text,
  p_keep       boolean default true,
  p_ttl        interval default '60 seconds'
)
returns table (job_id uuid, stage text, state upload_pipeline.job_state, lease_expires_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_job      upload_pipeline.upload_jobs := upload_pipeline.check_step(p_job_id, p_token, 'job_validated');
  v_document upload_pipeline.documents;
begin
  if v_job.stage = 'job_validated' then
    return query select v_job.job_id, v_job.stage, v_job.state, v_job.lease_expires_at;
    return;
  end if;
  -- unless they have come by another way meanwhile, which found the type as well
  update upload_pipeline.documents d
     set media_type = p_media_type, upload_deadline = null, updated_at = upload_pipeline.now()
   where d.document_id = v_job.document_id and d.upload_deadline is not null
  returning d.* into v_document;
  if found then
    perform upload_pipeline.record_event('document_accepted', p_user_id => v_document.user_id,
      p_document_id => v_document.document_id, p_correlation_id => v_job.correlation_id,
      p_payload => jsonb_build_object('filename', v_document.filename, 'media_type', p_media_type,
                                      'file_bytes', v_document.file_bytes));
  end if;
  return query select * from upload_pipeline.advance_job(p_job_id, p_token, 'queued', 'job_validated', p_keep, p_ttl);
end
$$;

-- sql/schema/06_access.sql

-- Who may call the HTTP service, and how often. Nobody reads these tables: the functions below say what has to be known.

-- One row a key. The key itself is random (256 bits) and is not kept: a plain SHA-256 of it cannot be guessed back, so
-- nothing slower is needed. `prefix` is the part of a key that is no secret and finds its row.
create table upload_pipeline.api_keys (
  key_id       uuid primary key default gen_random_uuid(),
  prefix       text not null unique,
  key_sha256   text not null,
  user_id      uuid not null,
  name         text not null,
  roles        text[] not null default '{}',
  created_at   timestamptz not null default upload_pipeline.now(),
  expires_at   timestamptz,
  revoked_at   timestamptz,
  last_used_at timestamptz,
  constraint api_keys_prefix check (prefix ~ '^[0-9a-f]{12}$'),
  constraint api_keys_sha256 check (key_sha256 ~ '^[0-9a-f]{64}$'),
  constraint api_keys_name check (name <> '' and length(name) <= 200),
  constraint api_keys_user check (user_id <> '00000000-0000-0000-0000-000000000000')
);

-- a user's keys
create index api_keys_user on upload_pipeline.api_keys (user_id, created_at desc);

create function upload_pipeline.create_api_key(
  p_prefix     text,
  p_key_sha256 text,
  p_user_id    uuid,
  p_name       text,
  p_roles      text[] default '{}',
  p_expires_at timestamptz default null
)
returns uuid
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.api_keys (prefix, key_sha256, user_id, name, roles, expires_at)
  values (p_prefix, p_key_sha256, p_user_id, p_name, p_roles, p_expires_at)
  returning key_id
$$;

-- The key of a prefix, where it may be used now. Whoever asks compares the hash, in constant time.
create function upload_pipeline.find_api_key(p_prefix text)
returns table (key_id uuid, key_sha256 text, user_id uuid, roles text[], expires_at timestamptz, stale boolean)
language sql
stable
security definer
set search_path = ''
as $$
  select k.key_id, k.key_sha256, k.user_id, k.roles, k.expires_at,
         k.last_used_at is null or k.last_used_at < upload_pipeline.now() - interval '1 minute'
    from upload_pipeline.api_keys k
   where k.prefix = p_prefix and k.revoked_at is null
     and (k.expires_at is null or k.expires_at > upload_pipeline.now())
$$;

-- Notes that a key was used: to the minute, so that a busy key is not a busy row. A row that another call holds is being
-- noted there.
create function upload_pipeline.note_api_key_use(p_key_id uuid)
returns void
language sql
security definer
set search_path = ''
as $$
  update upload_pipeline.api_keys k set last_used_at = upload_pipeline.now()
    from (select n.key_id from upload_pipeline.api_keys n
           where n.key_id = p_key_id
             and (n.last_used_at is null or n.last_used_at < upload_pipeline.now() - interval '1 minute')
             for no key update skip locked) n
   where k.key_id = n.key_id
$$;

-- True where this call revoked the key; false where it was revoked before. A key that there is not raises UP002.
create function upload_pipeline.revoke_api_key(p_key_id uuid)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
begin
  update upload_pipeline.api_keys set revoked_at = upload_pipeline.now()
   where key_id = p_key_id and revoked_at is null;
  if found then
    return true;
  end if;
  perform from upload_pipeline.api_keys where key_id = p_key_id;
  if not found then
    raise exception 'there is no API key %', p_key_id
      using errcode = 'UP002', hint = '`upload-pipeline keys list` shows the keys.';
  end if;
  return false;
end
$$;

-- All keys, or those of one user, newest first, without what could be used.
create function upload_pipeline.list_api_keys(p_user_id uuid default null, p_limit integer default 100)
returns table (
  key_id uuid, prefix text, user_id uuid, name text, roles text[], created_at timestamptz, expires_at timestamptz,
  revoked_at timestamptz, last_used_at timestamptz
)
language sql
stable
security definer
set search_path = ''
as $$
  select k.key_id, k.prefix, k.user_id, k.name, k.roles, k.created_at, k.expires_at, k.revoked_at, k.last_used_at
    from upload_pipeline.api_keys k
   where p_user_id is null or k.user_id = p_user_id
   order by k.created_at desc, k.key_id
   limit p_limit
$$;

-- Token buckets, each one instant: when the bucket is full again. A bucket of n tokens that fills up in a period p gains
-- one each p/n; taking one moves the instant p/n further; there is one left while the instant is not more than p - p/n
-- ahead (the generic cell rate algorithm). A bucket that is full needs no row.
-- Unlogged: a request then waits for no disk. After a crash of the server all buckets are full.
create unlogged table upload_pipeline.rate_limits (
  bucket  text primary key,
  full_at timestamptz not null,
  constraint rate_limits_bucket check (length(bucket) <= 500)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 500);

create index rate_limits_full on upload_pipeline.rate_limits (full_at);

-- Takes one token from each bucket, or none from any where one of them is empty. Atomic and exact: the buckets are
-- locked in the order of their names, so calls that share some take turns and never wait for each other in a circle.
--
-- One row a bucket, in the order asked: whether it had a token (all of them: they were taken), the tokens left, the
-- seconds until it has one again (0 where it has or had), and when it is full again. A bucket is named once in a call;
-- a limit is 1 or more, a period at least a microsecond for each token.
create function upload_pipeline.take_tokens(p_buckets text[], p_limits integer[], p_periods interval[])
returns table (allowed boolean, remaining integer, retry_after double precision, full_at timestamptz)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_steps   interval[];
  v_allowed boolean;
begin
  -- Every request of every user comes by here. What a crash of the server may forget is the last fraction of a second of
  -- taken tokens; waiting for the disk is not worth that. It holds for the caller's transaction.
  perform set_config('synchronous_commit', 'off', true);

  -- Rounded down to the microsecond, so that n steps are never longer than the period and n tokens are n.
  select array_agg(floor(extract(epoch from a.period) * 1000000 / a.tokens) * interval '1 microsecond' order by a.place)
    into v_steps
    from unnest(p_limits, p_periods) with ordinality a (tokens, period, place);

  -- Locks every bucket; one that is there is not written.
  insert into upload_pipeline.rate_limits as r (bucket, full_at)
  select a.bucket, v_now from unnest(p_buckets) a (bucket) order by a.bucket
  on conflict (bucket) do update set full_at = r.full_at where false;

  -- A call that waited is older than the one before it: time does not run backwards in a bucket.
  select bool_and(greatest(r.full_at, v_now) - v_now <= a.period - a.step) into v_allowed
    from unnest(p_buckets, p_periods, v_steps) a (bucket, period, step)
    join upload_pipeline.rate_limits r on r.bucket = a.bucket;

  if v_allowed then
    update upload_pipeline.rate_limits r set full_at = greatest(r.full_at, v_now) + a.step
      from unnest(p_buckets, v_steps) a (bucket, step)
     where r.bucket = a.bucket;
  end if;

  return query
    select v_allowed or s.ahead <= s.period - s.step,
           least(s.tokens, floor(extract(epoch from s.period - s.ahead) / extract(epoch from s.step))::integer),
           case when v_allowed then 0
                else greatest(extract(epoch from s.ahead - (s.period - s.step)), 0) end::double precision,
           v_now + s.ahead
      from (select a.place, a.tokens, a.period, a.step, greatest(r.full_at - v_now, interval '0') as ahead
              from unnest(p_buckets, p_limits, p_periods, v_steps)
                     with ordinality a (bucket, tokens, period, step, place)
              join upload_pipeline.rate_limits r on r.bucket = a.bucket) s
     order by s.place;
end
$$;

-- What was taken from some buckets counts for others instead, place by place, down to none left: when two users turn out
-- to be one. The first buckets are full again, so doing it twice is doing it once. Locks them all in the order of names.
create function upload_pipeline.pour_buckets(p_from text[], p_into text[], p_periods interval[])
returns void
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now timestamptz := upload_pipeline.now();
begin
  insert into upload_pipeline.rate_limits as r (bucket, full_at)
  select a.bucket, v_now from unnest(p_from || p_into) a (bucket) order by a.bucket
  on conflict (bucket) do update set full_at = r.full_at where false;

  update upload_pipeline.rate_limits r
     set full_at = least(v_now + a.period, greatest(r.full_at, v_now) + (f.full_at - v_now))
    from unnest(p_from, p_into, p_periods) a (source, target, period)
    join upload_pipeline.rate_limits f on f.bucket = a.source
   where r.bucket = a.target and f.full_at > v_now;
  delete from upload_pipeline.rate_limits r where r.bucket = any (p_from);
end
$$;

-- Removes buckets that are full; how many. Part of maintenance.
create function upload_pipeline.forget_full_buckets(p_limit integer default 10000)
returns integer
language sql
security definer
set search_path = ''
as $$
  with gone as (
    delete from upload_pipeline.rate_limits r
     using (select f.bucket from upload_pipeline.rate_limits f
             where f.full_at < upload_pipeline.now() - interval '1 minute'
             order by f.full_at limit p_limit for update skip locked) f
     where r.bucket = f.bucket
    returning 1
  )
  select count(*)::integer from gone
$$;

-- a user's jobs that wait for their time
create index upload_jobs_waiting on upload_pipeline.upload_jobs (user_id) where state = 'retryable';

-- How many jobs of a user have not ended, counted to p_limit at most: each state by its own index, whatever the number
-- of jobs that have ended, or are other users'. Filling a model is no job that the user asked for.
create function upload_pipeline.count_open_jobs(p_user_id uuid, p_limit integer)
returns integer
language plpgsql
stable
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_pool  text;
  v_part  integer;
  v_count integer;
begin
  select count(*) into v_count
    from (select from upload_pipeline.upload_jobs j
           where j.state = 'retryable' and j.user_id = p_user_id and j.pipeline <> 'reembed' limit p_limit) j;
  for v_pool in select distinct s.pool from upload_pipeline.stages s where s.pipeline <> 'reembed' loop
    select count(*) into v_part
      from (select from upload_pipeline.upload_jobs j
             where j.state = 'queued' and j.pool = v_pool and j.user_id = p_user_id and j.pipeline <> 'reembed'
             limit p_limit) j;
    v_count := v_count + v_part;
    select count(*) into v_part
      from (select from upload_pipeline.upload_jobs j
             where j.state = 'working' and j.pool = v_pool and j.user_id = p_user_id and j.pipeline <> 'reembed'
             limit p_limit) j;
    v_count := v_count + v_part;
  end loop;
  return least(v_count, p_limit);
end
$$;

-- The versions in the ledger of migrations, so that a process that may not read the ledger can tell whether the schema
-- is the one it was written for. The ledger is made by whoever runs migrations, and so is looked up when it is asked for.
create function upload_pipeline.applied_migrations()
returns setof text
language plpgsql
stable
security definer
set search_path = ''
as $$
begin
  if to_regclass('supabase_migrations.schema_migrations') is not null then
    return query execute 'select version::text from supabase_migrations.schema_migrations';
  end if;
end
$$;

-- sql/schema/06_admission.sql

-- Admission of large requests. The bytes that requests are sending now, plus those of the jobs at work, stay under a
-- limit that all processes of the HTTP service share. A request that is refused here has not sent its body yet.

-- One row a request that is sending its body. Unlogged: a request does not outlive the server that a crash ended, and
-- neither need its row. `expires_at` is renewed by the process that serves the request, so what a killed process held
-- is free again a few seconds later.
create unlogged table upload_pipeline.admissions (
  admission_id uuid primary key,
  bytes        bigint not null,
  expires_at   timestamptz not null,
  constraint admissions_bytes check (bytes >= 0)
);

-- The bytes of the jobs at work now. Read from the partial index of working jobs, of which there are few. Who fills a
-- model opens no file.
create function upload_pipeline.bytes_at_work()
returns bigint
language sql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set jit = off
as $$
  select coalesce(sum(coalesce(d.file_bytes, p.file_bytes)), 0)::bigint
    from upload_pipeline.upload_jobs j
    left join upload_pipeline.documents d on d.document_id = j.document_id
    left join upload_pipeline.photos p on p.photo_id = j.photo_id
   where j.state = 'working' and j.pipeline <> 'reembed'
$$;

-- Admits a request of p_bytes, or does not, and says what is in use then. Exact: one call at a time, each with the rows
-- of all before it in sight. Asking again for the same request answers the same. Where the request makes the use pass
-- four fifths of the limit an event says so, once for each time that it is passed.
create function upload_pipeline.admit_bytes(
  p_admission_id   uuid,
  p_bytes          bigint,
  p_limit          bigint,
  p_ttl            interval default '20 seconds',
  p_correlation_id text default ''
)
returns table (admitted boolean, bytes_in_use bigint)
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now    timestamptz := upload_pipeline.now();
  v_before bigint;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'admit_bytes needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'The sum must be read after the lock is won.';
  end if;
  -- the table is its own name for the lock
  perform pg_advisory_xact_lock('upload_pipeline.admissions'::regclass::oid::bigint);
  delete from upload_pipeline.admissions a where a.expires_at <= v_now;
  select upload_pipeline.bytes_at_work() + coalesce(sum(a.bytes), 0) into v_before
    from upload_pipeline.admissions a where a.admission_id <> p_admission_id;
  if v_before + p_bytes > p_limit then
    delete from upload_pipeline.admissions a where a.admission_id = p_admission_id;
    return query select false, v_before;
    return;
  end if;
  insert into upload_pipeline.admissions as a (admission_id, bytes, expires_at)
  values (p_admission_id, p_bytes, v_now + p_ttl)
  on conflict (admission_id) do update set bytes = excluded.bytes, expires_at = excluded.expires_at;
  if v_before < p_limit * 0.8 and v_before + p_bytes >= p_limit * 0.8 then
    perform upload_pipeline.record_event('capacity_warning', p_severity => 'warning', p_correlation_id => p_correlation_id,
      p_payload => jsonb_build_object('bytes_in_use', v_before + p_bytes, 'limit', p_limit));
  end if;
  return query select true, v_before + p_bytes;
end
$$;

-- Keeps the admissions of a process's requests; one that had expired meanwhile is there again, since its bytes are.
create function upload_pipeline.renew_admissions(p_admission_ids uuid[], p_bytes bigint[], p_ttl interval default '20 seconds')
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.admissions as a (admission_id, bytes, expires_at)
  select r.admission_id, r.bytes, upload_pipeline.now() + p_ttl
    from unnest(p_admission_ids, p_bytes) r (admission_id, bytes)
   order by r.admission_id
  on conflict (admission_id) do update set expires_at = excluded.expires_at
$$;

-- The request has ended, whatever became of it. Safe to repeat.
create function upload_pipeline.release_admission(p_admission_id uuid)
returns void
language sql
security definer
set search_path = ''
as $$
  delete from upload_pipeline.admissions a where a.admission_id = p_admission_id
$$;

-- sql/schema/06_batches.sql

-- Batches: files that came in one request, and what became of each. The queue knows nothing of them: a batch is counted
-- from its members and their jobs, whenever somebody asks, so its counts add up after any crash.

-- One row a batch. `completion_noted_at` says that its completion was noticed and written down; readers do not use it.
create table upload_pipeline.batches (
  batch_id            uuid primary key,
  user_id             uuid not null,
  total               integer not null,
  warnings            text[] not null default '{}',
  correlation_id      text not null default '',
  created_at          timestamptz not null default upload_pipeline.now(),
  completion_noted_at timestamptz,
  -- what the members' composite key points at
  unique (batch_id, user_id),
  constraint batches_total check (total >= 1),
  constraint batches_correlation check (length(correlation_id) <= 200)
);

-- a user's batches: when a session's become those of a user
create index batches_user on upload_pipeline.batches (user_id);
-- note_completed_batches: those that are not known to be completed
create index batches_unnoted on upload_pipeline.batches (batch_id) where completion_noted_at is null;

-- One row a file. Either it was refused (`error_code`), or it is a document with a job. Of a job that has been removed,
-- with its document or by an operator, `settled` keeps what the member had come to: done, or deleted before it was.
create table upload_pipeline.batch_members (
  batch_id      uuid not null,
  user_id       uuid not null,
  ordinal       integer not null,
  filename      text not null,
  document_id   uuid references upload_pipeline.documents on delete set null,
  job_id        uuid references upload_pipeline.upload_jobs on delete set null,
  duplicate     boolean not null default false,
  error_code    text,
  error_message text,
  settled       text,
  settled_at    timestamptz,
  primary key (batch_id, ordinal),
  foreign key (batch_id, user_id) references upload_pipeline.batches (batch_id, user_id) on update cascade on delete cascade,
  constraint batch_members_filename check (filename <> '' and length(filename) <= 1024),
  constraint batch_members_error check ((error_code is null) = (error_message is null) and error_code ~ '^[A-Z][A-Z0-9_]*$'),
  constraint batch_members_settled check (settled in ('done', 'deleted') and (settled is null) = (settled_at is null)),
  -- every member counts as something
  constraint batch_members_whole check (num_nonnulls(error_code, job_id, settled) >= 1)
);

-- settle_batch_members: the members of a job that goes; the foreign key to jobs
create index batch_members_job on upload_pipeline.batch_members (job_id) where job_id is not null;
-- the foreign key to documents
create index batch_members_document on upload_pipeline.batch_members (document_id) where document_id is not null;

-- Keeps what a member came to when its job is removed: a batch whose documents were processed and deleted later was
-- processed all the same.
create function upload_pipeline.settle_batch_members()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
begin
  update upload_pipeline.batch_members m
     set settled = case old.state when 'done' then 'done' else 'deleted' end,
         settled_at = coalesce(old.finished_at, upload_pipeline.now())
   where m.job_id = old.job_id;
  return old;
end
$$;

create trigger settle_batch_members before delete on upload_pipeline.upload_jobs
  for each row execute function upload_pipeline.settle_batch_members();

-- What became of each file of a batch: `processed`, `failed` with its reason, or `open`. `limit 1` makes it one index
-- look-up a member, whatever the planner thinks of the size of the tables.
create view upload_pipeline.batch_member_overview with (security_invoker = true) as
select m.batch_id, m.user_id, m.ordinal, m.filename, m.document_id, m.job_id, m.duplicate, j.stage, j.state,
       r.outcome, coalesce(j.finished_at, m.settled_at) as finished_at,
       case when r.outcome = 'failed' then coalesce(
         m.error_code, case when m.settled = 'deleted' then 'DOCUMENT_NOT_FOUND' when j.state = 'cancelled' then 'CANCELLED' end,
         o.error_code, 'INTERNAL') end as error_code,
       case when r.outcome = 'failed' then coalesce(
         m.error_message,
         case when m.settled = 'deleted' then 'The document was deleted before it was processed. Send the file again if that was a mistake.'
              when j.state = 'cancelled' then 'The job was cancelled. Retry the batch or the job to start it again.' end,
         o.error_message, 'The job failed, and nothing is known of why.') end as error_message
  from upload_pipeline.batch_members m
  left join lateral (
   select u.stage, u.state, u.finished_at from upload_pipeline.upload_jobs u where u.job_id = m.job_id limit 1) j on true
 cross join lateral (
   select case when m.error_code is not null or m.settled = 'deleted' or j.state in ('deadletter', 'cancelled') then 'failed'
               when m.settled = 'done' or j.state = 'done' then 'processed'
               else 'open' end as outcome) r
  left join lateral (
   select f.error_code, f.error_message from upload_pipeline.job_outcomes f
    where f.job_id = m.job_id and r.outcome = 'failed' limit 1) o on true;

-- How far a batch is: processed + failed + open = total, always. `completed_at` is when its last file came to its end.
create view upload_pipeline.batch_overview with (security_invoker = true) as
select b.batch_id, b.user_id, b.total, b.warnings, b.correlation_id, b.created_at, c.processed, c.failed, c.open,
       case when c.open > 0 then 'in_progress' when c.failed = 0 then 'completed'
            when c.processed = 0 then 'failed' else 'partial_failure' end as status,
       case when c.open = 0 then greatest(b.created_at, c.last_finished_at) end as completed_at
  from upload_pipeline.batches b
 cross join lateral (
   select count(*) filter (where m.outcome = 'processed')::integer as processed,
          count(*) filter (where m.outcome = 'failed')::integer as failed,
          count(*) filter (where m.outcome = 'open')::integer as open,
          max(m.finished_at) as last_finished_at
     from upload_pipeline.batch_member_overview m
    where m.batch_id = b.batch_id) c;

-- Writes down, once, that batches are completed: those among p_batch_ids that are, and of which it was not written yet.
create function upload_pipeline.note_batches(p_batch_ids uuid[])
returns table (
  batch_id uuid, user_id uuid, correlation_id text, status text, total integer, processed integer, failed integer,
  seconds double precision
)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_now timestamptz := upload_pipeline.now();
begin
  return query
  with completed as materialized (
    select b.batch_id from upload_pipeline.batches b
     where b.batch_id = any (p_batch_ids) and b.completion_noted_at is null
       and not exists (select from upload_pipeline.batch_member_overview m
                        where m.batch_id = b.batch_id and m.outcome = 'open')
     order by b.batch_id
       for no key update skip locked
  ), noted as (
    update upload_pipeline.batches b set completion_noted_at = v_now
      from completed c
     where b.batch_id = c.batch_id
    returning b.batch_id
  ), told as materialized (
    select o.* from noted n join upload_pipeline.batch_overview o on o.batch_id = n.batch_id
  ), logged as (
    insert into upload_pipeline.events (at, code, severity, user_id, correlation_id, payload)
    select v_now, 'batch_completed',
           case when t.failed > 0 then 'warning' else 'info' end::upload_pipeline.event_severity, t.user_id, t.correlation_id,
           jsonb_build_object('batch_id', t.batch_id, 'status', t.status, 'total', t.total, 'processed', t.processed,
                              'failed', t.failed)
      from told t
  )
  select t.batch_id, t.user_id, t.correlation_id, t.status, t.total, t.processed, t.failed,
         extract(epoch from t.completed_at - t.created_at)::double precision
    from told t;
end
$$;

-- Looks for batches that have come to their end since the last look, and notes them. Any worker runs it, bounded, beside
-- others: each looks at some of the open batches, drawn at random, so that none waits behind those that stay open.
create function upload_pipeline.note_completed_batches(p_limit integer default 200)
returns table (
  batch_id uuid, user_id uuid, correlation_id text, status text, total integer, processed integer, failed integer,
  seconds double precision
)
language sql
security definer
set search_path = ''
as $$
  select n.* from upload_pipeline.note_batches(array(
    select b.batch_id from upload_pipeline.batches b
     where b.completion_noted_at is null order by random() limit p_limit)) n
$$;

-- The files of a batch are in the store, but for those that were refused: makes the batch, its documents, jobs and events.
-- p_members is an array of objects in the order of the files: `ordinal`, `filename`, and either `error_code` and
-- `error_message`, or `document_id`, `media_type`, `file_bytes`, `file_sha256`, `raw_key`, `metadata`, as accept_document
-- has them. Bytes that the user has sent before, or twice in this batch, are the first document and its job, `duplicate`.
-- Returns the members in order. The batch's id is the caller's, so that asking again because an answer was lost answers
-- the same and makes nothing.
--
-- Locks documents in id order, inserts jobs, then the lane: what accept_document does for one, in the same order, so that
-- batches and single files with the same bytes wait for each other and never in a circle.
create function upload_pipeline.create_batch(
  p_batch_id       uuid,
  p_user_id        uuid,
  p_members        jsonb,
  p_warnings       text[] default '{}',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns setof upload_pipeline.batch_members
language plpgsql
security definer
set search_path = ''
set jit = off
as $$
#variable_conflict use_column
declare
  v_now  timestamptz := upload_pipeline.now();
  v_made uuid[];
  v_ours uuid[]; -- with those that awaited their bytes
  v_file record;
begin
  insert into upload_pipeline.batches (batch_id, user_id, total, warnings, correlation_id, created_at)
  values (p_batch_id, p_user_id, jsonb_array_length(p_members), p_warnings, p_correlation_id, v_now)
  on conflict (batch_id) do nothing;
  if not found then
    return query select m.* from upload_pipeline.batch_members m where m.batch_id = p_batch_id order by m.ordinal;
    return;
  end if;

  with asked as materialized (
    select distinct on (m.file_sha256) m.*
      from jsonb_to_recordset(p_members) m (ordinal integer, filename text, document_id uuid, media_type text,
        file_bytes bigint, file_sha256 text, raw_key text, metadata jsonb)
     where m.file_sha256 is not null
     order by m.file_sha256, m.ordinal
  ), made as (
    insert into upload_pipeline.documents
      (document_id, user_id, filename, media_type, file_bytes, file_sha256, raw_key, metadata, created_at, updated_at)
    select a.document_id, p_user_id, a.filename, a.media_type, a.file_bytes, a.file_sha256, a.raw_key,
           coalesce(a.metadata, '{}'), v_now, v_now
      from asked a
     order by a.document_id
    -- of any index: told one, a rival that has only just begun breaks the others
    on conflict do nothing
    returning document_id
  ), accepted as materialized (
    select a.* from made d join asked a on a.document_id = d.document_id
  ), logged as (
    insert into upload_pipeline.events (at, code, user_id, document_id, correlation_id, payload)
    select v_now, 'document_accepted', p_user_id, a.document_id, p_correlation_id,
           jsonb_build_object('filename', a.filename, 'media_type', a.media_type, 'file_bytes', a.file_bytes,
                              'batch_id', p_batch_id)
      from accepted a order by a.ordinal
  )
  select array_agg(a.document_id order by a.ordinal) into v_made from accepted a;
  v_ours := coalesce(v_made, '{}');

  -- none of the documents goes before the members name them
  perform from upload_pipeline.documents d
   where d.user_id = p_user_id
     and d.file_sha256 in (select m.value ->> 'file_sha256' from jsonb_array_elements(p_members) m)
   order by d.document_id for key share;

  -- Documents that await these bytes have them now. Their jobs are locked before any of them takes the lane.
  perform from upload_pipeline.upload_jobs j
   where j.document_id = any (array(
           select d.document_id from jsonb_array_elements(p_members) m
             join upload_pipeline.documents d on d.user_id = p_user_id and d.file_sha256 = m.value ->> 'file_sha256'
            where d.upload_deadline is not null))
   order by j.job_id for no key update;
  for v_file in
    select distinct on (d.document_id) m.*
      from jsonb_to_recordset(p_members) m (ordinal integer, filename text, document_id uuid, media_type text,
        file_bytes bigint, file_sha256 text, raw_key text, metadata jsonb)
      join upload_pipeline.documents d on d.user_id = p_user_id and d.file_sha256 = m.file_sha256
     where d.upload_deadline is not null and d.deleted_at is null
     order by d.document_id, m.ordinal
  loop
    begin
      v_ours := v_ours || array(
        select a.document_id from upload_pipeline.accept_document(v_file.document_id, p_user_id, v_file.filename, v_file.media_type,
          v_file.file_bytes, v_file.file_sha256, v_file.raw_key, coalesce(v_file.metadata, '{}'), p_priority, p_correlation_id) a
         where not a.duplicate);
    exception when sqlstate 'UP003' then
      null; -- it changes at this moment: its member says so below
    end;
  end loop;

  if v_made is not null then
    perform upload_pipeline.enqueue_jobs(
      v_made, array_fill(p_user_id, array[cardinality(v_made)]), 'document', p_priority, p_correlation_id);
  end if;

  insert into upload_pipeline.batch_members
    (batch_id, user_id, ordinal, filename, document_id, job_id, duplicate, error_code, error_message)
  select p_batch_id, p_user_id, m.ordinal, m.filename, d.document_id, j.job_id,
         d.document_id is not null
           and (d.document_id <> all (v_ours) or row_number() over (partition by d.document_id order by m.ordinal) > 1),
         coalesce(m.error_code, case when d.document_id is null then 'INVALID_STATE' when j.job_id is null then 'JOB_NOT_FOUND' end),
         coalesce(m.error_message, case
           when d.document_id is null then 'A document with the same bytes changes at this moment. Send the file again in a while.'
           when j.job_id is null then 'The document of these bytes has no job any more. Delete it, and send the file again.' end)
    from jsonb_to_recordset(p_members) m (ordinal integer, filename text, file_sha256 text, error_code text, error_message text)
    left join upload_pipeline.documents d on d.user_id = p_user_id and d.file_sha256 = m.file_sha256 and d.deleted_at is null
                                          and d.upload_deadline is null
    left join lateral (
      select u.job_id from upload_pipeline.upload_jobs u
       where u.document_id = d.document_id and u.pipeline = 'document'
       order by u.seq desc limit 1) j on true;

  update upload_pipeline.batches b
     set warnings = b.warnings || w.told
    from (select array_agg(case
                   when m.document_id = any (v_ours) then format('"%s" has the same bytes as "%s": they are one document', m.filename, (
                     select f.filename from upload_pipeline.batch_members f
                      where f.batch_id = p_batch_id and f.document_id = m.document_id and not f.duplicate))
                   else format('"%s" was sent before: the document stays as it is, with the metadata that it has', m.filename) end
                   order by m.ordinal) as told
            from upload_pipeline.batch_members m
           where m.batch_id = p_batch_id and m.duplicate) w
   where b.batch_id = p_batch_id and w.told is not null;

  perform upload_pipeline.record_event('batch_accepted', p_user_id => p_user_id, p_correlation_id => p_correlation_id,
    p_payload => jsonb_build_object('batch_id', p_batch_id, 'total', jsonb_array_length(p_members),
                                    'documents', cardinality(v_ours)));
  return query select m.* from upload_pipeline.batch_members m where m.batch_id = p_batch_id order by m.ordinal;
end
$$;

-- Starts again what failed of a batch, each job where it stopped. Returns its failed members: `retried`, or why not. A
-- file that was refused cannot be retried, since nothing of it was kept. A batch that does not exist raises UP002.
create function upload_pipeline.retry_batch(p_batch_id uuid, p_correlation_id text default null)
returns table (ordinal integer, filename text, job_id uuid, retried boolean, error_code text, error_message text)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_failed  record;
  v_seen    uuid[] := '{}';
  v_refused jsonb := '{}';
begin
  perform from upload_pipeline.batches b where b.batch_id = p_batch_id;
  if not found then
    raise exception 'there is no batch %', p_batch_id using errcode = 'UP002', hint = 'Check the id.';
  end if;
  -- all of them before any of them takes the lane
  perform from upload_pipeline.upload_jobs j
   where j.job_id = any (array(select m.job_id from upload_pipeline.batch_members m where m.batch_id = p_batch_id))
   order by j.job_id for no key update;
  for v_failed in
    select m.* from upload_pipeline.batch_member_overview m
     where m.batch_id = p_batch_id and m.outcome = 'failed' order by m.ordinal
  loop
    if v_failed.job_id is not null and v_failed.job_id <> all (v_seen) then
      v_seen := v_seen || v_failed.job_id;
      begin
        perform upload_pipeline.retry_job(v_failed.job_id, p_correlation_id => p_correlation_id);
      exception when sqlstate 'UP003' or sqlstate 'UP004' then
        v_refused := v_refused || jsonb_build_object(v_failed.job_id::text, sqlerrm);
      end;
    end if;
    ordinal := v_failed.ordinal;
    filename := v_failed.filename;
    job_id := v_failed.job_id;
    retried := v_failed.job_id is not null and not v_refused ? v_failed.job_id::text;
    error_code := case when not retried then case when v_refused ? v_failed.job_id::text then 'INVALID_STATE' else v_failed.error_code end end;
    error_message := case when not retried then coalesce(v_refused ->> v_failed.job_id::text, v_failed.error_message) end;
    return next;
  end loop;
  if cardinality(v_seen) > (select count(*) from jsonb_object_keys(v_refused)) then
    update upload_pipeline.batches b set completion_noted_at = null where b.batch_id = p_batch_id;
  end if;
end
$$;

-- Stops what is still under way of a batch: jobs that it has made, not those that its bytes had before it. Returns the
-- jobs with their states; safe to repeat. A batch that does not exist raises UP002.
create function upload_pipeline.cancel_batch(p_batch_id uuid, p_correlation_id text default null)
returns table (job_id uuid, state upload_pipeline.job_state, cancel_requested boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_job uuid;
begin
  perform from upload_pipeline.batches b where b.batch_id = p_batch_id;
  if not found then
    raise exception 'there is no batch %', p_batch_id using errcode = 'UP002', hint = 'Check the id.';
  end if;
  for v_job in
    select j.job_id from upload_pipeline.upload_jobs j
     where j.job_id = any (array(select m.job_id from upload_pipeline.batch_members m
                                  where m.batch_id = p_batch_id and not m.duplicate))
       and j.finished_at is null
     order by j.job_id
  loop
    return query select c.job_id, c.state, c.cancel_requested from upload_pipeline.cancel_job(v_job, p_correlation_id) c;
  end loop;
end
$$;

-- sql/schema/06_estimates.sql

-- How long a job still takes: what the recent past says of each stage by the size of files, and what is in front of it.

-- The typical seconds at work of each stage, by size of file. A report, made anew by refresh_stage_durations; nothing
-- but estimates reads it. `size_class` c holds files of up to 64 KiB x 4^c.
create table upload_pipeline.stage_durations (
  pipeline     text not null,
  stage        text not null,
  size_class   smallint not null,
  seconds      double precision not null,
  samples      integer not null,
  refreshed_at timestamptz not null default upload_pipeline.now(),
  primary key (pipeline, stage, size_class),
  constraint stage_durations_seconds check (seconds >= 0),
  constraint stage_durations_samples check (samples > 0)
);

-- The size class of a file: 0 up to 64 KiB, 1 up to 256 KiB, 2 up to 1 MiB, and so on; 6 for all above 64 MiB.
create function upload_pipeline.size_class(p_bytes bigint)
returns smallint
language sql
immutable
set search_path = ''
as $$ select least(6, greatest(0, ceil(log(4, greatest(p_bytes, 1) / 65536.0))))::smallint $$;

-- Measures the stages anew: the median time at work over the last p_events events of the audit trail, from the claim or
-- the step before to the transition, waits in the queue left out. What the recent past has no sample of keeps its
-- value. Workers run it as part of maintenance; a run beside another, or within p_pause of one, does nothing.
-- Returns how many rows it wrote.
create function upload_pipeline.refresh_stage_durations(
  p_events integer default 20000,
  p_pause  interval default '15 seconds'
)
returns integer
language plpgsql
security definer
set search_path = ''
set jit = off
as $$
declare
  v_now     timestamptz := upload_pipeline.now();
  v_written integer;
begin
  if not pg_try_advisory_xact_lock(hashtextextended('upload_pipeline.refresh_stage_durations', 0))
     or exists (select from upload_pipeline.stage_durations d where d.refreshed_at > v_now - p_pause) then
    return 0;
  end if;
  with recent as materialized (
    -- the primary key of the newest partitions, read backwards
    select e.event_id, e.at, e.code, e.job_id, e.stage, e.lease_token
      from upload_pipeline.events e
     where e.at > v_now - interval '7 days' and e.at <= v_now
     order by e.at desc, e.event_id desc limit p_events
  ), passage as (
    select r.job_id, r.code, r.stage, r.at, r.lease_token,
           lead(r.code) over job as next_code, lead(r.at) over job as next_at, lead(r.lease_token) over job as next_token
      from recent r
     where r.job_id is not null and r.code not in ('document_searchable', 'photo_status_changed')
    window job as (partition by r.job_id order by r.event_id)
  ), sample as (
    select j.pipeline, p.stage, upload_pipeline.size_class(coalesce(d.file_bytes, f.file_bytes)) as size_class,
           extract(epoch from p.next_at - p.at)::double precision as seconds
      from passage p
      join upload_pipeline.upload_jobs j on j.job_id = p.job_id
      left join upload_pipeline.documents d on d.document_id = j.document_id
      left join upload_pipeline.photos f on f.photo_id = j.photo_id
     where p.code in ('job_claimed', 'job_advanced') and p.next_code in ('job_advanced', 'job_handed_on', 'job_done')
       and p.next_token = p.lease_token
  )
  insert into upload_pipeline.stage_durations as t (pipeline, stage, size_class, seconds, samples, refreshed_at)
  select s.pipeline, s.stage, s.size_class, greatest(0, percentile_cont(0.5) within group (order by s.seconds)), count(*), v_now
    from sample s
   group by s.pipeline, s.stage, s.size_class
  on conflict (pipeline, stage, size_class) do update
    set seconds = excluded.seconds, samples = excluded.samples, refreshed_at = excluded.refreshed_at;
  get diagnostics v_written = row_count;
  return v_written;
end
$$;

-- What stands before each of the caller's live jobs among p_job_ids, and when it should be done. Jobs that have ended, and
-- jobs of others, are missing from the answer. The caller is `auth.uid()`, read here. It counts what the caller may not
-- read, other users' jobs, and tells no more of them than how many there are: therefore `security definer`.
--
--   queued_ahead   ready jobs of the same pool that are claimed before this one when all lanes take turns: those before
--                  it in its own lane, and as many of each other lane. 0 for a job at work. At most 10,000, the bound of
--                  what is counted; for jobs before one with more in front an estimate.
--   estimated_completion_at
--                  now + the wait + what its stages take for files of its size. The wait is what stands before it, at the
--                  pool's present concurrency, and no less than its own lane takes at the user's cap. A stage without
--                  history at any size takes its share of p_default_seconds, which a whole document is assumed to take.
--   progress       percent: the stage's; while vectors arrive, on the way to the next stage by the share that is there
--
-- Cost: one walk over the caller's own lane and one over the heads of the others, each of at most 10,000 index entries,
-- however many jobs are asked for and however long the queue is.
create function upload_pipeline.estimate_jobs(
  p_job_ids         uuid[],
  p_default_seconds double precision default 60
)
returns table (job_id uuid, queued_ahead integer, estimated_completion_at timestamptz, progress integer)
language plpgsql
stable
security definer
set search_path = ''
set enable_seqscan = off
set enable_bitmapscan = off
set enable_mergejoin = off
set jit = off
-- The plans are the same whatever is asked for, and making them takes longer than running them: 1.5 of 2.3 ms.
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_bound  constant integer := 10000;
  v_user   uuid := auth.uid();
  v_now    timestamptz := upload_pipeline.now();
  v_pool   text;
  v_jobs   uuid[];
  v_places integer[];
  v_depths integer[];
  v_deeper integer;
  v_slots  integer;
  v_cap    integer;
begin
  if v_user is null then
    raise exception 'estimate_jobs needs a signed-in user' using errcode = '42501';
  end if;
  for v_pool, v_jobs in
    select j.pool, array_agg(j.job_id) from unnest(p_job_ids) a (job_id)
     cross join lateral (
       -- `offset 0`: by their ids, and never by reading all that the user has had, which looks cheap of an average user
       select u.job_id, u.pool, u.user_id, u.finished_at from upload_pipeline.upload_jobs u
        where u.job_id = a.job_id offset 0) j
     where j.user_id = v_user and j.finished_at is null
     group by j.pool
  loop
    -- places in the caller's own lane, in the order of v_jobs: null for a job at work; one that waits for its next try
    -- stands where it would if it were ready
    with asked as materialized (
      select a.n, j.job_id, j.state, j.priority, j.seq
        from unnest(v_jobs) with ordinality a (job_id, n)
       cross join lateral (
         select u.job_id, u.state, u.priority, u.seq from upload_pipeline.upload_jobs u where u.job_id = a.job_id) j
    ), waiting as materialized (
      (select q.job_id, q.priority, q.seq from upload_pipeline.upload_jobs q
        where q.pool = v_pool and q.user_id = v_user and q.state = 'queued'
        order by q.pool, q.user_id, q.priority desc, q.seq limit v_bound)
      union all
      select a.job_id, a.priority, a.seq from asked a where a.state = 'retryable'
    ), placed as materialized (
      select w.job_id, (row_number() over (order by w.priority desc, w.seq) - 1)::integer as place from waiting w
    )
    select array_agg(case when a.state <> 'working' then coalesce(p.place, v_bound) end order by a.n) into v_places
      from asked a left join placed p on p.job_id = a.job_id;

    -- how deep each other lane is, as far as the last place asked for
    select array_agg(d.jobs) into v_depths
      from (
        select count(*)::integer as jobs
          from (
            select l.user_id from upload_pipeline.lanes l
             cross join lateral (
               select from upload_pipeline.upload_jobs q
                where q.pool = l.pool and q.user_id = l.user_id and q.state = 'queued'
                order by q.pool, q.user_id, q.priority desc, q.seq
                limit (select coalesce(max(p), 0) from unnest(v_places) p)) q
             where l.pool = v_pool and l.ready and l.user_id <> v_user
             limit v_bound) h
         group by h.user_id) d;

    -- lanes that the bound has left uncounted are taken for as deep as it matters
    select case when (select sum(d) from unnest(v_depths) d) < v_bound then 0 else count(*) - cardinality(v_depths) end into v_deeper
      from (select from upload_pipeline.lanes l where l.pool = v_pool and l.ready and l.user_id <> v_user limit v_bound) l;

    -- without a worker in the register: as if there were one slot
    select greatest(1, sum(w.concurrency)) into v_slots from upload_pipeline.workers w
     where v_pool = any (w.pools) and v_pool <> all (w.left_pools) and w.last_beat_at > v_now - interval '2 minutes';
    select least(v_slots, coalesce(max(l.max_in_flight), 1)) into v_cap from upload_pipeline.lanes l
     where l.pool = v_pool and l.user_id = v_user;

    return query
    with step as materialized (
      -- a stage without any history takes an equal share of the whole
      select s.pipeline, s.stage, s.position, p_default_seconds / count(*) over (partition by s.pipeline) as share
        from upload_pipeline.stages s where not s.final
    ), typical as materialized (
      -- what a job in front takes in whole
      select s.pipeline, sum(coalesce(m.seconds, s.share)) as seconds
        from step s
       cross join lateral (
         select sum(d.seconds * d.samples) / sum(d.samples) as seconds from upload_pipeline.stage_durations d
          where d.pipeline = s.pipeline and d.stage = s.stage) m
       group by s.pipeline
    ), asked as materialized (
      select j.*, coalesce(a.place, 0) as place, upload_pipeline.size_class(c.file_bytes) as size_class,
             case when j.state = 'working' then extract(epoch from v_now - j.updated_at) else 0 end::double precision as spent,
             case when j.state = 'working' then 0
                  else least(v_bound, a.place::bigint * (1 + coalesce(v_deeper, 0))
                                + (select coalesce(sum(least(d, a.place)), 0) from unnest(v_depths) d))
             end::integer as ahead
        from unnest(v_jobs, v_places) a (job_id, place)
       cross join lateral (select u.* from upload_pipeline.upload_jobs u where u.job_id = a.job_id) j
       cross join lateral (
         select d.file_bytes from upload_pipeline.documents d where d.document_id = j.document_id
         union all
         select p.file_bytes from upload_pipeline.photos p where p.photo_id = j.photo_id) c
    )
    select a.job_id, a.ahead,
           v_now + make_interval(secs => work.seconds + greatest(
             a.ahead * t.seconds / v_slots, a.place * t.seconds / v_cap,
             case when a.state = 'retryable' then extract(epoch from a.run_at - v_now)::double precision end)),
           f.progress + coalesce(floor((n.progress - f.progress) * vectors.share), 0)::integer
      from asked a
      join typical t on t.pipeline = a.pipeline
      join upload_pipeline.stages f on f.pipeline = a.pipeline and f.stage = a.stage
      left join upload_pipeline.stages n on n.pipeline = a.pipeline and n.position = f.position + 1
     cross join lateral (
       select case when a.pipeline = 'document' and a.stage = 'embedding' then (
         -- counts and no join: vectors of more than one model may lie there, so at most all
         select least(1, ((select count(*) from upload_pipeline.document_vector_buffer v where v.document_id = a.document_id)
                          + (select coalesce(sum(cardinality(k.chunk_ids)), 0) from upload_pipeline.document_cached_chunks k
                              where k.document_id = a.document_id))::double precision / nullif(count(*), 0))
           from upload_pipeline.document_chunk_buffer b
          where b.document_id = a.document_id) end as share) vectors
     cross join lateral (
       select sum(case when s.stage = a.stage then greatest(0, coalesce(m.seconds, s.share) - a.spent)
                       else coalesce(m.seconds, s.share) end) as seconds
         from step s
         left join lateral (
           -- the nearest size that there is history of
           select d.seconds from upload_pipeline.stage_durations d
            where d.pipeline = s.pipeline and d.stage = s.stage
            order by abs(d.size_class - a.size_class), d.size_class limit 1) m on true
        where s.pipeline = a.pipeline and s.position >= f.position) work;
  end loop;
end
$$;

-- sql/schema/06_policies.sql

-- Insurance policies: documents of which somebody has said whose product they describe. All that is processed, searched
-- and deleted is the document.

create table upload_pipeline.policies (
  document_id  uuid primary key,
  user_id      uuid not null,
  insurer      text not null,
  product_name text not null,
  launch_date  date not null,
  created_at   timestamptz not null default upload_pipeline.now(),
  foreign key (document_id, user_id) references upload_pipeline.documents (document_id, user_id)
    on update cascade on delete cascade,
  constraint policies_insurer check (insurer <> '' and length(insurer) <= 200),
  constraint policies_product_name check (product_name <> '' and length(product_name) <= 200)
);

-- A policy's bytes are in the store: makes document, job and policy in one transaction, by accept_document. What is said
-- of the policy stands in its row and, so that a search can filter by it, in the document's metadata.
--
-- The same bytes again: the first document and job come back, `duplicate` set, and what is said this time replaces what
-- was said before, since there is no other way to mend it. A document that was no policy becomes one; its other metadata
-- stay. A document whose jobs have been removed gets one.
create function upload_pipeline.accept_policy(
  p_document_id    uuid,
  p_user_id        uuid,
  p_filename       text,
  p_media_type     text,
  p_file_bytes     bigint,
  p_file_sha256    text,
  p_raw_key        text,
  p_insurer        text,
  p_product_name   text,
  p_launch_date    date,
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
  v_said   constant jsonb := jsonb_build_object('insurer', p_insurer, 'product_name', p_product_name,
                                                'launch_date', to_char(p_launch_date, 'YYYY-MM-DD'));
  v_answer record;
begin
  select a.document_id, a.job_id, a.duplicate into v_answer
    from upload_pipeline.accept_document(p_document_id, p_user_id, p_filename, p_media_type, p_file_bytes, p_file_sha256,
      p_raw_key, p_metadata || v_said, p_priority, p_correlation_id) a;
  if v_answer.duplicate then
    -- Holds the document until the end: a deletion or a new owner waits, or was here first, and then there is nothing of
    -- this user's to become a policy.
    update upload_pipeline.documents d
       set metadata = d.metadata || v_said, updated_at = upload_pipeline.now()
     where d.document_id = v_answer.document_id and d.user_id = p_user_id and d.deleted_at is null;
    if not found then
      raise exception 'document % with the same bytes is gone, or going', v_answer.document_id
        using errcode = 'UP003', hint = 'Send the file again in a moment.';
    end if;
  end if;
  insert into upload_pipeline.policies as p (document_id, user_id, insurer, product_name, launch_date, created_at)
  values (v_answer.document_id, p_user_id, p_insurer, p_product_name, p_launch_date, upload_pipeline.now())
  on conflict (document_id) do update
    set insurer = excluded.insurer, product_name = excluded.product_name, launch_date = excluded.launch_date;
  if v_answer.job_id is null then
    select e.job_id into v_answer.job_id
      from upload_pipeline.enqueue_job(v_answer.document_id, p_user_id, 'document', p_priority, p_correlation_id) e;
  end if;
  return query select v_answer.document_id, v_answer.job_id, v_answer.duplicate;
end
$$;

-- sql/schema/06_provider_budget.sql

-- What hosted providers let us call: requests and tokens in a minute, for each key and model, shared by all processes.
-- A provider that counts some calls in a shorter period too has a budget more for these, under a name of its own; what is said
-- here of a minute holds for any period, as long as a budget has one.
--
-- A call is reserved before it is made and settled when its answer is there. It arrives at the provider at some moment
-- between the two, nobody knows which; so it counts from its reservation until a minute after it was settled. Then no
-- window of a minute at the provider holds more than the limit: take the calls that arrived in one, and of these the one
-- that was reserved last. Each of the others was reserved before it, and was settled at or after its arrival, which is not
-- more than a minute before the end of the window and so before that last reservation at the latest by a minute: it was
-- counted when the last one was granted, and the sum was within the limit.
--
-- That needs the sum to be right. All that changes a budget locks its row first (one row, and nothing else is locked by
-- these verbs, so nobody waits in a circle), and every statement behind the lock has a snapshot of its own (READ COMMITTED),
-- taken when the lock is held: it sees what every holder before has committed. The time is read behind the lock as well, so
-- it grows in the order of the grants. And it needs a caller to make its call only within the life of its reservation: one
-- that is never settled, because its process died, counts as made at its end, `ttl` after it was granted, and for a minute
-- more. Nothing but time gives a call back that may have been made.
--
-- Nobody starves. Who is refused stands in line. Somebody behind is granted only what fits beside all who stand before,
-- and beside what was granted since the first of them asked: so the first is granted at the latest when all is gone that
-- was there when it asked, and then the next one is the first. What is gone soon may be used by those who would not be in
-- the way then. A place in line is kept by asking again; who does not come back loses it 15 s after the time told.

-- One row for each key and model of a provider. `key_id` is the beginning of the key's SHA-256, never the key.
-- `calls` and `tokens` are the sums of what counts now, kept here so that a call costs no sum over a minute of calls;
-- `granted_…` the sums of all that was ever granted.
-- `foreign_…`: what the provider counts that is not ours (other programs with the same key), as its last answer told,
-- until when it said that all would be free. Limits are null until an answer has told them, or tells none. `paused_until`: end
-- of the last pause (06_provider_pauses); it lies within `frozen_until` while that holds.
create table upload_pipeline.provider_budgets (
  budget_id           bigint primary key generated always as identity,
  provider            text not null,
  key_id              text not null,
  model               text not null,
  request_limit       bigint,
  token_limit         bigint,
  calls               bigint not null default 0,
  tokens              bigint not null default 0,
  granted_calls       bigint not null default 0,
  granted_tokens      bigint not null default 0,
  foreign_calls       bigint not null default 0,
  foreign_calls_until timestamptz,
  foreign_tokens      bigint not null default 0,
  foreign_tokens_until timestamptz,
  frozen_until        timestamptz,
  paused_until        timestamptz,
  answered_at         timestamptz,
  unique (provider, key_id, model),
  constraint provider_budgets_key check (key_id ~ '^[0-9a-f]{8,64}$'),
  constraint provider_budgets_sums check (calls >= 0 and tokens >= 0 and foreign_calls >= 0 and foreign_tokens >= 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);

-- What is reserved, or waits to be. `until`: when the row no longer counts, or the place in line is lost. In line while
-- `granted_at` is null, by `place`; under way while `settled_at` is. `…_before`: all that had ever been granted when it asked.
-- `period`: in which the provider counts it.
create table upload_pipeline.provider_reservations (
  reservation_id uuid primary key,
  budget_id      bigint not null references upload_pipeline.provider_budgets on delete cascade,
  place          bigint generated always as identity,
  calls          bigint not null,
  tokens         bigint not null,
  calls_before   bigint not null,
  tokens_before  bigint not null,
  period         interval not null,
  granted_at     timestamptz,
  settled_at     timestamptz,
  until          timestamptz not null,
  constraint provider_reservations_size check (calls >= 0 and tokens >= 0),
  constraint provider_reservations_period check (period > interval '0'),
  constraint provider_reservations_settled check (settled_at is null or granted_at is not null)
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 500);

-- lock_budget: what no longer counts; reserve_calls: what will be free next
create index provider_reservations_until on upload_pipeline.provider_reservations (budget_id, until);
-- reserve_calls: who stands in line
create index provider_reservations_line on upload_pipeline.provider_reservations (budget_id, place) where granted_at is null;

-- The budget's row, locked and brought up to this moment: what no longer counts is gone. `at` is the moment.
create function upload_pipeline.lock_budget(
  p_budget_id bigint, out budget upload_pipeline.provider_budgets, out at timestamptz
)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_gone   bigint;
  v_calls  bigint;
  v_tokens bigint;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'a budget needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'The sums must be read after the lock is won.';
  end if;
  perform from upload_pipeline.provider_budgets b where b.budget_id = p_budget_id for update;
  -- the transaction's time is older than the lock where the lock was waited for
  at := coalesce(nullif(current_setting('upload_pipeline.now', true), '')::timestamptz, clock_timestamp());
  -- `<`: a window that holds both its ends is kept as well
  with gone as (
    delete from upload_pipeline.provider_reservations r
     where r.budget_id = p_budget_id and r.until < at
    returning r.granted_at, r.calls, r.tokens
  )
  select count(*), coalesce(sum(g.calls) filter (where g.granted_at is not null), 0),
         coalesce(sum(g.tokens) filter (where g.granted_at is not null), 0)
    into v_gone, v_calls, v_tokens from gone g;
  if v_gone > 0 then
    update upload_pipeline.provider_budgets b set calls = b.calls - v_calls, tokens = b.tokens - v_tokens
     where b.budget_id = p_budget_id;
  end if;
  select * into budget from upload_pipeline.provider_budgets b where b.budget_id = p_budget_id;
  if budget.foreign_calls_until < at then
    budget.foreign_calls := 0;
  end if;
  if budget.foreign_tokens_until < at then
    budget.foreign_tokens := 0;
  end if;
end
$$;

-- Reserves p_calls calls of p_tokens tokens together, or says how long to wait. Exact over all callers: see above. Asking
-- again with the same id keeps the place in line, and is answered the same once it was granted.
--
--   p_request_limit, p_token_limit   what an operator allows in a minute, where that is less than the provider does
--   p_ttl                            the call ends within this time, or is given up
--   p_period                         in which the limits hold; the same for all calls of a budget
--   granted                          then `seconds` is what is left of p_ttl; else how long to wait before asking again
--
-- Before the provider has told its limits, and where none are given, one call at a time finds them out, and another one
-- after 20 s without an answer. More tokens or calls than the limit can never be granted and raise UP005.
create function upload_pipeline.reserve_calls(
  p_reservation_id uuid,
  p_provider       text,
  p_key_id         text,
  p_model          text,
  p_calls          bigint,
  p_tokens         bigint,
  p_request_limit  bigint default null,
  p_token_limit    bigint default null,
  p_ttl            interval default '2 minutes',
  p_period         interval default '1 minute'
)
returns table (granted boolean, seconds double precision)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_id      bigint;
  v_locked  record;
  v_budget  upload_pipeline.provider_budgets;
  v_mine    upload_pipeline.provider_reservations;
  v_other   upload_pipeline.provider_reservations;
  v_now     timestamptz;
  v_ready   timestamptz;
  v_calls   bigint;   -- the limits that hold
  v_tokens  bigint;
  v_line    record;
  v_room_calls  bigint;
  v_room_tokens bigint;
  v_short   bigint := 0;  -- what has to go before there is room
  v_lacking bigint := 0;
begin
  select b.budget_id into v_id from upload_pipeline.provider_budgets b
   where b.provider = p_provider and b.key_id = p_key_id and b.model = p_model;
  if not found then
    insert into upload_pipeline.provider_budgets (provider, key_id, model) values (p_provider, p_key_id, p_model)
    on conflict (provider, key_id, model) do nothing;
    select b.budget_id into v_id from upload_pipeline.provider_budgets b
     where b.provider = p_provider and b.key_id = p_key_id and b.model = p_model;
  end if;
  select * into v_locked from upload_pipeline.lock_budget(v_id);
  v_budget := v_locked.budget;
  v_now := v_locked.at;

  v_calls := least(v_budget.request_limit, p_request_limit);
  v_tokens := least(v_budget.token_limit, p_token_limit);
  if p_calls > v_calls or p_tokens > v_tokens then
    raise exception '% call(s) of % tokens are more than a whole % of "%" of % holds: % calls, % tokens', p_calls, p_tokens,
        case p_period when '1 minute' then 'minute' else p_period::text end, p_model, p_provider, coalesce(v_calls::text, 'any number of'),
        coalesce(v_tokens::text, 'any number of')
      using errcode = 'UP005', hint = 'Send it in smaller parts.';
  end if;

  select r.* into v_mine from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  if v_mine.granted_at is not null then
    return query select true, greatest(0, extract(epoch from v_mine.until - v_mine.period - v_now))::double precision;
    return;
  end if;

  if v_budget.frozen_until > v_now then
    v_ready := v_budget.frozen_until;
  elsif v_budget.answered_at is null and v_calls is null and v_tokens is null then
    -- The first to ask finds the limits out. Who has no answer in 20 s may have died: the next one goes as well. Each
    -- counts until it is settled or its own life is over, whoever goes meanwhile: so the limits hold once they are known.
    if exists (select from upload_pipeline.provider_reservations r
                where r.budget_id = v_id and r.granted_at is not null and r.settled_at is null and r.until >= v_now + r.period
                  and r.granted_at > v_now - interval '20 seconds')
       or exists (select from upload_pipeline.provider_reservations r
                   where r.budget_id = v_id and r.granted_at is null and (v_mine.place is null or r.place < v_mine.place)) then
      v_ready := v_now + interval '250 milliseconds';
    end if;
  else
    -- who stands before, and what was granted since the first of them asked
    select coalesce(sum(r.calls), 0) as calls, coalesce(sum(r.tokens), 0) as tokens,
           v_budget.granted_calls - min(r.calls_before) as passed_calls, v_budget.granted_tokens - min(r.tokens_before) as passed_tokens,
           min(r.until) as lapses
      into v_line
      from upload_pipeline.provider_reservations r
     where r.budget_id = v_id and r.granted_at is null and (v_mine.place is null or r.place < v_mine.place);
    -- room that is left now, and room that is left where all who stand before have theirs
    v_room_calls := v_calls - v_budget.foreign_calls - p_calls;
    v_room_tokens := v_tokens - v_budget.foreign_tokens - p_tokens;
    if p_calls > 0 and (v_budget.calls > v_room_calls or least(v_budget.calls, v_line.passed_calls) + v_line.calls > v_room_calls) then
      v_short := v_budget.calls + v_line.calls - v_room_calls;
    end if;
    if p_tokens > 0 and (v_budget.tokens > v_room_tokens or least(v_budget.tokens, v_line.passed_tokens) + v_line.tokens > v_room_tokens) then
      v_lacking := v_budget.tokens + v_line.tokens - v_room_tokens;
    end if;
    if v_short > 0 or v_lacking > 0 then
      -- When to look again: when enough is settled and gone, if nothing else comes; or others' use of the key ends. What is
      -- under way does not go within a period.
      v_ready := least(v_now + p_period,
                       case when v_short > 0 and v_budget.foreign_calls > 0 then v_budget.foreign_calls_until end,
                       case when v_lacking > 0 and v_budget.foreign_tokens > 0 then v_budget.foreign_tokens_until end);
      for v_other in
        select r.* from upload_pipeline.provider_reservations r
         where r.budget_id = v_id and r.granted_at is not null and r.until <= v_ready
         order by r.until
      loop
        v_short := v_short - v_other.calls;
        v_lacking := v_lacking - v_other.tokens;
        if v_short <= 0 and v_lacking <= 0 then
          v_ready := v_other.until;
          exit;
        end if;
      end loop;
      -- where nothing but the line is in the way: one place in it is taken up, or lost, until then
      if coalesce(v_budget.calls <= v_room_calls, true) and coalesce(v_budget.tokens <= v_room_tokens, true) then
        v_ready := least(v_ready, v_line.lapses);
      end if;
      -- at least so long that asking again is no busy loop
      v_ready := greatest(v_ready, v_now) + interval '10 milliseconds';
    end if;
  end if;

  insert into upload_pipeline.provider_reservations as r
    (reservation_id, budget_id, calls, tokens, calls_before, tokens_before, period, granted_at, until)
  values (p_reservation_id, v_id, p_calls, p_tokens, v_budget.granted_calls, v_budget.granted_tokens, p_period,
          case when v_ready is null then v_now end,
          case when v_ready is null then v_now + p_ttl + p_period else v_ready + interval '15 seconds' end)
  on conflict (reservation_id) do update
    set granted_at = excluded.granted_at, until = excluded.until, calls = excluded.calls, tokens = excluded.tokens;
  if v_ready is null then
    update upload_pipeline.provider_budgets b
       set calls = b.calls + p_calls, tokens = b.tokens + p_tokens,
           granted_calls = b.granted_calls + p_calls, granted_tokens = b.granted_tokens + p_tokens
     where b.budget_id = v_id;
  end if;
  return query
    select v_ready is null, extract(epoch from coalesce(v_ready - v_now, p_ttl))::double precision;
end
$$;

-- The call has ended. It counts for its period from now, with p_tokens where that is known, and else with what was reserved.
-- p_calls 0 and p_tokens 0: it was never made, and all is free at once; so a place in line is given up.
--
-- What the answer told of the provider's own books, each null where it told nothing: limits, which hold from now on; what
-- remained, and in how many seconds all is free again. Where the provider counts more than all that counts here, somebody
-- else uses the key, and the difference is kept free for them until then. p_retry_after: seconds in which nothing more is
-- granted. p_answered false: no answer came, or one that tells nothing; the limits are still to be found out.
--
-- False where there is no such reservation any more. Safe to repeat.
create function upload_pipeline.settle_calls(
  p_reservation_id     uuid,
  p_calls              bigint default null,
  p_tokens             bigint default null,
  p_answered           boolean default false,
  p_request_limit      bigint default null,
  p_requests_remaining bigint default null,
  p_requests_reset     double precision default null,
  p_token_limit        bigint default null,
  p_tokens_remaining   bigint default null,
  p_tokens_reset       double precision default null,
  p_retry_after        double precision default null
)
returns boolean
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
declare
  v_locked record;
  v_budget upload_pipeline.provider_budgets;
  v_mine   upload_pipeline.provider_reservations;
  v_now    timestamptz;
  v_calls  bigint;
  v_tokens bigint;
begin
  select r.* into v_mine from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  if not found then
    return false;
  end if;
  select * into v_locked from upload_pipeline.lock_budget(v_mine.budget_id);
  v_budget := v_locked.budget;
  v_now := v_locked.at;
  select r.* into v_mine from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  if not found then
    return false;
  end if;
  if v_mine.granted_at is null then
    delete from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
    return true;
  end if;
  if v_mine.settled_at is not null then
    return true;
  end if;
  v_calls := coalesce(p_calls, v_mine.calls);
  v_tokens := coalesce(p_tokens, v_mine.tokens);
  if v_calls = 0 and v_tokens = 0 then
    delete from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  else
    update upload_pipeline.provider_reservations r
       set calls = v_calls, tokens = v_tokens, settled_at = v_now, until = v_now + r.period
     where r.reservation_id = p_reservation_id;
  end if;
  v_budget.calls := v_budget.calls - v_mine.calls + v_calls;
  v_budget.tokens := v_budget.tokens - v_mine.tokens + v_tokens;
  if p_requests_remaining is not null then
    v_budget.foreign_calls := greatest(0, coalesce(p_request_limit, v_budget.request_limit) - p_requests_remaining - v_budget.calls);
    v_budget.foreign_calls_until := v_now + make_interval(secs => coalesce(p_requests_reset, 60));
  end if;
  if p_tokens_remaining is not null then
    v_budget.foreign_tokens := greatest(0, coalesce(p_token_limit, v_budget.token_limit) - p_tokens_remaining - v_budget.tokens);
    v_budget.foreign_tokens_until := v_now + make_interval(secs => coalesce(p_tokens_reset, 60));
  end if;
  update upload_pipeline.provider_budgets b
     set calls = v_budget.calls, tokens = v_budget.tokens,
         request_limit = coalesce(p_request_limit, b.request_limit), token_limit = coalesce(p_token_limit, b.token_limit),
         foreign_calls = coalesce(v_budget.foreign_calls, 0), foreign_calls_until = v_budget.foreign_calls_until,
         foreign_tokens = coalesce(v_budget.foreign_tokens, 0), foreign_tokens_until = v_budget.foreign_tokens_until,
         frozen_until = greatest(b.frozen_until, v_now + make_interval(secs => p_retry_after)),
         answered_at = case when p_answered then v_now else b.answered_at end
   where b.budget_id = v_budget.budget_id;
  return true;
end
$$;

-- Nothing more is granted for p_seconds from now; an end that is later already stays. What is under way goes on.
create function upload_pipeline.freeze_budget(p_provider text, p_key_id text, p_model text, p_seconds double precision)
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.provider_budgets as b (provider, key_id, model, frozen_until)
  values (p_provider, p_key_id, p_model, upload_pipeline.now() + make_interval(secs => p_seconds))
  on conflict (provider, key_id, model) do update set frozen_until = greatest(b.frozen_until, excluded.frozen_until)
$$;

-- sql/schema/06_provider_pauses.sql

-- Stops a provider for all workers, since its account is empty or its key is refused: it is asked again after p_seconds, and
-- until then jobs wait and no retry is counted. Many workers find it out at the same moment; the first one freezes the
-- budget and writes the alarm, the others meet a budget that is paused about as long already and are told false.
create function upload_pipeline.pause_provider(
  p_provider text,
  p_key_id   text,
  p_model    text,
  p_seconds  double precision,
  p_code     text,
  p_message  text
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_until timestamptz := v_now + make_interval(secs => p_seconds);
begin
  insert into upload_pipeline.provider_budgets as b (provider, key_id, model, frozen_until, paused_until)
  values (p_provider, p_key_id, p_model, v_until, v_until)
  on conflict (provider, key_id, model) do update
    set frozen_until = greatest(b.frozen_until, excluded.frozen_until), paused_until = excluded.paused_until
   -- an operator ends a pause by `frozen_until`; a limit's freeze is none, however long
   where b.frozen_until is null or b.paused_until is null
      or least(b.frozen_until, b.paused_until) < v_now + make_interval(secs => p_seconds / 2);
  if not found then
    return false;
  end if;
  perform upload_pipeline.record_event('provider_paused', p_severity => 'error', p_payload => jsonb_build_object(
    'provider', p_provider, 'model', p_model, 'code', p_code, 'message', left(p_message, 500), 'until', v_until));
  return true;
end
$$;

-- sql/schema/06_search.sql

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

-- sql/schema/06_sessions.sql

-- Anonymous sessions. A browser without credentials is a user of its own: a fresh id that nobody can sign in as, an ordinary
-- owner under row-level security. What it has uploaded becomes a signed-in user's by claim_session, or goes when its time
-- is over. Nobody reads these tables: the functions below say what has to be known.
--
-- Locks: the session first; then as everywhere jobs in id order, documents, batches, lanes.

-- One row a session. Its cookie is random (256 bits) and is not kept: a plain SHA-256 of it cannot be guessed back. No
-- address and no name of a browser is kept either.
create table upload_pipeline.sessions (
  session_id   uuid primary key default gen_random_uuid(),
  user_id      uuid not null unique default gen_random_uuid(),
  token_sha256 text not null unique,
  created_at   timestamptz not null default upload_pipeline.now(),
  last_seen_at timestamptz not null default upload_pipeline.now(),
  expires_at   timestamptz not null,
  claimed_by   uuid,
  claimed_at   timestamptz,
  ended_at     timestamptz,
  constraint sessions_token check (token_sha256 ~ '^[0-9a-f]{64}$'),
  constraint sessions_claim check ((claimed_by is null) = (claimed_at is null) and claimed_by <> user_id)
);

-- sessions_to_clean: those that were over first
create index sessions_over on upload_pipeline.sessions (least(expires_at, ended_at, claimed_at), session_id);
-- sessions_to_clean: those that may have got documents since; no more than a grace time has claims
create index sessions_claimed on upload_pipeline.sessions (claimed_at) where claimed_at is not null;

-- What a claim has done with each document of a session: moved, or given up for the one with the same bytes that the user
-- had. It outlives the documents, so that a claim that is asked again answers the same.
create table upload_pipeline.claimed_documents (
  session_id           uuid not null references upload_pipeline.sessions on delete cascade,
  document_id          uuid not null,
  existing_document_id uuid,
  primary key (session_id, document_id)
);

-- What stays of the documents of sessions that nobody has claimed: that a file was processed, and how that went. Nothing
-- says whose it was; `session_id` is there only until the session's row goes.
create table upload_pipeline.processing_records (
  document_id  uuid primary key,
  session_id   uuid references upload_pipeline.sessions on delete set null,
  filename     text not null,
  file_bytes   bigint not null,
  media_type   text not null,
  uploaded_at  timestamptz not null,
  completed_at timestamptz,
  status       text not null,
  error_code   text,
  recorded_at  timestamptz not null default upload_pipeline.now()
);

create index processing_records_session on upload_pipeline.processing_records (session_id) where session_id is not null;

-- claim_session, clean_session: what has happened to a user's documents themselves, and batches; what has happened to jobs
-- is found by them
create index events_of_no_job on upload_pipeline.events (user_id) where job_id is null;

-- Of a session's document that goes, for whatever reason, the audit trail keeps what happened and not to whom: its jobs go
-- with it, and afterwards nobody could find their events.
create function upload_pipeline.forget_session_document()
returns trigger
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
begin
  if exists (select from upload_pipeline.sessions s where s.user_id = old.user_id) then
    update upload_pipeline.events e set user_id = null, correlation_id = ''
     where e.user_id = old.user_id
       and e.job_id in (select j.job_id from upload_pipeline.upload_jobs j where j.document_id = old.document_id);
  end if;
  return old;
end
$$;

create trigger forget_session_document before delete on upload_pipeline.documents
  for each row execute function upload_pipeline.forget_session_document();

create function upload_pipeline.open_session(p_token_sha256 text, p_life interval)
returns table (session_id uuid, user_id uuid, expires_at timestamptz)
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.sessions (token_sha256, created_at, last_seen_at, expires_at)
  values (p_token_sha256, upload_pipeline.now(), upload_pipeline.now(), upload_pipeline.now() + p_life)
  returning session_id, user_id, expires_at
$$;

-- The session of a cookie, where it is not over; its end moves to p_life from now. That is written once an hour, or, of a
-- life shorter than a day, once in a 24th of it: a busy session is not a busy row. `slid` where this call wrote it. A row that
-- another call holds is being written there.
create function upload_pipeline.find_session(p_token_sha256 text, p_life interval)
returns table (session_id uuid, user_id uuid, expires_at timestamptz, slid boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_now     timestamptz := upload_pipeline.now();
  v_session upload_pipeline.sessions;
begin
  select s.* into v_session from upload_pipeline.sessions s
   where s.token_sha256 = p_token_sha256 and s.ended_at is null and s.claimed_at is null and s.expires_at > v_now;
  if not found then
    return;
  end if;
  if v_session.last_seen_at < v_now - least(interval '1 hour', p_life / 24) then
    return query
      update upload_pipeline.sessions s set last_seen_at = v_now, expires_at = v_now + p_life
        from (select n.session_id from upload_pipeline.sessions n
               where n.session_id = v_session.session_id and n.ended_at is null and n.claimed_at is null
                 and n.last_seen_at = v_session.last_seen_at
                 for no key update skip locked) n
       where s.session_id = n.session_id
      returning s.session_id, s.user_id, s.expires_at, true;
    if found then
      return;
    end if;
  end if;
  return query select v_session.session_id, v_session.user_id, v_session.expires_at, false;
end
$$;

-- Ends a session at once. False where there is none that could be ended. Its documents stay until it is cleaned.
create function upload_pipeline.end_session(p_token_sha256 text)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
begin
  update upload_pipeline.sessions s set ended_at = upload_pipeline.now()
   where s.token_sha256 = p_token_sha256 and s.ended_at is null and s.claimed_at is null
     and s.expires_at > upload_pipeline.now();
  return found;
end
$$;

-- Makes a claimed session's documents the user's, those that it has now, with all that hangs on them. The caller has locked
-- the session.
--
-- Ids stay; so do the objects, whose keys name whose upload they were. A job at work goes on: its fence is a token and no
-- user. It counts for the user's cap from now on, so there may be more at work than the cap allows, until they end.
--
-- A document whose bytes the user has already is not moved: its deletion begins, and members of batches name the user's
-- own from now on. One stays for the next call: while the user's own document of the same bytes is being deleted, or
-- waits for its upload and this one does not.
create function upload_pipeline.move_session_documents(p_session_id uuid)
returns void
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_session   upload_pipeline.sessions;
  v_jobs      uuid[];
  v_document  upload_pipeline.documents;
  v_existing  upload_pipeline.documents;
  v_lanes     record;
begin
  select s.* into v_session from upload_pipeline.sessions s where s.session_id = p_session_id;
  select array_agg(j.job_id) into v_jobs
    from (select l.job_id from upload_pipeline.upload_jobs l where l.user_id = v_session.user_id
           order by l.job_id for no key update) j;

  for v_document in
    select d.* from upload_pipeline.documents d
     where d.user_id = v_session.user_id and d.deleted_at is null
       -- one that came since the jobs were locked is for the next call
       and not exists (select from upload_pipeline.upload_jobs j
                        where j.document_id = d.document_id and not j.job_id = any (coalesce(v_jobs, '{}')))
     -- two claims of one user meet each other's files in the same order
     order by d.file_sha256
       for update
  loop
    loop
      select e.* into v_existing from upload_pipeline.documents e
       where e.user_id = v_session.claimed_by and e.file_sha256 = v_document.file_sha256;
      if not found then
        begin
          update upload_pipeline.documents d set user_id = v_session.claimed_by, updated_at = upload_pipeline.now()
           where d.document_id = v_document.document_id;
          insert into upload_pipeline.claimed_documents (session_id, document_id) values (p_session_id, v_document.document_id);
          exit;
        exception when unique_violation then
          continue; -- the user has uploaded the same bytes since the look above
        end;
      end if;

      exit when v_existing.deleted_at is not null;
      if v_existing.upload_deadline is not null and v_document.upload_deadline is null then
        exit when exists (select from upload_pipeline.upload_jobs j
                           where j.document_id = v_existing.document_id and j.state in ('queued', 'working', 'retryable'));
        -- announced, and it never came: what did come takes its place
        perform upload_pipeline.begin_deletion(v_existing.document_id);
        perform upload_pipeline.finish_deletion(v_existing.document_id);
        continue;
      end if;

      insert into upload_pipeline.claimed_documents (session_id, document_id, existing_document_id)
      values (p_session_id, v_document.document_id, v_existing.document_id);
      update upload_pipeline.batch_members m
         set document_id = v_existing.document_id, job_id = j.job_id, duplicate = true
        from (select u.job_id from upload_pipeline.upload_jobs u
               where u.document_id = v_existing.document_id and u.pipeline = 'document' order by u.seq desc limit 1) j
       where m.document_id = v_document.document_id;
      perform upload_pipeline.begin_deletion(v_document.document_id);
      exit;
    end loop;
  end loop;

  -- what is told of them is told to the user: also of those given up, whose jobs are there until their deletion ends
  select array_agg(j.job_id) into v_jobs
    from upload_pipeline.claimed_documents c
    join upload_pipeline.upload_jobs j on j.document_id = c.document_id
   where c.session_id = p_session_id;
  update upload_pipeline.job_outcomes o set user_id = v_session.claimed_by
   where o.job_id = any (v_jobs) and o.user_id = v_session.user_id;
  update upload_pipeline.events e set user_id = v_session.claimed_by
   where e.job_id = any (v_jobs) and e.user_id = v_session.user_id;
  update upload_pipeline.events e set user_id = v_session.claimed_by
   where e.job_id is null and e.user_id = v_session.user_id
     and (e.document_id is null
          or e.document_id in (select c.document_id from upload_pipeline.claimed_documents c where c.session_id = p_session_id));
  update upload_pipeline.batches b set user_id = v_session.claimed_by where b.user_id = v_session.user_id;
  update upload_pipeline.usage_records r set user_id = v_session.claimed_by where r.user_id = v_session.user_id;
  perform upload_pipeline.move_user_vectors(v_session.user_id, v_session.claimed_by);
  for v_lanes in
    select j.pool from upload_pipeline.upload_jobs j
     where j.job_id = any (v_jobs) and j.state = 'queued' group by j.pool order by j.pool
  loop
    perform upload_pipeline.wake_lanes(v_lanes.pool, array[v_session.claimed_by]);
  end loop;
end
$$;

-- Makes a session's documents a user's, once, and ends the session. The same user again: the same answer, and documents
-- follow that came late, from a request that was under way. A session that there is not, or that is over otherwise, raises
-- UP002; one that another user has claimed, UP003.
--
--   documents    moved, of all calls so far; their ids are the same as before
--   duplicates   given up for existing_documents, place by place
--   remaining    those for the next call; maintenance calls as well
create function upload_pipeline.claim_session(p_token_sha256 text, p_user_id uuid)
returns table (
  session_id uuid, user_id uuid, documents uuid[], duplicates uuid[], existing_documents uuid[], remaining integer
)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_session upload_pipeline.sessions;
begin
  select s.* into v_session from upload_pipeline.sessions s where s.token_sha256 = p_token_sha256 for update;
  if not found or (v_session.claimed_by is null
                   and (v_session.ended_at is not null or v_session.expires_at <= upload_pipeline.now())) then
    raise exception 'there is no such session, or it is over' using errcode = 'UP002';
  end if;
  if v_session.claimed_by <> p_user_id then
    raise exception 'the session was claimed by another user' using errcode = 'UP003';
  end if;
  update upload_pipeline.sessions s set claimed_by = p_user_id, claimed_at = upload_pipeline.now()
   where s.session_id = v_session.session_id and s.claimed_by is null;
  perform upload_pipeline.move_session_documents(v_session.session_id);
  return query
    select v_session.session_id, v_session.user_id,
           coalesce(array_agg(c.document_id order by c.document_id) filter (where c.existing_document_id is null), '{}'),
           coalesce(array_agg(c.document_id order by c.document_id) filter (where c.existing_document_id is not null), '{}'),
           coalesce(array_agg(c.existing_document_id order by c.document_id) filter (where c.existing_document_id is not null), '{}'),
           (select count(*)::integer from upload_pipeline.documents d
             where d.user_id = v_session.user_id and d.deleted_at is null)
      from upload_pipeline.claimed_documents c where c.session_id = v_session.session_id;
end
$$;

-- Sessions that have been over for longer than p_grace, and claimed ones that have a document left, as many of each.
create function upload_pipeline.sessions_to_clean(p_grace interval, p_limit integer default 100)
returns table (session_id uuid)
language sql
stable
security definer
set search_path = ''
set enable_seqscan = off
as $$
  (select s.session_id from upload_pipeline.sessions s
    where least(s.expires_at, s.ended_at, s.claimed_at) < upload_pipeline.now() - p_grace
    order by least(s.expires_at, s.ended_at, s.claimed_at), s.session_id limit p_limit)
  union
  (select s.session_id from upload_pipeline.sessions s
    where s.claimed_at is not null
      and exists (select from upload_pipeline.documents d where d.user_id = s.user_id and d.deleted_at is null)
    limit p_limit)
$$;

-- Cleans a session that is over. Of one that was claimed the documents that came late follow, whenever this is called. Of any
-- other, once it has been over for p_grace, the documents go (their deletion begins here; who removes objects ends it), and a
-- record without an owner stays of each. After p_grace, once there is no document left, the session goes too, and with it
-- whatever tells whose the records were. Returns how many deletions have begun, and whether the session is gone. A session
-- that another call holds is being cleaned there.
create function upload_pipeline.clean_session(p_session_id uuid, p_grace interval)
returns table (documents integer, removed boolean)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
  v_session  upload_pipeline.sessions;
  v_document uuid;
  v_count    integer := 0;
begin
  select s.* into v_session from upload_pipeline.sessions s
   where s.session_id = p_session_id
     and (s.claimed_at is not null or least(s.expires_at, s.ended_at) < upload_pipeline.now() - p_grace)
     for update skip locked;
  if not found then
    return query select 0, false;
    return;
  end if;

  if v_session.claimed_by is not null then
    perform upload_pipeline.move_session_documents(p_session_id);
  else
    perform from upload_pipeline.upload_jobs j where j.user_id = v_session.user_id order by j.job_id for no key update;
    -- with the documents that they were made of; and what came late, when this is called again
    perform upload_pipeline.forget_user_vectors(v_session.user_id);
    for v_document in
      select d.document_id from upload_pipeline.documents d
       where d.user_id = v_session.user_id and d.deleted_at is null
       order by d.document_id limit 1000
    loop
      perform upload_pipeline.begin_deletion(v_document);
      insert into upload_pipeline.processing_records
        (document_id, session_id, filename, file_bytes, media_type, uploaded_at, completed_at, status, error_code, recorded_at)
      select h.document_id, p_session_id, h.filename, h.file_bytes, h.media_type, h.uploaded_at, h.completed_at, h.status,
             h.error_code, upload_pipeline.now()
        from upload_pipeline.upload_history h where h.document_id = v_document
      on conflict (document_id) do nothing;
      v_count := v_count + 1;
    end loop;
  end if;

  if least(v_session.expires_at, v_session.ended_at, v_session.claimed_at) >= upload_pipeline.now() - p_grace
     or exists (select from upload_pipeline.documents d where d.user_id = v_session.user_id) then
    return query select v_count, false;
    return;
  end if;
  update upload_pipeline.events e set user_id = null, correlation_id = ''
   where e.job_id is null and e.user_id = v_session.user_id;
  update upload_pipeline.usage_records r set user_id = null where r.user_id = v_session.user_id;
  delete from upload_pipeline.batches b where b.user_id = v_session.user_id;
  delete from upload_pipeline.lanes l
   where l.user_id = v_session.user_id and l.pool in (select s.pool from upload_pipeline.stages s);
  delete from upload_pipeline.sessions s where s.session_id = p_session_id;
  return query select v_count, true;
end
$$;

-- sql/schema/06_upkeep.sql

-- What one worker does for all, at long intervals: looking through the whole store for objects without a row. There is no
-- leader: whoever claims the next round does it, and one that dies in its midst leaves the rest to the round after.

create table upload_pipeline.upkeep_rounds (
  name     text not null primary key,
  begun_at timestamptz not null default upload_pipeline.now(),
  refusal  text          -- why the latest round did nothing; null where it did what it is for
);

-- Marks that this database has written into its store, one for each round, the new in the place of the old. A store that
-- has another belongs to another database, or to this one as it was after the backup that it is restored from.
create table upload_pipeline.store_marks (
  mark    uuid not null primary key default gen_random_uuid(),
  made_at timestamptz not null default clock_timestamp()
);

-- Whether the caller is to do a round now: true for one caller in each interval, whoever comes first.
create function upload_pipeline.claim_upkeep(p_name text, p_interval interval)
returns boolean
language sql
security definer
set search_path = ''
as $$
  with claimed as (
    insert into upload_pipeline.upkeep_rounds as r (name, begun_at) values (p_name, upload_pipeline.now())
    on conflict (name) do update set begun_at = excluded.begun_at
     -- one that is far ahead was claimed by a clock that was set back since
     where r.begun_at <= excluded.begun_at - p_interval or r.begun_at > excluded.begun_at + p_interval
    returning 1
  )
  select exists (select from claimed)
$$;

-- Says how a round went: why it did nothing, which is an alarm, or null.
create function upload_pipeline.note_upkeep(p_name text, p_refusal text)
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.upkeep_rounds as r (name, refusal) values (p_name, p_refusal)
  on conflict (name) do update set refusal = excluded.refusal;
  select upload_pipeline.record_event('upkeep_refused', p_severity => 'error',
           p_payload => jsonb_build_object('name', p_name, 'reason', p_refusal))
   where p_refusal is not null;
$$;

-- A mark to be written into the store in the place of p_found, which stays known as long as none could be; the new one is
-- known from now on, so that a writer that dies on the way does no harm.
create function upload_pipeline.mark_store(p_found uuid)
returns uuid
language sql
security definer
set search_path = ''
as $$
  delete from upload_pipeline.store_marks m
   where m.mark is distinct from p_found
     and m.mark not in (select k.mark from upload_pipeline.store_marks k order by k.made_at desc, k.mark limit 99);
  insert into upload_pipeline.store_marks default values returning mark;
$$;

-- Whether a mark that is found in the store is one of this database's.
create function upload_pipeline.is_store_mark(p_mark uuid)
returns boolean
language sql
stable
security definer
set search_path = ''
as $$
  select exists (select from upload_pipeline.store_marks m where m.mark = p_mark)
$$;

-- sql/schema/06_watches.sql

-- Which jobs somebody watches, and the notification when one of them has news.
--
-- NOTIFY serialises commits across the whole server: sent by each statement that writes events, it left sixteen writers
-- less than half of their commits. So it is sent only for jobs that somebody watches at the moment, and where nobody
-- watches a statement pays one look at an empty table. A notification only wakes: what happened is read from `events`.
--
-- Who begins to watch must not rely on notifications at once. A transaction that was under way then may have looked
-- here before, and commits without a word: until all such have ended the watcher asks by itself (job_news of the API).

-- A row for each job and process that watches it. It runs out where its process does not renew it. Unlogged: a crash of
-- the server ends the connections that listen, and who listens again watches again.
create unlogged table upload_pipeline.job_watches (
  job_id     uuid not null,
  watcher_id uuid not null,
  expires_at timestamptz not null,
  -- notify_watchers: is this job watched
  primary key (job_id, watcher_id)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- Removes watches that ran out: their process was killed. Returns how many.
create function upload_pipeline.forget_lost_watches(p_limit integer default 1000)
returns integer
language sql
security definer
set search_path = ''
as $$
  with gone as (
    delete from upload_pipeline.job_watches w
     where (w.job_id, w.watcher_id) in (
       select e.job_id, e.watcher_id from upload_pipeline.job_watches e
        where e.expires_at < upload_pipeline.now() limit p_limit for update skip locked)
    returning 1
  )
  select count(*)::integer from gone
$$;

-- Begins to watch jobs, or goes on, for p_ttl; and removes a bounded number of watches that ran out.
create function upload_pipeline.watch_jobs(p_watcher_id uuid, p_job_ids uuid[], p_ttl interval default '60 seconds')
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.job_watches as w (job_id, watcher_id, expires_at)
  select distinct a.job_id, p_watcher_id, upload_pipeline.now() + p_ttl from unnest(p_job_ids) a (job_id)
  on conflict (job_id, watcher_id) do update set expires_at = excluded.expires_at;
  select upload_pipeline.forget_lost_watches();
$$;

-- Watches jobs no more; all of a watcher's where none are named.
create function upload_pipeline.unwatch_jobs(p_watcher_id uuid, p_job_ids uuid[] default null)
returns void
language sql
security definer
set search_path = ''
as $$
  delete from upload_pipeline.job_watches w
   where w.watcher_id = p_watcher_id and (p_job_ids is null or w.job_id = any (p_job_ids))
$$;

-- Tells the watchers: the ids of the watched jobs that a statement wrote events of, comma-separated, as many
-- notifications as their length takes (8,000 bytes are the most that one may have).
create function upload_pipeline.notify_watchers()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_payload text;
begin
  -- by itself, so that it is all that is paid where nobody watches
  if not exists (select from upload_pipeline.job_watches) then
    return null;
  end if;
  -- most statements write of jobs that nobody watches: one index look-up an event says so, whatever the planner thinks
  -- of the two tables
  if not exists (select from new_events e
                  cross join lateral (
                    select from upload_pipeline.job_watches w where w.job_id = e.job_id limit 1) w) then
    return null;
  end if;
  for v_payload in
    select string_agg(s.job_id::text, ',')
      from (select n.job_id, (row_number() over () - 1) / 200 as part
              from (select distinct e.job_id from new_events e) n
             where exists (select from upload_pipeline.job_watches w
                            where w.job_id = n.job_id and w.expires_at > upload_pipeline.now())) s
     group by s.part
  loop
    perform pg_notify('upload_pipeline_events', v_payload);
  end loop;
  return null;
end
$$;

-- On the parent: what is inserted through it fires this whatever month it falls into, and a month made later as well.
create trigger events_notify after insert on upload_pipeline.events
  referencing new table as new_events
  for each statement execute function upload_pipeline.notify_watchers();

-- sql/schema/07_views.sql

-- What operators and users look at. Each view runs with the rights of who reads it, so row-level security holds.

-- A job as a person asks after it.
create view upload_pipeline.job_overview with (security_invoker = true) as
select j.job_id, j.document_id, j.photo_id, j.user_id, coalesce(d.filename, p.file_name) as filename, j.pipeline, j.stage, j.state, s.progress, j.pool, j.priority,
       j.retry_count, j.cancel_requested, j.run_at, j.created_at, j.started_at, j.updated_at, j.finished_at,
       o.error_code, o.error_message, o.results, j.worker_id, j.lease_expires_at, j.correlation_id, j.seq
  from upload_pipeline.upload_jobs j
  left join upload_pipeline.documents d on d.document_id = j.document_id
  left join upload_pipeline.photos p on p.photo_id = j.photo_id
  join upload_pipeline.stages s on s.pipeline = j.pipeline and s.stage = j.stage
  left join upload_pipeline.job_outcomes o on o.job_id = j.job_id
 -- what is being deleted is gone for its owner, with its jobs
 where d.document_id is not null or p.photo_id is not null;

-- How much stands where: jobs by pipeline, stage and state, and how long the oldest has been there.
create view upload_pipeline.queue_depth with (security_invoker = true) as
select j.pipeline, j.pool, j.stage, s.position, j.state, count(*) as jobs, min(j.updated_at) as oldest
  from upload_pipeline.upload_jobs j
  join upload_pipeline.stages s on s.pipeline = j.pipeline and s.stage = j.stage
 where j.state in ('queued', 'working', 'retryable')
 group by j.pipeline, j.pool, j.stage, s.position, j.state;

-- A document as the one who uploaded it asks after it: one row each, with the latest job of its processing told in four
-- words. `pending`: nobody has begun, or the bytes have not come. `failed`: also where it was cancelled. The same mapping is
-- `upload_pipeline.stages.shown_status`; a test holds the two together. The latest job is the one that has no later one:
-- so a filter by status reads all of a user's jobs in one pass, and twenty rows of a page their own only.
create view upload_pipeline.upload_history with (security_invoker = true) as
select d.document_id, d.user_id, d.filename, d.file_bytes, d.media_type, d.created_at as uploaded_at,
       case when j.job_id is null then case when d.searchable_at is null then 'failed' else 'completed' end
            when j.state = 'done' then 'completed'
            when j.state in ('deadletter', 'cancelled') then 'failed'
            when j.stage = 'queued' and (j.state <> 'working' or d.upload_deadline is not null) then 'pending'
            else 'processing' end as status,
       case when j.job_id is null then d.searchable_at else j.finished_at end as completed_at,
       case when j.state in ('deadletter', 'cancelled')
            then coalesce(o.error_code, case j.state when 'cancelled' then 'CANCELLED' else 'INTERNAL' end) end as error_code,
       case when j.state in ('deadletter', 'cancelled')
            then coalesce(o.error_message, case j.state when 'cancelled' then 'The job was cancelled. Retry it to go on.'
                                                        else 'The job failed.' end) end as error_message,
       d.raw_key, d.upload_deadline is null as stored
  from upload_pipeline.documents d
  left join upload_pipeline.upload_jobs j
    on j.document_id = d.document_id and j.pipeline = 'document'
   and not exists (select from upload_pipeline.upload_jobs n
                    where n.document_id = j.document_id and n.pipeline = 'document' and n.seq > j.seq)
  left join upload_pipeline.job_outcomes o on o.job_id = j.job_id;

-- The embedding models, and how far the one is that is being filled. `chunks_per_second` is the rate of the last five
-- minutes; the time left follows from it. `failed_documents` are those whose job has failed for good since it was added;
-- `failure` is what its provider said in the last ten minutes, twice as long as a worker leaves it alone at most. What a
-- retired model lacks nobody asks, and is not counted. The others' is counted by joins over all chunks: by `|| ''` and
-- `offset 0` the planner does not take what differs for rare, and looks up no vector and no document for each chunk: with
-- 320,000 chunks and a model that is half filled 0.9 s instead of 1.8, and each retired model took 1.3 more.
create view upload_pipeline.model_overview with (security_invoker = true) as
select m.model, m.provider, m.dimensions, m.status, m.paused, m.created_at, m.building_since, m.activated_at, m.retire_at,
       live.chunks, case when m.status <> 'retired' then live.chunks - lacking.chunks end as filled_chunks,
       case when m.status <> 'retired' then lacking.chunks end as lacking_chunks,
       case when m.status <> 'retired' then lacking.documents end as lacking_documents,
       stored.vectors, rate.chunks_per_second,
       case when m.status = 'building' and not m.paused and rate.chunks_per_second > 0
            then make_interval(secs => lacking.chunks / rate.chunks_per_second) end as time_left,
       jobs.open_jobs, jobs.failed_documents, fault.failed_at, fault.failure
  from upload_pipeline.embedding_models m
 cross join lateral (
   select count(*) as chunks from upload_pipeline.document_chunks c
     join upload_pipeline.documents d on d.document_id = c.document_id
    where c.live and d.deleted_at is null) live
 cross join lateral (
   select count(*) as chunks, count(distinct c.document_id) as documents
     from (select c.document_id
             from upload_pipeline.document_chunks c
            where m.status <> 'retired' and c.live and c.embed_model || '' <> m.model
              and not exists (select from upload_pipeline.chunk_vectors s
                               where s.chunk_id = c.chunk_id and s.embed_model || '' = m.model)
           offset 0) c
     join upload_pipeline.documents d on d.document_id = c.document_id
    where d.deleted_at is null) lacking
 cross join lateral (
   select (select count(*) from upload_pipeline.document_chunks c where c.embed_model = m.model)
          + (select count(*) from upload_pipeline.chunk_vectors s where s.embed_model = m.model) as vectors) stored
  left join lateral (
   select count(s.chunk_id) / nullif(extract(epoch from upload_pipeline.now() - w.since), 0)::double precision as chunks_per_second
     from (select greatest(m.building_since, upload_pipeline.now() - interval '5 minutes') as since) w
     left join upload_pipeline.chunk_vectors s on s.embed_model = m.model and s.created_at >= w.since
    where m.status = 'building'
    group by w.since) rate on true
 cross join lateral (
   select count(*) filter (where j.finished_at is null) as open_jobs,
          count(distinct j.document_id) filter (where j.state = 'deadletter' and j.finished_at >= m.building_since) as failed_documents
     from upload_pipeline.upload_jobs j
    where j.pipeline = 'reembed' and m.status = 'building') jobs
  left join lateral (
   select m.failed_at, m.failure
    where m.status = 'building' and m.failed_at >= greatest(m.building_since, upload_pipeline.now() - interval '10 minutes')) fault on true;

-- sql/schema/08_policies.sql

-- Row-level security and grants. Users read their own rows; buffers, lanes and workers are not theirs to read; nobody
-- who logs in writes a table: the verbs do. `(select auth.uid())` and not `auth.uid()`, so that it is computed once
-- for a statement and not for each row.

do $$
declare
  v_table text;
begin
  for v_table in
    select c.relname from pg_catalog.pg_class c
     where c.relnamespace = 'upload_pipeline'::regnamespace and c.relkind in ('r', 'p')
  loop
    execute format('alter table upload_pipeline.%I enable row level security', v_table);
  end loop;

  foreach v_table in array array[
    'stages', 'embedding_models', 'documents', 'upload_jobs', 'job_outcomes', 'lanes', 'events', 'document_chunk_buffer',
    'document_vector_buffer', 'document_cached_chunks', 'document_chunks', 'document_outline', 'workers',
    'stage_durations', 'policies', 'batches', 'batch_members', 'processing_records', 'provider_budgets',
    'provider_reservations', 'usage_records', 'organizations', 'organization_members', 'projects', 'photos', 'parse_submissions',
    'photo_detection_requests', 'chunk_vectors', 'upkeep_rounds']
  loop
    execute format('create policy %I on upload_pipeline.%I for select to upload_worker using (true)', v_table || '_worker', v_table);
    execute format('grant select on upload_pipeline.%I to upload_worker, service_role', v_table);
  end loop;

  foreach v_table in array array[
    'job_outcomes', 'events', 'document_outline', 'policies', 'batches', 'batch_members',
    'usage_records']
  loop
    execute format(
      'create policy %I on upload_pipeline.%I for select to authenticated using (user_id = (select auth.uid()))',
      v_table || '_owner', v_table);
    execute format('grant select on upload_pipeline.%I to authenticated', v_table);
  end loop;
end
$$;

-- a document that is being deleted is gone for its user, and so is what hangs on it once the rows go
create policy documents_owner on upload_pipeline.documents for select to authenticated
  using (user_id = (select auth.uid()) and deleted_at is null);
create policy document_chunks_owner on upload_pipeline.document_chunks for select to authenticated
  using (user_id = (select auth.uid()) and live);
-- what belongs to an organisation is its members' to see: the array is found once for a statement, and is short
do $$
declare
  v_table text;
begin
  foreach v_table in array array['organizations', 'organization_members', 'projects'] loop
    execute format(
      'create policy %I on upload_pipeline.%I for select to authenticated
         using (organization_id = any ((select upload_pipeline.member_organizations())::uuid[]))',
      v_table || '_member', v_table);
    execute format('grant select on upload_pipeline.%I to authenticated', v_table);
  end loop;
end
$$;
create policy photos_member on upload_pipeline.photos for select to authenticated
  using (organization_id = any ((select upload_pipeline.member_organizations())::uuid[]) and deleted_at is null);
-- filling a model is nothing that a user asked for, or can act on
create policy upload_jobs_owner on upload_pipeline.upload_jobs for select to authenticated
  using (user_id = (select auth.uid()) and pipeline <> 'reembed');
create policy stages_reader on upload_pipeline.stages for select to authenticated using (true);
grant select on upload_pipeline.documents, upload_pipeline.document_chunks, upload_pipeline.upload_jobs, upload_pipeline.stages,
  upload_pipeline.photos to authenticated;
grant select on upload_pipeline.model_overview to upload_worker, service_role;
grant select on upload_pipeline.job_overview, upload_pipeline.queue_depth, upload_pipeline.upload_history,
  upload_pipeline.batch_overview, upload_pipeline.batch_member_overview, upload_pipeline.document_nodes,
  upload_pipeline.document_edges,
  upload_pipeline.usage_by_user, upload_pipeline.usage_by_day, upload_pipeline.usage_by_model to authenticated, upload_worker, service_role;

-- Functions are executable by everybody unless that is taken back.
revoke execute on all functions in schema upload_pipeline from public;

grant execute on function
  upload_pipeline.now(),
  upload_pipeline.estimate_jobs(uuid[], double precision),
  upload_pipeline.member_organizations(),
  upload_pipeline.photo_progress(uuid[]),
  upload_pipeline.search_chunks(text, extensions.vector, text, integer, text, uuid[], jsonb)
  to authenticated;

do $$
declare
  v_function regprocedure;
begin
  for v_function in
    select p.oid::regprocedure from pg_catalog.pg_proc p
     where p.pronamespace = 'upload_pipeline'::regnamespace
       -- inner parts of the verbs, and what only the schema's owner may do
       and p.proname not in ('new_job_id', 'wake_lanes', 'check_step', 'prepare_restart', 'drop_event_partitions',
                             'notify_watchers', 'settle_batch_members', 'wake_job', 'lock_awaited', 'lock_latest_job',
                             'check_no_stranger', 'look_for_upload', 'resume_upload_job', 'move_session_documents',
                             'forget_session_document', 'keep_named_models', 'lock_budget', 'job_cost', 'keep_costs', 'note_photo_status',
                             'lock_photo_job', 'start_photo_deletion', 'check_owner', 'check_vectors', 'today', 'touch_vectors',
                             'move_user_vectors', 'note_parse', 'set_detections', 'detection_results', 'hold_models',
                             'lacks_vectors', 'note_model_change', 'pending_chunks', 'place_vectors')
  loop
    execute format('grant execute on function %s to upload_worker, service_role', v_function);
  end loop;
end
$$;

-- Workers and the terminal see whether migrations are pending. Where this file is not run as a migration there is no ledger.
do $$
begin
  if to_regclass('supabase_migrations.schema_migrations') is not null then
    grant usage on schema supabase_migrations to upload_worker;
    grant select on supabase_migrations.schema_migrations to upload_worker;
  end if;
end
$$;

notify pgrst, 'reload schema';
