/** The edges of the canvas: one for each node that starts from another one's picture. */
import { useCallback, useEffect, useMemo, useRef, useState } from "react";
import type { Edge, EdgeChange } from "@xyflow/react";
import { isUnfinished, isWaiting } from "./nodes";
import type { WorkflowNode } from "./nodes";

type DerivedEdge = Pick<Edge, "id" | "source" | "target"> & { animated: boolean; selected: boolean; ariaLabel: string };

/** Derives one edge from each node with a source; only the selection is state. */
export function useEdges(rows: readonly WorkflowNode[]): [Edge[], (changes: EdgeChange[]) => void] {
  const [selected, setSelected] = useState<ReadonlySet<string>>(new Set());
  /** An edge that has not changed keeps its object, and is not rendered again; so do all of them. */
  const last = useRef<DerivedEdge[]>([]);
  const edges = useMemo(() => {
    const known = new Map(last.current.map(edge => [edge.id, edge]));
    const names = new Map(rows.map(row => [row.id, nameOf(row)]));
    const next = rows.flatMap(row => {
      const { source } = row.node_data;
      const name = source ? names.get(source) : undefined;
      if (!source || name === undefined) return [];
      const id = `${source} ${row.id}`;
      const edge = {
        id, source, target: row.id, animated: isUnfinished(row) || isWaiting(row), selected: selected.has(id),
        ariaLabel: `${names.get(row.id)} starts from ${name}`,
      };
      const before = known.get(id);
      return [before && isSame(before, edge) ? before : edge];
    });
    return next.length === known.size && next.every((edge, index) => edge === last.current[index]) ? last.current : next;
  }, [rows, selected]);
  useEffect(() => {
    last.current = edges;
  }, [edges]);
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

function isSame(one: DerivedEdge, other: DerivedEdge): boolean {
  return (["animated", "selected", "ariaLabel"] as const).every(key => one[key] === other[key]);
}
