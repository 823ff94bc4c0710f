-- What may be asked of each provider in a minute, what counts now, who waits, and until when is it frozen?
--   psql "$WORKER_URL" -f sql/operator/provider_budgets.sql
select b.provider, b.model, b.key_id, b.request_limit, b.token_limit,
       coalesce(sum(r.calls) filter (where r.granted_at is not null and r.until >= now()), 0) as calls,
       coalesce(sum(r.tokens) filter (where r.granted_at is not null and r.until >= now()), 0) as tokens,
       count(r.reservation_id) filter (where r.granted_at is not null and r.settled_at is null and r.until >= now()) as under_way,
       count(r.reservation_id) filter (where r.granted_at is null and r.until >= now()) as waiting,
       case when b.foreign_calls_until > now() then b.foreign_calls else 0 end as calls_of_others,
       case when b.foreign_tokens_until > now() then b.foreign_tokens else 0 end as tokens_of_others,
       date_trunc('second', greatest(b.frozen_until - now(), interval '0')) as frozen_for, b.answered_at
  from upload_pipeline.provider_budgets b
  left join upload_pipeline.provider_reservations r on r.budget_id = b.budget_id
 group by b.budget_id
 order by b.provider, b.model, b.key_id;
