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
