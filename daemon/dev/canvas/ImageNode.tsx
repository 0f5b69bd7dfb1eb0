/**
 * A React Flow node for one image: its prompt, its progress, the image, or the error.
 *
 * Copy this file with ImageNode.css, nodes.ts and pictures.ts. Put `ImageNodes` around `ReactFlow`, `image: ImageNode` into its
 * `nodeTypes`, and pass it the nodes of `useImageNodes`. A node is rendered again only when its own row has changed.
 */
import { createContext, memo, useCallback, useContext, useEffect, useId, useRef, useState, useSyncExternalStore } from "react";
import type { CSSProperties, KeyboardEvent, ReactNode } from "react";
import { Handle, Position, applyNodeChanges } from "@xyflow/react";
import type { Node, NodeChange, NodeProps } from "@xyflow/react";
import { hasImage, isUnfinished, isWaiting } from "./nodes";
import type { Actions, ImageModel, NodeInputPatch, PromptSpec, Quality, Snapshot, WorkflowNode } from "./nodes";
import { withoutToken } from "./pictures";
import "./ImageNode.css";

export type ImageFlowNode = Node<{ row: WorkflowNode }, "image">;

export interface ImageNodesValue {
  actions: Actions;
  models: readonly ImageModel[];
  /** Shows a node's image at full size. */
  open(id: string): void;
}

const Shared = createContext<ImageNodesValue | null>(null);
export const ImageNodes = Shared.Provider;

/**
 * Derives React Flow's nodes from the rows of a workflow. An unchanged row keeps its node, with React Flow's own state
 * (selected, measured). A node keeps its position while it is dragged; the position is written at the end.
 */
export function useImageNodes({ nodes: rows, actions }: Pick<Snapshot, "nodes"> & { actions: Actions }) {
  const [nodes, setNodes] = useState<ImageFlowNode[]>([]);
  const [lastRows, setLastRows] = useState<readonly WorkflowNode[]>();
  if (lastRows !== rows) { // during rendering: an effect would run a frame later
    setLastRows(rows);
    setNodes(reconcile(nodes, rows));
  }
  const onNodesChange = useCallback((changes: NodeChange<ImageFlowNode>[]) => {
    setNodes(now => applyNodeChanges(changes.filter(change => change.type !== "remove"), now)); // nodes are removed with their rows
  }, []);
  const onNodeDragStop = useCallback((_event: unknown, _node: ImageFlowNode, dragged: ImageFlowNode[]) => {
    dragged.forEach(node => actions.move(node.id, node.position));
  }, [actions]);
  return { nodes, setNodes, onNodesChange, onNodeDragStop };
}

function reconcile(before: ImageFlowNode[], rows: readonly WorkflowNode[]): ImageFlowNode[] {
  const known = new Map(before.map(node => [node.id, node]));
  return rows.map((row, index) => {
    const node = known.get(row.id);
    if (node?.data.row === row) return node;
    const place = row.position ?? { x: (index % 5) * 340, y: Math.floor(index / 5) * 440 };
    return { ...node, id: row.id, type: "image", position: node?.dragging ? node.position : place, data: { row } };
  });
}

export const ImageNode = memo(function ImageNode({ id, data, selected }: NodeProps<ImageFlowNode>) {
  const shared = useContext(Shared);
  if (!shared) throw new Error("ImageNodes is missing around ReactFlow.");
  const { row } = data;
  const { status, imageUrl, thumbnailUrl, previewUrl, progress, promptSpec, source } = row.node_data;
  const [settings, setSettings] = useState(false);
  const waiting = isWaiting(row);
  const busy = isUnfinished(row) || waiting;
  const picture = (status === "running" && previewUrl) || thumbnailUrl || imageUrl;
  const model = shared.models.find(each => each.model === row.node_data.model && each.provider === row.node_data.provider);

  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();
      if (promptSpec?.basePrompt && !busy) void shared.actions.generate(id);
    } else if (event.key === "Escape") {
      setSettings(false);
      (document.activeElement as HTMLElement | null)?.blur();
    }
  };

  return (
    <article
      className="image-node" data-id={id} data-status={waiting ? "waiting" : (status ?? "new")} data-selected={selected}
      aria-label={promptSpec?.basePrompt || "New image"} onKeyDown={onKeyDown}
    >
      <Handle type="target" position={Position.Left} aria-label="Refines the image of another node" />
      <Handle type="source" position={Position.Right} aria-label="Its image, for another node to refine" />
      <div className="image-node-frame" style={{ "--ratio": ratioOf(promptSpec) } as CSSProperties}>
        <Picture
          url={picture} forming={status === "running" && previewUrl !== undefined} onFailure={shared.actions.retryPicture}
        />
        {!picture && <Placeholder busy={busy} />}
        {imageUrl && (
          <button className="image-node-open" onClick={() => shared.open(id)} aria-label="Show at full size">
            <Icon name="expand" />
          </button>
        )}
        <Status row={row} waiting={waiting} />
        {status === "running" && (
          <div
            className="image-node-progress" role="progressbar" aria-valuenow={progress ?? 0} aria-valuemin={0}
            aria-valuemax={100} aria-label="Progress"
          >
            <i style={{ transform: `scaleX(${Math.max(3, progress ?? 0) / 100})` }} />
          </div>
        )}
      </div>
      <Note row={row} />
      <Prompt id={id} saved={promptSpec?.basePrompt ?? ""} actions={shared.actions} refines={Boolean(source)} />
      <footer className="image-node-foot">
        <button
          className="image-node-model nodrag" aria-expanded={settings} onClick={() => setSettings(!settings)}
          aria-label="Model and settings" title="Model and settings"
        >
          <span>
            <b>{row.node_data.model ?? "Choose a model"}</b>
            <small>{model && [formatPrice(model), formatSeconds(model)].filter(Boolean).join(" · ")}</small>
          </span>
          <Icon name="chevron" />
        </button>
        <NodeActions
          id={id} busy={busy} failed={status === "error"} again={hasImage(row)} actions={shared.actions}
          ready={Boolean(promptSpec?.basePrompt.trim() && row.node_data.model)}
        />
      </footer>
      {settings && <Settings row={row} model={model} shared={shared} />}
    </article>
  );
});

/** The next action. After a failure there are two: retry the run as it was, or generate with the present prompt. */
const NodeActions = memo(function NodeActions({ id, busy, failed, again, ready, actions }: {
  id: string; busy: boolean; failed: boolean; again: boolean; ready: boolean; actions: Actions;
}) {
  const generate = (label: string, variant: string) => (
    <ActionButton
      label={label} variant={variant} run={() => actions.generate(id)} disabled={!ready}
      {...(variant === "icon" && { icon: "again" as const })}
    />
  );
  if (busy) return <ActionButton label="Cancel" variant="quiet" run={() => actions.cancel(id)} />;
  if (failed) {
    return (
      <>
        {generate("Generate anew, as it is written now", "icon")}
        <ActionButton label="Retry" variant="strong" run={() => actions.retry(id)} />
      </>
    );
  }
  return again ? generate("Regenerate", "quiet") : generate("Generate", "strong");
});

function ActionButton({ label, variant, run, disabled, icon }: {
  label: string; variant: string; run: () => Promise<void>; disabled?: boolean; icon?: "again";
}) {
  const [busy, setBusy] = useState(false);
  const click = () => {
    setBusy(true);
    void run().finally(() => setBusy(false));
  };
  return (
    <button
      className="image-node-do nodrag" data-look={variant} onClick={click} disabled={busy || disabled}
      {...(icon && { "aria-label": label, title: label })}
    >
      {icon ? <Icon name={icon} /> : label}
    </button>
  );
}

/**
 * Fades the new image in over the previous one, which stays until the new one has loaded. The same image at an address that
 * was signed anew takes its place without a fade.
 */
const Picture = memo(function Picture({ url, forming, onFailure }: {
  url: string | undefined; forming: boolean; onFailure: (url: string) => void;
}) {
  const [previous, setPrevious] = useState<string>();
  const [loaded, setLoaded] = useState<string>();
  const isRenewed = url !== undefined && previous !== undefined && withoutToken(previous) === withoutToken(url);
  useEffect(() => {
    if (loaded !== url) return;
    const faded = setTimeout(() => setPrevious(url), isRenewed ? 100 : 500);
    return () => clearTimeout(faded);
  }, [loaded, url, isRenewed]);
  if (!url) return null;
  const layers = previous && previous !== url ? [previous, url] : [url];
  return layers.map(each => (
    <img
      key={each} className="image-node-picture" src={each} alt="" decoding="async" draggable={false}
      data-forming={forming} data-renewed={isRenewed} data-loaded={each === previous || each === loaded}
      onLoad={() => setLoaded(each)} onError={() => onFailure(each)}
    />
  ));
});

function Placeholder({ busy }: { busy: boolean }) {
  return <div className="image-node-blank" data-busy={busy}>{!busy && <Icon name="picture" />}</div>;
}

function Status({ row, waiting }: { row: WorkflowNode; waiting: boolean }) {
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
function Note({ row }: { row: WorkflowNode }) {
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
  if (text.length < 180) return <p>{text}</p>;
  return (
    <>
      <p data-cut={!expanded}>{text}</p>
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

const Prompt = memo(function Prompt({ id, saved, actions, refines }: {
  id: string; saved: string; actions: Actions; refines: boolean;
}) {
  const [text, setText] = useState(saved);
  const field = useRef<HTMLTextAreaElement>(null);
  // Edits from other windows appear here, except while the field has the focus.
  useEffect(() => {
    if (document.activeElement !== field.current) setText(saved);
  }, [saved]);
  useEffect(() => {
    if (!field.current || FIELD_SIZING) return;
    field.current.style.height = "0";
    field.current.style.height = `${Math.min(field.current.scrollHeight, 168)}px`;
  }, [text]);
  return (
    <textarea
      ref={field} className="image-node-prompt nodrag nowheel" value={text} rows={1} maxLength={32000} spellCheck={false}
      aria-label="Prompt" placeholder={refines ? "What should change?" : "What should it show?"}
      onBlur={() => setText(saved)}
      onChange={event => {
        setText(event.target.value);
        actions.edit(id, { promptSpec: { basePrompt: event.target.value } });
      }}
    />
  );
});

function Settings({ row, model, shared }: { row: WorkflowNode; model: ImageModel | undefined; shared: ImageNodesValue }) {
  const spec: PromptSpec = row.node_data.promptSpec ?? { basePrompt: "" };
  const editSpec = (promptSpec: NonNullable<NodeInputPatch["promptSpec"]>) => shared.actions.edit(row.id, { promptSpec });
  const sizes = model?.sizes.filter(each => /^\d+x\d+$/.test(each)) ?? []; // "2K" is a size of Google's, and a quality here
  const shape = spec.aspectRatio ? `ratio ${spec.aspectRatio}` : `size ${spec.size ?? "1024x1024"}`;
  return (
    <div className="image-node-settings nodrag nowheel">
      <Field label="Model" wide>
        {name => (
          <select
            id={name} value={`${row.node_data.provider}:${row.node_data.model}`}
            onChange={event => {
              const [provider = "", ...rest] = event.target.value.split(":");
              const next = shared.models.find(each => each.provider === provider && each.model === rest.join(":"));
              shared.actions.edit(row.id, ({ promptSpec }) => {
                const keeps = promptSpec?.quality && next?.qualities.includes(promptSpec.quality);
                return { provider, model: rest.join(":"), ...(!keeps && { promptSpec: { quality: undefined } }) };
              });
            }}
          >
            {!model && <option value={`${row.node_data.provider}:${row.node_data.model}`}>{row.node_data.model ?? "Choose one"}</option>}
            {[...new Set(shared.models.map(each => each.provider))].map(provider => (
              <optgroup key={provider} label={provider}>
                {shared.models.filter(each => each.provider === provider).map(each => (
                  <option key={each.model} value={`${each.provider}:${each.model}`}>
                    {[each.model, formatPrice(each), formatSeconds(each)].filter(Boolean).join(" · ")}
                  </option>
                ))}
              </optgroup>
            ))}
          </select>
        )}
      </Field>
      <Field label="Shape">
        {name => (
          <select
            id={name} value={shape}
            onChange={event => {
              const [kind, value] = event.target.value.split(" ");
              editSpec(kind === "ratio" ? { aspectRatio: value, size: undefined } : { size: value, aspectRatio: undefined });
            }}
          >
            {!(sizes.includes(shape.slice(5)) || model?.ratios.includes(shape.slice(6))) && (
              <option value={shape}>{shape.split(" ")[1]?.replace("x", " × ")}</option>
            )}
            {model && model.ratios.length > 0 && (
              <optgroup label="Ratio">
                {model.ratios.map(each => <option key={each} value={`ratio ${each}`}>{each}</option>)}
              </optgroup>
            )}
            {sizes.length > 0 && (
              <optgroup label="Pixels">
                {sizes.map(each => <option key={each} value={`size ${each}`}>{each.replace("x", " × ")}</option>)}
              </optgroup>
            )}
          </select>
        )}
      </Field>
      {model && model.qualities.length > 0 && (
        <Field label="Quality">
          {name => (
            <select id={name} value={spec.quality ?? "standard"} onChange={event => editSpec({ quality: event.target.value })}>
              {model.qualities.map(each => <option key={each} value={each}>{QUALITIES[each]}</option>)}
            </select>
          )}
        </Field>
      )}
      {model?.seed && (
        <Field label="Seed">
          {name => (
            <input
              id={name} type="number" min={0} step={1} placeholder="Random" defaultValue={spec.seed ?? ""}
              onChange={event => editSpec({ seed: event.target.validity.valid && event.target.value !== "" ? event.target.valueAsNumber : undefined })}
            />
          )}
        </Field>
      )}
      {model?.negative_prompt && (
        <Field label="Without" wide={!model.seed}>
          {name => (
            <input
              id={name} placeholder="people, text" defaultValue={spec.negativePrompt ?? ""}
              onChange={event => editSpec({ negativePrompt: event.target.value })}
            />
          )}
        </Field>
      )}
      {row.node_data.source && model && !model.previous_image && (
        <p className="image-node-hint">This model cannot start from another image.</p>
      )}
    </div>
  );
}

const QUALITIES: Record<Quality, string> = { low: "Low", standard: "Standard", hd: "High", xhigh: "Very high", max: "Highest" };

function Field({ label, wide, children }: { label: string; wide?: boolean; children: (id: string) => ReactNode }) {
  const id = useId();
  return (
    <div className="image-node-field" data-wide={wide}>
      <label htmlFor={id}>{label}</label>
      {children(id)}
    </div>
  );
}

/** Whether CSS lets a field grow with its text. Measuring it instead costs a layout for each node. */
const FIELD_SIZING = typeof CSS !== "undefined" && CSS.supports("field-sizing", "content");

const ICONS = {
  again: "M13.2 8.4A5.2 5.2 0 1 1 11.6 4.3L13.4 6M13.4 2.6V6H10",
  chevron: "M4.5 6.3 8 9.8l3.5-3.5",
  expand: "M9.6 2.8h3.6v3.6M13 3 9.2 6.8M6.4 13.2H2.8V9.6M3 13l3.8-3.8",
  picture: "M2.5 4.4a1.9 1.9 0 0 1 1.9-1.9h7.2a1.9 1.9 0 0 1 1.9 1.9v7.2a1.9 1.9 0 0 1-1.9 1.9H4.4a1.9 1.9 0 0 1-1.9-1.9zM2.8 11.2 6 8l3 3 1.8-1.7 2.4 2.3M10.2 5.9h.01",
};

export function Icon({ name, path }: { name?: keyof typeof ICONS; path?: string }) {
  return (
    <svg viewBox="0 0 16 16" width="16" height="16" fill="none" stroke="currentColor" strokeWidth="1.4"
      strokeLinecap="round" strokeLinejoin="round" aria-hidden="true">
      <path d={name ? ICONS[name] : path} />
    </svg>
  );
}

/** The aspect ratio of a prompt spec, as width / height. */
export function ratioOf(spec: PromptSpec | undefined): number {
  const [width, height] = (spec?.aspectRatio?.split(":") ?? spec?.size?.split("x") ?? []).map(Number);
  return width && height ? width / height : 1;
}

export function formatPrice({ price }: ImageModel): string | undefined {
  return price === null ? undefined : price === 0 ? "free" : `$${price.toFixed(price < 0.1 ? 3 : 2)}`;
}

function formatSeconds({ typical_seconds: typical }: ImageModel): string | undefined {
  return typical === null ? undefined : `${Math.max(1, Math.round(typical))} s`;
}
