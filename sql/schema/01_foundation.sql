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
