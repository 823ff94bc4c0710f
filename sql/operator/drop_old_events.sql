-- Action: drop the months of the audit trail that ended before a moment. Back them up first if they must be kept: this
-- is final. As the schema's owner.
--   psql "$ADMIN_URL" -v before=2031-01-01 -f sql/operator/drop_old_events.sql
select dropped from upload_pipeline.drop_event_partitions(:'before'::timestamptz) dropped;
