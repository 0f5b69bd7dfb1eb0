/**
 * A React Flow node that shows one image: what it should show, how far it is, what it became or what went wrong.
 *
 * Copy this file with ImageNode.css and useWorkflow.ts. Put `ImageNodes` around `ReactFlow`, `image: ImageNode` into its
 * `nodeTypes`, and give it what `useImageNodes` answers. A node is rendered again only when its own row has changed.
 */
import { createContext, memo, useCallback, useContext, useEffect, useId, useRef, useState } from "react";
import type { CSSProperties, KeyboardEvent, ReactNode } from "react";
import { Handle, Position, applyNodeChanges } from "@xyflow/react";
import type { Node, NodeChange, NodeProps } from "@xyflow/react";
import type { Actions, Change, ImageModel, PromptSpec, Quality, Snapshot, WorkflowNode } from "./useWorkflow";
import { isUnfinished, isWaiting } from "./useWorkflow";
import "./ImageNode.css";

export type ImageFlowNode = Node<{ row: WorkflowNode }, "image">;

export interface Surroundings {
  actions: Actions;
  models: readonly ImageModel[];
  /** Shows a node's image at full size. */
  open(id: string): void;
}

const Around = createContext<Surroundings | null>(null);
export const ImageNodes = Around.Provider;

/**
 * React Flow's nodes for the rows of a workflow. A row that has not changed keeps its node as it is, with what React Flow
 * knows of it (selected, measured); a node that somebody drags stays in their hand, and its position is written at the end.
 */
export function useImageNodes({ nodes: rows, actions }: Pick<Snapshot, "nodes"> & { actions: Actions }) {
  const [nodes, setNodes] = useState<ImageFlowNode[]>([]);
  const [followed, setFollowed] = useState<readonly WorkflowNode[]>();
  if (followed !== rows) { // while rendering: an effect would come a frame later
    setFollowed(rows);
    setNodes(follow(nodes, rows));
  }
  const onNodesChange = useCallback((changes: NodeChange<ImageFlowNode>[]) => {
    setNodes(now => applyNodeChanges(changes.filter(change => change.type !== "remove"), now)); // rows decide what there is
  }, []);
  const onNodeDragStop = useCallback((_event: unknown, _node: ImageFlowNode, dragged: ImageFlowNode[]) => {
    dragged.forEach(node => actions.move(node.id, node.position));
  }, [actions]);
  return { nodes, setNodes, onNodesChange, onNodeDragStop };
}

function follow(before: ImageFlowNode[], rows: readonly WorkflowNode[]): ImageFlowNode[] {
  const known = new Map(before.map(node => [node.id, node]));
  return rows.map((row, index) => {
    const node = known.get(row.id);
    if (node?.data.row === row) return node;
    const place = row.position ?? { x: (index % 5) * 340, y: Math.floor(index / 5) * 440 };
    return { ...node, id: row.id, type: "image", position: node?.dragging ? node.position : place, data: { row } };
  });
}

export const ImageNode = memo(function ImageNode({ id, data, selected }: NodeProps<ImageFlowNode>) {
  const around = useContext(Around);
  if (!around) throw new Error("ImageNodes is missing around ReactFlow.");
  const { row } = data;
  const { status, imageUrl, thumbnailUrl, previewUrl, progress, promptSpec, source } = row.node_data;
  const [settings, setSettings] = useState(false);
  const waiting = isWaiting(row);
  const busy = isUnfinished(row) || waiting;
  const picture = (status === "running" && previewUrl) || thumbnailUrl || imageUrl;
  const model = around.models.find(each => each.model === row.node_data.model && each.provider === row.node_data.provider);

  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();
      if (promptSpec?.basePrompt && !busy) void around.actions.generate(id);
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
        <Picture url={picture} forming={status === "running" && previewUrl !== undefined} />
        {!picture && <Blank busy={busy} />}
        {imageUrl && (
          <button className="image-node-open" onClick={() => around.open(id)} aria-label="Show at full size">
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
      <Prompt id={id} stored={promptSpec?.basePrompt ?? ""} actions={around.actions} refines={Boolean(source)} />
      <footer className="image-node-foot">
        <button
          className="image-node-model nodrag" aria-expanded={settings} onClick={() => setSettings(!settings)}
          aria-label="Model and settings" title="Model and settings"
        >
          <span>
            <b>{row.node_data.model ?? "Choose a model"}</b>
            <small>{model && [price(model), seconds(model)].filter(Boolean).join(" · ")}</small>
          </span>
          <Icon name="chevron" />
        </button>
        <Action
          id={id} busy={busy} failed={status === "error"} made={imageUrl !== undefined} actions={around.actions}
          ready={Boolean(promptSpec?.basePrompt.trim() && row.node_data.model)}
        />
      </footer>
      {settings && <Settings row={row} model={model} around={around} />}
    </article>
  );
});

/** What to do next: one button, two where a failure may be tried again as it was or as it is written now. */
const Action = memo(function Action({ id, busy, failed, made, ready, actions }: {
  id: string; busy: boolean; failed: boolean; made: boolean; ready: boolean; actions: Actions;
}) {
  const generate = (label: string, look: string) => (
    <Do
      label={label} look={look} run={() => actions.generate(id)} disabled={!ready}
      {...(look === "icon" && { icon: "again" as const })}
    />
  );
  if (busy) return <Do label="Cancel" look="quiet" run={() => actions.cancel(id)} />;
  if (failed) {
    return (
      <>
        {generate("Generate anew, as it is written now", "icon")}
        <Do label="Retry" look="strong" run={() => actions.retry(id)} />
      </>
    );
  }
  return made ? generate("Regenerate", "quiet") : generate("Generate", "strong");
});

function Do({ label, look, run, disabled, icon }: {
  label: string; look: string; run: () => Promise<void>; disabled?: boolean; icon?: "again";
}) {
  const [busy, setBusy] = useState(false);
  const click = () => {
    setBusy(true);
    void run().finally(() => setBusy(false));
  };
  return (
    <button
      className="image-node-do nodrag" data-look={look} onClick={click} disabled={busy || disabled}
      {...(icon && { "aria-label": label, title: label })}
    >
      {icon ? <Icon name={icon} /> : label}
    </button>
  );
}

/** The image; while the next one loads, the last one stays, and the new one fades in over it. */
const Picture = memo(function Picture({ url, forming }: { url: string | undefined; forming: boolean }) {
  const [below, setBelow] = useState<string>();
  const [loaded, setLoaded] = useState<string>();
  useEffect(() => {
    if (loaded !== url) return;
    const faded = setTimeout(() => setBelow(url), 500);
    return () => clearTimeout(faded);
  }, [loaded, url]);
  if (!url) return null;
  const layers = below && below !== url ? [below, url] : [url];
  return layers.map(each => (
    <img
      key={each} className="image-node-picture" src={each} alt="" decoding="async" draggable={false}
      data-forming={forming} data-loaded={each === below || each === loaded} onLoad={() => setLoaded(each)}
    />
  ));
});

function Blank({ busy }: { busy: boolean }) {
  return <div className="image-node-blank" data-busy={busy}>{!busy && <Icon name="picture" />}</div>;
}

function Status({ row, waiting }: { row: WorkflowNode; waiting: boolean }) {
  const { status, progress, message, imageUrl } = row.node_data;
  const doing = message === undefined ? "Starting" : isLong(message) ? "In the making" : message.replace(/\.$/, "");
  const text = waiting ? "Waits for its image"
    : status === "pending" ? (message ? "Held up" : "In line")
    : status === "running" ? `${doing}${progress ? ` · ${progress}%` : ""}`
    : status === "error" ? "Failed"
    : status === "cancelled" ? "Cancelled"
    : undefined;
  if (!text) return <span className="image-node-unseen" role="status">{imageUrl ? "Ready" : "Not generated yet"}</span>;
  return <span className="image-node-status" role="status"><i /><span>{text}</span></span>;
}

/** Whether there is no room for it on the picture. */
function isLong(message: string): boolean {
  return message.length > 28;
}

/** Why it waits, what is unusual about it, or why it failed and what helps. */
function Note({ row }: { row: WorkflowNode }) {
  const { status, message, error, updatedAt } = row.node_data;
  if (status === "error") {
    return (
      <div className="image-node-note" data-tone="error">
        <Sentence key={row.node_data.runId} text={error ?? "It failed."} />
        {message && <p className="image-node-hint">{message}</p>}
      </div>
    );
  }
  if (status === "pending" && message) {
    return <div className="image-node-note" data-tone="wait"><p><Countdown key={row.version} sentence={message} since={updatedAt} /></p></div>;
  }
  if (status === "running" && message && isLong(message)) {
    return <div className="image-node-note" data-tone="run"><Sentence text={message} /></div>;
  }
  return null;
}

/** Some providers write a page. */
function Sentence({ text }: { text: string }) {
  const [whole, setWhole] = useState(false);
  if (text.length < 180) return <p>{text}</p>;
  return (
    <>
      <p data-cut={!whole}>{text}</p>
      <button className="image-node-more nodrag" onClick={() => setWhole(!whole)}>{whole ? "Show less" : "Show all"}</button>
    </>
  );
}

/** "… again in 12 s.", counting down from when it was said. */
function Countdown({ sentence, since }: { sentence: string; since: string | undefined }) {
  const [, seconds] = /in (\d+) s\.?$/.exec(sentence) ?? [];
  const [left, setLeft] = useState(() => {
    const passed = since ? Math.round((Date.now() - Date.parse(since)) / 1000) : 0;
    return Number(seconds ?? 0) - Math.max(0, passed); // a clock that is behind must not make it wait longer
  });
  useEffect(() => {
    const tick = setInterval(() => setLeft(now => now - 1), 1000);
    return () => clearInterval(tick);
  }, []);
  if (seconds === undefined) return sentence;
  return sentence.replace(/in \d+ s\.?$/, left > 0 ? `in ${left} s.` : "now.");
}

const Prompt = memo(function Prompt({ id, stored, actions, refines }: {
  id: string; stored: string; actions: Actions; refines: boolean;
}) {
  const [text, setText] = useState(stored);
  const field = useRef<HTMLTextAreaElement>(null);
  // What another window writes appears here, but never under the hands of who is writing.
  useEffect(() => {
    if (document.activeElement !== field.current) setText(stored);
  }, [stored]);
  useEffect(() => {
    if (!field.current || SIZES_ITSELF) return;
    field.current.style.height = "0";
    field.current.style.height = `${Math.min(field.current.scrollHeight, 168)}px`;
  }, [text]);
  return (
    <textarea
      ref={field} className="image-node-prompt nodrag nowheel" value={text} rows={1} maxLength={32000} spellCheck={false}
      aria-label="Prompt" placeholder={refines ? "What should change?" : "What should it show?"}
      onBlur={() => setText(stored)}
      onChange={event => {
        setText(event.target.value);
        actions.edit(id, { promptSpec: { basePrompt: event.target.value } });
      }}
    />
  );
});

function Settings({ row, model, around }: { row: WorkflowNode; model: ImageModel | undefined; around: Surroundings }) {
  const spec: PromptSpec = row.node_data.promptSpec ?? { basePrompt: "" };
  const edit = (change: Change) => around.actions.edit(row.id, change);
  const ask = (promptSpec: NonNullable<Change["promptSpec"]>) => edit({ promptSpec });
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
              const next = around.models.find(each => each.provider === provider && each.model === rest.join(":"));
              const keeps = spec.quality && next?.qualities.includes(spec.quality);
              edit({ provider, model: rest.join(":"), ...(!keeps && { promptSpec: { quality: undefined } }) });
            }}
          >
            {!model && <option value={`${row.node_data.provider}:${row.node_data.model}`}>{row.node_data.model ?? "Choose one"}</option>}
            {[...Map.groupBy(around.models, each => each.provider)].map(([provider, models]) => (
              <optgroup key={provider} label={provider}>
                {models.map(each => (
                  <option key={each.model} value={`${each.provider}:${each.model}`}>
                    {[each.model, price(each), seconds(each)].filter(Boolean).join(" · ")}
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
              ask(kind === "ratio" ? { aspectRatio: value, size: undefined } : { size: value, aspectRatio: undefined });
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
            <select id={name} value={spec.quality ?? "standard"} onChange={event => ask({ quality: event.target.value })}>
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
              onChange={event => ask({ seed: event.target.validity.valid && event.target.value !== "" ? event.target.valueAsNumber : undefined })}
            />
          )}
        </Field>
      )}
      {model?.negative_prompt && (
        <Field label="Without" wide={!model.seed}>
          {name => (
            <input
              id={name} placeholder="people, text" defaultValue={spec.negativePrompt ?? ""}
              onChange={event => ask({ negativePrompt: event.target.value })}
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

/** Whether CSS lets a field grow with its text. Measuring instead costs a layout for each node. */
const SIZES_ITSELF = typeof CSS !== "undefined" && CSS.supports("field-sizing", "content");

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

/** Width to height, as asked for. */
export function ratioOf(spec: PromptSpec | undefined): number {
  const [width, height] = (spec?.aspectRatio?.split(":") ?? spec?.size?.split("x") ?? []).map(Number);
  return width && height ? width / height : 1;
}

export function price({ price }: ImageModel): string | undefined {
  return price === null ? undefined : price === 0 ? "free" : `$${price.toFixed(price < 0.1 ? 3 : 2)}`;
}

function seconds({ typical_seconds: typical }: ImageModel): string | undefined {
  return typical === null ? undefined : `${Math.max(1, Math.round(typical))} s`;
}
