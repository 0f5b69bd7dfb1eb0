// Faults around the store, each with a client of its own: prints what came of each by name, all at once.
// SUPABASE_JS is a directory whose node_modules has supabase-js; CANVAS holds workflow.ts, whose types Node strips.
import { registerHooks, createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { URL: url, KEY, SUPABASE_JS, CANVAS } = process.env;
const here = String(pathToFileURL(CANVAS));
registerHooks({
  resolve: (name, context, next) => next(context.parentURL?.startsWith(here) ? `${name}.ts` : name, context),
});
const every = globalThis.setInterval;
globalThis.setInterval = (call, time) => every(call, time === 5_000 ? 100 : time); // the store's watch, fifty times as fast
const { Workflow } = await import(pathToFileURL(`${CANVAS}/workflow.ts`));
const { Availability } = await import(pathToFileURL(`${CANVAS}/availability.ts`));
const { NodeCache } = await import(pathToFileURL(`${CANVAS}/cache.ts`));
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");

/** Whether a frame is a message with nodes. */
function hasNodes({ data }) {
  return new TextDecoder().decode(typeof data === "string" ? Buffer.from(data) : data).includes("nodes_changed");
}

/** Remembers the last message with nodes, and delivers it again while the channel is being left. */
class LateSocket extends WebSocket {
  constructor(...all) {
    super(...all);
    this.addEventListener("message", event => {
      if (hasNodes(event)) this.last = event;
    });
  }
  send(frame) {
    super.send(frame);
    if (String(frame).includes("phx_leave") && this.last) this.onmessage(this.last);
  }
}

/** Returns a client, with its last `socket`; `answer` may return the response to a request, or a promise of it. */
function connect(answer = () => undefined) {
  const client = createClient(url, KEY, {
    auth: { persistSession: false, storageKey: crypto.randomUUID() },
    global: { fetch: async (...all) => (await answer(String(all[0]), all[1]?.method ?? "GET", all)) ?? fetch(...all) },
    realtime: {
      transport: class extends LateSocket {
        constructor(...all) {
          super(...all);
          client.socket = this;
        }
      },
    },
  });
  return client;
}

/** Returns a store that is being watched, its problems, and a wait for a snapshot. */
function open(supabase, id = crypto.randomUUID()) {
  const workflow = new Workflow(supabase, id);
  const problems = [];
  let look = () => {};
  workflow.onProblem(({ message }) => problems.push(message));
  const close = workflow.subscribe(snapshot => look(snapshot));
  const until = wanted => new Promise(resolve => {
    look = snapshot => wanted(snapshot) && resolve(snapshot);
    look(workflow.snapshot());
  });
  return { workflow, problems, until, close };
}

const json = (status, body) => new Response(JSON.stringify(body), { status, headers: { "content-type": "application/json" } });
const painter = { provider: "demo", model: "painter", promptSpec: { basePrompt: "A pier" } };
const isLive = ({ connection, nodes, unsent }) => connection === "live" && nodes.length === 1 && unsent === 0;
const isNodes = address => address.includes("/rest/v1/workflow_nodes");

/** Signs in and makes a workflow with one node. */
async function live(answer) {
  const supabase = connect(answer);
  await supabase.auth.signInAnonymously();
  const store = open(supabase);
  const id = store.workflow.add(painter, { x: 0, y: 0 });
  await store.until(isLive);
  return { ...store, supabase, id };
}

/** Holds back the responses to requests while it is on: for the nodes, unless others are named. */
class Brake {
  #isHeld;
  #release = () => {};
  #held = undefined;
  asked = Promise.resolve();
  constructor(isHeld = isNodes) {
    this.#isHeld = isHeld;
  }
  answer = async (address, method, all) => {
    if (!this.#held || method !== "GET" || !this.#isHeld(address)) return undefined;
    const response = await fetch(...all);
    this.#ask();
    await this.#held;
    return response;
  };
  #ask = () => {};
  on() {
    this.#held = new Promise(resolve => (this.#release = resolve));
    this.asked = new Promise(resolve => (this.#ask = resolve));
  }
  /** Lets them through, and waits until the store has had them. */
  async off() {
    this.#held = undefined;
    this.#release();
    await new Promise(resolve => setTimeout(resolve, 50));
  }
}

/** Counts the limits that are shown after `end`, and those that were on their way meanwhile. */
async function usageAfter(end, isOver) {
  const brake = new Brake(address => address.includes("/rest/v1/image_usage"));
  const limit = { scope: "user", period: "day", used_images: 3, max_images: 9, used_usd: 0, max_usd: null };
  const { supabase, workflow, until } = await live(async (address, method, all) => {
    if (address.includes("/rpc/leave_workflow")) return new Response(null, { status: 204 });
    if (!address.includes("/rest/v1/image_usage")) return undefined;
    await brake.answer(address, method, all);
    return json(200, [limit]);
  });
  await until(({ usage }) => usage.length === 1);
  brake.on();
  workflow.refresh();
  await brake.asked;
  await end({ supabase, workflow });
  const { usage } = await until(isOver);
  await brake.off();
  return [usage.length, workflow.snapshot().usage.length];
}

async function gateway(status) {
  let requests = 0;
  const { problems, until } = open(connect(address => {
    requests += isNodes(address);
    return address.includes("/rest/v1/") ? json(status, { message: "Invalid API key" }) : undefined;
  }));
  const { error } = await until(snapshot => snapshot.error);
  return [error.message, problems, requests <= 2];
}

const scenarios = {
  async "a usage limit"() {
    let inserts = 0;
    const { workflow, problems, until, id } = await live((address, method) => {
      if (method !== "POST" || !address.includes("/rest/v1/runs")) return undefined;
      inserts += 1;
      return json(429, { code: "PT429", message: "You have reached the limit.", hint: "Wait.", details: null });
    });
    await workflow.generate(id);
    await until(({ nodes }) => nodes[0].node_data.imageUrl && nodes[0].node_data.status === "completed");
    workflow.add({ ...painter, source: id, pendingRunId: `job_${crypto.randomUUID()}` }, { x: 1, y: 0 });
    const settled = await until(({ nodes, unsent }) => nodes.length === 2 && unsent === 0 && !nodes[1].node_data.pendingRunId);
    return [inserts, problems, settled.error];
  },
  "a gateway's 401": () => gateway(401),
  "a gateway's 403": () => gateway(403),
  async "writes that failed"() {
    let failures = 0;
    const { workflow, problems, until, id } = await live((_address, method) =>
      method === "PATCH" && failures++ < 4 ? json(503, { message: "upstream" }) : undefined);
    workflow.move(id, { x: 5, y: 5 });
    await until(({ unsent }) => unsent === 1);
    const { nodes } = await until(isLive);
    return [nodes[0].position, failures, problems];
  },
  async "a second press while no message comes"() {
    const { workflow, supabase, id } = await live();
    const hear = supabase.socket.onmessage;
    supabase.socket.onmessage = event => hasNodes(event) || hear(event);
    workflow.edit(id, { metadata: { demo: { hang: true } } });
    for (const _ of [1, 2]) await workflow.generate(id);
    const { data } = await supabase.from("runs").select("id").eq("subject_id", workflow.id);
    await workflow.cancel(id);
    return [data.length, workflow.now(id).node_data.status];
  },
  async "a channel that was closed"() {
    const { workflow, supabase, until } = await live();
    await supabase.removeChannel(supabase.getChannels()[0]);
    await until(({ connection }) => connection === "away");
    await until(isLive);
    return [supabase.getChannels().length, workflow.snapshot().nodes.length];
  },
  async "a rejoin after a refusal"() {
    let loads = 0;
    const supabase = connect((address, method) => {
      if (method !== "GET" || !isNodes(address)) return undefined;
      loads += 1;
      return json(403, { code: "42501", message: "permission denied", hint: null, details: null });
    });
    await supabase.auth.signInAnonymously();
    const { workflow, problems, until } = open(supabase);
    workflow.add(painter, { x: 0, y: 0 });
    await until(({ connection, error }) => connection === "live" && error);
    const before = loads;
    const away = until(({ connection }) => connection === "away");
    supabase.socket.close();
    await away;
    await until(({ connection }) => connection === "live");
    await new Promise(resolve => setTimeout(resolve, 100)); // a request would have been made by now
    return [loads - before, problems];
  },
  async "a load before anybody subscribes"() {
    const supabase = connect();
    await supabase.auth.signInAnonymously();
    const workflow = new Workflow(supabase, crypto.randomUUID());
    workflow.refresh();
    await new Promise(resolve => workflow.subscribe(({ isLoading }) => !isLoading && resolve()));
    return workflow.snapshot().isLoading;
  },
  async "messages and loads after leaving"() {
    const ann = await live();
    const brake = new Brake();
    const supabase = connect(brake.answer);
    await supabase.auth.signInAnonymously();
    await supabase.rpc("join_workflow", { token: await ann.workflow.share() });
    const ben = open(supabase, ann.workflow.id);
    await ben.until(isLive);
    ann.workflow.move(ann.id, { x: 7, y: 7 });
    await ben.until(({ nodes }) => nodes[0]?.position.x === 7);
    brake.on();
    ben.workflow.refresh();
    await brake.asked;
    await ben.workflow.leave();
    const { nodes } = await ben.until(({ connection }) => connection === "denied");
    await brake.off();
    return [nodes.length, ben.workflow.snapshot().nodes.length];
  },
  async "a first load that ends after signing out"() {
    const brake = new Brake();
    const first = await live(brake.answer);
    first.close();
    brake.on();
    const { workflow, until } = open(first.supabase, first.workflow.id);
    await brake.asked;
    await first.supabase.auth.signOut();
    await until(({ error }) => error);
    await brake.off();
    return workflow.snapshot().nodes.length;
  },
  "usage after signing out": () => usageAfter(({ supabase }) => supabase.auth.signOut(), ({ error }) => error),
  "usage after leaving": () => usageAfter(({ workflow }) => workflow.leave(), ({ connection }) => connection === "denied"),
  async "runs on the store's channel"() {
    const { workflow, supabase } = await live();
    let hear;
    const heard = new Promise(resolve => (hear = resolve));
    workflow.onRuns(([run]) => hear(run));
    const id = `job_${crypto.randomUUID()}`;
    const { promptSpec } = painter;
    const { error } = await supabase.from("runs").insert({
      id, kind: "image_gen", subject_id: workflow.id, status: "pending", processor: "demo:painter", metadata: { promptSpec },
    });
    if (error) return error.message;
    const run = await heard;
    return [run.jobId === id, run.version > 0];
  },
  async "the reason of a run that is led to another provider"() {
    const run = { id: "job_1", processor: "openai:gpt-image-2", routed_to: null };
    const closed = ["openai", "google"].map(provider => ({ provider, model: null, state: "blocked", sentence: provider }));
    let asked = 0;
    const supabase = connect(address => {
      if (address.includes("/rest/v1/image_provider_status")) return json(200, closed);
      asked += address.includes("/rest/v1/runs");
      return address.includes("/rest/v1/runs") ? json(200, [run]) : undefined;
    });
    let look = () => {};
    const availability = new Availability(supabase, () => look());
    const row = version => ({ version, node_data: { status: "pending", runId: run.id } });
    const shows = wanted => new Promise(resolve => {
      look = () => availability.reason(row()).waitsFor === wanted && resolve();
      look();
    });
    availability.watch([row(1)]);
    await shows("openai");
    availability.watch([row(1)]); // nothing new is asked
    run.routed_to = "google:imagen-4.0-generate-001";
    availability.watch([row(2)]);
    await shows("google");
    availability.watch([]);
    const forgotten = availability.reason(row()).waitsFor === undefined;
    availability.watch([row(2)]);
    await shows("google");
    availability.close();
    return [asked, forgotten];
  },
  async "words that were not sent before their nodes were deleted"() {
    let isAway = false;
    const { workflow, supabase, problems, until, id } = await live((_address, method) =>
      isAway && method === "PATCH" ? json(503, { message: "upstream" }) : undefined);
    const other = workflow.add(painter, { x: 1, y: 0 });
    await until(({ nodes, unsent }) => nodes.length === 2 && unsent === 0);
    const hear = supabase.socket.onmessage;
    supabase.socket.onmessage = event => hasNodes(event) || hear(event);
    isAway = true;
    const lost = [];
    workflow.onProblem(({ restore }) => restore && lost.push(restore));
    for (const each of [id, other]) workflow.edit(each, { promptSpec: { basePrompt: `${each === id ? "A pier" : "A boat"} at dusk` } });
    await supabase.from("workflow_nodes").delete().eq("workflow_id", workflow.id);
    workflow.refresh();
    await until(({ nodes }) => nodes.length === 0);
    isAway = false;
    lost.forEach(restore => restore());
    const { nodes } = await until(({ nodes, unsent }) => nodes.length === lost.length && unsent === 0);
    return [problems, nodes.map(({ node_data }) => node_data.promptSpec.basePrompt).sort()];
  },
  async "a node that is seen before the models"() {
    const brake = new Brake(address => address.includes("/rest/v1/image_models"));
    const first = await live(brake.answer);
    first.close();
    brake.on();
    const { workflow, until } = open(first.supabase, first.workflow.id);
    await brake.asked;
    workflow.add(painter, { x: 1, y: 0 });
    const before = (await until(({ nodes }) => nodes.length > 0)).nodes.length;
    await brake.off();
    return [before, (await until(({ nodes }) => nodes.length === 2)).models.length > 0];
  },
  async "edits of nodes that are gone"() {
    const node = id => ({ id, workflow_id: "w", node_type: "image", node_data: {}, position: null, version: 0 });
    const cleared = new NodeCache(() => {});
    cleared.insert(node("a"));
    const written = cleared.pendingEdit("a");
    cleared.clear();
    cleared.mergeRow({ ...node("a"), version: 1 });
    cleared.settleEdit("a", written);
    const refused = new NodeCache(() => {});
    refused.insert(node("b"));
    const insert = refused.pendingEdit("b");
    refused.edit("b", { position: { x: 1, y: 1 } });
    refused.settleEdit("b", insert);
    refused.removeInsert("b");
    refused.edit("b", { position: { x: 2, y: 2 } });
    return [cleared.pendingEdits(), refused.pendingEdits()];
  },
};

const inTime = async ([name, scenario]) => {
  const late = new Promise(resolve => setTimeout(resolve, 20_000, "it did not come to an end"));
  return [name, await Promise.race([scenario().catch(error => String(error.stack)), late])];
};
console.log(JSON.stringify(Object.fromEntries(await Promise.all(Object.entries(scenarios).map(inTime)))));
process.exit();
