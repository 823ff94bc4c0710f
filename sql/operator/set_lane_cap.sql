-- Action: how many jobs of a user may a pool have at work at once? Running jobs run on; the cap holds for new claims.
--   psql "$WORKER_URL" -v user_id="$USER_ID" -v pool=default -v cap=4 -f sql/operator/set_lane_cap.sql
select upload_pipeline.set_lane_cap(:'user_id'::uuid, :'pool', :'cap'::integer);

select pool, user_id, max_in_flight, ready from upload_pipeline.lanes
 where user_id = :'user_id'::uuid
 order by pool;
