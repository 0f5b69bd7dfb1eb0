/** Notifications: failures, and Undo after a deletion. They lie where they cover no button, if there is such a place. */
import { useCallback, useEffect, useLayoutEffect, useRef, useState } from "react";
import { Icon } from "./Icon";
import { findCorner } from "./corners";
import type { Corner } from "./corners";

export interface Toast {
  id: number;
  tone: "bad" | "plain";
  message: string;
  hint?: string;
  nodeId?: string;
  action?: { label: string; run: () => void };
  /** How many times the same was said. */
  count: number;
}

export type NewToast = Omit<Toast, "id" | "count">;

/** Milliseconds. */
const DURATION = 9_000;
const MAX_VISIBLE = 3;
/** Pixels to the edges of the canvas. */
const MARGIN = 12;

export function useToasts() {
  const [toasts, setToasts] = useState<Toast[]>([]);
  const next = useRef(1);
  const addToast = useCallback((toast: NewToast) => {
    setToasts(now => {
      const same = now.find(each => isSame(each, toast));
      const others = now.filter(each => each !== same && (each.nodeId === undefined || each.nodeId !== toast.nodeId));
      return [...others, { ...toast, id: next.current++, count: (same?.count ?? 0) + 1 }];
    });
  }, []);
  const dismiss = useCallback((id: number) => setToasts(now => now.filter(each => each.id !== id)), []);
  return { toasts, addToast, dismiss };
}

/** Whether a toast says what another does; each Undo is of its own. */
function isSame(toast: Toast, other: NewToast): boolean {
  return !toast.action && !other.action && toast.tone === other.tone && toast.message === other.message && toast.hint === other.hint;
}

export function Toasts({ toasts, dismiss, show }: {
  toasts: Toast[]; dismiss: (id: number) => void; show: (nodeId: string) => void;
}) {
  const section = useRef<HTMLElement>(null);
  const [corner, setCorner] = useState<Corner>("bottom-right");
  const hidden = toasts.length - MAX_VISIBLE;
  useLayoutEffect(() => {
    const settle = () => {
      const pane = document.querySelector(".pane")?.getBoundingClientRect();
      if (!section.current || !pane || toasts.length === 0) return;
      const { width, height } = section.current.getBoundingClientRect();
      setCorner(findCorner({ width, height }, pane, MARGIN, ".react-flow__minimap").corner);
    };
    settle();
    addEventListener("resize", settle);
    return () => removeEventListener("resize", settle);
  }, [toasts]);
  return (
    <section className="toasts" aria-label="Notifications" aria-live="polite" ref={section} data-corner={corner}>
      {hidden > 0 && <p className="toasts-more">and {hidden} more</p>}
      {toasts.slice(-MAX_VISIBLE).map(toast => <ToastItem key={toast.id} toast={toast} dismiss={dismiss} show={show} />)}
    </section>
  );
}

function ToastItem({ toast, dismiss, show }: { toast: Toast; dismiss: (id: number) => void; show: (nodeId: string) => void }) {
  const [hovered, setHovered] = useState(false);
  const { id, nodeId, action, count } = toast;
  useEffect(() => {
    if (hovered) return;
    const timer = setTimeout(() => dismiss(id), DURATION);
    return () => clearTimeout(timer);
  }, [hovered, id, dismiss]);
  const thenDismiss = (run: () => void) => () => {
    run();
    dismiss(id);
  };
  return (
    <div
      className="toast" data-tone={toast.tone} onMouseEnter={() => setHovered(true)} onMouseLeave={() => setHovered(false)}
      onFocus={() => setHovered(true)} onBlur={() => setHovered(false)}
    >
      <div>
        <p dir="auto">{count > 1 && <b className="toast-count">{count} ×</b>}{toast.message}</p>
        {toast.hint && <p dir="auto">{toast.hint}</p>}
      </div>
      {action && <button onClick={thenDismiss(action.run)}>{action.label}</button>}
      {nodeId && !action && <button onClick={thenDismiss(() => show(nodeId))}>Show</button>}
      <button onClick={() => dismiss(id)} aria-label="Dismiss"><Icon path="m4.5 4.5 7 7M11.5 4.5l-7 7" /></button>
    </div>
  );
}
