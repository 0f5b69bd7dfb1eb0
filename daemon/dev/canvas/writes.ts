/** Writes local edits to the rows of nodes. Copy this file with workflow.ts, which calls it. */
import type { PendingEdit } from "./cache";
import type { Database } from "./database.types";
import { UNIQUE_VIOLATION, isAway, toProblem } from "./failures";
import type { WorkflowNode } from "./nodes";
import { COLUMNS } from "./store";
import type { Store } from "./store";

/** Milliseconds from the last keystroke to the write. */
const DEBOUNCE = 400;

type Row = Database["public"]["Tables"]["workflow_nodes"]["Insert"];

export class Writes {
  readonly #store: Store;
  /** An edit could not be sent: the next load sends it. */
  hasFailed = false;
  #writes = new Map<string, Promise<void>>();
  #debounces = new Map<string, ReturnType<typeof setTimeout>>();

  constructor(store: Store) {
    this.#store = store;
  }

  /** Returns when the last write of a node is over. */
  async settled(id: string): Promise<void> {
    await this.#writes.get(id);
  }

  /** Writes a node once nothing has been typed for a moment. */
  writeSoon(id: string): void {
    clearTimeout(this.#debounces.get(id));
    this.#debounces.set(id, setTimeout(() => void this.write(id), DEBOUNCE));
  }

  /** Shows a node at once, and writes it `after` its deletion, if that is under way. */
  insert(node: WorkflowNode, after?: Promise<void>): void {
    this.#store.nodes.insert(node);
    this.#store.render();
    if (after) this.#writes.set(node.id, (this.#writes.get(node.id) ?? Promise.resolve()).then(() => after));
    void this.write(node.id);
  }

  edit(id: string, edit: PendingEdit): void {
    this.#store.nodes.edit(id, edit);
    this.#store.render();
  }

  flush(): void {
    for (const id of this.#store.nodes.pendingEdits()) void this.write(id);
  }

  /** Writes the edit of a node; one write at a time per node. An edit that cannot be sent goes with the next write. */
  write(id: string): Promise<void> {
    clearTimeout(this.#debounces.get(id));
    const writing = (this.#writes.get(id) ?? Promise.resolve()).then(() => this.#writeOnce(id));
    this.#writes.set(id, writing);
    return writing;
  }

  async #writeOnce(id: string): Promise<void> {
    const edit = this.#store.nodes.pendingEdit(id);
    const node = this.#store.nodes.get(id);
    const era = this.#store.era();
    if (!edit || !node) return;
    const changed = {
      ...(edit.position && { position: edit.position }), // a drag writes the position alone
      ...(edit.input && { node_data: node.node_data }),
    };
    const rows = this.#store.supabase.from("workflow_nodes");
    const { data, error, status } = edit.insert
      ? await rows.insert({ ...node, version: undefined } as unknown as Row).select(COLUMNS)
      : await rows.update(changed as unknown as Partial<Row>).eq("id", id).select(COLUMNS);
    if (error && status === 401) this.#store.refuse(toProblem({ error, status }));
    if (error && (status === 401 || isAway({ error, status }))) {
      this.hasFailed = true; // sent when the server or the user is back
      return;
    }
    this.#store.nodes.settleEdit(id, edit);
    if (error?.code === UNIQUE_VIOLATION) await this.#store.fetch([id]); // the insert had succeeded, its response was lost
    else if (error) {
      if (edit.insert) this.#store.nodes.removeInsert(id);
      this.#store.tell(toProblem({ error, status }, id));
    }
    this.#store.merge(data, era);
    this.#store.render();
    await this.#store.written(edit.insert === true && !error);
  }
}
