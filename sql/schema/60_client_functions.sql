-- Functions for clients: start_image_job, cancel_run, requeue_run. The public ones run with the caller's rights and RLS;
-- those that must change runs go through a function in image_jobs that checks membership first.

-- Cancel a run that is pending or running; a finished one is left as it is. For members and operators.
create or replace function image_jobs.cancel_run(p_run_id varchar)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
begin
  select r.* into v_run from public.runs r where r.id = p_run_id and (r.kind = 'image_gen') is true for update;
  if not found or not (image_jobs.is_operator() or image_jobs.can_access_workflow(v_run.subject_id)) then
    raise exception using errcode = 'PT404', message = 'There is no such run.', hint = 'Check the id, and that you are a member of its workflow.';
  end if;
  if v_run.status in ('pending', 'running') then
    update public.runs r set status = 'cancelled' where r.id = p_run_id;
  end if;
end
$$;

-- Requeue a failed or cancelled run. For members; operators may requeue any run.
create or replace function image_jobs.requeue_run(p_run_id varchar)
returns void language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_run record;
  v_operator boolean := image_jobs.is_operator();
begin
  -- Limits before the row, as inserts have it: of the caller, as whose the run counts from now on. Whatever the status is: it may be
  -- another one when the row is locked.
  if not v_operator then
    select r.subject_id, image_jobs.dearest_cost(
      r.processor || image_jobs.remaining_fallbacks(r.metadata, r.processor, null), r.metadata -> 'promptSpec') as usd
    into v_run from public.runs r
    where r.id = p_run_id and (r.kind = 'image_gen') is true and image_jobs.can_access_workflow(r.subject_id);
    if found then
      perform image_jobs.check_usage(
        array_remove(array[image_jobs.current_user_id()], null), array[v_run.subject_id], 1, v_run.usd);
    end if;
  end if;
  select r.* into v_run from public.runs r where r.id = p_run_id and (r.kind = 'image_gen') is true for update;
  if not found or not (v_operator or image_jobs.can_access_workflow(v_run.subject_id)) then
    raise exception using errcode = 'PT404', message = 'There is no such run.', hint = 'Check the id, and that you are a member of its workflow.';
  end if;
  if not v_operator and v_run.status not in ('failed', 'cancelled') then
    perform image_jobs.refuse(format('A run that is %s cannot be requeued.', v_run.status),
      case v_run.status when 'completed' then 'Insert a new run to make another image.'
        else 'It is on its way; cancel it first to start anew.' end);
  end if;
  update public.runs r set status = 'pending' where r.id = p_run_id;
end
$$;

-- Returns a run as an ImageJobRecord, if the caller may see it.
create or replace function image_jobs.image_job_record(p_run_id varchar)
returns jsonb language sql stable set search_path = ''
as $$
  select to_jsonb(j) from public.image_jobs j where j."jobId" = p_run_id
$$;

create or replace function public.cancel_run(run_id varchar)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.cancel_run(run_id);
  return image_jobs.image_job_record(run_id);
end
$$;
comment on function public.cancel_run(varchar) is 'Image Job Orchestrator: stops a run; returns its ImageJobRecord. A finished run is left as it is.';

create or replace function public.requeue_run(run_id varchar)
returns jsonb language plpgsql volatile set search_path = ''
as $$
begin
  perform image_jobs.requeue_run(run_id);
  return image_jobs.image_job_record(run_id);
end
$$;
comment on function public.requeue_run(varchar) is
  'Image Job Orchestrator: puts a failed or cancelled run in line again; returns its ImageJobRecord.';

-- StartImageJobRequest in, ImageJobRecord out. metadata is merged at the top level, the named fields win.
-- The same idempotency key (of the same user, in the same workflow) returns the first run.
create or replace function public.start_image_job(request jsonb)
returns jsonb language plpgsql volatile set search_path = ''
as $$
declare
  v_metadata jsonb;
  v_workflow uuid;
  v_id varchar;
begin
  if jsonb_typeof(request) is distinct from 'object' then
    perform image_jobs.refuse('The request must be an object.', 'Send {nodeId, workflowId, promptSpec, provider, model}.');
  end if;
  if coalesce(jsonb_typeof(request -> 'metadata'), 'null') not in ('object', 'null') then
    perform image_jobs.refuse('metadata must be an object.', 'Leave it out if there is none.');
  end if;
  if coalesce(request ->> 'nodeId', '') = '' then
    perform image_jobs.refuse('nodeId is missing.', 'Name the canvas node that shall show the image.');
  end if;
  if coalesce(request ->> 'provider', '') = '' or coalesce(request ->> 'model', '') = '' then
    perform image_jobs.refuse('provider and model are missing.', 'The view image_models lists what is on offer.');
  end if;
  if request ->> 'workflowId' !~* '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' or request ->> 'workflowId' is null then
    perform image_jobs.refuse('workflowId must be a uuid.', 'For example crypto.randomUUID().');
  end if;
  v_workflow := request ->> 'workflowId';
  v_metadata := coalesce(nullif(request -> 'metadata', 'null'), '{}')
    || coalesce((
      select jsonb_object_agg(named.key, named.value) from jsonb_each(request) named
      where named.key in ('nodeId', 'webhookUrl', 'idempotencyKey', 'mode', 'fallback', 'fallbackOnRefusal') and named.value <> 'null'
    ), '{}')
    || case when request ? 'promptSpec' then jsonb_build_object('promptSpec', request -> 'promptSpec') else '{}' end;

  insert into public.runs (kind, subject_id, status, processor, metadata)
  values ('image_gen', v_workflow, 'pending', (request ->> 'provider') || ':' || (request ->> 'model'), v_metadata)
  on conflict (created_by, subject_id, (metadata ->> 'idempotencyKey'))
    where kind = 'image_gen' and ticket is not null and metadata ->> 'idempotencyKey' is not null
    do nothing
  returning id into v_id;
  if v_id is null then
    select r.id into v_id from public.runs r
    where r.kind = 'image_gen' and r.subject_id = v_workflow and r.ticket is not null
      and r.created_by is not distinct from image_jobs.current_user_id()
      and r.metadata ->> 'idempotencyKey' = v_metadata ->> 'idempotencyKey';
  end if;
  return image_jobs.image_job_record(v_id);
end
$$;
comment on function public.start_image_job(jsonb) is 'Image Job Orchestrator: StartImageJobRequest in, ImageJobRecord out.';
