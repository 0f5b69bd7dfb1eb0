/** How long a run is in line or under way, beside what is usual. Copy this file with ImageNode.tsx. */
import { useSyncExternalStore } from "react";
import { readSeconds, subscribeToSeconds } from "./seconds";

export function Elapsed({ since, typical, isRunning }: {
  /** Milliseconds since 1970, by this computer's clock. */
  since: number;
  /** Seconds. */
  typical: number | null | undefined;
  isRunning: boolean;
}) {
  const now = useSyncExternalStore(subscribeToSeconds, readSeconds, () => undefined);
  if (now === undefined) return null;
  const seconds = Math.max(0, now - Math.round(since / 1000));
  if (!isRunning) return `${formatDuration(seconds)} in line`;
  if (!typical) return formatDuration(seconds);
  const usual = formatDuration(Math.max(1, Math.round(typical)));
  return seconds <= typical ? `${formatDuration(seconds)} of about ${usual}` : `${formatDuration(seconds)}, usually ${usual}`;
}

/** "12 s", "2 min 5 s", "1 h 4 min". */
export function formatDuration(seconds: number): string {
  const [hours, minutes, rest] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  if (hours > 0) return `${hours} h ${minutes} min`;
  return minutes > 0 ? `${minutes} min ${rest} s` : `${rest} s`;
}
