/** The edges of the canvas: one for each node that starts from another one's picture. */
import { useCallback, useMemo, useState } from "react";
import type { Edge, EdgeChange } from "@xyflow/react";
import { isUnfinished, isWaiting } from "./nodes";
import type { WorkflowNode } from "./nodes";

/** Derives one edge from each node with a source; only the selection is state. */
export function useEdges(rows: readonly WorkflowNode[]): [Edge[], (changes: EdgeChange[]) => void] {
  const [selected, setSelected] = useState<ReadonlySet<string>>(new Set());
  const edges = useMemo(() => {
    const names = new Map(rows.map(row => [row.id, nameOf(row)]));
    return rows.flatMap(row => {
      const { source } = row.node_data;
      const name = source ? names.get(source) : undefined;
      if (!source || name === undefined) return [];
      const id = `${source} ${row.id}`;
      return [{
        id, source, target: row.id, animated: isUnfinished(row) || isWaiting(row), selected: selected.has(id),
        ariaLabel: `${names.get(row.id)} starts from ${name}`,
      }];
    });
  }, [rows, selected]);
  const onChange = useCallback((changes: EdgeChange[]) => setSelected(before => {
    const after = new Set(before);
    for (const change of changes) {
      if (change.type === "select" && change.selected) after.add(change.id);
      else if (change.type === "select" || change.type === "remove") after.delete(change.id);
    }
    return after;
  }), []);
  return [edges, onChange];
}

/** What a node is called in a sentence. */
function nameOf({ node_data: { promptSpec, upload } }: WorkflowNode): string {
  const name = upload?.name ?? promptSpec?.basePrompt.trim() ?? "";
  return name === "" ? "A new picture" : name.length > 60 ? `${name.slice(0, 60)} …` : name;
}

/** Whether `from` is an ancestor of `to`, or is `to`: such an edge would make a cycle. */
export function isReachable(rows: readonly WorkflowNode[], from: string, to: string): boolean {
  const source = new Map(rows.map(row => [row.id, row.node_data.source]));
  for (let at: string | null | undefined = to; at; at = source.get(at)) if (at === from) return true;
  return false;
}
