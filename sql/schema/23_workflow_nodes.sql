-- workflow_nodes: the canvas. The frontend owns its nodes; a few keys of node_data are ours.

create table public.workflow_nodes (
  id varchar primary key,
  workflow_id uuid not null,
  node_type varchar not null,
  node_data jsonb not null,
  position jsonb,
  created_at timestamptz default now(),
  updated_at timestamptz default now(),
  version bigint,
  run_ticket bigint,
  pinned_run varchar
);

alter table public.workflow_nodes
  add constraint workflow_nodes_node_data_holds_no_base64 check (not image_jobs.has_base64(node_data)) not valid,
  add constraint workflow_nodes_position_holds_no_base64 check (not image_jobs.has_base64(position)) not valid;

comment on table public.workflow_nodes is 'Nodes of the canvas.';
comment on column public.workflow_nodes.node_data is
  'The frontend''s, but for status, runId, progress, message, previewUrl, imageUrl, thumbnailUrl, previewPath, imagePath, thumbnailPath, error, updatedAt.';
comment on column public.workflow_nodes.version is 'Grows with every change, over all nodes: merge by it.';
comment on column public.workflow_nodes.run_ticket is 'Ticket of the newest run that the node has taken note of: the one that it shows, unless one is pinned.';
comment on column public.workflow_nodes.pinned_run is 'An older run that the node shows (show_run), until there is a newer one. Ours.';

create index if not exists idx_nodes_workflow on public.workflow_nodes (workflow_id);

-- Room for the next version beside the last: then a projection writes no index, and half the WAL.
alter table public.workflow_nodes set (fillfactor = 70);

-- Nodes that were locked when a run of theirs changed. The next sync shows them the run: a settlement never waits for a
-- client that drags a node, or left a transaction open.
-- Append-only, so that a sync which is just dealing with an older entry cannot swallow a newer one.
create table if not exists image_jobs.stale_nodes (
  id bigint generated always as identity primary key,
  node_id varchar not null,
  due_at timestamptz not null default image_jobs.now(),
  failures integer not null default 0
);
comment on table image_jobs.stale_nodes is 'Nodes that still have to be shown their run.';
comment on column image_jobs.stale_nodes.failures is
  'How often the node was refused, by a trigger or a rule of the application: it is tried again after growing pauses.';

create index if not exists stale_nodes_due on image_jobs.stale_nodes (due_at);
