/** The figures: what `image_jobs.dashboard` returns (sql/README.md lists the keys), looked at every two seconds. */
import { useCallback, useEffect, useRef, useState } from "react";

export type Period = "15m" | "1h" | "24h" | "7d";
export const PERIODS: Readonly<Record<Period, string>> = {
  "15m": "15 min",
  "1h": "1 hour",
  "24h": "24 hours",
  "7d": "7 days",
};

export type State = "open" | "paused" | "limited" | "blocked" | "unserved" | "budget" | "storage";

interface Counts {
  provider: string;
  delayed: number;
  running: number;
  parked: number;
  completed: number;
  failed: number;
  cancelled: number;
  oldest_wait: number | null;
  usd: number;
  per_minute: number | null;
  max_running: number | null;
  state: State;
  until: string | null;
  sentence: string | null;
}

export interface Provider extends Counts {
  pending: number;
}

export interface Model extends Counts {
  model: string;
  waiting: number;
  failure_share: number | null;
  generate_p50_ms: number | null;
  generate_p95_ms: number | null;
  possible_usd: number;
}

export interface Step {
  at: string;
  completed: number;
  failed: number;
  generate_p50_ms: number | null;
  generate_p95_ms: number | null;
  usd: number;
}

export interface FailureCode {
  code: string | null;
  count: number;
  last: string;
  providers: string[];
  example: string;
  error: string | null;
  hint: string | null;
}

export interface Failure {
  id: string;
  finished_at: string;
  processor: string;
  attempt: number;
  code: string | null;
  error: string | null;
  hint: string | null;
}

export interface Daemon {
  id: string;
  name: string;
  state: "alive" | "draining" | "silent";
  version: string;
  in_flight: number;
  slots: number;
  providers: string[];
  started_at: string;
  last_beat: number;
}

export interface Alert {
  name: string;
  subject: string;
  severity: "critical" | "warning";
  since: string;
  sentence: string;
  cure: string;
}

export interface Board {
  at: string;
  alerts: Alert[];
  totals: {
    waiting: number;
    delayed: number;
    oldest_wait: number | null;
    running: number;
    parked: number;
    slots: number;
    daemons: number;
    completed: number;
    failed: number;
    cancelled: number;
    usd: number;
    possible_usd: number;
    usd_today: number;
    possible_usd_today: number;
  };
  step: number;
  series: Step[];
  queue: Provider[];
  models: Model[];
  failures_by_code: FailureCode[];
  storage: { stored: number; failed: number; success_rate: number | null };
  base64_refused: number;
  webhooks: { provider: string; accepted: number; duplicates: number; refused: number; late: number }[];
  cancellations: { waiting: number; tried: number; oldest_wait: number | null };
  daemons: Daemon[];
  failures: Failure[];
}

/** What is wrong, in a sentence, and what to do about it. */
export class Problem extends Error {
  constructor(message: string, readonly hint: string, readonly final = false) {
    super(message);
  }
}

const EVERY = 2000;
/** A look that takes long is taken less often: at most a third of the time is spent in the database. */
const REST = 2;

/** The token of this start, from behind the # of the address; kept for this tab alone, and out of the address. */
const token = (() => {
  const given = location.hash.slice(1);
  if (given) {
    sessionStorage.setItem("dashboard-token", given);
    history.replaceState(null, "", location.pathname);
  }
  return given || sessionStorage.getItem("dashboard-token") || "";
})();

/** Ask the server; throws a `Problem`, or an AbortError. */
export async function ask<T>(path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  let response: Response;
  try {
    response = await fetch(`/dashboard/api/${path}`, {
      headers: { authorization: `Bearer ${token}`, ...(body === undefined ? {} : { "content-type": "application/json" }) },
      ...(body === undefined ? {} : { method: "POST", body: JSON.stringify(body) }),
      ...(signal ? { signal } : {}),
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem("The dashboard's server cannot be reached.", "Start image-jobs dashboard again, and open the address that it prints.");
  }
  const result: unknown = await response.json().catch(() => undefined);
  if (response.ok) return result as T;
  const said = (result ?? {}) as { message?: string; hint?: string };
  throw new Problem(said.message ?? `The dashboard's server has failed (${response.status}).`, said.hint ?? "", response.status === 401);
}

/** The figures of a period. One request is in flight; none while the page is hidden. What was seen last stays. */
export function useBoard(period: Period) {
  const [board, setBoard] = useState<Board>();
  const [problem, setProblem] = useState<Problem>();
  const [shown, setShown] = useState(period);
  const lookNow = useRef(() => {});

  useEffect(() => {
    let timer: number | undefined;
    let flight: AbortController | undefined;
    let ended = false;
    const look = async () => {
      clearTimeout(timer);
      if (flight || ended || document.hidden) return;
      flight = new AbortController();
      const began = performance.now();
      let final = false;
      try {
        const next = await ask<Board>(`board?period=${period}`, undefined, flight.signal);
        setBoard(next);
        setShown(period);
        setProblem(undefined);
      } catch (error) {
        if (ended) return;
        if (error instanceof Problem) {
          final = error.final;
          setProblem(error);
        }
      }
      flight = undefined;
      if (!final) timer = setTimeout(look, Math.max(EVERY, REST * (performance.now() - began)));
    };
    const onVisibility = () => { if (!document.hidden) void look(); };
    lookNow.current = () => void look();
    document.addEventListener("visibilitychange", onVisibility);
    void look();
    return () => {
      ended = true;
      clearTimeout(timer);
      flight?.abort();
      document.removeEventListener("visibilitychange", onVisibility);
    };
  }, [period]);

  const refresh = useCallback(() => lookNow.current(), []);
  return { board, problem, shown, refresh };
}
