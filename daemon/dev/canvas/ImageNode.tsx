/**
 * A React Flow node for one image: its prompt, its progress, the image, or the error.
 *
 * Copy this file with ImageNode.css and those that it imports. Put `ImageNodes` around `ReactFlow`, `image: ImageNode` into its
 * `nodeTypes`, and pass it the nodes of `useImageNodes`. A node is rendered again only when its own row has changed.
 */
import { createContext, memo, useCallback, useContext, useEffect, useRef, useState } from "react";
import type { CSSProperties, KeyboardEvent } from "react";
import { Handle, Position, applyNodeChanges } from "@xyflow/react";
import type { Node, NodeChange, NodeProps, XYPosition } from "@xyflow/react";
import { Elapsed } from "./Elapsed";
import { Icon } from "./Icon";
import { NodeSettings, formatSeconds } from "./NodeSettings";
import { Note, Status } from "./NodeStatus";
import { generateOrRetry, hasImage, isUnfinished, isWaiting } from "./nodes";
import type { Actions, ImageModel, PromptSpec, Snapshot, Upload, WorkflowNode } from "./nodes";
import { withoutToken } from "./pictures";
import { formatCosts } from "./prices";
import "./ImageNode.css";

export type ImageFlowNode = Node<{
  row: WorkflowNode;
  /** In reading order, from 1: tells the controls of nodes apart for who does not see them. */
  number: number;
}, "image">;

export interface ImageNodesValue {
  actions: Actions;
  models: readonly ImageModel[];
  /** Shows a node's image at full size. */
  open(id: string): void;
  /** Adds a node that starts from a node's image. Without it there is no button for that. */
  refine?: (id: string) => void;
  /** What is being done for nodes whose picture is on its way to the server, in a sentence each. */
  uploading?: ReadonlyMap<string, string>;
}

/** Nodes whose tops are less than that apart are read from left to right. */
const BAND = 200;

const Shared = createContext<ImageNodesValue | null>(null);
export const ImageNodes = Shared.Provider;

/**
 * Derives React Flow's nodes from the rows of a workflow. An unchanged row keeps its node, with React Flow's own state
 * (selected, measured). A node keeps its position while it is dragged; the position is written at the end, and after each step
 * by the arrow keys.
 */
export function useImageNodes({ nodes: rows, actions }: Pick<Snapshot, "nodes"> & { actions: Actions }) {
  const [nodes, setNodes] = useState<ImageFlowNode[]>([]);
  const [lastRows, setLastRows] = useState<readonly WorkflowNode[]>();
  if (lastRows !== rows) { // during rendering: an effect would run a frame later
    setLastRows(rows);
    setNodes(reconcile(nodes, rows));
  }
  const dragged = useRef(new Set<string>());
  const onNodesChange = useCallback((changes: NodeChange<ImageFlowNode>[]) => {
    for (const change of changes) {
      if (change.type !== "position") continue;
      if (change.dragging) dragged.current.add(change.id);
      else if (!dragged.current.delete(change.id) && change.position) actions.move(change.id, change.position); // by a key
    }
    setNodes(now => applyNodeChanges(changes.filter(change => change.type !== "remove"), now)); // nodes are removed with their rows
  }, [actions]);
  const onNodeDragStop = useCallback((_event: unknown, _node: ImageFlowNode, dragged: ImageFlowNode[]) => {
    dragged.forEach(node => actions.move(node.id, node.position));
  }, [actions]);
  return { nodes, setNodes, onNodesChange, onNodeDragStop };
}

function reconcile(before: ImageFlowNode[], rows: readonly WorkflowNode[]): ImageFlowNode[] {
  const known = new Map(before.map(node => [node.id, node]));
  const places = new Map(rows.map((row, index) =>
    [row.id, row.position ?? { x: (index % 5) * 340, y: Math.floor(index / 5) * 440 }]));
  return sortForReading(before, rows, places).map((row, index) => {
    const node = known.get(row.id), number = index + 1;
    if (node?.data.row === row && node.data.number === number) return node;
    const position = node?.dragging ? node.position : places.get(row.id)!;
    return { ...node, id: row.id, type: "image", position, ariaLabel: `Picture ${number}`, data: { row, number } };
  });
}

/**
 * Sorts rows as they are read, which is how Tab goes through them: by bands, from left to right. As long as they are the same
 * rows they stay as they were: an element that is moved within the page loses the focus.
 */
function sortForReading(
  before: readonly ImageFlowNode[], rows: readonly WorkflowNode[], places: ReadonlyMap<string, XYPosition>,
): WorkflowNode[] {
  const byId = new Map(rows.map(row => [row.id, row]));
  const isSame = before.length === rows.length && before.every(node => byId.has(node.id));
  if (isSame) return before.map(node => byId.get(node.id)!);
  const sorted: WorkflowNode[] = [];
  const left = [...rows].sort((one, other) => places.get(one.id)!.y - places.get(other.id)!.y);
  while (left.length > 0) {
    const end = places.get(left[0]!.id)!.y + BAND;
    const rest = left.findIndex(row => places.get(row.id)!.y >= end);
    const band = left.splice(0, rest < 0 ? left.length : rest);
    sorted.push(...band.sort((one, other) => places.get(one.id)!.x - places.get(other.id)!.x));
  }
  return sorted;
}

export const ImageNode = memo(function ImageNode({ id, data, selected }: NodeProps<ImageFlowNode>) {
  const shared = useContext(Shared);
  if (!shared) throw new Error("ImageNodes is missing around ReactFlow.");
  const { row, number } = data;
  const { status, imageUrl, thumbnailUrl, previewUrl, progress, promptSpec, source, upload } = row.node_data;
  const [settings, setSettings] = useState(false);
  const [pictureRatio, setPictureRatio] = useState<number>();
  const waiting = isWaiting(row);
  const busy = isUnfinished(row) || waiting || row.isKept === true;
  const picture = (status === "running" && previewUrl) || thumbnailUrl || imageUrl;
  const ratio = (picture && pictureRatio) || (upload ? upload.width / upload.height : ratioOf(promptSpec));
  const model = shared.models.find(each => each.model === row.node_data.model && each.provider === row.node_data.provider);

  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.stopPropagation();
      if (promptSpec?.basePrompt && !busy && !event.repeat) void generateOrRetry(row, shared.actions);
    } else if (event.key === "Escape") {
      setSettings(false);
      const node = event.currentTarget.closest<HTMLElement>(".react-flow__node");
      if (document.activeElement === node) return;
      event.stopPropagation();
      node?.focus({ preventScroll: true }); // where the keys of the canvas are: the next Escape leaves the node
    }
  };

  return (
    <article
      className="image-node" data-id={id} data-status={waiting || row.isKept ? "waiting" : (status ?? "new")} data-selected={selected}
      aria-label={upload?.name || promptSpec?.basePrompt || "New image"} onKeyDown={onKeyDown}
    >
      {!upload && <Handle type="target" position={Position.Left} aria-hidden="true" />}
      <Handle type="source" position={Position.Right} aria-hidden="true" />
      <div className="image-node-frame" style={{ "--ratio": ratio } as CSSProperties}>
        <Picture
          url={picture} forming={status === "running" && previewUrl !== undefined} onFailure={shared.actions.retryPicture}
          onRatio={setPictureRatio}
        />
        {!picture && <Placeholder busy={busy || shared.uploading?.has(id) === true} />}
        {imageUrl && (
          <button className="image-node-open" onClick={() => shared.open(id)} aria-label={`Show at full size, picture ${number}`}>
            <Icon name="expand" />
          </button>
        )}
        {hasImage(row) && shared.refine && (
          <button
            className="image-node-refine nodrag" onClick={() => shared.refine?.(id)} aria-label={`Refine picture ${number}`}
            title="A new picture that starts from this one (R)"
          >
            <Icon name="refine" /><span>Refine</span>
          </button>
        )}
        {!upload && <Status row={row} waiting={waiting} />}
        {status === "running" && (
          <div
            className="image-node-progress" role="progressbar" aria-valuenow={progress ?? 0} aria-valuemin={0}
            aria-valuemax={100} aria-label={`Progress of picture ${number}`}
          >
            <i style={{ transform: `scaleX(${Math.max(3, progress ?? 0) / 100})` }} />
          </div>
        )}
      </div>
      <Note row={row} />
      {upload && <UploadNote upload={upload} sentence={shared.uploading?.get(id)} />}
      {!upload && <Prompt id={id} number={number} saved={promptSpec?.basePrompt ?? ""} actions={shared.actions} refines={Boolean(source)} />}
      {!upload && <footer className="image-node-foot">
        <button
          className="image-node-model nodrag" aria-expanded={settings} onClick={() => setSettings(!settings)}
          title="Model and settings"
        >
          <span className="image-node-unseen">Model and settings, picture {number}: </span>
          <span>
            <b>{row.node_data.model ?? "Choose a model"}</b>
            <small>
              {isUnfinished(row) && row.since !== undefined
                ? <Elapsed since={row.since} typical={model?.typical_seconds} isRunning={status === "running"} />
                : [formatCosts(row), model && formatSeconds(model)].filter(Boolean).join(" · ")}
            </small>
          </span>
          <Icon name="chevron" />
        </button>
        <NodeActions
          id={id} number={number} busy={busy} failed={status === "error"} unchanged={row.asked === "same"} again={hasImage(row)} actions={shared.actions}
          ready={Boolean(promptSpec?.basePrompt.trim() && row.node_data.model)}
        />
      </footer>}
      {settings && <NodeSettings row={row} number={number} model={model} shared={shared} />}
    </article>
  );
});

/** The next action. After a failure what was asked for is tried again, or, once it says something else, that is generated. */
const NodeActions = memo(function NodeActions({ id, number, busy, failed, unchanged, again, ready, actions }: {
  id: string; number: number; busy: boolean; failed: boolean; unchanged: boolean; again: boolean; ready: boolean; actions: Actions;
}) {
  if (busy) return <ActionButton label="Cancel" number={number} variant="quiet" run={() => actions.cancel(id)} />;
  if (failed && unchanged) return <ActionButton label="Retry" number={number} variant="strong" run={() => actions.retry(id)} />;
  return (
    <ActionButton
      label={again && !failed ? "Regenerate" : "Generate"} number={number} variant={again && !failed ? "quiet" : "strong"}
      run={() => actions.generate(id)} disabled={!ready}
    />
  );
});

function ActionButton({ label, number, variant, run, disabled }: {
  label: string; number: number; variant: string; run: () => Promise<void>; disabled?: boolean;
}) {
  const [busy, setBusy] = useState(false);
  const click = () => {
    setBusy(true);
    void run().finally(() => setBusy(false));
  };
  return (
    <button
      className="image-node-do nodrag" data-look={variant} onClick={click} disabled={busy || disabled}
      aria-label={`${label}, picture ${number}`}
    >
      {label}
    </button>
  );
}

/**
 * Fades the new image in over the previous one, which stays until the new one has loaded. The same image at an address that
 * was signed anew takes its place without a fade.
 */
const Picture = memo(function Picture({ url, forming, onFailure, onRatio }: {
  url: string | undefined; forming: boolean; onFailure: (url: string) => void;
  /** Called with the width of what is shown, divided by its height: the frame keeps it, whatever shape is chosen next. */
  onRatio: (ratio: number) => void;
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
      onLoad={({ currentTarget: { naturalWidth, naturalHeight } }) => {
        setLoaded(each);
        if (each === url && naturalHeight > 0) onRatio(naturalWidth / naturalHeight);
      }}
      onError={() => onFailure(each)}
    />
  ));
});

function Placeholder({ busy }: { busy: boolean }) {
  return <div className="image-node-blank" data-busy={busy}>{!busy && <Icon name="picture" />}</div>;
}

/** A picture of the user's own has its name in place of a prompt. */
function UploadNote({ upload, sentence }: { upload: Upload; sentence: string | undefined }) {
  return (
    <div className="image-node-upload">
      <p dir="auto">{upload.name}</p>
      <p role="status">
        {sentence ?? (upload.path ? "Your picture, to start from." : "It is not here: delete it, and add the picture again.")}
      </p>
    </div>
  );
}

const Prompt = memo(function Prompt({ id, number, saved, actions, refines }: {
  id: string; number: number; saved: string; actions: Actions; refines: boolean;
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
      dir="auto" aria-label={`Prompt of picture ${number}`} placeholder={refines ? "What should change?" : "What should it show?"}
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
