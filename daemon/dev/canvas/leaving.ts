/** Has the browser ask before a page is left that has work which nobody else has. */
import { useEffect } from "react";

/** Changes that a page still sends while it is left: of more of them, or of an upload, nobody knows whether they arrive. */
const MAX_FLUSHED = 5;

export function useLeaveGuard(unsent: number, isLive: boolean, isUploading: boolean): void {
  const isNeeded = isUploading || unsent > (isLive ? MAX_FLUSHED : 0);
  useEffect(() => {
    if (!isNeeded) return;
    const ask = (event: BeforeUnloadEvent) => event.preventDefault();
    addEventListener("beforeunload", ask);
    return () => removeEventListener("beforeunload", ask);
  }, [isNeeded]);
}
