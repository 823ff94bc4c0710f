-- How large is each month of the audit trail? Rows in events_default belong to a month that was not made in time;
-- maintenance moves them.
--   psql "$WORKER_URL" -f sql/operator/event_partitions.sql
select c.relname as partition, pg_get_expr(c.relpartbound, c.oid) as bounds,
       pg_size_pretty(pg_total_relation_size(c.oid)) as size, greatest(c.reltuples, 0)::bigint as rows_about
  from pg_catalog.pg_inherits i
  join pg_catalog.pg_class c on c.oid = i.inhrelid
 where i.inhparent = 'upload_pipeline.events'::regclass
 order by c.relname;
