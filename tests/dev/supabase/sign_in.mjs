// Signs in and out by supabase-js: prints its results, as test_auth_clients.py does by supabase-py.
// SUPABASE_JS is a directory whose node_modules has it.
import { createRequire } from "node:module";

const { URL, KEY, WORKFLOW, SUPABASE_JS } = process.env;
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");

const results = [];
const record = (what, value) => results.push([what, value]);
const failed = ({ error }) => [error?.code, error?.message];
const options = { auth: { persistSession: false, autoRefreshToken: false } };
const email = "Fox@example.com";

const supabase = createClient(URL, KEY, options);
const { data: { user, session } } = await supabase.auth.signInAnonymously({ options: { data: { name: "fox" } } });
record("anonymous", [user.is_anonymous, user.role, user.email, user.user_metadata, session.token_type]);
const node = { id: "n1", workflow_id: WORKFLOW, node_type: "image", node_data: {} };
record("node", (await supabase.from("workflow_nodes").insert(node).select("id").single()).data);
const refreshed = (await supabase.auth.refreshSession()).data;
record("refreshed", [refreshed.user.id === user.id, refreshed.session.refresh_token !== session.refresh_token]);
record("verified", (await supabase.auth.getUser()).data.user.id === user.id);

const bare = await supabase.auth.updateUser({ password: "secret1" });
record("no address", failed(bare));
const permanent = await supabase.auth.updateUser({ email, password: "secret1", data: { name: null, age: 2 } });
const now = permanent.data.user;
record("permanent", [now.id === user.id, now.is_anonymous, now.email, now.app_metadata.provider, now.user_metadata.age]);
record("identity", [now.identities.length, now.identities[0].provider, now.identities[0].identity_data.email]);
record("same password", failed(await supabase.auth.updateUser({ password: "secret1" })));
record("signed out", (await supabase.auth.signOut()).error);
record("closed", (await supabase.from("workflow_nodes").select("id")).error.code);

record("wrong", failed(await supabase.auth.signInWithPassword({ email, password: "secret2" })));
const again = await supabase.auth.signInWithPassword({ email, password: "secret1" });
record("again", again.data.user.id === user.id);
record("its node", (await supabase.from("workflow_nodes").select("id")).data);

const other = createClient(URL, KEY, options);
record("taken", failed(await other.auth.signUp({ email, password: "secret1" })));
record("weak", failed(await other.auth.signUp({ email: "owl@example.com", password: "short" })));
record("no e-mail", failed(await other.auth.signUp({ email: "owl", password: "secret1" })));
record("up", (await other.auth.signUp({ email: "owl@example.com", password: "secret1" })).data.session !== null);
record("mail", failed(await other.auth.signInWithOtp({ email }))[1]);
console.log(JSON.stringify(results));
process.exit(0);
