/** The types of a workflow, and what can be told of a node by its row. Copy this file with workflow.ts. */
import type { PastRun } from "./history";

export type Status = "pending" | "running" | "completed" | "error" | "cancelled";

export type Quality = "low" | "standard" | "hd" | "xhigh" | "max";

export interface PromptSpec {
  basePrompt: string;
  styleModifiers?: string[];
  size?: string;
  aspectRatio?: string;
  quality?: Quality;
  seed?: number;
  negativePrompt?: string;
  previousImage?: string;
}

/**
 * The orchestrator's keys of `node_data`, read-only: the database keeps them, whatever a client sends. Paths are those in the
 * bucket; where it is private, the store signs them, and its nodes have signed addresses.
 */
export interface NodeState {
  status?: Status;
  runId?: string;
  progress?: number;
  message?: string;
  previewUrl?: string;
  imageUrl?: string;
  thumbnailUrl?: string;
  previewPath?: string;
  imagePath?: string;
  thumbnailPath?: string;
  error?: string;
  updatedAt?: string;
}

/** A picture of the user's own, in the private bucket `image-sources`. */
export interface Upload {
  /** In that bucket; missing until it is there. */
  path?: string;
  /** Of the file. */
  name: string;
  width: number;
  height: number;
}

/** The frontend's keys of `node_data`: what the user chooses. */
export interface NodeInput {
  provider?: string;
  model?: string;
  promptSpec?: PromptSpec;
  /** The node whose image this one refines. */
  source?: string | null;
  /** The id of a run that starts once the image of `source` is there. */
  pendingRunId?: string | null;
  /** Goes into the run's metadata. */
  metadata?: Record<string, unknown>;
  /** The node shows this picture, for others to start from, and has no runs. */
  upload?: Upload;
  /** The name of the workflow, in the node of type `canvas`. */
  title?: string;
}

/** A partial update: only the keys that are there change, within promptSpec too; undefined removes a key. */
export interface NodeInputPatch extends Omit<NodeInput, "promptSpec"> {
  promptSpec?: Partial<Record<keyof PromptSpec, string | number | undefined>>;
}

export interface Position {
  x: number;
  y: number;
}

/** What the store says of a node beside its row. */
export interface NodeNotes {
  /** Why its run waits, and until when (ISO) where that is known. */
  waitsFor?: string;
  waitsUntil?: string;
  /** Since when its run is in line, or under way: milliseconds since 1970, by this computer's clock. */
  since?: number;
  /** When the message of a run in line was written, in the same way. */
  saidAt?: number;
  /** What its next picture will cost, in USD; null: nobody knows. It is not there until that is known. */
  cost?: number | null;
  /** How many pictures have to be made before it, as its source has none, and what they will cost in the same way. */
  missing?: number;
  missingCost?: number | null;
  /** Of a run that has failed: whether it was asked for what the node says now, and its prompt if that is another one. */
  asked?: "same" | "other";
  askedPrompt?: string;
  /** Its run is started once the server is back. */
  isKept?: boolean;
}

export interface WorkflowNode extends NodeNotes {
  id: string;
  workflow_id: string;
  node_type: string;
  node_data: NodeState & NodeInput;
  position: Position | null;
  version: number;
  /** An older run that it shows until there is a newer one. */
  pinned_run?: string | null;
}

/** A row of the view image_provider_status. */
export interface ProviderState {
  provider: string;
  /** Null: of all models that have no row of their own. */
  model: string | null;
  state: "open" | "paused" | "limited" | "blocked" | "unserved" | "budget" | "storage";
  since: string | null;
  until: string | null;
  sentence: string | null;
  /** Seconds after which it may have changed without a message. */
  check_in: number | null;
}

/** A row of the view image_usage; a maximum of null: unlimited. */
export interface Usage {
  scope: "user" | "workflow";
  period: "day" | "month";
  workflow_id: string | null;
  used_images: number;
  max_images: number | null;
  used_usd: number;
  max_usd: number | null;
  waiting: number;
  max_waiting: number | null;
  resets_at: string;
}

/** A row of the view image_models: what the model can do, its price (USD) and typical duration. */
export interface ImageModel {
  provider: string;
  model: string;
  sizes: string[];
  ratios: string[];
  /** Only those that make a difference; empty where there is just one. */
  qualities: Quality[];
  seed: boolean;
  negative_prompt: boolean;
  previous_image: boolean;
  previews: boolean;
  price: number | null;
  typical_seconds: number | null;
  retired: string | null;
  successor: string | null;
}

/** `denied`: the user is not a member. The user who adds the first node of a new workflow becomes one. */
export type Connection = "connecting" | "live" | "away" | "denied";

/** An error to show to the user: a run that failed, or a request that was refused. */
export interface Problem {
  nodeId?: string;
  message: string;
  hint?: string;
  /** Of a node that was lost: puts it back, as it was seen last. */
  restore?: () => void;
}

export interface Snapshot {
  nodes: readonly WorkflowNode[];
  /** The workflow's name, if it was given one. */
  title: string | undefined;
  models: readonly ImageModel[];
  /** What the user, and the workflow where it has limits, have used and may use. */
  usage: readonly Usage[];
  /** The pictures of the node whose history is open, newest first. */
  history: readonly PastRun[];
  connection: Connection;
  /** Until the nodes have been fetched for the first time, or refused. */
  isLoading: boolean;
  /** Why nothing is loaded: nobody is signed in, or the server refuses. It is gone once a later try succeeds. */
  error: Problem | null;
  /** Number of nodes with changes that are not saved yet. They are sent when the server responds again. */
  unsent: number;
}

export interface Actions {
  generate(id: string): Promise<void>;
  cancel(id: string): Promise<void>;
  retry(id: string): Promise<void>;
  /** Opens the history of a node, which is in the snapshot from then on; undefined closes it. */
  openHistory(id: string | undefined): void;
  /** Shows a run of the history on its node again. Returns the run that it showed before; undefined if it was refused. */
  show(id: string, runId: string): Promise<string | undefined>;
  /** Returns the new node's id. Ids of nodes are one namespace for all workflows: it is a random UUID. */
  add(input: NodeInput, position: Position): string;
  /**
   * Optimistic: shown at once, written after a pause in typing. A change that depends on what is there is a function of
   * it: what was last rendered may be older.
   */
  edit(id: string, change: NodeInputPatch | ((now: NodeInput) => NodeInputPatch)): void;
  move(id: string, position: Position): void;
  /** Its run is cancelled, unless `keepsRun`: then it goes on, and a node that is restored shows it. */
  remove(id: string, options?: { keepsRun?: boolean }): Promise<void>;
  /** Returns a node as it is now, with edits that are not rendered yet; its pictures are not signed. */
  now(id: string): WorkflowNode | undefined;
  /** Undoes a `remove`; the node shows its newest run again. */
  restore(node: WorkflowNode): void;
  /** Writes what was changed of a node at once. Returns when it is written, or could not be. */
  save(id: string): Promise<void>;
  /** Gives the workflow a name, which its members see. Returns the one before, if it had one. */
  rename(title: string): string | undefined;
  /** Returns the token of a link: who calls `join_workflow` with it becomes a member. Undefined if it was refused. */
  share(): Promise<string | undefined>;
  /** Ends the user's membership. */
  leave(): Promise<void>;
  /** To be called when a picture's address did not load (`onError` of an image): it may have expired. */
  retryPicture(url: string): void;
  /** Connects and loads again, for example after the user has become a member. */
  refresh(): void;
}

/** A node of the event `nodes_changed`. `partial`: the row is too large for a message, only its NodeState is there. */
export interface NodeMessage {
  id: string;
  version: number;
  deleted?: boolean;
  partial?: boolean;
  node_data?: NodeState & NodeInput;
}

/** A run of the event `runs_changed`: a record of the view image_jobs and more. Of a deleted one there is no status. */
export interface RunMessage {
  jobId: string;
  version: number;
  deleted?: boolean;
  /** It is too large for a message: its metadata is not there. */
  partial?: boolean;
  status?: string;
  progress?: number | null;
  message?: string | null;
  previewUrl?: string | null;
  imageUrl?: string | null;
  previewPath?: string | null;
  imagePath?: string | null;
  thumbnailPath?: string | null;
  error?: string | null;
}

export function isUnfinished(node: WorkflowNode): boolean {
  return node.node_data.status === "pending" || node.node_data.status === "running";
}

/** Does what the button of a node says: a run that has failed, and says the same still, is retried; else there is a new one. */
export function generateOrRetry(node: WorkflowNode, actions: Actions): Promise<void> {
  return node.node_data.status === "error" && node.asked === "same" ? actions.retry(node.id) : actions.generate(node.id);
}

/** Whether it has an image, which may not be signed yet. */
export function hasImage({ node_data: { imageUrl, imagePath, upload } }: WorkflowNode): boolean {
  return imageUrl !== undefined || imagePath !== undefined || upload?.path !== undefined;
}

/** Whether a picture may be asked for: it says what, and none is under way. */
export function canGenerate(row: WorkflowNode): boolean {
  return Boolean(row.node_data.promptSpec?.basePrompt.trim() && row.node_data.model) && !isUnfinished(row) && !isWaiting(row) && !row.isKept;
}

/** Whether its run starts as soon as the image of its source is there. */
export function isWaiting(node: WorkflowNode): boolean {
  return Boolean(node.node_data.pendingRunId) && !isUnfinished(node);
}

/**
 * Returns the nodes whose pictures are made before that of a node, the nearest first: its source has none, and so on.
 * `get` returns a node by its id, `isKept` whether its run is already asked for.
 */
export function missingSources(
  node: WorkflowNode, get: (id: string) => WorkflowNode | undefined, isKept: (id: string) => boolean,
): WorkflowNode[] {
  const missing: WorkflowNode[] = [];
  const sourceOf = ({ node_data: { source } }: WorkflowNode) => (source ? get(source) : undefined);
  for (let at = sourceOf(node); at && !missing.includes(at); at = sourceOf(at)) {
    if (hasImage(at) || at.node_data.upload || isUnfinished(at) || isWaiting(at) || isKept(at.id)) break;
    missing.push(at);
  }
  return missing;
}

/** Returns an input with a patch on top, as an edit: promptSpec is whole. */
export function applyPatch(input: NodeInput, { promptSpec, ...patch }: NodeInputPatch): NodeInput {
  if (!promptSpec) return patch;
  const merged = { ...input.promptSpec, ...promptSpec };
  const kept = Object.entries(merged).filter(([, value]) => value !== undefined && value !== "");
  return { ...patch, promptSpec: { basePrompt: String(merged.basePrompt ?? ""), ...Object.fromEntries(kept) } as PromptSpec };
}
