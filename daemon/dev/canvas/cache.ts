/**
 * The cache of a workflow's nodes: merges rows and messages by `version`, and keeps local edits on top of them. It knows no
 * framework and no network. Copy this file with workflow.ts.
 */
import type { NodeInput, NodeMessage, NodeNotes, NodeState, Position, WorkflowNode } from "./nodes";

/** A local change that is not acknowledged yet. */
export interface PendingEdit {
  insert?: boolean;
  position?: Position;
  input?: NodeInput;
}

const STATE_KEYS: ReadonlySet<string> = new Set<keyof NodeState>([
  "status", "runId", "progress", "message", "previewUrl", "imageUrl", "thumbnailUrl", "previewPath", "imagePath",
  "thumbnailPath", "error", "updatedAt",
]);

/** A row with the local edit on top, as last rendered. */
interface RenderedNode {
  row: WorkflowNode;
  edit: PendingEdit | undefined;
  /** Without notes. */
  plain: WorkflowNode;
  notes: NodeNotes;
  node: WorkflowNode;
}

export class NodeCache {
  /** The rows of the database, by id. */
  #rows = new Map<string, WorkflowNode>();
  /** Deleted nodes, each with the version of its deletion: older messages do not bring it back. */
  #tombstones = new Map<string, number>();
  /** Rows of which only NodeState is known at their present version. */
  #partial = new Set<string>();
  /** Shown on top of the rows. */
  #edits = new Map<string, PendingEdit>();
  /** A node that has not changed keeps its object, and is not rendered again. */
  #rendered = new Map<string, RenderedNode>();
  #onFailure: (node: WorkflowNode) => void;
  #onDeleted: (node: WorkflowNode, isUnsent: boolean) => void;

  /**
   * `onFailure` is called with each row whose run has just failed, `onDeleted` with each node that was deleted elsewhere, as it
   * was seen here, and whether some of that was not written yet.
   */
  constructor(onFailure: (node: WorkflowNode) => void, onDeleted: (node: WorkflowNode, isUnsent: boolean) => void = () => {}) {
    this.#onFailure = onFailure;
    this.#onDeleted = onDeleted;
  }

  /** The node as the user sees it: its row with the local edit on top. */
  get(id: string): WorkflowNode | undefined {
    const row = this.#rows.get(id);
    return row && withEdit(row, this.#edits.get(id));
  }

  row(id: string): WorkflowNode | undefined {
    return this.#rows.get(id);
  }

  rows(): WorkflowNode[] {
    return [...this.#rows.values()];
  }

  isDeleted(id: string): boolean {
    return this.#tombstones.has(id);
  }

  /** Merges a whole row, unless a newer version is known. */
  mergeRow(row: WorkflowNode): void {
    if (row.version < (this.#tombstones.get(row.id) ?? 0)) return;
    const known = this.#rows.get(row.id);
    if (known && (row.version < known.version || (row.version === known.version && !this.#partial.has(row.id)))) return;
    this.#tombstones.delete(row.id);
    this.#partial.delete(row.id);
    this.#setRow(row, known);
  }

  /** Merges messages. Returns the ids of the rows that have to be fetched: they were too large for a message. */
  mergeMessages(messages: NodeMessage[]): string[] {
    const incomplete: string[] = [];
    for (const message of messages) {
      if (message.deleted && this.#edits.get(message.id)?.insert) continue; // put back here since
      if (message.deleted) this.#hearDeleted(message.id, message.version);
      else if (!message.partial) this.mergeRow(message as WorkflowNode);
      else if (this.#mergeState(message)) incomplete.push(message.id);
    }
    return incomplete;
  }

  /** Merges all rows of the workflow: a row that was known before the request, and is not there, has been deleted. */
  mergeAll(before: ReadonlyMap<string, number>, found: ReadonlySet<string>): void {
    for (const [id, version] of before) {
      if (!found.has(id) && version > 0 && this.#rows.get(id)?.version === version) this.#hearDeleted(id, version);
    }
  }

  /** The version of each row, for `mergeAll`. */
  versions(): Map<string, number> {
    return new Map(this.rows().map(row => [row.id, row.version]));
  }

  markDeleted(id: string, version: number): void {
    const known = this.#rows.get(id);
    if (known && known.version > version) return;
    this.#rows.delete(id);
    this.#edits.delete(id);
    this.#tombstones.set(id, Math.max(version, this.#tombstones.get(id) ?? 0));
  }

  /** Sets the version from which on messages show a deleted node again; undefined: all do. */
  setTombstone(id: string, version: number | undefined): void {
    if (version === undefined) this.#tombstones.delete(id);
    else this.#tombstones.set(id, version);
  }

  /** Shows a run that was started at this version of its node, until there is a newer one. */
  showStarted(id: string, runId: string, version: number | undefined): void {
    const row = this.#rows.get(id);
    if (!row || row.version !== version || row.node_data.runId === runId) return;
    const { error: _error, message: _message, progress: _progress, ...data } = row.node_data;
    this.#setRow({ ...row, node_data: { ...data, status: "pending", runId } }, row);
  }

  /** Adds a node that the database does not have yet. */
  insert(node: WorkflowNode): void {
    this.#tombstones.delete(node.id);
    this.#rows.set(node.id, { ...node, version: 0 });
    this.edit(node.id, { insert: true });
  }

  /** Takes back an insert that was refused. */
  removeInsert(id: string): void {
    this.#rows.delete(id);
    this.#edits.delete(id);
  }

  /** Puts an edit on top of earlier ones; a node that is gone takes none. */
  edit(id: string, { input, ...rest }: PendingEdit): void {
    if (!this.#rows.has(id)) return;
    const before = this.#edits.get(id);
    this.#edits.set(id, { ...before, ...rest, ...(input && { input: { ...before?.input, ...input } }) });
  }

  pendingEdit(id: string): PendingEdit | undefined {
    return this.#edits.get(id);
  }

  pendingEdits(): string[] {
    return [...this.#edits.keys()];
  }

  /** Drops an edit that was written or refused; of one that has grown meanwhile, all but `insert` stays. */
  settleEdit(id: string, edit: PendingEdit): void {
    if (this.#edits.get(id) === edit) this.#edits.delete(id);
    else if (this.#edits.has(id)) this.edit(id, { insert: false });
  }

  clear(): void {
    for (const each of [this.#rows, this.#tombstones, this.#partial, this.#edits]) each.clear();
  }

  /** `notes` returns what is said of a node beside its row. */
  render(notes: (node: WorkflowNode) => NodeNotes): WorkflowNode[] {
    const rendered = new Map<string, RenderedNode>();
    for (const [id, row] of this.#rows) {
      const edit = this.#edits.get(id);
      const last = this.#rendered.get(id);
      const plain = last?.row === row && last.edit === edit ? last.plain : withEdit(row, edit);
      const said = notes(plain);
      if (last && plain === last.plain && isSame(said, last.notes)) rendered.set(id, last);
      else rendered.set(id, { row, edit, plain, notes: said, node: { ...plain, ...said } });
    }
    this.#rendered = rendered;
    return [...rendered.values()].map(each => each.node);
  }

  /** Takes note of a node that was deleted elsewhere. */
  #hearDeleted(id: string, version: number): void {
    const seen = this.get(id);
    const isUnsent = this.#edits.get(id)?.input !== undefined;
    this.markDeleted(id, version);
    if (seen && !this.#rows.has(id)) this.#onDeleted(seen, isUnsent);
  }

  /** Merges NodeState alone. Returns whether the rest has to be fetched. */
  #mergeState({ id, version, node_data: state = {} }: NodeMessage): boolean {
    const known = this.#rows.get(id);
    if (version < (this.#tombstones.get(id) ?? 0) || (known && version <= known.version)) return false;
    if (known) {
      this.#partial.add(id);
      const input = Object.entries(known.node_data).filter(([key]) => !STATE_KEYS.has(key));
      this.#setRow({ ...known, version, node_data: { ...Object.fromEntries(input), ...state } }, known);
    }
    return true;
  }

  #setRow(row: WorkflowNode, known: WorkflowNode | undefined): void {
    this.#rows.set(row.id, known ? { ...row, node_data: keepIdentity(row.node_data, known.node_data) } : row);
    const { status, runId } = row.node_data;
    const changed = known !== undefined && (known.node_data.status !== status || known.node_data.runId !== runId);
    if (changed && status === "error") this.#onFailure(row);
  }
}

function withEdit(row: WorkflowNode, edit: PendingEdit | undefined): WorkflowNode {
  if (!edit?.position && !edit?.input) return row;
  return { ...row, position: edit.position ?? row.position, node_data: { ...row.node_data, ...edit.input } };
}

function isSame(one: NodeNotes, other: NodeNotes): boolean {
  const keys = Object.keys(one) as (keyof NodeNotes)[];
  return keys.length === Object.keys(other).length && keys.every(key => one[key] === other[key]);
}

/** Returns a node as a row: without the notes. */
export function toRow(node: WorkflowNode): WorkflowNode {
  const { id, workflow_id, node_type, node_data, position, version } = node;
  return { id, workflow_id, node_type, node_data, position, version };
}

/** Keeps the previous objects where they are equal, so that memoized components are not rendered again. */
function keepIdentity(next: NodeState & NodeInput, previous: NodeState & NodeInput): NodeState & NodeInput {
  const equal = (key: "promptSpec" | "metadata") => JSON.stringify(next[key]) === JSON.stringify(previous[key]);
  const same = (["promptSpec", "metadata"] as const).filter(equal);
  return { ...next, ...Object.fromEntries(same.filter(key => key in previous).map(key => [key, previous[key]])) };
}
