/** What somebody should notice wherever they look: failures, and the way back from a deletion. */
import { useCallback, useEffect, useRef, useState } from "react";
import { Icon } from "./ImageNode";

export interface Toast {
  id: number;
  tone: "bad" | "plain";
  message: string;
  hint?: string;
  nodeId?: string;
  action?: { label: string; run: () => void };
}

const STAY = 9_000, AT_ONCE = 3;

export function useToasts() {
  const [toasts, setToasts] = useState<Toast[]>([]);
  const next = useRef(1);
  const say = useCallback((toast: Omit<Toast, "id">) => {
    setToasts(now => [...now.filter(each => each.nodeId === undefined || each.nodeId !== toast.nodeId), { ...toast, id: next.current++ }]);
  }, []);
  const dismiss = useCallback((id: number) => setToasts(now => now.filter(each => each.id !== id)), []);
  return { toasts, say, dismiss };
}

export function Toasts({ toasts, dismiss, show }: {
  toasts: Toast[]; dismiss: (id: number) => void; show: (nodeId: string) => void;
}) {
  const hidden = toasts.length - AT_ONCE;
  return (
    <section className="toasts" aria-label="Notifications" aria-live="polite">
      {hidden > 0 && <p className="toasts-more">and {hidden} more</p>}
      {toasts.slice(-AT_ONCE).map(toast => <One key={toast.id} toast={toast} dismiss={dismiss} show={show} />)}
    </section>
  );
}

function One({ toast, dismiss, show }: { toast: Toast; dismiss: (id: number) => void; show: (nodeId: string) => void }) {
  const [held, setHeld] = useState(false);
  const { id, nodeId, action } = toast;
  useEffect(() => {
    if (held) return;
    const gone = setTimeout(() => dismiss(id), STAY);
    return () => clearTimeout(gone);
  }, [held, id, dismiss]);
  const and = (what: () => void) => () => {
    what();
    dismiss(id);
  };
  return (
    <div className="toast" data-tone={toast.tone} onMouseEnter={() => setHeld(true)} onMouseLeave={() => setHeld(false)}>
      <div>
        <p>{toast.message}</p>
        {toast.hint && <p>{toast.hint}</p>}
      </div>
      {action && <button onClick={and(action.run)}>{action.label}</button>}
      {nodeId && !action && <button onClick={and(() => show(nodeId))}>Show</button>}
      <button onClick={() => dismiss(id)} aria-label="Dismiss"><Icon path="m4.5 4.5 7 7M11.5 4.5l-7 7" /></button>
    </div>
  );
}
