/** Notifications: failures, and Undo after a deletion. */
import { useCallback, useEffect, useRef, useState } from "react";
import { Icon } from "./Icon";

export interface Toast {
  id: number;
  tone: "bad" | "plain";
  message: string;
  hint?: string;
  nodeId?: string;
  action?: { label: string; run: () => void };
}

/** Milliseconds. */
const DURATION = 9_000;
const MAX_VISIBLE = 3;

export function useToasts() {
  const [toasts, setToasts] = useState<Toast[]>([]);
  const next = useRef(1);
  const addToast = useCallback((toast: Omit<Toast, "id">) => {
    setToasts(now => [...now.filter(each => each.nodeId === undefined || each.nodeId !== toast.nodeId), { ...toast, id: next.current++ }]);
  }, []);
  const dismiss = useCallback((id: number) => setToasts(now => now.filter(each => each.id !== id)), []);
  return { toasts, addToast, dismiss };
}

export function Toasts({ toasts, dismiss, show }: {
  toasts: Toast[]; dismiss: (id: number) => void; show: (nodeId: string) => void;
}) {
  const hidden = toasts.length - MAX_VISIBLE;
  return (
    <section className="toasts" aria-label="Notifications" aria-live="polite">
      {hidden > 0 && <p className="toasts-more">and {hidden} more</p>}
      {toasts.slice(-MAX_VISIBLE).map(toast => <ToastItem key={toast.id} toast={toast} dismiss={dismiss} show={show} />)}
    </section>
  );
}

function ToastItem({ toast, dismiss, show }: { toast: Toast; dismiss: (id: number) => void; show: (nodeId: string) => void }) {
  const [hovered, setHovered] = useState(false);
  const { id, nodeId, action } = toast;
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
    <div className="toast" data-tone={toast.tone} onMouseEnter={() => setHovered(true)} onMouseLeave={() => setHovered(false)}>
      <div>
        <p>{toast.message}</p>
        {toast.hint && <p>{toast.hint}</p>}
      </div>
      {action && <button onClick={thenDismiss(action.run)}>{action.label}</button>}
      {nodeId && !action && <button onClick={thenDismiss(() => show(nodeId))}>Show</button>}
      <button onClick={() => dismiss(id)} aria-label="Dismiss"><Icon path="m4.5 4.5 7 7M11.5 4.5l-7 7" /></button>
    </div>
  );
}
