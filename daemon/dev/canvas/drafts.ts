/** The prompt that is being typed, kept until the database has it: a window that is closed or shut out does not lose it. */
import type { WorkflowNode } from "./nodes";

const KEY = "draft";

interface Draft {
  workflowId: string;
  text: string;
}

/** Returns the prompt that was typed last and is saved nowhere. */
export function readDraft(): Draft | undefined {
  const kept = sessionStorage.getItem(KEY);
  return kept === null ? undefined : (JSON.parse(kept) as Draft);
}

export function keepDraft(workflowId: string, text: string): void {
  if (text.trim()) sessionStorage.setItem(KEY, JSON.stringify({ workflowId, text } satisfies Draft));
  else sessionStorage.removeItem(KEY);
}

export function dropDraft(): void {
  sessionStorage.removeItem(KEY);
}

/** Drops the draft once the database has a node with it. `unsent`: how many nodes have changes that it has not. */
export function settleDraft(rows: readonly WorkflowNode[], unsent: number): void {
  const text = readDraft()?.text.trim();
  if (text === undefined || unsent > 0) return;
  if (rows.some(row => row.version > 0 && row.node_data.promptSpec?.basePrompt.trim() === text)) dropDraft();
}
