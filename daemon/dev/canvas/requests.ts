/**
 * What runs were asked for, and since when they are where they are: of a failed run the request, to tell whether it is still
 * what the node says; of a run under way its start. Copy this file with workflow.ts, which asks it.
 *
 * What this window has asked for, and what it has seen begin, is known; the rest is fetched, one request for all.
 */
import type { SupabaseClient } from "@supabase/supabase-js";
import type { NodeCache } from "./cache";
import type { Clock } from "./clock";
import type { Database } from "./database.types";
import { sourceAddress } from "./pictures";
import type { NodeNotes, PromptSpec, WorkflowNode } from "./nodes";

const MAX_IDS = 100;

interface Request {
  processor: string;
  promptSpec: PromptSpec;
  startedAt?: string | null;
}

/** Since when a node is pending or running, by the server's clock. */
interface Stage {
  runId: string | undefined;
  status: string | undefined;
  since: string | undefined;
}

export class Requests {
  readonly #supabase: SupabaseClient<Database>;
  readonly #nodes: NodeCache;
  readonly #clock: Clock;
  readonly #onChange: () => void;
  /** By run id. */
  #requests = new Map<string, Request>();
  #stages = new Map<string, Stage>();
  /** Asked for, and not there: not asked again before `resume`. */
  #asked = new Set<string>();
  #isAsking = false;
  /** Grows with `clear`: what was asked for before is another user's. */
  #era = 0;

  constructor(supabase: SupabaseClient<Database>, nodes: NodeCache, clock: Clock, onChange: () => void) {
    this.#supabase = supabase;
    this.#nodes = nodes;
    this.#clock = clock;
    this.#onChange = onChange;
  }

  /** Keeps a request that this window has sent. */
  note(runId: string, request: Request): void {
    this.#requests.set(runId, request);
  }

  /** Whether the node's run has failed at what the node says now; undefined while that is not known. */
  isUnchanged({ node_data: { runId, provider, model, promptSpec, source } }: WorkflowNode): boolean | undefined {
    const request = this.#requests.get(runId ?? "");
    if (!request) return undefined;
    const { upload, imageUrl } = (source ? this.#nodes.row(source)?.node_data : undefined) ?? {};
    const previousImage = upload ? sourceAddress(this.#supabase, upload) : imageUrl;
    return request.processor === `${provider}:${model}`
      && canonical(request.promptSpec) === canonical({ ...promptSpec, previousImage } as PromptSpec);
  }

  /** Returns what is to be said of a node's run. */
  notes(node: WorkflowNode): NodeNotes {
    const { status, runId, promptSpec, message, updatedAt } = node.node_data;
    const request = this.#requests.get(runId ?? "");
    if (status === "error" && request) {
      const isSame = this.isUnchanged(node);
      const isOtherPrompt = request.promptSpec.basePrompt !== promptSpec?.basePrompt;
      return { asked: isSame ? "same" : "other", ...(isOtherPrompt && { askedPrompt: request.promptSpec.basePrompt }) };
    }
    const stage = this.#stages.get(node.id);
    const since = stage?.since ?? (status === "running" ? request?.startedAt : undefined);
    return {
      ...(since && (status === "pending" || status === "running") && { since: this.#clock.here(since) }),
      ...(status === "pending" && message && updatedAt && { saidAt: this.#clock.here(updatedAt) }),
    };
  }

  /** Takes note of the rows that are shown. */
  watch(rows: readonly WorkflowNode[]): void {
    const due = new Set<string>();
    const stages = new Map<string, Stage>();
    for (const { id, node_data: { status, runId, updatedAt } } of rows) {
      if (!runId) continue;
      const before = this.#stages.get(id);
      const isSame = before?.runId === runId && before.status === status;
      // At first sight a run may have been under way for long, and updatedAt is that of its last message.
      const isSeen = status === "pending" || (before !== undefined && !isSame);
      const stage = isSame ? before : { runId, status, since: isSeen ? updatedAt : undefined };
      stages.set(id, stage);
      const request = this.#requests.get(runId);
      const isWanted = status === "error" ? !request
        : status === "running" && stage.since === undefined && request?.startedAt === undefined;
      if (isWanted && !this.#asked.has(runId)) due.add(runId);
    }
    this.#stages = stages;
    if (due.size > 0 && !this.#isAsking) void this.#fetch([...due].slice(0, MAX_IDS));
  }

  /** Asks again for what did not come. */
  resume(): void {
    this.#asked.clear();
  }

  /** Forgets what was another user's. */
  clear(): void {
    this.#era += 1;
    this.#isAsking = false;
    for (const each of [this.#requests, this.#stages, this.#asked]) each.clear();
  }

  async #fetch(ids: string[]): Promise<void> {
    const era = this.#era;
    this.#isAsking = true;
    ids.forEach(id => this.#asked.add(id));
    const { data } = await this.#supabase.from("runs").select("id,processor,started_at,metadata").in("id", ids);
    if (era !== this.#era) return;
    this.#isAsking = false;
    for (const { id, processor, started_at, metadata } of data ?? []) {
      const { promptSpec = { basePrompt: "" } } = (metadata ?? {}) as unknown as { promptSpec?: PromptSpec };
      this.#requests.set(id, { processor: processor ?? "", promptSpec, startedAt: started_at });
    }
    this.#onChange(); // which watches the rest, if there were too many for a request
  }
}

/** Returns a prompt spec as text that is equal for equal pictures. */
function canonical(spec: PromptSpec): string {
  const { previousImage, ...rest } = spec;
  const keys = Object.entries(rest).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const [source] = (previousImage ?? "").split("?");
  return JSON.stringify([source, ...keys.sort(([one], [other]) => (one < other ? -1 : 1))]);
}
