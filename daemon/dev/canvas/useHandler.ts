/** Handlers that stay the same function from rendering to rendering. */
import { useCallback, useInsertionEffect, useRef } from "react";

/**
 * Returns a function that does what `handler` of the last rendering does. React Flow hands its properties down to each node:
 * one that changes renders all of them again.
 */
export function useHandler<Parameters extends unknown[], Result>(
  handler: (...parameters: Parameters) => Result,
): (...parameters: Parameters) => Result {
  const latest = useRef(handler);
  useInsertionEffect(() => {
    latest.current = handler;
  });
  return useCallback((...parameters) => latest.current(...parameters), []);
}
