-- Insurance policies: documents of which somebody has said whose product they describe. All that is processed, searched
-- and deleted is the document.

create table upload_pipeline.policies (
  document_id  uuid primary key,
  user_id      uuid not null,
  insurer      text not null,
  product_name text not null,
  launch_date  date not null,
  created_at   timestamptz not null default upload_pipeline.now(),
  foreign key (document_id, user_id) references upload_pipeline.documents (document_id, user_id)
    on update cascade on delete cascade,
  constraint policies_insurer check (insurer <> '' and length(insurer) <= 200),
  constraint policies_product_name check (product_name <> '' and length(product_name) <= 200)
);

-- A policy's bytes are in the store: makes document, job and policy in one transaction, by accept_document. What is said
-- of the policy stands in its row and, so that a search can filter by it, in the document's metadata.
--
-- The same bytes again: the first document and job come back, `duplicate` set, and what is said this time replaces what
-- was said before, since there is no other way to mend it. A document that was no policy becomes one; its other metadata
-- stay. A document whose jobs have been removed gets one.
create function upload_pipeline.accept_policy(
  p_document_id    uuid,
  p_user_id        uuid,
  p_filename       text,
  p_media_type     text,
  p_file_bytes     bigint,
  p_file_sha256    text,
  p_raw_key        text,
  p_insurer        text,
  p_product_name   text,
  p_launch_date    date,
  p_metadata       jsonb default '{}',
  p_priority       smallint default 0,
  p_correlation_id text default ''
)
returns table (document_id uuid, job_id uuid, duplicate boolean)
language plpgsql
security definer
set search_path = ''
as $$
#variable_conflict use_column
declare
  v_said   constant jsonb := jsonb_build_object('insurer', p_insurer, 'product_name', p_product_name,
                                                'launch_date', to_char(p_launch_date, 'YYYY-MM-DD'));
  v_answer record;
begin
  select a.document_id, a.job_id, a.duplicate into v_answer
    from upload_pipeline.accept_document(p_document_id, p_user_id, p_filename, p_media_type, p_file_bytes, p_file_sha256,
      p_raw_key, p_metadata || v_said, p_priority, p_correlation_id) a;
  if v_answer.duplicate then
    -- Holds the document until the end: a deletion or a new owner waits, or was here first, and then there is nothing of
    -- this user's to become a policy.
    update upload_pipeline.documents d
       set metadata = d.metadata || v_said, updated_at = upload_pipeline.now()
     where d.document_id = v_answer.document_id and d.user_id = p_user_id and d.deleted_at is null;
    if not found then
      raise exception 'document % with the same bytes is gone, or going', v_answer.document_id
        using errcode = 'UP003', hint = 'Send the file again in a moment.';
    end if;
  end if;
  insert into upload_pipeline.policies as p (document_id, user_id, insurer, product_name, launch_date, created_at)
  values (v_answer.document_id, p_user_id, p_insurer, p_product_name, p_launch_date, upload_pipeline.now())
  on conflict (document_id) do update
    set insurer = excluded.insurer, product_name = excluded.product_name, launch_date = excluded.launch_date;
  if v_answer.job_id is null then
    select e.job_id into v_answer.job_id
      from upload_pipeline.enqueue_job(v_answer.document_id, p_user_id, 'document', p_priority, p_correlation_id) e;
  end if;
  return query select v_answer.document_id, v_answer.job_id, v_answer.duplicate;
end
$$;
