-- Which indexes are used, and which tables are read from end to end?
--   psql "$WORKER_URL" -f sql/operator/index_usage.sql
select relname as table, indexrelname as index, idx_scan as scans, idx_tup_read as entries_read,
       pg_size_pretty(pg_relation_size(indexrelid)) as size
  from pg_catalog.pg_stat_user_indexes
 where schemaname = 'upload_pipeline'
 order by relname, indexrelname;

select relname as table, seq_scan as scans, seq_tup_read as rows_read, idx_scan as index_scans
  from pg_catalog.pg_stat_user_tables
 where schemaname = 'upload_pipeline' and seq_scan > 0
 order by seq_tup_read desc;
