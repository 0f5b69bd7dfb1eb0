-- insert → pending. Whoever inserts, the row is either good, or refused in one sentence.

-- Refuses a promptSpec that no provider could work with. Sentences are for the person who called insert().
create or replace function private.check_prompt(p_metadata jsonb)
returns void language plpgsql volatile set search_path = ''
as $$
declare
  v_spec jsonb := p_metadata -> 'promptSpec';
  v_steps jsonb := p_metadata -> 'fallback';
  v_key text;
begin
  if jsonb_typeof(p_metadata) is distinct from 'object' then
    perform private.refuse('metadata must be an object with a promptSpec.', 'Set metadata to {"promptSpec": {"basePrompt": "…"}}.');
  end if;
  -- What Postgres can hold, the JSON reader of a daemon may not survive.
  if jsonb_path_exists(p_metadata, '$.**{65}') then
    perform private.refuse('metadata is nested more than 64 levels deep.', 'Store what is large elsewhere and give its URL.');
  end if;
  if jsonb_typeof(v_spec) is distinct from 'object' then
    perform private.refuse('metadata.promptSpec is missing.', 'Set metadata.promptSpec to {"basePrompt": "…"}.');
  end if;
  if jsonb_typeof(v_spec -> 'basePrompt') is distinct from 'string'
    or length(v_spec ->> 'basePrompt') not between 1 and 32000 then
    perform private.refuse('promptSpec.basePrompt must be a text of 1 to 32,000 characters.', 'Say what the picture should show.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'styleModifiers'), 'null') not in ('array', 'null')
    or jsonb_typeof(v_spec -> 'styleModifiers') = 'array'
      and jsonb_path_exists(v_spec, '$.styleModifiers[*] ? (@.type() != "string")') then
    perform private.refuse('promptSpec.styleModifiers must be a list of texts.', 'For example ["watercolour", "soft light"].');
  end if;
  if v_spec ->> 'size' !~ '^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$' then
    perform private.refuse('promptSpec.size cannot be read.', 'Write it like 1024x1024, or leave it out.');
  end if;
  if v_spec ->> 'aspectRatio' !~ '^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$' then
    perform private.refuse('promptSpec.aspectRatio cannot be read.', 'Write it like 16:9, or leave it out.');
  end if;
  if v_spec ->> 'quality' not in ('standard', 'hd', 'low', 'medium', 'high', 'xhigh', 'max', 'auto') then
    perform private.refuse('promptSpec.quality is unknown.', 'Use standard or hd.');
  end if;
  if coalesce(jsonb_typeof(v_spec -> 'seed'), 'null') <> 'null'
    and (jsonb_typeof(v_spec -> 'seed') <> 'number' or v_spec ->> 'seed' !~ '^[0-9]{1,18}$') then
    perform private.refuse('promptSpec.seed must be a whole number from 0 up.', 'Leave it out for a random one.');
  end if;
  foreach v_key in array array['size', 'aspectRatio', 'quality', 'negativePrompt', 'previousImage'] loop
    if coalesce(jsonb_typeof(v_spec -> v_key), 'null') not in ('string', 'null') then
      perform private.refuse(format('promptSpec.%s must be a text.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if coalesce(v_spec ->> 'previousImage', '') !~* '^(https?://[^\s]+)?$' then
    perform private.refuse('promptSpec.previousImage must be the URL of an image.', 'Upload the image first and give its https URL; never base64.');
  end if;
  foreach v_key in array array['nodeId', 'idempotencyKey', 'webhookUrl'] loop
    if coalesce(jsonb_typeof(p_metadata -> v_key), 'null') not in ('string', 'null')
      or octet_length(p_metadata ->> v_key) not between 1 and 2048 then
      perform private.refuse(format('metadata.%s must be a text of 1 to 2,048 bytes.', v_key), 'Leave it out if there is none.');
    end if;
  end loop;
  if (case jsonb_typeof(v_steps)
    when 'null' then false
    when 'array' then jsonb_array_length(v_steps) not between 1 and 5 or exists (
      select from jsonb_array_elements(v_steps) step
      where jsonb_typeof(step) <> 'string' or step #>> '{}' !~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$')
    else v_steps is not null end) then
    perform private.refuse('metadata.fallback must be a list of 1 to 5 texts like provider:model.',
      'For example ["google:gemini-3-pro-image"]; the view image_models lists what is on offer.');
  end if;
  if coalesce(jsonb_typeof(p_metadata -> 'fallbackOnRefusal'), 'null') not in ('boolean', 'null') then
    perform private.refuse('metadata.fallbackOnRefusal must be true or false.', 'Leave it out for false.');
  end if;
end
$$;

-- Makes a new row a pending run: checked, in line, with a claim and a ticket of its own.
-- Columns that are ours cannot be chosen by a client.
create or replace function private.accept_run()
returns trigger language plpgsql volatile security definer set search_path = ''
as $$
declare
  v_now timestamptz := private.now();
  v_user uuid := private.current_user_id();
  v_operator boolean := private.is_operator();
begin
  -- The base64 checks refuse it by their own name, which says more than any sentence here.
  if private.has_base64(new.metadata) or private.has_base64(new.payload) then
    perform private.use_workflow(new.subject_id);
    return new;
  end if;
  -- Every later write of the row checks all of it again.
  if octet_length(new.metadata::text) > 1048576 then
    perform private.refuse('metadata is larger than 1 MiB.', 'Upload what is large and give its URL.');
  end if;
  new.status := coalesce(new.status, 'pending');
  if new.status <> 'pending' then
    perform private.refuse('A new run must be pending.', 'Leave status out, or set it to pending.');
  end if;
  if new.subject_id is null then
    perform private.refuse('subject_id is missing.', 'Set it to the workflow''s id (a uuid).');
  end if;
  if new.id is null or new.id !~ '^[A-Za-z0-9_-]{1,200}$' then
    perform private.refuse('id must be 1 to 200 characters of A-Z, a-z, 0-9, _ and -.', 'It becomes a path in storage. Leave it out to get one.');
  end if;
  if coalesce(new.processor, '') !~ '^[a-z0-9_-]{1,50}:[^\s:][^\s]{0,199}$' then
    perform private.refuse('processor must name a provider and a model.', 'Write it like openai:gpt-image-2; the view image_models lists what is on offer.');
  end if;
  if not isfinite(new.due_at) then
    perform private.refuse('due_at must be a point in time.', 'Leave it out to start at once.');
  end if;
  perform private.check_prompt(new.metadata);
  if not v_operator then
    if new.payload is not null or new.progress is not null or new.attempt is not null or new.max_attempts is not null
      or new.claim is not null or new.ticket is not null or new.claimed_by is not null or new.provider_job_id is not null
      or new.finished_at is not null or new.message is not null or new.preview_url is not null or new.lane is not null
      or new.rank is not null or new.submitted_at is not null or new.refused_since is not null or new.webhook is not null
      or new.via is not null
      or coalesce(new.priority, 0) <> 0 or coalesce(new.created_by, v_user) is distinct from v_user then
      perform private.refuse(
        'This insert sets a column that belongs to the orchestrator.',
        'Insert id (optional), kind, subject_id, status, processor, metadata and due_at only.');
    end if;
  end if;
  perform private.use_workflow(new.subject_id);
  if not v_operator and not private.can_access_workflow(new.subject_id) then
    raise exception using errcode = '42501', message = 'You are not a member of this workflow.',
      hint = 'Ask its owner to add you to workflow_members, or use a new workflow id.';
  end if;

  new.created_by := coalesce(v_user, new.created_by);
  new.created_at := v_now;
  new.updated_at := v_now;
  new.started_at := v_now;
  new.finished_at := null;
  new.progress := 0;
  new.priority := coalesce(new.priority, 0);
  new.attempt := 0;
  new.max_attempts := greatest(coalesce(new.max_attempts, 3), 1);
  new.due_at := coalesce(new.due_at, v_now);
  new.claim := nextval('private.claims');
  new.ticket := nextval('private.tickets');
  new.claimed_by := null;
  new.provider_job_id := null;
  new.submitted_at := null;
  new.refused_since := null;
  new.webhook := null;
  new.via := null;
  new.lane := private.lane_of(new.processor);
  new.rank := private.place_in_line(new.subject_id, new.lane, new.priority);
  if new.due_at > v_now then
    new.rank := null;
  end if;
  return new;
end
$$;

create or replace trigger accept_run before insert on public.runs
  for each row when (new.kind = 'image_gen') execute function private.accept_run();
