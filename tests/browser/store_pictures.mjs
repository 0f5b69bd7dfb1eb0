// Pictures of a private bucket in the store, in front of a REST and a Storage that are made up here: prints what was asked
// and shown, by scenario. The clock is moved by hand, so one scenario runs after the other.
// SUPABASE_JS is a directory whose node_modules has supabase-js; CANVAS holds workflow.ts, whose types Node strips.
import { registerHooks, createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { SUPABASE_JS, CANVAS } = process.env;
const here = String(pathToFileURL(CANVAS));
registerHooks({
  resolve: (name, context, next) => next(context.parentURL?.startsWith(here) ? `${name}.ts` : name, context),
});
const every = globalThis.setInterval;
globalThis.setInterval = (call, time) => every(call, time === 5_000 ? 20 : time); // the store's watch
const after = globalThis.setTimeout;
let patience = 20_000;
globalThis.setTimeout = (call, time, ...rest) => after(call, time === 20_000 ? patience : time, ...rest); // the store's
const now = Date.now;
let moved = 0;
Date.now = () => now() + moved;
const { Workflow } = await import(pathToFileURL(`${CANVAS}/workflow.ts`));
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");

const URL = "http://storage.invalid";
const MINUTE = 60_000;
const json = (status, body) => new Response(JSON.stringify(body), { status, headers: { "content-type": "application/json" } });
/** Long enough for several turns of the watch: what it would ask for has been asked. */
const turns = () => new Promise(resolve => setTimeout(resolve, 120));

async function when(wanted) {
  while (!wanted()) await new Promise(resolve => setTimeout(resolve, 10));
}

class SilentSocket {
  send() {}
  close() {}
}

function node(number, { access = "authenticated", bucket = "images", run = "job_1", version = 1, more = {} } = {}) {
  const path = `w/${run}_${number}`;
  const url = end => `${URL}/storage/v1/object/${access}/${bucket}/${path}${end}?v=abcd1234`;
  return {
    id: `n${String(number).padStart(5, "0")}`, workflow_id: "w", node_type: "image", position: { x: 0, y: 0 }, version,
    node_data: {
      status: "completed", runId: run, imageUrl: url(".png"), thumbnailUrl: url(".thumb.webp"), imagePath: `${path}.png`,
      thumbnailPath: `${path}.thumb.webp`, ...more,
    },
  };
}

const stores = [];

/** Opens a store over `rows`, and closes the last one. `answer` may return the response to a request for signatures, or a promise of it. */
function open(rows, answer = () => undefined) {
  stores.at(-1)?.close();
  const store = { rows, answer, asked: [], written: [], problems: [], holes: 0 };
  const sign = async (bucket, body) => {
    const { paths, expiresIn } = JSON.parse(body);
    const number = store.asked.push(paths);
    const signed = path => ({ error: null, path, signedURL: `/object/sign/${bucket}/${path}?token=t${number}-${expiresIn}` });
    return (await store.answer(paths, signed, number)) ?? json(200, paths.map(signed));
  };
  const fetch = async (address, { method, body } = {}) => {
    const { pathname, searchParams } = new globalThis.URL(address);
    if (pathname.startsWith("/storage/v1/object/sign/")) return sign(pathname.split("/").at(-1), body);
    if (pathname !== "/rest/v1/workflow_nodes") return json(200, []);
    if (method === "POST") store.written.push(JSON.parse(body));
    const after = (searchParams.get("id") ?? "").replace("gt.", "");
    return json(200, method === "GET" ? store.rows.filter(({ id }) => id > after).slice(0, 500) : []);
  };
  const auth = { persistSession: false, autoRefreshToken: false, storageKey: crypto.randomUUID() };
  stores.push(store);
  store.supabase = createClient(URL, "key", { auth, global: { fetch }, realtime: { transport: SilentSocket } });
  store.workflow = new Workflow(store.supabase, "w");
  store.workflow.onProblem(problem => store.problems.push(problem.message));
  let look = () => {};
  let hadUrl = false;
  store.close = store.workflow.subscribe(snapshot => {
    const hasUrl = Boolean(snapshot.nodes[0]?.node_data.imageUrl);
    store.holes += hadUrl && !hasUrl ? 1 : 0;
    hadUrl ||= hasUrl;
    look(snapshot);
  });
  store.until = wanted => new Promise(resolve => {
    look = snapshot => wanted(snapshot) && resolve(snapshot);
    look(store.workflow.snapshot());
  });
  store.url = (index = 0, key = "imageUrl") => store.workflow.snapshot().nodes[index]?.node_data[key];
  return store;
}

const hasUrls = ({ nodes }) => nodes.length > 0 && nodes.every(({ node_data }) => node_data.imageUrl && node_data.thumbnailUrl);
const isSigned = number => ({ nodes }) => nodes[0]?.node_data.imageUrl?.includes(`token=t${number}-`);
const short = url => url?.replace(`${URL}/storage/v1/object/`, "");

/** Holds responses back until it is let go. */
function brake() {
  const held = {};
  held.wait = new Promise(resolve => (held.letGo = resolve));
  return held;
}

const scenarios = {
  async "a public bucket"() {
    const store = open([node(1, { access: "public" }), node(2, { access: "public" })]);
    const first = await store.until(hasUrls);
    moved += 60 * MINUTE;
    store.workflow.refresh();
    await turns();
    return [store.asked.length, first.nodes[0].node_data.imageUrl === store.rows[0].node_data.imageUrl];
  },
  async "a canvas"() {
    const store = open(Array.from({ length: 100 }, (_, number) => node(number)));
    await store.until(hasUrls);
    return [store.asked.length, store.asked[0].length, short(store.url()), short(store.url(0, "thumbnailUrl"))];
  },
  async "a large canvas"() {
    const store = open(Array.from({ length: 600 }, (_, number) => node(number)));
    await store.until(snapshot => snapshot.nodes.length === 600 && hasUrls(snapshot));
    return [store.asked.every(paths => paths.length <= 500), store.asked.flat().length, new Set(store.asked.flat()).size];
  },
  async "renewal"() {
    const store = open([node(1), node(2)]);
    await store.until(hasUrls);
    const seen = [];
    const count = async (minutes, least) => {
      moved += minutes * MINUTE;
      await when(() => store.asked.length >= least);
      await turns();
      seen.push(store.asked.length);
    };
    await count(5, 1); // they are good for ten
    const held = brake();
    store.answer = () => held.wait;
    await count(4, 2);
    const meanwhile = short(store.url());
    held.letGo();
    await store.until(isSigned(2));
    await count(0, 2);
    await count(600, 3); // the computer slept
    await store.until(isSigned(3));
    await count(-1440, 4); // its clock was set
    await store.until(isSigned(4));
    return [seen, meanwhile, short(store.url()), store.asked.at(-1).length, store.holes, store.problems];
  },
  async "a new image"() {
    const store = open([node(1)]);
    await store.until(hasUrls);
    const held = brake();
    store.answer = () => held.wait;
    store.rows = [node(1, { run: "job_2", version: 2 })];
    store.workflow.refresh();
    await store.until(({ nodes }) => nodes[0].node_data.runId === "job_2");
    const meanwhile = short(store.url());
    held.letGo();
    await store.until(isSigned(2));
    return [meanwhile, short(store.url()), store.holes];
  },
  async "previews"() {
    const preview = v => node(1, {
      version: Number(v), more: {
        status: "running", previewPath: "w/job_1.preview.webp", imageUrl: undefined, imagePath: undefined,
        previewUrl: `${URL}/storage/v1/object/authenticated/images/w/job_1.preview.webp?v=${v}`,
      },
    });
    const store = open([preview("1")]);
    const of = v => ({ nodes }) => nodes[0]?.node_data.previewUrl?.endsWith(`&v=${v}`);
    await store.until(of("1"));
    store.rows = [preview("2")];
    store.workflow.refresh();
    await store.until(of("2"));
    return store.asked.length;
  },
  async "a row without addresses"() {
    const store = open([node(1, { more: { imageUrl: undefined, thumbnailUrl: undefined } })]);
    await store.until(hasUrls);
    return short(store.url());
  },
  async "Storage in trouble"() {
    const store = open([node(1)], () => json(503, { statusCode: "503", error: "Unavailable", message: "upstream" }));
    await when(() => store.problems.length > 0);
    await turns();
    const first = store.asked.length;
    for (let time = 1; time <= 5; time++) {
      moved += MINUTE / 2;
      await when(() => store.asked.length > time);
      await turns();
    }
    const later = store.asked.length;
    store.answer = () => undefined;
    moved += MINUTE / 2;
    await store.until(hasUrls);
    return [first, later, store.problems];
  },
  async "no network"() {
    const store = open([node(1)], () => Promise.reject(new TypeError("fetch failed")));
    await when(() => store.asked.length > 0);
    await turns();
    const asked = store.asked.length;
    store.answer = () => undefined;
    store.workflow.refresh();
    await store.until(hasUrls);
    return [asked, store.problems];
  },
  async "a refusal"() {
    const store = open([node(1)], () => json(400, { statusCode: "403", error: "Unauthorized", message: "jwt expired" }));
    await when(() => store.problems.length > 0);
    moved += 60 * MINUTE;
    await turns();
    const asked = store.asked.length;
    store.workflow.refresh();
    await when(() => store.asked.length > asked);
    await turns();
    const again = store.asked.length;
    store.answer = () => undefined;
    store.workflow.refresh();
    await store.until(hasUrls);
    return [asked, again, store.problems];
  },
  async "a picture that is missing"() {
    const store = open([node(1), node(2)], (paths, signed) => json(200, paths.map(path =>
      path.includes("_2") ? { error: "Either the object does not exist or you do not have access to it", path, signedURL: null }
        : signed(path))));
    await when(() => store.problems.length > 0);
    moved += 5 * MINUTE;
    await turns();
    const asked = store.asked.length;
    store.workflow.refresh();
    await when(() => store.asked.length > asked);
    await turns();
    return [asked, store.asked.length, store.problems, Boolean(store.url(0)), store.url(1) ?? null];
  },
  async "an address that does not load"() {
    const store = open([node(1), node(2)]);
    await store.until(hasUrls);
    const counts = [];
    const count = async (seconds, least) => {
      moved += 1_000 * seconds;
      await when(() => store.asked.length >= least);
      await turns();
      counts.push(store.asked.length);
    };
    for (let time = 0; time < 10; time++) store.workflow.retryPicture(store.url());
    await count(0, 1); // it was signed just now
    await count(6, 2);
    await store.until(isSigned(2));
    store.workflow.retryPicture(store.url());
    await count(6, 2); // the pauses grow
    await count(6, 3);
    await store.until(isSigned(3));
    moved += MINUTE;
    store.workflow.retryPicture(store.url(1)); // for the first time: at once
    await count(0, 4);
    return [counts, store.holes];
  },
  async "a public bucket that was closed"() {
    const store = open([node(1, { access: "public" }), node(2, { access: "public" })]);
    await store.until(hasUrls);
    const held = brake();
    store.answer = () => held.wait;
    for (const _ of ["first", "second"]) {
      for (const index of [0, 1]) store.workflow.retryPicture(store.url(index));
      await store.until(({ nodes }) => nodes.every(({ node_data }) => node_data.imageUrl.endsWith("again=1")));
    }
    await when(() => store.asked.length > 0);
    const meanwhile = short(store.url());
    held.letGo();
    await store.until(isSigned(1));
    store.workflow.refresh(); // it stays signed
    await turns();
    return [store.asked, meanwhile, short(store.url()), store.holes];
  },
  async "a public picture that fails to load once"() {
    const store = open([node(1, { access: "public" })]);
    await store.until(hasUrls);
    const first = store.url();
    for (let time = 0; time < 2; time++) store.workflow.retryPicture(first); // by the node and by the dialog
    await store.until(({ nodes }) => nodes[0].node_data.imageUrl !== first);
    await turns();
    const second = short(store.url());
    store.workflow.refresh();
    await store.until(({ nodes }) => nodes[0].node_data.imageUrl === first);
    return [store.asked.length, second, store.holes];
  },
  async "signatures after leaving"() {
    const held = brake();
    const store = open([node(1)], () => held.wait);
    await when(() => store.asked.length === 1);
    await store.workflow.leave();
    await store.until(({ nodes }) => nodes.length === 0);
    store.answer = () => undefined;
    store.workflow.refresh();
    await store.until(({ nodes }) => nodes.length > 0); // of the next user
    await store.until(hasUrls); // while the request of the last one hangs
    held.letGo();
    await turns();
    return [store.asked.length, short(store.url())];
  },
  async "a request that hangs"() {
    patience = 100;
    const store = open([node(1)], () => new Promise(() => {}));
    await when(() => store.asked.length > 0);
    patience = 20_000;
    store.answer = () => undefined;
    await when(() => {
      moved += 1_000;
      return store.asked.length > 1;
    });
    await store.until(hasUrls);
    return [short(store.url()), store.problems];
  },
  async "a deleted node that comes back"() {
    const store = open([node(1)]);
    const { nodes: [shown] } = await store.until(hasUrls);
    store.rows = [];
    store.workflow.restore(shown);
    await when(() => store.written.length > 0);
    return short(store.written[0].node_data.imageUrl);
  },
  async "a node that has not changed"() {
    const store = open([node(1), node(2)]);
    const { nodes: before } = await store.until(hasUrls);
    store.rows = [store.rows[0], node(2, { run: "job_2", version: 2 })];
    store.workflow.refresh();
    const { nodes: after } = await store.until(({ nodes }) => nodes[1].node_data.imageUrl?.includes("job_2"));
    return [before[0] === after[0], before[1] === after[1]];
  },
};

const results = {};
for (const [name, scenario] of Object.entries(scenarios)) {
  const late = new Promise(resolve => after(resolve, 20_000, "it did not come to an end"));
  results[name] = await Promise.race([scenario().catch(error => String(error.stack)), late]);
}
console.log(JSON.stringify(results));
process.exit();
