/** The seconds of this computer's clock, as a store: rendering itself reads no time, and one timer is enough for all nodes. */

const listeners = new Set<() => void>();
let timer: ReturnType<typeof setInterval> | undefined;

/** Seconds since 1970. */
export function readSeconds(): number {
  return Math.round(Date.now() / 1000);
}

export function subscribeToSeconds(onTick: () => void): () => void {
  listeners.add(onTick);
  timer ??= setInterval(() => listeners.forEach(call => call()), 1000);
  return () => {
    listeners.delete(onTick);
    if (listeners.size > 0) return;
    clearInterval(timer);
    timer = undefined;
  };
}
