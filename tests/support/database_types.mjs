// Prints the TypeScript types of the schema `public` of a database: DATABASE_URL, and PACKAGES, where npm put the
// generator that `supabase gen types` runs on.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.env.PACKAGES}/`);
const load = async name => import(pathToFileURL(require.resolve(name)).href);
const { introspect } = await load("@supabase/postgrest-typegen/introspection");
const { generateTypescript, sortGeneratorMetadata } = await load("@supabase/postgrest-typegen/generation");
const { default: pg } = await load("pg");

const client = new pg.Client(process.env.DATABASE_URL);
await client.connect();
const metadata = await introspect(client, { includedSchemas: ["public"] });
await client.end();
process.stdout.write(await generateTypescript(sortGeneratorMetadata(metadata), { postgrestVersion: "14.5" }));
