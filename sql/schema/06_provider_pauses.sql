-- Stops a provider for all workers, since its account is empty or its key is refused: it is asked again after p_seconds, and
-- until then jobs wait and no retry is counted. Many workers find it out at the same moment; the first one freezes the
-- budget and writes the alarm, the others meet a budget that is paused about as long already and are told false.
create function upload_pipeline.pause_provider(
  p_provider text,
  p_key_id   text,
  p_model    text,
  p_seconds  double precision,
  p_code     text,
  p_message  text
)
returns boolean
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_now   timestamptz := upload_pipeline.now();
  v_until timestamptz := v_now + make_interval(secs => p_seconds);
begin
  insert into upload_pipeline.provider_budgets as b (provider, key_id, model, frozen_until, paused_until)
  values (p_provider, p_key_id, p_model, v_until, v_until)
  on conflict (provider, key_id, model) do update
    set frozen_until = greatest(b.frozen_until, excluded.frozen_until), paused_until = excluded.paused_until
   -- an operator ends a pause by `frozen_until`; a limit's freeze is none, however long
   where b.frozen_until is null or b.paused_until is null
      or least(b.frozen_until, b.paused_until) < v_now + make_interval(secs => p_seconds / 2);
  if not found then
    return false;
  end if;
  perform upload_pipeline.record_event('provider_paused', p_severity => 'error', p_payload => jsonb_build_object(
    'provider', p_provider, 'model', p_model, 'code', p_code, 'message', left(p_message, 500), 'until', v_until));
  return true;
end
$$;
