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
