// Signs further pictures of a run as the canvas README has clients do it: prints the status of each picture of the bucket, by user.
// SUPABASE_JS is a directory whose node_modules has supabase-js; SIGN is the README's code, whose types Node strips.
import { createRequire } from "node:module";

const { SUPABASE_JS, SIGN, URL, KEY, TOKENS, PATHS } = process.env;
const { createClient } = createRequire(`${SUPABASE_JS}/`)("@supabase/supabase-js");
const { sign } = await import(SIGN);
const paths = JSON.parse(PATHS);

async function statuses(token) {
  const supabase = createClient(URL, KEY, { accessToken: async () => token });
  const signed = await sign(supabase, paths);
  return Promise.all(paths.map(async path => (signed.has(path) ? (await fetch(signed.get(path))).status : null)));
}

console.log(JSON.stringify(await Promise.all(JSON.parse(TOKENS).map(statuses))));
