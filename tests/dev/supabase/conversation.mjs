// What a frontend does, by supabase-js as it is: prints what it got, as test_realtime.py's conversation does.
// SUPABASE_JS is a directory whose node_modules has it.
import { createRequire } from "node:module";

const { URL, KEY, TOKEN, STRANGER, WORKFLOW, SUPABASE_JS } = process.env;
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");

const said = [];
const say = (what, value) => said.push([what, value]);
const failed = ({ error }) => [error.code, error.message];
const options = (token) => ({ accessToken: async () => token, auth: { persistSession: false } });

const supabase = createClient(URL, KEY, options(TOKEN));
await supabase.realtime.setAuth();

const node = { id: "n1", workflow_id: WORKFLOW, node_type: "image", node_data: { label: "fox" } };
say("node", (await supabase.from("workflow_nodes").insert(node).select("id, node_data->>label").single()).data);

// Messages come when they come: each is waited for.
const waiting = [];
const hear = (what, heard) => waiting.forEach((each) => each(what, heard));
const heard = (what, wanted) =>
  new Promise((resolve) => waiting.push((from, value) => from === what && wanted(value) && resolve(value)));

const channel = supabase
  .channel(`workflow:${WORKFLOW}`, { config: { private: true } })
  .on("broadcast", { event: "nodes_changed" }, ({ payload }) => payload.nodes.forEach((each) => hear("broadcast", each)));
const changes = supabase
  .channel("canvas")
  .on(
    "postgres_changes",
    { event: "*", schema: "public", table: "workflow_nodes", filter: `workflow_id=eq.${WORKFLOW}` },
    (change) => hear("change", change.new),
  )
  .on("system", {}, ({ message }) => hear("system", message));
const subscribed = (one) =>
  new Promise((resolve) => one.subscribe((status, error) => resolve([status, error?.message ?? null])));
const ready = heard("system", () => true);
say("private", await subscribed(channel));
say("changes", await subscribed(changes));
say("system", await ready);

const shown = (status) => (row) => row.node_data.status === status;
const pending = [heard("broadcast", shown("pending")), heard("change", shown("pending"))];
const metadata = { nodeId: "n1", promptSpec: { basePrompt: "a red fox" } };
const run = { kind: "image_gen", subject_id: WORKFLOW, status: "pending", processor: "demo:painter", metadata };
const { data: inserted } = await supabase.from("runs").insert(run).select("id, status").single();
say("inserted", inserted.status);
for (const each of await Promise.all(pending)) say("heard", [each.id, each.node_data.label, each.node_data.status]);

const jobs = await supabase
  .from("image_jobs")
  .select("nodeId, status", { count: "exact" })
  .or(`jobId.eq.${inserted.id},status.in.(running,failed)`)
  .order("startedAt", { ascending: false })
  .range(0, 9);
say("jobs", [jobs.data, jobs.count]);

const cancelled = [heard("broadcast", shown("cancelled")), heard("change", shown("cancelled"))];
say("cancelled", (await supabase.rpc("cancel_run", { run_id: inserted.id })).data.status);
for (const each of await Promise.all(cancelled)) say("heard", each.node_data.status);
say("requeued", (await supabase.rpc("requeue_run", { run_id: inserted.id })).data.status);
say("twice", failed(await supabase.rpc("requeue_run", { run_id: inserted.id })));
say("unknown", failed(await supabase.rpc("cancel_run", { run_id: "nobody's" })));
say("bad", failed(await supabase.rpc("start_image_job", { request: { nodeId: "n1" } })));
say("forbidden", failed(await supabase.from("runs").update({ status: "completed" }).eq("id", inserted.id))[0]);

const stranger = createClient(URL, KEY, options(STRANGER));
await stranger.realtime.setAuth();
say("stranger sees", (await stranger.from("workflow_nodes").select("*")).data);
say("stranger hears", (await subscribed(stranger.channel(`workflow:${WORKFLOW}`, { config: { private: true } })))[0]);

say("left", await supabase.removeChannel(channel));
await supabase.removeAllChannels();
await stranger.removeAllChannels();
console.log(JSON.stringify(said));
process.exit(0); // a client that was refused tries again for ever
