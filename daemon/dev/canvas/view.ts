/** What is seen of the canvas: finds a place for a new node, and moves the view to it where it must. */
import { useCallback } from "react";
import type { RefObject } from "react";
import { useReactFlow } from "@xyflow/react";
import type { ImageFlowNode } from "./ImageNode";
import type { Position } from "./nodes";
import { NODE_SIZE, contains, placeBeside, placeNear } from "./places";
import type { Box } from "./places";

/** Milliseconds. */
const DURATION = 240;
/** Below that zoom text is not readable. */
export const FAR_ZOOM = 0.36;
/** Pixels around a node that is shown. */
const MARGIN = 12;

export function moveDuration(): number {
  return matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : DURATION;
}

export function boxOf(node: ImageFlowNode): Box {
  const { width = NODE_SIZE.width, height = NODE_SIZE.height } = node.measured ?? {};
  return { ...node.position, width, height };
}

export function useView(pane: RefObject<HTMLElement | null>) {
  const flow = useReactFlow<ImageFlowNode>();

  /** Returns where a new node goes: beside the selected one, else in the middle of the view, over no other. */
  const findPlace = useCallback((wanted?: Position): Position => {
    const nodes = flow.getNodes();
    const boxes = nodes.map(boxOf);
    if (wanted) return placeNear(wanted, boxes);
    const selected = nodes.findLast(node => node.selected);
    if (selected) return placeBeside(boxOf(selected), boxes);
    const box = pane.current?.getBoundingClientRect() ?? new DOMRect(0, 0, innerWidth, innerHeight);
    const middle = flow.screenToFlowPosition({ x: box.x + box.width / 2, y: box.y + box.height / 2 });
    return placeNear({ x: middle.x - NODE_SIZE.width / 2, y: middle.y - NODE_SIZE.height / 2 }, boxes);
  }, [flow, pane]);

  /** Moves the view so that a place is seen, no further than it must; from far away it zooms in, so that text is readable. */
  const reveal = useCallback((place: Position) => {
    const box = pane.current?.getBoundingClientRect();
    if (!box) return;
    const { x, y, zoom } = flow.getViewport();
    if (zoom < FAR_ZOOM) {
      void flow.setCenter(place.x + NODE_SIZE.width / 2, place.y + NODE_SIZE.height / 2, { zoom: 1, duration: moveDuration() });
      return;
    }
    const seen = { x: MARGIN, y: MARGIN, width: box.width - 2 * MARGIN, height: box.height - 2 * MARGIN };
    const node = { x: place.x * zoom + x, y: place.y * zoom + y, width: NODE_SIZE.width * zoom, height: NODE_SIZE.height * zoom };
    if (contains(seen, node)) return;
    const shift = (at: number, size: number, start: number, room: number) =>
      size > room ? start + (room - size) / 2 - at : Math.max(start - at, Math.min(0, start + room - size - at));
    void flow.setViewport({
      x: x + shift(node.x, node.width, seen.x, seen.width),
      y: y + shift(node.y, node.height, seen.y, seen.height),
      zoom,
    }, { duration: moveDuration() });
  }, [flow, pane]);

  return { findPlace, reveal };
}
