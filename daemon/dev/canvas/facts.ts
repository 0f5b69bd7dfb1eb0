/** What is told of a completed run: size, cost, and how long each leg of its way took. */
import type { PastRun } from "./history";
import { formatTime } from "./PastRuns";

const LEGS = [["queuedMs", "in line"], ["generateMs", "drawing"], ["storeMs", "storing"], ["settleMs", "saving"]] as const;

export function factsOf({ finishedAt, promptSpec, payload: { model, width, height, contentType, bytes, cost, seed } }: PastRun): string[] {
  const facts = [
    formatTime(finishedAt),
    model,
    width && `${width} × ${height}`,
    contentType?.replace("image/", "").toUpperCase(),
    bytes && formatBytes(bytes),
    cost === 0 ? "free" : cost ? `$${cost.toFixed(cost < 0.1 ? 4 : 2)}` : "cost unknown",
    (seed ?? promptSpec.seed) !== undefined && `seed ${seed ?? promptSpec.seed}`,
  ];
  return facts.filter(fact => typeof fact === "string" && fact !== "") as string[];
}

/** "9.7 s", and of what it is made up. */
export function timesOf({ payload: { timings = {} } }: PastRun): string[] {
  const known = LEGS.flatMap(([key, name]) => (timings[key] === undefined ? [] : [[timings[key], name] as const]));
  if (known.length === 0) return [];
  const total = known.reduce((sum, [ms]) => sum + ms, 0);
  return [`${formatSeconds(total)} in all`, ...known.map(([ms, name]) => `${formatSeconds(ms)} ${name}`)];
}

function formatSeconds(ms: number): string {
  return `${(ms / 1000).toFixed(ms < 99_950 ? 1 : 0)} s`;
}

function formatBytes(bytes: number): string {
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
