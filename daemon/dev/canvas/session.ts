/** Who we are: `image-jobs dev` has no sign-in, and hands a session to its own page. An application has its own way. */
import { createClient } from "@supabase/supabase-js";
import type { SupabaseClient } from "@supabase/supabase-js";

interface Session {
  url: string;
  anonKey: string;
  accessToken: string;
  /** Seconds. */
  expiresIn: number;
  workflowId: string;
}

/** `?as=<uuid>` is somebody else, to see what strangers see. */
async function ask(): Promise<Session> {
  const answer = await fetch(`canvas/session${location.search}`, { method: "POST" });
  if (!answer.ok) throw new Error(((await answer.json()) as { message: string }).message);
  return (await answer.json()) as Session;
}

/** A signed-in client, and the workflow that this data directory begins with. */
export async function signIn(): Promise<{ supabase: SupabaseClient; workflowId: string }> {
  let session = await ask();
  const expiry = () => Date.now() + (session.expiresIn - 60) * 1000;
  let expires = expiry();
  const supabase = createClient(session.url, session.anonKey, {
    accessToken: async () => {
      if (Date.now() > expires) {
        session = await ask();
        expires = expiry();
      }
      return session.accessToken;
    },
  });
  return { supabase, workflowId: session.workflowId };
}
