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
