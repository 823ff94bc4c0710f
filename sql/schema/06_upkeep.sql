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
