/** The canvas: the workflow's nodes in React Flow, its edges ("use this image"), and what the keyboard does. */
import { useCallback, useEffect, useMemo, useRef, useState } from "react";
import { Background, BackgroundVariant, MiniMap, ReactFlow, ReactFlowProvider, useReactFlow, useStore } from "@xyflow/react";
import type { Connection, Edge, EdgeChange, FinalConnectionState } from "@xyflow/react";
import type { SupabaseClient } from "@supabase/supabase-js";
import { FirstNode } from "./FirstNode";
import { Header } from "./Header";
import { ImageNode, ImageNodes, useImageNodes } from "./ImageNode";
import type { ImageFlowNode, Surroundings } from "./ImageNode";
import { Lightbox } from "./Lightbox";
import { Toasts, useToasts } from "./Toasts";
import { isUnfinished, isWaiting, useWorkflow } from "./useWorkflow";
import type { Choices, Position, WorkflowNode } from "./useWorkflow";

const NODE_TYPES = { image: ImageNode };
const WIDTH = 292, HEIGHT = 400, GAP = 48;
/** With more nodes than that under way, nothing is animated: without a graphics card every frame would be late. */
const LIVELY = 10;
const LOOK = { padding: 0.16, maxZoom: 1 };
/** Below that zoom nobody can read. */
const FAR = 0.36;
/** Pixels: a phone. */
const NARROW = 760;

interface Props {
  supabase: SupabaseClient;
  workflowId: string;
}

export function Canvas(props: Props) {
  return <ReactFlowProvider><Flow {...props} /></ReactFlowProvider>;
}

function Flow({ supabase, workflowId }: Props) {
  const { toasts, say, dismiss } = useToasts();
  const workflow = useWorkflow(supabase, workflowId, {
    onProblem: ({ nodeId, message, hint }) => say({ tone: "bad", message, ...(hint && { hint }), ...(nodeId && { nodeId }) }),
  });
  const { actions, nodes: rows, models } = workflow;
  const { nodes, setNodes, onNodesChange, onNodeDragStop } = useImageNodes(workflow);
  const [opened, setOpened] = useState<string | null>(null);
  const flow = useReactFlow<ImageFlowNode>();
  const far = useStore(state => state.transform[2] < FAR);
  const pane = useRef<HTMLDivElement>(null);

  const [edges, onEdgesChange] = useEdges(rows);
  const around = useMemo<Surroundings>(() => ({ actions, models, open: setOpened }), [actions, models]);

  const choices = useCallback((): Choices => {
    const last = rows.findLast(row => row.node_data.model)?.node_data;
    const model = models.find(each => each.model === last?.model && each.provider === last?.provider) ?? models[0];
    return { ...(model && { provider: model.provider, model: model.model }) };
  }, [rows, models]);

  const focusPrompt = useCallback((id: string) => {
    setNodes(now => now.map(node => (node.selected === (node.id === id) ? node : { ...node, selected: node.id === id })));
    requestAnimationFrame(() => requestAnimationFrame(() =>
      document.querySelector<HTMLElement>(`[data-id="${id}"] .image-node-prompt`)?.focus({ preventScroll: true })));
  }, [setNodes]);

  const add = useCallback((more: Choices = {}, at?: Position) => {
    const place = at ?? freePlace(flow, pane.current, rows);
    const id = actions.add({ promptSpec: { basePrompt: "" }, ...choices(), ...more }, place);
    // Whoever writes has to see it.
    if (flow.getZoom() < FAR) void flow.setCenter(place.x + WIDTH / 2, place.y + HEIGHT / 2, { zoom: 1 });
    focusPrompt(id);
    return id;
  }, [actions, choices, flow, rows, focusPrompt]);

  const show = useCallback((id: string) => {
    void flow.fitView({ nodes: [{ id }], ...LOOK, duration: 320 });
    setNodes(now => now.map(node => ({ ...node, selected: node.id === id })));
  }, [flow, setNodes]);

  const { loaded } = workflow;
  const first = rows.reduce<WorkflowNode | undefined>((least, row) => (before(row, least) ? row : least), undefined)?.id;
  const shown = useRef(false);
  useEffect(() => {
    if (shown.current || !loaded || innerWidth >= NARROW) return;
    shown.current = true; // there is room for one node that can be read, so it is the first
    if (first) void flow.fitView({ nodes: [{ id: first }], ...LOOK });
  }, [loaded, first, flow]);

  const remove = useCallback((removed: WorkflowNode[]) => {
    if (removed.length === 0) return;
    for (const row of removed) void actions.remove(row.id);
    say({
      tone: "plain",
      message: removed.length === 1 ? "The node was deleted." : `${removed.length} nodes were deleted.`,
      action: { label: "Undo", run: () => removed.forEach(row => actions.restore(row)) },
    });
  }, [actions, say]);

  const onConnect = useCallback(({ source, target }: Connection) => actions.edit(target, { source }), [actions]);
  /** An edge that is dropped on the empty canvas makes the node it leads to. */
  const onConnectEnd = useCallback((event: MouseEvent | TouchEvent, state: FinalConnectionState) => {
    if (state.isValid || state.toNode || !state.fromNode || state.fromHandle?.type !== "source") return;
    const point = "changedTouches" in event ? event.changedTouches[0] : event;
    if (!point) return;
    const { x, y } = flow.screenToFlowPosition({ x: point.clientX, y: point.clientY });
    add({ source: state.fromNode.id }, { x, y: y - HEIGHT / 3 });
  }, [flow, add]);
  const isValid = useCallback(
    ({ source, target }: Edge | Connection) => !leadsTo(rows, target, source), [rows]);

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (opened !== null || target.closest("input, textarea, select, dialog")) return;
      if (event.key === "n" && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        add();
      } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !target.closest(".image-node")) {
        event.stopPropagation(); // React Flow would take the node out of the selection
        nodes.filter(node => node.selected && ready(node.data.row)).forEach(node => void actions.generate(node.id));
      } else if (event.key === "Escape") {
        setNodes(now => now.map(node => (node.selected ? { ...node, selected: false } : node)));
      }
    };
    window.addEventListener("keydown", onKey, true);
    return () => window.removeEventListener("keydown", onKey, true);
  }, [opened, add, nodes, setNodes, actions]);

  return (
    <ImageNodes value={around}>
      <Header
        {...workflow} selected={nodes.filter(node => node.selected).map(node => node.data.row)}
        onAdd={() => add()} onGenerate={some => some.forEach(row => void actions.generate(row.id))}
      />
      <main className="pane" ref={pane} data-calm={rows.filter(isUnfinished).length > LIVELY} data-far={far}>
        <ReactFlow
          nodes={nodes} edges={edges} nodeTypes={NODE_TYPES} onNodesChange={onNodesChange}
          onEdgesChange={onEdgesChange} onConnect={onConnect} onConnectEnd={onConnectEnd}
          isValidConnection={isValid}
          onNodeDragStop={onNodeDragStop} onNodeDoubleClick={(_, node) => far && show(node.id)}
          onNodesDelete={gone => remove(gone.map(node => node.data.row))}
          onEdgesDelete={gone => gone.forEach(edge => {
            if (rows.some(row => row.id === edge.target)) actions.edit(edge.target, { source: null });
          })}
          deleteKeyCode={["Delete", "Backspace"]} minZoom={0.1} maxZoom={2} fitView fitViewOptions={LOOK}
          connectionRadius={36} zoomOnDoubleClick={false} selectNodesOnDrag={false} proOptions={{ hideAttribution: true }}
          defaultViewport={{ x: 0, y: 0, zoom: 1 }}
        >
          <Background variant={BackgroundVariant.Dots} gap={22} size={1.4} color="var(--dots)" />
          {rows.length > 8 && !far && (
            <MiniMap<ImageFlowNode> pannable zoomable nodeColor={tone} nodeBorderRadius={40} aria-label="Overview" />
          )}
        </ReactFlow>
        {workflow.loaded && rows.length === 0 && (
          <FirstNode
            onPrompt={basePrompt => {
              const id = actions.add({ ...choices(), promptSpec: { basePrompt } }, freePlace(flow, pane.current, rows));
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
          supabase={supabase} id={opened} rows={rows} onMove={setOpened}
          onClose={() => setOpened(null)}
        />
      )}
    </ImageNodes>
  );
}

/** One edge for each node that refines another's image; which of them are selected is React Flow's to say. */
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

/** Whether it comes first where one reads line by line. */
function before(row: WorkflowNode, other: WorkflowNode | undefined): boolean {
  const [one, two] = [row.position ?? { x: 0, y: 0 }, other?.position ?? { x: 0, y: 0 }];
  return !other || one.y < two.y || (one.y === two.y && one.x < two.x);
}

function ready(row: WorkflowNode): boolean {
  return Boolean(row.node_data.promptSpec?.basePrompt.trim() && row.node_data.model) && !isUnfinished(row) && !isWaiting(row);
}

/** Whether `from` is reached from `to` by going back along edges, or is it: an image cannot refine itself. */
function leadsTo(rows: readonly WorkflowNode[], from: string, to: string): boolean {
  const source = new Map(rows.map(row => [row.id, row.node_data.source]));
  for (let at: string | null | undefined = to; at; at = source.get(at)) if (at === from) return true;
  return false;
}

/** The middle of what is seen, or the first place right of it that is free. */
function freePlace(flow: ReturnType<typeof useReactFlow<ImageFlowNode>>, pane: HTMLElement | null, rows: readonly WorkflowNode[]): Position {
  const box = pane?.getBoundingClientRect() ?? new DOMRect(0, 0, innerWidth, innerHeight);
  const middle = flow.screenToFlowPosition({ x: box.x + box.width / 2, y: box.y + box.height / 2 });
  const at = { x: Math.round(middle.x - WIDTH / 2), y: Math.round(middle.y - HEIGHT / 2) };
  const taken = (place: Position) => rows.some(({ position }) =>
    position && Math.abs(position.x - place.x) < WIDTH + 8 && Math.abs(position.y - place.y) < HEIGHT);
  for (let step = 0; step < 100 && taken(at); step++) at.x += WIDTH + GAP;
  return at;
}

function tone({ data }: ImageFlowNode): string {
  const { status, imageUrl } = data.row.node_data;
  return status === "error" ? "var(--bad)" : status === "running" ? "var(--accent)" : status === "pending" ? "var(--wait)"
    : imageUrl ? "var(--good)" : "var(--faint)";
}
