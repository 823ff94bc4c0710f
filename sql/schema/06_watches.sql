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
