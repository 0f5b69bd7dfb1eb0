/**
 * The store of a workflow: loads its nodes, keeps them up to date, edits them, and starts runs. It needs supabase-js and no
 * framework. Copy this file with database.types.ts and those that it imports.
 *
 *     const workflow = new Workflow(supabase, workflowId);
 *     const unsubscribe = workflow.subscribe(({ nodes }) => draw(nodes)); // now, and at each change
 *     await workflow.generate(nodeId);
 *
 * It is connected while it has subscribers. Realtime loses messages silently: while the socket is away, when a server
 * restarts, over a rate limit. So all nodes are refetched at every SUBSCRIBED, when the window gets the focus, and when a
 * run under way has sent nothing for a while. Rows and messages are merged by `version`, which only grows: late and
 * duplicate ones change nothing.
 */
import type { SupabaseClient } from "@supabase/supabase-js";
import type { Database } from "./database.types";
import { Availability } from "./availability";
import { NodeCache } from "./cache";
import { Channel } from "./channel";
import { Clock } from "./clock";
import { NO_MEMBER, SIGNED_OUT, toProblem } from "./failures";
import type { Failure } from "./failures";
import { History } from "./history";
import { Loads } from "./loads";
import { applyPatch, isUnfinished, isWaiting, missingSources } from "./nodes";
import type {
  Actions, ImageModel, NodeInput, NodeInputPatch, NodeMessage, NodeNotes, Position, Problem, RunMessage, Snapshot,
  WorkflowNode,
} from "./nodes";
import { Pictures } from "./pictures";
import { Prices } from "./prices";
import { Removals } from "./removals";
import { Requests } from "./requests";
import { Starts } from "./starts";
import { COLUMNS } from "./store";
import type { Store } from "./store";
import { Writes } from "./writes";

/** Before anything is loaded, and on a server. */
export const EMPTY: Snapshot = {
  nodes: [], title: undefined, models: [], usage: [], history: [], connection: "connecting", isLoading: true, error: null,
  unsent: 0,
};

/** The type of the node that has the workflow's name. It is not shown. */
const CANVAS = "canvas";

const PAGE_SIZE = 500;
/** Milliseconds without messages until a refetch. */
const STALE_AFTER = 10_000;
/** Milliseconds for which a node counts as being edited. */
const EDITING = 60_000;

export class Workflow implements Actions {
  readonly id: string;
  /** Any client will do, typed by your own Database or not. */
  readonly #supabase: SupabaseClient<Database>;
  readonly #nodes = new NodeCache(({ id, node_data: { error, message } }) =>
    this.#tell({ nodeId: id, message: error ?? "It failed.", ...(message && { hint: message }) }), (node, isUnsent) => this.#tellLost(node, isUnsent));
  readonly #pictures: Pictures;
  readonly #availability: Availability;
  readonly #clock = new Clock();
  readonly #requests: Requests;
  readonly #prices: Prices;
  readonly #history: History;
  readonly #writes: Writes;
  readonly #starts: Starts;
  readonly #removals: Removals;
  readonly #channel: Channel;
  readonly #loads: Loads;
  #snapshot = EMPTY;
  #models: readonly ImageModel[] = [];
  #isLoading = true;
  #error: Problem | null = null;
  /** Undefined until the session is known. */
  #userId: string | null | undefined;
  /** Grows when a user signs out or leaves: rows that were asked for before are not shown to the next one. */
  #era = 0;
  #lastMessageAt = 0;
  #edited: { id: string; at: number } | undefined;
  #listeners = new Set<() => void>();
  #problemListeners = new Set<(problem: Problem) => void>();
  #runListeners = new Set<(runs: readonly RunMessage[]) => void>();
  #renderScheduled = false;
  /** Undo what `#open` has set up. */
  #closers: (() => void)[] = [];

  // eslint-disable-next-line @typescript-eslint/no-explicit-any -- of whatever Database
  constructor(supabase: SupabaseClient<any, any, any>, workflowId: string) {
    this.#supabase = supabase as unknown as SupabaseClient<Database>;
    this.id = workflowId;
    this.#pictures = new Pictures(this.#supabase, () => this.#scheduleRender(), problem => this.#tell(problem));
    this.#availability = new Availability(this.#supabase, () => this.#scheduleRender());
    this.#loads = new Loads(() => this.#loadOnce(), () => this.#isOpen, failure => this.#refuse(toProblem(failure)));
    this.#channel = new Channel(this.#supabase, workflowId, {
      isOpen: () => this.#isOpen,
      onNodes: messages => this.#hear(messages),
      onRuns: runs => this.#runListeners.forEach(call => call(runs)),
      onLive: () => {
        this.#loads.endPause();
        // A socket that comes back after a refusal asks nothing; a new member's is joined for the first time.
        if (this.#error === null || this.#error === NO_MEMBER) void this.#loads.load();
      },
      onDenied: () => void this.#checkAccess(),
      onChange: () => this.#scheduleRender(),
    });
    const store: Store = {
      id: this.id,
      supabase: this.#supabase,
      nodes: this.#nodes,
      connection: () => this.#channel.connection,
      era: () => this.#era,
      load: () => this.#loads.load(),
      fetch: ids => this.#fetch(ids),
      merge: (rows, era) => this.#merge(rows, era),
      render: () => this.#scheduleRender(),
      tell: problem => this.#tell(problem),
      refuse: problem => this.#refuse(problem),
      written: async isNew => {
        this.#starts.startPendingRuns();
        if (isNew && ["connecting", "denied"].includes(this.#channel.connection)) await this.#channel.rejoin();
      },
    };
    this.#writes = new Writes(store);
    this.#requests = new Requests(this.#supabase, this.#nodes, this.#clock, () => this.#scheduleRender());
    this.#prices = new Prices(this.#supabase, () => this.#scheduleRender());
    this.#history = new History(store);
    this.#starts = new Starts(store, this.#writes, this.#requests);
    this.#removals = new Removals(store, this.#writes, this.#starts);
  }

  /** Returns the same object until something changes. */
  snapshot = (): Snapshot => this.#snapshot;

  /** Calls `listener` now and at each change, at most once a frame. Returns the function that ends it. */
  subscribe = (listener: (snapshot: Snapshot) => void): (() => void) => {
    const call = () => listener(this.#snapshot);
    this.#listeners.add(call);
    if (this.#listeners.size === 1) this.#open();
    call();
    return () => {
      if (this.#listeners.delete(call) && this.#listeners.size === 0) this.#close();
    };
  };

  /** Calls `listener` with each problem, once. Returns the function that ends it. */
  onProblem = (listener: (problem: Problem) => void): (() => void) => {
    this.#problemListeners.add(listener);
    return () => this.#problemListeners.delete(listener);
  };

  /**
   * Calls `listener` with the runs without a node that have changed. Messages may be lost: select a run again whenever
   * `connection` becomes live. Returns the function that ends it.
   */
  onRuns = (listener: (runs: readonly RunMessage[]) => void): (() => void) => {
    this.#runListeners.add(listener);
    return () => this.#runListeners.delete(listener);
  };

  refresh = (): void => {
    if (this.#channel.connection !== "live") void this.#channel.rejoin();
    this.#loads.endPause();
    this.#pictures.resume();
    void this.#loads.load();
  };

  retryPicture = (url: string): void => this.#pictures.retry(url);

  get #isOpen(): boolean {
    return this.#listeners.size > 0;
  }

  /** It can be reopened: React runs effects twice in development. */
  #open(): void {
    void this.#channel.join();
    void this.#loads.load();
    this.#closers.push(this.#watchAuth());
    const listen = (target: EventTarget, event: string, handler: () => void) => {
      target.addEventListener(event, handler);
      this.#closers.push(() => target.removeEventListener(event, handler));
    };
    if (typeof document !== "undefined") {
      listen(window, "focus", this.#refetch);
      listen(window, "online", this.#refetch);
      listen(document, "visibilitychange", this.#refetch);
      listen(window, "pagehide", () => this.#writes.flush());
    }
    const watch = setInterval(() => {
      void this.#pictures.sign();
      const quiet = Date.now() - this.#lastMessageAt > STALE_AFTER;
      const open = this.#nodes.rows().some(row => isUnfinished(row) || isWaiting(row));
      if (!this.#error && (this.#writes.hasFailed || this.#starts.kept.size > 0 || this.#channel.isLost || (quiet && open))) void this.#loads.load();
    }, STALE_AFTER / 2);
    this.#closers.push(() => clearInterval(watch));
  }

  #close(): void {
    this.#closers.splice(0).forEach(close => close());
    this.#writes.flush();
    this.#loads.endPause();
    this.#availability.close();
    this.#prices.close();
    void this.#channel.leave();
  }

  /** Forgets what a user may see who signs out, and loads what the next one may. */
  #watchAuth(): () => void {
    try {
      const { data } = this.#supabase.auth.onAuthStateChange((_event, session) => {
        const before = this.#userId;
        this.#userId = session?.user.id ?? null;
        if (before && before !== this.#userId) this.#era += 1;
        // Later: supabase-js holds a lock meanwhile.
        if (before !== undefined && before !== this.#userId) setTimeout(() => this.#restart(before !== null));
        else if (session) setTimeout(() => (this.#error ? this.refresh() : this.#pictures.resume()));
      });
      return () => data.subscription.unsubscribe();
    } catch {
      return () => {}; // a client with its own `accessToken` has no auth
    }
  }

  #restart(forget: boolean): void {
    if (!this.#isOpen) return;
    if (forget) {
      this.#forget();
      this.#isLoading = true;
    }
    this.#channel.connection = "connecting";
    if (this.#userId === null) {
      void this.#channel.leave();
      this.#refuse(SIGNED_OUT);
    } else this.refresh();
    this.#scheduleRender();
  }

  /** Forgets what the next user may not see. */
  #forget(): void {
    this.#availability.close();
    this.#starts.kept.clear();
    this.#history.open(undefined);
    for (const each of [this.#nodes, this.#pictures, this.#requests]) each.clear();
  }

  #tell(problem: Problem): void {
    this.#problemListeners.forEach(listener => listener(problem));
  }

  /** Nothing more is asked until the user signs in or comes back to the window. */
  #refuse(problem: Problem): void {
    if (this.#error?.message !== problem.message) this.#tell(problem);
    this.#error = problem;
    this.#isLoading = false;
    this.#scheduleRender();
  }

  // -- from the database --

  #hear(messages: NodeMessage[]): void {
    this.#lastMessageAt = Date.now();
    for (const { id, node_data } of messages) {
      const updatedAt = node_data?.updatedAt; // one that somebody has moved keeps it
      if (updatedAt !== this.#nodes.row(id)?.node_data.updatedAt) this.#clock.hear(updatedAt, true);
    }
    const incomplete = this.#nodes.mergeMessages(messages);
    this.#scheduleRender();
    this.#starts.startPendingRuns();
    if (incomplete.length > 0) void this.#fetch(incomplete);
  }

  /** A new workflow has no member yet, and is nobody's to refuse. */
  async #checkAccess(): Promise<void> {
    const { data } = await this.#supabase.rpc("can_open_workflow", { workflow_id: this.id });
    if (data === false && this.#channel.connection === "denied") this.#refuse(NO_MEMBER);
  }

  #refetch = (): void => {
    if (globalThis.document?.visibilityState === "hidden") return;
    this.#loads.endPause();
    this.#pictures.resume();
    void this.#loads.load();
  };

  /** Fetches all nodes. */
  async #loadOnce(): Promise<Failure | undefined> {
    if (this.#models.length === 0) { // first: a node that is added beside those that are seen has a model
      const { data } = await this.#supabase.from("image_models").select("*").order("provider").order("model");
      const today = new Date().toISOString();
      this.#models = ((data ?? []) as unknown as ImageModel[]).filter(({ retired }) => retired === null || retired > today);
    }
    const before = this.#nodes.versions();
    const found = new Set<string>();
    const era = this.#era;
    let last = "";
    for (let full = true; full; ) {
      const { data, error, status } = await this.#supabase.from("workflow_nodes").select(COLUMNS)
        .eq("workflow_id", this.id).gt("id", last).order("id").limit(PAGE_SIZE);
      if (!this.#isOpen || era !== this.#era) return undefined;
      if (error) return { error, status };
      this.#merge(data, era);
      data.forEach(row => found.add(row.id));
      full = data.length === PAGE_SIZE;
      last = data.at(-1)?.id ?? "";
    }
    this.#nodes.mergeAll(before, found); // what is missing was deleted, and the message was lost
    void this.#availability.load();
    void this.#availability.loadUsage();
    this.#lastMessageAt = Date.now();
    this.#isLoading = false;
    if (this.#error !== NO_MEMBER || found.size > 0 || this.#channel.connection === "live") this.#error = null;
    this.#scheduleRender();
    this.#writes.hasFailed = false;
    this.#writes.flush(); // edits that could not be sent while the server was away
    this.#requests.resume();
    this.#prices.resume();
    if (!await this.#starts.sendKept()) this.#starts.startPendingRuns(true);
    else if (this.#starts.kept.size === 0) this.#loads.wantMore(); // its runs are not in these rows
    if (this.#channel.connection === "denied" && found.size > 0) void this.#channel.rejoin(); // a member by now
    if (this.#channel.isLost) void this.#channel.join();
    return undefined;
  }

  async #fetch(ids: string[]): Promise<void> {
    const era = this.#era;
    const { data } = await this.#supabase.from("workflow_nodes").select(COLUMNS).in("id", ids);
    this.#merge(data, era);
    this.#scheduleRender();
    this.#starts.startPendingRuns();
  }

  /** Merges rows, unless the user who asked for them has signed out or left since. */
  #merge(rows: unknown[] | null, era: number): void {
    if (era !== this.#era) return;
    for (const row of (rows ?? []) as WorkflowNode[]) {
      this.#clock.hear(row.node_data.updatedAt, false);
      this.#nodes.mergeRow(row);
    }
  }

  /** Batches changes into one render per frame. A hidden window has no frames. */
  #scheduleRender(): void {
    if (this.#renderScheduled) return;
    this.#renderScheduled = true;
    const render = () => {
      this.#renderScheduled = false;
      const rows = this.#nodes.render(this.#notes);
      const nodes = rows.filter(row => row.node_type !== CANVAS);
      const shown = this.#pictures.show([...nodes, ...this.#history.nodes]);
      this.#snapshot = {
        nodes: shown.slice(0, nodes.length),
        history: this.#history.render(shown.slice(nodes.length)),
        title: titleOf(rows),
        models: this.#models,
        usage: this.#availability.usage,
        connection: this.#channel.connection,
        isLoading: this.#isLoading,
        error: this.#error,
        unsent: this.#nodes.pendingEdits().length + this.#starts.kept.size,
      };
      if (this.#isOpen) {
        this.#availability.watch(this.#nodes.rows());
        this.#requests.watch(this.#nodes.rows());
        this.#prices.watch(nodes);
        this.#history.watch();
      }
      this.#listeners.forEach(call => call());
      if (this.#isOpen) void this.#pictures.sign();
    };
    if (globalThis.document?.visibilityState === "visible") requestAnimationFrame(render);
    else setTimeout(render);
  }

  /** What is said of a node beside its row. */
  #notes = (node: WorkflowNode): NodeNotes => {
    const cost = this.#prices.cost(node);
    return {
      ...this.#availability.reason(node),
      ...this.#requests.notes(node),
      ...(cost !== undefined && { cost }),
      ...this.#missing(node),
      ...(this.#starts.isKept(node.id) && { isKept: true }),
    };
  };

  /** What has to be made before a node's picture. */
  #missing(node: WorkflowNode): NodeNotes {
    const missing = missingSources(node, id => this.#nodes.get(id), id => this.#starts.isKept(id));
    if (missing.length === 0) return {};
    const costs = missing.map(each => this.#prices.cost(each));
    return { missing: missing.length, missingCost: costs.some(cost => cost == null) ? null : costs.reduce<number>((sum, cost) => sum + cost!, 0) };
  }

  // -- runs --

  generate = async (id: string): Promise<void> => {
    await this.#starts.generate(id);
  };

  cancel = (id: string): Promise<void> => this.#starts.cancel(id);

  retry = (id: string): Promise<void> => this.#starts.retry(id);

  show = async (id: string, runId: string): Promise<string | undefined> => {
    const { runId: last, status } = this.#nodes.row(id)?.node_data ?? {};
    const before = this.#history.shownRun(id) ?? (status === "completed" ? last : undefined);
    return (await this.#starts.show(id, runId)) ? before : undefined;
  };

  openHistory = (id: string | undefined): void => this.#history.open(id);

  share = async (): Promise<string | undefined> => {
    const { data, error, status } = await this.#supabase.rpc("share_workflow", { workflow_id: this.id });
    if (error) this.#tell(toProblem({ error, status }));
    return data ?? undefined;
  };

  leave = async (): Promise<void> => {
    const { error, status } = await this.#supabase.rpc("leave_workflow", { workflow_id: this.id });
    if (error) return this.#tell(toProblem({ error, status }));
    const unsubscribed = this.#channel.leave();
    this.#era += 1;
    this.#forget();
    this.#channel.connection = "denied";
    this.#isLoading = false;
    this.#scheduleRender();
    await unsubscribed;
  };

  // -- edits --

  add = (input: NodeInput, position: Position): string => {
    const id = crypto.randomUUID();
    this.#writes.insert({ id, workflow_id: this.id, node_type: "image", node_data: input, position, version: 0 });
    return id;
  };

  save = (id: string): Promise<void> => this.#writes.write(id);

  /** Of two windows that name it at the same moment, each may make a node: they have the same name from the next one on. */
  rename = (title: string): string | undefined => {
    const named = this.#nodes.rows().filter(row => row.node_type === CANVAS).map(row => this.#nodes.get(row.id)!);
    named.forEach(({ id }) => this.edit(id, { title }));
    if (named.length > 0) return titleOf(named);
    const id = crypto.randomUUID();
    this.#writes.insert({ id, workflow_id: this.id, node_type: CANVAS, node_data: { title }, position: null, version: 0 });
    return undefined;
  };

  now = (id: string): WorkflowNode | undefined => this.#nodes.get(id);

  restore = (node: WorkflowNode): void => this.#removals.restore(this.#pictures.original(node));

  #tellLost(node: WorkflowNode, isUnsent: boolean): void {
    if (!isUnsent && (this.#edited?.id !== node.id || Date.now() - this.#edited.at > EDITING)) return;
    this.#tell({ message: "The picture that you were changing was deleted in another window.", restore: () => this.restore(node) });
  }

  edit = (id: string, change: NodeInputPatch | ((now: NodeInput) => NodeInputPatch)): void => {
    const now = this.#nodes.get(id)?.node_data; // with the latest edit, which may not be rendered yet
    if (!now) return;
    this.#writes.edit(id, { input: applyPatch(now, typeof change === "function" ? change(now) : change) });
    this.#writes.writeSoon(id);
    this.#edited = { id, at: Date.now() };
  };

  move = (id: string, position: Position): void => {
    this.#writes.edit(id, { position });
    void this.#writes.write(id);
  };

  remove = (id: string, { keepsRun = false } = {}): Promise<void> => this.#removals.remove(id, keepsRun);
}

/** Returns the name of a workflow: that of the first node that has one, in every window the same. */
function titleOf(rows: readonly WorkflowNode[]): string | undefined {
  const named = rows.filter(row => row.node_type === CANVAS && row.node_data.title);
  return named.sort((one, other) => (one.id < other.id ? -1 : 1))[0]?.node_data.title;
}
