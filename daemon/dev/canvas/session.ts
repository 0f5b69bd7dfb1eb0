/** The session: `image-jobs dev` gives one to its own page, without sign-in. An application signs in by itself. */
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

/** With `?as=<uuid>` in the address, the session is another user's. */
async function fetchSession(): Promise<Session> {
  const response = await fetch(`canvas/session${location.search}`, { method: "POST" });
  if (!response.ok) throw new Error(((await response.json()) as { message: string }).message);
  return (await response.json()) as Session;
}

/** Signs in: returns a client that renews its token, and the first workflow of this data directory. */
export async function signIn(): Promise<{ supabase: SupabaseClient; workflowId: string }> {
  let session = await fetchSession();
  const expiry = () => Date.now() + (session.expiresIn - 60) * 1000;
  let expires = expiry();
  const supabase = createClient(session.url, session.anonKey, {
    accessToken: async () => {
      if (Date.now() > expires) {
        session = await fetchSession();
        expires = expiry();
      }
      return session.accessToken;
    },
  });
  return { supabase, workflowId: session.workflowId };
}
