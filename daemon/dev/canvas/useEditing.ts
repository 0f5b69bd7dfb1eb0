/** The edits of the canvas that a desktop knows: undo, redo, copy, cut, paste, duplicate, select all. */
import { useCallback, useEffect, useMemo } from "react";
import { useReactFlow } from "@xyflow/react";
import { fromText, toText } from "./clipboard";
import type { CopiedNode } from "./clipboard";
import type { ImageFlowNode } from "./ImageNode";
import type { Actions, Position, WorkflowNode } from "./nodes";
import { NODE_SIZE, findShift } from "./places";
import { copiesOf, undoable } from "./undo";
import type { NewToast } from "./Toasts";
import type { UndoableActions } from "./undo";
import { FAR_ZOOM, boxOf } from "./view";

const NOWHERE = { x: 0, y: 0 };
const STAYS = "A picture of your own stays here: what is cut, or copied, is pasted without it.";
const FIELDS = "input, textarea, select, dialog, [popover], [contenteditable]";

/** Returns the store's actions with a memory. */
export function useUndo(actions: Actions): UndoableActions {
  return useMemo(() => undoable(actions), [actions]);
}

interface Options {
  actions: UndoableActions;
  /** Whether the canvas is in front, and may be changed. */
  isActive: boolean;
  /** Deletes nodes, and says so. */
  remove: (rows: WorkflowNode[]) => void;
  setNodes: (change: (now: ImageFlowNode[]) => ImageFlowNode[]) => void;
  addToast: (toast: NewToast) => void;
  /** Moves the view to a place, if it must. */
  reveal: (place: Position) => void;
}

/** Listens to the keys and to the clipboard. In a field the browser's own behaviour stays. */
export function useEditing({ actions, isActive, remove, setNodes, addToast, reveal }: Options): void {
  const flow = useReactFlow<ImageFlowNode>();
  /** As they are now: what was typed last may not be rendered yet. */
  const selected = useCallback(() => flow.getNodes().filter(node => node.selected)
    .flatMap(node => actions.now(node.id) ?? []), [flow, actions]);

  const insert = useCallback((copies: readonly CopiedNode[], wanted = NOWHERE) => {
    // An edge between two copies leads from copy to copy; one from elsewhere stays if its source is on this canvas.
    const ids = new Map<string, string>();
    const known = new Set(flow.getNodes().map(node => node.id));
    const places = copies.map(({ position: { x, y } }) => ({ x: x + wanted.x, y: y + wanted.y }));
    const shift = findShift(places, flow.getNodes().map(boxOf));
    copies.forEach(({ id, input: { source: _, ...input } }, index) => {
      const { x, y } = places[index]!;
      ids.set(id, actions.add(input, { x: x + shift.x, y: y + shift.y }));
    });
    if (places[0] && (places.length === 1 || flow.getZoom() >= FAR_ZOOM)) reveal({ x: places[0].x + shift.x, y: places[0].y + shift.y });
    for (const { id, input: { source } } of copies) {
      const from = source ? (ids.get(source) ?? (known.has(source) ? source : undefined)) : undefined;
      if (from) actions.edit(ids.get(id)!, { source: from });
    }
    const added = new Set(ids.values());
    // They are rendered a frame later.
    requestAnimationFrame(() => requestAnimationFrame(() => setNodes(now => now.map(node =>
      (Boolean(node.selected) === added.has(node.id) ? node : { ...node, selected: added.has(node.id) })))));
  }, [flow, actions, setNodes, reveal]);

  useEffect(() => {
    if (!isActive) return;
    // The field of an empty canvas has the focus by itself: while nothing is in it, the keys are meant for the canvas.
    const isField = ({ target }: Event) => target instanceof Element && target.closest(FIELDS) !== null
      && !(target instanceof HTMLInputElement && target.value === "" && target.closest(".first"));
    const onKey = (event: KeyboardEvent) => {
      if (!(event.ctrlKey || event.metaKey) || event.altKey || isField(event)) return;
      const key = event.key.toLowerCase();
      const run = key === "z" ? (event.shiftKey ? actions.redo : actions.undo)
        : key === "y" && !event.shiftKey ? actions.redo
        : key === "a" && !event.shiftKey ? () => setNodes(now => now.map(node => (node.selected ? node : { ...node, selected: true })))
        : key === "d" && !event.shiftKey ? () => insert(copiesOf(selected()))
        : undefined;
      if (!run) return;
      event.preventDefault();
      run();
    };
    const onCopy = (event: ClipboardEvent) => {
      const rows = selected();
      // Text that is marked, an error for example, is what the user wants to copy.
      if (isField(event) || rows.length === 0 || getSelection()?.isCollapsed === false) return;
      event.preventDefault();
      event.clipboardData?.setData("text/plain", toText(rows));
      if (event.type !== "cut") return;
      const drawn = rows.filter(row => !row.node_data.upload);
      remove(drawn);
      if (drawn.length < rows.length) addToast({ tone: "plain", message: STAYS, hint: "Delete removes it." });
    };
    const onPaste = (event: ClipboardEvent) => {
      if (isField(event)) return;
      try {
        const copies = fromText(event.clipboardData?.getData("text/plain") ?? "");
        if (!copies) return;
        event.preventDefault();
        insert(copies, shiftIntoView(copies, flow));
      } catch (error) {
        addToast({ tone: "bad", message: (error as Error).message });
      }
    };
    window.addEventListener("keydown", onKey);
    document.addEventListener("copy", onCopy);
    document.addEventListener("cut", onCopy);
    document.addEventListener("paste", onPaste);
    return () => {
      window.removeEventListener("keydown", onKey);
      document.removeEventListener("copy", onCopy);
      document.removeEventListener("cut", onCopy);
      document.removeEventListener("paste", onPaste);
    };
  }, [isActive, actions, flow, insert, remove, selected, setNodes, addToast]);
}

/** Returns how far copies are moved to be seen: not at all if their originals are, else into the middle. */
function shiftIntoView(copies: readonly CopiedNode[], flow: ReturnType<typeof useReactFlow<ImageFlowNode>>): Position {
  const pane = document.querySelector(".react-flow")?.getBoundingClientRect() ?? new DOMRect(0, 0, innerWidth, innerHeight);
  const middle = flow.screenToFlowPosition({ x: pane.x + pane.width / 2, y: pane.y + pane.height / 2 });
  const left = Math.min(...copies.map(({ position }) => position.x)), top = Math.min(...copies.map(({ position }) => position.y));
  const known = new Set(flow.getNodes().map(node => node.id));
  const corner = flow.flowToScreenPosition({ x: left, y: top });
  const isSeen = copies.some(({ id }) => known.has(id))
    && corner.x > pane.left && corner.x < pane.right && corner.y > pane.top && corner.y < pane.bottom;
  return isSeen ? NOWHERE : { x: Math.round(middle.x - left - NODE_SIZE.width / 2), y: Math.round(middle.y - top - NODE_SIZE.height / 2) };
}
