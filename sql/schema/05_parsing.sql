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
