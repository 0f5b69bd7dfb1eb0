/** The header: state of the connection, counts by state, and actions on all nodes or on the selected ones. */
import { useEffect, useState } from "react";
import type { ReactNode } from "react";
import { Icon } from "./Icon";
import { formatLeft, formatSum, isOverBudget, nearestLimit, spentShare, sumOf } from "./budget";
import { canGenerate, isUnfinished, isWaiting, missingSources } from "./nodes";
import type { Actions, Snapshot, Usage, WorkflowNode } from "./nodes";

const CONNECTIONS = {
  connecting: ["Connecting", "Waiting for the first answer."],
  live: ["Live", "Changes appear here as they happen."],
  away: ["Offline", "The server cannot be heard. What was missed is fetched, and what was changed is sent, once it is back."],
  denied: ["No access", "You are not a member of this workflow."],
} as const;
/** Realtime refuses who is no member yet. */
const UNUSED = ["New", "Who adds the first node becomes its member. Changes appear here from then on."] as const;

/** The share of a limit from which on a phone has room for it. */
const NEAR = 0.8;

interface Props extends Snapshot {
  /** Whether the user may use the workflow; undefined until that is known. */
  access: boolean | undefined;
  /** The button with the name of the canvas. */
  brand: ReactNode;
  /** The button that shares it. */
  share: ReactNode;
  actions: Actions;
  selected: readonly WorkflowNode[];
  onAdd: () => void;
  onGenerate: (rows: readonly WorkflowNode[]) => void;
}

export function Header({ access, brand, share, nodes, usage, connection, unsent, error, selected, actions, onAdd, onGenerate }: Props) {
  const count = (status: string) => nodes.filter(row => row.node_data.status === status).length;
  const active = nodes.filter(row => isUnfinished(row) || isWaiting(row));
  const byId = new Map(nodes.map(row => [row.id, row]));
  const missing = (row: WorkflowNode) => missingSources(row, id => byId.get(id), id => byId.get(id)?.isKept === true);
  const ready = (selected.length > 1 ? selected : nodes).filter(row =>
    canGenerate(row) && missing(row).every(canGenerate) && (selected.length > 1 || row.node_data.status !== "completed"));
  const made = [...new Set([...ready, ...ready.flatMap(missing)])]; // a source without a picture is made first
  const sum = sumOf(made);
  const price = formatSum(sum, made.length);
  const cost = price === "free" || made.length === ready.length ? price : price && `${price} for ${made.length}`;
  const isOver = isOverBudget(made.length, sum, usage);
  const isUsable = access !== false && !(error && nodes.length === 0);
  const state = access === false ? "denied" : connection;
  const [label, explanation] = state === "denied" && access ? UNUSED : CONNECTIONS[state];
  const unsentText = connection === "away" && unsent > 0 ? ` · ${unsent} ${unsent === 1 ? "change" : "changes"} kept, sent once it is back` : "";
  return (
    <header className="header">
      {brand}
      <span className="connection" data-state={state} title={explanation} role="status"><i /><span>{label}{unsentText}</span></span>
      {isUsable ? (
        <ul className="counts" aria-label="Nodes by state">
          <Count tone="run" number={count("running")} label="in the making" />
          <Count tone="wait" number={count("pending") + nodes.filter(isWaiting).length} label="in line" />
          <Count tone="done" number={count("completed")} label="ready" always />
          <Count tone="bad" number={count("error")} label="failed" />
        </ul>
      ) : <span className="counts" />}
      <Budget usage={usage} />
      <nav>
        {active.length > 1 && (
          <button className="button" onClick={() => active.forEach(row => void actions.cancel(row.id))} aria-label="Cancel all" title="Cancel all">
            <Icon path="M4.2 5.2a1 1 0 0 1 1-1h5.6a1 1 0 0 1 1 1v5.6a1 1 0 0 1-1 1H5.2a1 1 0 0 1-1-1z" /><span>Cancel all</span>
          </button>
        )}
        <Theme />
        {access && share}
        {isUsable && (
          <button className="button" onClick={onAdd} aria-label="New" title="New node (N)"><Icon path="M8 3v10M3 8h10" /><span>New</span></button>
        )}
        {isUsable && (
          <button
            className="button" data-strong="true" disabled={ready.length === 0} onClick={() => onGenerate(ready)}
            title={ready.length === 0 ? "Every node that has a prompt has its image, or is getting it" : describe(made.length, price, isOver, usage)}
          >
            {selected.length > 1 ? `Generate ${ready.length} selected` : "Generate all"}
            {selected.length <= 1 && ready.length > 0 && <b>{ready.length}</b>}
            {ready.length > 0 && <small>{[cost === "free" ? undefined : cost, isOver && "over budget"].filter(Boolean).join(", ")}</small>}
          </button>
        )}
      </nav>
    </header>
  );
}

/** What a click on "Generate all" means. */
function describe(count: number, cost: string | undefined, isOver: boolean, usage: readonly Usage[]): string {
  const limit = nearestLimit(usage);
  return [
    `${count} ${count === 1 ? "image" : "images"}: ${cost === undefined ? "the price is unknown" : cost === "free" ? "free" : `about ${cost}`}.`,
    limit && formatLeft(limit),
    isOver && "That is more than what is left: some will be refused.",
  ].filter(Boolean).join(" ");
}

function Count({ tone, number, label, always }: { tone: string; number: number; label: string; always?: boolean }) {
  if (number === 0 && !always) return null;
  return <li data-tone={tone}><i /><b>{number}</b> {label}</li>;
}

/** The limit that is nearest to its end. */
function Budget({ usage }: { usage: readonly Usage[] }) {
  const nearest = nearestLimit(usage);
  if (!nearest) return null;
  const { scope, period, used_images, max_images, used_usd, max_usd, resets_at } = nearest;
  const used = [
    max_images !== null && `${used_images} of ${max_images} images`,
    max_usd !== null && `$${used_usd.toFixed(2)} of $${max_usd.toFixed(2)}`,
  ].filter(Boolean).join(" · ");
  const share = spentShare(nearest);
  const who = scope === "user" ? "What you have used" : "What this workflow has used";
  const meaning = `${who}, with what is in line. It starts anew ${new Date(resets_at).toLocaleString()}. ${formatLeft(nearest)}`;
  return (
    <span className="budget" data-spent={share >= 1} data-near={share >= NEAR} role="status" title={meaning}>
      {used} {period === "day" ? "today" : "this month"}
      <span className="image-node-unseen">. {meaning}</span>
    </span>
  );
}

/** Follows the system's colour scheme until the user chooses one. */
function Theme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const [override, setOverride] = useState(() => localStorage.getItem("theme"));
  const [dark, setDark] = useState(system.matches);
  useEffect(() => {
    const onChange = () => setDark(system.matches);
    system.addEventListener("change", onChange);
    return () => system.removeEventListener("change", onChange);
  }, []);
  const theme = override ?? (dark ? "dark" : "light");
  useEffect(() => {
    document.documentElement.style.colorScheme = theme;
    if (override) localStorage.setItem("theme", override);
  }, [theme, override]);
  const other = theme === "dark" ? "light" : "dark";
  return (
    <button className="button" data-icon="true" onClick={() => setOverride(other)} aria-label={`Switch to ${other}`} title={`Switch to ${other}`}>
      <Icon
        path={theme === "dark"
          ? "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6M8 1.6v1M8 13.4v1M1.6 8h1M13.4 8h1M3.5 3.5l.7.7M11.8 11.8l.7.7M3.5 12.5l.7-.7M11.8 4.2l.7-.7"
          : "M13.4 9.6A5.8 5.8 0 0 1 6.4 2.6a5.8 5.8 0 1 0 7 7z"}
      />
    </button>
  );
}
