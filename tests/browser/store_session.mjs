// The store without a framework, through a user's session: prints what its subscribers and its problem listeners got.
// SUPABASE_JS is a directory whose node_modules has supabase-js; CANVAS holds workflow.ts, whose types Node strips.
import { registerHooks, createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { URL: url, KEY, SUPABASE_JS, CANVAS } = process.env;
const here = String(pathToFileURL(CANVAS));
registerHooks({
  resolve: (name, context, next) => next(context.parentURL?.startsWith(here) ? `${name}.ts` : name, context),
});
const { Workflow } = await import(pathToFileURL(`${CANVAS}/workflow.ts`));
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");

let requests = 0;
const counted = (...all) => {
  if (String(all[0]).includes("/rest/v1/workflow_nodes")) requests += 1;
  return fetch(...all);
};
const supabase = createClient(url, KEY, { auth: { persistSession: false }, global: { fetch: counted } });
const workflow = new Workflow(supabase, crypto.randomUUID());
const problems = [];
workflow.onProblem(({ message }) => problems.push(message));
let look = () => {};
const unsubscribe = workflow.subscribe(snapshot => look(snapshot));
const until = wanted => new Promise(resolve => {
  look = snapshot => wanted(snapshot) && resolve(snapshot);
  look(workflow.snapshot());
});
const brief = ({ nodes, isLoading, error }) => [nodes.length, isLoading, error?.message ?? null];
const results = [["at first", brief(workflow.snapshot())]];

results.push(["signed out", brief(await until(({ error }) => error)), requests]);
await supabase.auth.signInAnonymously();
results.push(["signed in", brief(await until(({ error, isLoading }) => !error && !isLoading))]);

const { add, edit } = workflow; // functions that may be taken apart
const id = add({ provider: "demo", model: "painter", promptSpec: { basePrompt: "A pier", seed: 0 } }, { x: 0, y: 0 });
for (let time = 0; time < 3; time++) edit(id, ({ promptSpec }) => ({ promptSpec: { seed: promptSpec.seed + 1 } }));
const saved = await until(({ nodes, unsent, connection }) => nodes.length === 1 && unsent === 0 && connection === "live");
results.push(["edits", saved.nodes[0].node_data.promptSpec]);

const token = await workflow.share();
results.push(["share", typeof token]);
await workflow.leave();
results.push(["the last member cannot leave", problems.at(-1), workflow.snapshot().nodes.length]);

await supabase.auth.signOut();
results.push(["after signing out", brief(await until(({ nodes }) => nodes.length === 0))]);
await supabase.auth.signInAnonymously();
results.push(["another user", brief(await until(({ error, isLoading }) => !error && !isLoading))]);
results.push(["problems", problems]);
unsubscribe();
await supabase.removeAllChannels();
supabase.auth.stopAutoRefresh();
console.log(JSON.stringify(results));
process.exit();
