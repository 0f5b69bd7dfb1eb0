/** The minimap: there while some node is out of sight, in a corner where it covers no button. */
import { useCallback, useEffect, useRef, useState } from "react";
import { MiniMap, useOnViewportChange, useReactFlow } from "@xyflow/react";
import type { ImageFlowNode } from "./ImageNode";
import { findCorner } from "./corners";
import type { Corner } from "./corners";
import { hasImage } from "./nodes";
import { boxOf } from "./view";
import { contains } from "./places";

/** React Flow's, in pixels. */
const SIZE = { width: 200, height: 150 }, MARGIN = 15;
const MIN_NODES = 9;
/** Milliseconds between two looks while nodes change: each measures all buttons. */
const PAUSE = 300;

export function Overview({ nodes }: { nodes: readonly ImageFlowNode[] }) {
  const flow = useReactFlow<ImageFlowNode>();
  const [corner, setCorner] = useState<Corner>();
  const look = useCallback(() => {
    const pane = document.querySelector(".pane")?.getBoundingClientRect();
    if (!pane || flow.getNodes().length < MIN_NODES) return;
    const { x, y, zoom } = flow.getViewport();
    const seen = { x: -x / zoom, y: -y / zoom, width: pane.width / zoom, height: pane.height / zoom };
    if (flow.getNodes().every(node => contains(seen, boxOf(node)))) return setCorner(undefined);
    const { corner, covered } = findCorner(SIZE, pane, MARGIN);
    setCorner(covered > 0 ? undefined : corner);
  }, [flow]);
  useOnViewportChange({ onEnd: look });
  const timer = useRef<ReturnType<typeof setTimeout>>(undefined);
  useEffect(() => {
    timer.current ??= setTimeout(() => {
      timer.current = undefined;
      look();
    }, PAUSE);
  }, [nodes, look]);
  useEffect(() => () => {
    clearTimeout(timer.current);
    timer.current = undefined;
  }, []);
  useEffect(() => {
    addEventListener("resize", look);
    return () => removeEventListener("resize", look);
  }, [look]);
  if (nodes.length < MIN_NODES || !corner) return null;
  return <MiniMap<ImageFlowNode> position={corner} pannable zoomable nodeColor={color} nodeBorderRadius={40} ariaLabel="Overview" />;
}

function color({ data }: ImageFlowNode): string {
  const { status } = data.row.node_data;
  return status === "error" ? "var(--bad)" : status === "running" ? "var(--accent)" : status === "pending" ? "var(--wait)"
    : hasImage(data.row) ? "var(--good)" : "var(--faint)";
}
