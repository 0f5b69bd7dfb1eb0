// A channel by supabase-js that outlives the tokens it has had: prints its states, and the node that it is told last.
import { createRequire } from "node:module";

const { URL, KEY, WORKFLOW, SUPABASE_JS } = process.env;
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");

const options = { auth: { persistSession: false, autoRefreshToken: false } };
const states = [];
const follow = (client, onState) =>
  client.channel(`workflow:${WORKFLOW}`, { config: { private: true } }).on("broadcast", { event: "nodes_changed" }, receive).subscribe(onState);
let receive = () => {};
const received = new Promise((resolve) => {
  receive = ({ payload }) => payload.nodes.forEach((each) => each.id === "n2" && resolve(each.id));
});

const supabase = createClient(URL, KEY, options);
await supabase.auth.signInAnonymously();
const node = (id) => supabase.from("workflow_nodes").insert({ id, workflow_id: WORKFLOW, node_type: "image", node_data: {} });
await node("n1");
await new Promise((resolve) => follow(supabase, (state) => { states.push(state); resolve(); }));
for (let tokens = 0; tokens < 2; tokens += 1) {
  // A client that never renews is told when the token has expired.
  const { data: { session } } = await supabase.auth.refreshSession();
  const stale = createClient(URL, KEY, { ...options, accessToken: async () => session.access_token });
  await stale.realtime.setAuth();
  const closed = new Promise((resolve) => follow(stale, (state) => state === "CLOSED" && resolve()));
  const channel = supabase.getChannels()[0];
  const renew = setInterval(() => supabase.auth.refreshSession(), 500);
  await closed;
  clearInterval(renew);
  if (channel.state !== "joined") states.push(channel.state);
  stale.realtime.disconnect();
}
await node("n2");
console.log(JSON.stringify([states, await received]));
process.exit(0);
