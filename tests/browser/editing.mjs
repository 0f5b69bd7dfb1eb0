// Undo, the clipboard, the clock, prices and uploads of the canvas, without a browser: prints what came of each, by name.
// CANVAS holds their sources, whose types Node strips; SUPABASE_JS is a directory whose node_modules has supabase-js.
import { createRequire, registerHooks } from "node:module";
import { pathToFileURL } from "node:url";

const { CANVAS, SUPABASE_JS } = process.env;
const here = String(pathToFileURL(CANVAS));
registerHooks({
  resolve: (name, context, next) => next(context.parentURL?.startsWith(here) ? `${name}.ts` : name, context),
});
const { undoable } = await import(pathToFileURL(`${CANVAS}/undo.ts`));
const { fromText, toText } = await import(pathToFileURL(`${CANVAS}/clipboard.ts`));
const { applyPatch } = await import(pathToFileURL(`${CANVAS}/nodes.ts`));
const { Clock } = await import(pathToFileURL(`${CANVAS}/clock.ts`));
const { Prices } = await import(pathToFileURL(`${CANVAS}/prices.ts`));
const { removeUnused } = await import(pathToFileURL(`${CANVAS}/uploads.ts`));
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");
const { Requests } = await import(pathToFileURL(`${CANVAS}/requests.ts`));
const task = () => new Promise(resolve => setTimeout(resolve));

let moved = 0;
const now = Date.now;
Date.now = () => now() + moved;

/** A store of nodes in memory, with what was done to it. */
function memory() {
  const nodes = new Map();
  const log = [];
  let count = 0;
  const store = {
    add(input, position) {
      const id = `n${(count += 1)}`;
      nodes.set(id, { id, node_data: input, position });
      return id;
    },
    edit(id, change) {
      const node = nodes.get(id);
      const patch = typeof change === "function" ? change(node.node_data) : change;
      const data = { ...node.node_data, ...applyPatch(node.node_data, patch) };
      nodes.set(id, { ...node, node_data: Object.fromEntries(Object.entries(data).filter(([, value]) => value !== undefined)) });
    },
    move: (id, position) => void nodes.set(id, { ...nodes.get(id), position }),
    async remove(id, options) {
      log.push(["remove", id, options?.keepsRun === true]);
      nodes.delete(id);
    },
    restore: node => void nodes.set(node.id, node),
    generate: async () => log.push("generate"),
    cancel: async () => log.push("cancel"),
    retry: async () => log.push("retry"),
  };
  const actions = undoable({ ...store, now: id => nodes.get(id) });
  const look = () => [...nodes.values()].map(({ id, node_data, position }) =>
    [id, node_data.promptSpec?.basePrompt, node_data.promptSpec?.seed, node_data.source ?? null, position.x].join()).sort();
  return { actions, look, log, nodes };
}

/**
 * Makes room on a canvas whose server sends three rows at most. It has nine files, of two days ago but for the last, and each of
 * the first seven, but for those `unused`, is shown by a node; run 7 starts from file 7. `between` is called after each page.
 */
async function makeRoom({ kept = [], unused = 0, between = () => {}, fails } = {}) {
  const names = [..."012345678"];
  const tables = {
    workflow_nodes: names.slice(unused, 7).map(id => ({ id, path: `w/${id}` })),
    runs: names.map(id => ({ id, image: id === "7" ? "https://storage/w/7" : null })),
  };
  const ago = hours => new Date(now() - hours * 3_600_000).toISOString();
  let removed = [];
  const answer = ({ pathname, searchParams }, method, body) => {
    if (pathname.includes("/object/list/")) return names.map(name => ({ name, created_at: ago(name === "8" ? 0.5 : 48) }));
    if (pathname.includes("/object/sign/")) {
      const claims = { url: "é", exp: Math.floor(now() / 1000) + JSON.parse(body).expiresIn };
      return { signedURL: `${pathname}?token=a.${Buffer.from(JSON.stringify(claims)).toString("base64url")}.b` };
    }
    if (method === "DELETE") return (removed = JSON.parse(body).prefixes).map(name => ({ name }));
    const table = pathname.split("/").at(-1), last = searchParams.get("id")?.replace("gt.", "") ?? "";
    const from = Number(searchParams.get("offset") ?? 0);
    const page = tables[table].filter(({ id }) => id > last).slice(from, from + 3);
    between(tables);
    return page;
  };
  const fetch = async (address, { method, body }) => {
    const isBad = fails && String(address).includes(fails) && method !== "DELETE";
    return new Response(JSON.stringify(isBad ? { message: "no" } : answer(new URL(address), method, body)), { status: isBad ? 500 : 200 });
  };
  const supabase = createClient("http://localhost", "key", { auth: { persistSession: false }, global: { fetch } });
  const count = await removeUnused(supabase, "w", kept).catch(error => error.message);
  return [count, removed];
}

const at = x => ({ x, y: 0 });
const prompt = basePrompt => ({ promptSpec: { basePrompt } });

const scenarios = {
  async "every edit, back and forth"() {
    const { actions, look, log } = memory();
    const states = [look()];
    const step = async run => {
      run();
      await task();
      moved += 5_000;
      states.push(look());
    };
    await step(() => actions.add(prompt("A pier"), at(0)));
    await step(() => actions.add(prompt("A boat"), at(1)));
    await step(() => actions.edit("n2", { source: "n1" }));
    await step(() => actions.edit("n1", ({ promptSpec }) => ({ promptSpec: { basePrompt: `${promptSpec.basePrompt} at dusk`, seed: 7 } })));
    await step(() => [1, 2].forEach(each => actions.move(`n${each}`, at(10 * each))));
    await step(() => {
      actions.edit("n2", { source: null });
      void actions.remove("n1");
    });
    const back = [look()];
    while (actions.undo()) back.unshift(look());
    const forth = [look()];
    while (actions.redo()) forth.push(look());
    const changes = states.map(state => state.join(" ")), last = log.at(-1);
    return [states.length, back.map(each => each.join(" ")).join("|") === changes.join("|"),
      forth.map(each => each.join(" ")).join("|") === changes.join("|"), last, log.some(each => typeof each === "string")];
  },
  async "room for own pictures"() {
    const outcomes = [await makeRoom(), await makeRoom({ between: tables => tables.workflow_nodes.shift() })];
    moved += 7_200_000; // the clock of this computer, not the server's
    outcomes.push(await makeRoom());
    moved -= 7_200_000;
    outcomes.push(await makeRoom({ unused: 2 }), await makeRoom({ unused: 2, kept: ["w/1"] }));
    for (const fails of ["/list/", "/sign/", "/workflow_nodes", "/runs"]) outcomes.push(await makeRoom({ unused: 2, fails }));
    return outcomes;
  },
  async "own pictures that undo brings back"() {
    const { actions } = memory();
    const seen = [];
    const look = async () => {
      await task();
      seen.push(actions.uploads());
    };
    actions.add({ upload: { path: "w/1" } }, at(0));
    actions.add(prompt("A pier"), at(1));
    await look();
    void actions.remove("n1");
    void actions.remove("n2");
    await look();
    actions.undo();
    actions.undo(); // of the deletion, then of what was added
    await look();
    return seen;
  },
  async "typing"() {
    const { actions, look } = memory();
    actions.add(prompt(""), at(0));
    await task();
    for (const text of ["A", "A p", "A pier"]) {
      actions.edit("n1", prompt(text));
      await task();
      moved += 200;
    }
    moved += 5_000;
    actions.edit("n1", prompt("A pier at dusk"));
    await task();
    const seen = [look()];
    while (actions.undo()) seen.push(look());
    return seen.flat();
  },
  async "an edit after an undo"() {
    const { actions, look } = memory();
    actions.add(prompt("A pier"), at(0));
    await task();
    actions.move("n1", at(5));
    await task();
    actions.undo();
    actions.edit("n1", prompt("A boat"));
    await task();
    return [actions.redo(), look()];
  },
  async "a button that undoes"() {
    const { actions, look } = memory();
    actions.add(prompt("A pier"), at(0));
    await task();
    void actions.remove("n1");
    const step = actions.lastStep();
    await task();
    actions.add(prompt("A boat"), at(1));
    await task();
    actions.undoStep(step);
    actions.undoStep(step);
    const both = look();
    actions.undo();
    return [both, look(), [1, 2, 3].map(() => actions.redo())];
  },
  "copied and pasted"() {
    const node = (id, source) => ({
      id, position: at(3), workflow_id: "w", version: 1,
      node_data: {
        provider: "demo", model: "painter", source, status: "completed", runId: "job_1", imageUrl: "https://x.test/a.png",
        metadata: { webhookUrl: "https://x.test" }, promptSpec: { basePrompt: "A pier", seed: 7, quality: "hd", size: "512x512", styleModifiers: ["soft light"] },
      },
    });
    return fromText(toText([node("a", null), node("b", "a")]));
  },
  "what others have copied"() {
    const nodes = each => JSON.stringify({ format: "image-jobs/nodes", nodes: [each] });
    const attempt = text => {
      try {
        return fromText(text) ?? null;
      } catch (error) {
        return error.message;
      }
    };
    return [
      attempt("A pier at dusk"), attempt('{"nodes": []}'), attempt('{"format": "image-jobs/nodes", "nodes": [{"id"'),
      attempt(JSON.stringify({ format: "image-jobs/nodes", nodes: Array(201).fill({}) })),
      attempt(nodes({
        id: 7, position: { x: 1e300, y: "0" }, provider: ["demo"], model: { $ne: 1 }, source: 5, status: "completed", metadata: { a: 1 },
        imageUrl: "javascript:alert(1)", promptSpec: { basePrompt: 5, quality: "gold", seed: -1, previousImage: "http://10.0.0.1/", size: ["a"], styleModifiers: [1] },
      })),
      attempt(nodes(null)),
    ];
  },
  "the server's clock"() {
    const flowing = Date.now, still = Date.now();
    Date.now = () => still;
    const instant = ago => new Date(Date.now() - ago).toISOString();
    const off = clock => Math.round((clock.here(instant(0)) - Date.now()) / 1000);
    const right = new Clock(), ahead = new Clock(), behind = new Clock();
    right.hear(instant(3_600_000), false); // a row of an hour ago
    ahead.hear(instant(3_600_000), false);
    ahead.hear(instant(300_200), true); // this computer is five minutes ahead, and the message took a moment
    ahead.hear(instant(302_000), true);
    const requests = new Requests(undefined, undefined, ahead, () => {});
    const { saidAt } = requests.notes({ id: "a", node_data: { status: "pending", message: "Trying again in 9 s.", updatedAt: instant(300_200) } });
    behind.hear(instant(-120_000), false);
    const seen = [...[right, ahead, behind].map(off), Date.now() - saidAt];
    Date.now = flowing;
    return seen;
  },
  async "prices of many nodes"() {
    const asked = [];
    let changed;
    const change = new Promise(resolve => {
      changed = resolve;
    });
    const rpc = async (name, { processor, prompt_spec }) => {
      asked.push([name, processor, prompt_spec]);
      prices.watch(nodes); // rendered meanwhile
      return { data: processor === "demo:unknown" ? null : prompt_spec.quality === "hd" ? 0.4 : 0.05, error: null };
    };
    const prices = new Prices({ rpc }, changed);
    const node = (model, basePrompt, quality) => ({ node_data: { provider: "demo", model, promptSpec: { basePrompt, ...(quality && { quality }) } } });
    const nodes = Array.from({ length: 200 }, (_, each) => node("painter", `A pier ${each}`, each % 2 ? "hd" : undefined));
    nodes.push(node("unknown", "A boat"), { node_data: {} });
    const before = prices.cost(nodes[0]);
    prices.watch(nodes);
    prices.watch([...nodes, node("painter", "Typed later")]);
    await change;
    prices.watch(nodes);
    await new Promise(resolve => setTimeout(resolve, 300)); // longer than the pause before a request
    return [before ?? "asked for", asked.sort(), [0, 1, 200].map(each => prices.cost(nodes[each])), prices.cost(nodes[201]) ?? "no model"];
  },
};

const results = {};
for (const [name, run] of Object.entries(scenarios)) results[name] = await run();
console.log(JSON.stringify(results));
