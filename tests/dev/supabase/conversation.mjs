// A frontend by supabase-js: prints its results, as test_realtime_clients.py does by supabase-py.
// SUPABASE_JS is a directory whose node_modules has it.
import { createRequire } from "node:module";

const { URL, KEY, TOKEN, STRANGER, WORKFLOW, SUPABASE_JS } = process.env;
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");

const results = [];
const record = (what, value) => results.push([what, value]);
const failed = ({ error }) => [error.code, error.message];
const options = (token) => ({ accessToken: async () => token, auth: { persistSession: false } });

const supabase = createClient(URL, KEY, options(TOKEN));
await supabase.realtime.setAuth();

const node = { id: "n1", workflow_id: WORKFLOW, node_type: "image", node_data: { label: "fox" } };
record("node", (await supabase.from("workflow_nodes").insert(node).select("id, node_data->>label").single()).data);

// Each message can be awaited, whenever it comes.
const waiting = [];
const receive = (what, message) => waiting.forEach((each) => each(what, message));
const waitFor = (what, wanted) =>
  new Promise((resolve) => waiting.push((from, value) => from === what && wanted(value) && resolve(value)));

const channel = supabase
  .channel(`workflow:${WORKFLOW}`, { config: { private: true } })
  .on("broadcast", { event: "nodes_changed" }, ({ payload }) => payload.nodes.forEach((each) => receive("broadcast", each)));
const changes = supabase
  .channel("canvas")
  .on(
    "postgres_changes",
    { event: "*", schema: "public", table: "workflow_nodes", filter: `workflow_id=eq.${WORKFLOW}` },
    (change) => receive("change", change.new),
  )
  .on("system", {}, ({ message }) => receive("system", message));
const subscribed = (one) =>
  new Promise((resolve) => one.subscribe((status, error) => resolve([status, error?.message ?? null])));
const ready = waitFor("system", () => true);
record("private", await subscribed(channel));
record("changes", await subscribed(changes));
record("system", await ready);

const shown = (status) => (row) => row.node_data.status === status;
const pending = [waitFor("broadcast", shown("pending")), waitFor("change", shown("pending"))];
const metadata = { nodeId: "n1", promptSpec: { basePrompt: "a red fox" } };
const run = { kind: "image_gen", subject_id: WORKFLOW, status: "pending", processor: "demo:painter", metadata };
const { data: inserted } = await supabase.from("runs").insert(run).select("id, status").single();
record("inserted", inserted.status);
for (const each of await Promise.all(pending)) record("heard", [each.id, each.node_data.label, each.node_data.status]);

const jobs = await supabase
  .from("image_jobs")
  .select("nodeId, status", { count: "exact" })
  .or(`jobId.eq.${inserted.id},status.in.(running,failed)`)
  .order("startedAt", { ascending: false })
  .range(0, 9);
record("jobs", [jobs.data, jobs.count]);

const cancelled = [waitFor("broadcast", shown("cancelled")), waitFor("change", shown("cancelled"))];
record("cancelled", (await supabase.rpc("cancel_run", { run_id: inserted.id })).data.status);
for (const each of await Promise.all(cancelled)) record("heard", each.node_data.status);
record("requeued", (await supabase.rpc("requeue_run", { run_id: inserted.id })).data.status);
record("twice", failed(await supabase.rpc("requeue_run", { run_id: inserted.id })));
record("unknown", failed(await supabase.rpc("cancel_run", { run_id: "nobody's" })));
record("bad", failed(await supabase.rpc("start_image_job", { request: { nodeId: "n1" } })));
record("forbidden", failed(await supabase.from("runs").update({ status: "completed" }).eq("id", inserted.id))[0]);

const stranger = createClient(URL, KEY, options(STRANGER));
await stranger.realtime.setAuth();
record("stranger sees", (await stranger.from("workflow_nodes").select("*")).data);
record("stranger hears", (await subscribed(stranger.channel(`workflow:${WORKFLOW}`, { config: { private: true } })))[0]);

record("left", await supabase.removeChannel(channel));
await supabase.removeAllChannels();
await stranger.removeAllChannels();
console.log(JSON.stringify(results));
process.exit(0); // a client that was refused tries again for ever
