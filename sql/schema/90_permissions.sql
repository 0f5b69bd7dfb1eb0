-- Every grant and every policy, on one page.
--
-- Since October 2026 Supabase grants nothing in public by itself; older projects grant everything. Both end here.
-- Clients (anon, authenticated) read what their workflows hold, insert runs, and own their nodes. They have no UPDATE and
-- no DELETE on runs and run_events: cancel_run and requeue_run are the way. Operators come as service_role or owner.

-- Ours, one by one.
revoke all on
  image_jobs.cancellations, image_jobs.daemon_status, image_jobs.daemons, image_jobs.lanes, image_jobs.models,
  image_jobs.claimants, image_jobs.due_marks, image_jobs.limits_in_force, image_jobs.opened_lanes, image_jobs.recent_starts, image_jobs.watermarks,
  image_jobs.provider_blocks, image_jobs.provider_limits, image_jobs.provider_streaks, image_jobs.providers,
  image_jobs.failures, image_jobs.queue_stats, image_jobs.run_costs, image_jobs.throughput,
  image_jobs.run_timings, image_jobs.set_aside, image_jobs.stale_nodes, image_jobs.storage_stats, image_jobs.storage_violations,
  image_jobs.usage_limits, image_jobs.wake, image_jobs.webhook_counters, image_jobs.webhook_deliveries, image_jobs.webhook_secrets,
  image_jobs.workflows, public.image_jobs, public.image_models, public.workflow_members
  from public, anon, authenticated, service_role;
revoke all on sequence
  image_jobs.claims, image_jobs.due_marks_version_seq, image_jobs.event_numbers, image_jobs.node_versions, image_jobs.provider_blocks_id_seq,
  image_jobs.limits_in_force_version_seq, image_jobs.provider_limits_id_seq, image_jobs.provider_streaks_version_seq, image_jobs.recent_starts_version_seq, image_jobs.stale_nodes_id_seq, image_jobs.tickets,
  image_jobs.usage_limits_id_seq, image_jobs.watermarks_version_seq
  from public, anon, authenticated, service_role;
revoke all on image_jobs.calls, image_jobs.file_removals, image_jobs.migrations, image_jobs.prices, image_jobs.project, image_jobs.source_removals, image_jobs.walks from public, anon, authenticated, service_role;
revoke all on function image_jobs.check_set_up(text, boolean), image_jobs.realtime_steps(), image_jobs.set_up(text, boolean), image_jobs.storage_steps(text, boolean)
  from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.call_of_job(varchar, bigint, text, text), image_jobs.calls_of(jsonb, bigint), image_jobs.close_calls(jsonb),
  image_jobs.costs_of(varchar, bigint), image_jobs.estimate_cost(text, jsonb), image_jobs.guard_call(),
  image_jobs.makers_of_jobs(jsonb), image_jobs.shared_cost(public.runs),
  image_jobs.lose_calls(bigint[]), image_jobs.open_calls(varchar[]), image_jobs.refresh_costs(varchar[]),
  image_jobs.sweep_calls(bigint, integer)
  from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.abandon_each(varchar[], uuid), image_jobs.abandon_runs(uuid), image_jobs.accept_run(),
  image_jobs.add_events(jsonb), image_jobs.attach_provider_job(text, text, varchar, bigint),
  image_jobs.available_starts(text, text), image_jobs.block_provider(text, text, interval, text),
  image_jobs.block_until(text, text, timestamptz, text),
  image_jobs.broadcast(text, text, jsonb), image_jobs.broadcast_deleted_runs(jsonb),
  image_jobs.broadcast_runs(varchar[]), image_jobs.send_message(text, uuid, jsonb), image_jobs.run_messages(varchar[]), image_jobs.can_access_run(varchar), image_jobs.can_access_workflow(uuid),
  image_jobs.can_subscribe(text),
  image_jobs.cancel_provider_job(text, text, varchar, bigint), image_jobs.cancel_run(varchar),
  image_jobs.change_lanes(), image_jobs.change_runs(text, varchar[], uuid), image_jobs.check_prompt(jsonb),
  image_jobs.check_runs(varchar[], uuid), image_jobs.check_usage(uuid[], uuid[], integer, numeric),
  image_jobs.claim_checks(uuid, varchar[], integer),
  image_jobs.claim_runs(uuid, integer, boolean, text[]),
  image_jobs.claim_starts(uuid, image_jobs.lanes, integer, boolean, boolean, numeric),
  image_jobs.claimable_providers(text[], interval, boolean), image_jobs.claimed_run(public.runs, timestamptz),
  image_jobs.closed_reason(text), image_jobs.consume_deliveries(public.runs),
  image_jobs.count_running(text, text, integer), image_jobs.count_webhook(text, integer, integer, integer),
  image_jobs.current_user_id(), image_jobs.delete_delivery(text, text), image_jobs.delete_events(),
  image_jobs.drawing_model(text), image_jobs.finish_cancellation(text, text, text, boolean, jsonb),
  image_jobs.first_open_fallback(varchar[]),
  image_jobs.first_waiting(image_jobs.lanes, varchar[], bigint, varchar[], integer), image_jobs.found_workflow(uuid), image_jobs.guard_run(),
  image_jobs.guard_status(), image_jobs.has_base64(jsonb), image_jobs.has_room(text, text), image_jobs.heartbeat(uuid, integer, boolean, boolean),
  image_jobs.hmac_sha256(bytea, bytea), image_jobs.image_job_record(varchar), image_jobs.is_image_run(varchar),
  image_jobs.is_operator(), image_jobs.is_sound(varchar, varchar, timestamptz, uuid, jsonb, integer, text, bigint, text),
  image_jobs.is_signed(text, text, text[], text, text), image_jobs.is_too_old(text), image_jobs.oldest_daemon(),
  image_jobs.json_or_null(text, integer),
  image_jobs.guard_pin(), image_jobs.keep_node(), image_jobs.newest_picture(varchar, uuid), image_jobs.lane_of(text), image_jobs.leave(uuid),
  image_jobs.match_deliveries(text), image_jobs.may_upload(text), image_jobs.my_workflows(), image_jobs.refuse_founded(uuid),
  image_jobs.may_have_submitted(public.runs, text), image_jobs.may_write(uuid), image_jobs.move_runs(varchar[], uuid),
  image_jobs.move_to_model_lanes(image_jobs.lanes, integer), image_jobs.next_rank(uuid, text, integer),
  image_jobs.next_workflow_rank(uuid, uuid, text, integer), image_jobs.served_rank(uuid, text, integer),
  image_jobs.share_places(image_jobs.lanes, varchar[], varchar[], boolean, varchar[], boolean),
  image_jobs.swap_ranks(varchar[], uuid),
  image_jobs.node_data(jsonb, varchar, varchar, integer, text, text, jsonb),
  image_jobs.node_message(public.workflow_nodes), image_jobs.nodes_changed(), image_jobs.note_responses(uuid, jsonb), image_jobs.now(),
  image_jobs.open_lanes(text[], boolean), image_jobs.owned_keys(), image_jobs.pictured_workflow(text),
  image_jobs.postpone_node(varchar, integer, text, text), image_jobs.project_changes(image_jobs.run_change[]),
  image_jobs.project_nodes(varchar[], integer), image_jobs.promote_due(boolean), image_jobs.promote_runs(varchar[], uuid),
  image_jobs.publish_models(text, jsonb), image_jobs.receive_webhook(text, jsonb, text),
  image_jobs.record_delivery(varchar, text, text, text), image_jobs.record_progress(uuid, jsonb),
  image_jobs.record_provider_job(varchar, text, text, text, text, jsonb),
  image_jobs.record_starts(text, text, integer), image_jobs.refresh_stale_nodes(timestamptz), image_jobs.refuse(text, text),
  image_jobs.refuse_nameless(), image_jobs.register_daemon(uuid, text, text, integer, interval, text[], interval), image_jobs.release_runs(varchar[], uuid),
  image_jobs.release_unheld(uuid, bigint[], bigint), image_jobs.remaining_fallbacks(jsonb, varchar, varchar),
  image_jobs.requeue_run(varchar), image_jobs.show_run(varchar), image_jobs.reroute_each(varchar[], uuid),
  image_jobs.reroute_message(jsonb, varchar), image_jobs.reroute_runs(), image_jobs.route_hash(jsonb, varchar, varchar), image_jobs.due_checks(text[], integer, boolean),
  image_jobs.resume_provider_job(public.runs, public.runs),
  image_jobs.run_moved(), image_jobs.runs_deleted(), image_jobs.runs_inserted(), image_jobs.runs_set_aside(), image_jobs.runs_updated(),
  image_jobs.session_began(uuid), image_jobs.session_lock_key(uuid), image_jobs.set_run_aside(varchar, text, text),
  image_jobs.set_webhook_secrets(jsonb), image_jobs.settle_runs(uuid, jsonb), image_jobs.source_workflow(jsonb, boolean),
  image_jobs.starts_of(bigint), image_jobs.stay_awake(uuid, double precision), image_jobs.due_from(text, boolean),
  image_jobs.move_due_mark(text, timestamptz), image_jobs.keep_claimant(),
  image_jobs.stamp_events(), image_jobs.storage_path(text),
  image_jobs.touched_runs(), image_jobs.writes_numbered_events(regclass),
  image_jobs.start_runs(varchar[], uuid), image_jobs.sweep_webhooks(),
  image_jobs.sync(uuid, integer, boolean, jsonb, jsonb, bigint[], double precision, text[], bigint),
  image_jobs.take_cancellations(text[], integer), image_jobs.take_over(uuid),
  image_jobs.unblocked_names(image_jobs.lanes), image_jobs.unmatched_deliveries(text[], integer), image_jobs.verified_delivery(text, jsonb, text, jsonb),
  image_jobs.wake_all(), image_jobs.find_lost_files(text, text, text, integer),
  image_jobs.finish_file_removal(uuid, varchar, boolean), image_jobs.forget_user(uuid),
  image_jobs.is_file_of(text, uuid, varchar, boolean), image_jobs.keep_files_of(uuid, varchar), image_jobs.pictured_run(text),
  image_jobs.prune_runs(timestamptz, varchar, integer), image_jobs.remove_files(uuid[], varchar[], boolean[]), image_jobs.take_file_removals(integer), image_jobs.take_source_removals(integer), image_jobs.finish_source_removal(text, uuid, boolean), image_jobs.sees_files(), image_jobs.percent_decoded(text),
  image_jobs.walk(text[], interval, integer), image_jobs.webhook_key(text, text), image_jobs.webhook_wait(public.runs),
  image_jobs.write_events(image_jobs.event[]), image_jobs.write_nodes(varchar[])
  from public, anon, authenticated, service_role;
revoke all on image_jobs.tallies from public, anon, authenticated, service_role;
revoke all on sequence image_jobs.tallies_id_seq from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.fate_of(public.runs, text), image_jobs.gauges(), image_jobs.take_tallies(boolean), image_jobs.tally_calls(bigint[]),
  image_jobs.tally_endings(image_jobs.run_change[]), image_jobs.seconds_ago(double precision),
  image_jobs.timings_of(public.runs, bigint, timestamptz, timestamptz), image_jobs.timings_of_failure(public.runs, timestamptz)
  from public, anon, authenticated, service_role;
revoke all on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar), public.show_run(varchar),
  public.estimate_cost(text, jsonb),
  public.webhook_openai(json), public.webhook_midjourney(json), public.webhook_hmac(json),
  public.receive_webhook(text, jsonb, text) from public, anon, authenticated, service_role;
revoke all on image_jobs.workflow_links from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.can_open_workflow(uuid), public.can_open_workflow(uuid),
  image_jobs.join_workflow(text), image_jobs.leave_workflow(uuid), image_jobs.lock_members(uuid), image_jobs.lock_memberships(uuid),
  image_jobs.refuse_foreign_members(), image_jobs.require_member(uuid), image_jobs.share_workflow(uuid), image_jobs.token_hash(text),
  image_jobs.unshare_workflow(uuid), public.join_workflow(text), public.leave_workflow(uuid), public.share_workflow(uuid),
  public.unshare_workflow(uuid)
  from public, anon, authenticated, service_role;
revoke all on image_jobs.provider_states, image_jobs.used_hours, public.image_provider_status, public.image_usage
  from public, anon, authenticated, service_role;
revoke all on sequence image_jobs.provider_states_id_seq from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.add_up_hours(), image_jobs.first_open_hour(), image_jobs.budget_left(),
  image_jobs.check_limit(image_jobs.usage_limits, uuid, uuid, integer, numeric),
  image_jobs.count_waiting(uuid, uuid, bigint), image_jobs.has_budget(),
  image_jobs.images_together(timestamptz, bigint), image_jobs.limits_of_user(uuid),
  image_jobs.opens_again(text, numeric), image_jobs.period_end(text), image_jobs.period_start(text),
  image_jobs.refuse_usage(text, text), image_jobs.usage_of_caller(),
  image_jobs.used_since(uuid, uuid, timestamptz), image_jobs.used_together(timestamptz)
  from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.carry_limits(), image_jobs.dearest_cost(varchar[], jsonb), image_jobs.has_streaks(), image_jobs.limits_of(text), image_jobs.lock_limits(text[]),
  image_jobs.streak_of(text), image_jobs.write_streak(image_jobs.provider_streaks),
  image_jobs.has_waiting(text), image_jobs.limit_reached(image_jobs.provider_limits), image_jobs.limits_changed(),
  image_jobs.note_provider_states(), image_jobs.provider_name(text), image_jobs.provider_status(),
  image_jobs.report_daemon(uuid, boolean, text[])
  from public, anon, authenticated, service_role;
revoke all on image_jobs.alert_notices, image_jobs.alerts from public, anon, authenticated, service_role;
revoke all on function
  image_jobs.claim_before(timestamptz), image_jobs.current_alerts(), image_jobs.dashboard(interval),
  image_jobs.finish_alert_notice(uuid, text, boolean),
  image_jobs.note_alerts(), image_jobs.take_alert_notices(integer)
  from public, anon, authenticated, service_role;
revoke all on public.workflow_nodes from public, anon, authenticated, service_role;
-- On tables that were there before, rows of other kinds stay as open as they were; but row level security does not stop these.
revoke truncate, references, trigger on public.runs, public.run_events from public, anon, authenticated, service_role;

-- Default privileges of the owner's may have given more on what was made just now, also to roles of the application's.
revoke all on schema image_jobs from public, anon, authenticated, service_role;
do $$
declare
  v_role text;
  v_object text;
begin
  for v_role in
    select distinct a.grantee::regrole::text
    from pg_default_acl d cross join aclexplode(d.defaclacl) a
    -- No cast to regrole: that folds the case of a name.
    where d.defaclrole = (select r.oid from pg_catalog.pg_roles r where r.rolname = current_user)
      and d.defaclnamespace in (0, 'public'::regnamespace)
      and a.grantee not in (0, d.defaclrole) and a.grantee::regrole::text not in ('anon', 'authenticated', 'service_role')
  loop
    for v_object in
      select 'schema image_jobs'
      union all
      select case c.relkind when 'S' then 'sequence ' else 'table ' end || c.oid::regclass
      from pg_class c
      where c.relkind in ('r', 'v', 'm', 'S') and (c.relnamespace = 'image_jobs'::regnamespace
        or c.relnamespace = 'public'::regnamespace and starts_with(obj_description(c.oid, 'pg_class'), 'Image Job Orchestrator: ')
        or c.oid in (to_regclass('public.runs'), to_regclass('public.run_events'), to_regclass('public.workflow_nodes'))
          and not c.relname = any (string_to_array(coalesce(current_setting('image_jobs.adopted', true), ''), ',')))
      union all
      -- The rules of adopted tables call these, with the rights of whoever writes.
      select 'function ' || p.oid::regprocedure
      from pg_proc p
      where p.pronamespace = 'image_jobs'::regnamespace and p.proname not in ('has_base64', 'is_image_run', 'touched_runs', 'writes_numbered_events')
        or p.pronamespace = 'public'::regnamespace and starts_with(obj_description(p.oid, 'pg_proc'), 'Image Job Orchestrator: ')
    loop
      execute format('revoke all on %s from %s cascade', v_object, v_role);
    end loop;
  end loop;
end
$$;

grant usage on schema image_jobs to anon, authenticated, service_role;

-- Functions that the checks, the triggers' conditions and the policies of these tables call run with the rights of the writer. They
-- are looked up for rows of other kinds, too, whoever writes them; who may not use the schema cannot call these by name.
grant execute on function image_jobs.has_base64(jsonb), image_jobs.touched_runs(), image_jobs.writes_numbered_events(regclass) to public;
-- As are the keys of an index.
grant execute on function image_jobs.remaining_fallbacks(jsonb, varchar, varchar),
  image_jobs.route_hash(jsonb, varchar, varchar) to authenticated, service_role;
grant execute on function image_jobs.may_upload(text) to authenticated;
grant execute on function image_jobs.my_workflows(), image_jobs.can_access_workflow(uuid), image_jobs.can_access_run(varchar),
  image_jobs.is_image_run(varchar), image_jobs.may_write(uuid), image_jobs.refuse_founded(uuid) to anon, authenticated, service_role;
-- Functions that the client functions and the views call.
grant execute on function image_jobs.cancel_run(varchar), image_jobs.requeue_run(varchar), image_jobs.show_run(varchar), image_jobs.image_job_record(varchar),
  image_jobs.refuse(text, text), image_jobs.current_user_id() to authenticated, service_role;
grant execute on function image_jobs.now(), image_jobs.claim_before(timestamptz), image_jobs.forget_user(uuid) to service_role;
grant select on image_jobs.alerts to service_role;
grant execute on function image_jobs.current_alerts(), image_jobs.dashboard(interval) to service_role;

grant select, insert on public.runs to authenticated;
grant select on public.run_events to authenticated;
grant select, insert, update, delete on public.workflow_nodes to authenticated;
grant select on public.workflow_members to authenticated;
grant select on public.image_jobs to authenticated;
grant select on image_jobs.models, public.image_models to anon, authenticated, service_role;
grant execute on function public.start_image_job(jsonb), public.cancel_run(varchar), public.requeue_run(varchar), public.show_run(varchar),
  public.estimate_cost(text, jsonb), image_jobs.estimate_cost(text, jsonb)
  to authenticated, service_role;
grant execute on function
  image_jobs.can_open_workflow(uuid), public.can_open_workflow(uuid),
  image_jobs.join_workflow(text), image_jobs.leave_workflow(uuid), image_jobs.share_workflow(uuid), image_jobs.unshare_workflow(uuid),
  public.join_workflow(text), public.leave_workflow(uuid), public.share_workflow(uuid), public.unshare_workflow(uuid)
  to authenticated, service_role;
grant select on public.image_provider_status, public.image_usage to authenticated, service_role;
grant execute on function image_jobs.provider_status(), image_jobs.usage_of_caller() to authenticated, service_role;

-- Anybody may post a webhook, and only through these functions. The inbox and the secrets are closed to all.
grant execute on function image_jobs.receive_webhook(text, jsonb, text) to anon, service_role;
grant execute on function public.webhook_openai(json), public.webhook_midjourney(json), public.webhook_hmac(json) to anon;
grant execute on function public.receive_webhook(text, jsonb, text) to service_role;
-- Called by the policy on realtime.messages.
grant execute on function image_jobs.can_subscribe(text) to authenticated;

grant select, insert, update, delete on public.runs, public.run_events, public.workflow_nodes, public.workflow_members,
  image_jobs.provider_blocks, image_jobs.provider_limits, image_jobs.usage_limits to service_role;
grant select on public.image_jobs, image_jobs.calls, image_jobs.queue_stats, image_jobs.run_timings, image_jobs.run_costs, image_jobs.storage_stats,
  image_jobs.failures, image_jobs.throughput, image_jobs.storage_violations, image_jobs.daemon_status, image_jobs.daemons,
  image_jobs.providers, image_jobs.migrations to service_role;

alter table public.runs enable row level security;
alter table public.run_events enable row level security;
alter table public.workflow_nodes enable row level security;
alter table public.workflow_members enable row level security;
alter table image_jobs.migrations enable row level security;
alter table image_jobs.project enable row level security;
alter table image_jobs.provider_blocks enable row level security;
alter table image_jobs.provider_limits enable row level security;
alter table image_jobs.tallies enable row level security;
alter table image_jobs.usage_limits enable row level security;
alter table image_jobs.provider_streaks enable row level security;
alter table image_jobs.workflows enable row level security;
alter table image_jobs.workflow_links enable row level security;
alter table image_jobs.provider_states enable row level security;
alter table image_jobs.used_hours enable row level security;
alter table image_jobs.set_aside enable row level security;
alter table image_jobs.stale_nodes enable row level security;
alter table image_jobs.providers enable row level security;
alter table image_jobs.opened_lanes enable row level security;
alter table image_jobs.watermarks enable row level security;
alter table image_jobs.due_marks enable row level security;
alter table image_jobs.claimants enable row level security;
alter table image_jobs.recent_starts enable row level security;
alter table image_jobs.limits_in_force enable row level security;
alter table image_jobs.daemons enable row level security;
alter table image_jobs.wake enable row level security;
alter table image_jobs.models enable row level security;
alter table image_jobs.prices enable row level security;
alter table image_jobs.calls enable row level security;
alter table image_jobs.webhook_secrets enable row level security;
alter table image_jobs.webhook_deliveries enable row level security;
alter table image_jobs.webhook_counters enable row level security;
alter table image_jobs.cancellations enable row level security;
alter table image_jobs.file_removals enable row level security;
alter table image_jobs.source_removals enable row level security;
alter table image_jobs.walks enable row level security;
alter table image_jobs.alert_notices enable row level security;

-- A row that is read is held against the set of the user's workflows, which is found once a statement, and by which an index is
-- read; `in (select …)` would read the whole table. A row that is written is asked for by itself: it may found its workflow.
-- What is said once more is in coalesce, which planners take for half of all rows: for a thousandth of a thousandth they would
-- rather sort all that a workflow has than read its newest in order.
-- The setting is read in a select, for linters, that names a column, since a statement founds workflows row by row.

-- runs
drop policy if exists "Members see the runs of their workflows" on public.runs;
create policy "Members see the runs of their workflows" on public.runs for select to authenticated
  using (kind = 'image_gen'
    and case when nullif((select current_setting('image_jobs.founded', true) where subject_id is not null), '') is null
      then true else subject_id = any (array(select image_jobs.my_workflows())) or image_jobs.refuse_founded(subject_id) end
    and subject_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Members insert runs into their workflows" on public.runs;
create policy "Members insert runs into their workflows" on public.runs for insert to authenticated
  with check (kind = 'image_gen' and image_jobs.can_access_workflow(subject_id));
-- On a table that was there before, other policies may be wider. These hold all the same, for our kind alone.
drop policy if exists "Nobody else sees image runs" on public.runs;
create policy "Nobody else sees image runs" on public.runs as restrictive for select to anon, authenticated
  using (kind is distinct from 'image_gen' or coalesce(subject_id = any (array(select image_jobs.my_workflows())), false));
drop policy if exists "Nobody else inserts image runs" on public.runs;
create policy "Nobody else inserts image runs" on public.runs as restrictive for insert to anon, authenticated
  with check (kind is distinct from 'image_gen' or image_jobs.can_access_workflow(subject_id));
drop policy if exists "No client updates image runs" on public.runs;
create policy "No client updates image runs" on public.runs as restrictive for update to anon, authenticated
  using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
drop policy if exists "No client deletes image runs" on public.runs;
create policy "No client deletes image runs" on public.runs as restrictive for delete to anon, authenticated
  using (kind is distinct from 'image_gen');

-- run_events
drop policy if exists "Members see the events of their runs" on public.run_events;
create policy "Members see the events of their runs" on public.run_events for select to authenticated
  using (run_kind = 'image_gen' and workflow_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Nobody else sees events of image runs" on public.run_events;
create policy "Nobody else sees events of image runs" on public.run_events as restrictive for select to anon, authenticated
  using (run_kind = 'image_gen' and coalesce(workflow_id = any (array(select image_jobs.my_workflows())), false)
    or run_kind is null and (not image_jobs.is_image_run(run_id) or image_jobs.can_access_run(run_id)));
drop policy if exists "No client inserts events of image runs" on public.run_events;
create policy "No client inserts events of image runs" on public.run_events as restrictive for insert to anon, authenticated
  with check (not image_jobs.is_image_run(run_id));
drop policy if exists "No client updates events of image runs" on public.run_events;
create policy "No client updates events of image runs" on public.run_events as restrictive for update to anon, authenticated
  using (not image_jobs.is_image_run(run_id)) with check (not image_jobs.is_image_run(run_id));
drop policy if exists "No client deletes events of image runs" on public.run_events;
create policy "No client deletes events of image runs" on public.run_events as restrictive for delete to anon, authenticated
  using (not image_jobs.is_image_run(run_id));

-- workflow_nodes
drop policy if exists "Members see the nodes of their workflows" on public.workflow_nodes;
create policy "Members see the nodes of their workflows" on public.workflow_nodes for select to authenticated
  using (case when nullif((select current_setting('image_jobs.founded', true) where workflow_id is not null), '') is null
      then true else workflow_id = any (array(select image_jobs.my_workflows())) or image_jobs.refuse_founded(workflow_id) end
    and workflow_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Members add nodes to their workflows" on public.workflow_nodes;
create policy "Members add nodes to their workflows" on public.workflow_nodes for insert to authenticated
  with check (image_jobs.may_write(workflow_id));
drop policy if exists "Members change the nodes of their workflows" on public.workflow_nodes;
create policy "Members change the nodes of their workflows" on public.workflow_nodes for update to authenticated
  using (workflow_id = any (array(select image_jobs.my_workflows()))) with check (image_jobs.can_access_workflow(workflow_id));
drop policy if exists "Members delete the nodes of their workflows" on public.workflow_nodes;
create policy "Members delete the nodes of their workflows" on public.workflow_nodes for delete to authenticated
  using (workflow_id = any (array(select image_jobs.my_workflows())));
drop policy if exists "Nobody else touches nodes" on public.workflow_nodes;
create policy "Nobody else touches nodes" on public.workflow_nodes as restrictive for all to anon, authenticated
  using (coalesce(workflow_id = any (array(select image_jobs.my_workflows())), false))
  with check (image_jobs.can_access_workflow(workflow_id));

-- workflow_members
drop policy if exists "Users see their own memberships" on public.workflow_members;
create policy "Users see their own memberships" on public.workflow_members for select to authenticated
  using (user_id = (select image_jobs.current_user_id()));

-- models
drop policy if exists "Everybody sees the models on offer" on image_jobs.models;
create policy "Everybody sees the models on offer" on image_jobs.models for select to anon, authenticated
  using (true);
