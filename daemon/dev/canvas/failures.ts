/** Failures of requests: which may succeed later, and what is said of the others. Copy this file with workflow.ts. */
import type { Problem } from "./nodes";

export const UNIQUE_VIOLATION = "23505";
/** The database refuses more runs; a gateway's 429 has no code. */
const USAGE_LIMIT = "PT429";

/** An error of supabase-js with the status of its response; 0 without one. */
export interface Failure {
  status: number;
  error: { code: string; message: string; hint: string | null };
}

export const NO_MEMBER: Problem = { message: "You are not a member of this workflow.", hint: "Ask a member for a link." };

export const SIGNED_OUT: Problem = { message: "You are signed out.", hint: "Sign in to see this workflow." };

/** What a gateway answers without a code of the database, for example for a wrong key. */
function isForbidden(status: number): boolean {
  return status === 401 || status === 403;
}

/** Whether the same request may succeed later: there was no response, or the server is in trouble. */
export function isAway({ error: { code }, status }: Failure): boolean {
  if (code === USAGE_LIMIT) return false;
  return (!code && !isForbidden(status)) || status >= 500 || status === 429 || status === 408;
}

export function toProblem(failure: Failure, nodeId?: string): Problem {
  const node = nodeId === undefined ? {} : { nodeId };
  const { status, error: { code, message, hint } } = failure;
  if (code && status === 401) return { ...SIGNED_OUT, ...node };
  if (code || isForbidden(status)) return { ...node, message, ...(hint && { hint }) };
  return { ...node, message: "The server cannot be reached.", hint: "Try again when the connection is back." };
}
