-- insert → pending. A row is either good, or refused in one sentence.

-- Refuse a promptSpec that no provider could work with. Sentences are for the person who called insert().
create or replace function image_jobs.check_prompt(p_metadata jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_spec jsonb := p_metadata -> 'promptSpec';
  v_steps jsonb := p_metadata -> 'fallback';
  v_key text;
begin
  if jsonb_typeof(p_metadata) is distinct from 'object' then
    perform image_jobs.refuse('metadata must be an object with a promptSpec.', 'Set metadata to {"promptSpec": {"basePrompt": "…"}}.');
  end if;
  -- The JSON reader of a daemon may not survive all that Postgres can hold.
  if jsonb_path_exists(p_metadata, '$.**{65}') then
    perform image_jobs.refuse('metadata is nested more than 64 levels deep.', 'Store what is large elsewhere and give its URL.');
  end if;
  if jsonb_typeof(v_spec) is distinct from 'object' then
    perform image_jobs.refuse('metadata.promptSpec is missing.', 'Set metadata.promptSpec to {"basePrompt": "…"}.');
  end if;
  if jsonb_typeof(v_spec -> 'basePrompt') is distinct from 'string'
    or length(v_spec ->> 'basePrompt') not between 1 and 32000 then
    perform image_jobs.refuse('promptSpec.basePrompt must be a text of 1 to 32,000 characters.', 'Say what the picture should show.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'styleModifiers'), 'null') not in ('array', 'null')
    or jsonb_typeof(v_spec -> 'styleModifiers') = 'array'
      and jsonb_path_exists(v_spec, '$.styleModifiers[*] ? (@.type() != "string")') then
    perform image_jobs.refuse('promptSpec.styleModifiers must be a list of texts.', 'For example ["watercolour", "soft light"].');
  end if;
  if v_spec ->> 'size' !~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$' then
    perform image_jobs.refuse('promptSpec.size cannot be read.', 'Write it like 1024x1024, or leave it out.');
  end if;
  if v_spec ->> 'aspectRatio' !~ '^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$' then
    perform image_jobs.refuse('promptSpec.aspectRatio cannot be read.', 'Write it like 16:9, or leave it out.');
  end if;
  if v_spec ->> 'quality' not in ('standard', 'hd', 'low', 'medium', 'high', 'xhigh', 'max', 'auto') then
    perform image_jobs.refuse('promptSpec.quality is unknown.', 'Use standard or hd.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'seed'), 'null') <> 'null'
    and (jsonb_typeof(v_spec -> 'seed') <> 'number' or v_spec ->> 'seed' !~ '^[0-9]{1,18}$') then
    perform image_jobs.refuse('promptSpec.seed must be a whole number from 0 up.', 'Leave it out for a random one.');
  end if;
  foreach v_key in array array['size', 'aspectRatio', 'quality', 'negativePrompt', 'previousImage'] loop
    if coalesce(jsonb_typeof(v_spec -> v_key), 'null') not in ('string', 'null') then
      perform image_jobs.refuse(format('promptSpec.%s must be a text.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if coalesce(v_spec ->> 'previousImage', '') !~* '^(https?://[^\s]+)?$' then
    perform image_jobs.refuse('promptSpec.previousImage must be the URL of an image.', 'Upload the image first and give its https URL; never base64.');
  end if;
  foreach v_key in array array['nodeId', 'idempotencyKey', 'webhookUrl'] loop
    if coalesce(jsonb_typeof(p_metadata -> v_key), 'null') not in ('string', 'null')
      or octet_length(p_metadata ->> v_key) not between 1 and 2048 then
      perform image_jobs.refuse(format('metadata.%s must be a text of 1 to 2,048 bytes.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if (case jsonb_typeof(v_steps)
    when 'null' then false
    when 'array' then jsonb_array_length(v_steps) not between 1 and 5 or exists (
      select from jsonb_array_elements(v_steps) step
      where jsonb_typeof(step) <> 'string' or step #>> '{}' !~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$')
    else v_steps is not null end) then
    perform image_jobs.refuse('metadata.fallback must be a list of 1 to 5 texts like provider:model.',
      'For example ["google:gemini-3-pro-image"]; the view image_models lists what is on offer.');
  end if;
  if coalesce(jsonb_typeof(p_metadata -> 'fallbackOnRefusal'), 'null') not in ('boolean', 'null') then
    perform image_jobs.refuse('metadata.fallbackOnRefusal must be true or false.', 'Leave it out for false.');
  end if;
end
$$;

-- Returns a text with its percent-encoded ASCII characters as they are.
create or replace function image_jobs.percent_decoded(p_text text)
returns text language sql immutable set search_path = ''
as $$
  select string_agg(
    case when m.piece[1] ~ '^%([2-6][0-9A-Fa-f]|7[0-9A-Ea-e])$' then chr(get_byte(decode(substr(m.piece[1], 2), 'hex'), 0))
      else m.piece[1] end, '' order by m.place)
  from regexp_matches(p_text, '%[0-9A-Fa-f]{2}|[^%]+|%', 'g') with ordinality as m (piece, place)
$$;

-- Returns the workflow whose picture in storage a URL names; null if it names none. On any host: which one is ours, the daemon
-- knows. Reads whatever a server might take for such a path (percent-encoded, with dots, doubled slashes or capitals), so that
-- a right is asked for rather once too often: the daemon reads plain paths only, and compares the folder as text.
create or replace function image_jobs.pictured_workflow(p_url text)
returns uuid language plpgsql immutable set search_path = ''
as $$
declare
  -- No address of ours is longer before its file's name.
  v_path text := left(substring(p_url from '^[Hh][Tt][Tt][Pp][Ss]?://[^/?#]*(/[^?#]*)'), 2048);
  v_segments text[] := '{}';
  v_segment text;
  v_folder text;
begin
  if v_path is null then
    return null;
  end if;
  v_path := image_jobs.percent_decoded(v_path);
  foreach v_segment in array string_to_array(v_path, '/') loop
    if v_segment = '..' then
      v_segments := v_segments[:cardinality(v_segments) - 1];
    elsif v_segment not in ('', '.') then
      v_segments := v_segments || v_segment;
    end if;
  end loop;
  v_folder := lower(substring('/' || array_to_string(v_segments, '/')
    from '(?i)/storage/v1/object/(?:public|authenticated|sign)/[^/]+/([^/]+)/'));
  return case when v_folder ~ '^[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}$' then v_folder::uuid end;
end
$$;

-- Returns the workflow of the picture to refine, for the daemon, which reads storage with the service key; null where there is
-- none, or where no row has ever used that id, as of a folder of the application's. Refuses a workflow that the caller may not see.
create or replace function image_jobs.source_workflow(p_metadata jsonb, p_operator boolean)
returns uuid language plpgsql volatile set search_path = ''
as $$
declare
  v_workflow uuid := image_jobs.pictured_workflow(p_metadata #>> '{promptSpec,previousImage}');
begin
  if v_workflow is null or p_operator or image_jobs.can_access_workflow(v_workflow) then
    return v_workflow;
  end if;
  if exists (select from image_jobs.workflows w where w.id = v_workflow) then
    perform image_jobs.refuse('promptSpec.previousImage is of a workflow that you are no member of.',
      'Use an image of a workflow of yours, or ask that one''s owner to add you to workflow_members.');
  end if;
  return null;
end
$$;

-- Make a new row a pending run: checked, in its lane, with a claim and a ticket of its own.
-- Columns that are ours cannot be chosen by a client.
create or replace function image_jobs.accept_run()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_now timestamptz := image_jobs.now();
  v_user uuid := image_jobs.current_user_id();
  v_operator boolean := image_jobs.is_operator();
begin
  -- Size before content: what is refused costs no more than its bytes. And every later write of the row checks all of it again.
  if octet_length(new.metadata::text) > 1048576 then
    perform image_jobs.refuse('metadata is larger than 1 MiB.', 'Upload what is large and give its URL.');
  end if;
  -- The base64 checks refuse it by their own name, which says more than any sentence here.
  if image_jobs.has_base64(new.metadata) or image_jobs.has_base64(new.payload) then
    perform image_jobs.found_workflow(new.subject_id);
    return new;
  end if;
  new.status := coalesce(new.status, 'pending');
  if new.status <> 'pending' then
    perform image_jobs.refuse('A new run must be pending.', 'Leave status out, or set it to pending.');
  end if;
  if new.subject_id is null then
    perform image_jobs.refuse('subject_id is missing.', 'Set it to the workflow''s id (a uuid).');
  end if;
  if new.id is null or new.id ~ '[^A-Za-z0-9_-]' or length(new.id) not between 1 and 200 then
    perform image_jobs.refuse('id must be 1 to 200 characters of A-Z, a-z, 0-9, _ and -.', 'It becomes a path in storage. Leave it out to get one.');
  end if;
  -- Counted apart, since a count in an expression makes it ten times as slow.
  if coalesce(new.processor, '') !~ '^[a-z0-9_-]+:[^\s:][^\s]*$'
    or strpos(new.processor, ':') > 51 or length(new.processor) - strpos(new.processor, ':') > 200 then
    perform image_jobs.refuse('processor must name a provider and a model.', 'Write it like openai:gpt-image-2; the view image_models lists what is on offer.');
  end if;
  if not isfinite(new.due_at) then
    perform image_jobs.refuse('due_at must be a point in time.', 'Leave it out to start at once.');
  end if;
  perform image_jobs.check_prompt(new.metadata);
  if not v_operator then
    -- A column that was there before may have a default.
    if coalesce(new.payload, '{}') <> '{}' or coalesce(new.progress, 0) <> 0 or coalesce(new.attempt, 0) <> 0
      or coalesce(new.max_attempts, 3) <> 3
      or new.claim is not null or new.ticket is not null or new.claimed_by is not null or new.provider_job_id is not null
      or new.finished_at is not null or new.message is not null or new.preview_url is not null or new.lane is not null
      or new.rank is not null or new.workflow_rank is not null or new.submitted_at is not null or new.refused_since is not null or new.webhook is not null
      or new.routed_to is not null or new.call is not null or new.unheld is not null or new.source_workflow is not null
      or new.queue_state is not null or new.queued_at is not null or new.requeued_by is not null
      or coalesce(new.priority, 0) <> 0 or coalesce(new.created_by, v_user) is distinct from v_user then
      perform image_jobs.refuse(
        'This insert sets a column that belongs to the orchestrator.',
        'Insert id (optional), kind, subject_id, status, processor, metadata and due_at only.');
    end if;
  end if;
  perform image_jobs.found_workflow(new.subject_id);
  if not v_operator and v_user is null then
    perform image_jobs.refuse_nameless();
  end if;
  if not v_operator and not image_jobs.can_access_workflow(new.subject_id) then
    raise exception using errcode = '42501', message = 'You are not a member of this workflow.',
      hint = 'Ask a member for a link (share_workflow), or use a new workflow id.';
  end if;
  perform image_jobs.keep_files_of(new.subject_id, new.id);

  new.source_workflow := image_jobs.source_workflow(new.metadata, v_operator);
  new.queue_state := 'pending';
  new.created_by := coalesce(v_user, new.created_by);
  new.created_at := v_now;
  new.updated_at := v_now;
  new.started_at := v_now;
  new.queued_at := v_now;
  new.requeued_by := null;
  new.finished_at := null;
  new.payload := nullif(new.payload, '{}');
  new.progress := 0;
  new.priority := coalesce(new.priority, 0);
  new.attempt := 0;
  new.max_attempts := greatest(coalesce(new.max_attempts, 3), 1);
  -- A past one of a client's would look like a wait of years.
  new.due_at := case when v_operator then coalesce(new.due_at, v_now) else greatest(new.due_at, v_now) end;
  new.claim := nextval('image_jobs.claims');
  new.ticket := nextval('image_jobs.tickets');
  new.claimed_by := null;
  new.provider_job_id := null;
  new.submitted_at := null;
  new.refused_since := null;
  new.webhook := null;
  new.routed_to := null;
  new.call := null;
  new.unheld := null;
  new.lane := image_jobs.lane_of(new.processor);
  new.rank := null;
  new.workflow_rank := null;
  -- A run that is put off takes its place in line when it is due.
  if new.due_at <= v_now then
    new.rank := image_jobs.next_rank(coalesce(new.created_by, new.subject_id), new.lane, new.priority);
    new.workflow_rank := image_jobs.next_workflow_rank(
      coalesce(new.created_by, new.subject_id), new.subject_id, new.lane, new.priority);
  end if;
  return new;
end
$$;

create or replace trigger image_jobs_accept_run before insert on public.runs
  for each row when (new.kind = 'image_gen') execute function image_jobs.accept_run();
