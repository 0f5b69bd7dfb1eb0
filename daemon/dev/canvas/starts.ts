/** Starts runs: at once, or once the picture of a source is there. Copy this file with workflow.ts, which calls it. */
import type { Json } from "./database.types";
import { Kept, toJson } from "./kept";
import type { StartRequest } from "./kept";
import type { Requests } from "./requests";
import { UNIQUE_VIOLATION, isAway, toProblem } from "./failures";
import type { Failure } from "./failures";
import { isUnfinished, isWaiting } from "./nodes";
import type { Problem, WorkflowNode } from "./nodes";
import { sourceAddress } from "./pictures";
import type { Store } from "./store";
import type { Writes } from "./writes";

export class Starts {
  readonly #store: Store;
  readonly #writes: Writes;
  readonly #requests: Requests;
  /** What could not be sent. */
  readonly kept = new Kept();
  /** Calls of `start_image_job` in flight, by node. */
  #starting = new Map<string, Promise<boolean>>();
  /** Pending run ids that this window is inserting. */
  #submitting = new Set<string>();

  constructor(store: Store, writes: Writes, requests: Requests) {
    this.#store = store;
    this.#writes = writes;
    this.#requests = requests;
  }

  /** Returns whether the run was started. Concurrent calls for a node share one request. */
  generate(id: string): Promise<boolean> {
    const start = this.#starting.get(id) ?? this.#start(id).finally(() => this.#starting.delete(id));
    this.#starting.set(id, start);
    return start;
  }

  async #start(id: string): Promise<boolean> {
    const node = this.#store.nodes.get(id);
    if (!node) return false;
    if (isUnfinished(node)) return true; // pressed again before that was rendered: a picture is paid for once
    const { provider, model, promptSpec, source, metadata } = node.node_data;
    const sourceNode = source ? this.#store.nodes.get(source) : undefined;
    const previousImage = sourceNode && this.#pictureOf(sourceNode);
    if (sourceNode?.node_data.upload && !previousImage) {
      this.#store.tell(notUploaded(sourceNode.node_data.upload.name, id));
      return false;
    }
    if (sourceNode && !previousImage) return this.#generateAfter(id, sourceNode);
    const request: StartRequest = {
      nodeId: id,
      workflowId: this.#store.id,
      provider,
      model,
      promptSpec: { basePrompt: "", ...promptSpec, ...(previousImage && { previousImage }) },
      metadata,
    };
    this.kept.keep(request); // until it is known to have arrived
    const outcome = await this.#send(request);
    if (outcome !== "away") this.kept.drop(id);
    this.#store.render();
    if (outcome === "started") await this.#refresh(id);
    return outcome !== "refused";
  }

  /** Whether the node's request waits for the server. */
  isKept(id: string): boolean {
    return this.kept.has(id) && (!this.#starting.has(id) || this.#store.connection() === "away");
  }

  /** Sends what could not be sent before. Returns whether there was any. */
  async sendKept(): Promise<boolean> {
    if (this.kept.size === 0) return false;
    await this.kept.send(async request => (await this.#send(request)) === "away");
    this.#store.render();
    return true;
  }

  async #send(request: StartRequest): Promise<"started" | "refused" | "away"> {
    await this.#writes.write(request.nodeId);
    const version = this.#store.nodes.row(request.nodeId)?.version;
    // Of a node that has not changed meanwhile, two windows of a user ask for the same picture: whoever is second gets that run.
    if (version && !this.#store.nodes.pendingEdit(request.nodeId)) request.idempotencyKey ??= `${request.nodeId} ${version}`;
    request.idempotencyKey ??= crypto.randomUUID();
    const { data, error, status } = await this.#store.supabase.rpc("start_image_job", { request: toJson(request) });
    // A 500 with a code is the database's own: it would come again.
    if (error && isAway({ error, status }) && !(error.code && status === 500)) return "away";
    if (error) {
      this.#store.tell(toProblem({ error, status }, request.nodeId));
      return "refused";
    }
    const { jobId, status: state } = data as { jobId: string; status: string };
    const { provider, model, promptSpec } = request;
    // Message and fetch may both be lost: what looks idle would be pressed, and paid for, again.
    if (state === "pending") this.#store.nodes.showStarted(request.nodeId, jobId, version);
    this.#requests.note(jobId, { processor: `${provider}:${model}`, promptSpec });
    return "started";
  }

  /** Returns the address of the picture to start from. */
  #pictureOf({ node_data: { imageUrl, upload } }: WorkflowNode): string | undefined {
    return upload ? sourceAddress(this.#store.supabase, upload) : imageUrl;
  }

  /** Makes the source's image first. Optimistic, and written only once the source has a run: no row waits in vain. */
  async #generateAfter(id: string, sourceNode: WorkflowNode): Promise<boolean> {
    this.#writes.edit(id, { input: { pendingRunId: `job_${Date.now()}_${crypto.randomUUID()}` } });
    const started = isUnfinished(sourceNode) || isWaiting(sourceNode) || this.kept.has(sourceNode.id) || (await this.generate(sourceNode.id));
    if (started) await this.#store.fetch([sourceNode.id]);
    else this.#writes.edit(id, { input: { pendingRunId: null } });
    await this.#writes.write(id);
    return started;
  }

  /**
   * Starts the pending runs whose source image is there by now, and clears those whose source will never have one. The
   * run's id is in the row: it outlives the window, and of several windows that insert it only one succeeds.
   *
   * Without `fetched`, the rows may be behind: a source that seems idle may have a run by now.
   */
  startPendingRuns(fetched = false): void {
    for (const { id, version, node_data: { pendingRunId, source } } of this.#store.nodes.rows()) {
      if (!pendingRunId || this.#submitting.has(pendingRunId) || (source && this.kept.has(source))) continue;
      if (this.#store.nodes.get(id)?.node_data.pendingRunId !== pendingRunId) continue;
      const sourceNode = source ? this.#store.nodes.row(source) : undefined;
      const imageUrl = sourceNode && this.#pictureOf(sourceNode);
      const current = fetched || !source || this.#store.nodes.isDeleted(source) || (sourceNode && sourceNode.version > version);
      if (sourceNode && imageUrl && !isUnfinished(sourceNode)) void this.#startPendingRun(id, pendingRunId, imageUrl);
      else if (sourceNode && (isUnfinished(sourceNode) || sourceNode.node_data.pendingRunId)) continue;
      else if (current) this.#clearPendingRun(id);
      else void this.#store.load();
    }
  }

  async #startPendingRun(id: string, pendingRunId: string, previousImage: string): Promise<void> {
    this.#submitting.add(pendingRunId);
    await this.#writes.write(id);
    const node = this.#store.nodes.get(id);
    if (node?.node_data.pendingRunId !== pendingRunId) return;
    const { provider, model, promptSpec, metadata } = node.node_data;
    const { error, status } = await this.#store.supabase.from("runs").insert({
      id: pendingRunId, kind: "image_gen", subject_id: this.#store.id, status: "pending", processor: `${provider}:${model}`,
      metadata: { ...metadata, nodeId: id, promptSpec: { ...promptSpec, previousImage } } as Json,
    });
    if (error && status === 401) this.#store.refuse(toProblem({ error, status }));
    if (error && (status === 401 || isAway({ error, status }))) {
      this.#submitting.delete(pendingRunId); // retried with the next load
      return;
    }
    if (error && error.code !== UNIQUE_VIOLATION) this.#store.tell(toProblem({ error, status }, id));
    this.#clearPendingRun(id);
    if (this.#store.connection() !== "live") void this.#store.load();
  }

  #clearPendingRun(id: string): void {
    this.#writes.edit(id, { input: { pendingRunId: null } });
    void this.#writes.write(id);
  }

  async cancel(id: string): Promise<void> {
    const node = this.#store.nodes.get(id);
    if (node?.node_data.pendingRunId) this.#clearPendingRun(id);
    if (this.kept.drop(id)) this.#store.render();
    const run_id = node?.node_data.runId;
    if (node && run_id && isUnfinished(node)) await this.#call(id, () => this.#store.supabase.rpc("cancel_run", { run_id }));
  }

  async retry(id: string): Promise<void> {
    const run_id = this.#store.nodes.get(id)?.node_data.runId;
    if (run_id) await this.#call(id, () => this.#store.supabase.rpc("requeue_run", { run_id }));
  }

  /** Shows a run on its node, whose id is `id`, again. Returns whether it succeeded. */
  async show(id: string, run_id: string): Promise<boolean> {
    const { error, status } = await this.#store.supabase.rpc("show_run", { run_id });
    if (error) this.#store.tell(toProblem({ error, status }));
    else await this.#refresh(id);
    return !error;
  }

  /** Fetches what a call has made of a node: the message that tells it may be late, or lost. */
  async #refresh(id: string): Promise<void> {
    await (this.#store.connection() === "live" ? this.#store.fetch([id]) : this.#store.load());
  }

  /** Writes the node, then calls a function of the database. Returns whether it succeeded. */
  async #call(id: string, rpc: () => PromiseLike<{ error: Failure["error"] | null; status: number }>): Promise<boolean> {
    await this.#writes.write(id);
    const { error, status } = await rpc();
    if (error) this.#store.tell(toProblem({ error, status }, id));
    else await this.#refresh(id);
    return !error;
  }
}

function notUploaded(name: string, nodeId: string): Problem {
  return { nodeId, message: `${name} is not uploaded.`, hint: "Wait until it is, or add the picture again and connect it." };
}
