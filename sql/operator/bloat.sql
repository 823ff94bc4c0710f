-- Are dead rows piling up, and who holds them? A claim reads past dead rows that vacuum may not remove while an old
-- snapshot is open: end that session (pg_terminate_backend) or that replication slot.
--   psql "$WORKER_URL" -f sql/operator/bloat.sql
select relname as table, n_live_tup as live, n_dead_tup as dead,
       round(100.0 * n_dead_tup / nullif(n_live_tup + n_dead_tup, 0), 1) as dead_percent,
       round(100.0 * n_tup_hot_upd / nullif(n_tup_upd, 0), 1) as hot_percent,
       pg_size_pretty(pg_total_relation_size(relid)) as size, last_autovacuum, last_autoanalyze
  from pg_catalog.pg_stat_user_tables
 where schemaname = 'upload_pipeline'
 order by n_dead_tup desc, relname;

select pid, usename, application_name, state, age(backend_xmin) as snapshot_age,
       date_trunc('second', now() - xact_start) as transaction_for, left(query, 80) as query
  from pg_catalog.pg_stat_activity
 where backend_xmin is not null and pid <> pg_backend_pid() and datname = current_database()
 order by age(backend_xmin) desc
 limit 10;

select slot_name, active, age(coalesce(xmin, catalog_xmin)) as snapshot_age
  from pg_catalog.pg_replication_slots
 where coalesce(xmin, catalog_xmin) is not null
 order by 3 desc;
