/**
 * A React hook for a workflow's nodes: the store of workflow.ts, rendered again at each change.
 *
 *     const workflow = useWorkflow(supabase, workflowId, { onProblem: toast });
 *     workflow.nodes.map(node => node.node_data.imageUrl);
 *     workflow.actions.generate(node.id);
 *
 * One hook per workflow and page: hand its result down.
 */
import { useEffect, useMemo, useSyncExternalStore } from "react";
import type { Actions, Problem, Snapshot } from "./nodes";
import { EMPTY, Workflow } from "./workflow";

export function useWorkflow(
  supabase: ConstructorParameters<typeof Workflow>[0],
  workflowId: string,
  { onProblem }: { onProblem?: (problem: Problem) => void } = {},
): Snapshot & { actions: Actions } {
  const store = useMemo(() => new Workflow(supabase, workflowId), [supabase, workflowId]);
  const snapshot = useSyncExternalStore(store.subscribe, store.snapshot, () => EMPTY);
  useEffect(() => onProblem && store.onProblem(onProblem), [store, onProblem]);
  return { ...snapshot, actions: store };
}
