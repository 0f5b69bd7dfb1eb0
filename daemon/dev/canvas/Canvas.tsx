/** The canvas: the workflow's nodes in React Flow, its edges ("use this image"), and the keyboard shortcuts. */
import { useCallback, useDeferredValue, useEffect, useMemo, useRef, useState } from "react";
import { Background, BackgroundVariant, ReactFlow, ReactFlowProvider, useReactFlow, useStore } from "@xyflow/react";
import type { Connection, Edge, FinalConnectionState } from "@xyflow/react";
import type { SupabaseClient } from "@supabase/supabase-js";
import { Canvases } from "./Canvases";
import { FirstNode } from "./FirstNode";
import { Header } from "./Header";
import { ImageNode, ImageNodes, useImageNodes } from "./ImageNode";
import type { ImageFlowNode, ImageNodesValue } from "./ImageNode";
import { Lightbox } from "./Lightbox";
import { NoAccess, Share, useAccess } from "./Sharing";
import { Overview } from "./Overview";
import { chooseFiles, useDrop, useSources } from "./Sources";
import { Toasts, useToasts } from "./Toasts";
import { Toolbar, useSelecting } from "./Toolbar";
import { formatLeft, nearestLimit } from "./budget";
import { keepDraft, settleDraft } from "./drafts";
import { isReachable, useEdges } from "./edges";
import { useKeys } from "./keys";
import { useLeaveGuard } from "./leaving";
import { canGenerate, generateOrRetry, hasImage, isUnfinished } from "./nodes";
import type { NodeInput, Position, Problem, WorkflowNode } from "./nodes";
import { NODE_SIZE, placeAfter } from "./places";
import { useEditing, useUndo } from "./useEditing";
import { useHandler } from "./useHandler";
import { useWorkflow } from "./useWorkflow";
import { FAR_ZOOM, boxOf, moveDuration, useView } from "./view";

const NODE_TYPES = { image: ImageNode };
/** With more runs under way than that, nothing is animated: without a graphics card every frame would be late. */
const MAX_ANIMATED = 10;
const FIT_VIEW = { padding: 0.16, maxZoom: 1 };
const DELETE_KEYS = ["Delete", "Backspace"];
const HIDDEN = { hideAttribution: true };
const ORIGIN = { x: 0, y: 0, zoom: 1 };
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
  const onProblem = useCallback(({ restore, ...problem }: Problem) => addToast({
    tone: "bad", ...problem, ...(restore && { action: { label: "Bring it back", run: restore } }),
  }), [addToast]);
  const workflow = useWorkflow(supabase, workflowId, { onProblem });
  const { nodes: rows, models, isLoading, error, unsent } = workflow;
  const actions = useUndo(workflow.actions);
  const { nodes, setNodes, onNodesChange, onNodeDragStop } = useImageNodes({ nodes: rows, actions });
  const [opened, setOpened] = useState<string | null>(null);
  const flow = useReactFlow<ImageFlowNode>();
  const far = useStore(state => state.transform[2] < FAR_ZOOM);
  const pane = useRef<HTMLDivElement>(null);

  const [edges, onEdgesChange] = useEdges(rows);
  const { findPlace, reveal } = useView(pane);
  const access = useAccess(supabase, workflowId, isLoading ? undefined : rows.length);

  const defaultInput = useHandler((): NodeInput => {
    const last = rows.findLast(row => row.node_data.model)?.node_data;
    const model = models.find(each => each.model === last?.model && each.provider === last?.provider) ?? models[0];
    return { ...(model && { provider: model.provider, model: model.model }) };
  });

  const select = useCallback((id: string, others = false) => setNodes(now => now.map(node => {
    const selected = node.id === id ? !others || !node.selected : others && node.selected === true;
    return (node.selected ?? false) === selected ? node : { ...node, selected };
  })), [setNodes]);
  const addToSelection = useCallback((id: string) => setNodes(now => now.map(node =>
    (node.id === id && !node.selected ? { ...node, selected: true } : node))), [setNodes]);
  const [selecting, setSelecting] = useSelecting(pane, addToSelection);
  /** The node at which an edge was begun by a key or a button. */
  const [connecting, setConnecting] = useState<string | null>(null);
  const deselect = useCallback(() => {
    setSelecting(false);
    setConnecting(null);
    setNodes(now => now.map(node => (node.selected ? { ...node, selected: false } : node)));
  }, [setNodes, setSelecting]);

  const add = useCallback((input: NodeInput = {}, at?: Position) => {
    const place = findPlace(at);
    const id = actions.add({ promptSpec: { basePrompt: "" }, ...defaultInput(), ...input }, place);
    reveal(place); // the prompt that is about to be typed must be readable
    select(id);
    requestAnimationFrame(() => requestAnimationFrame(() => {
      select(id); // it is there by now
      document.querySelector<HTMLElement>(`[data-id="${id}"] .image-node-prompt`)?.focus({ preventScroll: true });
    }));
    return id;
  }, [actions, defaultInput, findPlace, reveal, select]);

  const refine = useCallback((id: string) => {
    const source = flow.getNode(id);
    if (!source) return;
    const { x, y, width, height } = boxOf(source);
    add({ source: id }, placeAfter({ x, y, width, height }, flow.getNodes().map(boxOf)));
  }, [flow, add]);

  const { uploading, addPictures } = useSources({
    supabase, workflowId, actions, remove: workflow.actions.remove, addToast, findPlace, reveal, isOpen: access === true,
  });
  const addFiles = (files: File[], point?: Position) => void addPictures(files, point && flow.screenToFlowPosition(point));
  const [isOver, dropListeners] = useDrop(access === true, addFiles);
  const shared = useMemo<ImageNodesValue>(
    () => ({ actions, models, open: setOpened, refine, uploading }), [actions, models, refine, uploading]);

  const show = useCallback((id: string) => {
    void flow.fitView({ nodes: [{ id }], ...FIT_VIEW, duration: moveDuration() });
    select(id);
  }, [flow, select]);

  useEffect(() => settleDraft(rows, unsent), [rows, unsent]);
  const first = nodes[0]?.id;
  const fitted = useRef(false);
  useEffect(() => {
    if (fitted.current || isLoading || innerWidth >= NARROW_SCREEN) return;
    fitted.current = true; // a phone has room for one readable node: the first
    if (first) void flow.fitView({ nodes: [{ id: first }], ...FIT_VIEW });
  }, [isLoading, first, flow]);

  useLeaveGuard(unsent, workflow.connection === "live", uploading.size > 0);
  const remove = useCallback((removed: WorkflowNode[]) => {
    if (removed.length === 0) return;
    for (const row of removed) void actions.remove(row.id);
    const step = actions.lastStep();
    addToast({
      tone: "plain",
      message: removed.length === 1 ? "The node was deleted." : `${removed.length} nodes were deleted.`,
      action: { label: "Undo", run: () => actions.undoStep(step) },
    });
  }, [actions, addToast]);

  useEditing({ actions, isActive: opened === null && access !== false, remove, setNodes, addToast, reveal });

  const onConnect = useCallback(({ source, target }: Connection) => actions.edit(target, { source }), [actions]);
  /** Dropping an edge on the pane creates a node that refines its source. */
  const onConnectEnd = useCallback((event: MouseEvent | TouchEvent, state: FinalConnectionState) => {
    if (state.isValid || state.toNode || !state.fromNode || state.fromHandle?.type !== "source") return;
    const point = "changedTouches" in event ? event.changedTouches[0] : event;
    if (!point) return;
    const { x, y } = flow.screenToFlowPosition({ x: point.clientX, y: point.clientY });
    add({ source: state.fromNode.id }, { x, y: y - NODE_SIZE.height / 3 });
  }, [flow, add]);
  const isValid = useHandler(({ source, target }: Edge | Connection) =>
    !isReachable(rows, target, source) && !rows.find(row => row.id === target)?.node_data.upload);
  /** Ends the edge that was begun by a key or a button. */
  const connectTo = useHandler((target: string) => {
    if (connecting === null) return false;
    setConnecting(null);
    if (isValid({ id: "", source: connecting, target })) actions.edit(target, { source: connecting });
    else addToast({ tone: "bad", message: "These two cannot be connected.", hint: "A picture cannot start from itself, or from what starts from it." });
    return true;
  });
  const showNear = useHandler((_: unknown, node: ImageFlowNode) => void (far && show(node.id)));
  const endEdge = useCallback((_: unknown, node: ImageFlowNode) => void connectTo(node.id), [connectTo]);
  const removeNodes = useCallback((deleted: ImageFlowNode[]) => remove(deleted.map(node => node.data.row)), [remove]);
  const removeEdges = useCallback((deleted: Edge[]) => deleted.forEach(edge => {
    if (actions.now(edge.target)) actions.edit(edge.target, { source: null });
  }), [actions]);

  useKeys(nodes, opened === null && access !== false, useMemo(() => ({
    add, refine, connectTo, deselect,
    connect: setConnecting,
    open: id => rows.some(row => row.id === id && hasImage(row)) && setOpened(id),
    generate: some => some.filter(node => canGenerate(node.data.row)).forEach(node => void generateOrRetry(node.data.row, actions)),
    remove: some => {
      const next = nodes[1 + nodes.findIndex(node => node.id === some[0]?.id)] ?? nodes.at(-2);
      remove(some.map(node => node.data.row));
      if (next) focusNode(next.id);
    },
    toggle: id => select(id, true),
  }), [add, refine, connectTo, deselect, rows, nodes, actions, remove, select]));

  // Later: it has all animated parts styled anew, and what has begun is to be seen first.
  const isCalm = useDeferredValue(rows.filter(isUnfinished).length > MAX_ANIMATED);
  const limit = nearestLimit(workflow.usage);
  const selectedNodes = nodes.filter(node => node.selected);
  const [onlySelected] = selectedNodes.length === 1 ? selectedNodes : [];
  return (
    <ImageNodes value={shared}>
      <Header
        {...workflow} actions={actions} access={access}
        brand={(
          <Canvases
            supabase={supabase} workflowId={workflowId} left={limit && formatLeft(limit)} title={workflow.title} onRename={access ? actions.rename : undefined}
          />
        )}
        share={<Share supabase={supabase} workflowId={workflowId} />}
        selected={selectedNodes.map(node => node.data.row)}
        onAdd={() => add()} onGenerate={some => some.forEach(row => void generateOrRetry(row, actions))}
      />
      <main
        className="pane" ref={pane} data-calm={isCalm} data-far={far}
        data-selecting={selecting} data-connecting={connecting !== null} data-over={isOver} {...dropListeners}
        onInput={({ target }) => {
          if (target instanceof HTMLTextAreaElement) keepDraft(workflowId, target.value);
        }}
      >
        <ReactFlow
          nodes={nodes} edges={edges} nodeTypes={NODE_TYPES} onNodesChange={onNodesChange}
          onEdgesChange={onEdgesChange} onConnect={onConnect} onConnectEnd={onConnectEnd}
          isValidConnection={isValid}
          onNodeDragStop={onNodeDragStop} onNodeClick={endEdge} onNodeDoubleClick={showNear}
          onNodesDelete={removeNodes} onEdgesDelete={removeEdges}
          deleteKeyCode={DELETE_KEYS} minZoom={0.1} maxZoom={2} fitView fitViewOptions={FIT_VIEW}
          connectionRadius={36} zoomOnDoubleClick={false} selectNodesOnDrag={false} proOptions={HIDDEN}
          defaultViewport={ORIGIN}
        >
          <Background variant={BackgroundVariant.Dots} gap={22} size={1.4} color="var(--dots)" />
          {!far && <Overview nodes={nodes} />}
        </ReactFlow>
        {access === false && <NoAccess workflowId={workflowId} reason={refusal} />}
        {access && !error && rows.length === 0 && (
          <FirstNode
            workflowId={workflowId}
            onPrompt={basePrompt => {
              const id = actions.add({ ...defaultInput(), promptSpec: { basePrompt } }, findPlace());
              void actions.generate(id);
            }}
            onPicture={() => chooseFiles(addFiles)}
          />
        )}
        <Toasts toasts={toasts} dismiss={dismiss} show={show} />
      </main>
      {access && (
        <Toolbar
          selected={selectedNodes.length} selecting={selecting} onSelecting={setSelecting} connecting={connecting !== null}
          onPicture={() => chooseFiles(addFiles)} onRefine={onlySelected && (() => refine(onlySelected.id))}
          onConnect={onlySelected && (() => setConnecting(onlySelected.id))}
          onDelete={() => {
            remove(selectedNodes.map(node => node.data.row));
            deselect();
          }}
          onDone={deselect}
        />
      )}
      {opened !== null && (
        <Lightbox
          id={opened} rows={rows} history={workflow.history} actions={actions} onMove={setOpened}
          onClose={() => setOpened(null)}
        />
      )}
    </ImageNodes>
  );
}

/** Gives a node the focus, once it is there. */
function focusNode(id: string): void {
  requestAnimationFrame(() => document.querySelector<HTMLElement>(`.react-flow__node[data-id="${id}"]`)?.focus({ preventScroll: true }));
}
