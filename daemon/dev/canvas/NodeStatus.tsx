/** What a node says of its run: the label on its picture, and the note below. Copy this file with ImageNode.tsx. */
import { useState, useSyncExternalStore } from "react";
import { hasImage } from "./nodes";
import type { WorkflowNode } from "./nodes";

export function Status({ row, waiting }: { row: WorkflowNode; waiting: boolean }) {
  const { status, progress, message } = row.node_data;
  const activity = message === undefined ? "Starting" : isLong(message) ? "In the making" : message.replace(/\.$/, "");
  const text = waiting ? "Waits for its image"
    : status === "pending" ? (message || row.waitsFor ? "Held up" : "In line")
    : status === "running" ? `${activity}${progress ? ` · ${progress}%` : ""}`
    : status === "error" ? "Failed"
    : status === "cancelled" ? "Cancelled"
    : undefined;
  if (!text) return <span className="image-node-unseen" role="status">{hasImage(row) ? "Ready" : "Not generated yet"}</span>;
  const reason = status === "pending" && !waiting ? (row.waitsFor ?? message) : undefined; // the note's, for who hears the page
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
  const { status, message, error, updatedAt } = row.node_data;
  if (status === "error") {
    return (
      <div className="image-node-note" data-tone="error">
        <CollapsibleText key={row.node_data.runId} text={error ?? "It failed."} />
        {message && <p className="image-node-hint">{message}</p>}
      </div>
    );
  }
  if (status === "pending" && row.waitsFor) {
    return <div className="image-node-note" data-tone="wait"><CollapsibleText text={row.waitsFor} /></div>;
  }
  if (status === "pending" && message) {
    return <div className="image-node-note" data-tone="wait"><p><Countdown key={row.version} sentence={message} since={updatedAt} /></p></div>;
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
function Countdown({ sentence, since }: { sentence: string; since: string | undefined }) {
  const [, seconds] = /in (\d+) s\.?$/.exec(sentence) ?? [];
  const now = useSyncExternalStore(subscribeToClock, readClock, () => undefined);
  if (seconds === undefined) return sentence;
  const passed = since && now ? now - Math.round(Date.parse(since) / 1000) : 0;
  const left = Number(seconds) - Math.max(0, passed); // a clock that is behind must not make it wait longer
  return sentence.replace(/in \d+ s\.?$/, left > 0 ? `in ${left} s.` : "now.");
}

/** Seconds. A store: rendering itself reads no time. */
function readClock(): number {
  return Math.round(Date.now() / 1000);
}

function subscribeToClock(onTick: () => void): () => void {
  const tick = setInterval(onTick, 1000);
  return () => clearInterval(tick);
}
