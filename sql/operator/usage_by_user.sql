-- Who has used what of the providers, in how many calls, and at what cost (USD, of what has a price)? `since`: how far back.
--   psql "$WORKER_URL" -v since='30 days' -f sql/operator/usage_by_user.sql
\if :{?since}
\else
  \set since '30 days'
\endif
select r.user_id, r.provider, r.model, r.operation, count(distinct r.document_id) as documents, sum(r.requests) as requests,
       sum(r.tokens) as tokens, sum(r.pages) as pages, sum(r.cached) as cached,
       round(sum(r.cost_micros) / 1000000, 4) as usd, count(*) - count(r.cost_micros) as unpriced
  from upload_pipeline.usage_records r
 where r.at >= now() - :'since'::interval
 group by r.user_id, r.provider, r.model, r.operation
 order by sum(r.cost_micros) desc nulls last, sum(r.tokens + r.pages) desc, r.user_id, r.provider, r.model, r.operation;
