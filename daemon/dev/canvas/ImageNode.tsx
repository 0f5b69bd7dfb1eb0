/**
 * A React Flow node for one image: its prompt, its progress, the image, or the error.
 *
 * Copy this file with ImageNode.css and those that it imports. Put `ImageNodes` around `ReactFlow`, `image: ImageNode` into its
 * `nodeTypes`, and pass it the nodes of `useImageNodes`. A node is rendered again only when its own row has changed.
 */
import { createContext, memo, useCallback, useContext, useEffect, useRef, useState } from "react";
import type { CSSProperties, KeyboardEvent } from "react";
import { Handle, Position, applyNodeChanges } from "@xyflow/react";
import type { Node, NodeChange, NodeProps } from "@xyflow/react";
import { Icon } from "./Icon";
import { NodeSettings, formatPrice, formatSeconds } from "./NodeSettings";
import { Note, Status } from "./NodeStatus";
import { hasImage, isUnfinished, isWaiting } from "./nodes";
import type { Actions, ImageModel, PromptSpec, Snapshot, WorkflowNode } from "./nodes";
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
      {settings && <NodeSettings row={row} model={model} shared={shared} />}
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

/** Whether CSS lets a field grow with its text. Measuring it instead costs a layout for each node. */
const FIELD_SIZING = typeof CSS !== "undefined" && CSS.supports("field-sizing", "content");

/** The aspect ratio of a prompt spec, as width / height. */
export function ratioOf(spec: PromptSpec | undefined): number {
  const [width, height] = (spec?.aspectRatio?.split(":") ?? spec?.size?.split("x") ?? []).map(Number);
  return width && height ? width / height : 1;
}
