/** The toolbar at the bottom: what can be added, and what can be done with the nodes that are selected. */
import { useEffect, useState } from "react";
import type { RefObject } from "react";
import { useStoreApi } from "@xyflow/react";
import { Icon } from "./Icon";

/** Milliseconds that a finger rests on a node to select it with others; pixels that it may move meanwhile. */
const LONG_PRESS = 500, MAX_SHIFT = 10;

interface Props {
  selected: number;
  /** Whether a tap selects with others. */
  selecting: boolean;
  onSelecting: (selecting: boolean) => void;
  onPicture: () => void;
  /** Undefined where not exactly one node is selected. */
  onRefine: (() => void) | undefined;
  onConnect: (() => void) | undefined;
  /** Whether an edge was begun, and waits for its other end. */
  connecting: boolean;
  onDelete: () => void;
  onDone: () => void;
}

export function Toolbar({ selected, selecting, onSelecting, connecting, onPicture, onRefine, onConnect, onDelete, onDone }: Props) {
  const isIdle = selected === 0 && !selecting && !connecting;
  return (
    <footer className="bar">
      <p className="keys" aria-hidden="true">
        <span><kbd>N</kbd> new</span>
        <span><kbd>R</kbd> refine</span>
        <span><kbd>{/Mac/.test(navigator.userAgent) ? "⌘" : "Ctrl"}</kbd> <kbd>↵</kbd> generate</span>
        <span><kbd>Del</kbd> delete</span>
      </p>
      <div role="toolbar" aria-label="Tools">
        {isIdle && (
          <>
            <button className="button" onClick={onPicture} title="Start from a picture of yours; it can also be dropped or pasted here">
              <Icon name="picture" />Add a picture
            </button>
            <button className="button bar-touch" onClick={() => onSelecting(true)}>Select</button>
          </>
        )}
        {!isIdle && !connecting && (
          <>
            {onRefine && (
              <button className="button" onClick={onRefine} title="A new picture that starts from this one (R)">
                <Icon name="refine" />Refine
              </button>
            )}
            {onConnect && (
              <button className="button" onClick={onConnect} title="Have another picture start from this one (C)">Connect</button>
            )}
            {selected === 1 && !selecting && <button className="button bar-touch" onClick={() => onSelecting(true)}>More</button>}
            <button className="button" onClick={onDelete} disabled={selected === 0} title="Delete (Del)">
              <Icon path="M3 4.6h10M6.4 4.6V3h3.2v1.6M4.4 4.6l.6 8.4h6l.6-8.4M6.8 7.2v3.4M9.2 7.2v3.4" />Delete
            </button>
          </>
        )}
        {!isIdle && <button className="button" onClick={onDone}>{connecting ? "Cancel" : "Done"}</button>}
      </div>
      <p className="bar-count" role="status" data-alone={selected === 1 && !selecting && !connecting}>
        {connecting ? "Which one starts from it? Choose it, or Tab to it and press Enter."
          : isIdle ? "" : selected === 0 ? "Tap what you want to select." : `${selected} selected`}
      </p>
    </footer>
  );
}

/** Whether a tap on a node selects it with others: a mode, which a long press on a node begins, too. */
export function useSelecting(pane: RefObject<HTMLElement | null>, select: (id: string) => void) {
  const [selecting, setSelecting] = useState(false);
  const store = useStoreApi();
  useEffect(() => store.setState({ multiSelectionActive: selecting }), [store, selecting]);
  useEffect(() => {
    const element = pane.current;
    if (!element) return;
    let pressed: { id: string; x: number; y: number; timer: ReturnType<typeof setTimeout> } | undefined;
    let wasLong = false;
    const end = () => {
      clearTimeout(pressed?.timer);
      pressed = undefined;
    };
    const onDown = (event: PointerEvent) => {
      end();
      wasLong = false;
      const id = (event.target as Element).closest<HTMLElement>(".react-flow__node")?.dataset["id"];
      if (!id || event.pointerType !== "touch" || !event.isPrimary || (event.target as Element).closest("textarea, input, select")) return;
      const timer = setTimeout(() => {
        wasLong = true;
        setSelecting(true);
        select(id);
        navigator.vibrate?.(10);
      }, LONG_PRESS);
      pressed = { id, x: event.clientX, y: event.clientY, timer };
    };
    const onMove = ({ clientX, clientY }: PointerEvent) => {
      if (pressed && Math.hypot(clientX - pressed.x, clientY - pressed.y) > MAX_SHIFT) end();
    };
    const onClick = (event: MouseEvent) => {
      if (wasLong) event.stopPropagation(); // the tap that ends the press would deselect
      wasLong = false;
    };
    const listeners = { click: onClick, pointerdown: onDown, pointermove: onMove, pointerup: end, pointercancel: end };
    const entries = Object.entries(listeners) as [string, EventListener][];
    entries.forEach(([name, listener]) => element.addEventListener(name, listener, true));
    return () => {
      end();
      entries.forEach(([name, listener]) => element.removeEventListener(name, listener, true));
    };
  }, [pane, select]);
  return [selecting, setSelecting] as const;
}
