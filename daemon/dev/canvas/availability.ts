/**
 * Why runs wait, and what the user may use: the rows of image_provider_status and of image_usage. Copy this file with
 * workflow.ts, which asks it.
 *
 * A run that starts within a second costs nothing. Once one has waited for longer, the states are loaded, and kept up to
 * date by the broadcasts of the topic `image_providers`. What nobody may be there to broadcast, since the last daemon has
 * gone, is looked up when its lease has ended (`check_in`).
 */
import type { RealtimeChannel, SupabaseClient } from "@supabase/supabase-js";
import type { Database } from "./database.types";
import type { NodeNotes, ProviderState, Usage, WorkflowNode } from "./nodes";

const TOPIC = "image_providers";
/** Milliseconds: that a run waits before it is asked why; after the end of a lease; between two looks at what was used. */
const PATIENCE = 1_000, MARGIN = 300, USAGE_PAUSE = 1_000;
/** Milliseconds between two looks where other code has the channel. */
const POLL = 2_000;

export class Availability {
  readonly #supabase: SupabaseClient<Database>;
  readonly #onChange: () => void;
  #states = new Map<string, ProviderState>();
  /** The versions of the rows that show pending runs, by the runs' ids. */
  #pending = new Map<string, number>();
  /** The processors of pending runs, each as of a version: a fallback leads to another than the node names, and changes the row. */
  #routes = new Map<string, { processor: string; version: number }>();
  #usage: readonly Usage[] = [];
  /** What is under way: once it changes, more has been used. */
  #underWay = "";
  #channel: RealtimeChannel | undefined;
  #isOpen = false;
  /** Grows with `close`: what was asked for before is another user's. */
  #era = 0;
  #patience: ReturnType<typeof setTimeout> | undefined;
  #check: ReturnType<typeof setTimeout> | undefined;
  #counting: ReturnType<typeof setTimeout> | undefined;

  constructor(supabase: SupabaseClient<Database>, onChange: () => void) {
    this.#supabase = supabase;
    this.#onChange = onChange;
  }

  get usage(): readonly Usage[] {
    return this.#usage;
  }

  /** Returns why the run of a node waits, and until when. */
  reason = ({ node_data: { status, runId } }: WorkflowNode): NodeNotes => {
    const processor = status === "pending" && runId ? this.#routes.get(runId)?.processor : undefined;
    if (processor === undefined) return {};
    const state = this.#states.get(processor) ?? this.#states.get(processor.split(":", 1)[0] ?? "");
    if (!state?.sentence || state.state === "open") return {};
    return { waitsFor: state.sentence, ...(state.until && { waitsUntil: state.until }) };
  };

  /** Takes note of the rows that are shown. */
  watch(rows: readonly WorkflowNode[]): void {
    this.#pending = new Map(rows.flatMap(({ version, node_data: { status, runId } }) =>
      status === "pending" && runId ? [[runId, version] as const] : []));
    for (const id of this.#routes.keys()) if (!this.#pending.has(id)) this.#routes.delete(id);
    if (this.#pending.size === 0) {
      clearTimeout(this.#patience);
      this.#patience = undefined;
    } else if (!this.#isOpen) this.#patience ??= setTimeout(() => this.#open(), PATIENCE);
    else void this.#fetchRoutes();
    const underWay = rows.map(({ node_data: { runId, status } }) => `${runId}${status}`).join();
    if (underWay !== this.#underWay && this.#usage.some(isLimited)) {
      this.#counting ??= setTimeout(() => {
        this.#counting = undefined;
        void this.loadUsage();
      }, USAGE_PAUSE);
    }
    this.#underWay = underWay;
  }

  /** Loads what the user has used and may use. */
  async loadUsage(): Promise<void> {
    const era = this.#era;
    const { data } = await this.#supabase.from("image_usage").select("*");
    if (!data || era !== this.#era) return;
    this.#usage = data as unknown as Usage[];
    this.#onChange();
  }

  /** Loads the states, if a run has waited: messages may have been lost. */
  async load(): Promise<void> {
    if (!this.#isOpen) return;
    const era = this.#era;
    const { data } = await this.#supabase.from("image_provider_status").select("*");
    if (!data || era !== this.#era) return;
    this.#states.clear();
    this.#merge(data as unknown as ProviderState[]);
  }

  /** Forgets all, and what is under way: the next user may see other things. */
  close(): void {
    this.#era += 1;
    for (const timer of [this.#patience, this.#check, this.#counting]) clearTimeout(timer);
    this.#patience = this.#check = this.#counting = undefined;
    this.#isOpen = false;
    this.#states.clear();
    this.#routes.clear();
    this.#usage = [];
    this.#underWay = "";
    if (this.#channel) void this.#supabase.removeChannel(this.#channel);
    this.#channel = undefined;
  }

  #open(): void {
    if (this.#isOpen) return;
    this.#isOpen = true;
    void this.load();
    if (this.#supabase.getChannels().some(({ topic }) => topic === `realtime:${TOPIC}`)) return; // another workflow's
    const channel = this.#supabase.channel(TOPIC, { config: { private: true } });
    this.#channel = channel;
    channel
      .on("broadcast", { event: "providers_changed" }, ({ payload }) => {
        const states = (payload as { providers: ProviderState[] }).providers;
        // A model that is open again may have no row of its own any more.
        if (states.some(({ model, state }) => model !== null && state === "open")) void this.load();
        else if (this.#channel === channel) this.#merge(states);
      })
      .subscribe(status => {
        if (this.#channel === channel && status === "SUBSCRIBED") void this.load();
      });
  }

  #merge(states: readonly ProviderState[]): void {
    states.forEach(state => this.#states.set([state.provider, state.model].filter(Boolean).join(":"), state));
    const seconds = states.map(({ check_in }) => check_in ?? Infinity);
    const pause = this.#channel ? Math.min(...seconds) * 1000 + MARGIN : POLL;
    clearTimeout(this.#check);
    this.#check = undefined;
    // Without runs that wait nobody looks; the next one that waits does.
    if (Number.isFinite(pause)) {
      this.#check = setTimeout(() => {
        if (this.#pending.size > 0) void this.load();
      }, pause);
    }
    void this.#fetchRoutes();
    this.#onChange();
  }

  /** Fetches what the pending runs wait for, where anything is closed. */
  async #fetchRoutes(): Promise<void> {
    if (![...this.#states.values()].some(({ state }) => state !== "open")) return;
    const due = [...this.#pending].filter(([id, version]) => this.#routes.get(id)?.version !== version).slice(0, 100);
    if (due.length === 0) return;
    const era = this.#era;
    const { data } = await this.#supabase.from("runs").select("id,processor,routed_to").in("id", due.map(([id]) => id));
    if (!data || era !== this.#era) return;
    const processors = new Map(data.map(({ id, processor, routed_to }) => [id, routed_to ?? processor]));
    due.forEach(([id, version]) => this.#routes.set(id, { processor: processors.get(id) ?? "", version }));
    this.#onChange();
  }
}

/** Whether there is an end to what may be made. */
export function isLimited({ max_images, max_usd }: Usage): boolean {
  return max_images !== null || max_usd !== null;
}
