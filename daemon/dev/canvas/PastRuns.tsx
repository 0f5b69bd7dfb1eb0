/** The pictures that a node has had, as a row of thumbnails, newest first. */
import type { PastRun } from "./history";

export function PastRuns({ runs, viewed, onView, onFailure }: {
  runs: readonly PastRun[]; viewed: string | undefined; onView: (runId: string) => void; onFailure: (url: string) => void;
}) {
  return (
    <ol className="past" aria-label="Pictures of this node, newest first">
      {runs.map(({ id, isShown, finishedAt, promptSpec, payload: { thumbnailUrl, imageUrl } }) => {
        const url = thumbnailUrl ?? imageUrl;
        const name = `${formatTime(finishedAt)}: ${promptSpec.basePrompt}`;
        return (
          <li key={id}>
            <button
              aria-label={isShown ? `${name} (on the canvas)` : name} aria-current={id === viewed} title={name} onClick={() => onView(id)}
            >
              {url && <img src={url} alt="" decoding="async" onError={() => onFailure(url)} />}
              {isShown && <i aria-hidden="true" />}
            </button>
          </li>
        );
      })}
    </ol>
  );
}

/** Of today the time alone. */
export function formatTime(instant: string): string {
  const time = new Date(instant);
  const isToday = time.toDateString() === new Date().toDateString();
  return isToday ? time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : time.toLocaleString([], { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}
