/** What an operator may do, as the server takes it; and how each is asked, confirmed and reported. */
import { count, plural } from "./format";
import type { Period } from "./board";

export interface Lane {
  provider: string;
  model?: string | undefined;
}

export type Operation =
  | { kind: "requeue"; code: string | null; period: Period }
  | { kind: "requeue_run"; run: string }
  | { kind: "cancel"; state: "pending" | "running"; provider?: string; model?: string; code?: string }
  | { kind: "pause" | "open"; provider: string; model?: string }
  | { kind: "limit"; provider: string; model?: string; per_minute: number | null; max_running: number | null };

export interface Preview {
  runs: number;
  bounds: unknown;
  per_minute: number | null;
  max_running: number | null;
}

interface Wording {
  title: string;
  /** What will happen, with the number of runs. */
  sentence: string;
  button: string;
  /** Whether it changes runs: then there has to be one. */
  runs: boolean;
  /** Whether it cannot be taken back. */
  final?: boolean;
  done: (changed: number) => string;
}

export const nameOf = ({ provider, model }: { provider?: string | undefined; model?: string | undefined }) =>
  `${provider === "?" ? "unknown providers" : provider ?? "all providers"}${model ? `:${model}` : ""}`;

export function wording(operation: Operation, found: number): Wording {
  switch (operation.kind) {
    case "requeue":
      return {
        title: `Requeue what failed with ${operation.code ?? "no code"}`,
        sentence: `${plural(found, "run goes", "runs go")} back in line with all attempts, and may cost as much again.`,
        button: `Requeue ${plural(found, "run")}`,
        runs: true,
        done: changed => `${plural(changed, "run is", "runs are")} in line again.`,
      };
    case "requeue_run":
      return {
        title: `Requeue ${operation.run}`,
        sentence: `${plural(found, "run goes", "runs go")} back in line with all attempts, and may cost as much again.`,
        button: `Requeue ${plural(found, "run")}`,
        runs: true,
        done: changed => `${plural(changed, "run is", "runs are")} in line again.`,
      };
    case "cancel": {
      const where = operation.code ? `waits after ${operation.code}` : operation.state === "pending" ? `waits for ${nameOf(operation)}` : `${nameOf(operation)} makes`;
      return {
        title: `Cancel what ${where}`,
        sentence: `${plural(found, "run ends", "runs end")} as cancelled, and can be requeued one by one.${operation.state === "running" ? " What has begun may be charged." : ""}`,
        button: `Cancel ${plural(found, "run")}`,
        runs: true,
        final: true,
        done: changed => `${plural(changed, "run was", "runs were")} cancelled.`,
      };
    }
    case "pause":
      return {
        title: `Pause ${nameOf(operation)}`,
        sentence: `Nothing new is started there; ${plural(found, "run goes", "runs go")} on waiting. What runs goes on.`,
        button: found > 0 ? `Pause, ${count(found)} ${found === 1 ? "waits" : "wait"}` : "Pause",
        runs: false,
        done: () => `${nameOf(operation)} is paused.`,
      };
    case "open":
      return {
        title: `Open ${nameOf(operation)}`,
        sentence: `${plural(found, "run that waits", "runs that wait")} may start at once.${operation.model ? "" : " Pauses and blocks of its models end, too."}`,
        button: found > 0 ? `Open for ${plural(found, "run")}` : "Open",
        runs: false,
        done: () => `${nameOf(operation)} is open.`,
      };
    case "limit":
      return {
        title: `Limit ${nameOf(operation)}`,
        sentence: `It holds for all daemons together, from the next start on: ${plural(found, "run waits", "runs wait")} there.`,
        button: "Change the limit",
        runs: false,
        done: () => `The limit of ${nameOf(operation)} is changed.`,
      };
  }
}
