/**
 * A workflow's nodes, live: loaded, kept up to date, edited, and sent to the image daemon. Copy this file; it needs React
 * and supabase-js.
 *
 *     const workflow = useWorkflow(supabase, workflowId, { onProblem: toast });
 *     workflow.nodes.map(node => node.node_data.imageUrl);
 *     workflow.actions.generate(node.id);
 *
 * Realtime loses messages silently: while the socket is away, when a server restarts, over a rate limit. So messages are
 * only half of it. Whatever could have been missed is fetched: at every SUBSCRIBED, when the window gets the focus, and
 * when a node that is being made has been quiet for long. Everything is merged by `version`, which the database lets only
 * grow: a late message, a late answer and a message that came twice change nothing.
 */
import { useEffect, useMemo, useRef, useSyncExternalStore } from "react";
import type { RealtimeChannel, SupabaseClient } from "@supabase/supabase-js";

export type Status = "pending" | "running" | "completed" | "error" | "cancelled";

export type Quality = "low" | "standard" | "hd" | "xhigh" | "max";

export interface PromptSpec {
  basePrompt: string;
  styleModifiers?: string[];
  size?: string;
  aspectRatio?: string;
  quality?: Quality;
  seed?: number;
  negativePrompt?: string;
  previousImage?: string;
}

/** What is ours to show and not to write: the database keeps these keys, whatever a client sends. */
export interface Shown {
  status?: Status;
  runId?: string;
  progress?: number;
  message?: string;
  previewUrl?: string;
  imageUrl?: string;
  thumbnailUrl?: string;
  error?: string;
  updatedAt?: string;
}

/** A change of what is chosen: only what is named changes, within promptSpec too; undefined takes a field away. */
export interface Change extends Omit<Choices, "promptSpec"> {
  promptSpec?: Partial<Record<keyof PromptSpec, string | number | undefined>>;
}

/** What the person at the canvas chooses. */
export interface Choices {
  provider?: string;
  model?: string;
  promptSpec?: PromptSpec;
  /** The node whose image this one refines. */
  source?: string | null;
  /** Generate was asked for before that image was there: what the run is called that begins once it is. */
  wish?: string | null;
  /** Goes into the run's metadata. */
  metadata?: Record<string, unknown>;
}

export interface Position {
  x: number;
  y: number;
}

export interface WorkflowNode {
  id: string;
  workflow_id: string;
  node_type: string;
  node_data: Shown & Choices;
  position: Position | null;
  version: number;
}

/** A row of the view image_models: what can be asked for, what it costs (USD) and how long it takes. */
export interface ImageModel {
  provider: string;
  model: string;
  sizes: string[];
  ratios: string[];
  /** Those that make a difference; empty where there is one. */
  qualities: Quality[];
  seed: boolean;
  negative_prompt: boolean;
  previous_image: boolean;
  previews: boolean;
  price: number | null;
  typical_seconds: number | null;
  retired: string | null;
  successor: string | null;
}

/** `denied`: not a member. Whoever adds the first node of a new workflow becomes one. */
export type Connection = "connecting" | "live" | "away" | "denied";

/** Something that somebody should be told: a run that failed, or a call that was refused. */
export interface Problem {
  nodeId?: string;
  message: string;
  hint?: string;
}

export interface Snapshot {
  nodes: readonly WorkflowNode[];
  models: readonly ImageModel[];
  connection: Connection;
  /** False until the nodes have come for the first time. */
  loaded: boolean;
  /** How many nodes have changes that the server has not got yet. They are sent once it answers again. */
  unsent: number;
}

export interface Actions {
  generate(id: string): Promise<void>;
  cancel(id: string): Promise<void>;
  retry(id: string): Promise<void>;
  add(choices: Choices, position: Position): string;
  /** Shown at once, written a moment later; only what is named changes. */
  edit(id: string, change: Change): void;
  move(id: string, position: Position): void;
  remove(id: string): Promise<void>;
  /** Takes a `remove` back; the node shows its newest run again. */
  restore(node: WorkflowNode): void;
}

interface Message {
  id: string;
  version: number;
  deleted?: boolean;
  partial?: boolean;
  node_data?: Shown & Choices;
}

interface Edit {
  insert?: boolean;
  position?: Position;
  choices?: Choices;
}

const OURS = [
  "status", "runId", "progress", "message", "previewUrl", "imageUrl", "thumbnailUrl", "error", "updatedAt",
] as const satisfies readonly (keyof Shown)[];
const COLUMNS = "id,workflow_id,node_type,node_data,position,version";
const PAGE = 500;
const DUPLICATE = "23505";
/** Milliseconds: after the last keystroke; a node in the making without news; between two tries to load. */
const TYPING = 400, QUIET = 10_000, RETRY = 2_000;

export function isUnfinished(node: WorkflowNode): boolean {
  return node.node_data.status === "pending" || node.node_data.status === "running";
}

/** Whether it is generated as soon as the image that it refines is there. */
export function isWaiting(node: WorkflowNode): boolean {
  return Boolean(node.node_data.wish) && !isUnfinished(node);
}

export function useWorkflow(
  supabase: SupabaseClient,
  workflowId: string,
  { onProblem }: { onProblem?: (problem: Problem) => void } = {},
): Snapshot & { actions: Actions } {
  const tell = useRef(onProblem);
  useEffect(() => {
    tell.current = onProblem;
  });
  const store = useMemo(
    () => new Workflow(supabase, workflowId, problem => tell.current?.(problem)),
    [supabase, workflowId],
  );
  useEffect(() => store.open(), [store]);
  const now = () => store.snapshot;
  const snapshot = useSyncExternalStore(store.subscribe, now, now); // on a server, too: nothing yet
  return { ...snapshot, actions: store };
}

/** A node with what has been changed here on top. */
interface Made {
  row: WorkflowNode;
  edit: Edit | undefined;
  node: WorkflowNode;
}

class Workflow implements Actions {
  snapshot: Snapshot = { nodes: [], models: [], connection: "connecting", loaded: false, unsent: 0 };
  /** As the database has them. */
  #rows = new Map<string, WorkflowNode>();
  /** Deleted nodes, each with the version from which it is gone. */
  #gone = new Map<string, number>();
  /** Rows of which we know only our half at their present version. */
  #partial = new Set<string>();
  /** What has been changed here and not yet been acknowledged; shown on top of the rows. */
  #edits = new Map<string, Edit>();
  #writing = new Map<string, Promise<void>>();
  #typing = new Map<string, ReturnType<typeof setTimeout>>();
  /** What `snapshot.nodes` was made of: a node that has not changed stays the same object, and is not rendered again. */
  #made = new Map<string, Made>();
  /** Nodes whose run is being asked for. */
  #beginning = new Map<string, Promise<boolean>>();
  /** Wishes that this window is granting. */
  #granting = new Set<string>();
  #models: readonly ImageModel[] = [];
  #connection: Connection = "connecting";
  #loaded = false;
  #loading: Promise<void> | undefined;
  #again = false;
  #heard = Date.now();
  #channel: RealtimeChannel | undefined;
  #listeners = new Set<() => void>();
  #frame = false;
  #closed = false;

  constructor(
    private readonly supabase: SupabaseClient,
    private readonly id: string,
    private readonly tell: (problem: Problem) => void,
  ) {}

  /** Answers what closes it again. React opens an effect twice in development: the second time counts. */
  open(): () => void {
    this.#closed = false;
    void this.#listen();
    void this.#load();
    window.addEventListener("focus", this.#refetch);
    document.addEventListener("visibilitychange", this.#refetch);
    window.addEventListener("pagehide", this.#flush);
    const watch = setInterval(() => {
      const quiet = Date.now() - this.#heard > QUIET;
      if (quiet && [...this.#rows.values()].some(row => isUnfinished(row) || isWaiting(row))) void this.#load();
    }, QUIET / 2);
    return () => {
      this.#closed = true;
      this.#flush();
      clearInterval(watch);
      window.removeEventListener("focus", this.#refetch);
      document.removeEventListener("visibilitychange", this.#refetch);
      window.removeEventListener("pagehide", this.#flush);
      void this.#hangUp();
    };
  }

  subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  // -- what comes from the database --

  async #listen(): Promise<void> {
    // Without it the first join goes out as anon, and is refused after five seconds.
    await this.supabase.realtime.setAuth();
    if (this.#closed || this.#channel) return;
    const channel = this.supabase.channel(`workflow:${this.id}`, { config: { private: true } });
    this.#channel = channel;
    channel
      .on("broadcast", { event: "nodes_changed" }, ({ payload }) => this.#hear((payload as { nodes: Message[] }).nodes))
      .subscribe((status, error) => {
        if (this.#channel !== channel) return;
        if (status === "SUBSCRIBED") {
          this.#connection = "live";
          void this.#load();
        } else {
          this.#connection = error && /unauthorized/i.test(error.message) ? "denied" : "away";
        }
        this.#publish();
      });
  }

  /** Who has just become a member is let in at once, and not when the channel tries again by itself. */
  async #listenAnew(): Promise<void> {
    await this.#hangUp();
    await this.#listen();
  }

  async #hangUp(): Promise<void> {
    const channel = this.#channel;
    this.#channel = undefined;
    if (channel) await this.supabase.removeChannel(channel);
  }

  #hear(messages: Message[]): void {
    this.#heard = Date.now();
    const unknown: string[] = [];
    for (const message of messages) {
      if (message.deleted) this.#bury(message.id, message.version);
      else if (!message.partial) this.#take(message as WorkflowNode);
      else if (this.#takeOurs(message)) unknown.push(message.id);
    }
    this.#publish();
    this.#grantWishes();
    if (unknown.length > 0) void this.#fetch(unknown);
  }

  /** A whole row, if it is news. */
  #take(row: WorkflowNode): void {
    if (row.version < (this.#gone.get(row.id) ?? 0)) return;
    const known = this.#rows.get(row.id);
    if (known && (row.version < known.version || (row.version === known.version && !this.#partial.has(row.id)))) return;
    this.#gone.delete(row.id);
    this.#partial.delete(row.id);
    this.#put(row, known);
  }

  /** The half of a large row that a message has room for. True if the other half has to be asked for. */
  #takeOurs({ id, version, node_data: ours = {} }: Message): boolean {
    const known = this.#rows.get(id);
    if (version < (this.#gone.get(id) ?? 0) || (known && version <= known.version)) return false;
    if (known) {
      this.#partial.add(id);
      const theirs = Object.entries(known.node_data).filter(([key]) => !(OURS as readonly string[]).includes(key));
      this.#put({ ...known, version, node_data: { ...Object.fromEntries(theirs), ...ours } }, known);
    }
    return true;
  }

  #put(row: WorkflowNode, known: WorkflowNode | undefined): void {
    this.#rows.set(row.id, known ? { ...row, node_data: alike(row.node_data, known.node_data) } : row);
    const { status, error, message, runId } = row.node_data;
    const news = known !== undefined && (known.node_data.status !== status || known.node_data.runId !== runId);
    if (news && status === "error") {
      this.tell({ nodeId: row.id, message: error ?? "It failed.", ...(message && { hint: message }) });
    }
  }

  #bury(id: string, version: number): void {
    const known = this.#rows.get(id);
    if (known && known.version > version) return;
    this.#rows.delete(id);
    this.#edits.delete(id);
    this.#gone.set(id, Math.max(version, this.#gone.get(id) ?? 0));
  }

  /**
   * Begins what has waited for an image that is there by now, and forgets what waits in vain. A wish is in the row, so it
   * outlives the window that it was made in; and it is the id of the run to be, so of all windows that grant it one can.
   *
   * Unless `all` has just been fetched, what seems to stand still may be under way without our having heard of it.
   */
  #grantWishes(all = false): void {
    for (const { id, version, node_data: { wish, source } } of [...this.#rows.values()]) {
      if (!wish || this.#granting.has(wish) || this.#node(id)?.node_data.wish !== wish) continue;
      const origin = source ? this.#rows.get(source) : undefined;
      const known = all || !source || this.#gone.has(source) || (origin && origin.version > version);
      if (origin?.node_data.imageUrl && !isUnfinished(origin)) void this.#grant(id, wish, origin.node_data.imageUrl);
      else if (origin && (isUnfinished(origin) || origin.node_data.wish)) continue;
      else if (known) this.#forget(id);
      else void this.#load();
    }
  }

  async #grant(id: string, wish: string, previousImage: string): Promise<void> {
    this.#granting.add(wish);
    await this.#write(id);
    const node = this.#node(id);
    if (node?.node_data.wish !== wish) return;
    const { provider, model, promptSpec, metadata } = node.node_data;
    const { error } = await this.supabase.from("runs").insert({
      id: wish, kind: "image_gen", subject_id: this.id, status: "pending", processor: `${provider}:${model}`,
      metadata: { ...metadata, nodeId: id, promptSpec: { ...promptSpec, previousImage } },
    });
    if (error && !error.code) {
      this.#granting.delete(wish); // nobody answered: once more with the next load
      return;
    }
    if (error && error.code !== DUPLICATE) this.tell(problem(error, id));
    this.#forget(id);
    if (this.#connection !== "live") void this.#load();
  }

  #forget(id: string): void {
    this.#change(id, { choices: { wish: null } });
    void this.#write(id);
  }

  #refetch = (): void => {
    if (document.visibilityState === "visible") void this.#load();
  };

  /** Fetches everything; asked again in the meantime, it goes once more. */
  #load(): Promise<void> {
    this.#again = true;
    this.#loading ??= (async () => {
      while (this.#again && !this.#closed) {
        this.#again = false;
        if (!(await this.#loadOnce())) {
          this.#again = true;
          await new Promise(later => setTimeout(later, RETRY));
        }
      }
      this.#loading = undefined;
    })();
    return this.#loading;
  }

  async #loadOnce(): Promise<boolean> {
    const before = new Map([...this.#rows].map(([id, row]) => [id, row.version]));
    const found = new Set<string>();
    let last = "";
    for (let full = true; full; ) {
      const { data, error } = await this.supabase.from("workflow_nodes").select(COLUMNS)
        .eq("workflow_id", this.id).gt("id", last).order("id").limit(PAGE).returns<WorkflowNode[]>();
      if (error || this.#closed) return this.#closed;
      for (const row of data) {
        found.add(row.id);
        this.#take(row);
      }
      full = data.length === PAGE;
      last = data.at(-1)?.id ?? "";
    }
    // What was here before we asked, is not there, and has not changed since: it was deleted while nobody told us.
    for (const [id, version] of before) {
      if (!found.has(id) && version > 0 && this.#rows.get(id)?.version === version) this.#bury(id, version);
    }
    if (this.#models.length === 0) {
      const { data } = await this.supabase.from("image_models").select("*,qualities").order("provider").order("model")
        .returns<ImageModel[]>();
      const today = new Date().toISOString();
      this.#models = (data ?? []).filter(model => model.retired === null || model.retired > today);
    }
    this.#heard = Date.now();
    this.#loaded = true;
    this.#publish();
    this.#flush(); // what could not be sent while nobody answered
    this.#grantWishes(true);
    return true;
  }

  async #fetch(ids: string[]): Promise<void> {
    const { data } = await this.supabase.from("workflow_nodes").select(COLUMNS).in("id", ids).returns<WorkflowNode[]>();
    data?.forEach(row => this.#take(row));
    this.#publish();
    this.#grantWishes();
  }

  /** One render for all that comes within a frame. A window that nobody sees has no frames. */
  #publish(): void {
    if (this.#frame) return;
    this.#frame = true;
    const show = () => {
      this.#frame = false;
      this.#show();
    };
    if (document.visibilityState === "visible") requestAnimationFrame(show);
    else setTimeout(show);
  }

  #show(): void {
    const made = new Map<string, Made>();
    for (const [id, row] of this.#rows) {
      const edit = this.#edits.get(id);
      const last = this.#made.get(id);
      made.set(id, last?.row === row && last.edit === edit ? last : { row, edit, node: edited(row, edit) });
    }
    this.#made = made;
    this.snapshot = {
      nodes: [...made.values()].map(each => each.node),
      models: this.#models,
      connection: this.#connection,
      loaded: this.#loaded,
      unsent: this.#edits.size,
    };
    this.#listeners.forEach(listener => listener());
  }

  // -- what goes to the database --

  async generate(id: string): Promise<void> {
    await this.#generate(id);
  }

  /** Answers whether it is under way. What is beginning already, as the source of another node, does not begin twice. */
  #generate(id: string): Promise<boolean> {
    const beginning = this.#beginning.get(id) ?? this.#begin(id).finally(() => this.#beginning.delete(id));
    this.#beginning.set(id, beginning);
    return beginning;
  }

  async #begin(id: string): Promise<boolean> {
    const node = this.#node(id);
    if (!node) return false;
    const { provider, model, promptSpec, source, metadata } = node.node_data;
    const origin = source ? this.#node(source) : undefined;
    const previousImage = origin?.node_data.imageUrl;
    if (origin && !previousImage) return this.#wish(id, origin);
    return this.#call(id, "start_image_job", {
      request: {
        nodeId: id,
        workflowId: this.id,
        provider,
        model,
        promptSpec: { ...promptSpec, ...(previousImage && { previousImage }) },
        metadata,
        idempotencyKey: crypto.randomUUID(), // one click, one image: also where the request had to be repeated
      },
    });
  }

  /** Shown at once, and written when what it waits for is under way: nobody shall find a wish without hope. */
  async #wish(id: string, origin: WorkflowNode): Promise<boolean> {
    this.#change(id, { choices: { wish: `job_${Date.now()}_${crypto.randomUUID()}` } });
    const hope = isUnfinished(origin) || isWaiting(origin) || (await this.#generate(origin.id));
    if (hope) await this.#fetch([origin.id]);
    else this.#change(id, { choices: { wish: null } });
    await this.#write(id);
    return hope;
  }

  async cancel(id: string): Promise<void> {
    const node = this.#node(id);
    if (node?.node_data.wish) this.#forget(id);
    if (node && isUnfinished(node)) await this.#call(id, "cancel_run", { run_id: node.node_data.runId });
  }

  async retry(id: string): Promise<void> {
    await this.#call(id, "requeue_run", { run_id: this.#node(id)?.node_data.runId });
  }

  add(choices: Choices, position: Position): string {
    const id = crypto.randomUUID();
    this.restore({ id, workflow_id: this.id, node_type: "image", node_data: choices, position, version: 0 });
    return id;
  }

  restore(node: WorkflowNode): void {
    this.#gone.delete(node.id);
    const { wish: _, ...data } = node.node_data;
    this.#rows.set(node.id, { ...node, node_data: data, version: 0 });
    this.#change(node.id, { insert: true });
    void this.#write(node.id);
  }

  edit(id: string, { promptSpec, ...choices }: Change): void {
    // On top of what is chosen by now, not of what was drawn last: two quick changes must not undo each other.
    const asked = promptSpec && { ...this.#node(id)?.node_data.promptSpec, ...promptSpec };
    const kept = Object.entries(asked ?? {}).filter(([, value]) => value !== undefined && value !== "");
    const spec = { basePrompt: String(asked?.basePrompt ?? ""), ...Object.fromEntries(kept) } as PromptSpec;
    this.#change(id, { choices: asked ? { ...choices, promptSpec: spec } : choices });
    clearTimeout(this.#typing.get(id));
    this.#typing.set(id, setTimeout(() => void this.#write(id), TYPING));
  }

  move(id: string, position: Position): void {
    this.#change(id, { position });
    void this.#write(id);
  }

  async remove(id: string): Promise<void> {
    const row = this.#rows.get(id);
    if (!row) return;
    if (isUnfinished(row)) await this.cancel(id);
    await this.#writing.get(id);
    this.#bury(id, Number.MAX_SAFE_INTEGER); // whatever is still said about it
    this.#publish();
    const { data, error } = await this.supabase.from("workflow_nodes").delete().eq("id", id).select("version");
    // What is said about it from now on is about a node that somebody has put back.
    this.#gone.set(id, 1 + ((data?.[0]?.version as number | undefined) ?? row.version));
    if (error) {
      this.#gone.delete(id);
      this.tell(problem(error, id));
      void this.#load();
    }
  }

  #node(id: string): WorkflowNode | undefined {
    const row = this.#rows.get(id);
    return row && edited(row, this.#edits.get(id));
  }

  #change(id: string, { choices, ...rest }: Edit): void {
    const before = this.#edits.get(id);
    this.#edits.set(id, { ...before, ...rest, ...(choices && { choices: { ...before?.choices, ...choices } }) });
    this.#publish();
  }

  #flush = (): void => {
    for (const id of this.#edits.keys()) void this.#write(id);
  };

  /** Writes what has been changed here; one write at a time and node. What cannot be sent now goes with the next. */
  #write(id: string): Promise<void> {
    clearTimeout(this.#typing.get(id));
    const writing = (this.#writing.get(id) ?? Promise.resolve()).then(() => this.#writeOnce(id));
    this.#writing.set(id, writing);
    return writing;
  }

  async #writeOnce(id: string): Promise<void> {
    const edit = this.#edits.get(id);
    const node = this.#node(id);
    if (!edit || !node) return;
    const { version: _, ...whole } = node;
    const rows = this.supabase.from("workflow_nodes");
    const { data, error } = edit.insert
      ? await rows.insert(whole).select(COLUMNS).returns<WorkflowNode[]>()
      : await rows.update({
          ...(edit.position && { position: edit.position }), // a node that was moved: its position and nothing else
          ...(edit.choices && { node_data: node.node_data }),
        }).eq("id", id).select(COLUMNS).returns<WorkflowNode[]>();
    if (error && !error.code) return; // nobody answered: once more when the connection is back
    if (this.#edits.get(id) === edit) this.#edits.delete(id);
    else this.#change(id, { insert: false });
    if (error?.code === DUPLICATE) await this.#fetch([id]); // it had arrived, and its answer had not
    else if (error) {
      if (edit.insert) this.#rows.delete(id);
      this.tell(problem(error, id));
    }
    data?.forEach(row => this.#take(row));
    this.#publish();
    this.#grantWishes();
    if (edit.insert && !error && ["connecting", "denied"].includes(this.#connection)) await this.#listenAnew();
  }

  /** Calls a function of the database, after the node it is about has been written. Answers whether it went well. */
  async #call(id: string, name: string, parameters: Record<string, unknown>): Promise<boolean> {
    await this.#write(id);
    const { error } = await this.supabase.rpc(name, parameters);
    if (error) this.tell(problem(error, id));
    else if (this.#connection !== "live") await this.#load();
    return !error;
  }
}

function edited(row: WorkflowNode, edit: Edit | undefined): WorkflowNode {
  if (!edit?.position && !edit?.choices) return row;
  return { ...row, position: edit.position ?? row.position, node_data: { ...row.node_data, ...edit.choices } };
}

/** The same, with the objects of before where they say the same: what is drawn from them need not be drawn again. */
function alike(now: Shown & Choices, before: Shown & Choices): Shown & Choices {
  const same = (["promptSpec", "metadata"] as const).filter(key => JSON.stringify(now[key]) === JSON.stringify(before[key]));
  return { ...now, ...Object.fromEntries(same.filter(key => key in before).map(key => [key, before[key]])) };
}

function problem(error: { code: string; message: string; hint: string | null }, nodeId: string): Problem {
  if (!error.code) return { nodeId, message: "The server cannot be reached.", hint: "Try again when the connection is back." };
  return { nodeId, message: error.message, ...(error.hint && { hint: error.hint }) };
}
