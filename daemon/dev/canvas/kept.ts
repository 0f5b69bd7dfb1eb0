/** Requests for pictures that could not be sent: they are sent once, when the server is back. Copy this file with workflow.ts. */
import type { Json } from "./database.types";
import type { PromptSpec } from "./nodes";

/** What start_image_job takes. Its idempotencyKey, which it has once it is sent, makes one picture of it, also if it was received before. */
export interface StartRequest {
  nodeId: string;
  workflowId: string;
  provider: string | undefined;
  model: string | undefined;
  promptSpec: PromptSpec;
  metadata: Record<string, unknown> | undefined;
  idempotencyKey?: string;
}

export class Kept {
  /** One a node: pressed again, it is the same wish. */
  #requests = new Map<string, StartRequest>();
  #isSending = false;

  get size(): number {
    return this.#requests.size;
  }

  has(nodeId: string): boolean {
    return this.#requests.has(nodeId);
  }

  keep(request: StartRequest): void {
    this.#requests.set(request.nodeId, request);
  }

  /** Takes a request back. Returns whether there was one. */
  drop(nodeId: string): boolean {
    return this.#requests.delete(nodeId);
  }

  clear(): void {
    this.#requests.clear();
  }

  /** Sends all, in the order in which they were made. `send` returns whether the server is still away. */
  async send(send: (request: StartRequest) => Promise<boolean>): Promise<void> {
    if (this.#isSending) return;
    this.#isSending = true;
    try {
      for (const request of [...this.#requests.values()]) {
        if (this.#requests.get(request.nodeId) !== request) continue; // taken back meanwhile
        if (await send(request)) return;
        if (this.#requests.get(request.nodeId) === request) this.#requests.delete(request.nodeId);
      }
    } finally {
      this.#isSending = false;
    }
  }
}

export function toJson(request: StartRequest): Json {
  return request as unknown as Json;
}
