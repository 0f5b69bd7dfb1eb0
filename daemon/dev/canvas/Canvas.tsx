/** The canvas: the workflow's nodes in React Flow, its edges ("use this image"), and the keyboard shortcuts. */
import { useCallback, useEffect, useMemo, useRef, useState } from "react";
import { Background, BackgroundVariant, MiniMap, ReactFlow, ReactFlowProvider, useReactFlow, useStore } from "@xyflow/react";
import type { Connection, Edge, EdgeChange, FinalConnectionState } from "@xyflow/react";
import type { SupabaseClient } from "@supabase/supabase-js";
import { FirstNode } from "./FirstNode";
import { Header } from "./Header";
import { ImageNode, ImageNodes, useImageNodes } from "./ImageNode";
import type { ImageFlowNode, ImageNodesValue } from "./ImageNode";
import { Lightbox } from "./Lightbox";
import { NoAccess, Share, useAccess } from "./Sharing";
import { hasImage, isUnfinished, isWaiting } from "./nodes";
import type { NodeInput, Position, Problem, WorkflowNode } from "./nodes";
import { Toasts, useToasts } from "./Toasts";
import { useWorkflow } from "./useWorkflow";

const NODE_TYPES = { image: ImageNode };
const WIDTH = 292, HEIGHT = 400, GAP = 48;
/** With more runs under way than that, nothing is animated: without a graphics card every frame would be late. */
const MAX_ANIMATED = 10;
const FIT_VIEW = { padding: 0.16, maxZoom: 1 };
/** Below that zoom text is not readable. */
const FAR_ZOOM = 0.36;
/** Pixels: narrower screens are phones. */
const NARROW_SCREEN = 760;

interface Props {
  supabase: SupabaseClient;
  workflowId: string;
  /** Why a link did not make the user a member. */
  refusal?: string | undefined;
}

export function Canvas(props: Props) {
  return <ReactFlowProvider><Flow {...props} /></ReactFlowProvider>;
}

function Flow({ supabase, workflowId, refusal }: Props) {
  const { toasts, addToast, dismiss } = useToasts();
  const onProblem = useCallback((problem: Problem) => addToast({ tone: "bad", ...problem }), [addToast]);
  const workflow = useWorkflow(supabase, workflowId, { onProblem });
  const { actions, nodes: rows, models } = workflow;
  const { nodes, setNodes, onNodesChange, onNodeDragStop } = useImageNodes(workflow);
  const [opened, setOpened] = useState<string | null>(null);
  const flow = useReactFlow<ImageFlowNode>();
  const far = useStore(state => state.transform[2] < FAR_ZOOM);
  const pane = useRef<HTMLDivElement>(null);

  const [edges, onEdgesChange] = useEdges(rows);
  const shared = useMemo<ImageNodesValue>(() => ({ actions, models, open: setOpened }), [actions, models]);

  const defaultInput = useCallback((): NodeInput => {
    const last = rows.findLast(row => row.node_data.model)?.node_data;
    const model = models.find(each => each.model === last?.model && each.provider === last?.provider) ?? models[0];
    return { ...(model && { provider: model.provider, model: model.model }) };
  }, [rows, models]);

  const focusPrompt = useCallback((id: string) => {
    setNodes(now => now.map(node => (node.selected === (node.id === id) ? node : { ...node, selected: node.id === id })));
    requestAnimationFrame(() => requestAnimationFrame(() =>
      document.querySelector<HTMLElement>(`[data-id="${id}"] .image-node-prompt`)?.focus({ preventScroll: true })));
  }, [setNodes]);

  const add = useCallback((input: NodeInput = {}, at?: Position) => {
    const place = at ?? findFreePosition(flow, pane.current, rows);
    const id = actions.add({ promptSpec: { basePrompt: "" }, ...defaultInput(), ...input }, place);
    // The prompt that is about to be typed must be readable.
    if (flow.getZoom() < FAR_ZOOM) void flow.setCenter(place.x + WIDTH / 2, place.y + HEIGHT / 2, { zoom: 1 });
    focusPrompt(id);
    return id;
  }, [actions, defaultInput, flow, rows, focusPrompt]);

  const show = useCallback((id: string) => {
    void flow.fitView({ nodes: [{ id }], ...FIT_VIEW, duration: 320 });
    setNodes(now => now.map(node => ({ ...node, selected: node.id === id })));
  }, [flow, setNodes]);

  const { isLoading, error } = workflow;
  const access = useAccess(supabase, workflowId, isLoading ? undefined : rows.length);
  const first = rows.reduce<WorkflowNode | undefined>((least, row) => (readsBefore(row, least) ? row : least), undefined)?.id;
  const fitted = useRef(false);
  useEffect(() => {
    if (fitted.current || isLoading || innerWidth >= NARROW_SCREEN) return;
    fitted.current = true; // a phone has room for one readable node: the first
    if (first) void flow.fitView({ nodes: [{ id: first }], ...FIT_VIEW });
  }, [isLoading, first, flow]);

  const remove = useCallback((removed: WorkflowNode[]) => {
    if (removed.length === 0) return;
    for (const row of removed) void actions.remove(row.id);
    addToast({
      tone: "plain",
      message: removed.length === 1 ? "The node was deleted." : `${removed.length} nodes were deleted.`,
      action: { label: "Undo", run: () => removed.forEach(row => actions.restore(row)) },
    });
  }, [actions, addToast]);

  const onConnect = useCallback(({ source, target }: Connection) => actions.edit(target, { source }), [actions]);
  /** Dropping an edge on the pane creates a node that refines its source. */
  const onConnectEnd = useCallback((event: MouseEvent | TouchEvent, state: FinalConnectionState) => {
    if (state.isValid || state.toNode || !state.fromNode || state.fromHandle?.type !== "source") return;
    const point = "changedTouches" in event ? event.changedTouches[0] : event;
    if (!point) return;
    const { x, y } = flow.screenToFlowPosition({ x: point.clientX, y: point.clientY });
    add({ source: state.fromNode.id }, { x, y: y - HEIGHT / 3 });
  }, [flow, add]);
  const isValid = useCallback(
    ({ source, target }: Edge | Connection) => !isReachable(rows, target, source), [rows]);

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (opened !== null || access === false || target.closest("input, textarea, select, dialog")) return;
      if (event.key === "n" && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        add();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !target.closest(".image-node")) {
        event.stopPropagation(); // React Flow would deselect the node
        nodes.filter(node => node.selected && canGenerate(node.data.row)).forEach(node => void actions.generate(node.id));
      } else if (event.key === "Escape") {
        setNodes(now => now.map(node => (node.selected ? { ...node, selected: false } : node)));
      }
    };
    window.addEventListener("keydown", onKey, true);
    return () => window.removeEventListener("keydown", onKey, true);
  }, [opened, access, add, nodes, setNodes, actions]);

  return (
    <ImageNodes value={shared}>
      <Header
        {...workflow} access={access} share={<Share supabase={supabase} workflowId={workflowId} />}
        selected={nodes.filter(node => node.selected).map(node => node.data.row)}
        onAdd={() => add()} onGenerate={some => some.forEach(row => void actions.generate(row.id))}
      />
      <main className="pane" ref={pane} data-calm={rows.filter(isUnfinished).length > MAX_ANIMATED} data-far={far}>
        <ReactFlow
          nodes={nodes} edges={edges} nodeTypes={NODE_TYPES} onNodesChange={onNodesChange}
          onEdgesChange={onEdgesChange} onConnect={onConnect} onConnectEnd={onConnectEnd}
          isValidConnection={isValid}
          onNodeDragStop={onNodeDragStop} onNodeDoubleClick={(_, node) => far && show(node.id)}
          onNodesDelete={deleted => remove(deleted.map(node => node.data.row))}
          onEdgesDelete={deleted => deleted.forEach(edge => {
            if (rows.some(row => row.id === edge.target)) actions.edit(edge.target, { source: null });
          })}
          deleteKeyCode={["Delete", "Backspace"]} minZoom={0.1} maxZoom={2} fitView fitViewOptions={FIT_VIEW}
          connectionRadius={36} zoomOnDoubleClick={false} selectNodesOnDrag={false} proOptions={{ hideAttribution: true }}
          defaultViewport={{ x: 0, y: 0, zoom: 1 }}
        >
          <Background variant={BackgroundVariant.Dots} gap={22} size={1.4} color="var(--dots)" />
          {rows.length > 8 && !far && (
            <MiniMap<ImageFlowNode> pannable zoomable nodeColor={minimapColor} nodeBorderRadius={40} aria-label="Overview" />
          )}
        </ReactFlow>
        {access === false && <NoAccess reason={refusal} />}
        {access && !error && rows.length === 0 && (
          <FirstNode
            onPrompt={basePrompt => {
              const id = actions.add({ ...defaultInput(), promptSpec: { basePrompt } }, findFreePosition(flow, pane.current, rows));
              void actions.generate(id);
            }}
          />
        )}
        <p className="keys" aria-hidden="true">
          <span><kbd>N</kbd> new</span>
          <span><kbd>{/Mac/.test(navigator.userAgent) ? "⌘" : "Ctrl"}</kbd> <kbd>↵</kbd> generate</span>
          <span><kbd>Del</kbd> delete</span>
        </p>
      </main>
      <Toasts toasts={toasts} dismiss={dismiss} show={show} />
      {opened !== null && (
        <Lightbox
          supabase={supabase} id={opened} rows={rows} actions={actions} onMove={setOpened}
          onClose={() => setOpened(null)}
        />
      )}
    </ImageNodes>
  );
}

/** Derives one edge from each node with a source; only the selection is state. */
function useEdges(rows: readonly WorkflowNode[]): [Edge[], (changes: EdgeChange[]) => void] {
  const [selected, setSelected] = useState<ReadonlySet<string>>(new Set());
  const edges = useMemo(() => {
    const ids = new Set(rows.map(row => row.id));
    return rows.flatMap(row => {
      const { source } = row.node_data;
      if (!source || !ids.has(source)) return [];
      const id = `${source} ${row.id}`;
      return [{ id, source, target: row.id, animated: isUnfinished(row) || isWaiting(row), selected: selected.has(id) }];
    });
  }, [rows, selected]);
  const onChange = useCallback((changes: EdgeChange[]) => setSelected(before => {
    const after = new Set(before);
    for (const change of changes) {
      if (change.type === "select" && change.selected) after.add(change.id);
      else if (change.type === "select" || change.type === "remove") after.delete(change.id);
    }
    return after;
  }), []);
  return [edges, onChange];
}

/** Whether a node comes before another in reading order. */
function readsBefore(row: WorkflowNode, other: WorkflowNode | undefined): boolean {
  const [one, two] = [row.position ?? { x: 0, y: 0 }, other?.position ?? { x: 0, y: 0 }];
  return !other || one.y < two.y || (one.y === two.y && one.x < two.x);
}

function canGenerate(row: WorkflowNode): boolean {
  return Boolean(row.node_data.promptSpec?.basePrompt.trim() && row.node_data.model) && !isUnfinished(row) && !isWaiting(row);
}

/** Whether `from` is an ancestor of `to`, or is `to`: such an edge would make a cycle. */
function isReachable(rows: readonly WorkflowNode[], from: string, to: string): boolean {
  const source = new Map(rows.map(row => [row.id, row.node_data.source]));
  for (let at: string | null | undefined = to; at; at = source.get(at)) if (at === from) return true;
  return false;
}

/** Returns the middle of the viewport, or the first free position to its right. */
function findFreePosition(flow: ReturnType<typeof useReactFlow<ImageFlowNode>>, pane: HTMLElement | null, rows: readonly WorkflowNode[]): Position {
  const box = pane?.getBoundingClientRect() ?? new DOMRect(0, 0, innerWidth, innerHeight);
  const middle = flow.screenToFlowPosition({ x: box.x + box.width / 2, y: box.y + box.height / 2 });
  const at = { x: Math.round(middle.x - WIDTH / 2), y: Math.round(middle.y - HEIGHT / 2) };
  const taken = (place: Position) => rows.some(({ position }) =>
    position && Math.abs(position.x - place.x) < WIDTH + 8 && Math.abs(position.y - place.y) < HEIGHT);
  for (let step = 0; step < 100 && taken(at); step++) at.x += WIDTH + GAP;
  return at;
}

function minimapColor({ data }: ImageFlowNode): string {
  const { status } = data.row.node_data;
  return status === "error" ? "var(--bad)" : status === "running" ? "var(--accent)" : status === "pending" ? "var(--wait)"
    : hasImage(data.row) ? "var(--good)" : "var(--faint)";
}
