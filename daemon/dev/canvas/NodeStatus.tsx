/** What a node says of its run: the label on its picture, and the note below. Copy this file with ImageNode.tsx. */
import { useState, useSyncExternalStore } from "react";
import { hasImage } from "./nodes";
import type { WorkflowNode } from "./nodes";
import { readSeconds, subscribeToSeconds } from "./seconds";

export function Status({ row, waiting }: { row: WorkflowNode; waiting: boolean }) {
  const { status, progress, message } = row.node_data;
  const activity = message === undefined ? "Starting" : isLong(message) ? "In the making" : message.replace(/\.$/, "");
  const text = row.isKept ? "Starts once the server is back"
    : waiting ? "Waits for its image"
    : status === "pending" ? (message || row.waitsFor ? "Held up" : "In line")
    : status === "running" ? `${activity}${progress ? ` · ${progress}%` : ""}`
    : status === "error" ? "Failed"
    : status === "cancelled" ? "Cancelled"
    : undefined;
  if (!text) return <span className="image-node-unseen" role="status">{hasImage(row) ? "Ready" : "Not generated yet"}</span>;
  const reason = status === "pending" && !waiting ? (reasonOf(row) ?? message) : undefined; // the note's, for who hears the page
  return (
    <span className="image-node-status" role="status">
      <i /><span>{text}</span>{reason && <span className="image-node-unseen">: {reason}</span>}
    </span>
  );
}

/** Whether a message is too long for the label on the picture. */
function isLong(message: string): boolean {
  return message.length > 28;
}

/** The reason why a run waits, a long message, or the error and its hint. */
export function Note({ row }: { row: WorkflowNode }) {
  const { status, message, error } = row.node_data;
  if (status === "error") {
    return (
      <div className="image-node-note" data-tone="error">
        <CollapsibleText key={row.node_data.runId} text={error ?? "It failed."} />
        {message && <p className="image-node-hint">{message}</p>}
        {row.asked === "other" && (
          <p className="image-node-hint">
            {row.askedPrompt ? <>That was for <q dir="auto">{row.askedPrompt}</q>.</> : "That was with other settings, or another source."}
          </p>
        )}
      </div>
    );
  }
  const reason = status === "pending" ? reasonOf(row) : undefined;
  if (reason) {
    return <div className="image-node-note" data-tone="wait"><CollapsibleText text={reason} /></div>;
  }
  if (status === "pending" && message) {
    return <div className="image-node-note" data-tone="wait"><p><Countdown key={row.version} sentence={message} since={row.saidAt} /></p></div>;
  }
  if (status === "running" && message && isLong(message)) {
    return <div className="image-node-note" data-tone="run"><CollapsibleText text={message} /></div>;
  }
  return null;
}

/** Text that is cut when it is long: some providers write a page. */
function CollapsibleText({ text }: { text: string }) {
  const [expanded, setExpanded] = useState(false);
  if (text.length < 180) return <p dir="auto">{text}</p>;
  return (
    <>
      <p dir="auto" data-cut={!expanded}>{text}</p>
      <button className="image-node-more nodrag" onClick={() => setExpanded(!expanded)}>{expanded ? "Show less" : "Show all"}</button>
    </>
  );
}

/** "… again in 12 s.", counting down from the time of the message. */
function Countdown({ sentence, since }: {
  sentence: string;
  /** Milliseconds since 1970, by this computer's clock. */
  since: number | undefined;
}) {
  const [, seconds] = /in (\d+) s\.?$/.exec(sentence) ?? [];
  const now = useSyncExternalStore(subscribeToSeconds, readSeconds, () => undefined);
  if (seconds === undefined) return sentence;
  const passed = since && now ? now - Math.round(since / 1000) : 0;
  const left = Number(seconds) - Math.max(0, passed);
  return sentence.replace(/in \d+ s\.?$/, left > 0 ? `in ${left} s.` : "now.");
}

/** Why a run waits, and until when. */
function reasonOf({ waitsFor, waitsUntil }: WorkflowNode): string | undefined {
  if (!waitsFor || !waitsUntil) return waitsFor;
  const until = new Date(waitsUntil), time = { hour: "2-digit", minute: "2-digit" } as const;
  const isToday = until.toDateString() === new Date().toDateString();
  return `${waitsFor} Until ${isToday ? until.toLocaleTimeString([], time) : until.toLocaleString([], { day: "numeric", month: "short", ...time })}.`;
}
