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
