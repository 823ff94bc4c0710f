-- What hosted providers let us call: requests and tokens in a minute, for each key and model, shared by all processes.
-- A provider that counts some calls in a shorter period too has a budget more for these, under a name of its own; what is said
-- here of a minute holds for any period, as long as a budget has one.
--
-- A call is reserved before it is made and settled when its answer is there. It arrives at the provider at some moment
-- between the two, nobody knows which; so it counts from its reservation until a minute after it was settled. Then no
-- window of a minute at the provider holds more than the limit: take the calls that arrived in one, and of these the one
-- that was reserved last. Each of the others was reserved before it, and was settled at or after its arrival, which is not
-- more than a minute before the end of the window and so before that last reservation at the latest by a minute: it was
-- counted when the last one was granted, and the sum was within the limit.
--
-- That needs the sum to be right. All that changes a budget locks its row first (one row, and nothing else is locked by
-- these verbs, so nobody waits in a circle), and every statement behind the lock has a snapshot of its own (READ COMMITTED),
-- taken when the lock is held: it sees what every holder before has committed. The time is read behind the lock as well, so
-- it grows in the order of the grants. And it needs a caller to make its call only within the life of its reservation: one
-- that is never settled, because its process died, counts as made at its end, `ttl` after it was granted, and for a minute
-- more. Nothing but time gives a call back that may have been made.
--
-- Nobody starves. Who is refused stands in line. Somebody behind is granted only what fits beside all who stand before,
-- and beside what was granted since the first of them asked: so the first is granted at the latest when all is gone that
-- was there when it asked, and then the next one is the first. What is gone soon may be used by those who would not be in
-- the way then. A place in line is kept by asking again; who does not come back loses it 15 s after the time told.

-- One row for each key and model of a provider. `key_id` is the beginning of the key's SHA-256, never the key.
-- `calls` and `tokens` are the sums of what counts now, kept here so that a call costs no sum over a minute of calls;
-- `granted_…` the sums of all that was ever granted.
-- `foreign_…`: what the provider counts that is not ours (other programs with the same key), as its last answer told,
-- until when it said that all would be free. Limits are null until an answer has told them, or tells none. `paused_until`: end
-- of the last pause (06_provider_pauses); it lies within `frozen_until` while that holds.
create table upload_pipeline.provider_budgets (
  budget_id           bigint primary key generated always as identity,
  provider            text not null,
  key_id              text not null,
  model               text not null,
  request_limit       bigint,
  token_limit         bigint,
  calls               bigint not null default 0,
  tokens              bigint not null default 0,
  granted_calls       bigint not null default 0,
  granted_tokens      bigint not null default 0,
  foreign_calls       bigint not null default 0,
  foreign_calls_until timestamptz,
  foreign_tokens      bigint not null default 0,
  foreign_tokens_until timestamptz,
  frozen_until        timestamptz,
  paused_until        timestamptz,
  answered_at         timestamptz,
  unique (provider, key_id, model),
  constraint provider_budgets_key check (key_id ~ '^[0-9a-f]{8,64}$'),
  constraint provider_budgets_sums check (calls >= 0 and tokens >= 0 and foreign_calls >= 0 and foreign_tokens >= 0)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 200);

-- What is reserved, or waits to be. `until`: when the row no longer counts, or the place in line is lost. In line while
-- `granted_at` is null, by `place`; under way while `settled_at` is. `…_before`: all that had ever been granted when it asked.
-- `period`: in which the provider counts it.
create table upload_pipeline.provider_reservations (
  reservation_id uuid primary key,
  budget_id      bigint not null references upload_pipeline.provider_budgets on delete cascade,
  place          bigint generated always as identity,
  calls          bigint not null,
  tokens         bigint not null,
  calls_before   bigint not null,
  tokens_before  bigint not null,
  period         interval not null,
  granted_at     timestamptz,
  settled_at     timestamptz,
  until          timestamptz not null,
  constraint provider_reservations_size check (calls >= 0 and tokens >= 0),
  constraint provider_reservations_period check (period > interval '0'),
  constraint provider_reservations_settled check (settled_at is null or granted_at is not null)
) with (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 500);

-- lock_budget: what no longer counts; reserve_calls: what will be free next
create index provider_reservations_until on upload_pipeline.provider_reservations (budget_id, until);
-- reserve_calls: who stands in line
create index provider_reservations_line on upload_pipeline.provider_reservations (budget_id, place) where granted_at is null;

-- The budget's row, locked and brought up to this moment: what no longer counts is gone. `at` is the moment.
create function upload_pipeline.lock_budget(
  p_budget_id bigint, out budget upload_pipeline.provider_budgets, out at timestamptz
)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
as $$
declare
  v_gone   bigint;
  v_calls  bigint;
  v_tokens bigint;
begin
  if current_setting('transaction_isolation') <> 'read committed' then
    raise exception 'a budget needs READ COMMITTED, this transaction is %', current_setting('transaction_isolation')
      using errcode = '25001', hint = 'The sums must be read after the lock is won.';
  end if;
  perform from upload_pipeline.provider_budgets b where b.budget_id = p_budget_id for update;
  -- the transaction's time is older than the lock where the lock was waited for
  at := coalesce(nullif(current_setting('upload_pipeline.now', true), '')::timestamptz, clock_timestamp());
  -- `<`: a window that holds both its ends is kept as well
  with gone as (
    delete from upload_pipeline.provider_reservations r
     where r.budget_id = p_budget_id and r.until < at
    returning r.granted_at, r.calls, r.tokens
  )
  select count(*), coalesce(sum(g.calls) filter (where g.granted_at is not null), 0),
         coalesce(sum(g.tokens) filter (where g.granted_at is not null), 0)
    into v_gone, v_calls, v_tokens from gone g;
  if v_gone > 0 then
    update upload_pipeline.provider_budgets b set calls = b.calls - v_calls, tokens = b.tokens - v_tokens
     where b.budget_id = p_budget_id;
  end if;
  select * into budget from upload_pipeline.provider_budgets b where b.budget_id = p_budget_id;
  if budget.foreign_calls_until < at then
    budget.foreign_calls := 0;
  end if;
  if budget.foreign_tokens_until < at then
    budget.foreign_tokens := 0;
  end if;
end
$$;

-- Reserves p_calls calls of p_tokens tokens together, or says how long to wait. Exact over all callers: see above. Asking
-- again with the same id keeps the place in line, and is answered the same once it was granted.
--
--   p_request_limit, p_token_limit   what an operator allows in a minute, where that is less than the provider does
--   p_ttl                            the call ends within this time, or is given up
--   p_period                         in which the limits hold; the same for all calls of a budget
--   granted                          then `seconds` is what is left of p_ttl; else how long to wait before asking again
--
-- Before the provider has told its limits, and where none are given, one call at a time finds them out, and another one
-- after 20 s without an answer. More tokens or calls than the limit can never be granted and raise UP005.
create function upload_pipeline.reserve_calls(
  p_reservation_id uuid,
  p_provider       text,
  p_key_id         text,
  p_model          text,
  p_calls          bigint,
  p_tokens         bigint,
  p_request_limit  bigint default null,
  p_token_limit    bigint default null,
  p_ttl            interval default '2 minutes',
  p_period         interval default '1 minute'
)
returns table (granted boolean, seconds double precision)
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
  v_id      bigint;
  v_locked  record;
  v_budget  upload_pipeline.provider_budgets;
  v_mine    upload_pipeline.provider_reservations;
  v_other   upload_pipeline.provider_reservations;
  v_now     timestamptz;
  v_ready   timestamptz;
  v_calls   bigint;   -- the limits that hold
  v_tokens  bigint;
  v_line    record;
  v_room_calls  bigint;
  v_room_tokens bigint;
  v_short   bigint := 0;  -- what has to go before there is room
  v_lacking bigint := 0;
begin
  select b.budget_id into v_id from upload_pipeline.provider_budgets b
   where b.provider = p_provider and b.key_id = p_key_id and b.model = p_model;
  if not found then
    insert into upload_pipeline.provider_budgets (provider, key_id, model) values (p_provider, p_key_id, p_model)
    on conflict (provider, key_id, model) do nothing;
    select b.budget_id into v_id from upload_pipeline.provider_budgets b
     where b.provider = p_provider and b.key_id = p_key_id and b.model = p_model;
  end if;
  select * into v_locked from upload_pipeline.lock_budget(v_id);
  v_budget := v_locked.budget;
  v_now := v_locked.at;

  v_calls := least(v_budget.request_limit, p_request_limit);
  v_tokens := least(v_budget.token_limit, p_token_limit);
  if p_calls > v_calls or p_tokens > v_tokens then
    raise exception '% call(s) of % tokens are more than a whole % of "%" of % holds: % calls, % tokens', p_calls, p_tokens,
        case p_period when '1 minute' then 'minute' else p_period::text end, p_model, p_provider, coalesce(v_calls::text, 'any number of'),
        coalesce(v_tokens::text, 'any number of')
      using errcode = 'UP005', hint = 'Send it in smaller parts.';
  end if;

  select r.* into v_mine from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  if v_mine.granted_at is not null then
    return query select true, greatest(0, extract(epoch from v_mine.until - v_mine.period - v_now))::double precision;
    return;
  end if;

  if v_budget.frozen_until > v_now then
    v_ready := v_budget.frozen_until;
  elsif v_budget.answered_at is null and v_calls is null and v_tokens is null then
    -- The first to ask finds the limits out. Who has no answer in 20 s may have died: the next one goes as well. Each
    -- counts until it is settled or its own life is over, whoever goes meanwhile: so the limits hold once they are known.
    if exists (select from upload_pipeline.provider_reservations r
                where r.budget_id = v_id and r.granted_at is not null and r.settled_at is null and r.until >= v_now + r.period
                  and r.granted_at > v_now - interval '20 seconds')
       or exists (select from upload_pipeline.provider_reservations r
                   where r.budget_id = v_id and r.granted_at is null and (v_mine.place is null or r.place < v_mine.place)) then
      v_ready := v_now + interval '250 milliseconds';
    end if;
  else
    -- who stands before, and what was granted since the first of them asked
    select coalesce(sum(r.calls), 0) as calls, coalesce(sum(r.tokens), 0) as tokens,
           v_budget.granted_calls - min(r.calls_before) as passed_calls, v_budget.granted_tokens - min(r.tokens_before) as passed_tokens,
           min(r.until) as lapses
      into v_line
      from upload_pipeline.provider_reservations r
     where r.budget_id = v_id and r.granted_at is null and (v_mine.place is null or r.place < v_mine.place);
    -- room that is left now, and room that is left where all who stand before have theirs
    v_room_calls := v_calls - v_budget.foreign_calls - p_calls;
    v_room_tokens := v_tokens - v_budget.foreign_tokens - p_tokens;
    if p_calls > 0 and (v_budget.calls > v_room_calls or least(v_budget.calls, v_line.passed_calls) + v_line.calls > v_room_calls) then
      v_short := v_budget.calls + v_line.calls - v_room_calls;
    end if;
    if p_tokens > 0 and (v_budget.tokens > v_room_tokens or least(v_budget.tokens, v_line.passed_tokens) + v_line.tokens > v_room_tokens) then
      v_lacking := v_budget.tokens + v_line.tokens - v_room_tokens;
    end if;
    if v_short > 0 or v_lacking > 0 then
      -- When to look again: when enough is settled and gone, if nothing else comes; or others' use of the key ends. What is
      -- under way does not go within a period.
      v_ready := least(v_now + p_period,
                       case when v_short > 0 and v_budget.foreign_calls > 0 then v_budget.foreign_calls_until end,
                       case when v_lacking > 0 and v_budget.foreign_tokens > 0 then v_budget.foreign_tokens_until end);
      for v_other in
        select r.* from upload_pipeline.provider_reservations r
         where r.budget_id = v_id and r.granted_at is not null and r.until <= v_ready
         order by r.until
      loop
        v_short := v_short - v_other.calls;
        v_lacking := v_lacking - v_other.tokens;
        if v_short <= 0 and v_lacking <= 0 then
          v_ready := v_other.until;
          exit;
        end if;
      end loop;
      -- where nothing but the line is in the way: one place in it is taken up, or lost, until then
      if coalesce(v_budget.calls <= v_room_calls, true) and coalesce(v_budget.tokens <= v_room_tokens, true) then
        v_ready := least(v_ready, v_line.lapses);
      end if;
      -- at least so long that asking again is no busy loop
      v_ready := greatest(v_ready, v_now) + interval '10 milliseconds';
    end if;
  end if;

  insert into upload_pipeline.provider_reservations as r
    (reservation_id, budget_id, calls, tokens, calls_before, tokens_before, period, granted_at, until)
  values (p_reservation_id, v_id, p_calls, p_tokens, v_budget.granted_calls, v_budget.granted_tokens, p_period,
          case when v_ready is null then v_now end,
          case when v_ready is null then v_now + p_ttl + p_period else v_ready + interval '15 seconds' end)
  on conflict (reservation_id) do update
    set granted_at = excluded.granted_at, until = excluded.until, calls = excluded.calls, tokens = excluded.tokens;
  if v_ready is null then
    update upload_pipeline.provider_budgets b
       set calls = b.calls + p_calls, tokens = b.tokens + p_tokens,
           granted_calls = b.granted_calls + p_calls, granted_tokens = b.granted_tokens + p_tokens
     where b.budget_id = v_id;
  end if;
  return query
    select v_ready is null, extract(epoch from coalesce(v_ready - v_now, p_ttl))::double precision;
end
$$;

-- The call has ended. It counts for its period from now, with p_tokens where that is known, and else with what was reserved.
-- p_calls 0 and p_tokens 0: it was never made, and all is free at once; so a place in line is given up.
--
-- What the answer told of the provider's own books, each null where it told nothing: limits, which hold from now on; what
-- remained, and in how many seconds all is free again. Where the provider counts more than all that counts here, somebody
-- else uses the key, and the difference is kept free for them until then. p_retry_after: seconds in which nothing more is
-- granted. p_answered false: no answer came, or one that tells nothing; the limits are still to be found out.
--
-- False where there is no such reservation any more. Safe to repeat.
create function upload_pipeline.settle_calls(
  p_reservation_id     uuid,
  p_calls              bigint default null,
  p_tokens             bigint default null,
  p_answered           boolean default false,
  p_request_limit      bigint default null,
  p_requests_remaining bigint default null,
  p_requests_reset     double precision default null,
  p_token_limit        bigint default null,
  p_tokens_remaining   bigint default null,
  p_tokens_reset       double precision default null,
  p_retry_after        double precision default null
)
returns boolean
language plpgsql
security definer
set search_path = ''
set enable_seqscan = off
set jit = off
as $$
declare
  v_locked record;
  v_budget upload_pipeline.provider_budgets;
  v_mine   upload_pipeline.provider_reservations;
  v_now    timestamptz;
  v_calls  bigint;
  v_tokens bigint;
begin
  select r.* into v_mine from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  if not found then
    return false;
  end if;
  select * into v_locked from upload_pipeline.lock_budget(v_mine.budget_id);
  v_budget := v_locked.budget;
  v_now := v_locked.at;
  select r.* into v_mine from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  if not found then
    return false;
  end if;
  if v_mine.granted_at is null then
    delete from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
    return true;
  end if;
  if v_mine.settled_at is not null then
    return true;
  end if;
  v_calls := coalesce(p_calls, v_mine.calls);
  v_tokens := coalesce(p_tokens, v_mine.tokens);
  if v_calls = 0 and v_tokens = 0 then
    delete from upload_pipeline.provider_reservations r where r.reservation_id = p_reservation_id;
  else
    update upload_pipeline.provider_reservations r
       set calls = v_calls, tokens = v_tokens, settled_at = v_now, until = v_now + r.period
     where r.reservation_id = p_reservation_id;
  end if;
  v_budget.calls := v_budget.calls - v_mine.calls + v_calls;
  v_budget.tokens := v_budget.tokens - v_mine.tokens + v_tokens;
  if p_requests_remaining is not null then
    v_budget.foreign_calls := greatest(0, coalesce(p_request_limit, v_budget.request_limit) - p_requests_remaining - v_budget.calls);
    v_budget.foreign_calls_until := v_now + make_interval(secs => coalesce(p_requests_reset, 60));
  end if;
  if p_tokens_remaining is not null then
    v_budget.foreign_tokens := greatest(0, coalesce(p_token_limit, v_budget.token_limit) - p_tokens_remaining - v_budget.tokens);
    v_budget.foreign_tokens_until := v_now + make_interval(secs => coalesce(p_tokens_reset, 60));
  end if;
  update upload_pipeline.provider_budgets b
     set calls = v_budget.calls, tokens = v_budget.tokens,
         request_limit = coalesce(p_request_limit, b.request_limit), token_limit = coalesce(p_token_limit, b.token_limit),
         foreign_calls = coalesce(v_budget.foreign_calls, 0), foreign_calls_until = v_budget.foreign_calls_until,
         foreign_tokens = coalesce(v_budget.foreign_tokens, 0), foreign_tokens_until = v_budget.foreign_tokens_until,
         frozen_until = greatest(b.frozen_until, v_now + make_interval(secs => p_retry_after)),
         answered_at = case when p_answered then v_now else b.answered_at end
   where b.budget_id = v_budget.budget_id;
  return true;
end
$$;

-- Nothing more is granted for p_seconds from now; an end that is later already stays. What is under way goes on.
create function upload_pipeline.freeze_budget(p_provider text, p_key_id text, p_model text, p_seconds double precision)
returns void
language sql
security definer
set search_path = ''
as $$
  insert into upload_pipeline.provider_budgets as b (provider, key_id, model, frozen_until)
  values (p_provider, p_key_id, p_model, upload_pipeline.now() + make_interval(secs => p_seconds))
  on conflict (provider, key_id, model) do update set frozen_until = greatest(b.frozen_until, excluded.frozen_until)
$$;
