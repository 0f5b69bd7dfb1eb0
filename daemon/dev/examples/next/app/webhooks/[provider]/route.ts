import { createClient } from "@supabase/supabase-js";
import type { Database } from "../../image-jobs/database.types";

/** The door for webhooks of providers where the gateway does not take them: hands them to the database as they came. */
export async function POST(request: Request, { params }: { params: Promise<{ provider: string }> }) {
  // Made here: `next build` runs this module, and needs no secret so.
  const supabase = createClient<Database>(process.env.SUPABASE_URL!, process.env.SUPABASE_SERVICE_ROLE_KEY!);
  const { data, error, status } = await supabase.rpc("receive_webhook", {
    provider: (await params).provider,
    headers: Object.fromEntries(request.headers),
    body: await request.text(),
  });
  return Response.json(data ?? { message: error?.message }, { status });
}
