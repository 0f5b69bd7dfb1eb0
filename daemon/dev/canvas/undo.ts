/**
 * Undo and redo of what a user does to the nodes of a workflow: the store's edits, with a memory. It starts and cancels no
 * run: a node that goes keeps its run, and shows it when it comes back.
 */
import type { Actions, NodeInput, NodeInputPatch, Position, PromptSpec, WorkflowNode } from "./nodes";

/** Milliseconds: keystrokes, and steps by arrow keys, that follow each other so closely are one. */
const TOGETHER = 1_000;
const MAX_STEPS = 200;

interface Change {
  undo: () => void;
  redo: () => void;
  /** The node that one of both brings back, once it is deleted. */
  node?: () => WorkflowNode | undefined;
  /** Changes of the same key that follow each other closely are one. */
  key?: string;
}

/** What is undone at once. */
export interface Step {
  changes: Change[];
  at: number;
}

/** The edits of a store that can be undone; all of its other actions stay as they are. */
export type UndoableActions = Actions & {
  undo(): boolean;
  redo(): boolean;
  /** Returns the step that is being made, or was made last, to undo it by a button of its own. */
  lastStep(): Step | undefined;
  /** Undoes one step, if it has not been undone yet. */
  undoStep(step: Step | undefined): void;
  /** Drops a step: what it has made never came about. */
  forget(step: Step | undefined): void;
  /** Returns the paths of the own pictures that undo and redo bring back. */
  uploads(): string[];
};

export function undoable(actions: Actions): UndoableActions {
  let done: Step[] = [];
  let undone: Step[] = [];
  /** What happens within one task of the browser is one step: a drag of many nodes, a deletion with its edges. */
  let current: Step | undefined;

  const record = (change: Change) => {
    undone = [];
    const last = done.at(-1);
    const isMore = change.key !== undefined && last?.changes.length === 1 && last.changes[0]!.key === change.key
      && Date.now() - last.at < TOGETHER;
    if (current) current.changes.push(change);
    else if (isMore) {
      last.changes[0]!.redo = change.redo;
      last.at = Date.now();
    } else {
      current = { changes: [change], at: Date.now() };
      done = [...done.slice(1 - MAX_STEPS), current];
      setTimeout(() => {
        current = undefined;
      });
    }
  };
  const undoStep = (step: Step | undefined) => {
    if (!step || !done.includes(step)) return;
    done = done.filter(each => each !== step);
    undone = [...undone, step];
    current = undefined;
    [...step.changes].reverse().forEach(change => change.undo());
  };

  return {
    ...actions,
    add(input, position) {
      const id = actions.add(input, position);
      let node: WorkflowNode | undefined;
      record({
        node: () => node,
        undo: () => {
          node = actions.now(id) ?? node;
          void actions.remove(id, { keepsRun: true });
        },
        redo: () => {
          if (node) actions.restore(node);
        },
      });
      return id;
    },
    edit(id, change) {
      const node = actions.now(id);
      let patch: NodeInputPatch | undefined;
      let before: NodeInputPatch | undefined;
      actions.edit(id, now => {
        patch = typeof change === "function" ? change(now) : change;
        before = inverse(now, patch);
        return patch;
      });
      if (patch && "upload" in patch) return; // no user's edit: the file has arrived
      if (!node || !patch || !before || JSON.stringify(patch) === JSON.stringify(before)) return;
      const [undo, redo] = [before, patch];
      const key = `edit ${id} ${Object.keys(redo).join()} ${Object.keys(redo.promptSpec ?? {}).join()}`;
      record({ key, undo: () => actions.edit(id, undo), redo: () => actions.edit(id, redo) });
    },
    move(id, position) {
      const before = actions.now(id)?.position;
      actions.move(id, position);
      if (!before || (before.x === position.x && before.y === position.y)) return;
      record({ key: `move ${id}`, undo: () => actions.move(id, before), redo: () => actions.move(id, position) });
    },
    remove(id, options) {
      const node = actions.now(id);
      if (node) {
        record({
          node: () => node,
          undo: () => actions.restore(node),
          redo: () => void actions.remove(id, { keepsRun: true }),
        });
      }
      return actions.remove(id, options);
    },
    rename(title) {
      const before = actions.rename(title);
      if (before !== title) record({ key: "rename", undo: () => void actions.rename(before ?? ""), redo: () => void actions.rename(title) });
      return before;
    },
    async show(id, runId) {
      const before = await actions.show(id, runId);
      if (before && before !== runId) record({ undo: () => void actions.show(id, before), redo: () => void actions.show(id, runId) });
      return before;
    },
    undo() {
      const step = done.at(-1);
      undoStep(step);
      return step !== undefined;
    },
    redo() {
      const step = undone.at(-1);
      if (!step) return false;
      undone = undone.slice(0, -1);
      done = [...done, step];
      current = undefined;
      step.changes.forEach(change => change.redo());
      return true;
    },
    lastStep: () => done.at(-1),
    undoStep,
    forget(step) {
      done = done.filter(each => each !== step);
      undone = undone.filter(each => each !== step);
      if (current === step) current = undefined;
    },
    uploads: () => [...done, ...undone].flatMap(({ changes }) => changes.flatMap(({ node }) => node?.()?.node_data.upload?.path ?? [])),
  };
}

/** Returns the patch that brings back what another one changes. */
function inverse(now: NodeInput, { promptSpec, ...rest }: NodeInputPatch): NodeInputPatch {
  const keys = Object.keys(rest) as (keyof typeof rest)[];
  const before = Object.fromEntries(keys.map(key => [key, now[key] ?? (key === "source" || key === "pendingRunId" ? null : undefined)]));
  const spec = Object.keys(promptSpec ?? {}) as (keyof PromptSpec)[];
  return {
    ...before,
    ...(promptSpec && { promptSpec: Object.fromEntries(spec.map(key => [key, now.promptSpec?.[key]])) as NonNullable<NodeInputPatch["promptSpec"]> }),
  };
}

/** Returns copies of nodes, with the edges between them: what `add` takes, each with the id of its original. */
export function copiesOf(nodes: readonly WorkflowNode[]): { id: string; input: NodeInput; position: Position }[] {
  return nodes.map(({ id, position, node_data: { provider, model, promptSpec, source, metadata, upload } }) => ({
    id,
    input: {
      ...(provider && { provider }), ...(model && { model }), ...(promptSpec && { promptSpec }), ...(source && { source }),
      ...(metadata && { metadata }), ...(upload && { upload }),
    },
    position: position ?? { x: 0, y: 0 },
  }));
}
