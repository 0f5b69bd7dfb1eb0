/**
 * The pictures that a node has had: its completed runs, as far as retention has left them. Copy this file with workflow.ts,
 * which asks it for the one node that somebody looks at.
 */
import type { NodeState, PromptSpec, WorkflowNode } from "./nodes";
import type { Store } from "./store";

const MAX_RUNS = 100;

/** The keys of a completed run's payload that are shown. */
export interface RunPayload extends Pick<NodeState, "imageUrl" | "thumbnailUrl" | "imagePath" | "thumbnailPath"> {
  width?: number;
  height?: number;
  bytes?: number;
  contentType?: string;
  seed?: number;
  model?: string;
  /** USD; null: not known. */
  cost?: number | null;
  /** Milliseconds. */
  timings?: { queuedMs?: number; generateMs?: number; storeMs?: number; settleMs?: number };
}

/** A completed run of a node. Its addresses are signed where the bucket is private. */
export interface PastRun {
  id: string;
  finishedAt: string;
  processor: string;
  promptSpec: PromptSpec;
  payload: RunPayload;
  /** Whether its picture is the one that the node shows. */
  isShown: boolean;
}

export class History {
  readonly #store: Store;
  #nodeId: string | undefined;
  #runs: PastRun[] = [];
  /** A node with the addresses of each run, for `Pictures`. */
  #nodes: WorkflowNode[] = [];
  /** The run of the node when it was asked for, and what it showed. */
  #state = "";

  constructor(store: Store) {
    this.#store = store;
  }

  /** Loads the runs of a node, newest first, and again when one is completed; undefined ends it. */
  open(nodeId: string | undefined): void {
    if (this.#nodeId === nodeId) return;
    this.#nodeId = nodeId;
    this.#runs = this.#nodes = [];
    this.#state = "";
    this.#store.render();
  }

  /** The node whose runs these are. */
  get nodeId(): string | undefined {
    return this.#nodeId;
  }

  /** The runs as nodes whose pictures have to be signed. */
  get nodes(): readonly WorkflowNode[] {
    return this.#nodes;
  }

  /** Returns the runs with the addresses of `nodes`, which has those of this object, signed. */
  render(signed: readonly WorkflowNode[]): PastRun[] {
    const node = this.#nodeId === undefined ? undefined : this.#store.nodes.row(this.#nodeId);
    return this.#runs.map((run, index) => {
      const { imageUrl, thumbnailUrl, ...rest } = run.payload;
      const shown = signed[index]?.node_data;
      const urls = { ...(shown?.imageUrl && { imageUrl: shown.imageUrl }), ...(shown?.thumbnailUrl && { thumbnailUrl: shown.thumbnailUrl }) };
      const isShown = pictureOf(run.payload) === pictureOf(node?.node_data);
      return { ...run, payload: { ...rest, ...urls }, isShown };
    });
  }

  /** Returns the run whose picture a node shows, if its history is open. */
  shownRun(nodeId: string): string | undefined {
    const shown = pictureOf(this.#store.nodes.row(nodeId)?.node_data);
    return this.#nodeId === nodeId ? this.#runs.find(run => pictureOf(run.payload) === shown)?.id : undefined;
  }

  /** Looks whether there is another run by now. */
  watch(): void {
    if (this.#nodeId === undefined) return;
    const node = this.#store.nodes.row(this.#nodeId);
    const state = `${node?.node_data.runId} ${node?.node_data.status} ${pictureOf(node?.node_data)}`;
    if (state === this.#state) return;
    this.#state = state;
    void this.#load(this.#nodeId);
  }

  async #load(nodeId: string): Promise<void> {
    const era = this.#store.era();
    const { data, error } = await this.#store.supabase.from("runs").select("id,finished_at,processor,payload,metadata")
      .eq("subject_id", this.#store.id).eq("metadata->>nodeId", nodeId).eq("status", "completed")
      .order("finished_at", { ascending: false }).limit(MAX_RUNS);
    if (this.#nodeId !== nodeId || era !== this.#store.era()) return;
    if (error) {
      this.#state = ""; // the next look asks again
      return;
    }
    this.#runs = data.map(({ id, finished_at, processor, payload, metadata }) => ({
      id,
      finishedAt: finished_at ?? "",
      processor: processor ?? "",
      promptSpec: (metadata as { promptSpec?: PromptSpec } | null)?.promptSpec ?? { basePrompt: "" },
      payload: (payload ?? {}) as RunPayload,
      isShown: false,
    }));
    this.#nodes = this.#runs.map(({ id, payload: { imageUrl, thumbnailUrl, imagePath, thumbnailPath } }) => ({
      id, workflow_id: this.#store.id, node_type: "image", position: null, version: 0,
      node_data: Object.fromEntries(
        Object.entries({ imageUrl, thumbnailUrl, imagePath, thumbnailPath }).filter(([, value]) => value !== undefined)),
    }));
    this.#store.render();
  }
}

/** What tells a picture from all others: its path, or its address where it lies elsewhere. */
function pictureOf(data: NodeState | RunPayload | undefined): string | undefined {
  return data?.imagePath ?? data?.imageUrl;
}
