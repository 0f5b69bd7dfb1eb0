/** Deletes nodes, and puts them back. Copy this file with workflow.ts, which calls it. */
import { toRow } from "./cache";
import { toProblem } from "./failures";
import { isUnfinished } from "./nodes";
import type { WorkflowNode } from "./nodes";
import type { Starts } from "./starts";
import type { Store } from "./store";
import type { Writes } from "./writes";

interface Removal {
  /** The node was put back meanwhile. */
  isTakenBack: boolean;
  done: Promise<void>;
}

export class Removals {
  readonly #store: Store;
  readonly #writes: Writes;
  readonly #starts: Starts;
  /** Those under way, by node. */
  #removals = new Map<string, Removal>();

  constructor(store: Store, writes: Writes, starts: Starts) {
    this.#store = store;
    this.#writes = writes;
    this.#starts = starts;
  }

  /** Undoes a removal; the pictures of `node` are not signed. */
  restore(node: WorkflowNode): void {
    const row = toRow(node);
    const removal = this.#removals.get(node.id);
    if (removal) removal.isTakenBack = true;
    this.#writes.insert({ ...row, node_data: { ...row.node_data, pendingRunId: null } }, removal?.done);
    if (node.pinned_run) void this.#writes.settled(node.id).then(() => this.#starts.show(node.id, node.pinned_run!));
  }

  remove(id: string, keepsRun: boolean): Promise<void> {
    const removal: Removal = { isTakenBack: false, done: Promise.resolve() };
    removal.done = this.#remove(id, keepsRun, removal).finally(() => {
      if (this.#removals.get(id) === removal) this.#removals.delete(id);
    });
    this.#removals.set(id, removal);
    return removal.done;
  }

  async #remove(id: string, keepsRun: boolean, removal: Removal): Promise<void> {
    const { nodes, supabase } = this.#store;
    const row = nodes.row(id);
    if (!row) return;
    this.#starts.kept.drop(id);
    if (isUnfinished(row) && !keepsRun) await this.#starts.cancel(id);
    if (!removal.isTakenBack) await this.#writes.settled(id);
    if (removal.isTakenBack) return;
    nodes.markDeleted(id, Number.MAX_SAFE_INTEGER); // ignores all messages that are still on their way
    this.#store.render();
    const { data, error, status } = await supabase.from("workflow_nodes").delete().eq("id", id).select("version");
    // Later versions are those of a node that was restored.
    if (!removal.isTakenBack) nodes.setTombstone(id, error ? undefined : 1 + (data[0]?.version ?? row.version));
    if (error) {
      this.#store.tell(toProblem({ error, status }, id));
      void this.#store.load();
    }
  }
}
